"""The predictions of an evaluation, in arrays: a million of them take tens of megabytes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

_BEST = 5
_NONE = -1
_BLOCK = 4096
"""Rows that are made objects together."""
_ROW = np.dtype([("label", np.int32), ("top5", np.int32, _BEST), ("confidence", np.float64), ("loss", np.float64)])
_EMPTY = np.array((_NONE, (_NONE,) * _BEST, 0, 0), _ROW)


class ImagePrediction(NamedTuple):
    """What a model made of one image.

    Attributes:
        labels: The classes that count as correct: one; of ReaL labels, one or more.
        top5: The classes of the largest logits, best first; fewer than five where there are fewer.
        confidence: Softmax probability of the top-1 prediction, in [0, 1].
        loss: Cross-entropy, in nats.
    """

    labels: tuple[int, ...]
    top5: tuple[int, ...]
    confidence: float
    loss: float


class Predictions(Sequence[ImagePrediction | None]):
    """Per image of a dataset its prediction, or None where it was not evaluated; 40 bytes each. `put` brings more."""

    def __init__(self, predictions: Iterable[ImagePrediction | None] = ()):
        self._rows = np.empty(0, _ROW)  # more than there are images, so that few batches make it grow
        self._images = 0
        self.several: dict[int, tuple[int, ...]] = {}
        """The labels of the few images that have several, as ReaL labels may be, by image index."""
        given = [*predictions]
        self.extend_to(len(given))
        self.put({index: prediction for index, prediction in enumerate(given) if prediction is not None})

    def extend_to(self, images: int) -> None:
        """Makes them at least as many, with None."""
        if images > len(self._rows):
            missing = max(images, 2 * len(self._rows)) - len(self._rows)
            self._rows = np.concatenate([self._rows, np.full(missing, _EMPTY, _ROW)])
        self._images = max(images, self._images)

    def put(self, predictions: Mapping[int, ImagePrediction]) -> None:
        """Takes in predictions by image index."""
        self.extend_to(max(predictions, default=-1) + 1)
        for index, (labels, top5, confidence, loss) in predictions.items():
            self._rows[index] = labels[0], (*top5, *(_NONE,) * (_BEST - len(top5))), confidence, loss
            self.several.pop(index, None)
            if len(labels) > 1:
                self.several[index] = labels

    def add(self, other: "Predictions") -> None:
        """Takes in predictions for other images of the same dataset."""
        self.extend_to(len(other))
        there = other.evaluated
        self._rows[: len(there)][there] = other.rows[there]
        self.several |= other.several

    def relabelled(self, labels: Sequence[Sequence[int]]) -> "Predictions":
        """The same with other labels per image; None where an image has none."""
        made = Predictions()
        made.extend_to(len(self))
        made.rows[:] = self.rows
        made.rows[[not allowed for allowed in labels]] = _EMPTY
        there = made.evaluated
        firsts = np.fromiter((allowed[0] if allowed else _NONE for allowed in labels), np.int32, len(labels))
        made.rows["label"] = np.where(there, firsts, _NONE)
        several = {index: tuple(allowed) for index, allowed in enumerate(labels) if len(allowed) > 1}
        made.several = {index: allowed for index, allowed in several.items() if there[index]}
        return made

    @property
    def rows(self) -> npt.NDArray[Any]:
        """The array itself, a record per image; -1 stands for no class."""
        return self._rows[: self._images]

    @property
    def evaluated(self) -> npt.NDArray[np.bool_]:
        """Which images have a prediction."""
        found: npt.NDArray[np.bool_] = self.rows["top5"][:, 0] != _NONE
        return found

    def has(self, index: int) -> bool:
        """Whether an image has a prediction."""
        return index < self._images and bool(self._rows[index]["top5"][0] != _NONE)

    @property
    def classes(self) -> set[int]:
        """The classes that are labels of evaluated images."""
        firsts = np.unique(self.rows["label"][self.evaluated]).tolist()
        return {*firsts, *chain.from_iterable(self.several.values())}

    def correct(self, best: int) -> npt.NDArray[np.bool_]:
        """Per image, whether a label is among this many of the top-5 predictions."""
        rows = self.rows
        found: npt.NDArray[np.bool_] = (rows["top5"][:, :best] == rows["label"][:, None]).any(1) & self.evaluated
        for index, labels in self.several.items():
            found[index] = not {*labels}.isdisjoint(rows["top5"][index, :best].tolist())
        return found

    def __len__(self) -> int:
        return self._images

    @overload
    def __getitem__(self, index: int) -> ImagePrediction | None: ...
    @overload
    def __getitem__(self, index: slice) -> "Predictions": ...
    def __getitem__(self, index: "int | slice") -> "ImagePrediction | Predictions | None":
        if isinstance(index, slice):
            return Predictions(self._objects(range(len(self))[index]))
        return next(self._objects([range(len(self))[index]]))

    def __iter__(self) -> Iterator[ImagePrediction | None]:
        blocks = (range(len(self))[start : start + _BLOCK] for start in range(0, len(self), _BLOCK))
        return chain.from_iterable(map(self._objects, blocks))

    def _objects(self, indices: Sequence[int]) -> Iterator[ImagePrediction | None]:
        for index, (label, top5, confidence, loss) in zip(indices, self._rows[[*indices]].tolist(), strict=True):
            five = tuple(number for number in top5.tolist() if number != _NONE)
            labels = self.several.get(index, (label,))
            yield ImagePrediction(labels, five, confidence, loss) if five else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Predictions):
            return NotImplemented
        return np.array_equal(self.rows, other.rows) and self.several == other.several

    __hash__ = None  # type: ignore[assignment]  # they change
