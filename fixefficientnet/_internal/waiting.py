"""Waits for others, each of which ends: for a lock that another process holds, and for what comes over a network.

Half an hour is longer than what is waited for takes: an export, or 10 MB of a download, which come in one piece.
Imports no torch.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TypeVar

from fixefficientnet._internal.files import why_no_lock
from fixefficientnet.errors import OptionError

VARIABLE = "FIXEFFICIENTNET_TIMEOUT"
"""Names the seconds in the environment."""
_USUAL = 1800

Result = TypeVar("Result")


def longest() -> float:
    """Seconds that a command waits for another process, or for a network, while nothing moves.

    Raises:
        OptionError: The variable has a value that it cannot have.
    """
    value = os.environ.get(VARIABLE) or str(_USUAL)
    with contextlib.suppress(ValueError):
        if 0 < float(value) <= threading.TIMEOUT_MAX:
            return float(value)
    raise OptionError(f"{VARIABLE}={value}: it is a number of seconds above 0; without it, {_USUAL}.")


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds the lock of a file; a killed process leaves none behind. Messages name what it is for.

    Raises:
        TimeoutError: Another process held it for too long; names that process.
        OSError: There can be no lock.
    """
    from huggingface_hub.utils import WeakFileLock  # not before it is needed: it takes long

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(path, timeout=min(1, longest())))
        except TimeoutError:
            if reason := why_no_lock(path):
                raise OSError(None, f"it cannot be locked: {reason}", str(path)) from None
            try:
                stack.enter_context(WeakFileLock(path, timeout=longest()))
            except TimeoutError:
                raise TimeoutError(f"{what} is in use {by_whom(path) or 'by another process'}, {_too_long()}") from None
        yield


def in_time(work: Callable[[], Result], moving: Callable[[], object] = lambda: None, *, parts: int = 1) -> Result:
    """Does work that waits for others, in a thread, and gives it up where nothing moves any more.

    What is given up goes on in its thread, which keeps no process from ending.

    Args:
        work: What to do.
        moving: Gives something else each time, as long as it is worth waiting.
        parts: How many times as long it may take, where nobody can see it move.

    Raises:
        TimeoutError: Nothing moved for too long.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    seconds = longest() * parts
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    before, since = moving(), time.monotonic()
    while not wait([done], timeout=min(1, seconds)).done:
        if (now := moving()) != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > seconds:
            raise TimeoutError(f"nothing moved any more, {_too_long()}")
    thread.join()
    return done.result()


def by_whom(path: Path) -> str:
    """Who holds a lock, as the words "by the process 7"; empty where nobody does, or this system does not tell."""
    try:
        inode = path.stat().st_ino
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return ""
    # "3: FLOCK  ADVISORY  WRITE 7 fe:00:1234 0 EOF"; an arrow stands before who waits
    found = [one[4] for one in held if one[1] != "->" and one[5].endswith(f":{inode}") and one[4].isdecimal()]
    if not found:
        return ""
    own = int(found[0]) == os.getpid()
    return "by this process, whose earlier call has not ended" if own else f"by the process {found[0]}"


def _too_long() -> str:
    return f"which was waited for {longest():g} s ({VARIABLE} sets how long)"
