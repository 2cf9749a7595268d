"""A few images with the logits that a network gave for them: whether another copy of it is still the same.

A run leaves them (`probe.safetensors`), publishing holds what it is about to publish against them. Tensors: images,
uint8 [N, S, S, 3], resized and cropped; logits, float32 [N, classes]; labels, int64 [N].
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fixefficientnet._internal import sealed
from fixefficientnet._internal.files import write_atomically
from fixefficientnet.errors import CheckpointError
from fixefficientnet.manifest import TestTime
from fixefficientnet.preprocessing import Preprocess

if TYPE_CHECKING:
    from fixefficientnet.data.dataset import ImageDataset
    from fixefficientnet.evaluation.outcome import Evaluation

FILENAME = "probe.safetensors"
COUNT = 8
TOLERANCE = 0.01
"""Largest difference of logits between two devices, relative to the largest logit: TF32 keeps ten bits."""
_DTYPES = {"images": torch.uint8, "logits": torch.float32, "labels": torch.int64}


@dataclass(frozen=True, slots=True)
class Probe:
    """Images and what a network made of them; see the module."""

    images: Tensor
    logits: Tensor
    labels: Tensor

    @property
    def correct(self) -> int:
        """How many have the label as top-1 prediction."""
        return int((self.logits.argmax(1) == self.labels).sum())

    def __len__(self) -> int:
        return len(self.labels)


def take(model: nn.Module, dataset: "ImageDataset", evaluation: "Evaluation", test: TestTime) -> Probe:
    """Takes images from all over a dataset, among those that could be read; of a model in eval mode and float32."""
    evaluated = np.flatnonzero(evaluation.predictions.evaluated)
    chosen = evaluated[np.linspace(0, len(evaluated) - 1, min(COUNT, len(evaluated))).astype(int)].tolist()
    preprocess = Preprocess.of(test)
    images, labels = zip(*(dataset[index] for index in chosen), strict=True)
    squares = torch.stack([torch.from_numpy(np.array(preprocess.crop(image))) for image in images])
    return Probe(squares, logits(model, squares, test), torch.tensor(labels))


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor, test: TestTime) -> Tensor:
    """What a model makes of a probe's images: float32 [N, classes], on the CPU."""
    preprocess = Preprocess.of(test)
    device = next(model.parameters()).device
    tensors = (preprocess.normalise(image.permute(2, 0, 1)).contiguous() for image in images)
    return torch.cat([model(tensor[None].to(device)).float().cpu() for tensor in tensors])  # one by one: any size fits


def save(probe: Probe, path: Path) -> None:
    """Writes a probe."""
    write_atomically(path, sealed.dumps({name: getattr(probe, name).contiguous() for name in _DTYPES}, {}))


def load(path: Path) -> Probe:
    """Reads a probe; a CheckpointError says that it is damaged, or none."""
    try:
        tensors, _ = sealed.load(path)
        probe = Probe(**{name: tensors[name] for name in _DTYPES})
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    sound = all(getattr(probe, name).dtype == dtype for name, dtype in _DTYPES.items())
    shapes = probe.images.shape[:1], probe.logits.shape[:1], probe.labels.shape
    if not sound or len(set(shapes)) != 1 or not len(probe) or probe.images.shape[3:] != (3,):
        raise CheckpointError(f"{path} is no probe of a run.")
    return probe


def difference(probe: Probe, found: Tensor) -> float:
    """Largest difference of other logits, float32 [N, classes], from a probe's, relative to its largest.

    It is infinite where there is no telling: one of them is no number or infinite, or all of the probe's are 0.
    """
    if found.shape != probe.logits.shape:
        return math.inf
    apart, largest = float((found - probe.logits).abs().max()), float(probe.logits.abs().max())
    return apart / largest if math.isfinite(apart) and largest else math.inf
