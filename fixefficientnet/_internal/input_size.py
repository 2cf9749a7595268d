"""Networks of timm that are built for images of one size, for their position embeddings or windows.

timm builds them for another size by `img_size=`, and resizes the embeddings of the weights that it loads then. All
other networks take images of any size as they are.
"""

import contextlib
import textwrap
from collections.abc import Iterator
from typing import Any, cast

import timm
import torch
from torch import nn

from fixefficientnet._internal.meta_device import without_weights
from fixefficientnet.errors import UnsupportedModelError

_REFUSALS = (AssertionError, RuntimeError, ValueError, TypeError, IndexError, ZeroDivisionError)
"""What timm and torch raise for a size that does not fit."""
_STEPS = (4, 7, 14, 16, 28, 32, 64)
"""Of one of these, the sizes that a network takes are usually multiples."""


def arguments(architecture: str, size: int | None) -> dict[str, Any]:
    """timm's arguments for a network of a size, in pixels; none for its usual one (None), or where it takes any."""
    cfg = timm.get_pretrained_cfg(architecture)
    if size is None or cfg is None or not cfg.fixed_input_size:
        return {}
    return {"img_size": size, "pretrained_cfg_overlay": {"input_size": (3, size, size)}}


def of(model: nn.Module) -> int | None:
    """The size that a network of timm is built for, in pixels; None: it takes any."""
    cfg = cast("dict[str, Any]", model.pretrained_cfg)
    return int(cfg["input_size"][-1]) if cfg.get("fixed_input_size") else None


def at_size(model: nn.Module, size: int) -> nn.Module:
    """The same network for images of another size in pixels, with its weights as timm resizes them.

    It must be as its name alone builds it but for the number of classes. The new one is on the same device, in eval
    mode; where the model is of this size, or takes any, it is the model itself.

    Raises:
        UnsupportedModelError: The network cannot take this size.
    """
    if of(model) in (None, size):
        return model
    cfg = cast("dict[str, Any]", model.pretrained_cfg)
    name, classes = str(cfg["architecture"]), int(cast(Any, model).num_classes)
    kwargs = arguments(name, size)
    weights = {"state_dict": dict(model.state_dict()), "num_classes": classes, "custom_load": False}
    kwargs["pretrained_cfg_overlay"] |= weights
    try:
        made = timm.create_model(name, pretrained=True, num_classes=classes, **kwargs)
    except _REFUSALS as error:
        raise UnsupportedModelError(
            f"{name} cannot take images of {size} pixels: it is built for {of(model)}, and timm cannot resize it "
            f"({_words(error)}). Keep to that size."
        ) from error
    made.pretrained_cfg = cfg | {"input_size": (3, size, size)}  # type: ignore[assignment]
    return made.to(next(model.parameters()).device).eval()


@contextlib.contextmanager
def explained(architecture: str, size: int) -> Iterator[None]:
    """Within, a network on the meta device is built for a size, or run at it.

    Raises:
        UnsupportedModelError: The network cannot take this size; names the nearest ones that it takes.
    """
    try:
        yield
    except _REFUSALS as error:
        usual = timm.get_pretrained_cfg(architecture)
        below = {size // step * step for step in _STEPS} - {0, size}
        above = {(size // step + 1) * step for step in _STEPS} | ({usual.input_size[-1]} if usual else set())
        sides = sorted(below, reverse=True), sorted(near for near in above if near > size)
        nearest = [next((near for near in side if _takes(architecture, near)), None) for side in sides]
        raise UnsupportedModelError(
            f"{architecture} cannot take images of {size} pixels ({_words(error)}). "
            f"The nearest sizes that it takes: {' and '.join(str(near) for near in nearest if near) or 'none found'}."
        ) from error


def _takes(architecture: str, size: int) -> bool:
    try:
        model = without_weights(architecture, **arguments(architecture, size)).eval()
        with torch.no_grad(), torch.device("meta"):
            model(torch.empty(1, 3, size, size))
    except _REFUSALS:
        return False
    return True


def _words(error: Exception) -> str:
    return textwrap.shorten(str(error).partition("\n")[0], 120).rstrip(".:")
