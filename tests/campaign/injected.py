"""A command in whose process an operation of the file system fails, or is its last one.

Operations are what Python's audit hooks tell: files opened to write, renamed and removed, folders made and removed,
locks; and `os.fsync`. The command's group of processes is its own, so that all of it can be ended.
"""

import contextlib
import ctypes
import errno
import functools
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WRITING = ("open", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "fsync")
REMOVING = ("os.remove", "os.rmdir")
LOCKING = ("fcntl.flock", "fcntl.lockf")
KILL, REMOVE = "kill", "remove"
MODULE = "campaign.injected"


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
        watch: The folder whose files count.
        kinds: The operations that count.
        at: Number of the operation that goes wrong, from 1; 0: none.
        times: How many of them, from that one on.
        what: KILL ends the group of processes; REMOVE removes the folder first; else the name of an error.
        limit: Bytes that a file can have, but for what the command says; None: any number.
        limit_kills: Whether the limit ends the process, and not the write alone.
        count: File that gets the number of operations that there were.
        unprivileged: Whether permissions hold, even for root.
        cwd: The folder that it runs in.
    """

    watch: str
    kinds: tuple[str, ...] = (*WRITING, *REMOVING)
    at: int = 0
    times: int = 1
    what: str = KILL
    limit: int | None = None
    limit_kills: bool = False
    count: str | None = None
    unprivileged: bool = False
    cwd: str | None = None

    def environment(self, command: str) -> dict[str, str]:
        """What tells it to `main`, with the module of the command."""
        return {"FAULT": json.dumps(asdict(self)), "FAULTY": command}


def main() -> None:
    """Runs the command that the environment names."""
    fault = Fault(**json.loads(os.environ["FAULT"]))
    os.setpgid(0, 0)
    gc.freeze()  # what was imported before needs no collection
    command = importlib.import_module(os.environ["FAULTY"])
    if fault.cwd:
        os.chdir(fault.cwd)
    if fault.unprivileged:
        _drop_capabilities()
    with contextlib.ExitStack() as stack:
        if fault.limit is not None:
            stack.enter_context(_said_through_a_pipe())
            _limit_files(fault.limit, fault.limit_kills)
        stack.enter_context(_counted(fault))
        command.main()


def _limit_files(size: int, kills: bool) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills else signal.SIG_IGN)


@contextlib.contextmanager
def _said_through_a_pipe() -> Iterator[None]:
    """Has another process, without a limit, write what this one says."""
    writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    assert writer.stdin
    for descriptor in (1, 2):
        os.dup2(writer.stdin.fileno(), descriptor)
    writer.stdin.close()
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))  # noqa: SIM115
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        for descriptor in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        with contextlib.suppress(subprocess.TimeoutExpired):
            writer.wait(30)
        writer.kill()


def _drop_capabilities() -> None:
    """Gives up what root may, in this process and in those that it starts."""
    system = ctypes.CDLL(None, use_errno=True)
    set_secure_bits, no_root_for_good = 28, 0b11
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    as_root = os.geteuid() == 0
    if (as_root and system.prctl(set_secure_bits, no_root_for_good, 0, 0, 0)) or system.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


@contextlib.contextmanager
def _counted(fault: Fault) -> Iterator[None]:
    seen, within = [0], [False]

    def happens(kind: str, path: str) -> None:
        if within[0] or kind not in fault.kinds or not f"{path}/".startswith(f"{fault.watch}/"):
            return
        seen[0] += 1
        if not fault.at <= seen[0] < fault.at + fault.times or not fault.at:
            return
        if fault.what == KILL:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        elif fault.what == REMOVE:
            within[0] = True
            shutil.rmtree(fault.watch, ignore_errors=True)
            within[0] = False
        else:
            number = getattr(errno, fault.what)
            raise OSError(number, os.strerror(number), *([path] if kind != "fsync" else []))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in fault.kinds and (event != "open" or _writes(arguments)):
            happens(event, _path(event, arguments))

    sys.addaudithook(hook)
    synced = os.fsync

    @functools.wraps(synced)
    def fsync(descriptor: int) -> None:
        happens("fsync", _of(descriptor))
        synced(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    try:
        yield
    finally:
        if fault.count and os.environ.get("RANK", "0") == "0":
            within[0] = True
            Path(fault.count).write_text(str(seen[0]))


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _path(event: str, arguments: tuple[Any, ...]) -> str:
    """The file that an operation is about: of two, the one that is written."""
    first = arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]
    if isinstance(first, int):
        return _of(first)
    folder = next((one for one in arguments[1:] if isinstance(one, int) and one >= 0), None)
    path = os.fsdecode(first) if isinstance(first, str | bytes | os.PathLike) else ""
    return str(Path(_of(folder) if event in REMOVING and folder is not None else Path.cwd(), path))


def _of(descriptor: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except OSError:
        return ""
