"""Networks that are built for images of one size, against timm's own at another."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from fixefficientnet._internal import input_size
from fixefficientnet.errors import CheckpointError, UnsupportedModelError
from fixefficientnet.evaluation import cost
from fixefficientnet.models import from_checkpoint, load


def lively_positions(name: str, **kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    for key, parameter in model.named_parameters():
        if "pos_embed" in key or key.startswith("head"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "vit_tiny_patch16_224"])
def test_a_network_at_another_size_is_timms_own(name: str, tmp_path: Path):
    model = lively_positions(name)
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    images = torch.randn(2, 3, 48, 48)
    given = {"file": str(tmp_path / "whole.safetensors"), "num_classes": 5, "custom_load": False}
    timms = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=given, num_classes=5, img_size=48).eval()
    found = input_size.at_size(model, 48)
    with torch.inference_mode():
        assert torch.equal(found(images), timms(images))
    assert (input_size.of(found), found.training) == (48, False)
    assert input_size.at_size(found, 48) is found
    loaded = load(f"timm/{name}:{tmp_path / 'whole.safetensors'}")
    with torch.inference_mode():  # from the saved embeddings each time, and not by way of another size
        assert torch.equal(loaded.for_size(96).for_size(48).network(images), timms(images))


def test_a_network_that_takes_any_size_stays_the_same():
    model = timm.create_model("test_convnext")
    assert input_size.at_size(model, 48) is model


def test_a_network_that_timm_cannot_resize():
    model = timm.create_model("pit_ti_224", num_classes=2)
    with pytest.raises(UnsupportedModelError, match="cannot take images of 160 pixels: it is built for 224, and timm"):
        input_size.at_size(model, 160)


@pytest.mark.parametrize(("name", "size", "nearest"), [("test_vit", 150, "144 and 160"), ("test_vit", 8, "16")])
def test_a_size_that_does_not_fit_names_the_nearest(name: str, size: int, nearest: str):
    said = rf"{name} cannot take images of {size} pixels \(.+\)\. The nearest sizes that it takes: {nearest}\."
    with pytest.raises(UnsupportedModelError, match=said):
        cost.gmacs(name, [size])


def test_multiply_adds_of_a_network_of_one_size():
    found = cost.gmacs("vit_tiny_patch16_224", [224, 112])
    assert found[224] == pytest.approx(1.26, abs=0.2)  # timm's table
    assert found[112] < found[224] / 3.5


def test_a_checkpoint_of_another_size(tmp_path: Path):
    path = tmp_path / "small.safetensors"
    save_file(lively_positions("test_vit", img_size=64).state_dict(), path)
    with pytest.raises(CheckpointError, match=re.escape("Was it trained at another size than 160 pixels?")):
        load(f"timm/test_vit:{path}")
    assert input_size.of(from_checkpoint("test_vit", path, 64)) == 64
