"""safetensors files with a sha256 over all that is in them, so that no bit of them changes unnoticed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

_SHA256 = "sha256"
"""Key of the hash in the file's metadata."""


def dumps(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], elsewhere: Any = b"") -> bytes:
    """The bytes of a file.

    Args:
        tensors: The tensors by name; on the CPU, contiguous.
        metadata: The metadata.
        elsewhere: Bytes that are kept in another place, and that the hash is over too.
    """
    sealed = {**metadata, _SHA256: _digest(tensors, metadata, elsewhere)}
    return safetensors.torch.save(dict(tensors), sealed)


def load(path: Path, elsewhere: Any = b"") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, memory-mapped, and metadata of a file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged, or was not written by `dumps`.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of damaged headers; safetensors and torch raise several kinds
        raise ValueError(str(error)) from error
    if metadata.pop(_SHA256, None) != _digest(tensors, metadata, elsewhere):
        raise ValueError("it was changed after it was written")
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], elsewhere: Any) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode("utf-8", "surrogatepass"))
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(elsewhere)
    return digest.hexdigest()
