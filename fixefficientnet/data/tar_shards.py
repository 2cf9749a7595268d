"""Labelled images in tar files (webdataset's layout), addressed by index.

timm and webdataset read such files as a stream, which knows no index. The files are plain tar, so their headers tell
where each image lies.
"""

import io
import json
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fixefficientnet._internal.files import check_file
from fixefficientnet.data.files import SUFFIXES
from fixefficientnet.data.names import Names
from fixefficientnet.errors import DataError


class TarShards:
    """One split of a folder of tar files.

    A sample is the files of one tar that share a name up to its first dot: an image, and its class as a number in
    `.cls`, or as "label" in `.json`.

    Args:
        folder: Folder of the tar files and, as a rule, of `_info.json` with the files of each split.
        splits: Names for the split; the first that the folder has is taken. Without `_info.json` a split is
            the files with its name in theirs: "imagenet1k-train-0000.tar".

    Attributes:
        names: The tar file of each image, and the image's name in it.
        labels: Class of each image; int32 [n].

    Raises:
        DataError: There is no such split, a file is damaged, or a sample lacks its image or label.
    """

    def __init__(self, folder: Path, splits: Sequence[str]):
        self._files = _files(folder, splits)
        rows = array("q")  # of each image: number of the tar file, offset, bytes, class

        def names() -> Iterator[list[str]]:
            for number, path in enumerate(self._files):
                try:
                    yield self._index(number, path, rows)
                except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
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
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                base, _, kind = name.partition(".")
                key, suffix = f"{folder}/{base}", f".{kind.lower()}"
                if not member.isfile():
                    continue
                if suffix in SUFFIXES:
                    images[key] = member
                elif suffix in (".cls", ".json") and (file := tar.extractfile(member)):
                    text = file.read()
                    record = json.loads(text) if suffix == ".json" else None
                    if suffix == ".cls":
                        labels[key] = int(text)
                    elif isinstance(record, dict) and "label" in record:
                        labels.setdefault(key, int(record["label"]))
                tar.members.clear()  # type: ignore[attr-defined]  # else each header stays in memory
        if lacking := sorted(images.keys() ^ labels.keys()):
            raise ValueError(f"{lacking[0].strip('/')} has an image or a class, but not both")
        for key, member in images.items():
            rows.extend((number, member.offset_data, member.size, labels[key]))
        return [f"{path.name}/{member.name}" for member in images.values()]


def _files(folder: Path, splits: Sequence[str]) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} of tar files. --data wds/NAME takes it as --data-root.")
    listing = folder / "_info.json"
    if listing.exists():
        try:
            names = {name: [str(file) for file in split["filenames"]] for name, split in _splits(listing).items()}
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


def _splits(listing: Path) -> dict[str, dict[str, list[str]]]:
    check_file(listing)
    record = json.loads(listing.read_text(encoding="utf-8"))
    splits: dict[str, dict[str, list[str]]] = record["splits"]
    return splits
