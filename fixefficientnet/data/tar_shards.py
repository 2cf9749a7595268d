"""Labelled images in tar files (webdataset's layout), addressed by index.

timm and webdataset read such files as a stream, which knows no index. The files are plain tar, so their headers tell
where each image lies.
"""

import io
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import torch

from fixefficientnet._internal import records
from fixefficientnet._internal.files import check_file
from fixefficientnet.data.files import SUFFIXES
from fixefficientnet.data.names import Names
from fixefficientnet.errors import DataError

_LARGEST = 2**24
"""Most bytes of a file's name or label."""
_CLASSES = 1_000_000
"""Labels are below this: each class has a name in memory."""


class TarShards:
    """One split of a folder of tar files.

    A sample is the files of one tar that share a name up to its first dot: an image, and its class as a number in
    `.cls`, or as "label" in `.json`. The folder has, as a rule, `_info.json` with the files of each split; without it,
    a split is the files with its name in theirs: "imagenet1k-train-0000.tar". Of the names for the split, the first
    that the folder has is taken. An image's name is that of its tar file and its own in it; labels are int32 [n].
    """

    def __init__(self, folder: Path, splits: Sequence[str]):
        self._files = _files(folder, splits)
        rows = array("q")  # of each image: number of the tar file, offset, bytes, class

        def names() -> Iterator[list[str]]:
            for number, path in enumerate(self._files):
                try:
                    yield self._index(number, path, rows)
                except (OSError, tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
                    raise DataError(f"{path} cannot be read: {error}") from error

        self.names = Names(names())
        table = torch.tensor(rows, dtype=torch.int64).view(-1, 4)
        self._places, self.labels = table[:, :3].contiguous(), table[:, 3].int()
        self.classes = [str(label) for label in range(int(self.labels.max()) + 1)] if len(self.names) else []

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        file, offset, size = self._places[index].tolist()
        with self._files[file].open("rb") as stream:
            stream.seek(offset)
            return io.BytesIO(stream.read(size)), int(self.labels[index])

    def filename(self, index: int) -> str:
        """The tar file of an image, and the image's name in it."""
        return self.names[index]

    def _index(self, number: int, path: Path, rows: "array[int]") -> list[str]:
        images: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, int] = {}
        check_file(path)
        with path.open("rb") as file, tarfile.open(fileobj=_Bounded(file), mode="r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                base, _, kind = name.partition(".")
                key, suffix = f"{folder}/{base}", f".{kind.lower()}"
                if not member.isfile():
                    continue
                if member.issparse():
                    raise ValueError(f"{member.name} is a sparse file, which has no place of its own in it")
                if suffix in SUFFIXES:
                    if key in images:
                        raise ValueError(f"{key.strip('/')} has two images: {images[key].name} and {member.name}")
                    images[key] = member
                elif suffix in (".cls", ".json") and (opened := tar.extractfile(member)):
                    _label(member.name, suffix, opened.read(), labels, key)
                tar.members.clear()  # type: ignore[attr-defined]  # else each header stays in memory
        if lacking := sorted(images.keys() ^ labels.keys()):
            raise ValueError(f"{lacking[0].strip('/')} has an image or a class, but not both")
        for key, member in images.items():
            rows.extend((number, member.offset_data, member.size, labels[key]))
        return [f"{path.name}/{member.name}" for member in images.values()]


class _Bounded(io.RawIOBase):
    """A file of which nobody reads much at a time: tarfile takes a header at its word, of gigabytes for a name."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= _LARGEST:
            raise tarfile.ReadError(f"a name or a label in it has {size:,} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _label(name: str, suffix: str, text: bytes, labels: dict[str, int], key: str) -> None:
    """Notes the label that a member of a tar file tells; `.cls` goes before `.json`."""
    if suffix == ".json":
        record = records.decode(text)
        if not (isinstance(record, dict) and "label" in record):
            return
        label = record["label"]
    else:
        label = int(text)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < _CLASSES:
        raise ValueError(f"{name} has the label {str(label)[:40]}, which must be a whole number from 0 on")
    if suffix == ".cls":
        labels[key] = label
    else:
        labels.setdefault(key, label)


def _files(folder: Path, splits: Sequence[str]) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} of tar files. --data wds/NAME takes it as --data-root.")
    listing = folder / "_info.json"
    if listing.exists():
        try:
            found: dict[str, dict[str, list[str]]] = records.decode_file(listing)["splits"]
            names = {name: [str(file) for file in split["filenames"]] for name, split in found.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{listing} is damaged: {error!r}") from error
    else:
        names = {}
        for split in splits:
            names[split] = [path.name for path in sorted(folder.glob("*.tar")) if split in path.stem.split("-")]
    for split in splits:
        if names.get(split):
            files = [folder / name for name in names[split]]
            for path in files:
                if not path.resolve().is_relative_to(folder.resolve()):
                    raise DataError(f"{listing} names {path}, which is outside of its folder.")
            return files
    raise DataError(f"{folder} has no tar files of a split {splits[0]!r} (nor {', '.join(splits[1:]) or 'another'}).")
