"""Colours as an image's embedded profile means them: ICC profiles to sRGB."""

import functools
import io
import itertools
from typing import Any

from PIL import Image, ImageCms

_MODES = {
    "RGB": ("RGB", {"RGB", "RGBA", "RGBX", "P", "PA"}),
    "CMYK": ("CMYK", {"CMYK"}),
    "GRAY": ("L", {"L", "LA", "1"}),
}
"""What profiles are of: the mode that they convert from, and the modes that are converted to it first."""
_NO_CACHE: Any = 0x40
"""lcms's cmsFLAGS_NOCACHE, which Pillow names since 10.2."""
_NEARLY = 2
"""A profile that changes no value of 255 by more than this is sRGB's, as cameras and programs each write it."""


def to_srgb(image: Image.Image) -> Image.Image:
    """An image of 8 bits per channel with its colours in sRGB, where an embedded profile says that they are not.

    A profile that is damaged, or of another kind of image, is ignored.
    """
    profile = image.info.get("icc_profile")
    if not profile or not isinstance(profile, bytes):
        return image
    found = _transform(profile)
    if found is None or image.mode not in _MODES[found[0]][1]:
        return image
    space, transform = found
    converted = ImageCms.applyTransform(image.convert(_MODES[space][0]), transform)
    return image if converted is None else converted


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """The kind of a profile, and what takes its colours to sRGB's; None if it is damaged, or sRGB's."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        # several threads share it, which its cache of one pixel does not allow
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), _MODES[space][0], "RGB", flags=_NO_CACHE
        )
        if space == "RGB":
            colours = bytes(itertools.chain.from_iterable(itertools.product(range(0, 256, 51), repeat=3)))
            plain = Image.frombytes("RGB", (len(colours) // 3, 1), colours)
            there = ImageCms.applyTransform(plain, transform)
            if there is None or max(abs(a - b) for a, b in zip(there.tobytes(), colours, strict=True)) <= _NEARLY:
                return None
    except Exception:  # of a damaged profile; Pillow raises several kinds
        return None
    return space, transform
