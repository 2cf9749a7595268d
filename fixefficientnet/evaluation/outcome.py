"""What an evaluation found: one judgement per picture, and the figures that follow from them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from fixefficientnet.errors import EvaluationError
from fixefficientnet.evaluation.statistics import wilson

CALIBRATION_BINS = 15


class Judgement(NamedTuple):
    """What a model made of one picture.

    Attributes:
        labels: The classes that count as right: one; of ReaL labels, any number.
        guesses: The classes of the largest logits, best first, five or as many as there are.
        confidence: Softmax probability of the best guess, in [0, 1].
        loss: Cross-entropy, in nats.
    """

    labels: tuple[int, ...]
    guesses: tuple[int, ...]
    confidence: float
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """What one model made of one data set at one size.

    Attributes:
        size: Test size, in pixels.
        crop_pct: See `TestTime`.
        judgements: Per picture, in the data set's order; None where the picture was not judged.
        unreadable: Why not, by picture index; a picture without a ReaL label is not judged either, but not in here.
        seconds: What it took, loading included; no part of the result.
    """

    size: int
    crop_pct: float
    judgements: tuple[Judgement | None, ...] = field(repr=False)
    unreadable: Mapping[int, str] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)

    @cached_property
    def judged(self) -> list[Judgement]:
        """The judgements that there are, in order."""
        return [judgement for judgement in self.judgements if judgement is not None]

    @property
    def pictures(self) -> int:
        """How many were judged; unreadable ones are not."""
        return len(self.judged)

    @cached_property
    def right(self) -> str:
        """Per picture: is the best guess right? "1", "0", or "-" where it was not judged."""
        return self._marks(1)

    @cached_property
    def right5(self) -> str:
        """The same for the best five guesses."""
        return self._marks(5)

    def _marks(self, best: int) -> str:
        return "".join(
            "-" if j is None else "01"[not set(j.guesses[:best]).isdisjoint(j.labels)] for j in self.judgements
        )

    @property
    def top1(self) -> float:
        """Top-1 accuracy, in per cent."""
        return 100 * self.right.count("1") / self.pictures

    @property
    def top5(self) -> float:
        """Top-5 accuracy, in per cent."""
        return 100 * self.right5.count("1") / self.pictures

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of `top1` (Wilson), in per cent."""
        return wilson(self.right.count("1"), self.pictures)

    @property
    def interval5(self) -> tuple[float, float]:
        """95% interval of `top5` (Wilson), in per cent."""
        return wilson(self.right5.count("1"), self.pictures)

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats."""
        return math.fsum(judgement.loss for judgement in self.judged) / self.pictures

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the best guess: 15 bins of equal width, L1; in [0, 1]."""
        from torchmetrics.functional.classification import binary_calibration_error

        confidence = torch.tensor([judgement.confidence for judgement in self.judged])
        right = torch.tensor([mark == "1" for mark in self.right if mark != "-"]).long()
        return float(binary_calibration_error(confidence, right, n_bins=CALIBRATION_BINS, norm="l1"))

    @property
    def rate(self) -> float | None:
        """Pictures per second, loading included."""
        return len(self.judgements) / self.seconds if self.seconds else None

    def summary(self) -> dict[str, Any]:
        """The figures alone, as JSON values."""
        (low, high), (low5, high5) = self.interval, self.interval5
        return {
            "size": self.size,
            "crop_pct": self.crop_pct,
            "pictures": self.pictures,
            "unreadable": len(self.unreadable),
            "top1": self.top1,
            "top1_low": low,
            "top1_high": high,
            "top5": self.top5,
            "top5_low": low5,
            "top5_high": high5,
            "loss": self.loss,
        }

    def relabelled(self, labels: Sequence[Sequence[int]]) -> "Evaluation":
        """The same guesses held against other labels; the loss stays that of the original ones.

        Args:
            labels: Per picture, the classes that count as right; a picture without any does not count.

        Raises:
            EvaluationError: None of the judged pictures has a label.
        """
        judgements = tuple(
            judgement._replace(labels=tuple(allowed)) if judgement and allowed else None
            for judgement, allowed in zip(self.judgements, labels, strict=True)
        )
        if not any(judgements):
            raise EvaluationError("None of the judged pictures has such a label.")
        return replace(self, judgements=judgements)

    def per_class(self) -> list[dict[str, Any]]:
        """One row per class that has pictures: counts, accuracy, interval, the commonest wrong guess.

        Raises:
            EvaluationError: Pictures have more than one label each.
        """
        if any(len(judgement.labels) != 1 for judgement in self.judged):
            raise EvaluationError("A table per class needs one label per picture, which ReaL labels are not.")
        from torchmetrics.functional.classification import multiclass_stat_scores

        labels = [judgement.labels[0] for judgement in self.judged]
        guesses = [judgement.guesses[0] for judgement in self.judged]
        classes = sorted({*labels, *guesses})
        number = {name: index for index, name in enumerate(classes)}
        scores = multiclass_stat_scores(
            torch.tensor([number[guess] for guess in guesses]),
            torch.tensor([number[label] for label in labels]),
            num_classes=max(2, len(classes)),
            average=None,
        ).tolist()
        top5: Counter[int] = Counter()
        wrong: dict[int, Counter[int]] = {label: Counter() for label in labels}
        for judgement in self.judged:
            (label,), (guess, *_) = judgement.labels, judgement.guesses
            top5[label] += label in judgement.guesses
            if guess != label:
                wrong[label][guess] += 1
        rows = []
        for label in sorted(wrong):
            right, false, _, _, pictures = scores[number[label]]
            low, high = wilson(right, pictures)
            row = {"class": label, "pictures": pictures, "top1": 100 * right / pictures, "top1_low": low}
            row |= {"top1_high": high, "top5": 100 * top5[label] / pictures, "false_positives": false}
            common = wrong[label].most_common(1)
            row |= {"taken_for": common[0][0] if common else None, "times": common[0][1] if common else 0}
            rows.append(row)
        return rows
