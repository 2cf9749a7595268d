"""What the trials of damaged files share."""

import random
from collections.abc import Callable
from pathlib import Path

from test_paper import report as typed_report

from campaign.mutations import mutated_json
from campaign.trial import Attempt, Finding, outcome_of
from fixefficientnet._internal import records
from fixefficientnet.errors import FixEfficientNetError
from fixefficientnet.reproduce.report import Report

Mutate = Callable[[bytes, random.Random], bytes]


def attempts(data: bytes, name: str, mutate: Mutate, read: Callable[[Path], object]) -> Attempt:
    """Attempts to read a changed file, which must be refused, or give what the unchanged one gives."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        (folder / name).write_bytes(mutate(data, rng))
        return outcome_of(lambda: read(folder / name), lambda found: found == expected(folder))

    def expected(folder: Path) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return attempt


def of_json(data: bytes, rng: random.Random) -> bytes:
    return mutated_json(data.decode(), rng)


def finished_report() -> Report:
    found = typed_report("b4_ns", (472, 85.91, 97.5), (380, 85.32, 97.4))
    found |= {
        "unreadable": ["data/a.jpg cannot be read"],
        "classes": ["apple", "b\u00e9b\u00e9"],
        "left_out": ["a.txt"],
    }
    pair = {"only_base_correct": 3, "only_fixres_correct": 9, "difference": 0.59, "p": 0.01}
    found["paired"] = {"base": pair | {"difference_low": 0.1, "difference_high": 0.9}}
    return records.read(Report, found, "report", FixEfficientNetError)
