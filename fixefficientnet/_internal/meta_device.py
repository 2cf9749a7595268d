"""Networks of timm on torch's meta device, which has shapes and no values."""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def without_weights(architecture: str, **timm_kwargs: Any) -> nn.Module:
    """Builds a timm network on the meta device, which has shapes and no values; in train mode, as timm does."""
    try:
        with torch.device("meta"), _SkipInitialisation():
            return timm.create_model(architecture, pretrained=False, **timm_kwargs)
    except (NotImplementedError, RuntimeError, TypeError):  # older releases of timm read some values back
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(architecture, pretrained=False, **timm_kwargs).to("meta")


class _SkipInitialisation(TorchFunctionMode):
    """Leaves out the random initialisation of weights.

    On the meta device it has no effect, but goes through Python decompositions that take most of the time of building
    a network there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func in _RANDOM_FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


_RANDOM_FILLS = frozenset({Tensor.normal_, Tensor.uniform_})
