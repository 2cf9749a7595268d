import copy
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from conftest import Network, lively, put_in_cache, save_for_hf, tuned_delta
from torch import nn

import fixefficientnet
from fixefficientnet import delta, manifest
from fixefficientnet._internal import checkpoint_file
from fixefficientnet.errors import CheckpointError, DeltaMismatchError, WeightsNotPublishedError


def assert_same(ours: nn.Module, reference: nn.Module, x: torch.Tensor) -> None:
    """Equal to the bit in all weights, and in logits but for the order of additions (memory alignment sets it)."""
    expected = reference.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-4, atol=1e-5)


def by_hand(cache: Path, key: str, delta_file: Path | None = None, **timm_kwargs: Any) -> Network:
    """The model as one would put it together with timm and safetensors alone."""
    backbone = fixefficientnet.info(key).backbone
    repository = cache / f"models--{backbone.repository.replace('/', '--')}"
    model = timm.create_model(
        backbone.name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(next(repository.glob("snapshots/*/model.safetensors")))},
        **timm_kwargs,
    )
    if delta_file:
        model.load_state_dict(safetensors.torch.load_file(delta_file), strict=False)
    return model.eval()


@pytest.mark.newest
@pytest.mark.parametrize("key", manifest.load())
def test_every_variant_has_its_backbones_keys_and_shapes(key: str):
    variant = fixefficientnet.info(key)
    ours = fixefficientnet.create(key, device="meta").state_dict()
    with torch.device("meta"):
        timms = timm.create_model(variant.backbone.name).state_dict()
    assert [(k, t.shape, t.dtype) for k, t in ours.items()] == [(k, t.shape, t.dtype) for k, t in timms.items()]


SLOW = {"b6", "b7", "b8", "l2"}
"""The largest, which take minutes together; those of Noisy Student are the same networks."""
LEFT_OUT = {"b5_ns", "b6_ns", "b7_ns"}


@pytest.mark.newest
@pytest.mark.parametrize(
    "key", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in manifest.load() if k not in LEFT_OUT]
)
def test_every_variant_runs_at_its_test_size(key: str):
    model: Network = fixefficientnet.create(key)
    x = torch.rand(1, 3, model.variant.test.size, model.variant.test.size)
    with torch.inference_mode():
        features = model.forward_features(x)
        logits = model.forward_head(features)
    assert logits.shape == (1, 1000)
    assert torch.isfinite(logits).all()
    assert features.shape[-2:] == model.pretrained_cfg["pool_size"]


def test_random_model_has_its_preprocessing_and_is_in_eval_mode():
    model = fixefficientnet.create("b2_ns")
    assert not model.training
    assert model.variant is fixefficientnet.info("b2_ns")
    assert model.preprocess == fixefficientnet.preprocess("b2_ns")
    assert model.pretrained_cfg["input_size"] == (3, 420, 420)
    assert model.pretrained_cfg["architecture"] == "fixefficientnet_b2"
    assert type(model) is timm.models.EfficientNet  # type: ignore[comparison-overlap]


def test_random_weights_are_timms(images: torch.Tensor):
    torch.manual_seed(3)
    ours = fixefficientnet.create("b0")
    torch.manual_seed(3)
    timms = timm.create_model("tf_efficientnet_b0").eval()
    assert_same(ours, timms, images)


@pytest.mark.parametrize("key", ["b0", "b0_ns"])
def test_backbone_weights_are_timms(hub_cache: Path, images: torch.Tensor, key: str):
    ours = fixefficientnet.create(key, "backbone", cache_dir=hub_cache)
    assert_same(ours, by_hand(hub_cache, key), images)
    assert not any(tensor.is_meta for tensor in ours.state_dict().values())
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_delta_from_a_path(hub_cache: Path, b0_delta: Path, images: torch.Tensor):
    ours = fixefficientnet.create("b0", b0_delta, cache_dir=hub_cache)
    reference = by_hand(hub_cache, "b0", b0_delta)
    assert_same(ours, reference, images)
    assert_same(fixefficientnet.create("b0", str(b0_delta), cache_dir=hub_cache), reference, images)
    untuned = fixefficientnet.create("b0", "backbone", cache_dir=hub_cache)
    assert (untuned(images) - reference(images)).abs().max() > 1e-2


def test_pretrained_true_takes_the_overlays_weights(
    hub_cache: Path, b0_delta: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    weights = {"path": b0_delta.name, "sha256": hashlib.sha256(b0_delta.read_bytes()).hexdigest()}
    mine = b0_delta.parent / "mine.json"
    mine.write_text(json.dumps({"schema_version": 1, "variants": {"b0": {"weights": weights}}}))
    monkeypatch.setenv("FIXEFFICIENTNET_MANIFEST", str(mine))
    ours = fixefficientnet.create("b0", pretrained=True, cache_dir=hub_cache)
    assert_same(ours, by_hand(hub_cache, "b0", b0_delta), images)


@pytest.mark.parametrize("key", manifest.load())
def test_not_published_says_what_works(key: str):
    with pytest.raises(WeightsNotPublishedError) as caught:
        fixefficientnet.create(key, pretrained=True)
    said = str(caught.value)
    for part in (f"({key})", "'backbone'", "'PATH'", f"fixefficientnet.reproduce {key}"):
        assert part in said


def test_delta_of_another_variant(hub_cache: Path, b0_delta: Path):
    with pytest.raises(DeltaMismatchError, match="is the delta for b0, not for b0_ns"):
        fixefficientnet.create("b0_ns", b0_delta, cache_dir=hub_cache)


def test_backbone_other_than_the_deltas(b0_delta: Path, tmp_path: Path):
    backbone = fixefficientnet.info("b0").backbone
    torch.manual_seed(99)
    put_in_cache(tmp_path, backbone.repository, backbone.filename, timm.create_model("tf_efficientnet_b0").state_dict())
    with pytest.raises(DeltaMismatchError, match="another backbone"):
        fixefficientnet.create("b0", b0_delta, cache_dir=tmp_path)


def test_missing_delta_file_says_what_pretrained_takes():
    with pytest.raises(FileNotFoundError, match=r"no such file.*hf://"):
        fixefficientnet.create("b0", "nowhere/delta.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("blocks.0.0.conv_dw.weight"), "lack blocks.0.0.conv_dw.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "have extra too many"),
        (lambda t: t.update({"classifier.bias": torch.zeros(5)}), r"classifier.bias in the shape \[5\]"),
        (lambda t: t.pop("classifier.weight"), "lack classifier.weight"),
        (lambda t: t.update({"bn1.bias": torch.zeros(5)}), r"bn1.bias in the shape \[5\]"),
    ],
)
def test_backbone_file_of_another_network(tmp_path: Path, change, said: str):
    backbone = fixefficientnet.info("b0").backbone
    tensors = timm.create_model("tf_efficientnet_b0").state_dict()
    change(tensors)
    put_in_cache(tmp_path, backbone.repository, backbone.filename, tensors)
    with pytest.raises(CheckpointError, match=said):
        fixefficientnet.create("b0", "backbone", cache_dir=tmp_path)


def test_truncated_backbone_file_is_named(tmp_path: Path):
    backbone = fixefficientnet.info("b0").backbone
    path = put_in_cache(tmp_path, backbone.repository, backbone.filename, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=str(path)):
        fixefficientnet.create("b0", "backbone", cache_dir=tmp_path)


def test_backbone_file_without_batch_counts_loads_as_in_timm(tmp_path: Path, images: torch.Tensor):
    backbone = fixefficientnet.info("b0").backbone
    torch.manual_seed(0)
    model = lively(timm.create_model("tf_efficientnet_b0"))
    tensors = {k: t for k, t in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    put_in_cache(tmp_path, backbone.repository, backbone.filename, tensors)
    ours: Network = fixefficientnet.create("b0", "backbone", cache_dir=tmp_path)
    assert_same(ours, model, images)
    ours.train()(images)  # the counts are there, and count
    assert ours.bn2.num_batches_tracked == 1


@pytest.mark.parametrize("weights", ["backbone", "delta"])
def test_other_number_of_classes_keeps_the_norm_and_resets_the_classifier(
    hub_cache: Path, b0_delta: Path, images: torch.Tensor, weights: str
):
    path = b0_delta if weights == "delta" else None
    ours: Network = fixefficientnet.create("b0", path or "backbone", num_classes=10, cache_dir=hub_cache)
    reference = by_hand(hub_cache, "b0", path)
    assert ours(images).shape == (2, 10)
    assert ours.num_classes == 10
    torch.testing.assert_close(ours.forward_features(images), reference.forward_features(images))
    assert not ours(images).any()  # training begins with equal probabilities
    assert all(parameter.requires_grad for parameter in ours.classifier.parameters())


def test_without_classifier(hub_cache: Path, b0_delta: Path, images: torch.Tensor):
    ours = fixefficientnet.create("b0", b0_delta, num_classes=0, cache_dir=hub_cache)
    reference = by_hand(hub_cache, "b0", b0_delta)
    reference.reset_classifier(0)
    assert_same(ours, reference, images)
    unpooled = fixefficientnet.create("b0", b0_delta, num_classes=0, global_pool="", cache_dir=hub_cache)
    torch.testing.assert_close(unpooled(images), reference.forward_features(images))


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels_as_in_timm(hub_cache: Path, in_chans: int):
    x = torch.rand(1, in_chans, 64, 64)
    ours = fixefficientnet.create("b0", "backbone", in_chans=in_chans, cache_dir=hub_cache)
    assert_same(ours, by_hand(hub_cache, "b0", in_chans=in_chans), x)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"out_indices": (1, 3)},
        {"output_stride": 16},
        {"feature_cls": "hook"},
        {"feature_cls": "getter"},
        {"feature_cls": "fx"},
    ],
    ids=str,
)
def test_features_only_as_in_timm(hub_cache: Path, b0_delta: Path, images: torch.Tensor, extra: dict[str, Any]):
    ours: Network = fixefficientnet.create("b0", b0_delta, features_only=True, cache_dir=hub_cache, **extra)
    reference = by_hand(hub_cache, "b0", features_only=True, **extra)
    assert ours.feature_info.channels() == reference.feature_info.channels()
    for found, expected in zip(ours(images), reference(images), strict=True):
        torch.testing.assert_close(found, expected)


def test_timm_options_reach_timm(hub_cache: Path):
    model = fixefficientnet.create("b0", "backbone", drop_rate=0.4, drop_path_rate=0.2, cache_dir=hub_cache)
    assert model.drop_rate == 0.4
    with pytest.raises(TypeError, match="no_such_option"):
        fixefficientnet.create("b0", no_such_option=1)


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cfg"])
def test_options_that_name_other_weights_are_refused(option: str):
    other: dict[str, Any] = {option: "x"}
    with pytest.raises(TypeError, match=option):
        fixefficientnet.create("b0", **other)


def test_pooling_that_the_classifier_does_not_fit_is_refused_as_in_timm(hub_cache: Path, b0_delta: Path):
    with pytest.raises(CheckpointError, match=r"classifier.weight in the shape \[1000, 1280\]"):
        fixefficientnet.create("b0", b0_delta, global_pool="catavgmax", cache_dir=hub_cache)


def test_dtype_and_device(hub_cache: Path):
    model = fixefficientnet.create("b0", "backbone", dtype=torch.bfloat16, device="cpu", cache_dir=hub_cache)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    largest: Network = fixefficientnet.create("l2", device="meta")
    assert largest.conv_stem.weight.is_meta


def test_writing_to_the_weights_never_reaches_the_file(hub_cache: Path, b0_delta: Path):
    files = [*hub_cache.rglob("*.safetensors"), b0_delta]
    before = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    model: Network = fixefficientnet.create("b0", b0_delta, cache_dir=hub_cache)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    assert [hashlib.sha256(file.read_bytes()).digest() for file in files] == before
    again: Network = fixefficientnet.create("b0", b0_delta, cache_dir=hub_cache)
    assert not torch.equal(again.conv_stem.weight, model.conv_stem.weight)


def test_loading_leaves_the_random_state_alone(hub_cache: Path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fixefficientnet.create("b0", "backbone", cache_dir=hub_cache)
    assert torch.equal(torch.get_rng_state(), before)
    assert nn.Linear(3, 3).weight.std() > 0  # initialisation works again


@pytest.fixture
def loaded(hub_cache: Path, b0_delta: Path) -> nn.Module:
    return fixefficientnet.create("b0", b0_delta, cache_dir=hub_cache)


def test_deepcopy_state_dict_and_whole_model_round_trip(loaded: nn.Module, images: torch.Tensor, tmp_path: Path):
    expected = loaded(images)
    copied = copy.deepcopy(loaded)
    torch.testing.assert_close(copied(images), expected)
    assert copied.variant == loaded.variant
    torch.save(loaded.state_dict(), tmp_path / "state.pth")
    fresh = timm.create_model("tf_efficientnet_b0").eval()
    fresh.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    torch.testing.assert_close(fresh(images), expected)
    torch.save(loaded, tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(whole(images), expected)
    assert whole.preprocess == loaded.preprocess


def test_to_and_back(loaded: nn.Module, images: torch.Tensor):
    expected = loaded(images)
    torch.testing.assert_close(loaded.to(torch.float64).to(torch.float32)(images), expected)
    loaded.to(memory_format=torch.channels_last)
    torch.testing.assert_close(loaded(images), expected, rtol=1e-3, atol=1e-4)


def test_trace_and_script(loaded: nn.Module, images: torch.Tensor):
    expected = loaded(images)
    torch.testing.assert_close(torch.jit.trace(loaded, images)(images), expected)
    torch.testing.assert_close(torch.jit.script(loaded)(images), expected)


def test_export(loaded: nn.Module, images: torch.Tensor):
    exported = torch.export.export(loaded, (images,))
    torch.testing.assert_close(exported.module()(images), loaded(images))


def test_compile(loaded: nn.Module, images: torch.Tensor):
    compiled = torch.compile(loaded, backend="aot_eager")
    torch.testing.assert_close(compiled(images), loaded(images))


def test_gradients_flow_through_mapped_weights(loaded: Network, images: torch.Tensor):
    loaded.train()
    optimiser = torch.optim.SGD(loaded.parameters(), 0.1)
    before = loaded.conv_stem.weight.detach().clone()
    loaded(images).square().mean().backward()
    optimiser.step()
    assert not torch.equal(loaded.conv_stem.weight, before)


@pytest.mark.parametrize("key", ["lite0", "lite1", "lite2"])
def test_bundled_lite_equals_an_independent_construction(key: str):
    """Against the EfficientNet-Lite code of the weights' own authors."""
    from efficientnet_lite_pytorch import EfficientNet

    variant = fixefficientnet.info(key)
    package = variant.backbone.package
    assert package is not None
    path = importlib.metadata.distribution(package.name).locate_file(package.filename)
    reference = EfficientNet.from_pretrained(f"efficientnet-{key}", weights_path=str(path)).eval()
    x = torch.rand(2, 3, variant.train_size, variant.train_size) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(fixefficientnet.create(key, "backbone")(x), reference(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extra", [{"num_classes": 0}, {"num_classes": 5}, {"features_only": True}, {"in_chans": 1}])
def test_bundled_lite_in_other_shapes(extra: dict[str, Any]):
    model = fixefficientnet.create("lite0", "backbone", **extra)
    reference: Network = fixefficientnet.create("lite0", "backbone")
    assert torch.equal(model.state_dict()["bn1.running_var"], reference.bn1.running_var)


def test_bundled_lite_takes_a_delta(tmp_path: Path, images: torch.Tensor):
    model = fixefficientnet.create("lite0", "backbone")
    found = tuned_delta(model, "lite0")
    delta.save(found, tmp_path / "d.safetensors")
    delta.apply(model, found)
    assert_same(fixefficientnet.create("lite0", tmp_path / "d.safetensors"), model, images)


def test_lite_from_the_hub_without_its_package(hub_cache: Path, monkeypatch: pytest.MonkeyPatch, images: torch.Tensor):
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    ours = fixefficientnet.create("lite1", "backbone", cache_dir=hub_cache)
    assert_same(ours, by_hand(hub_cache, "lite1"), images)


def test_pickle_that_is_no_state_dict_is_refused_and_not_run(tmp_path: Path):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"conv_stem.weight": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"bad.pth"):
        checkpoint_file.read(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "nested.pth")
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        checkpoint_file.read(tmp_path / "nested.pth")


def test_rename_refuses_another_network():
    with pytest.raises(CheckpointError, match="2 tensors, the model has 1"):
        checkpoint_file.rename(
            {"a.weight": torch.zeros(1), "a.bias": torch.zeros(1)}, {"b.weight": torch.zeros(1)}, "f"
        )
    with pytest.raises(CheckpointError, match=r"a.weight \[2\] stands where the model has b.weight \[1\]"):
        checkpoint_file.rename({"a.weight": torch.zeros(2)}, {"b.weight": torch.zeros(1)}, "f")


def test_large_backbone_loads_in_megabytes(tmp_path: Path):
    """A large backbone is mapped, not read: in a process of its own, peak memory hardly grows."""
    variant = fixefficientnet.info("b7")
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_b7")
    tensors = {k: torch.zeros(t.shape, dtype=t.dtype) for k, t in model.state_dict().items()}
    put_in_cache(tmp_path, variant.backbone.repository, variant.backbone.filename, tensors)
    code = f"""
import resource, fixefficientnet, fixefficientnet.zoo
fixefficientnet.create("b0", device="meta")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = fixefficientnet.create("b7", "backbone", cache_dir={str(tmp_path)!r})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 120  # the file has 266 MB


@pytest.mark.parametrize("key", ["lite0", "b0"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_classes": 7}, {"num_classes": 0}, {"in_chans": 1}, {"features_only": True}, {"dtype": torch.half}],
)
def test_whatever_is_created_can_be_saved(hub_cache: Path, tmp_path: Path, key: str, options: dict[str, Any]):
    """The tensors of a file from TensorFlow lie in its order."""
    model = fixefficientnet.create(key, "backbone", cache_dir=hub_cache, **options)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    safetensors.torch.save_model(model, str(tmp_path / "whole.safetensors"))
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    if "features_only" not in options:
        save_for_hf(model, str(tmp_path / "folder"), safe_serialization=True)
        assert (tmp_path / "folder" / "model.safetensors").stat().st_size > 10_000


def test_torchs_default_device_is_the_models(hub_cache: Path):
    with torch.device("meta"):
        models = [fixefficientnet.create("b0", pretrained, cache_dir=hub_cache) for pretrained in (False, "backbone")]
    assert all(tensor.is_meta for model in models for tensor in model.state_dict().values())
