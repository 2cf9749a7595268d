"""What a forward pass costs."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fixefficientnet._internal import input_size
from fixefficientnet._internal.meta_device import without_weights


def gmacs(architecture: str, sizes: Iterable[int], num_classes: int = 1000) -> dict[int, float]:
    """Billions of multiply-adds of one image's forward pass through a timm network by name, at several sizes.

    Raises:
        UnsupportedModelError: The network cannot take one of the sizes; names the nearest ones that it takes.
    """
    return {size: _counted(architecture, size, num_classes)[0] for size in sizes}


def activations(architecture: str, sizes: Iterable[int], num_classes: int = 1000) -> dict[int, int]:
    """The number of values that the convolutions and linear layers give in one image's forward pass; raises as `gmacs`.

    For networks whose time is that of their memory traffic, it grows with this number.
    """
    return {size: _counted(architecture, size, num_classes)[1] for size in sizes}


@functools.cache  # the plans of variants and methods ask for the same
def _counted(architecture: str, size: int, num_classes: int) -> tuple[float, int]:
    """Both figures at one size, from one forward pass on the meta device."""
    values = 0

    def count(module: nn.Module, given: object, result: Tensor) -> None:
        nonlocal values
        values += result.numel()

    counter, kwargs = FlopCounterMode(display=False), input_size.arguments(architecture, size)
    with input_size.explained(architecture, size):
        model = without_weights(architecture, num_classes=num_classes, **kwargs).eval().requires_grad_(False)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(count)
        with torch.no_grad(), torch.device("meta"), counter:
            model(torch.empty(1, 3, size, size))
    return counter.get_total_flops() / 2 / 1e9, values
