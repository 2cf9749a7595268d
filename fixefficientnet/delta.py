"""The FixRes delta: the classifier and the last batch norm before pooling, all that FixRes changes.

A small safetensors file. Tensors: by their timm state-dict names, float32 (`num_batches_tracked` is
left out: it has no effect at test time). Metadata, all strings: `format`, `format_version`, `variant`,
`backbone`, `fingerprint` (of the tensors that it replaces), `recipe` and `measured` (JSON), `license`,
`libraries` (JSON). The bytes are deterministic: the same content gives the same sha256.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from fixefficientnet._internal.checkpoint_file import listed
from fixefficientnet._internal.files import write_atomically
from fixefficientnet.errors import (
    ChecksumError,
    DeltaFormatError,
    DeltaMismatchError,
    UnsupportedModelError,
)
from fixefficientnet.manifest import INTERPOLATIONS, TestTime, Triple

FORMAT = "fixefficientnet-delta"
FORMAT_VERSION = "1"
_JSON_KEYS = ("recipe", "measured", "libraries")
_TEXT_KEYS = ("variant", "backbone", "fingerprint", "license")
_SHORTCUTS = ("downsample", "shortcut")
_DAMAGED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError, RecursionError)
_SPATIAL_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True, slots=True)
class Head:
    """Names of the two modules that FixRes tunes.

    Attributes:
        norm: The last batch norm before pooling.
        classifier: The final linear layer.
    """

    norm: str
    classifier: str

    def select(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head's own tensors out of a state dict, by name."""
        prefixes = (f"{self.norm}.", f"{self.classifier}.")
        return {
            name: tensor
            for name, tensor in sorted(tensors.items())
            if name.startswith(prefixes) and not name.endswith(".num_batches_tracked")
        }


@dataclass(frozen=True, slots=True)
class Delta:
    """A FixRes delta in memory.

    Attributes:
        tensors: The tuned tensors by state-dict name; float32, on the CPU.
        variant: The manifest's key, or the model's timm name where it is none of ours.
        backbone: timm name of the network that was tuned.
        fingerprint: `fingerprint()` of the tensors that the delta replaces.
        license: SPDX identifier of the delta, lower case.
        recipe: Everything that decided the result; JSON.
        measured: What was measured with these weights; JSON.
        libraries: Versions that made it.
    """

    tensors: Mapping[str, Tensor]
    variant: str
    backbone: str
    fingerprint: str
    license: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)


def find_head(model: nn.Module) -> Head:
    """Finds the classifier and the last batch norm before pooling of any timm CNN.

    The norm is the last one in module order before the pooling, outside shortcut branches. Where
    several branches are added or joined right before the pooling (RepVGG, Inception, PNASNet), it is
    that of the last branch.

    Args:
        model: A timm model; its weights may be on the meta device.

    Raises:
        UnsupportedModelError: There is no classifier, or more than one, or no batch norm over feature maps
            before the pooling (models that use layer norm, for one).
    """
    what = type(model).__name__
    classifier = find_classifier(model)
    norm = ""
    for name, module in model.named_modules():
        if name == classifier or name.rpartition(".")[2] == "global_pool":
            break
        if isinstance(module, _SPATIAL_NORMS) and not any(part in _SHORTCUTS for part in name.split(".")):
            norm = name
    if not norm:
        raise UnsupportedModelError(f"{what} has no batch norm before its pooling: no statistics for FixRes to move.")
    return Head(norm, classifier)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and float32 values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{list(tensor.shape)}\0".encode())
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(values.view(-1).numpy().data)
    return digest.hexdigest()


def extract(
    model: nn.Module,
    *,
    base: Mapping[str, Tensor],
    variant: str,
    backbone: str,
    license: str = "apache-2.0",
    recipe: Mapping[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Delta:
    """Takes the delta out of a tuned model.

    Args:
        model: The tuned model.
        base: State dict of the same model before tuning, cloned (the head's tensors suffice).
        variant: The manifest's key, or the model's timm name where it is none of ours.
        backbone: timm name of the network.
        license: Of the delta; SPDX, lower case.
        recipe: Everything that decided the result; JSON values.
        measured: What was measured with the tuned model; JSON values.

    Raises:
        DeltaMismatchError: `base` is not of the same architecture, or is the tuned model's own memory.
        DeltaFormatError: The tuned tensors hold NaN or Inf.
        UnsupportedModelError: The model's head cannot be found.
    """
    head = find_head(model)
    own = {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}
    if any(tensor.data_ptr() in own for tensor in head.select(base).values()):
        raise DeltaMismatchError(
            "base shares its memory with the tuned model, so it changed along with it: "
            "clone the state dict before tuning."
        )
    tuned = {k: t.detach().to("cpu", torch.float32, copy=True) for k, t in head.select(model.state_dict()).items()}
    return of_tensors(
        tuned,
        replaced=head.select(base),
        variant=variant,
        backbone=backbone,
        license=license,
        recipe=recipe,
        measured=measured,
    )


def of_tensors(
    tuned: Mapping[str, Tensor],
    *,
    replaced: Mapping[str, Tensor],
    variant: str,
    backbone: str,
    license: str,
    recipe: Mapping[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Delta:
    """Makes a delta of a tuned head's tensors; see `extract`.

    Args:
        tuned: By state-dict name; float32, on the CPU.
        replaced: The backbone's, which they replace.
        variant: As all that follow, see `extract`.
        backbone: timm name of the network.
        license: Of the delta.
        recipe: What decided the result.
        measured: What was measured.

    Raises:
        DeltaMismatchError: The two are not of the same architecture.
        DeltaFormatError: The tuned tensors hold NaN or Inf.
    """
    delta = Delta(
        tensors=tuned,
        variant=variant,
        backbone=backbone,
        fingerprint=fingerprint(replaced),
        license=license,
        recipe=dict(recipe or {}),
        measured=dict(measured or {}),
        libraries={m.__name__: str(m.__version__).partition("+")[0] for m in (torch, timm, safetensors)},
    )
    _check_values(delta.tensors, "the tuned model")
    _check_names_and_shapes(delta, replaced)
    return delta


def save(delta: Delta, path: str | os.PathLike[str]) -> str:
    """Writes a delta: to a temporary name beside the target, then renamed.

    Returns:
        The file's sha256, in hex.
    """
    data = dumps(delta)
    write_atomically(Path(path), data)
    return hashlib.sha256(data).hexdigest()


def dumps(delta: Delta) -> bytes:
    """The bytes of a delta file; equal deltas give equal bytes.

    Raises:
        DeltaFormatError: Its metadata cannot be written: not text, or not JSON (NaN, for one).
    """
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION}
    metadata |= {key: getattr(delta, key) for key in _TEXT_KEYS}
    if wrong := [key for key in _TEXT_KEYS if not isinstance(metadata[key], str)]:
        raise DeltaFormatError(f"The delta's {', '.join(wrong)} must be text.")
    try:
        metadata |= {key: json.dumps(getattr(delta, key), sort_keys=True, allow_nan=False) for key in _JSON_KEYS}
    except (TypeError, ValueError) as error:
        raise DeltaFormatError(f"The delta's {', '.join(_JSON_KEYS)} must be JSON values: {error}") from error
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in delta.tensors.items()})
    # safetensors writes metadata in the order of a hash map, another one each time: write its header anew
    header, body = _header(data), data[8 + int.from_bytes(data[:8], "little") :]
    text = json.dumps({"__metadata__": metadata, **header}, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def load(path: str | os.PathLike[str], *, sha256: str | None = None) -> Delta:
    """Reads and checks a delta file.

    Args:
        path: The file.
        sha256: What its bytes must hash to, if known.

    Raises:
        ChecksumError: The bytes have another hash.
        DeltaFormatError: Not a delta: unreadable, truncated, malformed, of an unknown version, of a wrong
            dtype, or with NaN or Inf.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DeltaFormatError(f"{path} cannot be read: {error}") from error
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ChecksumError(
            f"{path} has the sha256 {found}, expected is {sha256}. "
            "Bring the file again, or correct the sha256 in the manifest."
        )
    return loads(data, source=str(path))


def loads(data: bytes, *, source: str) -> Delta:
    """Reads and checks the bytes of a delta file; see `load`."""
    try:
        tensors = safetensors.torch.load(data)
        metadata = _header(data).get("__metadata__") or {}
    except (safetensors.SafetensorError, *_DAMAGED) as error:
        raise DeltaFormatError(f"{source} is no sound safetensors file (truncated or damaged): {error}") from error
    if metadata.get("format") != FORMAT:
        raise DeltaFormatError(
            f"{source} is a safetensors file, but not a FixRes delta (its metadata has no format {FORMAT!r}). "
            "A full checkpoint does not go here."
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise DeltaFormatError(
            f"{source} has the delta format version {metadata.get('format_version')!r}, this release reads "
            f"{FORMAT_VERSION!r}. Upgrade fixefficientnet."
        )
    if missing := [key for key in _TEXT_KEYS + _JSON_KEYS if key not in metadata]:
        raise DeltaFormatError(f"{source} lacks the metadata {', '.join(missing)}.")
    try:
        records = {key: json.loads(metadata[key]) for key in _JSON_KEYS}
    except (ValueError, RecursionError) as error:
        raise DeltaFormatError(f"{source}: its metadata is not JSON where it must be: {error}") from error
    if wrong := [key for key, record in records.items() if not isinstance(record, dict)]:
        raise DeltaFormatError(f"{source}: its metadata {', '.join(wrong)} must be a JSON object.")
    _check_values(tensors, source)
    return Delta(tensors=tensors, **{key: metadata[key] for key in _TEXT_KEYS}, **records)


def is_delta(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is a delta; `load` tells whether it is a sound one."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (safetensors.SafetensorError, OSError):
        return False


def test_time(delta: Delta, usual: TestTime) -> TestTime:
    """The test-time preprocessing that a delta was tuned for, as its recipe says.

    Args:
        delta: Whose.
        usual: What holds where its recipe says nothing.
    """
    recipe = asdict(usual) | {key: value for key, value in delta.recipe.items() if key in usual.__slots__}
    try:
        test = TestTime(
            int(delta.recipe.get("test_size", usual.size)),
            float(recipe["crop_pct"]),
            str(recipe["interpolation"]),
            _triple(recipe["mean"]),
            _triple(recipe["std"]),
        )
    except (TypeError, ValueError) as error:
        raise DeltaFormatError(f"The delta for {delta.variant} has a recipe that cannot be read: {error}.") from error
    if not is_sound(test):
        raise DeltaFormatError(f"The delta for {delta.variant} was tuned for a preprocessing that cannot be: {test}.")
    return test


def is_sound(test: TestTime) -> bool:
    """Whether images can be shown that way."""
    sound = 0 < test.size < 2**16 and 0 < test.crop_pct <= 1 and min(test.std) > 0
    return sound and test.interpolation in INTERPOLATIONS


def _triple(values: Any) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def merge(tensors: Mapping[str, Tensor], delta: Delta, head: Head) -> dict[str, Tensor]:
    """The backbone's state dict with the delta's tensors in place of its own.

    Args:
        tensors: The backbone's full state dict.
        delta: What to put in.
        head: Which tensors a delta for this network must have.

    Raises:
        DeltaMismatchError: The delta has other tensors or shapes, or was tuned from another backbone.
    """
    replaced = head.select(tensors)
    _check_names_and_shapes(delta, replaced)
    found = fingerprint(replaced)
    if found != delta.fingerprint:
        raise DeltaMismatchError(
            f"The delta for {delta.variant} was tuned from another backbone than this one: its {head.norm} and "
            f"{head.classifier} have the fingerprint {found[:16]}…, expected is {delta.fingerprint[:16]}…. "
            f"Use the original weights of {delta.backbone}, of the revision that the delta was tuned from."
        )
    return {**tensors, **delta.tensors}


def apply(model: nn.Module, delta: Delta) -> None:
    """Puts a delta on a model that holds its original backbone weights, in place.

    All checks come first: a refused delta leaves the model as it was.

    Raises:
        DeltaMismatchError: The delta has other tensors or shapes, or was tuned from another backbone.
        UnsupportedModelError: The model's head cannot be found.
    """
    head = find_head(model)
    merged = merge(model.state_dict(), delta, head)
    model.load_state_dict(head.select(merged), strict=False)


def check_variant(delta: Delta, variant: str, source: object) -> None:
    """Refuses a delta that was tuned for another variant.

    Raises:
        DeltaMismatchError: It was.
    """
    if delta.variant != variant:
        raise DeltaMismatchError(f"{source} is the delta for {delta.variant}, not for {variant}.")


def find_classifier(model: nn.Module) -> str:
    """Finds the name of the final linear layer of any timm model.

    Raises:
        UnsupportedModelError: There is none, or more than one.
    """
    configured = getattr(model, "pretrained_cfg", {}).get("classifier")
    modules = dict(model.named_modules())
    if isinstance(configured, tuple | list):
        present = [name for name in configured if isinstance(modules.get(name), nn.Linear | nn.Conv2d)]
        if len(present) > 1:
            raise UnsupportedModelError(f"{type(model).__name__} has more than one classifier: {', '.join(present)}.")
        configured = next(iter(present), None)
    if configured and isinstance(modules.get(configured), nn.Linear | nn.Conv2d):
        return str(configured)
    get_classifier = getattr(model, "get_classifier", None)
    module = get_classifier() if callable(get_classifier) else None
    for name, candidate in modules.items():
        if candidate is module and isinstance(candidate, nn.Linear | nn.Conv2d):
            return str(name)
    raise UnsupportedModelError(f"{type(model).__name__} has no classifier to tune: build it with num_classes above 0.")


def _check_names_and_shapes(delta: Delta, replaced: Mapping[str, Tensor]) -> None:
    what = f"The delta for {delta.variant}"
    if missing := sorted(set(replaced) - set(delta.tensors)):
        raise DeltaMismatchError(f"{what} lacks {listed(missing)}, which the model has.")
    if extra := sorted(set(delta.tensors) - set(replaced)):
        raise DeltaMismatchError(f"{what} has {listed(extra)}, which the model's head has not.")
    for name, tensor in delta.tensors.items():
        if tensor.shape != replaced[name].shape:
            raise DeltaMismatchError(
                f"{what}: {name} has the shape {list(tensor.shape)}, the model's has {list(replaced[name].shape)}. "
                "A delta for classes of your own goes on the checkpoint that it was tuned from (delta.apply); the "
                "run's model.safetensors is both in one."
            )


def _check_values(tensors: Mapping[str, Tensor], source: str) -> None:
    if not tensors:
        raise DeltaFormatError(f"{source} has no tensors.")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise DeltaFormatError(f"{source}: {name} is {str(tensor.dtype).removeprefix('torch.')}, must be float32.")
        if not torch.isfinite(tensor).all():
            raise DeltaFormatError(f"{source}: {name} has NaN or Inf.")
        if name.endswith(".running_var") and (tensor < 0).any():
            raise DeltaFormatError(f"{source}: {name} has a negative variance.")


def _header(data: bytes) -> dict[str, Any]:
    """A safetensors file's header, decoded: its length in 8 bytes, then JSON, then the tensors."""
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header
