"""Batches of a dataset, loaded in order, in worker processes if asked.

A worker loads a part of a batch, and the parts are put together on the device: so the memory of what is loaded ahead
depends neither on the size of the batches nor on the number of workers. Every batch says which images it holds, and an
image that cannot be read is named, never silently replaced.
"""

import contextlib
import ctypes
import logging
import math
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fixefficientnet._internal import waiting
from fixefficientnet._internal.processes import local_processes
from fixefficientnet.data.dataset import ImageDataset
from fixefficientnet.errors import DataError, ImageError
from fixefficientnet.preprocessing import orientation

IN_FLIGHT = 2**30
"""Most bytes of images that the workers of a process load ahead."""
_PART = 32
"""Most images that a worker loads at a time."""
_SHARED = Path("/dev/shm")  # noqa: S108 - only its free space is asked for
"""Where Linux keeps what processes share."""
_PR_SET_PDEATHSIG = 1
_logger = logging.getLogger(__name__)

Transform = Callable[[Image.Image, int, int], Tensor]
"""(RGB image, epoch, index) → tensor; every draw is a function of epoch and index alone."""
Task = tuple[int, int]
"""(epoch, index) of one image to load."""


@dataclass(frozen=True, slots=True)
class InEveryEpoch:
    """A test-time transform as a `Transform`: the same in every epoch and for every image."""

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

    def after(self, earlier: "Batch | None", inputs: Tensor) -> "Batch":
        """A batch of an earlier one's images and then these, given the inputs of both."""
        if earlier is None:
            return replace(self, inputs=inputs)
        return Batch(
            inputs,
            torch.cat([earlier.targets, self.targets]),
            torch.cat([earlier.indices, self.indices]),
            earlier.unreadable + self.unreadable,
            earlier.unturned + self.unturned,
        )

    def pin_memory(self) -> "Batch":
        """This batch in page-locked memory; DataLoader calls it."""
        return replace(self, inputs=self.inputs.pin_memory())


@dataclass(frozen=True, slots=True)
class Ahead:
    """What workers (at least 1) load ahead: so many parts each, of so many images of one batch."""

    workers: int
    part: int
    parts: int

    @classmethod
    def of(cls, workers: int, batch: int, room: int) -> "Ahead":
        """What is loaded ahead: two parts per worker or more, and a whole batch, if there is room (in images)."""
        workers = min(workers, room)
        part = min(_PART, batch, max(1, room // workers // 2))
        return cls(workers, part, min(max(2, math.ceil(batch / part / workers)), room // workers // part))


def load_batches(
    dataset: ImageDataset,
    transform: Transform,
    tasks: Iterable[list[Task]],
    *,
    workers: int = 0,
    substitute: bool = False,
    device: torch.device | None = None,
) -> Generator[Batch, None, None]:
    """Loads batches of images, in order, in so many loading processes; 0 loads in this one.

    The inputs go to the device (None: the CPU). Tasks are drawn while batches are loaded. If `substitute`, the next
    readable image takes the place of an unreadable one, so that batches keep their size; else that is left out.

    Raises:
        DataError: There is too little shared memory for workers; one of them was killed, or hangs.
    """
    device, tasks = device or torch.device("cpu"), iter(tasks)
    loading = _Loading(dataset, transform, substitute)
    if not workers:
        yield from (_on(device, loading.batch(batch)) for batch in tasks)
    elif (first := next(tasks, None)) is not None:
        ahead = _ahead(workers, len(first), transform)
        loader: DataLoader[Any] = DataLoader(
            loading,
            sampler=cast(Any, _parts(chain([first], tasks), ahead.part)),
            batch_size=None,  # a worker is given all that it is to load together
            num_workers=ahead.workers,
            prefetch_factor=ahead.parts,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
            timeout=waiting.longest(),
        )
        try:
            yield from _joined(loader, device)
        except RuntimeError as error:  # torch has no class for it
            traceback.clear_frames(error.__traceback__)  # they hold what holds the loading processes
            if re.search(r"shared memory|\(shm\)", str(error)):
                raise DataError(f"Loading processes ran out of shared memory. {_remedy()}") from error
            if "timed out" in str(error):
                raise DataError(
                    f"The loading processes gave no images for {waiting.longest():g} s ({waiting.VARIABLE} sets how "
                    "long that may take). Does the disk with the images still answer?"
                ) from error
            if re.search(r"DataLoader worker.*(killed|exited)", str(error)):
                reason = str(error).splitlines()[0].rstrip(". ")
                raise DataError(
                    f"A loading process has ended: {reason}. Linux kills processes where memory is short: use fewer "
                    "loading processes (-j)."
                ) from error
            raise


def _ahead(workers: int, batch: int, transform: Transform) -> Ahead:
    size = transform(Image.new("RGB", (8, 8)), 0, 0).nbytes  # whatever the image
    room = IN_FLIGHT
    if _SHARED.exists():
        # half of it, as others need some too, such as the communication between GPUs
        room = min(room, shutil.disk_usage(_SHARED).free // 2 // local_processes())
    if room < size:
        raise DataError(f"Loading processes need shared memory, of {size / 1e6:.1f} MB per image. {_remedy()}")
    ahead = Ahead.of(workers, batch, room // size)
    if ahead.workers < workers:
        _logger.warning("%s loading processes instead of %s. %s", ahead.workers, workers, _remedy())
    return ahead


def _remedy() -> str:
    """What is known of the shared memory, and what can be done where it is too small."""
    there = f"{_SHARED} has {shutil.disk_usage(_SHARED).free / 1e6:.1f} MB free. " if _SHARED.exists() else ""
    return f"{there}Give it more (docker run --shm-size 2g), or load without processes (-j 0)."


def _parts(tasks: Iterable[list[Task]], size: int) -> Iterator[tuple[list[Task], int]]:
    """The parts of batches, and how many images of its batch come after each."""
    for batch in tasks:
        for end in range(size, len(batch) + size, size):
            yield batch[end - size : end], max(0, len(batch) - end)


def _joined(parts: Iterable[tuple[Batch, int]], device: torch.device) -> Iterator[Batch]:
    """Whole batches on the device; shared memory is given back part by part."""
    inputs: Tensor | None = None
    joined: Batch | None = None
    for part, left in parts:
        if joined is None and not left:
            yield _on(device, part)
            continue
        before, count = len(joined.targets) if joined else 0, len(part.targets)
        if count:
            if inputs is None:
                inputs = _room(before + count + left, part.inputs[0], device)
            inputs[before : before + count].copy_(part.inputs, non_blocking=True)
        joined = part.after(joined, torch.empty(0) if inputs is None else inputs[: before + count])
        if not left:
            yield joined
            inputs = joined = None


def _on(device: torch.device, batch: Batch) -> Batch:
    return replace(batch, inputs=batch.inputs.to(device, non_blocking=True))


def load_batch(dataset: ImageDataset, transform: Transform, tasks: list[Task]) -> Batch:
    """Loads one batch in this thread; unreadable images are left out."""
    return _Loading(dataset, transform, substitute=False).batch(tasks)


def shard_tasks(length: int, shard: int, batch: int, shards: Iterable[int]) -> Iterator[list[Task]]:
    """Batches for whole shards of a dataset: fixed runs of `shard` images, so that no batch is in two.

    The dataset has `length` images; `shards` are the numbers of those that are loaded, in order.
    """
    for number in shards:
        indices = range(number * shard, min((number + 1) * shard, length))
        for at in range(0, len(indices), batch):
            yield [(0, index) for index in indices[at : at + batch]]


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
    """The dataset of a worker: a part of a batch, as `_parts` gives it → the same, loaded."""

    def __init__(self, dataset: ImageDataset, transform: Transform, substitute: bool):
        self.dataset, self.transform, self.substitute = dataset, transform, substitute

    def __getitem__(self, part: tuple[list[Task], int]) -> tuple[Batch, int]:
        return self.batch(part[0]), part[1]

    def batch(self, tasks: list[Task]) -> Batch:
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


def _room(count: int, tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Room for a batch of tensors like this one, in its order of dimensions; in shared memory, in a worker."""
    tensor = torch.empty_like(tensor)  # without gaps, which a crop has between its rows
    flat = torch.empty(count * tensor.numel(), dtype=tensor.dtype, device=device)
    if get_worker_info() is not None:
        cast(Any, flat).share_memory_()  # else the whole batch would be copied there
    return flat.as_strided((count, *tensor.shape), (tensor.numel(), *tensor.stride()))
