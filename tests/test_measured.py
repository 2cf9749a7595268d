"""Counts on real images, where these are at hand (they are no part of the project): a plain loop's, and the docs'."""

import os
import re
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from torchvision import transforms

import fixefficientnet

FOLDER = os.environ.get("FIXEFFICIENTNET_IMAGENET_SAMPLE", "")
DOCUMENTED = {(224, 0.875): 2, (320, 1.0): 6}
"""Columns of the docs' table; the model's name is 1."""


def plain_counts(size: int, crop_pct: float) -> tuple[int, int, int]:
    """Images, how many Lite0 classifies correctly, and how many with five predictions."""
    model = fixefficientnet.create("lite0", "backbone")
    transform = transforms.Compose(
        [
            transforms.Resize(int(size / crop_pct), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(0.5, 0.5),
        ]
    )
    ids = [*map(timm.data.ImageNetInfo("imagenet-1k").index_to_label_name, range(1000))]
    files = sorted(Path(FOLDER).glob("*/*.*"))
    correct = correct5 = 0
    for start in range(0, len(files), 20):
        batch = files[start : start + 20]
        with torch.inference_mode():
            logits = model(torch.stack([transform(Image.open(file).convert("RGB")) for file in batch]))
        for file, best in zip(batch, logits.topk(5).indices.tolist(), strict=True):
            label = ids.index(file.parent.name)
            correct += best[0] == label
            correct5 += label in best
    return len(files), correct, correct5


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="FIXEFFICIENTNET_IMAGENET_SAMPLE names no folder of n01440764/… with images")
@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.875), (288, 0.875), (320, 1.0)])
def test_lite0_has_as_many_correct_as_in_a_plain_loop(size: int, crop_pct: float):
    found = fixefficientnet.evaluate("lite0", FOLDER, size=size, crop_pct=crop_pct, workers=2, device="cpu")
    counts = found.images, found.correct.count("1"), found.correct5.count("1")
    assert counts == plain_counts(size, crop_pct)
    if column := DOCUMENTED.get((size, crop_pct)):
        row = re.search(r"^\| lite0 \| \d+ \(224.*", (ROOT / "docs" / "evaluation.md").read_text(), re.M)
        assert row is not None
        documented = re.match(r"[ *]*(\d+)", row[0].split("|")[column])
        assert documented is not None
        assert counts[1] == pytest.approx(int(documented[1]), abs=1)  # one image on the edge, by processor
