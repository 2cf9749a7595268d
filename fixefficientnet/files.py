"""Write a file so that nobody ever sees half of it."""

import os
import tempfile
from pathlib import Path

_SUFFIX = ".partial"


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary name beside the target, then renames it; makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name[:64]}.", suffix=_SUFFIX, delete=False
    ) as stream:
        temporary = Path(stream.name)
        try:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def remove_partial(folder: Path) -> None:
    """Removes what killed processes were writing in a folder and below; for one that nobody else writes in."""
    for path in folder.rglob(f".*{_SUFFIX}"):
        path.unlink(missing_ok=True)
