"""What an evaluation found: one prediction per image, and the figures that follow from them."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fixefficientnet._internal.records import Count, Percent, Positive, Share
from fixefficientnet.errors import EvaluationError
from fixefficientnet.evaluation.predictions import Predictions
from fixefficientnet.evaluation.statistics import wilson

CALIBRATION_BINS = 15


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of an evaluation; accuracies and their 95% intervals (Wilson) in per cent.

    Attributes:
        size: Test size, in pixels.
        crop_pct: Share of the resized shorter side that the crop keeps.
        images: Number of images evaluated.
        unreadable: Number of images that could not be read.
        unturned: Number of images that have an EXIF orientation and were not turned.
        top1: Top-1 accuracy.
        top1_low: Lower end of its interval.
        top1_high: Upper end of its interval.
        top5: Top-5 accuracy.
        top5_low: Lower end of its interval.
        top5_high: Upper end of its interval.
        loss: Mean cross-entropy, in nats.
    """

    size: Positive
    crop_pct: Share
    images: Positive
    unreadable: Count
    unturned: Count
    top1: Percent
    top1_low: Percent
    top1_high: Percent
    top5: Percent
    top5_low: Percent
    top5_high: Percent
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """What one model made of one dataset at one size.

    Attributes:
        size: Test size, in pixels.
        crop_pct: See `TestTime`.
        predictions: Per image, in the dataset's order; None where the image was not evaluated.
        unreadable: Why not, by image index; an image without a ReaL label is not evaluated either, but not in here.
        unturned: Indices of the images that have an EXIF orientation and were not turned.
        seconds: What it took, loading included; no part of the result.
    """

    size: int
    crop_pct: float
    predictions: Predictions = field(repr=False)
    unreadable: Mapping[int, str] = field(default_factory=dict)
    unturned: tuple[int, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @cached_property
    def images(self) -> int:
        """How many were evaluated; unreadable ones are not."""
        return int(self.predictions.evaluated.sum())

    @cached_property
    def correct(self) -> str:
        """Per image: is the top-1 prediction correct? "1", "0", or "-" where it was not evaluated."""
        return self._correct(1)

    @cached_property
    def correct5(self) -> str:
        """The same for the top-5 predictions."""
        return self._correct(5)

    def _correct(self, best: int) -> str:
        digits = np.where(self.predictions.correct(best), b"1", b"0")
        return np.where(self.predictions.evaluated, digits, b"-").tobytes().decode()

    @property
    def _evaluated(self) -> npt.NDArray[Any]:
        """The records of the images that were evaluated."""
        return self.predictions.rows[self.predictions.evaluated]

    @property
    def top1(self) -> float:
        """Top-1 accuracy, in per cent."""
        return 100 * self.correct.count("1") / self.images

    @property
    def top5(self) -> float:
        """Top-5 accuracy, in per cent."""
        return 100 * self.correct5.count("1") / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of `top1` (Wilson), in per cent."""
        return wilson(self.correct.count("1"), self.images)

    @property
    def interval5(self) -> tuple[float, float]:
        """95% interval of `top5` (Wilson), in per cent."""
        return wilson(self.correct5.count("1"), self.images)

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats."""
        return math.fsum(self._evaluated["loss"]) / self.images

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the top-1 prediction: 15 bins of equal width, L1; in [0, 1]."""
        from torchmetrics.functional.classification import binary_calibration_error

        confidence = torch.from_numpy(self._evaluated["confidence"].astype(np.float32))
        correct = torch.from_numpy(self.predictions.correct(1)[self.predictions.evaluated]).long()
        return float(binary_calibration_error(confidence, correct, n_bins=CALIBRATION_BINS, norm="l1"))

    @property
    def rate(self) -> float | None:
        """Images per second, loading included."""
        return len(self.predictions) / self.seconds if self.seconds else None

    def summary(self) -> Summary:
        """The figures alone."""
        counts = self.images, len(self.unreadable), len(self.unturned)
        accuracies = self.top1, *self.interval, self.top5, *self.interval5
        return Summary(self.size, self.crop_pct, *counts, *accuracies, self.loss)

    def relabelled(self, labels: Sequence[Sequence[int]]) -> "Evaluation":
        """The same predictions held against other labels; the loss stays that of the original ones.

        Args:
            labels: Per image, the classes that count as correct; an image without any does not count.

        Raises:
            EvaluationError: None of the evaluated images has a label.
        """
        predictions = self.predictions.relabelled(labels)
        if not predictions.evaluated.any():
            raise EvaluationError("None of the evaluated images has such a label.")
        return replace(self, predictions=predictions)

    def confusion(self) -> Counter[tuple[int, int]]:
        """How many images there are by label and top-1 prediction, in the order of both; those with one label each.

        Raises:
            EvaluationError: Images have more than one label each.
        """
        if self.predictions.several:
            raise EvaluationError("A table per class needs one label per image, which ReaL labels are not.")
        rows = self._evaluated
        pairs, counts = np.unique(np.stack([rows["label"], rows["top5"][:, 0]]), axis=1, return_counts=True)
        return Counter(dict(zip(zip(*pairs.tolist(), strict=True), counts.tolist(), strict=True)))

    def per_class(self) -> list[dict[str, Any]]:
        """One row per class that has images: counts, accuracy, interval, the most common wrong prediction.

        Raises:
            EvaluationError: Images have more than one label each.
        """
        confusion = self.confusion()
        from torchmetrics.functional.classification import multiclass_stat_scores

        labels, predicted = self._evaluated["label"], self._evaluated["top5"][:, 0]
        classes = np.union1d(labels, predicted)
        found, truth = (torch.from_numpy(np.searchsorted(classes, each)) for each in (predicted, labels))
        scores = multiclass_stat_scores(found, truth, num_classes=max(2, len(classes)), average=None).tolist()
        top5 = Counter(self.predictions.rows["label"][self.predictions.correct(5)].tolist())
        rows = []
        for label, pairs in itertools.groupby(confusion.items(), key=lambda item: item[0][0]):
            correct, false, _, _, images = scores[int(np.searchsorted(classes, label))]
            wrong = {first: times for (_, first), times in pairs if first != label}
            taken_for, times = max(wrong.items(), key=lambda item: item[1], default=(None, 0))
            low, high = wilson(correct, images)
            row = {"class": label, "images": images, "top1": 100 * correct / images, "top1_low": low}
            row |= {"top1_high": high, "top5": 100 * top5[label] / images, "false_positives": false}
            rows.append(row | {"taken_for": taken_for, "times": times})
        return rows
