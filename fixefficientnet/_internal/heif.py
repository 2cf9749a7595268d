"""HEIC images, which cameras write and Pillow does not read: by pillow-heif, where it is installed."""

import io
import os
from pathlib import Path

from PIL import Image

from fixefficientnet.errors import ImageError

_HEIC = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
_FIRST_BOX = 256
"""Bytes that a file's first box is looked for in."""
_AVIF = {b"avif", b"avis"}
"""Brands in the first box of a file."""


def open_heif(image: str | os.PathLike[str] | bytes, name: str) -> Image.Image | None:
    """Opens an image that Pillow could not, turned as the file says; None if it is no HEIC image.

    Raises:
        ImageError: It is one, or an AVIF image, and what reads these is not installed; says how to install it.
    """
    if isinstance(image, bytes):
        first = image[:_FIRST_BOX]
    else:
        with Path(image).open("rb") as file:
            first = file.read(_FIRST_BOX)
    if first[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(first[:4], "big"), _FIRST_BOX)
    brands = {first[at : at + 4] for at in (8, *range(16, end, 4))}
    if brands & _AVIF:
        if ".avif" not in Image.registered_extensions():
            raise ImageError(f"{name} is an AVIF image, which Pillow reads since 11.3: pip install -U pillow")
    elif brands & _HEIC:
        try:
            from pillow_heif import HeifImageFile
        except ImportError:
            raise ImageError(f"{name} is an HEIC image, which needs pillow-heif: pip install pillow-heif") from None
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
        opened: Image.Image = HeifImageFile(io.BytesIO(content))  # type: ignore[no-untyped-call]
        return opened
    return None
