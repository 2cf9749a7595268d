"""What an evaluation found: one prediction per image, and the figures that follow from them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from fixefficientnet._internal.records import Count, Percent, Positive, Share
from fixefficientnet.errors import EvaluationError
from fixefficientnet.evaluation.statistics import wilson

CALIBRATION_BINS = 15


class ImagePrediction(NamedTuple):
    """What a model made of one image.

    Attributes:
        labels: The classes that count as correct: one; of ReaL labels, any number.
        top5: The classes of the largest logits, best first; fewer than five where there are fewer.
        confidence: Softmax probability of the top-1 prediction, in [0, 1].
        loss: Cross-entropy, in nats.
    """

    labels: tuple[int, ...]
    top5: tuple[int, ...]
    confidence: float
    loss: float


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
    predictions: tuple[ImagePrediction | None, ...] = field(repr=False)
    unreadable: Mapping[int, str] = field(default_factory=dict)
    unturned: tuple[int, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @cached_property
    def evaluated(self) -> list[ImagePrediction]:
        """The predictions that there are, in order."""
        return [prediction for prediction in self.predictions if prediction is not None]

    @property
    def images(self) -> int:
        """How many were evaluated; unreadable ones are not."""
        return len(self.evaluated)

    @cached_property
    def correct(self) -> str:
        """Per image: is the top-1 prediction correct? "1", "0", or "-" where it was not evaluated."""
        return self._correct(1)

    @cached_property
    def correct5(self) -> str:
        """The same for the top-5 predictions."""
        return self._correct(5)

    def _correct(self, best: int) -> str:
        return "".join(
            "-" if j is None else "01"[not set(j.top5[:best]).isdisjoint(j.labels)] for j in self.predictions
        )

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
        return math.fsum(prediction.loss for prediction in self.evaluated) / self.images

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the top-1 prediction: 15 bins of equal width, L1; in [0, 1]."""
        from torchmetrics.functional.classification import binary_calibration_error

        confidence = torch.tensor([prediction.confidence for prediction in self.evaluated])
        correct = torch.tensor([digit == "1" for digit in self.correct if digit != "-"]).long()
        return float(binary_calibration_error(confidence, correct, n_bins=CALIBRATION_BINS, norm="l1"))

    @property
    def rate(self) -> float | None:
        """Images per second, loading included."""
        return len(self.predictions) / self.seconds if self.seconds else None

    def summary(self) -> Summary:
        """The figures alone."""
        return Summary(
            self.size,
            self.crop_pct,
            self.images,
            len(self.unreadable),
            len(self.unturned),
            self.top1,
            *self.interval,
            self.top5,
            *self.interval5,
            self.loss,
        )

    def relabelled(self, labels: Sequence[Sequence[int]]) -> "Evaluation":
        """The same predictions held against other labels; the loss stays that of the original ones.

        Args:
            labels: Per image, the classes that count as correct; an image without any does not count.

        Raises:
            EvaluationError: None of the evaluated images has a label.
        """
        predictions = tuple(
            prediction._replace(labels=tuple(allowed)) if prediction and allowed else None
            for prediction, allowed in zip(self.predictions, labels, strict=True)
        )
        if not any(predictions):
            raise EvaluationError("None of the evaluated images has such a label.")
        return replace(self, predictions=predictions)

    @property
    def has_one_label_each(self) -> bool:
        """Whether each image that was evaluated has one label, which ReaL labels need not be."""
        return all(len(prediction.labels) == 1 for prediction in self.evaluated)

    def confusion(self) -> Counter[tuple[int, int]]:
        """How many images there are by label and top-1 prediction; those with one label each.

        Raises:
            EvaluationError: Images have more than one label each.
        """
        if not self.has_one_label_each:
            raise EvaluationError("A table per class needs one label per image, which ReaL labels are not.")
        return Counter((prediction.labels[0], prediction.top5[0]) for prediction in self.evaluated)

    def per_class(self) -> list[dict[str, Any]]:
        """One row per class that has images: counts, accuracy, interval, the most common wrong prediction.

        Raises:
            EvaluationError: Images have more than one label each.
        """
        confusion = self.confusion()
        from torchmetrics.functional.classification import multiclass_stat_scores

        labels = [prediction.labels[0] for prediction in self.evaluated]
        predicted = [prediction.top5[0] for prediction in self.evaluated]
        classes = sorted({*labels, *predicted})
        number = {name: index for index, name in enumerate(classes)}
        scores = multiclass_stat_scores(
            torch.tensor([number[label] for label in predicted]),
            torch.tensor([number[label] for label in labels]),
            num_classes=max(2, len(classes)),
            average=None,
        ).tolist()
        top5: Counter[int] = Counter()
        wrong: dict[int, Counter[int]] = {label: Counter() for label in labels}
        for prediction in self.evaluated:
            top5[prediction.labels[0]] += prediction.labels[0] in prediction.top5
        for (label, first), times in confusion.items():
            if first != label:
                wrong[label][first] = times
        rows = []
        for label in sorted(wrong):
            correct, false, _, _, images = scores[number[label]]
            low, high = wilson(correct, images)
            row = {"class": label, "images": images, "top1": 100 * correct / images, "top1_low": low}
            row |= {"top1_high": high, "top5": 100 * top5[label] / images, "false_positives": false}
            common = wrong[label].most_common(1)
            row |= {"taken_for": common[0][0] if common else None, "times": common[0][1] if common else 0}
            rows.append(row)
        return rows
