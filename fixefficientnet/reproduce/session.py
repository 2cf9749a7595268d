"""What all parts of a run share: the processes, how to stop, what could not be read."""

import contextlib
import math
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub.utils import WeakFileLock

from fixefficientnet._internal.files import check_links, remove_partial, why_no_lock, write_atomically
from fixefficientnet.errors import DataError, FixEfficientNetError, Interrupted, RunError
from fixefficientnet.reproduce.folder import OURS
from fixefficientnet.reproduce.log import Log

T = TypeVar("T")
_LOCK_SECONDS = 2
_SAME_REQUEST_SECONDS = 1.0
_ON_SIGNAL = (
    b"\nStopping after this step, once all is saved.\n",
    b"\nStill in this step, which will be saved. Ctrl-C once more ends the run immediately, and loses the step.\n",
)
"""What the first and the second request to stop are answered."""


@dataclass
class Session:
    """What all parts of a run share.

    Attributes:
        accelerator: Processes, devices, precision.
        folder: Folder of the run.
        log: Prints and logs what the run does.
        workers: Loading processes per process.
        max_unreadable: Largest share of a dataset's images that may be unreadable.
        unreadable: The images that could not be read, each with the reason, by dataset.
        unturned: Paths of the images that have an EXIF orientation and were not turned, by dataset.
        stopped_by: Number of the signal that asked to stop; 0: none did.
    """

    accelerator: Accelerator
    folder: Path
    log: Log
    workers: int = 0
    max_unreadable: float = 0.01
    unreadable: dict[str, set[str]] = field(default_factory=dict)
    unturned: dict[str, set[str]] = field(default_factory=dict)
    stopped_by: int = 0
    _working_alone: bool = field(default=False, init=False)

    @property
    def main(self) -> bool:
        """Whether this is the first process, which alone writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        """This process's number."""
        return int(self.accelerator.process_index)

    def count_unreadable(self, what: str, reasons: Sequence[str], total: int) -> None:
        """Remembers images of a split that could not be read, each by a reason, which names it and so counts once.

        Where they are more than tolerated of the total, that is a DataError.
        """
        found = self.unreadable.setdefault(what, set())
        found.update(reasons)
        if reasons and len(found) > self.max_unreadable * total:
            raise DataError(
                f"{len(found)} of {total} images of {what} cannot be read so far, tolerated are "
                f"{self.max_unreadable:.1%} (--max-unreadable):\n  " + "\n  ".join(sorted(found)[:5])
            )

    def count_unturned(self, what: str, names: Iterable[str]) -> None:
        """Remembers images of a split whose EXIF orientation was ignored."""
        self.unturned.setdefault(what, set()).update(names)

    def share_counted(self, what: str, total: int) -> None:
        """Gives all processes the images of a split that any of them could not read, or did not turn.

        Too many unreadable ones together are a DataError.
        """
        if self.world > 1:
            mine = self.unreadable.get(what, set()), self.unturned.get(what, set())
            unreadable, unturned = zip(*gather_object([mine]), strict=True)
            self.count_unturned(what, set().union(*unturned))
            with self.alike():
                self.count_unreadable(what, sorted(set().union(*unreadable)), total)

    @contextlib.contextmanager
    def alike(self) -> Iterator[None]:
        """Within, an error is that of all processes alike, and only the first one needs to say it."""
        try:
            yield
        except (FixEfficientNetError, Interrupted) as error:
            error.said_elsewhere = not self.main  # type: ignore[union-attr]
            raise

    def on_main(self, work: Callable[[], T]) -> T:
        """Does something in the first process alone; its result, or its failure, is that of all.

        Within such work, the first process just does it.
        """
        if self._working_alone:
            return work()
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.main:
            self._working_alone = True
            try:
                outcome[0] = work()
            except Exception as error:  # whatever it is: the others wait
                failure = error
                outcome[1] = error.number if isinstance(error, Interrupted) else f"{type(error).__name__}: {error}"
            finally:
                self._working_alone = False
        if self.world > 1:
            broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        with self.alike():
            if isinstance(outcome[1], int):
                raise Interrupted(outcome[1])
            if outcome[1] is not None:
                raise RunError(outcome[1])
        result: T = outcome[0]
        return result

    def together(self, work: Callable[[], T]) -> T:
        """Does something in each process; where it fails in one, all fail, and the first says why."""
        result, failure = None, None
        try:
            result = work()
        except FixEfficientNetError as error:
            failure = error
        if self.world > 1:
            failures = gather_object([f"{failure}" if failure else None])
            others = [(number, text) for number, text in enumerate(failures) if text is not None]
            with self.alike():
                if failure is not None:
                    raise failure
                if others:
                    raise RunError(f"In process {others[0][0]}: {others[0][1]}")
        elif failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Within, SIGINT and SIGTERM set `stopped_by` instead of ending the process; a third Ctrl-C ends it.

        Terminals and launchers pass a signal on, so that one request may come several times: what follows within a
        second counts as the same. More SIGTERM change nothing: who sends them sends SIGKILL in the end.

        Raises:
            Interrupted: At the end, if there was a signal that nobody has looked at.
        """
        requests = 0
        last = -math.inf

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal requests, last
            self.stopped_by = self.stopped_by or number
            now = time.monotonic()
            again, last = now - last <= _SAME_REQUEST_SECONDS, now
            if again:
                return
            requests += 1
            if requests > len(_ON_SIGNAL) and number == signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            if self.main:
                os.write(2, _ON_SIGNAL[min(requests, len(_ON_SIGNAL)) - 1])

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
            if self.stopped_by:
                with self.alike():
                    raise Interrupted(self.stopped_by)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Keeps other runs out of a folder; a killed process leaves no lock behind.

        Raises:
            RunError: Another process has it, or not all processes of this run see the same folder.
        """
        owner = folder / ".owner"
        token = f"{os.getpid()} {secrets.token_hex(8)}"

        def take(stack: contextlib.ExitStack) -> str:
            folder.mkdir(parents=True, exist_ok=True)
            check_links(folder, [*OURS, ".lock", ".owner"])
            try:
                # loading processes share the lock, and end a moment after a parent that was killed
                stack.enter_context(WeakFileLock(folder / ".lock", timeout=_LOCK_SECONDS))
            except OSError as error:
                if reason := why_no_lock(folder / ".lock"):
                    raise RunError(
                        f"{folder} cannot be locked: {reason}. Its file system may be mounted without locks (NFS "
                        "without a lock service, Lustre without the option flock). Choose another with --output."
                    ) from error
                if not isinstance(error, TimeoutError):
                    raise
                pid = owner.read_text().partition(" ")[0] if owner.exists() else "unknown"
                raise RunError(
                    f"{folder} is in use by the process {pid}. Wait for it, or choose another folder."
                ) from None
            remove_partial(folder)
            write_atomically(owner, token.encode())
            return token

        def see(token: str) -> None:
            for _ in range(50):  # a network file system may take its time
                if owner.exists() and owner.read_text() == token:
                    return
                time.sleep(0.1)
            raise RunError(f"{folder} is not the same folder in all processes: give one that all nodes share.")

        with contextlib.ExitStack() as stack:
            shared = self.on_main(lambda: take(stack))
            self.together(lambda: None if self.main else see(shared))
            yield
