"""Batches of a dataset, loaded in order, in worker processes if asked.

Every batch says which images it holds, and an image that cannot be read is named, never silently replaced.
"""

import contextlib
import ctypes
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fixefficientnet.data.dataset import ImageDataset
from fixefficientnet.errors import ImageError
from fixefficientnet.preprocessing import orientation

_PR_SET_PDEATHSIG = 1

Transform = Callable[[Image.Image, int, int], Tensor]
"""(RGB image, epoch, index) → tensor; every draw is a function of epoch and index alone."""
Task = tuple[int, int]
"""(epoch, index) of one image to load."""


@dataclass(frozen=True, slots=True)
class InEveryEpoch:
    """A test-time transform as a `Transform`: the same in every epoch and for every image.

    Attributes:
        transform: RGB image → tensor.
    """

    transform: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image, epoch: int, index: int) -> Tensor:
        """Transforms one RGB image."""
        return self.transform(image)


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of transformed images.

    Attributes:
        inputs: The transform's results, stacked: of images uint8 [n, ..., 3, S, S], with channels last in memory.
        targets: Class indices of the model; int64 [n].
        indices: Indices of the images in the dataset; int64 [n].
        unreadable: Index and reason of each image that was asked for and could not be read.
        unturned: Indices of the images that have an EXIF orientation and were not turned.
    """

    inputs: Tensor
    targets: Tensor
    indices: Tensor
    unreadable: list[tuple[int, str]]
    unturned: list[int]

    def pin_memory(self) -> "Batch":
        """This batch in page-locked memory; DataLoader calls it."""
        return replace(self, inputs=self.inputs.pin_memory())


def load_batches(
    dataset: ImageDataset,
    transform: Transform,
    tasks: Iterable[list[Task]],
    *,
    workers: int = 0,
    substitute: bool = False,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Loads batches of images, in order, in worker processes if asked.

    Args:
        dataset: The dataset.
        transform: The transform of each image.
        tasks: Epoch and index of the images of each batch; drawn while batches are loaded.
        workers: Number of loading processes; 0 loads in this process.
        substitute: Whether the next readable image takes the place of an unreadable one, so that batches
            keep their size; else the unreadable one is left out.
        pin_memory: Whether batches are put into page-locked memory, as in DataLoader.
    """
    loader: DataLoader[Any] = DataLoader(
        _Loading(dataset, transform, substitute),
        sampler=cast(Any, tasks),
        batch_size=None,  # a worker is given all that it is to load together
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    return iter(loader)


def load_batch(dataset: ImageDataset, transform: Transform, tasks: list[Task]) -> Batch:
    """Loads one batch in this thread; unreadable images are left out."""
    return _Loading(dataset, transform, substitute=False)[tasks]


def shard_tasks(length: int, shard: int, batch: int, shards: Sequence[int]) -> list[list[Task]]:
    """Batches for whole shards of a dataset: fixed runs of `shard` images, so that no batch is in two.

    Args:
        length: Number of images in all.
        shard: Images per shard.
        batch: Images per batch.
        shards: Numbers of the shards, in order.
    """
    tasks = []
    for number in shards:
        indices = range(number * shard, min((number + 1) * shard, length))
        tasks += [[(0, index) for index in indices[at : at + batch]] for at in range(0, len(indices), batch)]
    return tasks


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole process group must not take the loading processes from a parent that is still saving.

    They end with it instead, immediately, also where it was killed.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library that does not know it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Loading(Dataset[Any]):
    """The dataset of a worker: epochs and indices → the batch."""

    def __init__(self, dataset: ImageDataset, transform: Transform, substitute: bool):
        self.dataset, self.transform, self.substitute = dataset, transform, substitute

    def __getitem__(self, tasks: list[Task]) -> Batch:
        inputs: Tensor | None = None
        targets: list[int] = []
        indices: list[int] = []
        unreadable: list[tuple[int, str]] = []
        unturned: list[int] = []
        for task in tasks:
            found = self._load(task, unreadable)
            if found is None:
                continue
            tensor, target, index, turned = found
            if inputs is None:
                inputs = _room(len(tasks), tensor)
            inputs[len(targets)] = tensor
            targets.append(target)
            indices.append(index)
            unturned += [] if turned else [index]
        return Batch(
            torch.empty(0) if inputs is None else inputs[: len(targets)],
            torch.tensor(targets, dtype=torch.int64),
            torch.tensor(indices, dtype=torch.int64),
            unreadable,
            unturned,
        )

    def _load(self, task: Task, unreadable: list[tuple[int, str]]) -> tuple[Tensor, int, int, bool] | None:
        """A transformed image, its class, its index and whether it is upright; notes those that cannot be read."""
        epoch, index = task
        for _ in range(10 if self.substitute else 1):
            try:
                image, target = self.dataset[index]
                turned = orientation(image) == 1  # an image that was turned has none any more
                return self.transform(image, epoch, index), target, index, turned
            except ImageError as error:
                unreadable.append((index, str(error)))
                index = (index + 1) % len(self.dataset)
        return None


def _room(count: int, tensor: Tensor) -> Tensor:
    """Room for a batch of tensors like this one, each as it lies in memory; in shared memory, in a worker."""
    flat = torch.empty(count * tensor.numel(), dtype=tensor.dtype)
    if get_worker_info() is not None:
        cast(Any, flat).share_memory_()  # else the whole batch would be copied there
    return flat.as_strided((count, *tensor.shape), (tensor.numel(), *tensor.stride()))
