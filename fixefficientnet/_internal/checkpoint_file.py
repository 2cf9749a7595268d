"""Read a checkpoint file as a state dict: safetensors memory-mapped, a legacy `.pth` without its code."""

import contextlib
import re
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fixefficientnet.errors import CheckpointError, MissingFileError

_AVERAGED = re.compile(r"(?:^|[._])ema(?:[._]|$)")
"""What the names of averaged weights have in them: state_dict_ema, model_ema."""
_NESTED = 4
"""Depth to which weights are looked for in a checkpoint."""
_COMPILED = "_orig_mod."
_NO_CHECKPOINT = (
    "no checkpoint, or a damaged one: it takes a safetensors file, or a .pth with a state dict in it (save "
    "model.state_dict()); other pickled objects are never loaded."
)
_STAND_INS = threading.Lock()
"""What torch may find in pickles is the process's: another thread's end would take this one's away."""
_COUNTER = ".num_batches_tracked"


@dataclass(frozen=True, slots=True)
class TrainedWeights:
    """The weights that a training script saved, by the network's names.

    Attributes:
        tensors: The tensors, by the names that the network has for them.
        taken: What was chosen of the file, in words; empty where it holds nothing else.
    """

    tensors: dict[str, Tensor]
    taken: str = ""


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
    except Exception as error:  # pickle, zip and safetensors raise a dozen kinds on damaged files
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    return _plain(tensors, path)


def read_trained(path: Path, wanted: Collection[str]) -> TrainedWeights:
    """Reads the weights of a network from what a training script saved.

    That is timm's `train.py`, Lightning, Accelerate and the like: the weights are put under a key beside other things,
    at any depth, and their names have prefixes, such as "module." of DataParallel, "_orig_mod." of torch.compile and
    "model." of Lightning. Of several such weights, averaged ones go first, as in timm. No code of the file runs:
    tensors and plain values are read, and a stand-in takes the place of every other object.

    Args:
        path: The file, with any ending.
        wanted: State-dict names of the network.

    Raises:
        MissingFileError: There is no such file.
        CheckpointError: The file is damaged, or holds no weights.
    """
    check_there(path)
    found = _read_inert(path)
    entries = dict(_entries(found))
    if not entries:
        there = f"; it has {listed(map(str, filter(_is_name, found)))}" if isinstance(found, Mapping) and found else ""
        raise CheckpointError(
            f"{path} holds no state dict (names to tensors){there}. Save model.state_dict(); pickled networks are "
            "never loaded."
        )
    names = {name for name in wanted if not name.endswith(_COUNTER)}
    choices = [(key, prefix) for key, tensors in entries.items() for prefix in _prefixes(tensors, names)]

    def fit(choice: tuple[str, str]) -> tuple[int, bool]:
        key, prefix = choice
        there = names & {name.removeprefix(prefix) for name in entries[key]}
        return len(there), _AVERAGED.search(f"{key}.{prefix}") is not None

    key, prefix = max(choices, key=fit)  # of equals the first
    chosen = {name.removeprefix(prefix): tensor for name, tensor in entries[key].items() if name.startswith(prefix)}
    taken = [key] if key else []
    taken += [f"names without {prefix}"] if prefix else []
    return TrainedWeights(chosen, ", ".join(taken))


class _Mapping:
    """Takes the place of an object: plain values alone, as torch lets a pickle fill nothing but dictionaries."""

    def __new__(cls, *args: object) -> Any:
        return OrderedDict()


class _Value:
    """Takes the place of an array's parts, whose state is no dictionary; keeps nothing of it."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read_inert(path: Path) -> Any:
    try:
        if _is_safetensors(path):
            return load_file(path)
        _check_archive(path)
        unknown: list[str] = []
        with contextlib.suppress(Exception):  # of the format before 2020, and of what is no checkpoint
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        names = {"argparse.Namespace", *unknown}
        stand_ins: list[Any] = [(_Value if name.startswith("numpy.") else _Mapping, name) for name in names]
        with _STAND_INS, torch.serialization.safe_globals(stand_ins):
            return torch.load(path, "cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # pickle, zip and safetensors raise a dozen kinds on damaged files
        if isinstance(error, OSError) and error.strerror:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        raise CheckpointError(f"{path} is {_NO_CHECKPOINT}") from error


def _check_archive(path: Path) -> None:
    """Refuses an archive that grows when it is read (torch's are not compressed), or is damaged (torch never looks)."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise CheckpointError(f"{path} is {_NO_CHECKPOINT}")
        if damaged := archive.testzip():
            raise CheckpointError(
                f"{path} is damaged: {damaged} in it has another checksum than the one recorded. Get the file again "
                "from where it was made."
            )


def _entries(
    found: Any, key: str = "", depth: int = 0, seen: set[int] | None = None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The state dicts in a checkpoint, outermost first, with their keys; each once, however often it is in it."""
    seen = set() if seen is None else seen
    if not isinstance(found, Mapping) or depth > _NESTED or id(found) in seen:
        return
    seen.add(id(found))
    items = {str(name): value for name, value in found.items() if _is_name(name)}
    tensors = {name.replace(_COMPILED, ""): value for name, value in items.items() if isinstance(value, Tensor)}
    if tensors:
        yield key, tensors
    for name, value in items.items():
        yield from _entries(value, f"{key}.{name}" if key else name, depth + 1, seen)


def _is_name(key: object) -> bool:
    """Whether a key may be one on the way to weights; a pickle may have any as a key, also what no text holds."""
    return isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**63)


def _prefixes(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> list[str]:
    """What may stand before the names of the network: nothing, or all that stands before one of them."""
    for anchor in sorted(wanted, key=len, reverse=True):  # the longest is the least ambiguous
        if found := [name.removesuffix(anchor) for name in tensors if f".{name}".endswith(f".{anchor}")]:
            return list(dict.fromkeys(["", *found]))
    return [""]


def _plain(found: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(found, Mapping) or not all(_is_name(k) and isinstance(t, Tensor) for k, t in found.items()):
        there = f"; it has {listed(map(str, filter(_is_name, found)))}" if isinstance(found, Mapping) else ""
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
