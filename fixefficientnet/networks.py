"""Any timm network: without weights, and from a whole checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fixefficientnet import checkpoint, delta
from fixefficientnet.checkpoint import listed
from fixefficientnet.errors import CheckpointError

DESCRIPTION = "fixefficientnet"
"""Key of a run's own words about its network, in the metadata of its model.safetensors."""


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


def from_checkpoint(architecture: str, path: Path) -> nn.Module:
    """Builds a timm network with as many classes as a checkpoint of it has, in eval mode.

    Args:
        architecture: timm's name; with a tag, the model's preprocessing is the tag's.
        path: safetensors, or a `.pth` of tensors alone (see `checkpoint.read_wrapped`).

    Raises:
        MissingFileError: There is no such file.
        CheckpointError: It cannot be read, or is not of this network.
    """
    tensors = checkpoint.read_wrapped(path)
    if not timm.is_model(architecture):
        raise CheckpointError(
            f"{path} is of the network {architecture!r}, which timm {timm.__version__} does not have."
        )
    try:
        model = without_weights(architecture)
    except RuntimeError as error:  # a tag that is none
        raise CheckpointError(f"timm {timm.__version__} has no {architecture}: {error}") from error
    name = delta.find_classifier(model)
    weight = tensors.get(f"{name}.weight")
    if weight is None or weight.ndim == 0:
        raise CheckpointError(f"{path} has no {name}.weight: it is no checkpoint of {architecture}.")
    model = timm.create_model(architecture, pretrained=False, num_classes=len(weight))
    wanted = model.state_dict()
    wrong = [
        key
        for key in wanted
        if not key.endswith(".num_batches_tracked") and (key not in tensors or tensors[key].shape != wanted[key].shape)
    ]
    wrong += sorted(set(tensors) - set(wanted))
    if wrong:
        raise CheckpointError(
            f"{path} is no checkpoint of {architecture}: {listed(wrong)} missing, too many, or of another shape."
        )
    model.load_state_dict(tensors, strict=False)
    return model.eval()


def description(path: Path) -> Mapping[str, Any]:
    """What a fine-tuning run wrote of itself into its model.safetensors; nothing for other files.

    Raises:
        MissingFileError: There is no such file.
    """
    checkpoint.check_there(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            described = json.loads((file.metadata() or {}).get(DESCRIPTION, "{}"))
    except (safetensors.SafetensorError, OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}
