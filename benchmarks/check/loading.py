"""Images/s of loading for fine-tuning, by the methods of `benchmarks.loading`, in one process with all workers.

Of the check's own images, which are smaller than ImageNet's.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks import loading, machine
from benchmarks.check.setting import Setting, case
from benchmarks.machine import Row

IMAGES = 1024


def rows(setting: Setting) -> Iterator[Row]:
    folder = Path(str(setting.data), "train")
    count = min(IMAGES, sum(1 for _ in folder.glob("*/*")))
    workers = max(1, setting.workers)
    for size in (64,) if setting.tiny else (320, 472):
        given = {"folder": str(folder), "size": size, "batch": loading.BATCH, "workers": [workers], "rounds": 2}
        given |= {"images": count, "device": setting.device}
        yield case({"size": size, "workers": workers, "images": count}, lambda: _rates(given))  # noqa: B023


def _rates(given: dict[str, object]) -> Row:
    found = loading.child(given)
    return {key.rpartition(" ")[0]: machine.median(rounds, "images_per_second") for key, rounds in found.items()}
