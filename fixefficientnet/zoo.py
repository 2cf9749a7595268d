"""create(): backbone, delta and preprocessing put together."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from fixefficientnet import delta, hub
from fixefficientnet._internal import checkpoint_file, meta_device
from fixefficientnet._internal.checkpoint_file import listed
from fixefficientnet.delta import Delta, Head
from fixefficientnet.errors import CheckpointError, MissingFileError, WeightsNotPublishedError
from fixefficientnet.manifest import CLASSIFIER, STEM, LocalWeights, Variant, find
from fixefficientnet.preprocessing import Preprocess

HEAD = Head(norm="bn2", classifier=CLASSIFIER)
"""Where every EfficientNet has the two modules that FixRes tunes: conv_head → bn2 → global_pool → classifier."""

NUM_CLASSES = 1000
Pretrained = bool | str | os.PathLike[str]

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

    class ZooModel(nn.Module):
        """What `create` returns, as a type checker sees it: timm's own model and two attributes more."""

        preprocess: Preprocess
        variant: Variant
        pretrained_cfg: dict[str, Any]
        num_classes: int


def create(
    name: str,
    pretrained: Pretrained = False,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    features_only: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **timm_kwargs: Any,
) -> "ZooModel":
    """Builds a variant of the zoo, in eval mode.

    Args:
        name: A variant's key ("b4_ns") or any alias of it.
        pretrained: False: random weights. True: the backbone with this variant's published FixRes
            weights. "backbone": the original timm weights with this variant's preprocessing, the
            "just test larger" baseline. A path, or "hf://org/repo/file.safetensors@revision": the
            backbone with that delta, and the preprocessing that it was tuned for.
        num_classes: The number of classes, as in timm: 0 removes the classifier, another number than
            1000 resets it to zero, from where training begins with equal probabilities; the tuned norm stays.
        in_chans: The number of input channels, as in timm: the stem of pretrained weights is adapted.
        features_only: Whether to build a feature extractor, as in timm (without the head that FixRes tunes).
        device: The model's device; torch's default device if not given.
        dtype: The dtype of its parameters and floating buffers.
        cache_dir: The Hub cache to use instead of the user's.
        **timm_kwargs: Further options of timm (drop_rate, drop_path_rate, out_indices, …).

    Returns:
        timm's EfficientNet, float32 [N, in_chans, H, W] → [N, num_classes], with three attributes:
        `preprocess` (image → float32 [3, S, S]), `variant` (the manifest's row) and `pretrained_cfg`
        (from which `timm.data.resolve_model_data_config` gives the same preprocessing).

    Raises:
        UnknownVariantError: No variant has this name.
        MissingFileError: `pretrained` names a file that is not there.
        WeightsNotPublishedError: `pretrained=True`, but nothing is published for this variant.
        DownloadError: A file can be had neither from the cache nor from the Hub.
        ChecksumError: A file is not the pinned one.
        CheckpointError: The backbone's file does not hold this network.
        DeltaFormatError: The delta is damaged or unusable.
        DeltaMismatchError: The delta is another variant's, or of another backbone.
    """
    if refused := {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cfg"} & timm_kwargs.keys():
        raise TypeError(f"create() takes no {', '.join(sorted(refused))}; timm.create_model does.")
    timm_kwargs |= {"num_classes": num_classes, "in_chans": in_chans, "features_only": features_only}
    model = build(find(name), pretrained, cache_dir=cache_dir, device=device, dtype=dtype, **timm_kwargs)
    return cast("ZooModel", model.eval())


def build(
    variant: Variant,
    pretrained: Pretrained,
    *,
    cfg: "PretrainedCfg | None" = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    """Builds a variant in train mode, as timm does; see `create` for the arguments."""
    timm_kwargs = {key: value for key, value in timm_kwargs.items() if value is not None}
    timm_kwargs["pretrained_cfg"] = cfg or variant.pretrained_cfg()
    if device is None:
        device = torch.empty(0).device  # get_default_device sees no `with torch.device(…)` in older releases
    if pretrained in (False, None):
        with torch.device(device):
            model = timm.create_model(variant.backbone.architecture, pretrained=False, **timm_kwargs)
    else:
        tuned = None if pretrained == "backbone" else _load_delta(variant, pretrained, cache_dir)
        if tuned and (test := delta.test_time(tuned, variant.test)) != variant.test:
            timm_kwargs["pretrained_cfg"] = replace(timm_kwargs["pretrained_cfg"], **test.timm_fields())
        model = meta_device.without_weights(variant.backbone.architecture, **timm_kwargs)
        with torch.device("cpu"):  # whatever the caller's default
            tensors = backbone_tensors(variant, cache_dir, model)
            if tuned is not None:
                tensors = delta.merge(tensors, tuned, HEAD)
            _assign(variant, tensors, model, features_only=bool(timm_kwargs.get("features_only")))
    return attach(model.to(device, dtype), variant)


def attach(model: nn.Module, variant: Variant) -> nn.Module:
    """Gives a timm model its `variant`, and the `preprocess` that its `pretrained_cfg` describes."""
    cfg = cast("dict[str, Any]", model.pretrained_cfg)
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    preprocess = Preprocess(cfg["input_size"][-1], cfg["crop_pct"], cfg["interpolation"], mean, std)
    model.preprocess = preprocess  # type: ignore[assignment]
    model.variant = variant  # type: ignore[assignment]
    return model


def zero_classifier(model: nn.Module) -> nn.Module:
    """Sets a new classifier to zero: training then begins with equal probabilities, whatever the scale of features."""
    for parameter in model.get_submodule(delta.find_classifier(model)).parameters():
        nn.init.zeros_(parameter)
    return model


def backbone_tensors(
    variant: Variant, cache_dir: str | os.PathLike[str] | None = None, built: nn.Module | None = None
) -> dict[str, Tensor]:
    """The backbone's whole state dict by timm's names, memory-mapped.

    A package's file has other names: `built`, where it is the whole network, knows timm's.
    """
    path = hub.backbone_file(variant.backbone, cache_dir)
    tensors = checkpoint_file.read(path)
    if path.suffix != ".safetensors":
        like = built.state_dict() if built else {}
        if [tensor.shape for tensor in like.values()] != [tensor.shape for tensor in tensors.values()]:
            like = meta_device.without_weights(variant.backbone.architecture).state_dict()
        tensors = checkpoint_file.rename(tensors, like, path)
    return tensors


def _load_delta(variant: Variant, pretrained: Pretrained, cache_dir: str | os.PathLike[str] | None) -> Delta:
    """Loads the delta that `pretrained` names, and checks that it is this variant's."""
    source: Path | hub.HubFile
    sha256 = None
    if pretrained is True:
        weights = variant.weights
        if weights is None:
            raise WeightsNotPublishedError(_not_published(variant))
        sha256 = weights.sha256
        if isinstance(weights, LocalWeights):
            source = weights.path
        else:
            source = hub.HubFile(weights.repository, weights.filename, weights.revision, sha256)
    elif str(pretrained).startswith("hf://"):
        source = hub.parse_uri(str(pretrained))
    else:
        source = Path(str(pretrained)).expanduser()
        if not source.is_file():
            raise MissingFileError(
                f"pretrained={str(pretrained)!r}: there is no such file. It takes 'backbone', the path of a delta, or "
                "hf://organisation/repository/file.safetensors@revision; in Python also True and False."
            )
    if isinstance(source, Path):
        tuned = delta.load(source, sha256=sha256)
    else:
        tuned = delta.loads(hub.read(source, cache_dir), source=str(source))
    delta.check_variant(tuned, variant.key, source)
    return tuned


def _not_published(variant: Variant) -> str:
    key = variant.key
    if variant.backbone_only:
        first = f"{variant.title} ({key}) has no FixRes weights: it is not in the paper, and backbone only."
    else:
        first = f"{variant.title} ({key}) has no published FixRes weights yet."
    return (
        f"{first} What works:\n"
        f"  pretrained='backbone'   the original {variant.backbone.name} weights at {variant.test.size} pixels\n"
        f"  pretrained='PATH'       a delta of your own, such as runs/{key}/delta.safetensors\n"
        f"  python -m fixefficientnet.reproduce {key} --data IMAGENET   makes one"
    )


def _assign(variant: Variant, tensors: Mapping[str, Tensor], model: nn.Module, *, features_only: bool) -> None:
    """Gives a network built on the meta device its (memory-mapped) tensors."""
    weights = f"The weights of {variant.backbone.name}"
    wanted = {name: (_name_in_full_model(name), target) for name, target in model.state_dict().items()}
    reset = getattr(model, "num_classes", 0) not in (0, NUM_CLASSES)
    chosen = {}
    for name, (source, target) in wanted.items():
        if reset and source.startswith(f"{CLASSIFIER}."):
            continue
        tensor = tensors.get(source)
        if tensor is None and source.endswith(".num_batches_tracked"):
            tensor = torch.zeros((), dtype=target.dtype)  # older ports lack it; torch too takes 0 then
        if tensor is None:
            raise CheckpointError(f"{weights} lack {source}, which the model has.")
        if source == f"{STEM}.weight" and tensor.ndim == 4:
            tensor = adapt_input_conv(target.shape[1], tensor)
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"{weights} have {source} in the shape {list(tensor.shape)}, the model has {list(target.shape)}."
            )
        chosen[name] = _contiguous(tensor).to(target.dtype)
    extra = set(tensors) - {source for source, _ in wanted.values()}
    if not features_only:
        extra = {name for name in extra if not name.startswith(f"{CLASSIFIER}.")}
        if extra:
            raise CheckpointError(f"{weights} have {listed(sorted(extra))} too many.")
    model.load_state_dict(chosen, strict=False, assign=True)
    if reset:
        cast(Any, model).reset_classifier(model.num_classes)
        zero_classifier(model)


def _contiguous(tensor: Tensor) -> Tensor:
    """As safetensors wants it, and legacy files are not always.

    By NumPy: torch would copy with OpenMP's threads, and where these have begun, processes that are forked hang.
    """
    return tensor if tensor.is_contiguous() else torch.from_numpy(np.ascontiguousarray(tensor.numpy()))


def _name_in_full_model(name: str) -> str:
    """Undoes the prefix of timm's feature extractors, such as "body.blocks.0.0.bn1.bias"."""
    first, _, rest = name.partition(".")
    return rest if first in ("body", "model", "graph_module") else name
