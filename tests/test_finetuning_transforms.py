"""The augmentations of fine-tuning, against crops that are searched for and against torchvision's own."""

import hashlib
import itertools
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms

from fixefficientnet.preprocessing import FineTuningTransform, Preprocess, TrainingTransform, Views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = transforms.InterpolationMode.BICUBIC


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def at_test(size: int = 48, crop_pct: float = 1.0) -> Preprocess:
    return Preprocess(size, crop_pct, "bicubic", MEAN, STD)


def fine_tuning(size: int = 48, crop_pct: float = 1.0, hflip: float = 0, jitter: float = 0) -> FineTuningTransform:
    return FineTuningTransform(at_test(size, crop_pct), 0, hflip, jitter)


def pixels(image: Image.Image) -> Tensor:
    return transforms.PILToTensor()(image)


def offsets(found: Tensor, resized: Tensor) -> list[int]:
    """Where in the resized image, at the height of its centre, a crop may come from."""
    size = found.shape[-1]
    spare = resized.shape[1] - size
    rows = resized[:, spare // 2 : spare // 2 + size], resized[:, -(-spare // 2) : -(-spare // 2) + size]
    places = range(resized.shape[2] - size + 1)
    # of an odd number of spare rows, either half may be the larger
    return [left for left in places if any(torch.equal(found, part[:, :, left : left + size]) for part in rows)]


def derived_seed(seed: int, epoch: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch} {index}".encode()).digest()[:8], "little", signed=True)


TRANSFORMS: dict[str, Callable[[int], Callable[[Image.Image, int, int], Tensor]]] = {
    "fine-tuning": lambda seed: FineTuningTransform(at_test(), seed, 0.5, 0.05),
    "training": lambda seed: TrainingTransform(at_test(), seed, 0.5),
    "views": lambda seed: Views(4, FineTuningTransform(at_test(), seed, 0.5, 0.05)),
}


# --- draws --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
def test_seed_epoch_and_index_alone_decide(name: str):
    image = noise(120, 60)
    expected = TRANSFORMS[name](3)(image, 2, 5)
    with torch.random.fork_rng(devices=[]):
        for seed in range(5):
            torch.manual_seed(seed)
            assert torch.equal(TRANSFORMS[name](3)(image, 2, 5), expected)
    # and in a loading process
    assert torch.equal(pickle.loads(pickle.dumps(TRANSFORMS[name](3)))(image, 2, 5), expected)


@pytest.mark.parametrize("name", ["fine-tuning", "training"])
def test_another_seed_epoch_or_index_gives_another_crop(name: str):
    image = noise(200, 60)
    points = list(itertools.product((0, 1), (0, 1, 11), (0, 1, 10, 11)))
    found = [TRANSFORMS[name](seed)(image, epoch, index) for seed, epoch, index in points]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(found, 2))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torchs_own_random_numbers_are_left_alone(name: str):
    before = torch.get_rng_state()
    TRANSFORMS[name](0)(noise(120, 60), 0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises((AttributeError, TypeError)):
        TRANSFORMS[name](0)(np.zeros((60, 120, 3)), 0, 0)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)


# --- fine-tuning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "size", "crop_pct"),
    [(150, 60, 48, 1.0), (60, 60, 48, 0.875), (90, 60, 48, 0.9), (60, 90, 47, 0.875), (100, 48, 48, 1.0)],
)
def test_the_crop_is_of_the_resized_image_at_its_centres_height(width: int, height: int, size: int, crop_pct: float):
    image = noise(width, height)
    resized = pixels(transforms.Resize(int(size / crop_pct), BICUBIC)(image))
    transform = fine_tuning(size, crop_pct)
    for epoch in range(20):
        found = transform(image, epoch, 7)
        assert found.shape == (3, size, size)
        assert found.dtype == torch.uint8
        assert len(offsets(found, resized)) == 1


def test_every_offset_is_as_likely():
    image = noise(75, 60)
    resized = pixels(transforms.Resize(48, BICUBIC)(image))
    assert resized.shape == (3, 48, 60)
    drawn = [offsets(fine_tuning()(image, epoch, index), resized) for epoch in range(40) for index in range(20)]
    counts = np.bincount([left for (left,) in drawn], minlength=13)
    assert len(counts) == 60 - 48 + 1
    assert counts.min() > 0
    assert scipy.stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize(("width", "height"), [(60, 150), (60, 60), (48, 49), (48, 50), (48, 51), (50, 73), (31, 100)])
def test_a_portrait_image_without_draws_is_as_at_test_time(width: int, height: int):
    image = noise(width, height)
    for epoch in range(3):
        assert torch.equal(fine_tuning()(image, epoch, 1), at_test().pixels(image))


def test_mirroring_is_as_likely_as_asked():
    image = noise(60, 60)
    plain = pixels(transforms.Resize(48, BICUBIC)(image))
    mirrored = torch.from_numpy(plain.numpy()[..., ::-1].copy())
    for hflip in (0, 0.25, 1):
        found = [fine_tuning(hflip=hflip)(image, epoch, 0) for epoch in range(300)]
        count = sum(torch.equal(tensor, mirrored) for tensor in found)
        assert count + sum(torch.equal(tensor, plain) for tensor in found) == 300
        assert scipy.stats.binomtest(count, 300, hflip).pvalue > 0.001
        assert hflip not in (0, 1) or count == 300 * hflip


def test_a_mirrored_crop_is_of_the_mirrored_image():
    image = noise(150, 60)
    resized = pixels(ImageOps.mirror(transforms.Resize(48, BICUBIC)(image)))
    found = {left for epoch in range(60) for left in offsets(fine_tuning(hflip=1)(image, epoch, 0), resized)}
    assert min(found) < 10
    assert max(found) > 120 - 48 - 10


def test_colours_change_by_a_little_and_never_by_more():
    def values(jitter: float, colour: tuple[int, int, int]) -> np.ndarray:
        transform = fine_tuning(hflip=0.5, jitter=jitter)
        image = Image.new("RGB", (60, 60), colour)
        return np.stack([transform(image, epoch, 0)[:, 9, 9].float().numpy() for epoch in range(300)])

    # of an even grey image, contrast and saturation change nothing: this is the brightness
    for jitter in (0.05, 0.2):
        grey = values(jitter, (120, 120, 120))
        assert grey.min() >= 120 * (1 - jitter) - 1.01
        assert grey.max() <= 120 * (1 + jitter) + 1.01
        assert grey.max() - grey.min() > 120 * 2 * jitter * 0.9
        assert abs(grey.mean() - 120) < 120 * jitter * 0.2
    red = values(0.05, (200, 100, 100))
    saturation = (red[:, 0] - red[:, 1]) / red.mean(1)
    assert saturation.std() > 0.01
    # contrast moves it as well, and values are whole: 1.05², and 1 of 100
    assert np.abs(saturation / (100 / (400 / 3)) - 1).max() < 0.115
    assert np.all(values(0, (200, 100, 50)).round() == (200, 100, 50))


def test_contrast_changes_too():
    halves = np.full((48, 48, 3), 80, np.uint8)
    halves[:, 24:] = 160
    transform = fine_tuning(jitter=0.05)
    found = [transform(Image.fromarray(halves), epoch, 0) for epoch in range(200)]
    ratios = np.array([(tensor[0, 9, 40] / tensor[0, 9, 4]).item() for tensor in found])  # free of brightness
    assert ratios.min() < 1.95
    assert ratios.max() > 2.05
    assert ratios.min() > 1.8 and ratios.max() < 2.2


@pytest.mark.parametrize("jitter", [0, 0.05, 0.4, 1.0])
def test_pixels_are_those_of_torchvisions_own_transforms(jitter: float):
    mirror, colours = transforms.RandomHorizontalFlip(0.5), transforms.ColorJitter(jitter, jitter, jitter)
    sizes = [(150, 60), (60, 60), (61, 90), (97, 64), (500, 30)]
    orders = set()
    for index, (width, height) in enumerate(sizes * 8):
        size, crop_pct = (48, 0.9) if index % 2 else (47, 1.0)
        # even, dark and bright ones too, of which the values meet their limits
        image = Image.blend(Image.new("RGB", (width, height), (index * 6, 250, 9)), noise(width, height, index), 0.5)
        found = FineTuningTransform(at_test(size, crop_pct), 5, 0.5, jitter)(image, 3, index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(5, 3, index))
            expected = colours(mirror(transforms.Resize(int(size / crop_pct), BICUBIC)(image)))
            left = int(torch.randint(expected.width - size + 1, (1,)))
            torch.manual_seed(derived_seed(5, 3, index))
            torch.rand(1)
            orders.add(tuple(step for step in torch.randperm(4).tolist() if step < 3))
        box = transforms.functional.crop(expected, round((expected.height - size) / 2), left, size, size)
        assert torch.equal(found, pixels(box)), (index, width, height)
    assert len(orders) == 6


# --- views --------------------------------------------------------------------------------------------------


def test_one_view_is_mirrored_in_some_images():
    images = [noise(200, 60, seed) for seed in range(40)]
    one, plain = Views(1, fine_tuning(hflip=0.5)), Views(1, fine_tuning())
    turned = 0
    for index, image in enumerate(images):
        expected = at_test().pixels(image)
        assert torch.equal(plain(image, 0, index), expected[None])
        (found,) = one(image, 0, index)
        assert torch.equal(one(image, 9, index)[0], found)  # whatever the epoch
        turned += not torch.equal(found, expected)
        assert torch.equal(found, expected) or torch.equal(found, expected.flip(-1))
    assert 8 < turned < 32


@pytest.mark.parametrize("count", [2, 3, 6])
def test_views_are_the_plain_one_its_mirror_image_and_then_drawn_ones(count: int):
    image = noise(200, 60)
    resized = pixels(transforms.Resize(48, BICUBIC)(image))
    found = Views(count, fine_tuning())(image, 0, 5)
    assert found.shape == (count, 3, 48, 48)
    assert torch.equal(found[0], at_test().pixels(image))
    assert np.array_equal(found[1].numpy(), at_test().pixels(image).numpy()[..., ::-1])
    places = [offsets(view, resized) for view in found[2:]]
    assert all(len(place) == 1 for place in places)
    assert len({place for (place,) in places}) == len(places)
    assert torch.equal(Views(count, fine_tuning())(image, 9, 5), found)  # whatever the epoch
    assert torch.equal(Views(7, fine_tuning())(image, 0, 5)[:count], found)  # and whatever comes after


def test_drawn_views_are_augmented_and_other_ones_for_each_image():
    image = noise(200, 60)
    views = Views(6, FineTuningTransform(at_test(), 0, 0.5, 0.05))
    one, other = views(image, 0, 0), views(image, 0, 1)
    assert torch.equal(one[:2], other[:2])
    drawn = [*one[2:], *other[2:]]
    assert all(not torch.equal(first, second) for first, second in itertools.combinations(drawn, 2))
    resized = pixels(transforms.Resize(48, BICUBIC)(image))
    assert not any(offsets(view, resized) for view in drawn)  # their colours have changed


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("hflip", [0, 0.5, 1])
def test_training_is_torchvisions_random_resized_crop_and_flip(interpolation: str, hflip: float):
    reference = transforms.Compose(
        [
            transforms.RandomResizedCrop(40, interpolation=transforms.InterpolationMode(interpolation)),
            transforms.RandomHorizontalFlip(hflip),
            transforms.PILToTensor(),
        ]
    )
    for seed, epoch, index in itertools.product((0, 12), (0, 3), (0, 1, 1_281_166)):
        image = noise(90 + index % 7, 60, seed)
        found = TrainingTransform(Preprocess(40, 0.875, interpolation, MEAN, STD), seed, hflip)(image, epoch, index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, epoch, index))
            assert torch.equal(found, reference(image))
