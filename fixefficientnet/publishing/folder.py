"""A folder of published models on disk: plain files, which any host of git repositories can serve."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from fixefficientnet._internal.files import replacing
from fixefficientnet.errors import PublishError
from fixefficientnet.publishing import index


def read_index(folder: Path) -> bytes | None:
    """Content of a folder's models.json; None where there is no such file.

    Raises:
        PublishError: The folder is no folder, or the file cannot be read.
    """
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


def write(folder: Path, files: Mapping[str, bytes], obsolete: Iterable[str] = ()) -> None:
    """Adds or replaces files; makes the folder if need be.

    All are written under temporary names first, and then renamed in the order given. A kill in between leaves files
    of both states, so a file that others name must come before them.

    Args:
        folder: The folder.
        files: Content of each file, by name.
        obsolete: Names of the files that are removed at the end.

    Raises:
        PublishError: A file cannot be written.
    """
    try:
        for name in files:
            for left in folder.glob(f".{name}.*.partial"):  # of a publication that was killed
                left.unlink(missing_ok=True)
        with contextlib.ExitStack() as renaming:  # which ends in reverse order
            for name, data in reversed(list(files.items())):
                renaming.enter_context(replacing(folder / name)).write_bytes(data)
        for name in obsolete:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise PublishError(
            f"{error.filename or folder} cannot be written: {error.strerror}. What {folder} had still loads. The same "
            "command, given again, completes it."
        ) from error
