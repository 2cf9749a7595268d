"""From a picture to the network's input."""

import io
import os
import warnings
from dataclasses import asdict

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fixefficientnet import manifest
from fixefficientnet.errors import PictureError
from fixefficientnet.manifest import TestTime

PIXEL_LIMIT = 2**27
"""Above so many pixels after resizing (a very narrow picture), only the part that the crop keeps is resized."""

PictureSource = Image.Image | str | os.PathLike[str] | bytes


class Preprocess(TestTime):
    """The test-time transform of the released FixEfficientNet evaluation, as a callable.

    Resize the shorter side to `int(size / crop_pct)` with Pillow, centre crop, scale to [0, 1], normalise.
    A picture is never turned by its EXIF orientation, as in the original.
    """

    @classmethod
    def of(cls, test: TestTime) -> "Preprocess":
        """The transform that a manifest row describes."""
        return cls(**asdict(test))

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
        TypeError: It is none of these.
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
        if not (image.width and image.height):
            raise PictureError(f"{_name(picture)} has no pixels.")
        return _rgb(_upright(image) if upright else image)
    except UnidentifiedImageError:
        raise PictureError(f"{_name(picture)} is not a picture that Pillow can read.") from None
    except Image.DecompressionBombError as error:
        raise PictureError(f"{_name(picture)} is too large: {error}") from None
    except (PictureError, MemoryError, TypeError):
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise PictureError(f"{_name(picture)} cannot be read: {reason}") from error


def _open(picture: str | os.PathLike[str] | bytes) -> Image.Image:
    if not isinstance(picture, str | bytes | os.PathLike):
        raise TypeError(f"A picture is a PIL image, a path or an encoded file's bytes, not {type(picture).__name__}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked right after
        return Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # what is wrong with the pixels shows here, what follows is about the EXIF data alone
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data is no reason to refuse sound pixels
        return image


def _rgb(image: Image.Image) -> Image.Image:
    """As Pillow converts, but for 16-bit values, which it clips at 255: that leaves a white picture."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "I" and (values := np.asarray(image)).max() > 255:  # 32 bits wide, files fill 16 of them
        image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _name(picture: PictureSource) -> str:
    if isinstance(picture, Image.Image):
        return str(getattr(picture, "filename", "")) or "The PIL image"
    return f"The picture of {len(picture)} bytes" if isinstance(picture, bytes) else str(picture)
