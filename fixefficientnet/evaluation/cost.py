"""What a forward pass costs."""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fixefficientnet._internal import input_size
from fixefficientnet._internal.meta_device import without_weights


def gmacs_of(model: nn.Module, size: int) -> float:
    """Billions of multiply-adds of one image's forward pass; the model is on the meta device."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2 / 1e9


def activations_of(model: nn.Module, size: int) -> int:
    """Values that the convolutions and linear layers give in one image's forward pass; the model is on the meta device.

    For networks whose time is that of their memory traffic, it grows with this number.
    """
    total = 0

    def count(module: nn.Module, given: object, result: Tensor) -> None:
        nonlocal total
        total += result.numel()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    return total


def gmacs(architecture: str, sizes: Iterable[int], num_classes: int = 1000) -> dict[int, float]:
    """Billions of multiply-adds of a timm network by name, at several sizes.

    Raises:
        UnsupportedModelError: The network cannot take one of the sizes; names the nearest ones that it takes.
    """
    return {size: _at_size(gmacs_of, architecture, size, num_classes) for size in sizes}


def activations(architecture: str, sizes: Iterable[int], num_classes: int = 1000) -> dict[int, int]:
    """The number of activations of a timm network by name, at several sizes.

    Raises:
        UnsupportedModelError: The network cannot take one of the sizes; names the nearest ones that it takes.
    """
    return {size: int(_at_size(activations_of, architecture, size, num_classes)) for size in sizes}


@functools.cache  # the plans of variants and methods ask for the same
def _at_size(count: Callable[[nn.Module, int], float], architecture: str, size: int, num_classes: int) -> float:
    kwargs = input_size.arguments(architecture, size)
    with input_size.explained(architecture, size):
        model = without_weights(architecture, num_classes=num_classes, **kwargs).eval().requires_grad_(False)
        with torch.device("meta"):
            return count(model, size)
