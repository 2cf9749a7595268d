"""A whole checkpoint to a delta, and a delta back to a whole checkpoint that plain timm loads."""

import io
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from timm.models import filter_pretrained_cfg
from torch import Tensor

from fixefficientnet import delta, zoo
from fixefficientnet._internal import checkpoint_file, compat
from fixefficientnet._internal.checkpoint_file import listed
from fixefficientnet._internal.files import beside, replacing
from fixefficientnet.delta import Delta
from fixefficientnet.errors import CheckpointError
from fixefficientnet.manifest import TestTime, Variant

TOLERANCE = 1e-6
"""Largest difference of any value outside the head at which a tensor still counts as the backbone's."""
_IGNORED = ".num_batches_tracked"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint of a variant.

    Attributes:
        tensors: By timm's state-dict names; float32.
        backbone: The backbone's own tensors.
        differing: Tensors outside classifier and last norm that are not the backbone's: name, largest difference.
    """

    tensors: dict[str, Tensor]
    backbone: dict[str, Tensor]
    differing: dict[str, float]

    @property
    def tuned(self) -> bool:
        """Whether the head is another than the backbone's."""
        return any(not torch.equal(tensor, self.backbone[name]) for name, tensor in self._head.items())

    @property
    def _head(self) -> dict[str, Tensor]:
        return zoo.HEAD.select(self.tensors)

    @property
    def outside(self) -> int:
        """How many tensors there are outside the head."""
        return len(self.tensors) - len(self._head)


def read(path: Path, variant: Variant, *, cache_dir: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Reads a whole checkpoint and holds it against the variant's backbone.

    Args:
        path: safetensors, or a `.pth` of tensors alone; timm's names, also under "model" or "state_dict" and with
            the prefix "module.".
        variant: Which it is of.
        cache_dir: Hub cache to use instead of the user's.

    Raises:
        MissingFileError: There is no such file.
        CheckpointError: It cannot be read, or is of another network.
    """
    if delta.is_delta(path):
        raise CheckpointError(f"{path} is a delta already; `convert` takes a whole checkpoint.")
    found = checkpoint_file.read_wrapped(path)
    backbone = zoo.backbone_tensors(variant, cache_dir)
    names = {name for name in backbone if not name.endswith(_IGNORED)}
    wrong = [name for name in sorted(names) if name not in found or found[name].shape != backbone[name].shape]
    wrong += sorted(name for name in set(found) - set(backbone) if not name.endswith(_IGNORED))
    weight = found.get(f"{zoo.HEAD.classifier}.weight")
    if weight is not None and weight.ndim and set(wrong) == {f"{zoo.HEAD.classifier}.{x}" for x in ("weight", "bias")}:
        raise CheckpointError(
            f"{path} has {len(weight)} classes, {variant.key} has {len(backbone[f'{zoo.HEAD.classifier}.weight'])}: a "
            "delta is of a network with the backbone's own classes."
        )
    if wrong:
        raise CheckpointError(
            f"{path} is no checkpoint of {variant.backbone.architecture}: {listed(wrong)} missing, too many, or of "
            f"another shape. Is it {variant.key}?"
        )
    if broken := [name for name in sorted(names) if not found[name].isfinite().all()]:
        raise CheckpointError(f"{path} has NaN or Inf in {listed(broken)}.")
    differing = {}
    for name in sorted(names - zoo.HEAD.select(found).keys()):
        # a checkpoint in half precision has the backbone's values as far as that holds them
        original = backbone[name].to(found[name].dtype).to(torch.float32)
        difference = float((found[name].to(torch.float32) - original).abs().max())
        if difference > TOLERANCE:
            differing[name] = difference
    if len(differing) > len(names) / 2:
        raise CheckpointError(
            f"{path} has the shapes of {variant.key} but other weights: {len(differing)} of {len(names)} tensors "
            f"differ from {variant.backbone.name}. Is it another variant's, or trained as a whole?"
        )
    tensors = {name: found[name].detach().to(torch.float32) for name in sorted(names)}
    return Checkpoint(tensors, backbone, differing)


def to_delta(found: Checkpoint, variant: Variant, *, license: str, source: str, test: TestTime | None = None) -> Delta:
    """The delta that makes a checkpoint of its backbone.

    Args:
        found: What `read` gave.
        variant: Which it is of.
        license: Of the weights; SPDX, lower case.
        source: Where they come from, for the delta's metadata.
        test: The preprocessing that it was tuned for; None: the variant's.

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
    return delta.of_tensors(
        zoo.HEAD.select(found.tensors),
        replaced=zoo.HEAD.select(found.backbone),
        variant=variant.key,
        backbone=variant.backbone.name,
        license=license,
        recipe={"converted_from": source, "test_size": (test or variant.test).size, **asdict(test or variant.test)},
    )


def save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a whole state dict: `.safetensors`, or `.pth` for `torch.load`."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    written = io.BytesIO()  # both raise what they like where their own writing meets a full disk
    if path.suffix == ".safetensors":
        written.write(safetensors.torch.save(contiguous, metadata={"format": "pt"}))
    else:
        torch.save(contiguous, written)
    with replacing(path) as temporary:
        temporary.write_bytes(written.getbuffer())


def merge(model: "zoo.ZooModel", path: Path) -> None:
    """Writes a variant as plain timm loads it, with no trace of this package.

    Args:
        model: As `create` gives it.
        path: `.safetensors` or `.pth` for `timm.create_model(NAME, checkpoint_path=…)`; anything else is a folder for
            `timm.create_model("local-dir:…")` and for upload to the Hub, with the test-time preprocessing in its
            config.json. A folder that is there keeps its other files.

    Raises:
        OSError, CheckpointError: It cannot be written.
    """
    if path.suffix in (".safetensors", ".pth"):
        save_whole(dict(model.state_dict()), path)
        return
    with beside(path) as temporary:
        backbone = model.variant.backbone
        # all of it: some releases of timm complete what they are given, others take it as it is
        described = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True, remove_null=True)  # type: ignore[no-untyped-call]
        described |= {"architecture": backbone.architecture, "tag": backbone.tag}
        config = {"architecture": backbone.architecture, "pretrained_cfg": described}
        try:
            compat.save_for_hf(model, str(temporary), model_config=config, safe_serialization=True)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} cannot be written: {error}.") from error
        path.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir(), reverse=True):  # config.json last
            file.chmod(0o644)
            file.replace(path / file.name)
