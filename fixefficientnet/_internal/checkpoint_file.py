"""Read a checkpoint file as a state dict: safetensors memory-mapped, a legacy `.pth` without its code."""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fixefficientnet.errors import CheckpointError, MissingFileError

_DAMAGED = (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError, KeyError)
_TOP_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def read(path: Path) -> dict[str, Tensor]:
    """Reads a state dict on the CPU.

    Args:
        path: The file. With the ending `.safetensors`, the tensors are a private memory map of it, read when first
            used and copied when first written, so nothing is ever written through to it. With any other ending, it is
            a legacy pickle, read by `torch.load(weights_only=True)`, which executes none of its code.

    Raises:
        CheckpointError: The file is damaged, or is not a plain state dict.
    """
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except _DAMAGED as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    return _plain(tensors, path)


def read_wrapped(path: Path) -> dict[str, Tensor]:
    """Reads a state dict that a training script may have wrapped.

    That is: put under a top key beside other things (averaged weights go first, as in timm), and given the prefix
    "module." by DataParallel or "_orig_mod." by torch.compile; the file may have any ending.

    Raises:
        MissingFileError: There is no such file.
        CheckpointError: The file is damaged, or holds no plain state dict.
    """
    check_there(path)
    try:
        found: Any = load_file(path) if _is_safetensors(path) else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors raise a dozen kinds on damaged files
        if isinstance(error, OSError) and error.strerror:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        raise CheckpointError(
            f"{path} is no checkpoint, or a damaged one: it takes a safetensors file, or a .pth that holds tensors "
            "alone (save model.state_dict()); other pickled objects are never loaded."
        ) from error
    while isinstance(found, Mapping) and (key := next((k for k in _TOP_KEYS if isinstance(found.get(k), Mapping)), "")):
        found = found[key]
    plain = _plain(found, path)
    while prefix := next((p for p in _PREFIXES if plain and all(name.startswith(p) for name in plain)), ""):
        plain = {name.removeprefix(prefix): tensor for name, tensor in plain.items()}
    return plain


def _plain(found: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        there = f"; it has {listed(map(str, found))}" if isinstance(found, Mapping) else ""
        raise CheckpointError(f"{path} is not a plain state dict (names to tensors){there}.")
    return {str(name): tensor for name, tensor in found.items()}


def check_there(path: Path) -> None:
    """Refuses a name that is no file's.

    Raises:
        MissingFileError: There is no such file.
    """
    if not path.is_file():
        raise MissingFileError(
            f"The checkpoint {path}: {'it is a folder' if path.is_dir() else 'there is no such file'}."
        )


def _is_safetensors(path: Path) -> bool:
    """By content: its first eight bytes are the header's length, and the header is JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def rename(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Gives tensors the names of another state dict that lists the same network in the same order.

    For ports of one network to two code bases: only the prefixes differ. Each pair must agree in the
    leaf of its name (weight, running_mean, …) and in shape.

    Args:
        tensors: The state dict to rename.
        like: A state dict of the target (its tensors may be on the meta device).
        source: The place that the tensors come from, for errors.

    Raises:
        CheckpointError: They do not list the same network.
    """
    if len(tensors) != len(like):
        raise CheckpointError(f"{source} has {len(tensors)} tensors, the model has {len(like)}.")
    renamed = {}
    for (old, tensor), (new, target) in zip(tensors.items(), like.items(), strict=True):
        if old.rpartition(".")[2] != new.rpartition(".")[2] or tensor.shape != target.shape:
            raise CheckpointError(
                f"{source}: {old} {list(tensor.shape)} stands where the model has {new} {list(target.shape)}."
            )
        renamed[new] = tensor
    return renamed


def listed(names: Iterable[str], most: int = 4) -> str:
    """Names for an error message: the first few, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
