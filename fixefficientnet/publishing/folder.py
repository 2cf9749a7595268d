"""A folder of published models on disk: plain files, which any host of git repositories can serve."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fixefficientnet._internal.files import replacing
from fixefficientnet._internal.waiting import locked
from fixefficientnet.errors import PublishError
from fixefficientnet.publishing import index


def read_index(folder: Path) -> bytes | None:
    """Content of a folder's models.json, or None; a PublishError says why folder or file cannot be read."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise PublishError(f"{folder} is there, and is no folder. Choose another one: --to.")
    try:
        return (folder / index.FILENAME).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PublishError(f"{folder / index.FILENAME} cannot be read: {error.strerror}.") from error


def has(file: Path, data: bytes) -> bool:
    """Whether a file is there with this very content."""
    return file.is_file() and file.stat().st_size == len(data) and file.read_bytes() == data


def write(folder: Path, files: Mapping[str, bytes], obsolete: Iterable[str] = (), *, index: bytes | None) -> None:
    """Adds or replaces files; makes the folder if need be.

    All are written under temporary names first, and then renamed in the order given. A kill in between leaves files
    of both states, so a file that others name must come before them. What is obsolete goes before the last file, which
    tells the next call what is there, and alone still names them: after a kill it is found again. The index is the
    content of the folder's models.json as it was read before; None where there was none.

    Raises:
        PublishError: A file cannot be written, or somebody else wrote there meanwhile.
    """
    if not files and not obsolete:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(_lock_of(folder.resolve()), str(folder)):
            if read_index(folder) != index:
                raise PublishError(
                    f"Nothing was published: somebody else wrote to {folder} meanwhile. Give the same command again."
                )
            with contextlib.ExitStack() as ending:  # in reverse order
                for number, (name, data) in enumerate(reversed(list(files.items()))):
                    ending.enter_context(replacing(folder / name)).write_bytes(data)
                    if number == 0:
                        ending.enter_context(_then_removing([folder / one for one in obsolete]))
    except OSError as error:
        raise PublishError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}. What {folder} had still loads. "
            "The same command, given again, completes it."
        ) from error


def _lock_of(folder: Path) -> Path:
    """Its lock's file, beside it: in it are published files alone, unless nothing can be written beside."""
    writable = os.access(folder.parent, os.W_OK)
    return folder.with_name(f".{folder.name[:64]}.lock") if writable else folder / ".lock"


@contextlib.contextmanager
def _then_removing(files: Iterable[Path]) -> Iterator[None]:
    """Removes files at the end, if all went well until then."""
    yield
    for file in files:
        file.unlink(missing_ok=True)
