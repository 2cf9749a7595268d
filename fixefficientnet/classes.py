"""Class indices: a dataset's classes in the model's order, their names, subsets of them, ReaL's further labels."""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from timm.data import ImageNetInfo, RealLabelsImagenet, infer_imagenet_subset

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


def imagenet_order() -> tuple[str, ...]:
    """The WordNet ids of ImageNet-1k's classes, in their order."""
    return wordnet_order(IMAGENET)


@functools.cache
def wordnet_order(num_classes: int) -> tuple[str, ...]:
    """The WordNet ids of the classes, in their order, of timm's subset of ImageNet of so many; empty: there is none."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return tuple(ImageNetInfo(subset).label_names()) if subset else ()  # type: ignore[no-untyped-call]


@functools.lru_cache(maxsize=4)
def labels(num_classes: int) -> list[tuple[str | None, str]]:
    """WordNet id and name of each class; the index as text, without an id, unless there are ImageNet's 1000."""
    if num_classes != IMAGENET:
        return [(None, str(index)) for index in range(num_classes)]
    info = ImageNetInfo("imagenet-1k")
    return [(info.index_to_label_name(i), info.index_to_description(i)) for i in range(num_classes)]


@dataclass(frozen=True, slots=True)
class Numbering:
    """A dataset's classes in a model's order.

    Attributes:
        names: Names of the classes, by the model's index; empty where neither names them.
        targets: Map from the dataset's index to the model's; empty if the two are the same.
        said: What an output must say of how they were found; empty where they have the model's own names.
    """

    names: tuple[str, ...]
    targets: dict[int, int]
    said: str = ""


def numbering(names: tuple[str, ...], num_classes: int | None, dataset: str, *, numbered: bool = False) -> Numbering:
    """Finds a dataset's classes among those of a model that does not name its own.

    Their order is never guessed: it is ImageNet's where the model has ImageNet's number of classes, and the dataset's
    own, which the output says, of no other model than one of as many classes.

    Some of the model's classes may be missing. Without `num_classes`, it has those of the dataset. If `numbered`, names
    that are numbers below `num_classes` are the model's classes of these numbers.

    Raises:
        DataError: The dataset has classes that are not ImageNet's, or another number of classes than the model.
    """
    if not names:
        return Numbering((), {}, "labels taken as the numbers of the model's classes")
    if num_classes is None:
        return Numbering(names, {})
    order = wordnet_order(num_classes)
    if order and are_wordnet_ids(names):
        known = {name: index for index, name in enumerate(order)}
        if unknown := sorted(set(names) - known.keys()):
            which = "ImageNet-1k's" if num_classes == IMAGENET else f"the {num_classes} of the model"
            raise DataError(f"{dataset} has classes that are none of {which}: {listed(unknown)}.")
        return Numbering(order, {index: known[name] for index, name in enumerate(names)})
    numbers = [int(name) for name in names if re.fullmatch(r"\d{1,9}", name) and int(name) < num_classes]
    if len(numbers) == len(names) and numbered:  # ImageNet-V2 has 0 to 999
        whose = "ImageNet's" if num_classes == IMAGENET else "the model's"
        in_order = imagenet_order() if num_classes == IMAGENET else tuple(map(str, range(num_classes)))
        return Numbering(in_order, dict(enumerate(numbers)), f"class names taken as the numbers of {whose} classes")
    if numbers == [*range(num_classes)]:
        return Numbering(names, {})
    if num_classes == IMAGENET:
        return _by_imagenets_names(names, dataset)
    if len(names) != num_classes:
        raise DataError(f"{dataset} has {len(names)} classes, the model has {num_classes}. {_TRAIN_ONE}")
    return Numbering(names, {}, "classes taken in the dataset's order, as the model does not name its own")


_TRAIN_ONE = (
    "The model must be one for these classes (`python -m fixefficientnet.reproduce --stage base` trains one); for "
    "ImageNet's 1000, name the folders by WordNet ids."
)


def are_imagenets(names: Sequence[str]) -> bool:
    """Whether names are those of ImageNet-1k's 1000 classes, in their order: WordNet ids, or words.

    Of words, some may be unknown or mean several classes (crane), if most are those of their place and none is that of
    another place only.
    """
    if len(names) != IMAGENET:  # before ImageNet's names are read
        return False
    found = [_imagenets_names().get(_plain(name), frozenset()) for name in names]
    in_place = sum(there == {index} for index, there in enumerate(found))
    fits = all(index in there or not there for index, there in enumerate(found))
    return fits and in_place > IMAGENET / 2


def _by_imagenets_names(names: tuple[str, ...], dataset: str) -> Numbering:
    order, said = imagenet_order(), "class names taken as ImageNet's names"
    if are_imagenets(names):
        return Numbering(order, {}, said)
    twins = {plain for plain, count in Counter(map(_plain, names)).items() if count > 1}  # Cardigan and cardigan
    spelling = {name: _spaced(name) if _plain(name) in twins else _plain(name) for name in names}
    found = {name: _imagenets_names().get(spelling[name], frozenset()) for name in names}
    sure = {index for there in found.values() if len(there) == 1 for index in there}
    # a name of several classes is that of the one which no other name has
    left = {name: there if len(there) == 1 else there - sure for name, there in found.items()}
    problems = []
    if unknown := [name for name, there in found.items() if not there]:
        problems.append(f"ImageNet has no class {listed(unknown)}.")
    several = [name for name, there in left.items() if found[name] and len(there) != 1]
    problems += [f"{name} is {' or '.join(order[i] for i in sorted(found[name]))}." for name in several]
    targets = {index: next(iter(left[name]), -1) for index, name in enumerate(names)}
    if not problems and len(set(targets.values())) < len(names):
        same = Counter(targets.values()).most_common(1)[0][0]
        alike = [name for index, name in enumerate(names) if targets[index] == same]
        problems.append(f"{' and '.join(alike)} are one class, {order[same]}.")
    if problems:
        raise DataError(
            f"{dataset} has {len(names)} classes, the model has {IMAGENET}. {' '.join(problems[:4])} {_TRAIN_ONE}"
        )
    return Numbering(order, targets, said)


@functools.cache
def _imagenets_names() -> dict[str, frozenset[int]]:
    """The classes that a name may mean: a WordNet id, one of the words of its synset, or all of them with commas.

    Names are as ImageNet has them, with capitals; and `_plain`, which may mean more.
    """
    info, found = ImageNetInfo("imagenet-1k"), dict[str, set[int]]()
    for index, wordnet_id in enumerate(imagenet_order()):
        words = info.index_to_description(index)
        for name in (wordnet_id, words, *words.split(", ")):
            for spelling in (name, _plain(name)):
                found.setdefault(spelling, set()).add(index)
    return {name: frozenset(there) for name, there in found.items()}


def _spaced(name: str) -> str:
    return name.replace("_", " ").strip()


def _plain(name: str) -> str:
    return _spaced(name).casefold()


def by_name(names: Sequence[str], order: Sequence[str], dataset: str, owner: str) -> dict[int, int]:
    """Maps a dataset's classes, by index, to those of the same name of an owner, which must have them (DataError)."""
    if unknown := sorted(set(names) - set(order)):
        raise DataError(f"{dataset} has classes that {owner} lacks: {listed(unknown)}.")
    number = {name: index for index, name in enumerate(order)}
    return {index: number[name] for index, name in enumerate(names)}


@dataclass(frozen=True, slots=True)
class Subset:
    """Classes that logits are restricted to: the model's indices, ascending."""

    classes: tuple[int, ...]

    @classmethod
    def of(cls, targets: Iterable[int]) -> "Subset":
        """The subset of the classes that occur among targets."""
        return cls(tuple(sorted(set(targets))))


def real_labels(files: Sequence[str]) -> list[list[int]]:
    """ReaL labels (Beyer et al., 2020, arXiv 2006.07159; timm's copy) of images of ImageNet's validation set.

    These are the classes that count as correct, per image; some images have none. A file of another name than those of
    that set is a DataError.
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
