"""A network that can be measured, and what plain PyTorch makes of images with it."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import Network, lively
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import transforms

from fixefficientnet._internal.processes import accelerator
from fixefficientnet.evaluation.loop import EvaluationLoop
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.evaluation.predictions import ImagePrediction
from fixefficientnet.manifest import TestTime

TEST = TestTime(48, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def stack(images: Iterable[Path], test: TestTime = TEST) -> torch.Tensor:
    """Images as a network is shown them at test time."""
    transform = transforms.Compose(
        [
            transforms.Resize(int(test.size / test.crop_pct), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(test.size),
            transforms.ToTensor(),
            transforms.Normalize(test.mean, test.std),
        ]
    )
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in images])


def logits(model: nn.Module, images: Iterable[Path], test: TestTime = TEST) -> torch.Tensor:
    """The logits of a model, computed one image at a time."""
    with torch.inference_mode():
        return torch.cat([model(stack([path], test)) for path in images])


def predict_dataset(*arguments: Any, **options: Any) -> Evaluation:
    """The evaluation of a model on a dataset."""
    model, dataset, test = arguments
    return EvaluationLoop(model, dataset, test, accelerator("cpu", "no"), **options).run()


def evaluated(found: Evaluation) -> list[ImagePrediction]:
    """The predictions that there are, in order."""
    return [prediction for prediction in found.predictions if prediction]


def correct(logits: torch.Tensor, labels: Sequence[int], best: int = 1) -> str:
    """Per image: are there fewer than `best` classes that the network finds more likely than the label?"""
    own = logits.gather(1, torch.tensor(labels)[:, None])
    return "".join("01"[int(better) < best] for better in (logits > own).sum(1))


def assert_nearly(found: object, expected: object) -> None:
    """The same but for rounding, which the number of threads and the place of an image in its batch decide."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    elif isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys()
        for key, value in expected.items():
            assert_nearly(found[key], value)
    else:
        assert found == expected


def network(num_classes: int, images: Sequence[Path], labels: Sequence[int], test: TestTime = TEST) -> Network:
    """A random network, of which each class looks for something like one of the images.

    It classifies a part of them correctly, and does not find all to be of one class.
    """
    torch.manual_seed(3)
    model: Network = lively(timm.create_model("test_efficientnet", num_classes=num_classes), seed=3)
    with torch.inference_mode():
        features = model.forward_head(model.forward_features(stack(images, test)), pre_logits=True)
        like = torch.randint(len(images), (num_classes,))
        like[torch.tensor(labels)] = torch.arange(len(images))
        away = features - features.mean(0)
        weight = 0.1 * (torch.randn(num_classes, features.shape[1]) + away[like] / away.std() / 2) / away.std()
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(-weight @ features.mean(0))
    digits = correct(logits(model, images, test), labels)
    assert 0 < digits.count("1") < len(digits)
    return model


def save_run(
    folder: Path, model: nn.Module, classes: Sequence[str], test: TestTime = TEST, **described: object
) -> Path:
    """What a FixRes run on a network of one's own leaves, as far as it is evaluated."""
    says = {"backbone": "test_efficientnet.r160_in1k", "stage": "fixres", "train_size": 32, "test_size": test.size}
    says |= {"crop_pct": test.crop_pct, "interpolation": test.interpolation, "mean": test.mean, "std": test.std}
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"fixefficientnet": json.dumps(says | {"classes": list(classes)} | described)}
    save_file(model.state_dict(), folder / "model.safetensors", metadata)
    return folder


def bfloat16_error(model: nn.Module, logits: torch.Tensor) -> float:
    """How far logits in bfloat16 may be off, whatever kernels compute them.

    Each layer rounds to 8 significant bits. Its errors are of either sign, so over the layers they add up as a random
    walk does; three standard deviations. For networks that do not end in a difference of like numbers.
    """
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    return 3 * math.sqrt(layers) * 2**-8 * float(logits.abs().max())
