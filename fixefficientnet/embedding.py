"""Images in, pooled features out."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fixefficientnet import delta, manifest
from fixefficientnet.errors import OptionError
from fixefficientnet.models import LoadedModel
from fixefficientnet.options import PredictionOptions
from fixefficientnet.prediction import ImagePass, OnError, placed, several
from fixefficientnet.preprocessing import ImageSource

_Found = tuple[ImageSource, NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What one forward pass made of images.

    Attributes:
        images: The images as they were given, those that could be used.
        features: The pooled features that the classifier is given, float32 [N, channels]; [0, 0] without an image.
        logits: The logits, float32 [N, classes]; [0, 0] without an image.
    """

    images: list[ImageSource]
    features: NDArray[np.float32]
    logits: NDArray[np.float32]


def embed(
    images: ImageSource | Iterable[ImageSource],
    model: "str | nn.Module | LoadedModel" = manifest.DEFAULT_MODEL,
    options: PredictionOptions | None = None,
    *,
    on_error: OnError | None = None,
) -> Embeddings:
    """Gives the features of images, and their logits of the same forward pass.

    Images are preprocessed as by `predict`: turned upright, then the model's test-time transform.

    Args:
        images: One image or several: PIL images, paths, or encoded files' bytes.
        model: As in `predict`.
        options: The options of `predict`; its engine must be "eager", and `topk` has no effect. None: the defaults.
        on_error: Called with an image that cannot be used and the reason, instead of raising.

    Raises:
        ImageError: An image cannot be used and there is no `on_error`.
        OptionError: The engine is another.
        UnsupportedModelError: The model has no classifier whose input could be taken.
        FixEfficientNetError: As `predict` raises.
    """
    options = options or PredictionOptions()
    if options.engine != "eager":
        raise OptionError(f"Features are computed by the engine 'eager' alone, not by {options.engine!r}.")
    images = several(images)
    loaded = placed(model, options)
    passing = ImagePass.of(loaded, options, images)
    with _watching(loaded.network) as forward:

        def compute(usable: Sequence[ImageSource], inputs: torch.Tensor) -> Iterator[_Found]:
            features, logits = passing.autocast(forward, inputs)
            return zip(usable, _rows(features), _rows(logits), strict=True)

        found = list(passing.results(images, compute, on_error))
    used, features, logits = zip(*found, strict=True) if found else ((), (), ())
    return Embeddings(list(used), _stacked(features), _stacked(logits))


def _rows(values: torch.Tensor) -> NDArray[np.float32]:
    return values.float().flatten(1).cpu().numpy()


def _stacked(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)


@contextlib.contextmanager
def _watching(network: nn.Module) -> Iterator[Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    """A network that gives what its classifier was given, too, in any number of threads."""
    seen = threading.local()

    def see(_module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen.features = given[0]

    def forward(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = network(inputs)
        return seen.features, logits

    handle = network.get_submodule(delta.find_classifier(network)).register_forward_pre_hook(see)
    try:
        yield forward
    finally:
        handle.remove()
