"""Files that are damaged, or were never what they say."""

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from conftest import lively, tuned_delta

from campaign.trial import Attempt, Finding, Trial, outcome_of
from fixefficientnet import delta


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file that differs from another by one accident."""
    kind = rng.choice(["bit", "byte", "cut", "block", "append", "insert", "swap"])
    place, length = rng.randrange(len(data)), rng.randrange(1, 65)
    if kind == "bit":
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == "byte":
        return data[:place] + rng.randbytes(1) + data[place + 1 :]
    if kind == "cut":
        return data[:place]
    if kind == "block":  # zeros, as a file system leaves them after a power cut
        return data[:place] + bytes(len(data[place : place + length])) + data[place + length :]
    if kind == "append":
        return data + rng.randbytes(length)
    if kind == "insert":
        return data[:place] + rng.randbytes(length) + data[place:]
    other = rng.randrange(len(data))
    start, end = sorted((place, other))
    return data[:start] + data[end:] + data[start:end]


@contextlib.contextmanager
def _deltas(shared: Path) -> Iterator[Attempt]:
    tuned = tuned_delta(lively(timm.create_model("test_efficientnet")), "b0")
    data = delta.dumps(tuned)

    def same(found: object) -> bool:
        assert isinstance(found, delta.Delta)
        tensors = found.tensors.keys() == tuned.tensors.keys() and all(
            torch.equal(tensor, tuned.tensors[name]) for name, tensor in found.tensors.items()
        )
        return tensors and dataclasses.replace(found, tensors={}) == dataclasses.replace(tuned, tensors={})

    def attempt(rng: random.Random, folder: Path) -> Finding:
        (folder / "delta.safetensors").write_bytes(mutated(data, rng))
        return outcome_of(lambda: delta.load(folder / "delta.safetensors"), same)

    yield attempt


TRIALS = [Trial("damaged deltas", 2000, 100, _deltas)]
