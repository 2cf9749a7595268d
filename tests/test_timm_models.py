import json

import fresh
import pytest
import timm
import torch
from conftest import TIMM_HAS_LOCAL_DIR, Network, save_for_hf

import fixefficientnet
from fixefficientnet import manifest
from fixefficientnet.errors import WeightsNotPublishedError


def run(code: str) -> str:
    return fresh.python(code).stdout


@pytest.mark.parametrize("order", ["import timm, fixefficientnet", "import fixefficientnet, timm"])
def test_importing_registers_in_either_order(order: str):
    names = run(f"{order}; print(*timm.list_models('fixefficientnet*', include_tags=True))").split()
    assert sorted(names) == sorted(v.timm_name for v in manifest.load().values())


def test_a_look_for_timm_does_not_lose_the_registration():
    code = """
import importlib.util, sys
import fixefficientnet
importlib.util.find_spec("timm")
import timm.models
assert timm.is_model("fixefficientnet_b0"), "not registered"
import importlib
assert not any(type(finder).__name__ == "_AfterTimm" for finder in sys.meta_path)
"""
    run(code)


@pytest.mark.parametrize("key", manifest.load())
def test_cfg_is_the_manifests(key: str):
    variant = fixefficientnet.info(key)
    cfg = timm.get_pretrained_cfg(variant.timm_name)
    assert cfg is not None
    assert cfg.input_size == (3, variant.test.size, variant.test.size)
    assert (cfg.crop_pct, cfg.interpolation) == (variant.test.crop_pct, variant.test.interpolation)
    assert (cfg.mean, cfg.std) == (variant.test.mean, variant.test.std)
    assert (cfg.architecture, cfg.tag) == (variant.architecture, variant.backbone.tag)
    assert cfg.license == "apache-2.0"
    assert not timm.is_model_pretrained(variant.timm_name)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("fixefficientnet_b0", "b0"),
        ("fixefficientnet_b0.ap_in1k", "b0"),
        ("fixefficientnet_b0.ns_jft_in1k", "b0_ns"),
        ("fixefficientnet_l2", "l2"),
        ("fixefficientnet_l2.ns_jft_in1k_475", "l2"),
        ("fixefficientnet_lite2", "lite2"),
    ],
)
def test_create_model_takes_the_tag(name: str, key: str):
    model: Network = timm.create_model(name, device="meta")
    assert model.variant.key == key
    assert model.training
    assert model.pretrained_cfg["mean"] == fixefficientnet.info(key).test.mean


def test_pretrained_without_published_weights_is_an_error():
    with pytest.raises(WeightsNotPublishedError, match="b0_ns"):
        timm.create_model("fixefficientnet_b0.ns_jft_in1k", pretrained=True)


def test_unknown_tag_is_timms_error():
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("fixefficientnet_b0.no_such_tag")


@pytest.mark.parametrize("which", ["backbone", "delta"])
def test_pretrained_takes_what_create_takes(hub_cache, b0_delta, images: torch.Tensor, which: str):
    weights = "backbone" if which == "backbone" else str(b0_delta)
    name = "fixefficientnet_b0.ap_in1k"
    model = timm.create_model(name, pretrained=weights, cache_dir=hub_cache).eval()  # type: ignore[arg-type]
    reference = fixefficientnet.create("b0", weights, cache_dir=hub_cache)
    torch.testing.assert_close(model(images), reference(images))


def test_checkpoint_that_a_user_made_of_a_model_goes_through_timm(hub_cache, b0_delta, tmp_path, images):
    """Fine-tune, save as timm saves for the Hub, load again by timm's name: these weights, and no others."""
    model = fixefficientnet.create("b0", b0_delta, num_classes=7, cache_dir=hub_cache)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    for name in ([f"local-dir:{tmp_path}"] if TIMM_HAS_LOCAL_DIR else []) + ["fixefficientnet_b0"]:
        overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 7} if ":" not in name else None
        again: Network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
        torch.testing.assert_close(again(images), model(images))
        assert again.preprocess == model.preprocess
        assert again.variant.key == "b0"


def test_other_hub_repository_is_never_replaced_by_our_weights(hub_cache):
    with pytest.raises(Exception, match=r"nobody/nothing|find|locate"):
        timm.create_model("fixefficientnet_b0", pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "nobody/nothing"})


def test_number_of_classes_from_timms_cfg_overlay(hub_cache, b0_delta):
    model: Network = timm.create_model(
        "fixefficientnet_b0",
        pretrained=str(b0_delta),  # type: ignore[arg-type]
        pretrained_cfg_overlay={"num_classes": 6, "input_size": (3, 256, 256), "crop_pct": 0.9},
        cache_dir=hub_cache,
    )
    reference: Network = fixefficientnet.create("b0", b0_delta, cache_dir=hub_cache)
    assert model.classifier.out_features == 6
    assert torch.equal(model.bn2.running_mean, reference.bn2.running_mean)
    assert (model.preprocess.size, model.preprocess.crop_pct) == (256, 0.9)


def test_malformed_overlay_does_not_break_timm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FIXEFFICIENTNET_MANIFEST", "{oops")
    code = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import fixefficientnet, timm
assert any("not registered" in str(w.message) and "not JSON" in str(w.message) for w in seen), seen
try:
    fixefficientnet.create("b0")
except fixefficientnet.ManifestError:
    print("told")
"""
    assert run(code) == "told\n"


def test_overlaid_row_is_registered_as_pretrained(monkeypatch: pytest.MonkeyPatch):
    weights = {"repository": "me/mine", "filename": "b4.safetensors", "revision": "c" * 40, "sha256": "d" * 64}
    document = {"schema_version": 1, "variants": {"b4": {"weights": weights}}}
    monkeypatch.setenv("FIXEFFICIENTNET_MANIFEST", json.dumps(document))
    assert run("import fixefficientnet, timm; print(*timm.list_pretrained('fixefficientnet*'))").split() == [
        "fixefficientnet_b4.ap_in1k"
    ]


def test_features_only_and_other_options():
    model: Network = timm.create_model("fixefficientnet_b1.ns_jft_in1k", features_only=True, device="meta")
    assert model.feature_info.channels() == [16, 24, 40, 112, 320]
    model = timm.create_model("fixefficientnet_b0", num_classes=3, in_chans=1, drop_rate=0.3, scriptable=True)
    assert model.classifier.out_features == 3
    torch.jit.script(model.eval())(torch.rand(1, 1, 64, 64))
