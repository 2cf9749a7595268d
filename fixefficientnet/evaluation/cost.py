"""What a forward pass costs."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fixefficientnet._internal import input_size
from fixefficientnet._internal.meta_device import without_weights


def gmacs_of(model: nn.Module, size: int) -> float:
    """Billions of multiply-adds of one image's forward pass; the model is on the meta device."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2 / 1e9


def gmacs(architecture: str, sizes: Iterable[int], num_classes: int = 1000) -> dict[int, float]:
    """The same of a timm network by name, at several sizes.

    Raises:
        UnsupportedModelError: The network cannot take one of the sizes; names the nearest ones that it takes.
    """
    found: dict[int, float] = {}
    model: nn.Module | None = None
    for size in sizes:
        kwargs = input_size.arguments(architecture, size)
        with input_size.explained(architecture, size):
            if model is None or kwargs:
                model = without_weights(architecture, num_classes=num_classes, **kwargs).eval().requires_grad_(False)
            with torch.device("meta"):
                found[size] = gmacs_of(model, size)
    return found
