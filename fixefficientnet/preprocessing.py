"""From a picture to the network's input."""

import io
import os
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fixefficientnet import manifest
from fixefficientnet.errors import PictureError
from fixefficientnet.manifest import TestTime, Triple

PIXEL_LIMIT = 2**27
"""Above so many pixels after resizing (a very narrow picture), only the part that the crop keeps is resized."""

PictureSource = Image.Image | str | os.PathLike[str] | bytes


@dataclass(frozen=True)
class Preprocess:
    """The test-time transform of the released FixEfficientNet evaluation, as a callable.

    Resize the shorter side to `int(size / crop_pct)`, centre crop, scale to [0, 1], normalise. A
    picture is never turned by its EXIF orientation, as in the original.

    Attributes:
        size: Side of the output, in pixels.
        crop_pct: Share of the resized shorter side that the crop keeps, in (0, 1].
        interpolation: "bicubic" or "bilinear" (Pillow's).
        mean: Per channel (RGB), on the [0, 1] scale.
        std: Per channel (RGB), on the [0, 1] scale.
    """

    size: int
    crop_pct: float
    interpolation: str
    mean: Triple
    std: Triple

    @classmethod
    def of(cls, test: TestTime) -> "Preprocess":
        """The transform that a manifest row describes."""
        return cls(test.size, test.crop_pct, test.interpolation, test.mean, test.std)

    def __call__(self, picture: PictureSource) -> Tensor:
        """Transforms one picture.

        Args:
            picture: A PIL image of any mode, a path, or an encoded file's bytes.

        Returns:
            float32 [3, size, size], normalised RGB.

        Raises:
            PictureError: It cannot be opened, or is above the pixel limit (see `open_picture`).
        """
        image = self._square(open_picture(picture))
        tensor: Tensor = F.normalize(F.to_tensor(image), list(self.mean), list(self.std))
        return tensor

    def _square(self, image: Image.Image) -> Image.Image:
        short, long = sorted(image.size)
        resized = int(self.size / self.crop_pct)
        mode = InterpolationMode(self.interpolation)
        if resized * int(resized * long / short) > PIXEL_LIMIT:
            # a line of pixels would become a picture of gigabytes: resize only what the crop keeps
            # (equal but for rounding)
            side = short * self.size / resized
            left, top = (image.width - side) / 2, (image.height - side) / 2
            box = (left, top, left + side, top + side)
            return image.resize((self.size, self.size), Image.Resampling[mode.name], box)
        image = F.resize(image, [resized], mode)
        square: Image.Image = F.center_crop(image, [self.size, self.size])
        return square


def preprocess(name: str) -> Preprocess:
    """The test-time transform of a variant, without its model.

    Args:
        name: A variant's key or alias.

    Raises:
        UnknownVariantError: No variant has this name.
    """
    return Preprocess.of(manifest.find(name).test)


def open_picture(picture: PictureSource, *, upright: bool = False) -> Image.Image:
    """Opens a picture as RGB: the first frame, alpha dropped, 16-bit values scaled to 8.

    Args:
        picture: A PIL image of any mode, a path, or an encoded file's bytes.
        upright: Whether to turn it as its EXIF orientation says.

    Raises:
        PictureError: Missing, not a picture, truncated, or above Pillow's own limit of
            `PIL.Image.MAX_IMAGE_PIXELS` (89,478,485) pixels; raise that limit to allow more.
    """
    try:
        image = picture if isinstance(picture, Image.Image) else _open(picture)
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise PictureError(
                f"{_name(picture)} has {image.width} x {image.height} pixels, the limit is {limit:,} "
                "(PIL.Image.MAX_IMAGE_PIXELS, which may be raised)."
            )
        if upright:
            image = ImageOps.exif_transpose(image)
        return _rgb(image)
    except UnidentifiedImageError:
        raise PictureError(f"{_name(picture)} is not a picture that Pillow can read.") from None
    except Image.DecompressionBombError as error:
        raise PictureError(f"{_name(picture)} is too large: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, PictureError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise PictureError(f"{_name(picture)} cannot be read: {reason}") from error


def _open(picture: str | os.PathLike[str] | bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked right after
        return Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip 16-bit values at 255, which leaves a white picture
        values = np.asarray(image)
        if values.size and values.max() > 255:
            image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _name(picture: PictureSource) -> str:
    if isinstance(picture, Image.Image):
        return str(getattr(picture, "filename", "")) or "The PIL image"
    return f"The picture of {len(picture)} bytes" if isinstance(picture, bytes) else str(picture)
