"""File names: a million of them in two tensors, and their natural order."""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np
import torch

_ENCODING = "utf-8", "surrogatepass"
"""Keeps whatever Python makes of the bytes of file names."""
_BLOCK = 4096
"""Names that are packed or unpacked together."""
_NUMBER, _LAST_DIGITS = re.compile(r"(\d+)"), re.compile(r"\d*\Z")


class Names(Sequence[str]):
    """Strings without NUL, of which a million take tens of megabytes, and none in a process that shares them.

    They lie in tensors: what forks reads them where they are, and torch hands them to spawned processes in shared
    memory. Strings in a list would be copied page by page, as reading one writes its reference count. They are packed
    block by block.
    """

    def __init__(self, blocks: Iterable[Sequence[str]]):
        packed, lengths = bytearray(), []
        for block in filter(None, blocks):
            encoded = ("\0".join(block) + "\0").encode(*_ENCODING)
            ends = np.flatnonzero(np.frombuffer(encoded, np.uint8) == 0) + 1
            lengths.append(np.diff(ends, prepend=0))
            packed += encoded
        bounds = np.zeros(1 + sum(map(len, lengths)), np.int64)
        np.cumsum(np.concatenate([*lengths, bounds[:0]]), out=bounds[1:])
        self._packed = torch.from_numpy(np.frombuffer(packed, np.uint8).copy())  # exactly as long as it need be
        self._bounds = torch.from_numpy(bounds)

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Packs names one by one."""
        names = iter(names)
        return cls(iter(lambda: list(islice(names, _BLOCK)), []))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        index = range(len(self))[index]
        start, end = self._bounds[index : index + 2].tolist()
        return self._packed[start : end - 1].numpy().tobytes().decode(*_ENCODING)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BLOCK):
            bounds = self._bounds[start : start + _BLOCK + 1]
            block = self._packed[bounds[0] : bounds[-1] - 1].numpy().tobytes()
            yield from block.decode(*_ENCODING).split("\0")

    def tobytes(self) -> Any:
        """The names in UTF-8, with a NUL after each; no copy."""
        return self._packed.numpy().data


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sorts 2 before 10, and names that differ in case or leading zeros always alike."""
    names = list(names)
    numbers = _numbers(names)
    if numbers is None:
        return sorted(names, key=natural)
    return [name for _, name in sorted(zip(numbers, names, strict=True))]


def _numbers(names: list[str]) -> list[int] | None:
    """The numbers that names differ in, if they differ in one each: as a class's images do, as a rule."""
    if not names:
        return None
    first, last = min(names), max(names)
    alike = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    start = _LAST_DIGITS.search(first, 0, alike).start()  # type: ignore[union-attr]  # it matches everything
    number = _NUMBER.match(first, start)
    if not number:
        return None
    before, after = first[:start], first[number.end() :]
    *numbers, rest = "\0".join([*names, before])[start:].split(f"{after}\0{before}")
    every = len(numbers) == len(names) and not rest and all(numbers) and "".join(numbers).isdecimal()
    return [*map(int, numbers)] if every else None


def natural(name: str) -> tuple[str, str]:
    """The key of the natural order: the name in lower case, its numbers so written that they sort by their value."""
    parts = _NUMBER.split(name.lower())
    parts[1::2] = map(_by_value, parts[1::2])
    return "".join(parts), name


@functools.lru_cache(4096)
def _by_value(digits: str) -> str:
    number = str(int(digits))
    return f"\0{chr(len(number))}{number}"  # NUL is in no name, and comes before all that is
