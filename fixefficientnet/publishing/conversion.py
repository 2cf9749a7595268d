"""A whole checkpoint to a delta."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fixefficientnet import delta as deltas
from fixefficientnet import manifest, zoo
from fixefficientnet._internal import checkpoint_file, records
from fixefficientnet._internal.checkpoint_file import listed
from fixefficientnet._internal.files import check_output
from fixefficientnet.delta import Delta
from fixefficientnet.errors import CheckpointError, FixEfficientNetError
from fixefficientnet.hub import sha256_of
from fixefficientnet.manifest import TestTime, Variant
from fixefficientnet.publishing import whole

TOLERANCE = 1e-6
"""Largest difference of any value outside the head at which a tensor still counts as the backbone's."""
_IGNORED = ".num_batches_tracked"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint of a variant.

    Attributes:
        tensors: The checkpoint's tensors by timm's state-dict names; float32.
        backbone: The backbone's own tensors, by the same names.
        differing: Largest difference of each tensor outside the head (classifier and last norm) that is not the
            backbone's, by name.
    """

    tensors: dict[str, Tensor]
    backbone: dict[str, Tensor]
    differing: dict[str, float]

    @property
    def tuned(self) -> bool:
        """Whether the head differs from the backbone's."""
        return any(not torch.equal(tensor, self.backbone[name]) for name, tensor in self._head.items())

    @property
    def outside(self) -> int:
        """Number of tensors outside the head."""
        return len(self.tensors) - len(self._head)

    @property
    def _head(self) -> dict[str, Tensor]:
        return zoo.HEAD.select(self.tensors)


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion found and wrote.

    Attributes:
        variant: Row of the manifest that the checkpoint is of.
        checkpoint: The checkpoint, with both networks' tensors.
        written: Number of tensors in the file that was written.
        bytes: Size of the file, in bytes.
        sha256: sha256 of the file.
        test: Test-time preprocessing that the weights were tuned for.
    """

    variant: Variant
    checkpoint: Checkpoint
    written: int
    bytes: int
    sha256: str
    test: TestTime


def convert(
    checkpoint: Path,
    variant: str,
    output: Path,
    *,
    full: bool = False,
    size: int | None = None,
    crop_pct: float | None = None,
    license: str = "unknown",
    overwrite: bool = False,
) -> ConversionResult:
    """Makes a delta of a whole checkpoint, whose tensors outside the head must be the original backbone's.

    The output is `.safetensors`, or with `full` the whole network, also `.pth`. The weights' test size is in pixels,
    their crop_pct in (0, 1] (None: the variant's); the license is an SPDX identifier, lower case.

    Raises:
        UnknownVariantError: There is no such variant.
        MissingFileError: There is no such checkpoint.
        CheckpointError: It cannot be read, is of another network, or has other tensors than a delta can hold.
        FixEfficientNetError: The output has another ending, or is there; no image has such a size.
        OSError: The output cannot be written.
    """
    row = manifest.find(variant)
    whole.check_suffix(output, whole.SUFFIXES if full else (".safetensors",))
    check_output([output], overwrite)
    chosen: dict[str, Any] = {"size": size, "crop_pct": crop_pct}
    test = replace(row.test, **{name: value for name, value in chosen.items() if value is not None})
    records.check(test, FixEfficientNetError)
    found = read(checkpoint, row)
    if full:
        whole.save(found.tensors, output)
        written = len(found.tensors)
    else:
        made = to_delta(found, row, license=license, source=checkpoint.name, test=test)
        deltas.save(made, output)
        written = len(made.tensors)
    size_there = output.stat().st_size
    return ConversionResult(row, found, written=written, bytes=size_there, sha256=sha256_of(output), test=test)


def read(path: Path, variant: Variant) -> Checkpoint:
    """Reads a whole checkpoint, as a training script saved it, and compares it with the variant's backbone.

    Raises:
        MissingFileError: There is no such file.
        CheckpointError: It cannot be read, or is of another network.
    """
    if deltas.is_delta(path):
        raise CheckpointError(f"{path} is a delta already; `convert` takes a whole checkpoint.")
    checkpoint_file.check_there(path)
    backbone = zoo.backbone_tensors(variant)
    found = checkpoint_file.read_trained(path, backbone).tensors
    names = sorted(name for name in backbone if not name.endswith(_IGNORED))
    _check_tensors(path, variant, found, backbone)
    if broken := [name for name in names if not found[name].isfinite().all()]:
        raise CheckpointError(f"{path} has NaN or Inf in {listed(broken)}.")
    head = zoo.HEAD.select(found).keys()
    differing = _differing(found, backbone, [name for name in names if name not in head])
    if len(differing) > len(names) / 2:
        raise CheckpointError(
            f"{path} has the shapes of {variant.key} but other weights: {len(differing)} of {len(names)} tensors "
            f"differ from {variant.backbone.name}. Is it another variant's, or trained as a whole?"
        )
    return Checkpoint({name: found[name].detach().to(torch.float32) for name in names}, backbone, differing)


def _check_tensors(path: Path, variant: Variant, found: Mapping[str, Tensor], backbone: Mapping[str, Tensor]) -> None:
    """Refuses tensors of other names or shapes than the backbone's."""
    names = {name for name in found.keys() | backbone.keys() if not name.endswith(_IGNORED)}
    here, there = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (found, backbone))
    wrong = sorted(name for name in names if here.get(name) != there.get(name))
    weight, bias = (f"{zoo.HEAD.classifier}.{name}" for name in ("weight", "bias"))
    if {*wrong} == {weight, bias} and len(here.get(weight, ())) > 0:
        raise CheckpointError(
            f"{path} has {here[weight][0]} classes, {variant.key} has {there[weight][0]}: a delta is of a network with "
            "the backbone's own classes."
        )
    if wrong:
        raise CheckpointError(
            f"{path} is no checkpoint of {variant.backbone.architecture}: {listed(wrong)} missing, too many, or of "
            f"another shape. Is it {variant.key}?"
        )


def _differing(found: Mapping[str, Tensor], backbone: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, float]:
    """Largest difference of each tensor that is not the backbone's, by name."""
    differing = {}
    for name in names:
        # a checkpoint in half precision has the backbone's values as far as that holds them
        original = backbone[name].to(found[name].dtype).to(torch.float32)
        difference = float((found[name].to(torch.float32) - original).abs().max())
        if difference > TOLERANCE:
            differing[name] = difference
    return differing


def to_delta(found: Checkpoint, variant: Variant, *, license: str, source: str, test: TestTime) -> Delta:
    """The delta that makes a checkpoint of its backbone; its metadata name the source that the weights come from.

    Raises:
        CheckpointError: Other tensors than the head's were tuned too, which a delta cannot hold.
        DeltaFormatError: The head holds NaN or Inf.
    """
    if found.differing:
        several = sorted(found.differing.items(), key=lambda item: -item[1])
        shown = "\n".join(f"  {name}: by up to {difference:.3g}" for name, difference in several[:8])
        more = f"\n  and {len(several) - 8} more" if len(several) > 8 else ""
        raise CheckpointError(
            f"{len(several)} tensors outside {zoo.HEAD.norm} and {zoo.HEAD.classifier} are not those of "
            f"{variant.backbone.name} (tolerance {TOLERANCE:g}):\n{shown}{more}\n"
            "A delta cannot hold them; --full writes the whole network."
        )
    return deltas.of_tensors(
        zoo.HEAD.select(found.tensors),
        replaced=zoo.HEAD.select(found.backbone),
        variant=variant.key,
        backbone=variant.backbone.name,
        license=license,
        recipe={"converted_from": source, "test_size": test.size, **asdict(test)},
    )
