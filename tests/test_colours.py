"""Colour profiles: what is shown to a person is in sRGB, what is measured stays as the paper's."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image, ImageCms

import fixefficientnet
from fixefficientnet.preprocessing import open_image

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def edited(profile: bytes, names: dict[bytes, bytes], space: bytes = b"RGB ") -> bytes:
    """A profile whose tags have other names, and whose colours are of another space."""
    made = bytearray(profile)
    made[16:20] = space
    for number in range(struct.unpack(">I", profile[128:132])[0]):
        at = 132 + 12 * number
        made[at : at + 4] = names.get(profile[at : at + 4], profile[at : at + 4])
    return bytes(made)


SWAPPED = edited(SRGB, {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"})
"""Of a device whose first channel is green and whose second is red."""
GREY = edited(SRGB, {b"rTRC": b"kTRC"}, b"GRAY")


def pixels() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def encoded(image: Image.Image, profile: bytes, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, icc_profile=profile)
    return stream.getvalue()


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_converted_as_the_profile_says(mode: str):
    image = pixels().quantize(64) if mode == "P" else pixels().convert(mode)
    plain = image.convert("RGB")
    swapped = Image.merge("RGB", [plain.getchannel(name) for name in "GRB"])
    content = encoded(image, SWAPPED)
    assert difference(open_image(content, srgb=True), swapped) <= 1
    assert difference(open_image(Image.open(io.BytesIO(content)), srgb=True), swapped) <= 1
    assert difference(open_image(content), plain) == 0  # as it is measured


@pytest.mark.parametrize(
    "profile",
    [SRGB, SWAPPED[:200], b"no profile", edited(SRGB, {}, b"CMYK"), GREY, b""],
    ids=["sRGB", "cut", "text", "CMYK", "grey", "empty"],  # the bytes hold the second in which they were made
)
def test_profiles_of_srgb_and_those_that_do_not_fit_change_nothing(profile: bytes):
    assert difference(open_image(encoded(pixels(), profile), srgb=True), pixels()) == 0


def test_grey_images_are_converted_too():
    grey = pixels().convert("L")
    assert difference(open_image(encoded(grey, GREY), srgb=True), grey.convert("RGB")) <= 1  # its curve is sRGB's
    steep = bytearray(GREY)
    at = GREY.index(b"para", 300)
    steep[at + 12 : at + 16] = struct.pack(">i", 5 << 16)  # a gamma of 5
    values = np.asarray(grey) / 255
    linear = np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 5, values / 12.92)
    expected = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear) * 255
    found = np.asarray(open_image(encoded(grey, bytes(steep)), srgb=True))
    assert np.abs(found - expected[..., None]).max() <= 2


def test_predict_sees_what_a_person_sees_and_evaluation_what_is_stored(tmp_path: Path):
    tiny.draw(tmp_path / "n02124075" / "photo.jpg", 0, 0)
    image = Image.open(tmp_path / "n02124075" / "photo.jpg").convert("RGB").resize((200, 200))
    swapped = Image.merge("RGB", [image.getchannel(name) for name in "GRB"])
    for name, one, profile in (("plain", image, SRGB), ("wide", swapped, SWAPPED)):
        folder = tmp_path / name / "n02124075"
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(encoded(one, profile))
    files = [tmp_path / name / "n02124075" / "0.png" for name in ("plain", "wide")]
    plain, wide = fixefficientnet.predict(files, "lite0")
    assert plain.labels[0].index == wide.labels[0].index
    assert wide.labels[0].probability == pytest.approx(plain.labels[0].probability, abs=0.02)
    settings = {"size": 64, "workers": 0, "device": "cpu"}
    losses = [fixefficientnet.evaluate("lite0", tmp_path / name, **settings).loss for name in ("plain", "wide")]
    assert abs(losses[0] - losses[1]) > 0.05
