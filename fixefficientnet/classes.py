"""Class indices: a dataset's classes in the model's order, their names, subsets of them, ReaL's further labels."""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from timm.data import ImageNetInfo, RealLabelsImagenet

from fixefficientnet._internal.checkpoint_file import listed
from fixefficientnet.errors import DataError

IMAGENET = 1000
"""Number of ImageNet-1k's classes."""
SUBSET = 200
"""Number of classes in ImageNet-A and in ImageNet-R, for which logits are restricted to these."""
_WORDNET_ID = re.compile(r"n\d{8}")


def are_wordnet_ids(names: Sequence[str]) -> bool:
    """Whether all names are WordNet ids, as ImageNet's class folders have: n01440764."""
    return bool(names) and all(_WORDNET_ID.fullmatch(name) for name in names)


def turned_upright(num_classes: int) -> bool:
    """Whether images are turned as their EXIF orientation says, where nothing else is asked for.

    ImageNet's accuracies are of images as they are stored.
    """
    return num_classes != IMAGENET


@functools.cache
def imagenet_order() -> tuple[str, ...]:
    """The WordNet ids of ImageNet-1k's classes, in their order."""
    info = ImageNetInfo("imagenet-1k")
    return tuple(info.index_to_label_name(index) for index in range(IMAGENET))


@functools.lru_cache(maxsize=4)
def labels(num_classes: int) -> list[tuple[str | None, str]]:
    """WordNet id and name of each class; the index as text, without an id, unless there are ImageNet's 1000."""
    if num_classes != IMAGENET:
        return [(None, str(index)) for index in range(num_classes)]
    info = ImageNetInfo("imagenet-1k")
    return [(info.index_to_label_name(i), info.index_to_description(i)) for i in range(num_classes)]


def mapping(
    names: tuple[str, ...], num_classes: int | None, dataset: str, *, numbered: bool = False
) -> tuple[tuple[str, ...], dict[int, int]]:
    """Maps a dataset's classes to a model's.

    Args:
        names: Names of the dataset's classes, by its own index; some of the model's classes may be missing.
        num_classes: Number of the model's classes; None: as many as the dataset has.
        dataset: The dataset's name, for messages.
        numbered: Whether names that are numbers from 0 to 999 may be those of ImageNet's classes.

    Returns:
        Class names by the model's index; and a map from the dataset's index to the model's, which is empty if the
        two are the same.

    Raises:
        DataError: The dataset has WordNet ids that are not ImageNet-1k's, or another number of classes than the model.
    """
    if num_classes == IMAGENET and are_wordnet_ids(names):
        order = imagenet_order()
        if unknown := sorted(set(names) - set(order)):
            raise DataError(f"{dataset} has classes that are none of ImageNet-1k's: {listed(unknown)}.")
        return order, {index: order.index(name) for index, name in enumerate(names)}
    in_range = names and all(name.isdecimal() and int(name) < IMAGENET for name in names)
    if numbered and num_classes == IMAGENET and in_range:
        return imagenet_order(), {index: int(name) for index, name in enumerate(names)}  # ImageNet-V2 has 0 to 999
    if num_classes is not None and names and len(names) != num_classes:
        raise DataError(
            f"{dataset} has {len(names)} classes, the model has {num_classes}. The model must be one for these classes "
            "(`python -m fixefficientnet.reproduce --stage base` trains one); for ImageNet's 1000, name the folders by "
            "WordNet ids."
        )
    return names, {}


def by_name(names: Sequence[str], order: Sequence[str], dataset: str, owner: str) -> dict[int, int]:
    """Maps classes to those of the same name in another order.

    Args:
        names: Names of the classes, by the index to map from.
        order: Names of the classes, by the index to map to.
        dataset: Name of the dataset that has `names`, for messages.
        owner: Name of the split or model that has `order`, for messages.

    Raises:
        DataError: `order` lacks one of `names`.
    """
    if unknown := sorted(set(names) - set(order)):
        raise DataError(f"{dataset} has classes that {owner} lacks: {listed(unknown)}.")
    number = {name: index for index, name in enumerate(order)}
    return {index: number[name] for index, name in enumerate(names)}


@dataclass(frozen=True, slots=True)
class Subset:
    """Classes that logits are restricted to.

    Attributes:
        classes: The model's indices, ascending.
    """

    classes: tuple[int, ...]

    @classmethod
    def of(cls, targets: Iterable[int]) -> "Subset":
        """The subset of the classes that occur among targets."""
        return cls(tuple(sorted(set(targets))))


def real_labels(files: Sequence[str]) -> list[list[int]]:
    """ReaL labels (Beyer et al., 2020, arXiv 2006.07159; timm's copy) of images of ImageNet's validation set.

    Args:
        files: File names of the images, which end in ILSVRC2012_val_00000001.JPEG and the like.

    Returns:
        The classes that count as correct, per image; some images have none.

    Raises:
        DataError: A file name is not one of ImageNet's validation set.
    """
    every = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50_001)]
    known = RealLabelsImagenet(every).real_labels  # type: ignore[no-untyped-call]
    names = [PurePath(file).name for file in files]
    if unknown := [file for file, name in zip(files, names, strict=True) if name not in known]:
        raise DataError(
            "ReaL labels are of ImageNet's validation images, by file name (ILSVRC2012_val_00000001.JPEG): there "
            f"are none of {listed(unknown)}."
        )
    return [known[name] for name in names]
