"""Fine-tuning networks whose last norm keeps no statistics, end to end at tiny scale."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import tiny
import torch
from conftest import Network
from safetensors.torch import load_file

import fixefficientnet
from fixefficientnet import delta
from fixefficientnet.preprocessing import Preprocess
from fixefficientnet.reproduce import online

SMALL = ["--epochs", "2", "--batch-size", "6", "--shard", "8", "--forward-batch", "4", "-j", "0", "--device", "cpu"]
SIZES = ["--train-size", "32", "--test-size", "64"]
HEADS = {"test_convnext": ("head.norm", "head.fc"), "test_vit": ("norm", "head")}


@dataclass(frozen=True)
class Ground:
    """Images, and a network trained on them from scratch."""

    name: str
    images: Path
    folder: Path

    def reproduce(self, *more: object, out: Path, status: int = 0) -> tuple[str, str]:
        place = ["--data", self.images, "--output", out, "--experiment", "run"]
        return tiny.cli("reproduce", "--backbone", self.name, *place, *SIZES, *SMALL, *more, status=status, columns=300)

    def fixres(self, *more: object, out: Path, status: int = 0) -> tuple[str, str]:
        return self.reproduce("--checkpoint", self.folder / "run", *more, out=out, status=status)

    def network(self, file: Path, size: int) -> Network:
        """What plain timm makes of a file of weights for a size."""
        kwargs: dict[str, Any] = {"img_size": size} if self.name == "test_vit" else {}
        return timm.create_model(self.name, num_classes=3, checkpoint_path=str(file), **kwargs).eval()


@pytest.fixture(scope="module", params=list(HEADS))
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    found = Ground(request.param, tiny.make_data(folder / "data", train=6, val=4), folder)
    found.reproduce("--stage", "base", "--no-pretrained", "--base-lr", "0.05", out=folder)
    return found


def loss_and_top1(ground: Ground, model: Network, test: Preprocess) -> tuple[float, float]:
    """By a plain loop over the validation images."""
    losses, hits = [], []
    for label, name in enumerate(tiny.CLASSES):
        for path in sorted((ground.images / "val" / name).iterdir()):
            with torch.inference_mode():
                logits = model(test(path)[None])
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item())
            hits.append(int(logits.argmax()) == label)
    return sum(losses) / len(losses), 100 * sum(hits) / len(hits)


@pytest.mark.parametrize("method", ["online", "cached"])
def test_a_run_tunes_the_head_and_nothing_else(ground: Ground, tmp_path: Path, method: str):
    out, _ = ground.fixres("--method", method, *["--tune", "all"] * (method == "online"), out=tmp_path)
    norm, classifier = HEADS[ground.name]
    assert f"head: {norm} (LayerNorm" in out
    assert ", no statistics) and " + classifier in out
    run, base = tmp_path / "run", ground.folder / "run" / "model.safetensors"
    tuned = delta.load(run / "delta.safetensors")
    head = {f"{norm}.weight", f"{norm}.bias", f"{classifier}.weight", f"{classifier}.bias"}
    assert set(tuned.tensors) == head

    # the untuned network at both sizes is timm's own of the base stage's file
    given: dict[str, Any] = {"file": str(base), "num_classes": 3, "custom_load": False}
    resized: dict[str, Any] = {"img_size": 64} if ground.name == "test_vit" else {}
    untuned: Network = timm.create_model(
        ground.name, pretrained=True, pretrained_cfg_overlay=given, num_classes=3, **resized
    ).eval()
    measured = json.loads((run / "report.json").read_text())["measured"]
    loaded = fixefficientnet.load(str(run))
    test = Preprocess.of(loaded.test)
    small = Preprocess(32, 1.0, test.interpolation, test.mean, test.std)
    found = ground.network(run / "model.safetensors", 64)
    for name, model, transform in (
        ("base", ground.network(base, 32), small),
        ("base_at_test", untuned, test),
        ("tuned", found, test),
    ):
        loss, top1 = loss_and_top1(ground, model, transform)
        assert measured[name]["loss"] == pytest.approx(loss, rel=1e-4)
        assert measured[name]["top1"] == pytest.approx(top1)

    # what changed: the head; cached, the classifier alone
    before, after = untuned.state_dict(), load_file(run / "model.safetensors")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == (head if method == "online" else {name for name in head if name.startswith(f"{classifier}.")})
    delta.apply(untuned, tuned)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(untuned(images), found(images))
        assert torch.equal(loaded.network(images), found(images))

    # measured again by name, at the test size and at the train size of the base stage
    again = fixefficientnet.evaluate(str(run), str(ground.images), device="cpu", workers=0)
    assert again.loss == pytest.approx(measured["tuned"]["loss"], rel=1e-4)
    again = fixefficientnet.evaluate(str(ground.folder / "run"), str(ground.images), size=32, device="cpu", workers=0)
    assert again.loss == pytest.approx(measured["base"]["loss"], rel=1e-4)


def test_a_killed_run_of_the_norm_alone_continues_to_the_same_bytes(ground: Ground, tmp_path: Path):
    steps = 0
    step = online._step

    def dies(*arguments: Any) -> Any:
        nonlocal steps
        if (steps := steps + 1) == 5:
            raise RuntimeError("killed")
        return step(*arguments)

    arguments = ("--method", "online", "--tune", "bn", "--checkpoint-steps", "1", "--val-interval", "0")
    ground.fixres(*arguments, out=tmp_path / "whole")
    with mock.patch.object(online, "_step", dies), pytest.raises(RuntimeError, match="killed"):
        ground.fixres(*arguments, out=tmp_path / "killed")
    out, _ = ground.fixres(*arguments, out=tmp_path / "killed")
    assert "Continuing after step 4" in out
    whole, killed = (tmp_path / name / "run" / "delta.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    before, after = load_file(ground.folder / "run" / "model.safetensors"), delta.load(whole).tensors
    norm, _ = HEADS[ground.name]
    assert {name for name in after if not torch.equal(after[name], before[name])} == {f"{norm}.weight", f"{norm}.bias"}


def test_statistics_alone_are_refused_where_there_are_none(ground: Ground, tmp_path: Path):
    _, err = ground.fixres("--tune", "bn-stats", "--method", "cached", out=tmp_path, status=1)
    assert "keeps no statistics, so tune bn-stats has nothing to change" in err


def test_the_plan_names_the_head():
    out, _ = tiny.cli("reproduce", "--backbone", "test_vit", "--plan", "--test-size", "96", columns=200)
    assert "norm (LayerNorm, no statistics) and head (Linear)" in out
    out, _ = tiny.cli("reproduce", "--backbone", "vgg11", "--plan", "--test-size", "96", columns=200)
    assert "head.fc (Linear) alone, as there is no norm" in out


def test_a_size_that_does_not_fit_is_refused_before_training(ground: Ground, tmp_path: Path):
    if ground.name != "test_vit":
        pytest.skip("it takes any size")
    _, err = ground.fixres("--test-size", "50", out=tmp_path, status=1)
    assert "cannot take images of 50 pixels" in err
    assert "The nearest sizes that it takes: 48 and 64." in err


def test_one_image_of_one_position_has_no_batch_statistics(tmp_path: Path):
    images = tiny.make_data(tmp_path / "data", train=2, val=1)
    network = ["reproduce", *tiny.NETWORK, "--data", images, "--output", tmp_path, "-j", "0", "--batch-size", "1"]
    base = ["--stage", "base", "--no-pretrained", "--train-size", "32"]
    for more in (base, ["--method", "online", "--test-size", "32", "--plan"]):
        _, err = tiny.cli(*network, *more, status=2, columns=300)
        assert "One image per step and process, at 32 pixels" in err
        assert "take a larger --batch-size or size" in err
