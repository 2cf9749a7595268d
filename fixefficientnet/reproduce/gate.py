"""The gate before a variant is tuned: the untuned network must be as accurate here as timm publishes it.

Wrong images, wrong labels or a wrong preprocessing show in this figure, before hours go into tuning on them.
"""

import math

from fixefficientnet.errors import RunError
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.evaluation.paper import VALIDATION_SET
from fixefficientnet.reproduce.recipe import Recipe, Subject

TOLERANCE = 0.3
"""Points that the untuned network's top-1 may differ from timm's on all of ImageNet's validation images."""
_DEVIATIONS = 3.29
"""Standard deviations that 99.9% of normally distributed values lie within."""


def check(subject: Subject, recipe: Recipe, base: Evaluation, images: str) -> str | None:
    """Refuses to go on where the untuned network is not as accurate as timm publishes it.

    Only a variant with its own weights and timm's preprocessing is held against timm's figure, and only where images of
    all 1000 classes were measured, at the train size. Gives what came of it; None where there is no figure of timm's
    for these weights.

    Raises:
        RunError: Its top-1 differs by more than the tolerance.
    """
    published = subject.variant.backbone.top1 if subject.variant else None
    as_timm = recipe.weights == "pretrained" and recipe.base == subject.base
    if published is None or not as_timm:
        return None
    if (classes := len(base.predictions.classes)) < VALIDATION_SET[1]:
        return f"not held against timm's top-1 ({published:.2f}): images of {classes} of {VALIDATION_SET[1]:,} classes"
    tolerance = _tolerance(published, base.images)
    if abs(base.top1 - published) <= tolerance:
        return f"timm publishes {published:.2f}; up to {tolerance:.2f} from it, tuning begins"
    raise RunError(
        f"{recipe.variant}, untuned: top-1 {base.top1:.2f} at {base.size} pixels on the {base.images:,} images of "
        f"{images}; timm publishes {published:.2f}, and {tolerance:.2f} is what they may differ by. Nothing was "
        "trained: images, labels or preprocessing are not those of ImageNet's validation set. Look at the folders and "
        "at --labels. If you know why, --no-check-base leaves this check out."
    )


def _tolerance(published: float, images: int) -> float:
    """The tolerance in points, at a top-1 in per cent: more for a part of the images, where chance decides too."""
    share, total = published / 100, VALIDATION_SET[0]
    correction = max(0, total - images) / (total - 1)  # for drawing without replacement
    return TOLERANCE + 100 * _DEVIATIONS * math.sqrt(share * (1 - share) / images * correction)
