"""The hours that a run has taken in all its calls; no part of its result, and so in a file of their own."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from fixefficientnet._internal import records
from fixefficientnet._internal.files import write_atomically

FILENAME = "hours.json"


def read(folder: Path) -> float | None:
    """Hours that the run of a folder has taken; None where it does not tell."""
    try:
        return float(records.decode_file(folder / FILENAME)["hours"])
    except (OSError, ValueError, TypeError, LookupError):
        return None


@contextlib.contextmanager
def counted(folder: Path) -> Iterator[None]:
    """Adds the time within to the hours of a run, also where it ends by an error or by a request to stop."""
    before, start = read(folder) or 0.0, time.monotonic()
    try:
        yield
    finally:
        document = {"hours": before + (time.monotonic() - start) / 3600}
        with contextlib.suppress(OSError):  # what the run itself meets counts
            write_atomically(folder / FILENAME, json.dumps(document).encode())
