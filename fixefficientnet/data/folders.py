"""Images in files: a folder per class, or one folder with a file of labels; which of them are left out."""

import fnmatch
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fixefficientnet._internal.checkpoint_file import listed
from fixefficientnet.data import files, labels
from fixefficientnet.errors import DataError

TRAIN, VALIDATION = "train", "validation"
SYNONYMS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("val", "valid", "validation", "eval", "evaluation"),
}
VALIDATION_SHARE = 0.2
"""Share of each class's images that validates where a folder has no splits."""


@dataclass(frozen=True)
class ImageFiles:
    """Images in the files of a folder, each of one class.

    Attributes:
        root: The folder.
        samples: Path and class of each image.
        classes: Names of the classes.
        left_out: Names of the files beside the images that are none by their endings.
        excluded: Number of images that were left out because it was asked for; None: it was not.
    """

    root: str
    samples: list[tuple[str, int]]
    classes: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    excluded: int | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        path, label = self.samples[index]
        with open(path, "rb") as file:
            return file.read(), label

    def filename(self, index: int) -> str:
        """The path of an image in the folder."""
        return _inside(self.samples[index][0], self.root)


@dataclass(frozen=True)
class Exclusion:
    """Images to leave out.

    Attributes:
        pattern: Matches what is left out, of paths with slashes; None: nothing is.
        names: Paths that are left out.
        data: The folder that paths may begin in.
    """

    pattern: re.Pattern[str] | None
    names: frozenset[str]
    data: str

    @classmethod
    def of(cls, given: Sequence[str], data: Path) -> "Exclusion":
        """Reads the values of `--exclude`.

        Args:
            given: Glob patterns of paths, or of names where they have no slash; or text files with one path in each
                line. Paths begin in the data folder or in the split's.
            data: The data folder.

        Raises:
            DataError: A text file is not there, or cannot be read.
        """
        patterns, names = [], set()
        for one in given:
            if os.path.isfile(one) and not files.is_image(one):
                names |= {labels.normal(line) for line in labels.lines(Path(one)) if line.strip()}
            elif not (glob.has_magic(one) or files.is_image(one)):
                raise DataError(f"--exclude {one}: there is no such file, and it is no pattern and no image's name.")
            else:
                patterns.append(fnmatch.translate(one if "/" in one else f"*/{one}"))
        return cls(re.compile("|".join(patterns)) if patterns else None, frozenset(names), str(data))

    def __bool__(self) -> bool:
        return bool(self.pattern or self.names)

    def leaves_out(self, path: str, root: str) -> bool:
        """Whether an image is left out, by its path and that of the split's folder."""
        for folder in {root, self.data}:
            name = _inside(path, folder).replace(os.sep, "/")
            if name in self.names or (self.pattern and (self.pattern.match(name) or self.pattern.match(f"/{name}"))):
                return True
        return False


def without(source: ImageFiles, exclusion: Exclusion) -> ImageFiles:
    """The images that are not left out; a class none of whose images remains is left out too."""
    if not exclusion:
        return source
    kept = [sample for sample in source.samples if not exclusion.leaves_out(sample[0], source.root)]
    there = sorted({label for _, label in kept})
    number = {label: index for index, label in enumerate(there)}
    return replace(
        source,
        samples=[(path, number[label]) for path, label in kept],
        classes=tuple(source.classes[label] for label in there),
        excluded=len(source.samples) - len(kept),
    )


def split_folder(folder: Path, split: str, *, may_be_whole: bool, labelled: bool = False) -> Path:
    """The folder of a split, or the data folder itself where it holds the classes' folders or labelled images.

    Raises:
        DataError: There is no such folder, or no such split in it.
    """
    if not folder.is_dir():
        or_whole = ", or of classes' folders" if may_be_whole else ""
        raise DataError(f"There is no folder {folder}. --data takes one with {split}/ in it{or_whole}.")
    candidates = SYNONYMS.get(split, (split,))
    inside = files.entries(folder)
    there = sorted(one.name for one in inside if one.is_dir())
    splits = [name for name in there if name in {"test", *SYNONYMS[TRAIN], *SYNONYMS[VALIDATION]}]
    flat_split = labelled or len(splits) == len(there)  # else a class may be called train, beside others
    for name in candidates:
        if name in there and (flat_split or any(one.is_dir() for one in files.entries(folder / name))):
            return folder / name
    holds_classes = any(one.is_dir() for name in splits for one in files.entries(folder / name))
    if may_be_whole and (there or labelled) and not holds_classes:
        return folder
    nested = (one.is_dir() for name in there for one in files.entries(folder / name))
    if synonym_of(split) and len(splits) < len(there) and "test" not in splits and not any(nested):
        return folder
    flat = any(files.is_image(one.name) for one in inside)
    hint = " Of images without folders of classes, --labels FILE tells the classes." if flat and not there else ""
    raise DataError(
        f"{folder} has no folder {candidates[0]}/ (nor {', '.join(candidates[1:]) or 'another name for it'}). "
        f"It has: {listed(there) or 'no folder at all'}.{hint}"
    )


def synonym_of(split: str) -> str:
    """TRAIN or VALIDATION, if a split's name means one of them; else empty."""
    return next((name for name, synonyms in SYNONYMS.items() if split in synonyms), "")


def automatic_split(samples: Sequence[tuple[str, int]], folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Splits a folder of classes into training and validation images.

    About `VALIDATION_SHARE` of each class's images validates, at least one, and at least one trains. The sha256 of an
    image's name with its class's folder decides, so that the split is the same in every run and on every machine;
    images that are added later move no other one, but for a class's only validation image.

    Args:
        samples: Path and class of each image.
        folder: The folder that the classes' folders are in.

    Raises:
        DataError: A class has one image only.
    """
    classes: dict[int, list[str]] = {}
    for path, label in samples:
        classes.setdefault(label, []).append(path)
    validation: set[str] = set()
    for paths in classes.values():
        if len(paths) < 2:
            raise DataError(
                f"{folder} has no train/ and val/, and its class {Path(paths[0]).parent.name} has one image: splitting "
                "it needs two."
            )
        drawn = sorted((_draw(Path(path).relative_to(folder).as_posix()), path) for path in paths)
        inside = sum(number < VALIDATION_SHARE for number, _ in drawn)
        validation.update(path for _, path in drawn[: min(max(1, inside), len(drawn) - 1)])
    return {
        TRAIN: [sample for sample in samples if sample[0] not in validation],
        VALIDATION: [sample for sample in samples if sample[0] in validation],
    }


def _draw(name: str) -> float:
    """A number in [0, 1) that is a function of a name."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def open_classes(folder: Path) -> ImageFiles:
    """Opens a folder of one folder per class; classes and images are in natural order, 2 before 10.

    Raises:
        DataError: A class has no images, or an image is in no class's folder.
    """
    found: list[tuple[str, str]] = []
    strays: list[str] = []
    left_out: list[str] = []
    empty = []
    for one in files.entries(folder):
        if one.is_dir():
            there = len(found)
            for path, nested in _files_of_class(one.path):
                if not files.is_image(path):
                    left_out.append(path)
                elif nested:
                    strays.append(path)
                else:
                    found.append((path, one.name))
            empty += [one.name] * (len(found) == there)
        elif files.is_image(one.name):
            strays.append(one.path)
    if not found and not strays:
        raise DataError(f"{folder} holds no images.")
    if strays:
        raise DataError(
            f"{min(strays)} is in no class's folder. {folder} takes one folder per class, with images directly in it."
        )
    if empty:
        raise DataError(
            f"The class {min(empty)} has no images in {folder / min(empty)}: add some, or remove the folder."
        )
    return _in_files(folder, found, left_out)


def _files_of_class(folder: str) -> Iterator[tuple[str, bool]]:
    """Path of each file in a folder, and whether it is in a further folder there."""
    for one in files.entries(folder):
        if one.is_dir():
            yield from ((path, True) for path in files.below(one.path))
        else:
            yield one.path, False


def open_labelled(folder: Path, file: Path, exclusion: Exclusion) -> ImageFiles:
    """Opens a folder of images whose classes a file tells; they are the file's labels, in natural order.

    Args:
        folder: The folder; images may be in folders within it.
        file: The labels, see `labels.read`.
        exclusion: Images that are left out; what the file says of them is not read.

    Raises:
        DataError: The file cannot be read, or is not about all of these images and no others.
    """
    root, images, excluded, left_out = str(folder), {}, [], []
    for path in files.below(folder):
        name = _inside(path, root).replace(os.sep, "/")
        if not files.is_image(path):
            left_out += [path] * (os.path.realpath(path) != os.path.realpath(file))
        elif exclusion.leaves_out(path, root):
            excluded.append(name)
        else:
            images[name] = path
    if not images:
        raise DataError(f"{folder} holds no images.")
    label_of = labels.read(file, folder, sorted(images), excluded)
    found = [(path, label_of[name]) for name, path in images.items()]
    return replace(_in_files(folder, found, left_out), excluded=len(excluded) if exclusion else None)


def _in_files(folder: Path, found: Sequence[tuple[str, str]], left_out: Sequence[str]) -> ImageFiles:
    """Images by path and class, in order."""
    root = str(folder)
    classes = tuple(sorted({name for _, name in found}, key=_in_order))
    number = {name: index for index, name in enumerate(classes)}
    samples = sorted(((path, number[name]) for path, name in found), key=lambda one: _in_order(_inside(one[0], root)))
    return ImageFiles(root, samples, classes, tuple(sorted(_inside(path, root) for path in left_out)))


def _inside(path: str, folder: str) -> str:
    """A path without the folder that it begins with."""
    return path.removeprefix(folder).lstrip(os.sep) if path.startswith(folder) else path


def _in_order(name: str) -> tuple[list[str | int], str]:
    """A key that sorts 2 before 10, and names that differ in case or leading zeros always alike."""
    parts: list[str | int] = [*re.split(r"(\d+)", name.lower())]
    parts[1::2] = map(int, parts[1::2])
    return parts, name
