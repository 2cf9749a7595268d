"""The FixRes delta: the classifier and the last norm before it, all that FixRes changes.

A small safetensors file. Its tensors are those two modules', by their timm state-dict names, float32
(`num_batches_tracked` is left out: it has no effect at test time). Its metadata has one key, `fixefficientnet-delta`:
JSON with sorted keys, see `_Metadata`. The bytes are deterministic (the same content gives the same sha256), and a
sha256 over tensors and metadata stands in the file itself, so that no bit of them changes unnoticed.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from fixefficientnet._internal import records
from fixefficientnet._internal.checkpoint_file import listed
from fixefficientnet._internal.files import check_file, write_atomically
from fixefficientnet.errors import (
    ChecksumError,
    DeltaFormatError,
    DeltaMismatchError,
    UnsupportedModelError,
)
from fixefficientnet.manifest import Sha256, TestTime

FORMAT = "fixefficientnet-delta"
FORMAT_VERSION: Final = 2
_ASIDE = ("downsample", "shortcut", "attn_pool")
"""Parts of a network that its features are added to, or pass beside."""
_DAMAGED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError, RecursionError)
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True, slots=True)
class Head:
    """Names of the modules that FixRes tunes: the last norm, see `find_head` (None: there is none), and classifier."""

    norm: str | None
    classifier: str

    def __str__(self) -> str:
        """Their names, for people."""
        return f"{self.norm} and {self.classifier}" if self.norm else self.classifier

    def select(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head's own tensors out of a state dict, by name."""
        prefixes = tuple(f"{module}." for module in (self.norm, self.classifier) if module)
        return {
            name: tensor
            for name, tensor in sorted(tensors.items())
            if name.startswith(prefixes) and not name.endswith(".num_batches_tracked")
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a delta tells of itself.

    Attributes:
        variant: The manifest's key, or the model's timm name where it is none of ours.
        backbone: timm name of the network that was tuned.
        fingerprint: `fingerprint()` of the tensors that the delta replaces.
        license: SPDX identifier of the delta, lower case.
        recipe: The settings that decided the result; JSON.
        measured: The accuracy of these weights; JSON.
        libraries: Versions of the libraries that made the delta, by name.
    """

    variant: str
    backbone: str
    fingerprint: Sha256
    license: str
    recipe: Mapping[str, Any]
    measured: Mapping[str, Any]
    libraries: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta(Description):
    """A FixRes delta in memory; see `Description` for the other attributes.

    Attributes:
        tensors: The tuned tensors by state-dict name; float32, on the CPU.
    """

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Metadata(Description):
    """The metadata of a delta file, with its `sha256_over`."""

    format_version: Literal[2]
    sha256: Sha256


def find_head(model: nn.Module) -> Head:
    """Finds the classifier and the last norm before it, of any timm classifier.

    The norm is the last batch norm over feature maps before the pooling (or what a network has in its place, such as
    group norm), unless a norm outside all blocks follows it there, as in MaxViT. Where there is no batch norm, it is
    the last norm of all, before the pooling or behind it: the layer norm of transformers and of ConvNeXt. "Last" is by
    module order, without shortcut branches. Where several branches are added or joined right before the pooling
    (RepVGG, Inception, PNASNet), it is that of the last branch.

    The model's weights may be on the meta device. What `find_classifier` raises goes through.
    """
    classifier = find_classifier(model)
    batch_norm: str | None = None
    last: str | None = None
    pooled = False
    for name, module in model.named_modules():
        parts = name.split(".")
        if name == classifier:
            break
        pooled = pooled or parts[-1] == "global_pool"
        if not _is_norm(module) or any(part in _ASIDE for part in parts):
            continue
        last = name
        in_its_place = isinstance(module, _BATCH_NORMS) or parts[-1].startswith("bn")
        outside_blocks = not any(part.isdecimal() for part in parts)
        if not pooled and (in_its_place or (batch_norm and outside_blocks)):
            batch_norm = name
    return Head(batch_norm or last, classifier)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with weights, of feature maps or of features; of PyTorch's or timm's many kinds."""
    if isinstance(module, nn.BatchNorm1d):  # over pooled features
        return False
    return isinstance(module, _BATCH_NORMS) or (
        "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter)
    )


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
        license: The delta's license; SPDX identifier, lower case.
        recipe: The settings that decided the result; JSON values.
        measured: The accuracy of the tuned model; JSON values.

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
    """Makes a delta of a tuned head's tensors and those that they replace, by the same names; see `extract`.

    The tuned ones are float32, on the CPU.

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
        DeltaFormatError: Its metadata cannot be written: a field of another type, or not JSON (NaN, for one).
    """
    described = _described(delta)
    metadata = _Metadata(**described, format_version=FORMAT_VERSION, sha256=sha256_over(described, delta.tensors))
    records.check(metadata, DeltaFormatError)
    # one key only: of several, safetensors writes another order each time
    text = {FORMAT: _sorted_json(records.to_json(metadata))}
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in delta.tensors.items()}, text)


def load(path: str | os.PathLike[str], *, sha256: str | None = None) -> Delta:
    """Reads and checks a delta file.

    Args:
        path: The file.
        sha256: The hash that its bytes must have, if known.

    Raises:
        ChecksumError: The bytes have another hash.
        DeltaFormatError: The file is no sound delta: unreadable, truncated, malformed, changed, of another version,
            of another dtype than float32, or with NaN or Inf.
    """
    try:
        check_file(path)
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
        # of bytes, safetensors gives tensors only
        header = records.decode(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__") or {}
    except (safetensors.SafetensorError, *_DAMAGED) as error:
        raise DeltaFormatError(f"{source} is no sound safetensors file (truncated or damaged): {error}") from error
    found = _read_metadata(metadata, source)
    _check_values(tensors, source)
    delta = Delta(tensors=tensors, **_described(found))
    if (sha256 := sha256_over(_described(delta), tensors)) != found.sha256:
        raise DeltaFormatError(
            f"{source} was damaged or changed after it was written: its tensors and metadata have the sha256 {sha256}, "
            f"and it records {found.sha256}. Get the file again from where it was made."
        )
    return delta


def is_delta(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is a delta, of whatever version; `load` tells whether it is a sound one."""
    try:
        check_file(path)
        with safetensors.safe_open(path, "pt") as file:
            return _says_delta(file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False


def _says_delta(metadata: Mapping[str, Any]) -> bool:
    """Whether a safetensors file's metadata is a delta's; version 1 had a key `format` for it."""
    return FORMAT in metadata or metadata.get("format") == FORMAT


def _read_metadata(metadata: Mapping[str, Any], source: str) -> _Metadata:
    if not _says_delta(metadata):
        raise DeltaFormatError(
            f"{source} is a safetensors file, but not a FixRes delta (its metadata has no {FORMAT!r}). "
            "A full checkpoint does not go here."
        )
    try:
        found = records.decode(metadata[FORMAT]) if FORMAT in metadata else {"format_version": 1}
    except (ValueError, TypeError) as error:
        raise DeltaFormatError(f"{source}: its metadata {FORMAT!r} is not JSON: {error}") from error
    version = found.get("format_version") if isinstance(found, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        remedy = "Upgrade fixefficientnet."
        if version < FORMAT_VERSION:
            remedy = (
                "Make the delta again with this release: by the fine-tuning run, or from a checkpoint by `convert`."
            )
        raise DeltaFormatError(
            f"{source} has the delta format version {version}, this release reads {FORMAT_VERSION}. {remedy}"
        )
    return records.read(_Metadata, found, f"{source}: metadata", DeltaFormatError)


def _described(record: Description) -> dict[str, Any]:
    """What a delta or its metadata tells of the delta, by field."""
    return {field.name: getattr(record, field.name) for field in fields(Description)}


def _sorted_json(value: Any) -> str:
    try:
        as_read_again = records.decode(json.dumps(value))  # keys become text, by which they are sorted
        return json.dumps(as_read_again, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise DeltaFormatError(f"The delta's recipe, measured and libraries must be JSON values: {error}") from error


def sha256_over(described: Any, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over what a file of weights tells of itself, a record or JSON values, and over its tensors."""
    return hashlib.sha256(f"{_sorted_json(records.to_json(described))}\0{fingerprint(tensors)}".encode()).hexdigest()


def test_time(delta: Delta, usual: TestTime) -> TestTime:
    """The test-time preprocessing that a delta was tuned for, as its recipe says; as usual, what that does not say.

    Raises:
        DeltaFormatError: The recipe names a preprocessing that cannot be.
    """
    names = {"test_size" if name == "size" else name: name for name in TestTime.__slots__}
    known = {names[key]: value for key, value in delta.recipe.items() if key in names}
    where = f"The recipe of the delta for {delta.variant}"
    return records.read(TestTime, records.to_json(usual) | known, where, DeltaFormatError)


def merge(tensors: Mapping[str, Tensor], delta: Delta, head: Head) -> dict[str, Tensor]:
    """The backbone's full state dict with the delta's tensors in place of its head's; raises what `apply` does."""
    replaced = head.select(tensors)
    _check_names_and_shapes(delta, replaced)
    found = fingerprint(replaced)
    if found != delta.fingerprint:
        raise DeltaMismatchError(
            f"The delta for {delta.variant} was tuned from another backbone than this one: its {head} "
            f"{'have' if head.norm else 'has'} the fingerprint {found[:16]}…, expected is {delta.fingerprint[:16]}…. "
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
    """Refuses a delta that was tuned for another variant (DeltaMismatchError)."""
    if delta.variant != variant:
        raise DeltaMismatchError(f"{source} is the delta for {delta.variant}, not for {variant}.")


def find_classifier(model: nn.Module) -> str:
    """Finds the name of the final linear layer of any timm model; UnsupportedModelError: it has none, or several."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    told = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = [name for name in (told if isinstance(told, tuple | list) else [told]) if name in layers]
    get_classifier = getattr(model, "get_classifier", None)
    given = get_classifier() if callable(get_classifier) else None
    count = max(len(names), len(given) if isinstance(given, tuple | list | nn.ModuleList) else 1)
    if count > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {count} classifiers, whose logits it joins (a distilled network, for "
            "one). FixRes tunes networks of one: choose another."
        )
    if found := names or [name for name, layer in layers.items() if layer is given]:
        return str(found[0])
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
