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
    """Content of a folder's models.json; None where there is none. A PublishError says why it cannot be read."""
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


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Keeps other publications from a folder, which is made if need be.

    Raises:
        OSError: Another one held it for too long, or there can be no folder or lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(_lock_of(folder.resolve()), str(folder)):
        yield


def write(folder: Path, files: Mapping[str, bytes], obsolete: Iterable[str] = (), *, before: bytes | None) -> None:
    """Adds or replaces files; makes the folder if need be.

    All are written under temporary names first, and then renamed in the order given. A kill in between leaves files
    of both states, so a file that others name must come before them. The last file, models.json, tells the next call
    what is there. Obsolete files go before it is renamed: until then it names them, and they are found after a kill.
    What models.json had before (None: it was not there) must still be in it.

    Raises:
        PublishError: A file cannot be written, or somebody else wrote there meanwhile.
    """
    if not files:
        return
    try:
        with writing(folder):
            if read_index(folder) != before:
                raise PublishError(
                    f"Nothing was published: somebody else wrote to {folder} meanwhile. Give the same command again."
                )
            with contextlib.ExitStack() as ending:  # which renames the last one that it was given first
                *earlier, (last, content) = files.items()
                ending.enter_context(replacing(folder / last)).write_bytes(content)
                ending.enter_context(_then_removing([folder / one for one in obsolete]))
                for name, data in reversed(earlier):
                    ending.enter_context(replacing(folder / name)).write_bytes(data)
    except OSError as error:
        raise PublishError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}. What {folder} had still loads. "
            "The same command, given again, completes it."
        ) from error


def _lock_of(folder: Path) -> Path:
    """Its lock's file, beside it: in it are published files alone, unless nothing can be written beside.

    A whole model in a folder of deltas has that one's.
    """
    if (folder.parent / index.FILENAME).is_file():
        folder = folder.parent
    writable = os.access(folder.parent, os.W_OK)
    return folder.with_name(f".{folder.name[:64]}.lock") if writable else folder / ".lock"


@contextlib.contextmanager
def _then_removing(files: Iterable[Path]) -> Iterator[None]:
    """Removes files at the end, if all went well until then."""
    yield
    for file in files:
        file.unlink(missing_ok=True)
