"""Labelled images: any dataset that timm opens, its classes mapped to the model's.

Images are addressed by their index, and an image that cannot be read is named, never silently replaced.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from timm.utils import natural_key

from fixefficientnet import classes
from fixefficientnet._internal import compat, requirements
from fixefficientnet._internal.checkpoint_file import listed
from fixefficientnet.data.tar_shards import TarShards
from fixefficientnet.errors import DataError, ImageError
from fixefficientnet.preprocessing import open_image

TRAIN, VALIDATION = "train", "validation"
_SYNONYMS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("val", "valid", "validation", "eval", "evaluation"),
}
VALIDATION_SHARE = 0.2
"""Share of each class's images that validates where a folder has no splits."""


@dataclass(frozen=True)
class ImageDataset:
    """A dataset's split with random access.

    Attributes:
        source: timm's reader, or a torchvision dataset.
        classes: Names of the classes, by the model's index; empty where the dataset names none.
        targets: Map from the dataset's class index to the model's; empty if they are the same.
        name: Name of the split in messages: its folder, or "hfds/name (validation)".
        upright: Whether images are turned as their EXIF orientation says.
        part_of: Fingerprint of the folder that `automatic_split` made this a part of; None for other datasets.
    """

    source: Any
    classes: tuple[str, ...]
    targets: dict[int, int]
    name: str
    upright: bool = False
    part_of: str | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """One image as RGB, and its class index of the model.

        Raises:
            ImageError: The image cannot be read; names it.
        """
        try:
            image, target = self.source[index][:2]
            if hasattr(image, "read"):
                with image:
                    image = image.read()
            return open_image(image, upright=self.upright), self.targets.get(int(target), int(target))
        except (ImageError, OSError) as error:
            raise ImageError(f"{self.image_name(index)}: {error}") from error

    @property
    def imagenet(self) -> bool:
        """Whether the classes are named by WordNet ids, as ImageNet's are."""
        return classes.are_wordnet_ids(self.classes)

    @property
    def files(self) -> bool:
        """Whether each image is read from a file that is opened for it, as several threads may do concurrently."""
        return hasattr(self.source, "samples")

    def present(self) -> set[int]:
        """The model's class indices that images may have; all of them, if the source does not tell."""
        if hasattr(self.source, "samples"):
            return {self.targets.get(int(label), int(label)) for _, label in self.source.samples}
        return set(self.targets.values()) or set(range(len(self.classes)))

    def class_name(self, label: int) -> str:
        """Name of a class, by the model's index; the index itself, where the dataset names none."""
        return self.classes[label] if self.classes else str(label)

    def image_name(self, index: int) -> str:
        """The name of an image in messages: its file, or its index."""
        filename = None
        with contextlib.suppress(Exception):  # readers without file names raise what they like
            filename = self.source.filename(index)
        return str(filename or f"image {index} of {self.name}")

    def image_path(self, index: int) -> str:
        """Where an image is: its path, or its name where it has no file."""
        in_tar = isinstance(self.source, TarShards)
        return self.image_name(index) if in_tar or not self.files else str(self.source.samples[index][0])

    def fingerprint(self) -> str:
        """sha256 over length, classes, labels and file names, as far as the source tells them; not over the pixels."""
        digest = hashlib.sha256(f"{len(self)} {self.classes} {sorted(self.targets.items())}".encode())
        if hasattr(self.source, "samples") and hasattr(self.source, "filename"):
            for index, (_, label) in enumerate(self.source.samples):
                digest.update(f"{self.image_name(index)}\0{label}\0".encode("utf-8", "surrogateescape"))
        else:  # a name is all that there is to tell one from another, or Hugging Face's own fingerprint
            known = compat.dataset_fingerprint(getattr(self.source, "dataset", None))
            labels = [int(label) for label in getattr(self.source, "targets", ())]
            digest.update(f"{known or self.name} {labels}".encode())
        return digest.hexdigest()


def open_dataset(
    data: str,
    split: str | None,
    *,
    root: str | None = None,
    num_classes: int | None = None,
    numbered: bool = False,
) -> ImageDataset:
    """Opens one split of a dataset.

    Args:
        data: A folder with one subfolder per split, each with one per class; a folder with one per class, of which
            `automatic_split` makes the splits; or what timm's `create_dataset` takes: "hfds/organisation/name",
            "torch/cifar10", "wds/name". What timm would stream is opened by index: "hfids/" is downloaded as "hfds/"
            is, and "wds/" takes tar files on disk.
        split: "train" or "validation", which finds training/, val/ and the like too; or the exact name of another.
            None: "validation", or the folder itself where it holds the classes' folders.
        root: Folder that a named dataset lies in or is cached in, as timm's `root`.
        num_classes: Number of the model's classes. With 1000, classes named by WordNet ids are mapped to ImageNet's,
            and some may be missing. None: as many as the dataset has.
        numbered: Whether classes named by numbers from 0 to 999, as ImageNet-V2's are, are mapped to ImageNet's too.

    Raises:
        DataError: There is no such folder or split, or no image in it or in a class; or its classes are not the
            model's.
    """
    kind, _, name = data.partition("/")
    kind = kind.lower()
    may_be_whole, part_of, split = split is None, None, split or VALIDATION
    if kind == "tfds":
        raise DataError(f"{data} is a stream, but images are needed by index: use a folder, hfds/ or wds/.")
    if kind in ("hfds", "hfids", "torch"):
        source = _named("hfds" if kind == "hfids" else kind, name, split, root)
        title = f"{data} ({split})"
    elif kind == "wds":
        source = TarShards(Path(root or name).expanduser(), _SYNONYMS.get(split, (split,)))
        title = f"{data} ({split})"
    else:
        whole = Path(data).expanduser()
        folder = _split_folder(whole, split, may_be_whole=may_be_whole)
        title = str(folder)
        source = _open_folder(folder)
        if folder == whole and not may_be_whole:
            part_of = ImageDataset(source, class_names(source), {}, title).fingerprint()
            which = _synonym_of(split)
            source.samples = automatic_split(source.samples, folder)[which]
            title = f"{folder} (automatic {which} split)"
    if not len(source):
        raise DataError(f"{title} holds no images.")
    names = class_names(source)
    order, targets = classes.mapping(names, num_classes, title, numbered=numbered)
    return ImageDataset(source, order, targets, title, part_of=part_of)


def follow(dataset: ImageDataset, order: tuple[str, ...], owner: str) -> ImageDataset:
    """Gives a split the class indices of a training split or a model, by name: folders are numbered as they come.

    Args:
        dataset: The split.
        order: Names of the classes, by the index to follow; empty: the split stays as it is.
        owner: Name of the training split or model that has this order, for messages.

    Raises:
        DataError: The split has classes that `order` lacks.
    """
    if not dataset.classes or not order or dataset.classes == order:
        return dataset
    targets = classes.by_name(dataset.classes, order, dataset.name, owner)
    return replace(dataset, classes=order, targets=targets)


def _named(kind: str, name: str, split: str, root: str | None) -> Any:
    if kind == "torch" and root is None:
        raise DataError(f"torch/{name} needs the folder that it lies in: give it with --data-root.")
    try:
        dataset = create_dataset(f"{kind}/{name}", root=root, split=split, download=False)
    except ImportError as error:
        raise DataError(f"{kind}/{name} needs another package: {error}. `pip install datasets` brings it.") from error
    except Exception as error:  # torchvision, datasets and timm raise a dozen kinds
        hint = ""
        if isinstance(error, AttributeError) and "'names'" in str(error):
            installed = requirements.version("timm")
            hint = f" Its labels have no names, which timm reads since 1.0.31; {installed} is installed."
        raise DataError(f"{kind}/{name} ({split}) cannot be opened: {str(error).rstrip('.')}.{hint}") from error
    return getattr(dataset, "reader", dataset)


def _split_folder(folder: Path, split: str, *, may_be_whole: bool) -> Path:
    if not folder.is_dir():
        or_whole = ", or of classes' folders" if may_be_whole else ""
        raise DataError(f"There is no folder {folder}. --data takes one with {split}/ in it{or_whole}.")
    candidates = _SYNONYMS.get(split, (split,))
    for name in candidates:
        if (folder / name).is_dir():
            return folder / name
    there = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    splits = [name for name in there if name in {"test", *_SYNONYMS[TRAIN], *_SYNONYMS[VALIDATION]}]
    holds_classes = any(path.is_dir() for name in splits for path in (folder / name).iterdir())
    if may_be_whole and there and not holds_classes:
        return folder
    nested = (path.is_dir() for name in there for path in (folder / name).iterdir())
    if _synonym_of(split) and there and not splits and not any(nested):
        return folder
    raise DataError(
        f"{folder} has no folder {candidates[0]}/ (nor {', '.join(candidates[1:]) or 'another name for it'}). "
        f"It has: {listed(there) or 'no folder at all'}."
    )


def automatic_split(samples: Sequence[tuple[str, int]], folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Splits a folder of classes into training and validation images.

    About `VALIDATION_SHARE` of each class's images validates, at least one, and at least one trains. The sha256 of an
    image's name with its class's folder decides, so that the split is the same in every run and on every machine, and
    images that are added later move no other one.

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


def _synonym_of(split: str) -> str:
    """TRAIN or VALIDATION, if a split's name means one of them; else empty."""
    return next((name for name, synonyms in _SYNONYMS.items() if split in synonyms), "")


def _open_folder(folder: Path) -> Any:
    """timm's reader for a folder of classes, numbered in timm's order.

    timm numbers each innermost folder with an image in it, so an empty class, a stray image or a folder within a
    class would silently shift the others; and it leaves the order of names that differ in case or leading
    zeros alone ("Fox", "fox") to chance.
    """
    try:
        source = create_dataset("", root=str(folder), split="", search_split=False).reader
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"{folder} holds no images: {error}") from error
    folders = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    found = {os.path.dirname(path): path for path, _ in source.samples}  # noqa: PTH120 - a million of them
    for parent, path in sorted(found.items()):
        if Path(parent).parent != folder or Path(parent).name not in folders:
            raise DataError(
                f"{path} is in no class's folder. {folder} takes one folder per class, with images directly in it."
            )
    if empty := sorted(folders - {Path(parent).name for parent in found}):
        raise DataError(f"The class {empty[0]} has no images in {folder / empty[0]}: add some, or remove the folder.")
    number = {name: index for index, name in enumerate(sorted(folders, key=_in_order))}
    of_folder = {parent: number[Path(parent).name] for parent in found}
    samples = [(path, of_folder[os.path.dirname(path)]) for path, _ in source.samples]  # noqa: PTH120
    source.samples = sorted(samples, key=lambda sample: _in_order(sample[0]))
    source.class_to_idx = number
    return source


def _in_order(name: str) -> tuple[list[str | int], str]:
    return natural_key(name), name  # type: ignore[no-untyped-call]


def class_names(source: Any) -> tuple[str, ...]:
    """A source's own names of its classes, by its own index; empty if it has none."""
    numbers = getattr(source, "class_to_idx", None)
    if numbers:
        return tuple(str(name) for name, _ in sorted(numbers.items(), key=lambda item: item[1]))
    return tuple(str(name) for name in getattr(source, "classes", ()))
