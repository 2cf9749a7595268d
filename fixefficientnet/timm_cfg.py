"""What timm calls a pretrained_cfg: a manifest row in timm's words. Imports timm only when asked."""

from dataclasses import replace
from typing import TYPE_CHECKING

from fixefficientnet.manifest import TestTime, Variant

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

STEM = "conv_stem"
CLASSIFIER = "classifier"


def pretrained_cfg(variant: Variant) -> "PretrainedCfg":
    """timm's description of a variant; its data config gives the same pixels as `model.preprocess`."""
    from timm.models import PretrainedCfg

    weights = variant.weights
    cfg = PretrainedCfg(
        hf_hub_id=weights.repository if weights else None,
        hf_hub_filename=weights.filename if weights else None,
        architecture=variant.architecture,
        tag=variant.backbone.tag,
        first_conv=STEM,
        classifier=CLASSIFIER,
        license=weights.license if weights else variant.backbone.license,
        paper_ids="arXiv:2003.08237",
        paper_name="Fixing the train-test resolution discrepancy: FixEfficientNet",
        origin_url="https://github.com/facebookresearch/FixRes",
    )
    return with_test_time(cfg, variant.test)


def with_test_time(cfg: "PretrainedCfg", test: TestTime) -> "PretrainedCfg":
    """The same, with other test-time preprocessing."""
    return replace(
        cfg,
        input_size=(3, test.size, test.size),
        pool_size=(-(-test.size // 32),) * 2,
        crop_pct=test.crop_pct,
        interpolation=test.interpolation,
        mean=test.mean,
        std=test.std,
    )
