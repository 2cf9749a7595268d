"""Pooled features of images, against a plain loop over timm's own two halves of a network."""

from pathlib import Path

import numpy as np
import plain
import pytest
import timm
import tiny
import torch
from conftest import Network, lively
from PIL import Image
from torchvision import transforms

import fixefficientnet
from fixefficientnet import PredictionOptions
from fixefficientnet.errors import ImageError, OptionError


@pytest.fixture(scope="module")
def network() -> Network:
    return lively(timm.create_model("test_efficientnet", num_classes=3)).eval()


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [tiny.mottle(tmp_path / "images" / f"{index}.png", index) for index in range(7)]


def expected(network: Network, images: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits by timm's forward_features and forward_head, of torchvision's transform."""
    test = plain.TEST
    transform = transforms.Compose(
        [
            transforms.Resize(int(test.size / test.crop_pct), transforms.InterpolationMode(test.interpolation)),
            transforms.CenterCrop(test.size),
            transforms.ToTensor(),
            transforms.Normalize(test.mean, test.std),
        ]
    )
    batch = torch.stack([transform(Image.open(image).convert("RGB")) for image in images])
    with torch.inference_mode():
        features = network.forward_head(network.forward_features(batch), pre_logits=True)
        return features.numpy(), network(batch).numpy()


@pytest.mark.parametrize("threads", [1, 3])
def test_features_and_logits_are_of_one_pass(network: Network, images: list[Path], tmp_path: Path, threads: int):
    run = plain.save_run(tmp_path / "run", network, tiny.CLASSES)
    found = fixefficientnet.embed(images, str(run), PredictionOptions(batch_size=2, threads=threads))
    features, logits = expected(network, images)
    assert found.images == images
    assert (str(found.features.dtype), found.features.shape) == ("float32", features.shape)
    np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-4 * np.abs(features).max())
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())


def test_the_command_writes_them(network: Network, images: list[Path], tmp_path: Path):
    run = plain.save_run(tmp_path / "run", network, tiny.CLASSES)
    (tmp_path / "images" / "broken.jpg").write_bytes(b"none")
    target = tmp_path / "features.npz"
    out, err = tiny.cli("embed", tmp_path / "images", "--model", run, "-o", target, columns=300, status=1)
    assert out.startswith(f"{target}: features, float32 [7, ") and "broken.jpg" in err
    with np.load(target) as arrays:
        assert arrays["files"].tolist() == [str(image) for image in images]
        features = expected(network, images)[0]
        np.testing.assert_allclose(arrays["features"], features, rtol=1e-4, atol=1e-4 * np.abs(features).max())
        assert set(arrays) == {"features", "files"}


def test_wrong_turns_are_one_error(network: Network, images: list[Path], tmp_path: Path):
    assert "ends in .npz" in tiny.cli("embed", images[0], "-o", tmp_path / "x.csv", status=2)[1]
    with pytest.raises(OptionError, match="engine 'eager' alone"):
        fixefficientnet.embed(images, network, PredictionOptions(engine="onnx"))
    with pytest.raises(ImageError, match="nothing"):
        fixefficientnet.embed("nothing.jpg", network)
    assert not network.get_submodule("classifier")._forward_pre_hooks
    assert fixefficientnet.embed([], network).features.shape == (0, 0)
