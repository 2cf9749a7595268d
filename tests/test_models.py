"""Models by what the user calls them: which network that is, and how it is shown its images."""

import hashlib
import json
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import plain
import pytest
import timm
import tiny
import torch
from conftest import Network, lively, put_in_cache
from PIL import Image
from plain import TEST
from safetensors.torch import load_file, save_file
from torch import nn

import fixefficientnet
from fixefficientnet import delta
from fixefficientnet.errors import CheckpointError, EvaluationError, FixEfficientNetError, MissingFileError
from fixefficientnet.models import Description, LoadedModel, from_module, load

NETWORK = "test_efficientnet.r160_in1k"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else timm tries again for a minute


@pytest.fixture
def cache(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's Hub cache, with backbones in it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache))
    return hub_cache


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Weights of one's own, without a word on what they are."""
    torch.manual_seed(0)
    path = tmp_path / "mine.safetensors"
    save_file(lively(timm.create_model("test_efficientnet", num_classes=7)).state_dict(), path)
    return path


def same(one: nn.Module, other: nn.Module) -> bool:
    one_state, other_state = one.state_dict(), other.state_dict()
    assert list(one_state) == list(other_state)
    return all(torch.equal(tensor, other_state[name]) for name, tensor in one_state.items())


# --- the zoo's ----------------------------------------------------------------------------------------------------


def test_a_variant_with_its_backbones_weights(cache: Path):
    found = load("b0:backbone")
    expected = fixefficientnet.create("b0", "backbone", cache_dir=cache)
    assert same(found.network, expected)
    assert found.test == expected.preprocess
    assert (found.name, found.timm_name) == ("b0:backbone", "tf_efficientnet_b0.ap_in1k")
    assert (found.train_size, found.num_classes, found.tuned, found.untuned) == (224, 1000, False, None)
    assert found.parameters == fixefficientnet.info("b0").parameters
    assert same(load("FixEfficientNet-B0:backbone").network, expected)


def test_lite0_is_its_backbone():
    found = load("lite0")
    assert same(found.network, fixefficientnet.create("lite0", "backbone"))
    assert (found.test.size, found.tuned, found.timm_name) == (256, False, "tf_efficientnet_lite0.in1k")


def assert_tuned(found: LoadedModel, b0_delta: Path, cache: Path) -> None:
    expected = fixefficientnet.create("b0", b0_delta, cache_dir=cache)
    assert same(found.network, expected)
    assert found.test == expected.preprocess
    assert (found.tuned, found.untuned, found.timm_name) == (True, "b0:backbone", "fixefficientnet_b0.ap_in1k")


def test_a_variants_delta_is_opened_by_its_file_or_its_folder(cache: Path, b0_delta: Path):
    for name in (b0_delta, b0_delta.parent):
        found = load(str(name))
        assert_tuned(found, b0_delta, cache)
        assert found.name == str(name)
    assert found.untuned is not None
    assert same(load(found.untuned).network, fixefficientnet.create("b0", "backbone", cache_dir=cache))


def test_a_variant_with_a_delta_of_ones_own(cache: Path, b0_delta: Path, tmp_path: Path):
    for name in ("delta", "delta.safetensors"):
        (tmp_path / name).write_bytes(b0_delta.read_bytes())
        assert_tuned(load(f"b0:{tmp_path / name}"), b0_delta, cache)


def test_published_weights(cache: Path, b0_delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "delta.safetensors").write_bytes(b0_delta.read_bytes())
    weights = {"path": "delta.safetensors", "sha256": hashlib.sha256(b0_delta.read_bytes()).hexdigest()}
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"schema_version": 1, "variants": {"b0": {"weights": weights}}}))
    monkeypatch.setenv("FIXEFFICIENTNET_MANIFEST", str(manifest))
    assert_tuned(load("b0"), b0_delta, cache)


def test_a_variants_name_goes_before_a_folder_of_that_name(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = lively(timm.create_model("test_efficientnet", num_classes=3))
    for name in ("lite0", "mine"):
        plain.save_run(tmp_path / name, model, tiny.CLASSES)
    monkeypatch.chdir(tmp_path)
    assert load("lite0").num_classes == 1000
    assert load("./lite0").num_classes == load("mine").num_classes == 3


# --- what a run left ----------------------------------------------------------------------------------------------


def test_a_run_on_classes_of_ones_own(tmp_path: Path):
    model = lively(timm.create_model("test_efficientnet", num_classes=3))
    test = replace(TEST, interpolation="bilinear", mean=(0.5, 0.4, 0.3))
    folder = plain.save_run(tmp_path / "run", model, tiny.CLASSES, test)
    for name in (folder, folder / "model.safetensors"):
        found = load(str(name))
        assert same(found.network, model)
        assert not found.network.training
        assert (found.name, found.test, found.classes) == (str(name), test, tiny.CLASSES)
        assert (found.train_size, found.num_classes, found.tuned, found.timm_name) == (32, 3, True, NETWORK)
    plain.save_run(folder, model, tiny.CLASSES, test, stage="base")
    found = load(str(folder))
    assert (found.test, found.tuned) == (replace(test, size=32), False)  # at the size that it was trained at


def test_a_runs_figures_are_those_of_its_report(tmp_path: Path):
    images = tiny.make_data(tmp_path / "data", train=4, val=4)
    common = [*tiny.NETWORK, "--data", str(images), "--output", str(tmp_path), "--train-size", "32"]
    common += ["--epochs", "1", "--batch-size", "4", "-j", "0"]
    tiny.run([*common, "--stage", "base", "--no-pretrained", "--experiment", "base"], tmp_path / "said")
    checkpoint = ["--checkpoint", str(tmp_path / "base" / "model.safetensors")]
    tiny.run([*common, *checkpoint, "--test-size", "48", "--experiment", "fix"], tmp_path / "said")
    for run, name in (("base", "trained"), ("fix", "tuned")):
        found = asdict(fixefficientnet.evaluate(str(tmp_path / run), images, workers=0, device="cpu").summary())
        expected = json.loads((tmp_path / run / "report.json").read_text())["measured"][name]
        assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-4)
        assert found == expected


def test_a_delta_of_a_network_that_is_no_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = lively(timm.create_model("test_efficientnet"))
    put_in_cache(tmp_path / "hub", f"timm/{NETWORK}", "model.safetensors", base.state_dict())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    tuned: Network = lively(timm.create_model("test_efficientnet"))
    tuned.load_state_dict(base.state_dict())
    tuned.classifier.weight.data *= 1.5
    recipe = {"train_size": 64, "test_size": 96, "crop_pct": 1.0, "interpolation": "bilinear"}
    made = delta.extract(tuned, base=base.state_dict(), variant=NETWORK, backbone=NETWORK, recipe=recipe)
    delta.save(made, tmp_path / "run" / "delta.safetensors")
    found = load(str(tmp_path / "run"))
    assert same(found.network, tuned)
    assert (found.test.size, found.test.crop_pct, found.test.interpolation) == (96, 1.0, "bilinear")
    assert (found.train_size, found.tuned, found.timm_name) == (64, True, NETWORK)
    assert found.untuned == f"timm/{NETWORK}"
    before = load(found.untuned)
    assert same(before.network, base)
    assert (before.test.size, before.test.crop_pct, before.tuned, before.untuned) == (160, 0.95, False, None)


# --- timm's -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped", "data parallel"])
def test_a_timm_network_with_a_checkpoint_of_ones_own(checkpoint: Path, tmp_path: Path, kind: str):
    tensors = load_file(checkpoint)
    expected = timm.create_model("test_efficientnet", num_classes=7)
    expected.load_state_dict(tensors)
    path = checkpoint
    if kind != "safetensors":
        path = tmp_path / "mine.pth"
        if kind == "data parallel":
            tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
        torch.save(tensors if kind == "pth" else {"epoch": 3, "state_dict": tensors}, path)
    found = load(f"timm/{NETWORK}:{path}")
    assert same(found.network, expected)
    assert not found.network.training
    assert (found.num_classes, found.classes, found.timm_name, found.tuned) == (7, (), NETWORK, False)
    assert (found.test.size, found.test.crop_pct, found.test.interpolation, found.train_size) == (
        160,
        0.95,
        "bicubic",
        160,
    )


def test_a_checkpoint_of_a_network_that_fixres_cannot_tune(tmp_path: Path):
    model = timm.create_model("test_vit", num_classes=3).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    assert same(load(f"timm/test_vit:{tmp_path / 'vit.safetensors'}").network, model)


def test_a_modules_figures_are_those_of_the_same_model_by_name(tmp_path: Path):
    labels = [0, 1, 2] * 4
    paths = [tiny.mottle(tmp_path / "data" / tiny.CLASSES[label] / f"{i}.png", i) for i, label in enumerate(labels)]
    model = plain.network(3, paths, labels)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    same_way = {"size": 48, "workers": 0, "device": "cpu"}
    by_name = fixefficientnet.evaluate(
        f"timm/{NETWORK}:{tmp_path / 'model.safetensors'}", tmp_path / "data", **same_way
    )
    assert fixefficientnet.evaluate(model, tmp_path / "data", **same_way) == by_name
    assert by_name.crop_pct == 0.95
    logits = plain.logits(
        model, sorted(paths, key=lambda path: (path.parent.name, int(path.stem))), replace(TEST, crop_pct=0.95)
    )
    assert by_name.correct == plain.correct(logits, sorted(labels))


def test_a_variants_module(cache: Path):
    model = fixefficientnet.create("b0", "backbone", cache_dir=cache)
    found = from_module(model)
    assert found.network is model
    assert (found.name, found.test) == ("b0", model.preprocess)


@pytest.mark.parametrize("overlay", [{"crop_mode": "squash"}, {"crop_mode": "border"}, {"interpolation": "nearest"}])
def test_images_are_cut_as_timm_does_it_where_the_model_says_so(overlay: dict[str, str], tmp_path: Path):
    model = timm.create_model("test_efficientnet", pretrained_cfg_overlay={"crop_pct": 0.8, **overlay})
    found = from_module(model)
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, 96, 96)}
    expected = timm.data.create_transform(**config, is_training=False)
    image = Image.open(tiny.mottle(tmp_path / "x.png", 1))
    torch.testing.assert_close(found.transform(found.at(96))(image), expected(image))


def test_a_models_own_test_size_is_taken():
    model = timm.create_model("test_efficientnet", pretrained_cfg_overlay={"test_input_size": (3, 224, 224)})
    found = from_module(model)
    assert (found.test.size, found.train_size) == (224, 160)
    assert (found.at(96).size, found.at(None, 0.5).size, found.at(None, 0.5).crop_pct) == (96, 224, 0.5)


# --- what cannot be opened ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("b44", r"No variant is named 'b44'\. Did you mean .*timm/NAME"),
        ("resnet50.a1_in1k", r"No variant is named .*timm/resnet50"),
        ("b4_ns", r"no published FixRes weights yet(.|\n)*b4_ns:backbone"),
        ("b4_ns:nowhere", r"nowhere.*: there is no such file"),
        ("b4_ns:hf://a/b", r"is not of the form hf://"),
        ("b0:backbone", r"tf_efficientnet_b0\.ap_in1k"),
        ("nowhere.safetensors", r"nowhere\.safetensors: there is no such file"),
        ("runs/nowhere.pth", r"nowhere\.pth: there is no such file"),
        ("timm/resnet51", r"timm [\d.]+ has no model 'resnet51'"),
        ("timm/", r"has no model ''"),
        ("timm/test_efficientnet:nowhere.pth", r"nowhere\.pth: there is no such file"),
        ("timm/test_efficientnet", r"timm's weights of test_efficientnet could not be had"),
        ("timm/test_efficientnet.no_such_tag", r"timm's weights of test_efficientnet.no_such_tag could not be had"),
    ],
)
def test_what_is_not_there_is_one_error(name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FixEfficientNetError, match=said):
        load(name)


def test_weights_that_do_not_name_their_network(checkpoint: Path, tmp_path: Path):
    torch.save(load_file(checkpoint), tmp_path / "mine.pth")
    for path in (checkpoint, tmp_path / "mine.pth"):
        with pytest.raises(EvaluationError, match=f"does not say of which network .* timm/NAME:{path}"):
            load(str(path))


def test_a_folder_that_is_no_run(tmp_path: Path):
    with pytest.raises(MissingFileError, match="no finished run"):
        load(str(tmp_path))


def test_a_run_that_says_nonsense_of_itself(tmp_path: Path):
    model = timm.create_model("test_efficientnet", num_classes=3)
    wrong: list[dict[str, Any]] = [{"mean": "grey"}, {"test_size": None}, {"train_size": "large"}, {"crop_pct": "all"}]
    for described in [*wrong, {"stage": "warm-up"}, {"std": [0.2, 0, 0.2]}, {"interpolation": "nearest"}]:
        folder = plain.save_run(tmp_path / "run", model, tiny.CLASSES, **described)
        with pytest.raises(
            EvaluationError, match=rf"its description in the metadata\.{next(iter(described))}.*: must be "
        ):
            load(str(folder))


def test_a_runs_description_is_read_as_it_was_written(tmp_path: Path):
    written = Description(
        "test_efficientnet.r160_in1k", "base", 64, 96, 0.9, "bilinear", (0.5,) * 3, (0.2,) * 3, ("a",)
    )
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, path, {"fixefficientnet": written.dumps()})
    assert Description.load(path) == written
    assert astuple(written.test) == (64, 0.9, "bilinear", (0.5,) * 3, (0.2,) * 3)
    save_file({"weight": torch.zeros(1)}, path, {"fixefficientnet": "{"})
    with pytest.raises(EvaluationError, match="its description in the metadata is not JSON"):
        Description.load(path)
    save_file({"weight": torch.zeros(1)}, path)
    assert Description.load(path) is None


def test_a_run_on_a_network_that_this_timm_has_not(tmp_path: Path):
    model = timm.create_model("test_efficientnet", num_classes=3)
    folder = plain.save_run(tmp_path / "run", model, tiny.CLASSES, backbone="resnet51.of_tomorrow")
    with pytest.raises(CheckpointError, match="the network 'resnet51', which timm"):
        load(str(folder))


def test_a_checkpoint_of_another_network(checkpoint: Path):
    for network in ("test_resnet", "test_convnext", "tf_efficientnet_lite0"):
        with pytest.raises(FixEfficientNetError, match=r"no checkpoint of|no batch norm"):
            load(f"timm/{network}:{checkpoint}")


def test_a_damaged_checkpoint(checkpoint: Path):
    whole = checkpoint.read_bytes()
    for content in (b"", b"no checkpoint", whole[:1000], whole[:-1]):
        checkpoint.write_bytes(content)
        with pytest.raises(CheckpointError, match=str(checkpoint)):
            load(f"timm/test_efficientnet:{checkpoint}")


def test_a_module_that_says_nothing_of_its_images():
    for module in (nn.Linear(3, 3), timm.create_model("test_efficientnet", num_classes=0)):
        with pytest.raises(EvaluationError, match=r"no classifier of timm's"):
            from_module(module)


def test_images_that_are_not_square():
    model = timm.create_model("test_efficientnet", pretrained_cfg_overlay={"input_size": (3, 96, 64)})
    with pytest.raises(EvaluationError, match="96 x 64 pixels; only squares"):
        from_module(model)


def test_a_checkpoint_of_torch_compile(tmp_path: Path):
    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "compiled.pth")
    assert same(load(f"timm/test_efficientnet:{tmp_path / 'compiled.pth'}").network, model)


def test_a_run_that_is_not_there_is_no_misspelt_variant(tmp_path: Path):
    with pytest.raises(MissingFileError, match="runs/b2: there is no such file or folder"):
        load(str(tmp_path / "runs/b2"))
