"""Class numbers: a dataset's classes in the model's numbering, subsets of them, ReaL's further labels."""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from timm.data import ImageNetInfo, RealLabelsImagenet

from fixefficientnet._internal.checkpoint_file import listed
from fixefficientnet.errors import DataError

IMAGENET = 1000
SUBSET = 200
"""As many classes of ImageNet-1k have ImageNet-A and ImageNet-R: so many, and their logits are restricted."""
_WORDNET_ID = re.compile(r"n\d{8}")


def are_wordnet_ids(names: Sequence[str]) -> bool:
    """Whether classes are named as ImageNet's are: n01440764."""
    return bool(names) and all(_WORDNET_ID.fullmatch(name) for name in names)


@functools.cache
def imagenet_order() -> tuple[str, ...]:
    """The WordNet ids of ImageNet-1k's classes, in their order."""
    info = ImageNetInfo("imagenet-1k")
    return tuple(info.index_to_label_name(index) for index in range(IMAGENET))


def mapping(
    names: tuple[str, ...], num_classes: int | None, what: str, *, numbered: bool = False
) -> tuple[tuple[str, ...], dict[int, int]]:
    """Maps a dataset's classes to a model's.

    Args:
        names: Of the dataset's classes, by its own index; some may be missing.
        num_classes: Of the model; None: as many as the dataset has.
        what: The dataset, for messages.
        numbered: Whether names that are numbers from 0 to 999 may be those of ImageNet's classes.

    Returns:
        Names by the model's index, and the model's index of each of the dataset's; empty where they are the same.

    Raises:
        DataError: WordNet ids that are not ImageNet-1k's, or another number of classes than the model's.
    """
    if num_classes == IMAGENET and are_wordnet_ids(names):
        order = imagenet_order()
        if unknown := sorted(set(names) - set(order)):
            raise DataError(f"{what} has classes that are none of ImageNet-1k's: {listed(unknown)}.")
        return order, {index: order.index(name) for index, name in enumerate(names)}
    in_range = names and all(name.isdecimal() and int(name) < IMAGENET for name in names)
    if numbered and num_classes == IMAGENET and in_range:
        return imagenet_order(), {index: int(name) for index, name in enumerate(names)}  # ImageNet-V2 has 0 to 999
    if num_classes is not None and names and len(names) != num_classes:
        raise DataError(
            f"{what} has {len(names)} classes, the model has {num_classes}. The model must be one for these classes "
            "(`python -m fixefficientnet.reproduce --stage base` trains one); for ImageNet's 1000, name the folders by "
            "WordNet ids."
        )
    return names, {}


def by_name(names: Sequence[str], order: Sequence[str], what: str, whose: str) -> dict[int, int]:
    """The index in `order` of each of `names`.

    Raises:
        DataError: `order` lacks one.
    """
    if unknown := sorted(set(names) - set(order)):
        raise DataError(f"{what} has classes that {whose} has not: {listed(unknown)}.")
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
        """The classes that occur."""
        return cls(tuple(sorted(set(targets))))


def real_labels(files: Sequence[str]) -> list[list[int]]:
    """ReaL labels (Beyer et al., 2020, arXiv 2006.07159; timm's copy) of images of ImageNet's validation set.

    Args:
        files: Names of the images, which end in ILSVRC2012_val_00000001.JPEG and the like.

    Returns:
        The classes that count as correct, per image; some images have none.

    Raises:
        DataError: A name is none of ImageNet's validation set.
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
