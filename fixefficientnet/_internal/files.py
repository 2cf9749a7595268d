"""Write a file so that nobody ever sees half of it."""

import contextlib
import errno
import glob
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fixefficientnet.errors import FixEfficientNetError

_SUFFIX = ".partial"
_RANDOM = 8
"""Letters that make a temporary name one of its own: as many as `tempfile` takes."""
WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of writing that come without a name."""


@contextlib.contextmanager
def _naming(path: Path, temporary: str) -> Iterator[None]:
    """Lets errors of writing name the target, which users know, and not the temporary names, which begin so."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None and error.errno in WRITING
        if unnamed or str(error.filename).startswith(temporary):
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside a target, for what is then moved there; makes the target's folder if need be."""
    with _temporary(path, tempfile.mkdtemp) as folder:
        yield folder


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside a target, which it becomes if all goes well; makes the folder if need be."""

    def empty(dir: Path, prefix: str, suffix: str) -> str:  # as mkstemp, with the rights that other new files get
        return str(_made(dir / f"{prefix}{secrets.token_hex(_RANDOM // 2)}{suffix}"))

    with _temporary(path, empty) as temporary:
        yield temporary
        with temporary.open("r+b") as file:  # Windows writes out only what may be written
            os.fsync(file.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def _temporary(path: Path, make: Callable[..., str]) -> Iterator[Path]:
    """Makes something temporary beside a target, which is gone in the end.

    Its lock says that whoever writes it is alive: what nobody holds is left of a killed process, and removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name.encode(errors='ignore')[:64].decode(errors='ignore')}."  # a name has 255 bytes at most
    for left in path.parent.glob(f"{glob.escape(prefix)}{'?' * _RANDOM}{_SUFFIX}"):
        with contextlib.suppress(OSError), _locked(left) as locked:
            if locked:
                _remove(left)
    with _naming(path, str(path.parent / prefix)):
        while True:
            temporary = Path(make(dir=path.parent, prefix=prefix, suffix=_SUFFIX))
            try:
                with contextlib.ExitStack() as stack:
                    try:
                        held = stack.enter_context(_locked(temporary))
                    except FileNotFoundError:  # another process came between, and took it for one that is left
                        continue
                    if held is not None and temporary.exists():
                        yield temporary
                        break
            finally:
                if os.path.lexists(temporary):
                    _remove(temporary)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool | None]:
    """Locks a file or a folder: whether that succeeded; None where another holds it, False where there are no locks."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # which NFS wants for a lock
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked: bool | None = True
        except BlockingIOError:
            locked = None
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _made(path: Path) -> Path:
    """Makes an empty file, where there must be none, with the rights that the user's umask leaves."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


def give_usual_rights(file: Path) -> None:
    """Gives a file the rights that new ones get; some libraries make theirs for their user alone."""
    new = _made(file.with_name(f".{secrets.token_hex(8)}"))
    file.chmod(new.stat().st_mode)
    new.unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes bytes to a temporary name beside the target, then renames it."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Writes text, or pieces of it as they come, as `write_atomically` does; what is no UTF-8 in names is escaped."""
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        file.writelines([text] if isinstance(text, str) else text)


def append(path: Path, data: bytes) -> None:
    """Appends to a file, which must not be a link: that may lead anywhere."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with open(descriptor, "ab") as file:
        file.write(data)


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Refuses a folder where one of the names that a command writes, or anything in a folder so named, links out.

    Raises:
        FixEfficientNetError: There is such a link.
    """
    inside = os.path.realpath(folder)  # which takes a link to itself
    for name in names:
        for path in (folder / name, *(folder / name).rglob("*")):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise FixEfficientNetError(
                    f"{path} is a link out of its folder, to {path.readlink()}, and would be written through. Remove "
                    "it, or choose another --output."
                )


def remove_partial(folder: Path) -> None:
    """Removes what killed processes were writing in a folder and below; for one that nobody else writes in."""
    for path in folder.rglob(f".*{_SUFFIX}"):
        _remove(path)


def check_output(paths: Iterable[Path], overwrite: bool, *, folder: bool = False) -> None:
    """Refuses to replace files unasked, and to write where something other than a file is.

    An output that is a folder keeps its other files; unasked, it must be empty.

    Raises:
        FixEfficientNetError: One of them is there.
    """
    for path in paths:
        if folder and path.is_dir():
            there = any(path.iterdir())
        else:
            there = os.path.lexists(path)
            if there and not path.is_file():
                raise FixEfficientNetError(f"{path} is there, and is no file. Choose another --output.")
        if there and not overwrite:
            raise FixEfficientNetError(f"{path} is there already. Choose another --output, or replace it: --overwrite.")


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuses what would be waited for when it is read: a pipe, a socket or a device.

    Raises:
        OSError: It is one of these, or cannot be looked at.
    """
    mode = os.stat(path).st_mode  # noqa: PTH116 - of a million images
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, and no file", os.fspath(path))


def why_no_lock(path: Path) -> str | None:
    """Why a file cannot be locked, other than that somebody holds its lock; None: it can, or this system cannot tell.

    Lock libraries take an error of the file system for a lock that is held, and wait.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError as error:
            return error.strerror
    return None
