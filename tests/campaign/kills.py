"""Commands that are killed: at any time, at an operation of the file system, in the middle of a write."""

import contextlib
import functools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from campaign.ground import WORKS, Place, Undisturbed, Work, loads, place, undisturbed, unlike
from campaign.injected import Fault
from campaign.trial import Attempt, Finding, Outcome, Trial
from fixefficientnet import delta, manifest
from fixefficientnet.errors import FixEfficientNetError


@contextlib.contextmanager
def _prepared(work: Work, shared: Path) -> Iterator[Attempt]:
    every = undisturbed(work, shared)

    def attempt(rng: random.Random, folder: Path) -> Finding:
        known = rng.choice(every)
        if known.folder:
            shutil.copytree(known.folder, folder / "out", symlinks=True)
        with place(work, folder) as there:
            for _ in range(rng.choice([1, 1, 2, 3])):
                _killed(there, known, rng)
                if said := _taken_for_whole(there) or unlike(there, known, between=True):
                    return Finding(Outcome.LOST, f"after a kill: {said}")
            status, text = there.run(limit=120)
            if status is None:
                return Finding(Outcome.HUNG, text)
            if status != 0:
                return Finding(Outcome.CRASHED if "Traceback" in text else Outcome.LOST, text[-2000:])
            said = unlike(there, known)
            return Finding(Outcome.LOST, said) if said else Finding(Outcome.SURVIVED)

    yield attempt


def _killed(there: Place, known: Undisturbed, rng: random.Random) -> None:
    out = str(there.out)
    how = rng.choice(["time", "operation", "operation", "write"])
    if how == "time":
        there.run(kill_after=rng.uniform(0, known.seconds))
    elif how == "operation":
        there.run(Fault(out, at=rng.randint(1, known.operations)))
    else:
        size = rng.choice([size for size in known.sizes if size] or [1])
        there.run(Fault(out, limit=rng.randrange(size), limit_kills=True))


def _taken_for_whole(there: Place) -> str:
    """What can be opened under its own name, and is not whole; empty if there is nothing like that."""
    for path in there.out.rglob("*"):
        if path.name.startswith(".") or ".partial" in str(path) or not path.is_file():
            continue
        if path.suffix in (".safetensors", ".pth") and not path.name.endswith(".incomplete"):
            try:
                loads(path)
            except Exception as error:
                return f"{path.name} does not load: {error}"
        if path.suffix == ".json":
            try:
                json.loads(path.read_text())
            except ValueError as error:
                return f"{path.name} is no JSON: {error}"
        if path.name == "weights_manifest.json":
            try:
                row = manifest.parse_overlay(json.loads(path.read_text()), folder=path.parent, source=str(path))["b0"]
                assert isinstance(row.weights, manifest.LocalWeights)
                delta.load(path.parent / row.weights.path)
            except FixEfficientNetError as error:
                return f"{path.name} names what does not load: {error}"
    return ""


_TIMES = {
    "fine-tuning online": (16, 0),
    "fine-tuning cached": (18, 0),
    "base stage": (12, 0),
    "fine-tuning online, two processes": (10, 0),
    "fine-tuning cached, two processes": (10, 0),
    "base stage, two processes": (8, 0),
    "evaluate": (14, 0),
    "sweep": (12, 0),
    "predict": (6, 0),
    "export to TorchScript": (6, 0),
    "export to OpenVINO": (6, 0),
    "convert": (14, 1),
    "merge": (12, 0),
    "merge to a folder": (12, 0),
    "publish to a folder": (18, 1),
    "publish to the Hub": (14, 0),
    "downloads": (16, 0),
}
TRIALS = [
    Trial(f"killed: {name}", often, few, functools.partial(_prepared, WORKS[name]), limit=600, isolated=False)
    for name, (often, few) in _TIMES.items()
]
