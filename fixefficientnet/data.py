"""Pictures with labels: any data set that timm opens, its classes mapped to the model's, and batches of them.

Pictures are addressed by their index, every batch says which it holds, and a picture that cannot be read is
named, never silently replaced.
"""

import contextlib
import ctypes
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset
from timm.utils import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fixefficientnet import classes, compat, requirements
from fixefficientnet.checkpoint import listed
from fixefficientnet.errors import DataError, PictureError
from fixefficientnet.preprocessing import open_picture
from fixefficientnet.tar_shards import TarShards

TRAIN, VALIDATION = "train", "validation"
_SYNONYMS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("val", "valid", "validation", "eval", "evaluation"),
}
_PR_SET_PDEATHSIG = 1

Transform = Callable[[Image.Image, int, int], Tensor]
"""(RGB picture, epoch, index) → tensor; every draw is a function of epoch and index alone."""
Task = tuple[int, int]
"""(epoch, index) of one picture to load."""


@dataclass(frozen=True, slots=True)
class InEveryEpoch:
    """A transform that is the same in every epoch and for every picture."""

    transform: Callable[[Image.Image], Tensor]

    def __call__(self, picture: Image.Image, epoch: int, index: int) -> Tensor:
        """Transforms one RGB picture."""
        return self.transform(picture)


@dataclass(frozen=True)
class Pictures:
    """A data set's split with random access.

    Attributes:
        source: timm's reader, or a torchvision data set.
        classes: Names of the classes, by the model's index; empty where the data set names none.
        targets: From the data set's class index to the model's; empty: they are the same.
        what: The split, for messages.
    """

    source: Any
    classes: tuple[str, ...]
    targets: dict[int, int]
    what: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """One picture as RGB, and its class in the model's numbering.

        Raises:
            PictureError: It cannot be read; names it.
        """
        try:
            picture, target = self.source[index][:2]
            if hasattr(picture, "read"):
                with picture:
                    picture = picture.read()
            return open_picture(picture), self.targets.get(int(target), int(target))
        except (PictureError, OSError) as error:
            raise PictureError(f"{self.name(index)}: {error}") from error

    @property
    def imagenet(self) -> bool:
        """Whether the classes are named by WordNet ids, as ImageNet's are."""
        return classes.are_wordnet_ids(self.classes)

    @property
    def files(self) -> bool:
        """Whether each picture is read from a file that is opened for it, as several threads may do at once."""
        return hasattr(self.source, "samples")

    def present(self) -> set[int]:
        """The classes that it may hold pictures of, in the model's numbering; all, where it does not tell."""
        if hasattr(self.source, "samples"):
            return {self.targets.get(int(label), int(label)) for _, label in self.source.samples}
        return set(self.targets.values()) or set(range(len(self.classes)))

    def name(self, index: int) -> str:
        """What to call a picture: its file, or its index."""
        filename = None
        with contextlib.suppress(Exception):  # readers without file names raise what they like
            filename = self.source.filename(index)
        return str(filename or f"picture {index} of {self.what}")

    def fingerprint(self) -> str:
        """sha256 over number, classes, labels and file names, as far as the data set tells; not over the pixels."""
        digest = hashlib.sha256(f"{len(self)} {self.classes} {sorted(self.targets.items())}".encode())
        if hasattr(self.source, "samples") and hasattr(self.source, "filename"):
            for index, (_, label) in enumerate(self.source.samples):
                digest.update(f"{self.name(index)}\0{label}\0".encode())
        else:  # a name is all that there is to tell one from another, or Hugging Face's own fingerprint
            known = compat.dataset_fingerprint(getattr(self.source, "dataset", None))
            labels = [int(label) for label in getattr(self.source, "targets", ())]
            digest.update(f"{known or self.what} {labels}".encode())
        return digest.hexdigest()


def open_pictures(
    data: str,
    split: str | None,
    *,
    root: str | None = None,
    num_classes: int | None = None,
    numbered: bool = False,
) -> Pictures:
    """Opens one split of a data set.

    Args:
        data: A folder with one subfolder per split, each with one per class; or what timm's `create_dataset`
            takes: "hfds/organisation/name", "torch/cifar10", "wds/name". What timm would stream is opened by
            index: "hfids/" is downloaded as "hfds/" is, and "wds/" takes tar files on disk.
        split: "train" or "validation", which finds training/, val/ and the like too; or the exact name of another.
            None: "validation", or the folder itself where it holds the classes' folders.
        root: Where a named data set lies or is cached, as timm's `root`.
        num_classes: Of the model. With 1000, classes named by WordNet ids are mapped to ImageNet's by these, and
            some may be missing. None: as many as the data set has.
        numbered: Whether so are classes named by numbers from 0 to 999, as ImageNet-V2's are.

    Raises:
        DataError: No such folder or split, no pictures, a class without any, or other classes than the model's.
    """
    kind, _, name = data.partition("/")
    kind = kind.lower()
    may_be_whole, split = split is None, split or VALIDATION
    if kind == "tfds":
        raise DataError(f"{data} is a stream, but pictures are needed by index: use a folder, hfds/ or wds/.")
    if kind in ("hfds", "hfids", "torch"):
        source = _named("hfds" if kind == "hfids" else kind, name, split, root)
        what = f"{data} ({split})"
    elif kind == "wds":
        source = TarShards(Path(root or name).expanduser(), _SYNONYMS.get(split, (split,)))
        what = f"{data} ({split})"
    else:
        folder = _split_folder(Path(data).expanduser(), split, may_be_whole=may_be_whole)
        what = str(folder)
        source = _open_folder(folder)
    if not len(source):
        raise DataError(f"{what} holds no pictures.")
    names = class_names(source)
    return Pictures(source, *classes.mapping(names, num_classes, what, numbered=numbered), what)


def follow(pictures: Pictures, order: tuple[str, ...], whose: str) -> Pictures:
    """Gives a split the class numbers of a training split or a model, by name: folders are numbered as they come.

    Args:
        pictures: The split.
        order: Names of the classes, by the index to follow; empty: nothing to follow.
        whose: They are, for messages.

    Raises:
        DataError: The split has classes that are not among them.
    """
    if not pictures.classes or not order or pictures.classes == order:
        return pictures
    targets = classes.by_name(pictures.classes, order, pictures.what, whose)
    return Pictures(pictures.source, order, targets, pictures.what)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a loader gives.

    Attributes:
        inputs: float32 [n, ...]: the transform's results, stacked.
        targets: int64 [n].
        indices: Of the pictures that the results are of; int64 [n].
        unreadable: Those that were asked for and could not be read: index and reason.
    """

    inputs: Tensor
    targets: Tensor
    indices: Tensor
    unreadable: list[tuple[int, str]]

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, as DataLoader asks for."""
        return Batch(self.inputs.pin_memory(), self.targets, self.indices, self.unreadable)


def load_batches(
    pictures: Pictures,
    transform: Transform,
    tasks: Iterable[list[Task]],
    *,
    workers: int = 0,
    substitute: bool = False,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Loads batches of pictures, in order, in worker processes if asked.

    Args:
        pictures: The data set.
        transform: What is done to each.
        tasks: The pictures of each batch; drawn from as loading goes on.
        workers: Number of loading processes; 0 loads in this one.
        substitute: Whether the next readable picture takes the place of an unreadable one, so that batches
            keep their size; else it is left out.
        pin_memory: As in DataLoader.
    """
    loader: DataLoader[Any] = DataLoader(
        _Loading(pictures, transform, substitute),
        batch_sampler=tasks,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    return iter(loader)


def load_batch(pictures: Pictures, transform: Transform, tasks: list[Task]) -> Batch:
    """Loads one batch in this thread; unreadable pictures are left out."""
    loading = _Loading(pictures, transform, substitute=False)
    return _collate([loading[task] for task in tasks])


def shard_tasks(length: int, shard: int, batch: int, shards: Sequence[int]) -> list[list[Task]]:
    """Batches for whole shards of a data set: fixed runs of `shard` pictures, so that no batch is in two.

    Args:
        length: Pictures in all.
        shard: Pictures per shard.
        batch: Pictures per batch.
        shards: Which shards, in order.
    """
    tasks = []
    for number in shards:
        indices = range(number * shard, min((number + 1) * shard, length))
        tasks += [[(0, index) for index in indices[at : at + batch]] for at in range(0, len(indices), batch)]
    return tasks


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole process group must not take the loading processes from a parent that is still saving.

    They end with it instead, at once, also where it was killed.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library that does not know it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Loading(Dataset[Any]):
    """What runs in a worker: (epoch, index) → the transformed picture, or why not."""

    def __init__(self, pictures: Pictures, transform: Transform, substitute: bool):
        self.pictures, self.transform, self.substitute = pictures, transform, substitute

    def __getitem__(self, task: Task) -> tuple[Tensor | None, int, int, list[tuple[int, str]]]:
        epoch, index = task
        unreadable: list[tuple[int, str]] = []
        for _ in range(10 if self.substitute else 1):
            try:
                picture, target = self.pictures[index]
                return self.transform(picture, epoch, index), target, index, unreadable
            except PictureError as error:
                unreadable.append((index, str(error)))
                index = (index + 1) % len(self.pictures)
        return None, -1, index, unreadable


def _collate(items: list[tuple[Tensor | None, int, int, list[tuple[int, str]]]]) -> Batch:
    good = [(tensor, target, index) for tensor, target, index, _ in items if tensor is not None]
    inputs = torch.stack([tensor for tensor, _, _ in good]) if good else torch.empty(0)
    targets = torch.tensor([target for _, target, _ in good], dtype=torch.int64)
    indices = torch.tensor([index for _, _, index in good], dtype=torch.int64)
    return Batch(inputs, targets, indices, [failure for *_, failures in items for failure in failures])


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
    splits = [name for name in there if name in {"test", *_SYNONYMS[TRAIN]}]
    holds_classes = any(path.is_dir() for name in splits for path in (folder / name).iterdir())
    if may_be_whole and there and not holds_classes:
        return folder
    raise DataError(
        f"{folder} has no folder {candidates[0]}/ (nor {', '.join(candidates[1:]) or 'another name for it'}). "
        f"It has: {listed(there) or 'no folder at all'}."
    )


def _open_folder(folder: Path) -> Any:
    """timm's reader for a folder of classes, numbered in timm's order.

    timm numbers each innermost folder with a picture in it, so an empty class, a stray picture or a folder within a
    class would shift the others without a word; and it leaves the order of names that differ in case or leading
    zeros alone ("Fox", "fox") to chance.
    """
    try:
        source = create_dataset("", root=str(folder), split="", search_split=False).reader
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"{folder} holds no pictures: {error}") from error
    folders = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    found = {os.path.dirname(path): path for path, _ in source.samples}  # noqa: PTH120 - a million of them
    for parent, path in sorted(found.items()):
        if Path(parent).parent != folder or Path(parent).name not in folders:
            raise DataError(
                f"{path} is in no class's folder. {folder} takes one folder per class, with pictures right in it."
            )
    if empty := sorted(folders - {Path(parent).name for parent in found}):
        raise DataError(f"The class {empty[0]} has no pictures in {folder / empty[0]}: add some, or remove the folder.")
    number = {name: index for index, name in enumerate(sorted(folders, key=_in_order))}
    of_folder = {parent: number[Path(parent).name] for parent in found}
    samples = [(path, of_folder[os.path.dirname(path)]) for path, _ in source.samples]  # noqa: PTH120
    source.samples = sorted(samples, key=lambda sample: _in_order(sample[0]))
    source.class_to_idx = number
    return source


def _in_order(name: str) -> tuple[list[str | int], str]:
    return natural_key(name), name  # type: ignore[no-untyped-call]


def class_names(source: Any) -> tuple[str, ...]:
    """A source's own names of its classes, by its own index; empty where it has none."""
    numbers = getattr(source, "class_to_idx", None)
    if numbers:
        return tuple(str(name) for name, _ in sorted(numbers.items(), key=lambda item: item[1]))
    return tuple(str(name) for name in getattr(source, "classes", ()))
