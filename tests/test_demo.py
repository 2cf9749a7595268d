"""What the demo computes, against plain PyTorch, and which models it opens."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import plain
import pytest
import timm
import tiny
import torch
from conftest import Network, lively, tiny_variants, tuned_delta

import fixefficientnet
from fixefficientnet import delta, manifest
from fixefficientnet.demo import heat, photo
from fixefficientnet.demo.offer import Offer
from fixefficientnet.demo.photo import Sizes
from fixefficientnet.errors import OptionError
from fixefficientnet.models import LoadedModel

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return lively(timm.create_model("test_efficientnet", num_classes=3))


@pytest.fixture(scope="module")
def run(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of own classes."""
    return plain.save_run(tmp_path_factory.mktemp("runs") / "mine", network, tiny.CLASSES)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tiny.mottle(tmp_path / "image.png", 5)


def test_a_look_is_plain_pytorchs(network: Network, run: Path, image: Path):
    """Labels, crop and map are those of one plain forward pass: a map's mean and the bias are the logit."""
    loaded = fixefficientnet.load(str(run))
    for size in (32, 64):
        found = photo.look(loaded, image, size)
        test = replace(plain.TEST, size=size)
        inputs = plain.stack([image], test)
        with torch.inference_mode():
            logits = network(inputs)[0]
        assert [label.index for label in found.labels] == logits.argsort(descending=True).tolist()
        probabilities = torch.tensor([label.probability for label in found.labels])
        torch.testing.assert_close(probabilities, logits.softmax(0).sort(descending=True).values)
        mean, std = (torch.tensor(three)[:, None, None] for three in (test.mean, test.std))
        pixels = (255 * (inputs[0] * std + mean)).round().to(torch.uint8).permute(1, 2, 0)
        assert (np.asarray(found.crop) == pixels.numpy()).all()
        best = found.labels[0].index
        assert found.activations is not None and found.milliseconds > 0
        torch.testing.assert_close(found.activations.mean() + network.classifier.bias[best], logits[best])
    predicted = fixefficientnet.predict(image, loaded)[0].labels
    assert predicted == photo.look(loaded, image, loaded.test.size).labels


def test_what_is_painted_glows_where_the_map_is_largest(network: Network, run: Path, image: Path):
    crop = photo.look(fixefficientnet.load(str(run)), image, 64).crop
    activations = torch.full((4, 4), -1.0)
    activations[0, 3] = 2
    painted = np.asarray(heat.paint(crop, activations)).astype(int)
    assert painted.shape == (64, 64, 3)
    saturation = painted.max(2) - painted.min(2)
    assert saturation[:10, -10:].min() > 60 and saturation[32:].max() == 0
    assert np.asarray(heat.paint(crop, torch.zeros(4, 4))).std(2).max() == 0  # nothing speaks for it


def test_a_network_without_a_map_has_none():
    """A transformer classifies no mean of a feature map; its logits are the same."""
    torch.manual_seed(0)
    for name in ("test_vit", "test_convnext"):
        network = timm.create_model(name, num_classes=3).eval()
        inputs = torch.rand(1, 3, 160, 160)
        with torch.inference_mode():
            logits, features = heat.forward(network, inputs)
            torch.testing.assert_close(logits, network(inputs))
        assert features is None


def test_every_variant_can_be_tried_at_its_train_size_and_its_test_size():
    network = timm.create_model("test_efficientnet")
    for variant in manifest.load().values():
        test, train = variant.test, variant.train_size
        sizes = Sizes.of(LoadedModel(variant.key, network, test, train_size=train))
        for size in (test.size, train):
            assert size in range(sizes.lowest, sizes.highest + 1, sizes.step) and size in sizes.curve
        assert sizes.lowest <= train / 2 and sizes.highest >= 1.5 * test.size and len(sizes.curve) <= 14
    fixed = LoadedModel("vit", timm.create_model("test_vit"), replace(test, size=160), train_size=160)
    assert Sizes.of(fixed).curve == (160,)


def test_other_sizes_are_refused(run: Path, image: Path):
    loaded = fixefficientnet.load(str(run))
    for size in (31, 97, 100_000, -1):
        with pytest.raises(OptionError, match="at 32 to 96 pixels here"):
            photo.look(loaded, image, size)


def test_only_what_is_offered_is_opened(run: Path, image: Path):
    offer = Offer([str(run)])
    assert offer.names[0] == str(run) and offer.sides == (str(run), str(run)) and offer.sizes_at_first() == (32, 48)
    for name in ("/etc/passwd", "timm/resnet18", "lite0:/etc/passwd", f"{run}/model.safetensors", "", None, ["lite0"]):
        with pytest.raises(OptionError, match="choose one of the list"):
            offer.look(name, image, 48)
    assert "before FixRes is another run" in offer.compared(*offer.sides)
    assert [point.size for point in offer.curve(str(run), image)] == [32, 48, 64, 96]
    first = offer.look(str(run), image, 48).milliseconds
    assert offer.look(str(run), image, 48).milliseconds <= first


def test_before_and_after_fixres_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv(manifest.OVERLAY_VARIABLE, tiny_variants(tmp_path / "hub", b0={}, b1={}))
    run = tmp_path / "runs" / "b0"
    run.mkdir(parents=True)
    delta.save(tuned_delta(fixefficientnet.create("b0", "backbone"), "b0"), run / "delta.safetensors")
    offer = Offer([str(run)])
    assert offer.sides == ("b0:backbone", str(run)) and offer.sizes_at_first() == (32, 48)
    assert offer.compared(*offer.sides) == "Before FixRes, and after it."
    assert {"b0:backbone", "b1:backbone"} <= {*offer.names} and "b2:backbone" not in offer.names  # not on this machine
    assert offer["b1:backbone"].variant == fixefficientnet.info("b1")
    assert "tuned by FixRes for 48 pixels" in offer.about(str(run))
    both = Offer([str(run), "b1:backbone"])
    assert both.sides == (str(run), "b1:backbone") and both.sizes_at_first() == (48, 48)
    assert both.compared(*both.sides) == "Two models, each at its own size."


def test_lite0_is_said_to_have_no_fixres_weights():
    offer = Offer(["lite0"])
    assert offer.sides == ("lite0", "lite0") and offer.sizes_at_first() == (224, 256)
    assert offer.compared("lite0", "lite0").startswith("lite0 has no FixRes weights: both sides are the same network")
    assert "not tuned by FixRes" in offer.about("lite0")


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'fixefficientnet[demo]'" in tiny.cli("demo", status=1)[1]
