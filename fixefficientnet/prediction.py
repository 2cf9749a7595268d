"""Images in, ranked labels out."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TypedDict, TypeVar, Unpack

import torch
from PIL import Image
from torch import nn

from fixefficientnet import manifest
from fixefficientnet._internal.modes import in_eval_mode
from fixefficientnet._internal.threads import BATCH_SIZE, default_threads, map_in_threads
from fixefficientnet.errors import ImageError, UnsupportedModelError
from fixefficientnet.models import LoadedModel, from_module, load
from fixefficientnet.options import Engine, MixedPrecision, PredictionOptions
from fixefficientnet.preprocessing import ImageSource, Preprocess, open_image, stacked
from fixefficientnet.runtimes import engines
from fixefficientnet.runtimes.formats import Forward
from fixefficientnet.zoo import Pretrained, create


@dataclass(frozen=True, slots=True)
class Label:
    """One ranked class of an image.

    Attributes:
        index: Class index of the model.
        synset: WordNet id; None if the classes are not ImageNet's.
        name: Readable name of the class; its index if the model's weights do not tell the names.
        probability: Softmax of the class's logit, in [0, 1].
    """

    index: int
    synset: str | None
    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """An image's most probable labels.

    Attributes:
        image: The image as it was given.
        labels: The labels, the most probable first.
    """

    image: ImageSource
    labels: tuple[Label, ...]


class PredictionKeywords(TypedDict, total=False):
    """The fields of `PredictionOptions` but for the device, as keyword arguments of `predict`."""

    topk: int
    batch_size: int | None
    threads: int | None
    engine: Engine
    mixed_precision: MixedPrecision
    fast_preprocessing: bool


Result = TypeVar("Result")
Compute = Callable[[Sequence[ImageSource], torch.Tensor], Iterable[Result]]
OnError = Callable[[ImageSource, ImageError], None]
_Drawn = tuple[ImageSource, torch.Tensor | ImageError | None]
"""An image, with its tensor or the reason why it has none; None: not preprocessed yet."""


def predict(
    images: ImageSource | Iterable[ImageSource],
    model: "str | nn.Module | LoadedModel" = manifest.DEFAULT_MODEL,
    *,
    pretrained: Pretrained | None = None,
    device: torch.device | str | None = None,
    on_error: OnError | None = None,
    on_message: Callable[[str], None] | None = None,
    **options: Unpack[PredictionKeywords],
) -> list[Prediction]:
    """Classifies images as a person sees them: upright by their EXIF orientation, in sRGB by their colour profile.

    Args:
        images: One image or several: PIL images, paths, or encoded files' bytes.
        model: A name as `load` takes it (a variant's, the folder of a fine-tuning run, "timm/resnet50.a1_in1k", …),
            what `load` gave, or a model from `create` or timm.
        pretrained: As in `create`, for a variant's name. None: True, or "backbone" for the lite family,
            which has no FixRes weights.
        device: Device to compute on; a model is moved there. None: a model stays where it is; a variant's name is
            built on cuda if there is one and the engine runs there, else on the CPU.
        on_error: Called with an image that cannot be used and the reason, instead of raising.
        on_message: Called with one line before something that takes its time: the first export for an engine.
        **options: The other fields of `PredictionOptions`:
            topk: Number of labels per image, 5 by default.
            batch_size: Images per forward pass; None: 16, or 2 on a CPU.
            threads: Number of CPU threads that compute a batch each; they share the cores. None: one per core, at
                most 8. A model that keeps state between the layers of a forward pass needs 1.
            engine: "eager" (PyTorch), "compile" (torch.compile), "onnx" (ONNX Runtime) or "openvino"; the last two
                run on the CPU, from a file that is exported once and kept.
            mixed_precision: "no", "bf16", or "fp16" (CUDA).
            fast_preprocessing: Whether pixels may differ a little, in half the time; see `FastPreprocess`.

    Returns:
        One prediction per usable image, in order.

    Raises:
        ImageError: An image cannot be used and there is no `on_error`.
        UnsupportedModelError: The model gives features instead of logits.
        OptionError: An option has a value that it cannot have.
        ExportError: The engine does not run on this device or in this precision, or the model cannot be exported.
        FixEfficientNetError: The device cannot be used here, or lacks the precision; or as `create` raises.
        ModuleNotFoundError: The engine is not installed.
    """
    chosen = PredictionOptions(device=None if device is None else str(device), **options)
    return list(
        iter_predictions(
            several(images), model, chosen, pretrained=pretrained, on_error=on_error, on_message=on_message
        )
    )


def iter_predictions(
    images: Iterable[ImageSource],
    model: "str | nn.Module | LoadedModel" = manifest.DEFAULT_MODEL,
    options: PredictionOptions | None = None,
    *,
    pretrained: Pretrained | None = None,
    on_error: OnError | None = None,
    on_message: Callable[[str], None] | None = None,
) -> Iterator[Prediction]:
    """Classifies images as `predict` does, and gives each prediction as soon as its batch is done.

    The call itself checks everything, builds the model and exports it where the engine needs that; images are drawn
    as predictions are taken. The model is in eval mode from the first prediction to the last.

    Args:
        images: The images, as in `predict`.
        model: As in `predict`.
        options: The options; None: the defaults.
        pretrained: As in `predict`.
        on_error: As in `predict`.
        on_message: As in `predict`.

    Raises:
        FixEfficientNetError: As `predict` raises.
        ModuleNotFoundError: The engine is not installed.
    """
    options = options or PredictionOptions()
    loaded = placed(model, options, pretrained)
    passing = ImagePass.of(loaded, options, images)
    forward: Forward = loaded.network
    if options.engine != "eager":
        threads, precision = passing.threads, options.mixed_precision
        forward = engines.forward_of(
            loaded, loaded.test, options.engine, threads=threads, precision=precision, on_message=on_message
        )

    def classify(usable: Sequence[ImageSource], inputs: torch.Tensor) -> list[Prediction]:
        return ranked(loaded, usable, passing.autocast(forward, inputs).float().softmax(dim=1), options.topk)

    return passing.results(images, classify, on_error)


def several(images: ImageSource | Iterable[ImageSource]) -> Iterable[ImageSource]:
    """One image or several, as several; an open file is a TypeError."""
    if isinstance(images, Image.Image | str | bytes | os.PathLike):
        return [images]
    if hasattr(images, "read"):
        raise TypeError("An open file is no image: give its path, or its bytes (file.read()).")
    return images


def placed(
    model: "str | nn.Module | LoadedModel", options: PredictionOptions, pretrained: Pretrained | None = None
) -> LoadedModel:
    """Opens a model if need be, and moves it to the device that the options ask for; see `predict` for the rest."""
    device: torch.device | str | None = options.device
    if device is None and not isinstance(model, str):
        network = model.network if isinstance(model, LoadedModel) else model
        device = next(network.parameters()).device
    device = engines.device_for(options.engine, device, options.mixed_precision)
    if isinstance(model, str):
        loaded = load(model) if pretrained is None else from_module(create(model, pretrained))
    elif isinstance(model, LoadedModel):
        loaded = model
    elif not getattr(model, "num_classes", 0):
        raise UnsupportedModelError("This model gives features, not logits: build it with a classifier to predict.")
    else:
        loaded = from_module(model)
    loaded.network.to(device)
    return loaded


def ranked(
    loaded: LoadedModel, images: Sequence[ImageSource], probabilities: torch.Tensor, topk: int
) -> list[Prediction]:
    """The most probable labels of each image, of float32 [N, classes]."""
    best = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
    names = loaded.labels
    return [
        Prediction(image, tuple(Label(i, names[i][0], names[i][1], p) for i, p in zip(indices, values, strict=True)))
        for image, indices, values in zip(images, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


@dataclass(frozen=True, slots=True)
class ImagePass:
    """How images go through a network, in batches, in threads; with the dtype of mixed precision, or its own (None)."""

    network: nn.Module
    transform: Preprocess
    batch_size: int
    threads: int
    dtype: torch.dtype | None

    @classmethod
    def of(cls, loaded: LoadedModel, options: PredictionOptions, images: Iterable[ImageSource]) -> "ImagePass":
        """The pass that options ask for."""
        on_cpu = next(loaded.network.parameters()).device.type == "cpu"
        batch_size = options.batch_size or (BATCH_SIZE if on_cpu else 16)
        batches = math.ceil(len(images) / batch_size) if isinstance(images, Sized) else None
        threads = 1 if options.engine == "compile" else options.threads or default_threads(loaded.network, batches)
        transform = loaded.transform(loaded.test, fast=options.fast_preprocessing)
        dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.half}[options.mixed_precision]
        return cls(loaded.network, transform, batch_size, threads, dtype)

    def autocast(self, forward: Callable[[torch.Tensor], Result], inputs: torch.Tensor) -> Result:
        """A forward pass under autocast, which is entered here, as around a generator its caller would be under it."""
        if not self.dtype:
            return forward(inputs)
        with torch.autocast(inputs.device.type, self.dtype):
            return forward(inputs)

    def results(
        self, images: Iterable[ImageSource], compute: Compute[Result], on_error: OnError | None
    ) -> Iterator[Result]:
        """The results of images, in order; the network is in eval mode from the first one to the last.

        `compute` is called in threads, and gives them from images and the network's inputs, float32 [N, 3, S, S].
        """
        done = map_in_threads(lambda batch: self._results(batch, compute), self._batches(images), self.threads)
        with in_eval_mode(self.network), contextlib.closing(done):
            for results, failed in done:
                for image, error in failed:
                    if on_error is None:
                        raise error
                    on_error(image, error)
                yield from results

    @torch.inference_mode()
    def _results(
        self, batch: list[_Drawn], compute: Compute[Result]
    ) -> tuple[list[Result], list[tuple[ImageSource, ImageError]]]:
        found = [(image, self._tensor(image) if known is None else known) for image, known in batch]
        failed = [(image, one) for image, one in found if isinstance(one, ImageError)]
        usable = [(image, one) for image, one in found if not isinstance(one, ImageError)]
        if not usable:
            return [], failed
        parameter = next(self.network.parameters())
        pixels = stacked([pixels for _, pixels in usable]).to(parameter.device)
        inputs = self.transform.normalise(pixels).to(parameter.dtype)
        return list(compute([image for image, _ in usable], inputs)), failed

    def _batches(self, images: Iterable[ImageSource]) -> Iterator[list[_Drawn]]:
        """Batches of images; a PIL image is preprocessed when drawn: its owner may close it, or draw into it, next."""
        drawn = ((image, self._tensor(image) if isinstance(image, Image.Image) else None) for image in images)
        while batch := list(itertools.islice(drawn, self.batch_size)):
            yield batch

    def _tensor(self, image: ImageSource) -> torch.Tensor | ImageError:
        """The image's pixels, uint8 [3, S, S], or the reason why it cannot be used."""
        try:
            return self.transform.pixels(open_image(image, upright=True, srgb=True))
        except ImageError as error:
            return error
