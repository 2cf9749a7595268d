"""What all parts of a run share: the processes, how to stop, what could not be read."""

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from fixefficientnet.errors import DataError, FixEfficientNetError, RunError
from fixefficientnet.files import remove_partial
from fixefficientnet.reproduce.log import Log

T = TypeVar("T")


class Interrupted(Exception):  # noqa: N818
    """The run was asked to stop, and has saved what it had: no error, the same call goes on."""

    def __init__(self, number: int):
        super().__init__(f"Stopped by {signal.Signals(number).name}.")
        self.number = number


@dataclass
class Session:
    """One run's surroundings.

    Attributes:
        accelerator: Processes, devices, precision.
        folder: The run's.
        log: Where it tells what it does.
        workers: Loading processes per process.
        max_unreadable: Largest share of a data set's pictures that may be unreadable.
        unreadable: Pictures that could not be read: name or index → reason.
        stopped_by: The signal that asked to stop; 0: none did.
    """

    accelerator: Accelerator
    folder: Path
    log: Log
    workers: int = 0
    max_unreadable: float = 0.01
    unreadable: dict[str, str] = field(default_factory=dict)
    stopped_by: int = 0

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

    def count_unreadable(self, what: str, found: Sequence[tuple[int, str]], total: int) -> None:
        """Remembers pictures that could not be read.

        Raises:
            DataError: They are more than tolerated.
        """
        for index, reason in found:
            self.unreadable[f"{what} {index}"] = reason
        mine = [reason for key, reason in self.unreadable.items() if key.startswith(f"{what} ")]
        if found and len(mine) > self.max_unreadable * total:
            raise DataError(
                f"{len(mine)} of {total} pictures of {what} cannot be read so far, tolerated are "
                f"{self.max_unreadable:.1%} (--max-unreadable):\n  " + "\n  ".join(mine[:5])
            )

    def on_main(self, work: Callable[[], T]) -> T:
        """Does something in the first process alone; its result, or its error, is that of all."""
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = work()
            except (FixEfficientNetError, Interrupted) as error:
                outcome[1] = error
        if self.world > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Within, SIGINT and SIGTERM set `stopped_by` instead of ending the process; a second one ends it."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.stopped_by:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self.stopped_by = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Keeps other runs out of a folder; a killed process leaves no lock behind.

        Raises:
            RunError: Another process has it.
        """
        path = folder / ".lock"
        file = None

        def take() -> None:
            nonlocal file
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RunError(
                    f"{folder} is in use by the process {file.read().strip() or 'unknown'}. "
                    "Wait for it, or choose another folder."
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            remove_partial(folder)

        try:
            self.on_main(take)
            yield
        finally:
            if file:
                file.close()
