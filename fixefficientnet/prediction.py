"""Pictures in, ranked labels out."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from timm.data import ImageNetInfo

from fixefficientnet import manifest
from fixefficientnet.errors import PictureError, UnsupportedModelError
from fixefficientnet.modes import in_eval_mode
from fixefficientnet.preprocessing import PictureSource, open_picture
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
    """A picture's best labels, best first."""

    picture: PictureSource
    labels: tuple[Label, ...]


def predict(
    pictures: PictureSource | Iterable[PictureSource],
    model: "str | ZooModel" = manifest.DEFAULT_MODEL,
    *,
    pretrained: Pretrained | None = None,
    topk: int = 5,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    on_error: Callable[[PictureSource, PictureError], None] | None = None,
) -> list[Prediction]:
    """Classifies pictures; each is turned upright by its EXIF orientation first.

    Args:
        pictures: One picture or several: PIL images, paths, or encoded files' bytes.
        model: A variant's name, or a model from `create`.
        pretrained: As in `create`, for a variant's name. None: True, or "backbone" for the lite family,
            which has no FixRes weights.
        topk: How many labels each.
        batch_size: Pictures per forward pass.
        device: Where to run: the model is moved there. None: where it is.
        on_error: Called with a picture that cannot be used and the reason, instead of raising.

    Returns:
        One prediction per usable picture, in order.

    Raises:
        PictureError: A picture cannot be used and there is no `on_error`.
        UnsupportedModelError: The model gives features instead of logits.
        ValueError: `topk` or `batch_size` is below 1.
    """
    if isinstance(pictures, Image.Image | str | bytes | os.PathLike):
        pictures = [pictures]
    elif hasattr(pictures, "read"):
        raise TypeError("An open file is no picture: give its path, or its bytes (file.read()).")
    if isinstance(model, str):
        model = create(model, manifest.find(model).usual_weights if pretrained is None else pretrained)
    return list(stream(pictures, model, topk=topk, batch_size=batch_size, device=device, on_error=on_error))


def stream(
    pictures: Iterable[PictureSource],
    model: "ZooModel",
    *,
    topk: int = 5,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    on_error: Callable[[PictureSource, PictureError], None] | None = None,
) -> Iterator[Prediction]:
    """The same as `predict`, batch by batch, for a model from `create`."""
    if topk < 1 or batch_size < 1:
        raise ValueError(f"topk and batch_size must be 1 or more, are {topk} and {batch_size}.")
    if device is not None:
        model = model.to(device)
    batch: list[tuple[PictureSource, torch.Tensor]] = []
    for picture in pictures:
        try:
            batch.append((picture, model.preprocess(open_picture(picture, upright=True))))
        except PictureError as error:
            if on_error is None:
                raise
            on_error(picture, error)
        if len(batch) == batch_size:
            yield from _classify(batch, model, topk)
            batch = []
    if batch:
        yield from _classify(batch, model, topk)


@torch.inference_mode()
def _classify(batch: list[tuple[PictureSource, torch.Tensor]], model: "ZooModel", topk: int) -> list[Prediction]:
    parameter = next(model.parameters())
    inputs = torch.stack([tensor for _, tensor in batch]).to(parameter.device, parameter.dtype)
    with in_eval_mode(model):
        logits = model(inputs)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or not model.num_classes:
        raise UnsupportedModelError("This model gives features, not logits: build it with a classifier to predict.")
    probabilities = logits.float().softmax(dim=1)
    best = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
    names = names_of(probabilities.shape[1])
    return [
        Prediction(picture, tuple(Label(i, names[i][0], names[i][1], p) for i, p in zip(indices, values, strict=True)))
        for (picture, _), indices, values in zip(batch, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


@functools.lru_cache(maxsize=4)
def names_of(num_classes: int) -> list[tuple[str | None, str]]:
    """WordNet id and name of each class; only 1000 classes can be ImageNet's."""
    if num_classes != 1000:
        return [(None, str(index)) for index in range(num_classes)]
    info = ImageNetInfo("imagenet-1k")
    return [(info.index_to_label_name(i), info.index_to_description(i)) for i in range(num_classes)]
