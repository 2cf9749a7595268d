"""The commands of docs/your-own-images.md, from photos to a model on a Hub, on six classes of generated images."""

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import ROOT
from hub_standin import TOKEN, Hub
from huggingface_hub import constants

import fixefficientnet

pytestmark = pytest.mark.newest

PAGE = ROOT / "docs" / "your-own-images.md"
CLASSES = ("daisy", "iris", "lily", "poppy", "rose", "tulip")
SMALL = {
    # a network and sizes that keep the test short, in the place of the page's
    "lite0 --stage base": "--backbone test_efficientnet --no-pretrained --stage base --epochs 2 --batch-size 8",
    "reproduce lite0": "reproduce --backbone test_efficientnet --epochs 2 --batch-size 8",
    "--train-size 128": "--train-size 32",
    "--sizes 96:224:32": "--sizes 32,64",
    "--test-size 160": "--test-size 64",
}


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def shortened(command: str) -> list[str]:
    for text, other in SMALL.items():
        command = command.replace(text, other)
    return shlex.split(command)[1:]


def test_every_command_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install, *rest = commands()
    assert "pip install" in install and len(rest) == 9
    for index, name in enumerate(CLASSES):
        for number in range(10):
            tiny.draw(tmp_path / "photos" / name / f"{name}{number}.jpg", index, number)
        tiny.draw(tmp_path / "new-photos" / f"{index}.jpg", index, 99)
    monkeypatch.chdir(tmp_path)
    assert all(any(text in command for command in rest) for text in SMALL)
    with Hub(("me",)) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for command in rest:
            assert command.startswith("fixefficientnet ")
            tiny.cli(*shortened(command), columns=200)
        (repository,) = hub.repositories
        published = hub.repositories[repository].commits[hub.repositories[repository].head]
    assert repository == "me/flowers"
    assert json.loads(published["config.json"])["label_names"] == list(CLASSES)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "flowers" / name).read_bytes() == published[name]
    assert fixefficientnet.load("runs/flowers").test.size == 64
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert len(rows) == 6 and {row["prediction"] for row in rows} <= set(CLASSES)
    with np.load("features.npz") as arrays:
        assert len(arrays["features"]) == 6
    for page in ("report.html", "runs/flowers/report.html", "sweep/report.html"):
        assert "<h1>" in Path(page).read_text()
    assert Path("flowers.onnx").stat().st_size
