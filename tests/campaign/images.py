"""Images that are damaged, hostile or far too large."""

import contextlib
import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms, features

from campaign.bombs import limited_memory
from campaign.mutations import mutated
from campaign.trial import Attempt, Finding, Outcome, Trial, outcome_of
from fixefficientnet.preprocessing import open_image, orientation

_SIZE = (41, 30)


def _pixels(mode: str) -> Image.Image:
    rng = np.random.default_rng(0)
    grid = np.add.outer(np.arange(_SIZE[1]), np.arange(_SIZE[0]))[..., None] * 3 + rng.integers(0, 60, (30, 41, 3))
    image = Image.fromarray((grid % 256).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((grid[..., 0] * 200).astype(np.uint16))
    return image.convert(mode)


def _saved(mode: str, kind: str, **options: Any) -> bytes:
    made = io.BytesIO()
    _pixels(mode).save(made, kind, **options)
    return made.getvalue()


def _exif() -> bytes:
    exif = Image.Exif()
    exif[274], exif[270], exif[306] = 6, "a camera", "2026:11:27 00:00:00"
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a remark"
    exif.get_ifd(0x8825)[1] = "N"
    return exif.tobytes()


def _icc() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _files() -> dict[str, bytes]:
    """A file of each format and kind that Pillow here writes and reads."""
    frames = {"save_all": True, "append_images": [_pixels("RGB").rotate(90 * n) for n in (1, 2)]}
    wanted: dict[str, tuple[str, str, dict[str, Any]]] = {
        "jpeg": ("RGB", "JPEG", {"quality": 90, "exif": _exif(), "icc_profile": _icc()}),
        "jpeg, progressive": ("RGB", "JPEG", {"progressive": True}),
        "jpeg, grey": ("L", "JPEG", {}),
        "jpeg, cmyk": ("CMYK", "JPEG", {}),
        "png": ("RGB", "PNG", {"exif": _exif(), "icc_profile": _icc()}),
        "png, alpha": ("RGBA", "PNG", {}),
        "png, palette": ("P", "PNG", {"transparency": 3}),
        "png, 16 bits": ("I;16", "PNG", {}),
        "png, animated": ("RGB", "PNG", frames),
        "webp": ("RGB", "WEBP", {"exif": _exif(), "icc_profile": _icc()}),
        "webp, lossless": ("RGBA", "WEBP", {"lossless": True}),
        "webp, animated": ("RGB", "WEBP", frames),
        "gif": ("P", "GIF", {}),
        "gif, animated": ("RGB", "GIF", frames),
        "bmp": ("RGB", "BMP", {}),
        "bmp, palette": ("P", "BMP", {}),
        "tiff": ("RGB", "TIFF", {"icc_profile": _icc()}),
        "tiff, lzw": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        "tiff, deflate": ("RGBA", "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tiff, jpeg": ("RGB", "TIFF", {"compression": "jpeg"}),
        "tiff, fax": ("1", "TIFF", {"compression": "group4"}),
        "tiff, 16 bits": ("I;16", "TIFF", {}),
        "mpo": ("RGB", "MPO", frames | {"exif": _exif()}),
        "ico": ("RGBA", "ICO", {"sizes": [(16, 16), (32, 24)]}),
        "ppm": ("RGB", "PPM", {}),
        "pgm": ("L", "PPM", {}),
        "tga": ("RGB", "TGA", {"compression": "tga_rle"}),
        "sgi": ("RGB", "SGI", {}),
        "pcx": ("RGB", "PCX", {}),
        "dds": ("RGB", "DDS", {}),
    }
    if features.check("jpg_2000"):
        wanted["jpeg 2000"] = ("RGB", "JPEG2000", {})
    if features.check("avif"):
        wanted["avif"] = ("RGB", "AVIF", {"exif": _exif()})
    found = {name: _saved(mode, kind, **options) for name, (mode, kind, options) in wanted.items()}
    with contextlib.suppress(ImportError, RuntimeError):
        import pillow_heif

        found["heic"] = _heic(pillow_heif)
    return found


def _heic(pillow_heif: Any) -> bytes:
    made = io.BytesIO()
    pillow_heif.from_pillow(_pixels("RGB")).save(made, quality=80)
    return made.getvalue()


def _as_pillow_does(data: bytes, kind: str) -> Image.Image:
    """What Pillow alone makes of a file."""
    if kind == "heic":
        from pillow_heif import HeifImageFile

        with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
        return HeifImageFile(io.BytesIO(data)).convert("RGB")
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.convert("RGB") if image.mode not in ("I", "F") and "16" not in image.mode else image.copy()


def _same(found: Any, data: bytes, kind: str) -> bool:
    usual = _as_pillow_does(data, kind)
    if kind == "tiff, fax":  # of a damaged one, libtiff leaves what was in the memory
        return bool(found.size == usual.size)
    if found.mode != "RGB" or found.size != usual.size:
        return False
    return usual.mode != "RGB" or np.array_equal(np.asarray(found), np.asarray(usual))


@contextlib.contextmanager
def _damaged(shared: Path) -> Iterator[Attempt]:
    """A damaged image is refused, or has the pixels that Pillow itself gives."""
    files = _files()

    def attempt(rng: random.Random, folder: Path) -> Finding:
        warnings.simplefilter("ignore")
        kind = rng.choice([*files])
        data = files[kind]
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            data = mutated(data, rng) or b"\0"
        path = folder / "image"
        path.write_bytes(data)
        source = path if rng.random() < 0.5 else data
        with limited_memory():
            finding = outcome_of(lambda: open_image(source), lambda found: _same(found, data, kind))
            if finding.outcome is Outcome.SURVIVED:  # nothing in its metadata may be in the way
                finding = outcome_of(
                    lambda: open_image(source, upright=True, srgb=True).size,
                    lambda size: sorted(cast(Any, size)) == sorted(_as_pillow_does(data, kind).size),
                )
        return Finding(finding.outcome, f"{kind}: {finding.said}")

    yield attempt


@contextlib.contextmanager
def _metadata(shared: Path) -> Iterator[Attempt]:
    """Sound pixels with damaged EXIF data, XMP or colour profile are the same pixels."""
    exif, icc, usual = _exif(), _icc(), _pixels("RGB")
    kinds = ["PNG", "WEBP", "TIFF", "JPEG"]

    def attempt(rng: random.Random, folder: Path) -> Finding:
        warnings.simplefilter("ignore")
        made, kind = io.BytesIO(), rng.choice(kinds)
        options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
        part = rng.choice(["exif", "icc_profile"])
        changed = mutated(exif if part == "exif" else icc, rng)
        if part == "exif" and not changed.startswith(b"Exif\0\0"):
            changed = b"Exif\0\0" + changed[6:]
        if part == "exif" and rng.random() < 0.2:  # a directory that comes after itself
            changed = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHLL", 0x8769, 4, 1, 8) + struct.pack("<L", 8)
        try:
            usual.save(made, kind, **options, **{part: changed})
        except Exception:  # Pillow does not write it
            return Finding(Outcome.REFUSED, "not written")
        data = made.getvalue()

        def right(found: Any) -> bool:
            if not _same(found, data, kind):
                return False
            turned = open_image(data, upright=True)
            return in_size(turned) and orientation(turned) == 1

        def in_size(found: Any) -> bool:
            return sorted(found.size) == sorted(_SIZE)  # a TIFF file Pillow turns itself

        with limited_memory():
            finding = outcome_of(lambda: open_image(data), right)
            if finding.outcome is Outcome.SURVIVED:
                finding = outcome_of(lambda: open_image(data, srgb=True), in_size)
        return Finding(finding.outcome, f"{kind}, {part}: {finding.said}")

    yield attempt


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, *chunks: bytes, depth: int = 1, colour: int = 0) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    rows = zlib.compress(bytes(min(height, 2000) * (min(width, 2**17) // 8 + 1)), 9)
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _tiff(entries: list[tuple[int, int, int, int]], after: int = 0, more: bytes = b"") -> bytes:
    body = b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + struct.pack("<L", after) + more


def _large_tiff(width: int = 50_000, height: int = 50_000, compression: int = 8) -> bytes:
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1)]
    return _tiff([*tags, (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 100)])


def _gif(width: int, height: int, frames: int) -> bytes:
    frame = b"\x21\xf9\x04\0\0\0\0\0" + b"\x2c\0\0\0\0" + struct.pack("<HH", width, height) + b"\0\x02\x02\x4c\x01\0"
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(3) + b"\xff" * 3 + frame * frames + b";"


def _webp(width: int, height: int) -> bytes:
    lossless = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(50)
    body = b"WEBPVP8L" + struct.pack("<I", len(lossless)) + lossless
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _jpeg(width: int, height: int) -> bytes:
    data = bytearray(_saved("L", "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _ico(inner: bytes) -> bytes:
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHLL", 0, 0, 0, 0, 1, 32, len(inner), 22) + inner


def _deflated(size: int) -> bytes:
    made = zlib.compressobj(9)
    return b"".join([*(made.compress(bytes(2**20)) for _ in range(size // 2**20)), made.flush()])


_BOMBS: dict[str, Callable[[], bytes]] = {
    "png of 50,000": lambda: _png(50_000, 50_000),
    "png of 2^31": lambda: _png(2**31 - 1, 2**31 - 1)[:100],
    "png of 9,400, colours": lambda: _png(9_400, 9_400, depth=8, colour=2),
    "png with a profile of 1 GB": lambda: _png(9, 9, _chunk(b"iCCP", b"x\0\0" + _deflated(2**30))),
    "png with text of 1 GB": lambda: _png(9, 9, _chunk(b"zTXt", b"x\0\0" + _deflated(2**30))),
    "png with 500 texts": lambda: _png(9, 9, *[_chunk(b"zTXt", b"x%d\0\0" % n + _deflated(2**20)) for n in range(500)]),
    "png, animated, of 2^31 frames": lambda: _png(9, 9, _chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
    "tiff of 50,000": _large_tiff,
    "tiff of 2^32": lambda: _large_tiff(2**32 - 1, 2**32 - 1, 1),
    "tiff of 9,000, lzw": lambda: _large_tiff(9_000, 9_000, 5),
    "tiff that comes after itself": lambda: _tiff([(256, 4, 1, 4)], after=8),
    "tiff of a tag of 4 GB": lambda: _tiff([(256, 4, 1, 4), (257, 4, 1, 4), (34675, 7, 2**32 - 1, 30)]),
    "tiff of 60,000 tags": lambda: _tiff([(n, 4, 1, n) for n in range(60_000)]),
    "gif of 65,535": lambda: _gif(65_535, 65_535, 1),
    "gif of 100,000 frames": lambda: _gif(9, 9, 100_000),
    "gif of 9,000 and 1,000 frames": lambda: _gif(9_000, 9_000, 1_000),
    "webp of 16,384": lambda: _webp(16_384, 16_384),
    "jpeg of 65,535": lambda: _jpeg(65_535, 65_535),
    "jpeg of 9,000": lambda: _jpeg(9_000, 9_000),
    "ico of a png of 50,000": lambda: _ico(_png(50_000, 50_000)),
    "ico of a bmp of 50,000": lambda: _ico(struct.pack("<LllHHLLllLL", 40, 50_000, 100_000, 1, 32, 0, 0, 0, 0, 0, 0)),
    "bmp of 2^31": lambda: (
        b"BM" + struct.pack("<LLL", 100, 0, 54) + struct.pack("<LllHH", 40, 2**31 - 1, 2**31 - 1, 1, 24)
    ),
    "ppm of 50,000": lambda: b"P6 50000 50000 255\n" + bytes(1000),
    "ppm of a long number": lambda: b"P6 " + b"9" * 10**6 + b" 1 255\n",
    "ppm of a comment without end": lambda: b"P6 #" + b"x" * 10**7,
    "xbm of 50,000": lambda: b"#define x_width 50000\n#define x_height 50000\nstatic char x_bits[] = {\n",
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/x) (w) file\n",
    "postscript in binary": lambda: b"\xc5\xd0\xd3\xc6" + struct.pack("<6L", 30, 200, 0, 0, 0, 0) + b"%!PS-Adobe-3.0\n",
    "heic of no more": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + struct.pack(">I", 2**31) + b"meta",
    "avif of no more": lambda: b"\0\0\0\x1cftypavif\0\0\0\0mif1avifmiaf" + struct.pack(">I", 2**31) + b"meta",
}


@contextlib.contextmanager
def _bombs(shared: Path) -> Iterator[Attempt]:
    """Small files of huge images, or of endless parts: refused, or opened, within 2 GB and some seconds."""
    for number, make in enumerate(_BOMBS.values()):
        (shared / str(number)).write_bytes(make())

    def attempt(rng: random.Random, folder: Path) -> Finding:
        warnings.simplefilter("ignore")
        kind = rng.choice([*_BOMBS])
        path = shared / str([*_BOMBS].index(kind))
        options = {"upright": rng.random() < 0.5, "srgb": rng.random() < 0.5}
        source = path if rng.random() < 0.5 else path.read_bytes()
        with limited_memory(2 * 2**30):
            finding = outcome_of(lambda: open_image(source, **options).mode, lambda mode: mode == "RGB")
        if "postscript" in kind and finding.outcome is not Outcome.REFUSED:
            finding = Finding(Outcome.SILENT, "PostScript was opened")
        return Finding(finding.outcome, f"{kind}: {finding.said}")

    yield attempt


TRIALS = [
    Trial("damaged images", 2500, 60, _damaged, limit=20),
    Trial("images with damaged metadata", 500, 30, _metadata, limit=20),
    Trial("images that would fill the memory", 150, 3, _bombs, limit=60),
]
