"""Whole models as plain timm and transformers load them, in processes without this package."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

import plain
import pytest
import timm
import tiny
import torch
from conftest import TIMM_HAS_LOCAL_DIR, Network, lively
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fixefficientnet
from fixefficientnet.errors import PublishError
from fixefficientnet.options import PublishOptions
from fixefficientnet.publishing.folder import writing
from fixefficientnet.publishing.publish import publish

FILES = ["README.md", "config.json", "model.safetensors"]

PLAIN = """
import json, sys, timm, torch
from PIL import Image, ImageOps
from transformers import pipeline
image, *folders = sys.argv[1:]
found = {}
for folder in folders:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    upright = ImageOps.exif_transpose(Image.open(image)).convert("RGB")
    with torch.inference_mode():
        values = model(timm.data.create_transform(**config)(upright)[None]).softmax(1)[0].tolist()
    names = model.pretrained_cfg.get("label_names") or range(len(values))
    classify = pipeline("image-classification", model=folder, device="cpu")
    ranked = classify(image, top_k=3)
    found[folder] = [dict(zip(map(str, names), values)), {one["label"]: one["score"] for one in ranked}, config]
assert "fixefficientnet" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(hub_cache: Path, finished_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of another network, and of a variant from weights of one's own. Not to be changed."""
    folder = tmp_path_factory.mktemp("own")
    own_classes, imagenet = ["--data", str(tiny.make_data(folder / "data", train=4, val=2))], finished_runs / "data"
    small = [
        "--output",
        str(folder),
        "-j",
        "0",
        "--train-size",
        "32",
        "--test-size",
        "64",
        "--epochs",
        "1",
        "--batch-size",
        "12",
    ]
    said = folder / "said.txt"
    tiny.run([*tiny.NETWORK, "--stage", "base", "--no-pretrained", "--experiment", "base", *own_classes, *small], said)
    whole = str(folder / "base" / "model.safetensors")
    tiny.run(
        [*tiny.NETWORK, "--checkpoint", whole, "--experiment", "tuned", "--method", "cached", *own_classes, *small],
        said,
    )
    (own,) = hub_cache.glob("models--timm--tf_efficientnet_b0.ap_in1k/snapshots/*/model.safetensors")
    variant = ["b0", "--checkpoint", str(own), "--experiment", "variant", "--data", str(imagenet)]
    tiny.run([*variant, *small], said, HF_HUB_CACHE=str(hub_cache))
    return folder


def published(run: Path, folder: Path, **options: Any) -> Path:
    """The folder that a run was published to, under a name of its own."""
    publish([run], "org/mine", PublishOptions(to=folder, **options))
    return folder


@pytest.mark.skipif(not TIMM_HAS_LOCAL_DIR, reason="timm knows no local-dir: yet")
def test_timm_and_transformers_give_the_runs_classes_and_probabilities(runs: Path, tmp_path: Path):
    pytest.importorskip("transformers")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned, as phones store photos
    image = tmp_path / "image.jpg"
    Image.open(tiny.mottle(tmp_path / "image.png", 5)).resize((90, 70)).save(image, exif=exif)
    folders = [published(runs / "tuned", tmp_path / "tuned"), published(runs / "base", tmp_path / "base")]
    tiny.cli("merge", runs / "tuned", "-o", tmp_path / "merged")
    tiny.cli("merge", "lite0", "-o", tmp_path / "lite0")
    folders += [tmp_path / "merged", tmp_path / "lite0"]
    command = [sys.executable, "-c", PLAIN, str(image), *map(str, folders)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for folder, model in zip(folders, (runs / "tuned", runs / "base", runs / "tuned", "lite0"), strict=True):
        loaded = fixefficientnet.load(str(model))
        (expected,) = fixefficientnet.predict(image, loaded, topk=3)
        with_timm, with_transformers, config = found[str(folder)]
        for label in expected.labels:
            assert with_transformers[label.name] == pytest.approx(label.probability, rel=1e-3, abs=1e-6)
            key = str(label.index) if model == "lite0" else label.name
            assert with_timm[key] == pytest.approx(label.probability, rel=1e-3, abs=1e-6)
        test = loaded.test
        assert (config["input_size"], config["crop_pct"]) == ([3, test.size, test.size], test.crop_pct)
        assert (config["interpolation"], config["mean"]) == (test.interpolation, list(test.mean))
        again = fixefficientnet.load(str(folder))
        assert (again.classes, astuple(again.test)) == (loaded.classes, astuple(test))


@pytest.mark.newest
def test_a_model_that_somebody_else_published_meanwhile_is_not_written_over(runs: Path, tmp_path: Path):
    theirs, to = published(runs / "variant", tmp_path / "theirs"), tmp_path / "to"
    begun = threading.Event()

    def publish_theirs() -> None:
        with writing(to):
            begun.set()
            end = time.monotonic() + 60
            while not any(tmp_path.glob(".to.*.partial/config.json")) and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.5)  # all that the other one needs to look, if nothing keeps it from that
            shutil.copytree(theirs, to, dirs_exist_ok=True)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(publish_theirs)
        begun.wait()
        with pytest.raises(PublishError, match=r"of another model\. Nothing was published"):
            published(runs / "tuned", to)
        done.result()
    assert {file.name: file.read_bytes() for file in to.iterdir()} == {
        file.name: file.read_bytes() for file in theirs.iterdir()
    }


def test_a_published_run_is_a_repository_with_a_card(runs: Path, tmp_path: Path):
    out, _ = tiny.cli("publish", runs / "tuned", "--repo", "org/mine", "--to", tmp_path / "to", "--license", "mit")
    folder = tmp_path / "to"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert f"timm.create_model('local-dir:{folder}', pretrained=True)" in out
    report = json.loads((runs / "tuned" / "report.json").read_text())
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name, card.data.base_model) == ("mit", "timm", None)
    top1 = report["measured"]["tuned"]["top1"] / 100  # the card rounds
    assert card.data.eval_results[0].metric_value == pytest.approx(top1, abs=1e-5)
    assert str(tmp_path) not in card.text and 'hf-hub:org/mine"' in card.text
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == report["classes"]
    assert not {"license", "origin_url", "paper_ids"} & config["pretrained_cfg"].keys()
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], t) for name, t in load_file(runs / "tuned" / "model.safetensors").items())


def test_the_same_again_writes_nothing_and_another_model_is_refused(runs: Path, tmp_path: Path):
    folder = published(runs / "tuned", tmp_path / "to")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "all was there already" in tiny.cli("publish", runs / "tuned", "--repo", "org/mine", "--to", folder)[0]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(PublishError, match="of another model"):
        published(runs / "variant", folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    published(runs / "variant", folder, replace=True)
    assert json.loads((folder / "config.json").read_text())["architecture"] == "tf_efficientnet_b0"


def test_a_publication_that_was_killed_is_completed(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole_folder = published(runs / "tuned", tmp_path / "whole")
    contents = {path.name: path.read_bytes() for path in whole_folder.iterdir()}
    moves, allowed = [0], [0]
    replaced = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target.parent.name == "to":
            if moves[0] == allowed[0]:
                raise KeyboardInterrupt
            moves[0] += 1
        return replaced(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    for number in (0, 1, 2):
        moves[0], allowed[0] = 0, number
        with pytest.raises(KeyboardInterrupt):
            published(runs / "tuned", tmp_path / "to")
        assert not (tmp_path / "to" / "config.json").exists()
    allowed[0] = 9
    published(runs / "tuned", tmp_path / "to")
    assert {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()} == contents
    moves[0], allowed[0] = 0, 2  # another model's weights never lie beside this config.json
    with pytest.raises(KeyboardInterrupt):
        published(runs / "variant", tmp_path / "to", replace=True)
    assert not (tmp_path / "to" / "config.json").exists()


def test_a_folder_knows_what_trained_it(tmp_path: Path):
    network: Network = lively(timm.create_model("test_efficientnet", num_classes=3)).eval()
    run = plain.save_run(tmp_path / "run", network, tiny.CLASSES, upright=True, part_of="0" * 64)
    tiny.cli("merge", run, "-o", tmp_path / "merged")
    found, expected = fixefficientnet.load(str(tmp_path / "merged")), fixefficientnet.load(str(run))
    for name in ("part_of", "upright", "train_size", "tuned", "classes", "test"):
        assert getattr(found, name) == getattr(expected, name)
    (run / "recipe.json").write_text("{}")
    assert "is the folder of a run" in tiny.cli("merge", "lite0", "-o", run, "--overwrite", status=1)[1]


def test_a_dry_run_writes_nothing(runs: Path, tmp_path: Path):
    out, _ = tiny.cli("publish", runs / "base", "--repo", "org/mine", "--to", tmp_path / "to", "--dry-run")
    assert out.startswith("Dry run: nothing is published") and "## Classes" in out and "model.safetensors" in out
    assert list(tmp_path.iterdir()) == []


def test_a_variants_whole_model_lies_beside_its_delta(
    finished_runs: Path, hub_cache: Path, tmp_path: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    done = publish([finished_runs / "b0"], "org/name", PublishOptions(to=tmp_path / "to", whole=True))
    (model,) = done.models
    assert model.repository == "org/fixefficientnet_b0.ap_in1k"
    folder = tmp_path / "to" / "fixefficientnet_b0.ap_in1k"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert (tmp_path / "to" / "models.json").is_file()
    network = timm.create_model("tf_efficientnet_b0")
    network.load_state_dict(load_file(folder / "model.safetensors"))
    ours = fixefficientnet.create("b0", finished_runs / "b0" / "delta.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(images), ours(images))
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"


def test_changed_runs_are_refused(runs: Path, tmp_path: Path):
    for name, change, said in (
        ("base", _other_weights, "the file was changed after the run"),
        ("tuned", _other_weights, "the file was changed after the run"),
        ("figures", _other_figures, "give loss"),
        ("unfinished", lambda run: (run / "report.json").unlink(), "it is no finished run"),
    ):
        run = shutil.copytree(
            runs / ("base" if name == "base" else "tuned"), tmp_path / name, ignore=shutil.ignore_patterns("checkpoint")
        )
        change(run)
        _, err = tiny.cli("publish", run, "--repo", "org/mine", "--to", tmp_path / "to", status=1)
        assert said in err
        assert not (tmp_path / "to").exists()
    _, err = tiny.cli("publish", runs / "tuned", runs / "base", "--repo", "org/mine", "--to", tmp_path / "to", status=1)
    assert "publish it alone" in err


def _other_weights(run: Path) -> None:
    with safe_open(file := run / "model.safetensors", "pt") as content:
        metadata = content.metadata()
    save_file({name: tensor * 1.1 for name, tensor in load_file(file).items()}, file, metadata)


def _other_figures(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    report["measured"]["tuned"]["loss"] += 1
    del report["sha256"]  # as whoever forges it would
    (run / "report.json").write_text(json.dumps(report))


def test_names_of_classes_are_inert_in_the_card(tmp_path: Path):
    names = ['```\n<script>alert("x")</script>', "a | b", "# [link](http://x)"]
    network: Network = lively(timm.create_model("test_efficientnet", num_classes=3)).eval()
    run = plain.save_run(tmp_path / "run", network, names)
    tiny.cli("merge", run, "-o", tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    block = text.partition("## Classes\n\n```json\n")[2].partition("\n```")[0]
    assert json.loads(block) == names
    assert all("script" not in line or line.startswith(' "') for line in text.splitlines())
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["label_names"] == names


def test_a_file_is_opened_with_its_own_preprocessing(runs: Path, tmp_path: Path):
    folder = published(runs / "tuned", tmp_path / "to")
    expected = fixefficientnet.load(str(runs / "tuned"))
    names = [f"timm/test_efficientnet:{runs / 'tuned' / 'model.safetensors'}"]
    if TIMM_HAS_LOCAL_DIR:
        names += [f"timm/test_efficientnet:{folder / 'model.safetensors'}", str(folder / "model.safetensors")]
    for name in names:
        found = fixefficientnet.load(name)
        assert (found.name, found.test, found.classes) == (name, expected.test, expected.classes)
