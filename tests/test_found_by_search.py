"""The pages by which others find the models: PyTorch Hub's, and the model cards before there are weights."""

import re
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard, metadata_load

from fixefficientnet import manifest
from fixefficientnet.publishing import card

pytestmark = pytest.mark.newest

PAGE = ROOT / "docs" / "torchhub.md"
HEADER = ["---", "layout: hub_detail", "background-class: hub-background", "body-class: hub"]
PAPERS = [variant for variant in manifest.load().values() if variant.paper]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


def test_pytorch_hub_takes_the_page():
    """The rules of pytorch/hub's scripts/sanity_check.py and docs/template.md, but for asking GitHub."""
    text = PAGE.read_text()
    assert text.splitlines()[: len(HEADER)] == HEADER
    front = metadata_load(PAGE)
    assert front
    for field in ("title", "summary", "image", "author", "tags", "github-link", "category"):
        assert front[field], field
    assert not [field for field in ("title", "summary", "author") if ":" in front[field]]
    assert front["category"] in ("researchers", "developers")
    assert set(front["tags"]) <= {"vision", "nlp", "generative", "audio", "scriptable", "forecasting"}
    assert {front["image"], front["featured_image_1"], front["featured_image_2"]} <= {"pytorch-logo.png", "no-image"}
    assert front["accelerator"] in ("cuda", "cuda-optional")
    assert front["github-link"] == f"https://github.com/{front['github-id']}"
    headings = re.findall(r"^### (.*)$", text, re.M)
    assert {"Example", "Model Description"} <= set(headings)
    assert not [heading for heading in headings if ":" in heading]


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """As pytorch/hub's own check runs it: all blocks as one; with lite0, whose weights are here."""
    load = torch.hub.load

    def from_here(repository: str, name: str, **options: Any) -> Any:
        assert (repository, name) == ("org/fixeffnet", "fixefficientnet_b0")
        return load(str(ROOT), "fixefficientnet_lite0", source="local", **options)

    monkeypatch.setattr(torch.hub, "load", from_here)
    monkeypatch.setattr(urllib.request, "urlretrieve", lambda url, to: shutil.copy(ROOT / "examples" / "cat.jpg", to))
    monkeypatch.chdir(tmp_path)
    exec("".join(blocks(PAGE)), {})
    assert "Egyptian cat" in capsys.readouterr().out.splitlines()[0]


def test_cards_before_there_are_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in blocks(ROOT / "docs" / "publishing.md") if "card.planned" in block]
    exec(code, {})
    cards = {path.name.removesuffix(".md"): ModelCard.load(path) for path in tmp_path.iterdir()}
    assert set(cards) == {variant.timm_name for variant in PAPERS} and len(cards) == 18
    for variant in PAPERS:
        text, data = cards[variant.timm_name].text, cards[variant.timm_name].data.to_dict()
        assert data["base_model"] == variant.backbone.repository
        assert (data["license"], data["datasets"]) == (variant.backbone.license, ["ILSVRC/imagenet-1k"])
        assert {"timm", "image-classification", "fixres", "arxiv:2003.08237"} <= set(data["tags"])
        assert "model-index" not in data and "metrics" not in data  # nothing was measured
        assert variant.paper and f"| {variant.paper.fix.test_size} | {variant.paper.fix.top1} |" in text
        assert f"# {variant.title}\n" in text and "not published yet" in text
        assert f'fixefficientnet.create("{variant.key}", pretrained="backbone")' in text
        assert text.rstrip().endswith("}\n```")


def test_a_published_model_needs_no_such_card(monkeypatch: pytest.MonkeyPatch):
    weights = (
        f'{{"repository": "me/x", "filename": "b0.safetensors", "revision": "{"0" * 40}", "sha256": "{"0" * 64}"}}'
    )
    monkeypatch.setenv(
        "FIXEFFICIENTNET_MANIFEST", f'{{"schema_version": 1, "variants": {{"b0": {{"weights": {weights}}}}}}}'
    )
    assert len(card.planned()) == 17
