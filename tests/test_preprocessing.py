import contextlib
import io
import random
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image, ImageOps
from torchvision import transforms

import fixefficientnet
from fixefficientnet import manifest
from fixefficientnet.data.files import SUFFIXES
from fixefficientnet.errors import ImageError
from fixefficientnet.preprocessing import FastPreprocess, Preprocess, open_image, orientation

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MODES = ("RGB", "L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr", "HSV")


def random_image(rng: random.Random, mode: str, width: int, height: int) -> Image.Image:
    """Low-frequency colour with noise on it, so that interpolation matters."""
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse = Image.fromarray(noise).resize((4, 3)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.blend(coarse, Image.fromarray(noise), 0.2).convert(mode)


@pytest.mark.parametrize("key", manifest.load())
def test_pixels_equal_an_independent_torchvision_composition(key: str):
    variant = fixefficientnet.info(key)
    size, test = variant.test.size, variant.test
    mean, std = IMAGENET if variant.family == "noisy_student" else HALF
    crop_pct, interpolation = 1.0, "bicubic"
    if not variant.paper:
        mean, std, crop_pct, interpolation = test.mean, test.std, test.crop_pct, test.interpolation
    reference = transforms.Compose(
        [
            transforms.Resize(int(size / crop_pct), transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    timms = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=variant.pretrained_cfg().to_dict())
    )
    ours = fixefficientnet.preprocess(key)
    rng = random.Random(key)
    for mode in MODES:
        image = random_image(rng, mode, rng.randint(1, 900), rng.randint(120, 900))
        found = ours(image)
        assert found.shape == (3, size, size)
        assert found.dtype == torch.float32
        rgb = image.convert("RGB")
        assert torch.equal(found, reference(rgb)), (mode, image.size)
        assert torch.equal(found, timms(rgb)), (mode, image.size)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_any_shape_size_and_crop_equal_torchvisions(mode: str):
    rng = random.Random(mode)
    for _ in range(150):
        sides = rng.choice([(1, 700, 1, 700), (200, 900, 1, 60), (1, 60, 200, 900), (200, 900, 200, 900)])
        image = random_image(rng, "RGB", rng.randint(*sides[:2]), rng.randint(*sides[2:]))
        size, crop_pct = rng.choice([1, 7, 32, 97]), rng.choice([0.5, 0.875, 0.95, 1.0])
        ours = Preprocess(size, crop_pct, mode, *HALF)
        resize = transforms.Resize(int(size / crop_pct), transforms.InterpolationMode(mode))
        reference = transforms.CenterCrop(size)(resize(image))
        assert np.array_equal(np.asarray(ours.crop(image)), np.asarray(reference)), (image.size, size, crop_pct)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_fast_preprocessing_is_nearly_the_same(mode: str):
    rng = random.Random(mode)
    for _ in range(40):
        image = random_image(rng, rng.choice(MODES), rng.randint(20, 900), rng.randint(20, 900))
        test = manifest.TestTime(rng.choice([32, 224]), rng.choice([0.875, 1.0]), mode, *HALF)
        difference = (FastPreprocess.of(test)(image) - Preprocess.of(test)(image)).abs() / 2 * 255
        assert difference.max() < 2.5  # at std 0.5: steps of 8 bits
        assert difference.mean() < 0.5
    exact, fast = (kind.of(fixefficientnet.info("b0").test) for kind in (Preprocess, FastPreprocess))
    line = Image.new("L", (20_000, 1))
    assert torch.equal(fast(line), exact(line))


def test_model_data_config_gives_the_same_pixels():
    model = fixefficientnet.create("b1_ns", device="meta")
    image = random_image(random.Random(0), "RGB", 517, 389)
    for use_test_size in (False, True):
        config = timm.data.resolve_model_data_config(model, use_test_size=use_test_size)
        assert torch.equal(timm.data.create_transform(**config)(image), model.preprocess(image))


def test_path_bytes_and_image_are_the_same(tmp_path: Path):
    image = random_image(random.Random(1), "RGB", 200, 150)
    path = tmp_path / "a.png"
    image.save(path)
    ours = fixefficientnet.preprocess("b0")
    expected = ours(image)
    assert torch.equal(ours(path), expected)
    assert torch.equal(ours(str(path)), expected)
    assert torch.equal(ours(path.read_bytes()), expected)


def test_sixteen_bit_grey_keeps_its_contrast():
    eight = np.arange(256, dtype=np.uint8).repeat(256).reshape(256, 256)
    encoded = io.BytesIO()
    Image.fromarray(eight.astype(np.uint16) * 257).save(encoded, "PNG")
    assert np.array_equal(np.asarray(open_image(encoded.getvalue()))[..., 0], eight)
    assert np.array_equal(np.asarray(open_image(Image.fromarray(eight.astype(np.int32) * 257)))[..., 0], eight)


@pytest.mark.parametrize("value", [0, 255, 256, 4096, 65535])
def test_sixteen_bit_scale_does_not_depend_on_the_content(value: int):
    encoded = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint16)).save(encoded, "PNG")
    assert open_image(encoded.getvalue()).getpixel((0, 0)) == (value >> 8,) * 3


def test_damaged_exif_leaves_the_image_as_it_is():
    encoded = io.BytesIO()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01"  # cut off in its only entry
    Image.new("RGB", (60, 30)).save(encoded, "JPEG", exif=exif)
    assert open_image(encoded.getvalue(), upright=True).size == (60, 30)


def test_fuzzed_files_are_images_or_image_errors():
    rng = random.Random(11)
    image = random_image(rng, "RGB", 64, 48)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        encoded = io.BytesIO()
        image.save(encoded, kind)
        for _ in range(60):
            data = bytearray(encoded.getvalue())
            for _ in range(rng.randint(1, 30)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            with contextlib.suppress(ImageError):
                open_image(bytes(data), upright=True)


@pytest.mark.parametrize(
    "thing", [3, None, np.zeros((4, 4, 3), np.uint8), io.BytesIO(b"")], ids=lambda t: type(t).__name__
)
def test_what_is_no_image_at_all_is_a_type_error(thing: object):
    with pytest.raises(TypeError, match="An image is a PIL image, a path or"):
        open_image(thing)  # type: ignore[arg-type]


def test_image_without_pixels():
    with pytest.raises(ImageError, match="no pixels"):
        fixefficientnet.preprocess("b0")(Image.new("RGB", (0, 5)))


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    encoded = io.BytesIO()
    frames[0].save(encoded, "GIF", save_all=True, append_images=frames[1:])
    assert open_image(encoded.getvalue()).getpixel((5, 5)) == (255, 0, 0)


def test_exif_rotation_only_on_request():
    image = Image.new("RGB", (60, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", exif=exif)
    assert open_image(encoded.getvalue()).size == (60, 30)
    assert open_image(encoded.getvalue(), upright=True).size == (30, 60)


@pytest.mark.parametrize("size", [(1, 50), (50, 1), (1, 1), (3, 700)])
def test_narrow_images(size: tuple[int, int]):
    assert fixefficientnet.preprocess("b0")(Image.new("RGB", size)).shape == (3, 320, 320)


def test_very_narrow_image_takes_no_gigabytes_and_nearly_the_same_pixels(monkeypatch: pytest.MonkeyPatch):
    ours = fixefficientnet.preprocess("b0")
    image = random_image(random.Random(3), "RGB", 3, 1000)
    exact = ours(image)
    monkeypatch.setattr("fixefficientnet.preprocessing.PIXEL_LIMIT", 0)
    assert (ours(image) - exact).abs().max() <= 3 * 2 / 255  # three steps of 8 bits, at std 0.5
    monkeypatch.undo()
    line = random_image(random.Random(4), "L", 20_000, 1)  # 320 x 6,400,000 pixels when resized whole
    tracemalloc.start()
    assert ours(line).shape == (3, 320, 320)
    assert tracemalloc.get_traced_memory()[1] < 100e6


def test_threads_leave_the_filters_of_warnings_as_they_were():
    data = (ROOT / "examples" / "cat.jpg").read_bytes()
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(open_image, [data] * 200))) == 200
    assert list(warnings.filters) == before


def test_huge_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    path = tmp_path / "huge.png"
    Image.new("1", (400, 300)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(ImageError, match=r"huge.png has 400 x 300 pixels.*limit is 100,000"):
        open_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # above twice the limit, Pillow itself refuses
    with pytest.raises(ImageError, match=r"huge.png.*(too large|limit)"):
        open_image(path)


def test_truncated_missing_and_not_no_image(tmp_path: Path):
    whole = io.BytesIO()
    random_image(random.Random(2), "RGB", 300, 300).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("cut.jpg", "text.jpg", "empty.jpg", "missing.jpg"):
        with pytest.raises(ImageError, match=name):
            open_image(tmp_path / name)
    with pytest.raises(ImageError, match="14 bytes"):
        open_image(b"not an image!!")


@pytest.mark.parametrize("kind", ["EPS", "ICO", "ICNS", "PCX", "SGI", "TGA", "IM", "MSP", "DDS", "PDF", "XBM"])
def test_pillows_other_kinds_are_not_opened_whatever_their_name(kind: str, tmp_path: Path):
    Image.new("1" if kind in ("MSP", "XBM") else "RGB", (32, 32)).save(tmp_path / "a.jpg", kind)
    for given in (tmp_path / "a.jpg", (tmp_path / "a.jpg").read_bytes()):
        with pytest.raises(ImageError, match="of a kind that is not read: convert it to PNG"):
            open_image(given)


def test_every_ending_of_images_is_of_a_kind_that_is_read(tmp_path: Path):
    kinds = {ending: kind for ending, kind in Image.registered_extensions().items() if ending in SUFFIXES}
    kinds = {ending: kind for ending, kind in kinds.items() if kind in Image.SAVE}
    assert {".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".ppm"} <= kinds.keys()
    for ending, kind in kinds.items():
        Image.new("RGB", (32, 24), "red").save(tmp_path / f"a{ending}", kind)
        assert open_image(tmp_path / f"a{ending}").size == (32, 24)


@pytest.mark.parametrize("orientation_", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_upright_is_what_pillow_makes_of_it(orientation_: int, mode: str):
    kind, step = (np.uint16, 700) if mode == "I;16" else (np.uint8, 5)
    pixels = (np.arange(6 * 8) * step).astype(kind).reshape(6, 8)
    exif, encoded = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation_
    Image.fromarray(pixels).convert("RGB" if mode == "RGB" else None).save(encoded, "PNG", exif=exif)
    as_stored, upright = (open_image(encoded.getvalue(), upright=turn) for turn in (False, True))
    assert (orientation(as_stored), orientation(upright)) == (orientation_, 1)
    expected = ImageOps.exif_transpose(as_stored)
    assert np.array_equal(np.asarray(upright), np.asarray(expected))


def test_damage_elsewhere_in_the_exif_data_does_not_keep_an_image_sideways():
    entries = b"\x01\x11\0\x02\0\0\0\x04abc\0", b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"  # the first: text for a number
    encoded = io.BytesIO()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + b"".join(entries) + bytes(4)
    Image.new("RGB", (60, 30)).save(encoded, "JPEG", exif=exif)
    image = open_image(encoded.getvalue(), upright=True)
    assert image.size == (30, 60)
    assert orientation(image) == 1
