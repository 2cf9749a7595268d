"""Images in, ranked labels out."""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from timm.data import ImageNetInfo

from fixefficientnet import manifest
from fixefficientnet._internal.modes import in_eval_mode
from fixefficientnet._internal.threads import BATCH_SIZE, default_threads, map_in_threads
from fixefficientnet.errors import ImageError, UnsupportedModelError
from fixefficientnet.preprocessing import ImageSource, open_image
from fixefficientnet.zoo import Pretrained, create

if TYPE_CHECKING:
    from fixefficientnet.zoo import ZooModel


@dataclass(frozen=True, slots=True)
class Label:
    """One ranked answer.

    Attributes:
        index: Class index of the model.
        synset: WordNet id; None where the classes are not ImageNet's.
        name: For people; the index where the classes are not ImageNet's.
        probability: Softmax, in [0, 1].
    """

    index: int
    synset: str | None
    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """An image's best labels, best first."""

    image: ImageSource
    labels: tuple[Label, ...]


_Drawn = tuple[ImageSource, torch.Tensor | ImageError | None]
"""An image, and what came of it if that is known."""


def predict(
    images: ImageSource | Iterable[ImageSource],
    model: "str | ZooModel" = manifest.DEFAULT_MODEL,
    *,
    pretrained: Pretrained | None = None,
    topk: int = 5,
    batch_size: int | None = None,
    threads: int | None = None,
    device: torch.device | str | None = None,
    on_error: Callable[[ImageSource, ImageError], None] | None = None,
) -> list[Prediction]:
    """Classifies images; each is turned upright by its EXIF orientation first.

    Args:
        images: One image or several: PIL images, paths, or encoded files' bytes.
        model: A variant's name, or a model from `create`.
        pretrained: As in `create`, for a variant's name. None: True, or "backbone" for the lite family,
            which has no FixRes weights.
        topk: How many labels each.
        batch_size: Images per forward pass; None: 16, or 2 on a CPU.
        threads: How many threads of a CPU compute a batch each; they share its cores. None: as many as it has
            cores for; 1 is for a model that keeps something between the layers of a forward pass.
        device: Where to run: the model is moved there. None: where it is.
        on_error: Called with an image that cannot be used and the reason, instead of raising.

    Returns:
        One prediction per usable image, in order.

    Raises:
        ImageError: An image cannot be used and there is no `on_error`.
        UnsupportedModelError: The model gives features instead of logits.
        ValueError: `topk`, `batch_size` or `threads` is below 1.
    """
    if isinstance(images, Image.Image | str | bytes | os.PathLike):
        images = [images]
    elif hasattr(images, "read"):
        raise TypeError("An open file is no image: give its path, or its bytes (file.read()).")
    if isinstance(model, str):
        model = create(model, manifest.find(model).usual_weights if pretrained is None else pretrained)
    return list(
        stream(images, model, topk=topk, batch_size=batch_size, threads=threads, device=device, on_error=on_error)
    )


def stream(
    images: Iterable[ImageSource],
    model: "ZooModel",
    *,
    topk: int = 5,
    batch_size: int | None = None,
    threads: int | None = None,
    device: torch.device | str | None = None,
    on_error: Callable[[ImageSource, ImageError], None] | None = None,
) -> Iterator[Prediction]:
    """The same as `predict`, batch by batch, for a model from `create`: in eval mode until all are drawn."""
    for name, value in (("topk", topk), ("batch_size", batch_size), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, is {value}.")
    if device is not None:
        model = model.to(device)
    threads = threads or default_threads(model)
    batch_size = batch_size or (BATCH_SIZE if next(model.parameters()).device.type == "cpu" else 16)
    batches = _batches(images, batch_size, model)
    done = map_in_threads(lambda batch: _classify(batch, model, topk), batches, threads)
    with in_eval_mode(model), contextlib.closing(done):
        for predictions, failed in done:
            for image, error in failed:
                if on_error is None:
                    raise error
                on_error(image, error)
            yield from predictions


def _batches(images: Iterable[ImageSource], size: int, model: "ZooModel") -> Iterator[list[_Drawn]]:
    """Batches of what is drawn; a PIL image is used at once, as its owner may close it, or draw another into it."""

    def drawn() -> Iterator[_Drawn]:
        for image in images:
            yield image, _preprocessed(image, model) if isinstance(image, Image.Image) else None

    every = drawn()
    while batch := list(itertools.islice(every, size)):
        yield batch


def _preprocessed(image: ImageSource, model: "ZooModel") -> torch.Tensor | ImageError:
    try:
        return model.preprocess(open_image(image, upright=True))
    except ImageError as error:
        return error


@torch.inference_mode()
def _classify(
    batch: list[_Drawn], model: "ZooModel", topk: int
) -> tuple[list[Prediction], list[tuple[ImageSource, ImageError]]]:
    """What the usable ones are, and why the others are not."""
    usable: list[tuple[ImageSource, torch.Tensor]] = []
    failed: list[tuple[ImageSource, ImageError]] = []
    for image, known in batch:
        found = _preprocessed(image, model) if known is None else known
        if isinstance(found, ImageError):
            failed.append((image, found))
        else:
            usable.append((image, found))
    if not usable:
        return [], failed
    parameter = next(model.parameters())
    inputs = torch.stack([tensor for _, tensor in usable]).to(parameter.device, parameter.dtype)
    logits = model(inputs.contiguous(memory_format=torch.channels_last))
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or not model.num_classes:
        raise UnsupportedModelError("This model gives features, not logits: build it with a classifier to predict.")
    probabilities = logits.float().softmax(dim=1)
    best = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
    names = names_of(probabilities.shape[1])
    predictions = [
        Prediction(image, tuple(Label(i, names[i][0], names[i][1], p) for i, p in zip(indices, values, strict=True)))
        for (image, _), indices, values in zip(usable, best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return predictions, failed


@functools.lru_cache(maxsize=4)
def names_of(num_classes: int) -> list[tuple[str | None, str]]:
    """WordNet id and name of each class; only 1000 classes can be ImageNet's."""
    if num_classes != 1000:
        return [(None, str(index)) for index in range(num_classes)]
    info = ImageNetInfo("imagenet-1k")
    return [(info.index_to_label_name(i), info.index_to_description(i)) for i in range(num_classes)]
