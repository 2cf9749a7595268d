"""Write a file so that nobody ever sees half of it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".partial"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside a target, which it becomes if all goes well; makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.", suffix=_SUFFIX)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Writes bytes to a temporary name beside the target, then renames it."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def remove_partial(folder: Path) -> None:
    """Removes what killed processes were writing in a folder and below; for one that nobody else writes in."""
    for path in folder.rglob(f".*{_SUFFIX}"):
        path.unlink(missing_ok=True)
