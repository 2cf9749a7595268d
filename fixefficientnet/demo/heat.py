"""Class-activation maps (Zhou et al., 2016, arXiv 1512.04150): what each place of an image adds to a class's logit."""

from typing import Any, cast

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

_STRONGEST = 0.72
"""Opacity of the heat where it is greatest."""


def forward(network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """One forward pass of timm's classifier in eval mode, of float32 [N, 3, S, S], that keeps the last feature map.

    Returns:
        The logits [N, classes]; and the feature map [N, channels, h, w], where its mean over all places is what a
        linear classifier is given, as in every EfficientNet. None for other networks: they have no such map.
    """
    timm_model = cast(Any, network)
    features = timm_model.forward_features(inputs)
    pooled = timm_model.forward_head(features, pre_logits=True)
    logits = timm_model.forward_head(features)
    averaged = (
        isinstance(timm_model.get_classifier(), nn.Linear)
        and features.ndim == 4
        and features.shape[:2] == pooled.shape
        and torch.allclose(features.mean((2, 3)), pooled, rtol=1e-2, atol=1e-3)
    )
    return logits, features if averaged else None


def activation_map(network: nn.Module, features: Tensor, label: int) -> Tensor:
    """The class-activation map of one image's features, [channels, h, w]: float32 [h, w], on the CPU.

    Its mean and the classifier's bias make the class's logit.
    """
    weight: Tensor = cast(Any, network).get_classifier().weight[label]
    return torch.einsum("c,chw->hw", weight, features).float().cpu()


def paint(crop: Image.Image, activations: Tensor) -> Image.Image:
    """Lays a class-activation map over the image that it is of: what speaks for the class glows, the rest stays."""
    positive = activations.clamp(min=0)
    share = positive / positive.max().clamp(min=1e-12)
    small = Image.fromarray((255 * share).to(torch.uint8).numpy())
    heat = small.resize(crop.size, Image.Resampling.BICUBIC)
    glow = ImageOps.colorize(heat, black="#7a0177", mid="#e8452c", white="#ffd84d")
    return Image.composite(glow, crop.convert("L").convert("RGB"), heat.point([_STRONGEST * v for v in range(256)]))
