"""Labelled images: any dataset that timm opens, its classes mapped to the model's.

Images are addressed by their index, and an image that cannot be read is named, never silently replaced.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset

from fixefficientnet import classes
from fixefficientnet._internal import compat, requirements
from fixefficientnet.data import folders
from fixefficientnet.data.folders import SYNONYMS, VALIDATION, Exclusion, ImageFiles
from fixefficientnet.data.tar_shards import TarShards
from fixefficientnet.errors import DataError, ImageError
from fixefficientnet.preprocessing import open_image

_ESCAPE = "surrogateescape"
"""How Python keeps the bytes of file names that are no UTF-8."""


@dataclass(frozen=True)
class ImageDataset:
    """A dataset's split with random access.

    Attributes:
        source: The images and their labels by index: files of a folder, tar files, timm's reader, or a torchvision
            dataset.
        classes: Names of the classes, by the model's index; empty where the dataset names none.
        targets: Map from the dataset's class index to the model's; empty if they are the same.
        name: Name of the split in messages: its folder, or "hfds/name (validation)".
        upright: Whether images are turned as their EXIF orientation says.
        part_of: Fingerprint of the folder that `automatic_split` made this a part of; None for other datasets.
        numbering: What an output must say of how the classes were found; empty: they have the model's own names.
    """

    source: Any
    classes: tuple[str, ...]
    targets: dict[int, int]
    name: str
    upright: bool = False
    part_of: str | None = None
    numbering: str = ""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """One image as RGB, and its class index of the model; an ImageError names an image that cannot be read."""
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
    def left_out(self) -> tuple[str, ...]:
        """Names of the files beside the images that are none by their endings."""
        return self.source.left_out if isinstance(self.source, ImageFiles) else ()

    @property
    def excluded(self) -> int | None:
        """Number of images that were left out because it was asked for; None: it was not."""
        return self.source.excluded if isinstance(self.source, ImageFiles) else None

    @property
    def files(self) -> bool:
        """Whether each image is read from a file that is opened for it, as several threads may do concurrently."""
        return isinstance(self.source, ImageFiles | TarShards) or hasattr(self.source, "samples")  # torchvision's

    def present(self) -> set[int]:
        """The model's class indices that images may have; all of them, if the source does not tell."""
        if isinstance(self.source, ImageFiles | TarShards):
            labels = np.unique(self.source.labels).tolist()
        elif hasattr(self.source, "samples"):
            labels = [int(label) for _, label in self.source.samples]
        else:
            return set(self.targets.values()) or set(range(len(self.classes)))
        return {self.targets.get(label, label) for label in labels}

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
        if isinstance(self.source, ImageFiles):
            return self.source.path(index)
        listed = getattr(self.source, "samples", None)
        return self.image_name(index) if listed is None else str(listed[index][0])

    def fingerprint(self) -> str:
        """sha256 over length, classes, labels and file names, as far as the source tells them; not over the pixels."""
        digest = hashlib.sha256(f"{len(self)} {self.classes} {sorted(self.targets.items())}".encode("utf-8", _ESCAPE))
        if isinstance(self.source, ImageFiles | TarShards):
            digest.update(self.source.names.tobytes())
            digest.update(self.source.labels.numpy().astype("<i4").data)
        else:  # a name is all that there is to tell one from another, or Hugging Face's own fingerprint
            known = compat.dataset_fingerprint(getattr(self.source, "dataset", None))
            labels = [int(label) for label in getattr(self.source, "targets", ())]
            digest.update(f"{known or self.name} {labels}".encode("utf-8", _ESCAPE))
        return digest.hexdigest()


def open_dataset(
    data: str,
    split: str | None,
    *,
    root: str | None = None,
    num_classes: int | None = None,
    numbered: bool = False,
    labels: str | None = None,
    exclude: Sequence[str] = (),
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
        num_classes: Number of the model's classes. With 1000, classes named by WordNet ids or as ImageNet names them
            are mapped to ImageNet's, and some may be missing. None: as many as the dataset has.
        numbered: Whether classes named by numbers below `num_classes`, as ImageNet-V2's are, are the model's classes
            of these numbers.
        labels: File that tells the classes of images in one folder, see `labels.read`.
        exclude: Images of folders to leave out, see `Exclusion.of`.

    Raises:
        DataError: There is no such folder or split, or no image in it or in a class; or its classes are not the
            model's.
    """
    kind, _, name = data.partition("/")
    kind = kind.lower()
    may_be_whole, part_of, split = split is None, None, split or VALIDATION
    if kind in ("tfds", "hfds", "hfids", "torch", "wds"):
        if labels or exclude:
            raise DataError(f"--labels and --exclude are for images in folders, and {data} is none.")
        source = _named(kind, name, split, root)
        title = f"{data} ({split})"
    else:
        try:
            source, title, part_of = _in_folder(Path(data).expanduser(), split, may_be_whole, labels, exclude)
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
    if not len(source):
        raise DataError(f"{title} holds no images{' but excluded ones' if getattr(source, 'excluded', 0) else ''}.")
    order = classes.numbering(class_names(source), num_classes, title, numbered=numbered or bool(labels))
    return ImageDataset(source, order.names, order.targets, title, part_of=part_of, numbering=order.said)


def _in_folder(
    whole: Path, split: str, may_be_whole: bool, labels: str | None, exclude: Sequence[str]
) -> tuple[ImageFiles, str, str | None]:
    """Images of a folder, their name, and the fingerprint of the folder where they are an automatic split of it."""
    folder = folders.split_folder(whole, split, may_be_whole=may_be_whole, labelled=bool(labels))
    exclusion = Exclusion.of(exclude, whole)
    title, part_of = str(folder), None
    if labels:
        return folders.open_labelled(folder, Path(labels).expanduser(), exclusion), title, None
    source = folders.open_classes(folder)
    if folder == whole and not may_be_whole:
        part_of = ImageDataset(source, source.classes, {}, title).fingerprint()
        which = folders.synonym_of(split)
        source = folders.automatic_split(source)[which]
        title = f"{folder} (automatic {which} split)"
    return folders.without(source, exclusion), title, part_of


def follow(dataset: ImageDataset, order: tuple[str, ...], owner: str) -> ImageDataset:
    """Gives a split the class indices of a training split or a model, by name: folders are numbered as they come.

    `order` has the owner's class names by the index to follow; a class of the split that it lacks is a DataError. If it
    is empty, the split stays as it is.
    """
    if not dataset.classes or not order or dataset.classes == order:
        return dataset
    targets = classes.by_name(dataset.classes, order, dataset.name, owner)
    return replace(dataset, classes=order, targets=targets)


def _named(kind: str, name: str, split: str, root: str | None) -> Any:
    if kind == "tfds":
        raise DataError(f"tfds/{name} is a stream, but images are needed by index: use a folder, hfds/ or wds/.")
    if kind == "wds":
        return TarShards(Path(root or name).expanduser(), SYNONYMS.get(split, (split,)))
    if kind == "torch" and root is None:
        raise DataError(f"torch/{name} needs the folder that it lies in: give it with --data-root.")
    kind = "hfds" if kind == "hfids" else kind
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


def class_names(source: Any) -> tuple[str, ...]:
    """A source's own names of its classes, by its own index; empty if it has none."""
    numbers = getattr(source, "class_to_idx", None)
    if numbers and not hasattr(source, "wnids"):  # torchvision's ImageNet has several names for a class
        return tuple(str(name) for name, _ in sorted(numbers.items(), key=lambda item: item[1]))
    return tuple(map(str, getattr(source, "wnids", None) or getattr(source, "classes", None) or ()))
