"""Images in files: a folder per class, or one folder with a file of labels; which of them are left out.

What is refused is a DataError.
"""

import fnmatch
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fixefficientnet._internal.checkpoint_file import listed
from fixefficientnet._internal.files import check_file
from fixefficientnet.data import files, labels
from fixefficientnet.data.names import Names, in_natural_order, natural
from fixefficientnet.errors import DataError

Array = np.ndarray[Any, Any]

TRAIN, VALIDATION = "train", "validation"
SYNONYMS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("val", "valid", "validation", "eval", "evaluation"),
}
VALIDATION_SHARE = 0.2
"""Share of each class's images that validates where a folder has no splits."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images in the files of a folder: their paths in it, and the class of each (int32 [n]).

    `left_out` names the files beside the images that are none by their endings; `excluded` is the number of images that
    were left out because it was asked for; None: it was not.
    """

    root: str
    names: Names
    labels: Tensor
    classes: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    excluded: int | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        check_file(path := self.path(index))
        with open(path, "rb") as file:
            return file.read(), int(self.labels[index])

    def filename(self, index: int) -> str:
        """The path of an image in the folder."""
        return self.names[index]

    def path(self, index: int) -> str:
        """The path of an image."""
        return os.path.join(self.root, self.names[index])

    def where(self, kept: Array) -> "ImageFiles":
        """Some of the images; bool [n] tells which."""
        return replace(self, names=Names.of(compress(self.names, kept)), labels=self.labels[torch.from_numpy(kept)])


@dataclass(frozen=True)
class Exclusion:
    """Images to leave out, by a pattern of paths with slashes, and by paths; either may begin in the folder `data`."""

    pattern: re.Pattern[str] | None
    names: frozenset[str]
    data: str

    @classmethod
    def of(cls, given: Sequence[str], data: Path) -> "Exclusion":
        """Reads the values of `--exclude`.

        These are glob patterns of paths, or of names where they have no slash; or text files with one path in each
        line. Paths begin in the data folder or in the split's.
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

    def leaves_out(self, name: str, root: str) -> bool:
        """Whether an image is left out, by its path in the split's folder, and the path of that."""
        for folder in {"", _inside(root, self.data)}:
            path = os.path.join(folder, name).replace(os.sep, "/")
            if path in self.names or (self.pattern and (self.pattern.match(path) or self.pattern.match(f"/{path}"))):
                return True
        return False


def without(source: ImageFiles, exclusion: Exclusion) -> ImageFiles:
    """The images that are not left out; a class none of whose images remains is left out too."""
    if not exclusion:
        return source
    left_out = np.fromiter((exclusion.leaves_out(name, source.root) for name in source.names), bool, len(source))
    kept = source.where(~left_out)
    there, numbers = torch.unique(kept.labels, return_inverse=True)
    return replace(
        kept,
        labels=numbers.int(),
        classes=tuple(source.classes[label] for label in there),
        excluded=int(left_out.sum()),
    )


def split_folder(folder: Path, split: str, *, may_be_whole: bool, labelled: bool = False) -> Path:
    """The folder of a split, or the data folder itself where it holds the classes' folders or labelled images."""
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


def automatic_split(source: ImageFiles) -> dict[str, ImageFiles]:
    """Splits a folder of classes into training and validation images.

    About `VALIDATION_SHARE` of each class's images validates, at least one, and at least one trains. The sha256 of an
    image's name with its class's folder decides, so that the split is the same in every run and on every machine;
    images that are added later move no other one, but for a class's only validation image.
    """
    labels = source.labels.numpy()
    images = np.bincount(labels)
    if alone := [source.classes[label] for label in labels[images[labels] < 2]]:
        raise DataError(
            f"{source.root} has no train/ and val/, and its class {alone[0]} has one image: splitting it needs two."
        )
    drawn = np.fromiter(map(_draw, source.names), float, len(source))
    inside = np.bincount(labels[drawn < VALIDATION_SHARE], minlength=len(images))
    ranked = np.lexsort((drawn, labels))  # by class, and in it as they are drawn
    rank = np.empty(len(source), int)
    rank[ranked] = np.arange(len(source)) - np.repeat(np.cumsum(images) - images, images)
    validates = rank < np.clip(inside, 1, images - 1)[labels]
    return {TRAIN: source.where(~validates), VALIDATION: source.where(validates)}


def _draw(name: str) -> float:
    """A number in [0, 1) that is a function of a name."""
    digest = hashlib.sha256(name.replace(os.sep, "/").encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def open_classes(folder: Path) -> ImageFiles:
    """Opens a folder of one folder per class; classes and images are in natural order, 2 before 10.

    A class without images is refused, as is an image that is in no class's folder.
    """
    inside = files.entries(folder)
    classes = in_natural_order(one.name for one in inside if one.is_dir())
    strays = [one.path for one in inside if not one.is_dir() and files.is_image(one.name)]
    number = {name: index for index, name in enumerate(classes)}
    left_out: list[str] = []
    numbers: list[Array] = [np.empty(0, np.int32)]

    def images() -> Iterator[list[str]]:
        in_order = sorted(classes, key=lambda name: natural(name + os.sep))  # as paths sort
        # images of classes that differ in case or leading zeros alone lie among each other
        for _, group in groupby(in_order, lambda name: natural(name + os.sep)[0]):
            alike = list(group)
            paths = chain.from_iterable(_images_of_class(folder, name, strays, left_out) for name in alike)
            found = in_natural_order(paths)
            class_of = [number[path.partition(os.sep)[0]] for path in found] if len(alike) > 1 else number[alike[0]]
            numbers.append(np.full(len(found), class_of, np.int32))
            yield found

    names = Names(images())
    source = _in_files(folder, names, np.concatenate(numbers), classes, left_out)
    if not len(source) and not strays:
        raise DataError(f"{folder} holds no images.")
    if strays:
        raise DataError(
            f"{min(strays)} is in no class's folder. {folder} takes one folder per class, with images directly in it."
        )
    images_of = np.bincount(source.labels, minlength=len(classes))
    if empty := [name for name, count in zip(classes, images_of, strict=True) if not count]:
        raise DataError(
            f"The class {min(empty)} has no images in {folder / min(empty)}: add some, or remove the folder."
        )
    return source


def _images_of_class(folder: Path, name: str, strays: list[str], left_out: list[str]) -> list[str]:
    """Paths in the folder of the images of a class; paths of images in further folders, and of other files, apart."""
    images, others = files.images_and_others(folder / name)
    for one in others:
        if one.is_dir():
            for path in files.below(one.path):
                (strays if files.is_image(path) else left_out).append(path)
        else:
            left_out.append(one.path)
    return [f"{name}{os.sep}{image}" for image in images]


def open_labelled(folder: Path, file: Path, exclusion: Exclusion) -> ImageFiles:
    """Opens a folder of images whose classes a file tells; they are the file's labels, in natural order.

    Images may be in folders within it. The file (see `labels.read`) must be about all of them and no others, but that
    what it says of those that are left out is not read.
    """
    root, images, excluded, left_out = str(folder), [], [], []
    for path in files.below(folder):
        name = _inside(path, root)
        if not files.is_image(path):
            left_out += [path] * (os.path.realpath(path) != os.path.realpath(file))
        elif exclusion.leaves_out(name, root):
            excluded.append(name.replace(os.sep, "/"))
        else:
            images.append(name)
    if not images:
        raise DataError(f"{folder} holds no images.")
    slashed = {name: name.replace(os.sep, "/") for name in in_natural_order(images)}
    label_of = labels.read(file, folder, sorted(slashed.values()), excluded)
    classes = in_natural_order({*label_of.values()})
    number = {name: index for index, name in enumerate(classes)}
    numbers = [number[label_of[name]] for name in slashed.values()]
    source = _in_files(folder, Names.of(slashed), numbers, classes, left_out)
    return replace(source, excluded=len(excluded) if exclusion else None)


def _in_files(
    folder: Path, names: Names, labels: Sequence[int] | Array, classes: Sequence[str], left_out: Sequence[str]
) -> ImageFiles:
    root = str(folder)
    return ImageFiles(
        root,
        names,
        torch.from_numpy(np.asarray(labels, np.int32)),
        tuple(classes),
        tuple(sorted(_inside(path, root) for path in left_out)),
    )


def _inside(path: str, folder: str) -> str:
    """A path without the folder that it begins with."""
    return path.removeprefix(folder).lstrip(os.sep) if path.startswith(folder) else path
