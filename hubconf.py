"""torch.hub's door: one entrypoint per variant, made from the manifest's rows.

torch.hub.list(REPO), torch.hub.help(REPO, "fixefficientnet_b4_ns"), torch.hub.load(REPO, "fixefficientnet_b4_ns")
"""

from typing import Any as _Any

from fixefficientnet.manifest import Variant as _Variant
from fixefficientnet.manifest import load as _load

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors"]


def _entrypoint(variant: _Variant) -> _Any:
    def build(pretrained: bool | str = True, **kwargs: _Any) -> _Any:
        from fixefficientnet import create

        return create(variant.key, pretrained, **kwargs)

    test, paper = variant.test, variant.paper
    if paper:
        published = "published" if variant.weights else "not published yet"
        result = (
            f"Paper (Table {paper.table}): top-1 {paper.fix.top1} at {paper.fix.test_size} pixels with FixRes, "
            f"{paper.base.top1} at {paper.base.test_size} without. FixRes weights: {published}."
        )
    else:
        result = str(variant.note)
    build.__name__ = build.__qualname__ = variant.hub_name
    build.__doc__ = f"""{variant.title}: {variant.parameters / 1e6:.1f}M parameters, test size {test.size}.

    {result}

    Args:
        pretrained: True (FixRes weights), "backbone" (the original {variant.backbone.name}
            weights), a delta's path, hf://org/repo/file.safetensors@revision, or False (random).
        **kwargs: num_classes, in_chans, features_only, device, dtype, cache_dir, and timm's own.

    Returns:
        timm's model in eval mode, with `preprocess` (picture -> float32 [3, {test.size}, {test.size}]),
        `variant` and `pretrained_cfg`.
    """
    return build


globals().update({_variant.hub_name: _entrypoint(_variant) for _variant in _load().values()})
