"""Which files of a folder are images, and which are nobody's. Imports no torch."""

import os
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .heic .heif .hif .avif .jp2 .ppm .pgm .pbm".split()
)
"""Endings of images, in any case. What an image is, its bytes say."""
_ENDINGS = tuple(sorted(SUFFIXES, key=lambda ending: (ending not in (".jpg", ".jpeg", ".png"), ending)))
_LITTER = frozenset(("@eadir", "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini"))
"""What file managers and network storage leave in folders, besides hidden files."""


def is_image(name: str) -> bool:
    """Whether a file is one of the images, by the ending of its name."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 - of a million names


def entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What lies in a folder, in no order; not what is hidden (`.ipynb_checkpoints`), or left by other programs."""
    with os.scandir(folder) as found:
        return [one for one in found if not (one.name.startswith(".") or one.name.lower() in _LITTER)]


def images_and_others(folder: str | os.PathLike[str]) -> tuple[list[str], list[os.DirEntry[str]]]:
    """Names of the images in a folder, not in its folders, and the rest of its `entries`."""
    images, others = [], []
    for one in entries(folder):  # of a million: a quick test of names that begin with no dot
        if one.name.lower().endswith(_ENDINGS) and not one.is_dir():
            images.append(one.name)
        else:
            others.append(one)
    return images, others


def below(folder: str | os.PathLike[str], _above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Paths of all files in a folder and its folders, in no order, but for what `entries` leaves out."""
    status = Path(folder).stat()
    here = status.st_dev, status.st_ino
    if here in _above:  # a link to a folder that it lies in
        return
    for one in entries(folder):
        if one.is_dir():
            yield from below(one.path, _above | {here})
        else:
            yield one.path
