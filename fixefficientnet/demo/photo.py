"""What a network makes of one photo at a test size, and which sizes it can be tried at."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from fixefficientnet._internal import input_size
from fixefficientnet.demo import heat
from fixefficientnet.errors import OptionError
from fixefficientnet.models import LoadedModel
from fixefficientnet.options import PredictionOptions
from fixefficientnet.prediction import ImagePass, Label, ranked
from fixefficientnet.preprocessing import ImageSource, Preprocess

_GRID, _POINTS = 32, 10
"""Sizes are multiples of the first, in pixels; a curve over them has about as many points as the second."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The test sizes that a network can be tried at, in pixels.

    Attributes:
        lowest: The lowest one.
        highest: The highest one.
        step: The distance between neighbours; train size and test size are among them.
        curve: Those that a curve is drawn through.
    """

    lowest: int
    highest: int
    step: int
    curve: tuple[int, ...]

    @classmethod
    def of(cls, loaded: LoadedModel) -> "Sizes":
        """From half the train size to one and a half times the test size; or the one size that the network takes."""
        test, train = loaded.test.size, loaded.train_size or loaded.test.size
        if input_size.of(loaded.network) is not None:
            return cls(test, test, 1, (test,))
        lowest = max(_GRID, min(train, test) // 2 // _GRID * _GRID)
        highest = math.ceil(max(train, test) * 1.5 / _GRID) * _GRID
        apart = math.ceil((highest - lowest) / _GRID / _POINTS) * _GRID
        curve = {*range(lowest, highest + 1, apart), train, test}
        return cls(lowest, highest, math.gcd(_GRID, train, test), tuple(sorted(curve)))


@dataclass(frozen=True, slots=True)
class Look:
    """One network's look at one photo.

    Attributes:
        labels: The most probable labels, the most probable first.
        milliseconds: What the forward pass took.
        crop: What the network was shown: a square RGB image.
        activations: The class-activation map of the most probable label, see `heat.activation_map`; None where the
            network has none.
    """

    labels: tuple[Label, ...]
    milliseconds: float
    crop: Image.Image
    activations: Tensor | None


def look(loaded: LoadedModel, photo: ImageSource, size: int) -> Look:
    """Classifies a photo at a test size, as `predict` does.

    Raises:
        ImageError: The photo cannot be used.
        OptionError: The size is not within the network's `Sizes`.
    """
    sizes = Sizes.of(loaded)
    if not sizes.lowest <= size <= sizes.highest:
        raise OptionError(f"{loaded.name} is tried at {sizes.lowest} to {sizes.highest} pixels here, not at {size}.")
    loaded = replace(loaded.for_size(size), test=loaded.at(size))
    options = PredictionOptions()
    passing = ImagePass.of(loaded, options, [photo])

    def compute(usable: Sequence[ImageSource], inputs: Tensor) -> Iterator[Look]:
        begun = time.perf_counter()
        logits, features = heat.forward(loaded.network, inputs)
        probabilities = logits.float().softmax(dim=1).cpu()
        taken = 1000 * (time.perf_counter() - begun)
        (prediction,) = ranked(loaded, usable, probabilities, options.topk)
        activations = None
        if features is not None:
            activations = heat.activation_map(loaded.network, features[0], prediction.labels[0].index)
        yield Look(prediction.labels, taken, _shown(passing.transform, inputs[0]), activations)

    (found,) = passing.results([photo], compute, None)
    return found


def _shown(transform: Preprocess, inputs: Tensor) -> Image.Image:
    """The network's own input, float [3, S, S], back as an image."""
    mean, std = (torch.tensor(three)[:, None, None] for three in (transform.mean, transform.std))
    pixels = (inputs.float().cpu() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
