"""From an image to the network's input: at test time, in FixRes fine-tuning, in training.

Loading gives pixels, a quarter of the bytes of the network's input, and the device normalises them.
"""

import contextlib
import hashlib
import io
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import ExifTags, Image, ImageEnhance, ImageStat, UnidentifiedImageError
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fixefficientnet import manifest
from fixefficientnet._internal.colours import to_srgb
from fixefficientnet._internal.files import check_file
from fixefficientnet._internal.heif import open_heif
from fixefficientnet.errors import ImageError
from fixefficientnet.manifest import TestTime

PIXEL_LIMIT = 2**27
"""Above this number of pixels after resizing (a very narrow image), only the part that the crop keeps is resized."""

_USUAL = ("JPEG", "PNG", "GIF", "BMP", "PPM")
_FORMATS = (*_USUAL, "WEBP", "TIFF", "JPEG2000", "AVIF")
"""What Pillow is let open; the usual ones first, without importing all that it knows. It knows forty more, for fonts,
films and icons, and decodes any of them whatever a file's name says; PostScript it runs as a program."""
_WARNINGS = threading.Lock()
"""Held while the warning filters change: they are the process's, and concurrent changes would stay."""

ImageSource = Image.Image | str | os.PathLike[str] | bytes


class Preprocess(TestTime):
    """The test-time transform of the released FixEfficientNet evaluation, as a callable.

    Resize the shorter side to `int(size / crop_pct)` with Pillow, centre crop, scale to [0, 1], normalise.
    An image is never turned by its EXIF orientation, as in the original.
    """

    @classmethod
    def of(cls, test: TestTime) -> "Preprocess":
        """The transform that a manifest row describes."""
        return cls(**asdict(test))

    def __call__(self, image: ImageSource) -> Tensor:
        """Transforms one image.

        Args:
            image: A PIL image of any mode, a path, or an encoded file's bytes.

        Returns:
            float32 [3, size, size], normalised RGB.

        Raises:
            ImageError: The image cannot be opened, or is above the pixel limit (see `open_image`).
        """
        return self.normalise(self.pixels(open_image(image))).contiguous()

    def pixels(self, image: Image.Image) -> Tensor:
        """All steps but the last: an RGB image to uint8 [3, size, size], whose channels lie together in memory."""
        return _pixels(self.crop(image))

    def normalise(self, pixels: Tensor) -> Tensor:
        """The last step, on the device that the pixels are on: uint8 [..., 3, H, W] to float32 of the same shape.

        Channels are last in memory; the values are what torchvision computes, in that order.
        """
        # a row at a time, as a CPU is slow where three values are all that lies together; and divided by a tensor, as
        # a GPU multiplies by the reciprocal of a number, which is rounded; sent without waiting for what it computes
        constants = torch.tensor([(255.0,) * 3, self.mean, self.std], dtype=torch.float32)
        whole, mean, std = constants.repeat(1, pixels.shape[-1]).to(pixels.device, non_blocking=True)
        rows = pixels.movedim(-3, -1).flatten(-2).to(torch.float32).div_(whole).sub_(mean).div_(std)
        return rows.view(*rows.shape[:-1], -1, 3).movedim(-1, -3)

    def crop(self, image: Image.Image) -> Image.Image:
        """The first two steps: an RGB image, resized and cropped to a square of `size` pixels."""
        short, long = self._resized(image)
        if image.width > image.height and short * long <= PIXEL_LIMIT:
            # Pillow resizes along the rows first, then along the columns, with whole values in between: one by one is
            # the same, and of columns that the crop drops the second need not be done
            mode = Image.Resampling[InterpolationMode(self.interpolation).name]
            left = round((long - self.size) / 2)
            columns = image.resize((long, image.height), mode).crop((left, 0, left + self.size, image.height))
            resized = columns.resize((self.size, short), mode)
        else:
            resized = self.resize(image)
        square: Image.Image = F.center_crop(resized, [self.size, self.size])
        return square

    def resize(self, image: Image.Image) -> Image.Image:
        """The first step: an RGB image, resized so that its shorter side has `int(size / crop_pct)` pixels."""
        short, long = self._resized(image)
        mode = InterpolationMode(self.interpolation)
        if short * long > PIXEL_LIMIT:
            # a line of pixels would become an image of gigabytes: resize only what the crop keeps
            # (equal but for rounding)
            side = min(image.size) * self.size / short
            left, top = (image.width - side) / 2, (image.height - side) / 2
            box = (left, top, left + side, top + side)
            return image.resize((self.size, self.size), Image.Resampling[mode.name], box)
        result: Image.Image = F.resize(image, [short], mode)
        return result

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        """Shorter and longer side after the first step, as torchvision rounds them."""
        short, long = sorted(image.size)
        resized = int(self.size / self.crop_pct)
        return resized, int(resized * long / short)


class FastPreprocess(Preprocess):
    """Nearly the same in half the time: torchvision resizes tensors of whole values, where Pillow resizes images.

    Of a photo, a few values in a thousand differ, by 2 of 255 at most (docs/speed.md).
    """

    def pixels(self, image: Image.Image) -> Tensor:
        """All steps but the last, as in `Preprocess`."""
        from torchvision.transforms.v2 import functional as v2  # which takes a while, and few need it

        short, long = self._resized(image)
        if short * long > PIXEL_LIMIT:
            return super().pixels(image)
        resized = v2.resize(_pixels(image), [short], InterpolationMode(self.interpolation))
        return cast(Tensor, v2.center_crop(resized, [self.size, self.size]))


def _pixels(image: Image.Image) -> Tensor:
    """An RGB image's pixels, copied: uint8 [3, H, W]; the channels of each lie together."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def stacked(images: Sequence[Tensor]) -> Tensor:
    """Pixels of images, uint8 [..., 3, H, W] each, as uint8 [n, ..., 3, H, W] with channels last in memory."""
    return torch.stack([image.movedim(-3, -1) for image in images]).movedim(-1, -3)


@dataclass(frozen=True, slots=True)
class FineTuningTransform:
    """FixRes's augmentation: test-time-like, at the test size (FixRes paper; FixEfficientNet note).

    Resize as at test time, mirror, jitter the colours a little, and crop at a height of the centre, at a
    horizontal offset drawn uniformly from all that the image's width allows.

    Seed, epoch and image index decide every draw. `hflip` is the probability of mirroring, `color_jitter` the largest
    relative change of brightness, contrast and saturation, each.
    """

    test: Preprocess
    seed: int
    hflip: float
    color_jitter: float

    def __call__(self, image: Image.Image, epoch: int, index: int) -> Tensor:
        """Transforms one RGB image: uint8 [3, size, size]; what normalises it is `test`."""
        size, image = self.test.size, self.test.resize(image)
        jitter = transforms.ColorJitter(*[self.color_jitter] * 3)
        with _draws_of(self.seed, epoch, index):  # in torchvision's order
            mirrored = bool(torch.rand(1) < self.hflip)
            order, *factors, _ = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
            left = int(torch.randint(image.width - size + 1, (1,)))
        if mirrored:  # which is done last, on the crop alone
            left = image.width - size - left
        top = round((image.height - size) / 2)
        image = _jittered(image, (left, top, left + size, top + size), order.tolist(), *factors)
        return _pixels(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image)


_RAMP = Image.frombytes("L", (256, 1), bytes(range(256)))
"""Every value once."""


def _jittered(
    image: Image.Image,
    box: tuple[int, int, int, int],
    order: Sequence[int],
    brightness: float | None,
    contrast: float | None,
    saturation: float | None,
) -> Image.Image:
    """The same pixels as torchvision's colour jitter of a whole image, cropped to a box afterwards.

    Contrast changes with the mean of the whole image as it is then, so that what comes before is done on the whole
    image; what comes after, on the crop. Brightness and contrast make of each value another: in one table.

    `order` has 0 (brightness), 1 (contrast), 2 (saturation) and 3 (hue, which stays), as they follow each other. A
    factor of None changes nothing.
    """
    table = _RAMP
    if contrast is None:
        image = image.crop(box)
    for step in order:
        if step == 0 and brightness is not None:
            table = ImageEnhance.Brightness(table).enhance(brightness)
        elif step == 1 and contrast is not None:
            mean = int(ImageStat.Stat(_mapped(image, table).convert("L")).mean[0] + 0.5)
            table = Image.blend(Image.new("L", table.size, mean), table, contrast)
            image = image.crop(box)
        elif step == 2 and saturation is not None:
            image, table = ImageEnhance.Color(_mapped(image, table)).enhance(saturation), _RAMP
    return _mapped(image, table)


def _mapped(image: Image.Image, table: Image.Image) -> Image.Image:
    """An RGB image with each value replaced by what a table of 256 values has for it."""
    return image if table is _RAMP else image.point(list(table.tobytes()) * 3)


@dataclass(frozen=True, slots=True)
class Views:
    """The fixed views of an image that features are computed from.

    One view is the test-time transform's, mirrored in some images. Of several, the first is the test-time transform's,
    the second its mirror image, any further one a draw of the fine-tuning augmentation.
    """

    count: int
    augmented: FineTuningTransform

    def __call__(self, image: Image.Image, epoch: int, index: int) -> Tensor:
        """Transforms one RGB image: uint8 [count, 3, size, size]; `epoch` makes no difference."""
        plain = self.augmented.test.pixels(image)
        if self.count == 1:
            with _draws_of(self.augmented.seed, 0, index):
                mirrored = bool(torch.rand(1) < self.augmented.hflip)
            return stacked([plain.flip(-1) if mirrored else plain])
        drawn = [self.augmented(image, view, index) for view in range(2, self.count)]
        return stacked([plain, plain.flip(-1), *drawn][: self.count])


@dataclass(frozen=True, slots=True)
class TrainingTransform:
    """The usual training augmentation: RandomResizedCrop and mirroring; see `FineTuningTransform` for seed and hflip.

    `train` is the test-time transform at the train size, for its size, interpolation, mean and std.
    """

    train: Preprocess
    seed: int
    hflip: float

    def __call__(self, image: Image.Image, epoch: int, index: int) -> Tensor:
        """Transforms one RGB image: uint8 [3, size, size]; what normalises it is `train`."""
        mode = InterpolationMode(self.train.interpolation)
        with _draws_of(self.seed, epoch, index):
            image = transforms.RandomResizedCrop(self.train.size, interpolation=mode)(image)
            return _pixels(transforms.RandomHorizontalFlip(self.hflip)(image))


@contextlib.contextmanager
def _draws_of(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Makes torch's random numbers a function of these three alone, and leaves the generator as it was."""
    digest = hashlib.sha256(f"{seed} {epoch} {index}".encode()).digest()
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    try:
        yield
    finally:
        generator.set_state(before)


def preprocess(name: str) -> Preprocess:
    """The test-time transform of a variant, without its model.

    Args:
        name: A variant's key or alias.

    Raises:
        UnknownVariantError: No variant has this name.
    """
    return Preprocess.of(manifest.find(name).test)


def open_image(image: ImageSource, *, upright: bool = False, srgb: bool = False) -> Image.Image:
    """Opens an image as RGB: the first frame, alpha dropped, 16-bit values scaled to 8.

    If asked, it is turned `upright` as its EXIF orientation says, and its colours become sRGB as its profile says.

    Raises:
        TypeError: The image is none of these.
        ImageError: The image is missing, truncated, of none of the kinds that are read (JPEG, PNG, GIF, BMP, PPM, WebP,
            TIFF, JPEG 2000, AVIF, HEIC), of a kind that needs another package, or above Pillow's own limit of
            `PIL.Image.MAX_IMAGE_PIXELS` (89,478,485) pixels; raise that limit to allow more.
    """
    if not isinstance(image, Image.Image | str | bytes | os.PathLike):
        raise TypeError(f"An image is a PIL image, a path or an encoded file's bytes, not {type(image).__name__}.")
    try:
        opened = image if isinstance(image, Image.Image) else _open(image)
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and opened.width * opened.height > limit:
            raise ImageError(
                f"{_name(image)} has {opened.width} x {opened.height} pixels, the limit is {limit:,} "
                "(PIL.Image.MAX_IMAGE_PIXELS, which may be raised)."
            )
        if not (opened.width and opened.height):
            raise ImageError(f"{_name(image)} has no pixels.")
        return _rgb(_upright(opened) if upright else opened, opened.format, srgb=srgb)
    except UnidentifiedImageError:
        raise ImageError(f"{_name(image)} is not an image, or of a kind that is not read: convert it to PNG.") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{_name(image)} is too large: {error}") from None
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(f"{_name(image)} takes more memory than there is.") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error or type(error).__name__
        raise ImageError(f"{_name(image)} cannot be read: {reason}") from error


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1 (upright) where it has none, or damaged EXIF data."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises a dozen kinds on damaged EXIF data, which is no reason to refuse sound pixels
        return 1
    return found if found in range(1, 9) else 1


def _open(image: str | os.PathLike[str] | bytes) -> Image.Image:
    if not isinstance(image, bytes):
        check_file(image)
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked right after
            return _open_by_pillow(image)
    except UnidentifiedImageError:
        if heif := open_heif(image, _name(image)):
            return heif
        raise


def _open_by_pillow(image: str | os.PathLike[str] | bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=_USUAL)
    except UnidentifiedImageError:
        Image.init()
        known = [kind for kind in _FORMATS if kind in Image.OPEN]  # older releases have no AVIF
        return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=known)


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # what is wrong with the pixels shows here, what follows is about the EXIF data alone
    found = orientation(image)
    if found == 1:
        return image
    # by hand: Pillow's exif_transpose writes the other EXIF data anew, and fails where that is damaged
    turned = image.transpose(_TURNS[found])
    for key in _ORIENTED:
        turned.info.pop(key, None)
    return turned


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""
_ORIENTED = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
"""Where Pillow looks for an orientation: an image that was turned must have none."""


def _rgb(image: Image.Image, kind: str | None, *, srgb: bool = False) -> Image.Image:
    """RGB as Pillow converts, except for 16-bit values, which Pillow clips at 255: that leaves a white image."""
    if image.mode.startswith("I;16"):
        image = _of_bytes(np.asarray(image) >> 8, image)
    # 32 bits wide, of which files fill 16; older releases of Pillow open PNG files of 16 bits so
    elif image.mode == "I" and ((values := np.asarray(image)).max() > 255 or kind == "PNG"):
        image = _of_bytes(np.clip(values, 0, 65535) >> 8, image)
    if srgb:
        image = to_srgb(image)
    if image.mode == "RGB":
        image.load()
        return image  # to convert would copy all pixels
    return image.convert("RGB")


def _of_bytes(values: np.ndarray[Any, Any], original: Image.Image) -> Image.Image:
    """An image of values from 0 to 255, with what is known of the original."""
    made = Image.fromarray(values.astype(np.uint8))
    made.info = dict(original.info)
    return made


def _name(image: ImageSource) -> str:
    if isinstance(image, Image.Image):
        return str(getattr(image, "filename", "")) or "The PIL image"
    return f"The image of {len(image)} bytes" if isinstance(image, bytes) else str(image)
