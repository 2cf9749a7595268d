"""Loading for fine-tuning: from files to the network's input on the device, beside torchvision's and timm's loaders.

    python -m benchmarks loading --images FOLDER

All methods decode the same files (from the page cache) and augment them as FixRes does, with torchvision's transforms
for the others: resize, mirror, colours, a crop at a random column. torchvision is its ImageFolder in a DataLoader that
ships float32; timm is its `create_loader`, which ships uint8 and normalises on the device, as this package does.
"pixels alone" leaves the normalising out, which is a GPU's work where there is one.

The methods take turns in one process, with 1, 2, 4, … loading processes up to the number of cores. The median of the
rounds counts; what is said of torchvision is the median of the rounds' ratios. CPU time is that of all processes.
Memory is taken in fresh processes, when one batch was taken, and nobody takes another until no more can be loaded
ahead: in flight is the shared memory that is filled then; in all is that and what the processes have for themselves,
beyond what the main process had before.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

from benchmarks import machine

NAME = "loading"
OURS, PIXELS, TORCHVISION, TIMM = "fixefficientnet", "fixefficientnet, pixels alone", "torchvision", "timm"
METHODS = (OURS, PIXELS, TORCHVISION, TIMM)
SIZES = (320, 472, 600)
SHARED = "/dev/shm"  # noqa: S108 - only its free space is asked for
BATCH, IMAGES = 32, 128
"""Images per batch, and per measurement."""

Loader = Callable[[int, int], Iterator[Any]]
"""(images, workers) → batches of the network's input."""


def loaders(folder: Path, size: int, batch: int, device: str) -> dict[str, Loader]:
    """Returns each method's loader of the first images of a folder."""
    import torch
    from timm.data import create_loader
    from timm.data import dataset as timms
    from timm.data.transforms import ToNumpy
    from torch.utils.data import DataLoader, Subset
    from torchvision import datasets, transforms
    from torchvision.transforms import functional

    from fixefficientnet.data.dataset import open_dataset
    from fixefficientnet.data.loading import load_batches
    from fixefficientnet.preprocessing import FineTuningTransform, Preprocess

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    test = Preprocess(size, 1.0, "bicubic", mean, std)
    images = open_dataset(str(folder), None)
    target, pin = torch.device(device), device == "cuda"

    def crop_at_a_random_column(image: Any) -> Any:
        left = random.randint(0, image.width - size)
        return functional.crop(image, round((image.height - size) / 2), left, size, size)

    augmentation = [
        transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.05, 0.05, 0.05),
        crop_at_a_random_column,
    ]
    floats = [transforms.ToTensor(), transforms.Normalize(mean, std)]

    def pixels(count: int, workers: int) -> Iterator[Any]:
        indices = range(count)
        tasks = [[(0, index) for index in indices[at : at + batch]] for at in range(0, count, batch)]
        transform = FineTuningTransform(test, 0, 0.5, 0.05)
        for one in load_batches(images, transform, tasks, workers=workers, device=target):
            yield one.inputs

    def ours(count: int, workers: int) -> Iterator[Any]:
        yield from map(test.normalise, pixels(count, workers))

    def torchvisions(count: int, workers: int) -> Iterator[Any]:
        found = Subset(datasets.ImageFolder(folder, transforms.Compose([*augmentation, *floats])), range(count))
        for inputs, _ in DataLoader(found, batch, num_workers=workers, pin_memory=pin):
            yield inputs.to(target, non_blocking=True)

    def of_timm(count: int, workers: int) -> Iterator[Any]:
        found = cast(Any, timms.ImageDataset)(str(folder))
        found.reader.samples = found.reader.samples[:count]
        loader: Any = create_loader(
            found, (3, size, size), batch, mean=mean, std=std, num_workers=workers, pin_memory=pin, device=target
        )
        found.transform = transforms.Compose([*augmentation, ToNumpy()])
        for inputs, _ in loader:
            yield inputs

    return {OURS: ours, PIXELS: pixels, TORCHVISION: torchvisions, TIMM: of_timm}


def child(given: dict[str, Any]) -> dict[str, Any]:
    methods = loaders(Path(given["folder"]), given["size"], given["batch"], given["device"])
    if "hold" in given:
        return _held(methods[given["hold"]], given)
    cases = [(method, workers) for workers in given["workers"] for method in methods]
    found: dict[str, list[dict[str, float]]] = {_key(*case): [] for case in cases}
    for number in range(given["rounds"]):
        for method, workers in reversed(cases) if number % 2 else cases:
            found[_key(method, workers)].append(_rate(methods[method], given, workers))
    return found


def _key(method: str, workers: int) -> str:
    return f"{method} {workers}"


def _rate(loader: Loader, given: dict[str, Any], workers: int) -> dict[str, float]:
    before, start = sum(os.times()[:4]), machine.settled(given["device"])
    seen = sum(len(inputs) for inputs in loader(given["images"], workers))
    seconds = machine.settled(given["device"]) - start
    for process in multiprocessing.active_children():
        process.join()  # its time counts once it has ended
    return {"images_per_second": seen / seconds, "cpu_seconds": (sum(os.times()[:4]) - before) / seen}


def _held(loader: Loader, given: dict[str, Any]) -> dict[str, float]:
    """Memory in MiB when one batch was taken, and nothing more can be loaded ahead, with the most workers."""
    shared, before = shutil.disk_usage(SHARED).used, _anonymous(os.getpid())
    batches = loader(given["most"], given["workers"][-1])
    taken = list(islice(batches, 1))
    busy = -1.0
    while busy != (busy := sum(_busy(process.pid) for process in multiprocessing.active_children())):
        time.sleep(0.25)
    in_flight = shutil.disk_usage(SHARED).used - shared
    pids = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
    memory = in_flight + sum(map(_anonymous, pids)) - before
    del taken, batches
    return {"in_flight": in_flight / 2**20, "memory": memory / 2**20}


def _busy(pid: int | None) -> float:
    """CPU time of a process, in ticks."""
    return sum(map(float, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


def _anonymous(pid: int | None) -> int:
    """A process's memory but for files and what is shared on purpose, in bytes; what a fork left shared counts once."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """Measures loading; one row per size, number of loading processes and method."""
    folder = machine.images_in(options.images)[0].parent.parent
    cores = len(os.sched_getaffinity(0))
    workers = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= cores]
    every: list[machine.Row] = []
    for size in SIZES:
        given = {"folder": str(folder), "size": size, "batch": BATCH, "workers": workers, "rounds": options.rounds}
        given |= {"images": IMAGES, "most": BATCH * (2 * workers[-1] + 2), "device": options.device}
        every += rows_of(given, lambda more: machine.fresh(NAME, more, {"OMP_NUM_THREADS": "1"}))
    return every


def rows_of(given: dict[str, Any], measure: Callable[[dict[str, Any]], dict[str, Any]]) -> list[machine.Row]:
    """Returns the rows of one size, which `child` measures, in a fresh process or here."""
    found = measure(given)
    held = {method: measure({**given, "hold": method}) for method in METHODS}
    every = []
    for workers in given["workers"]:
        plain = found[_key(TORCHVISION, workers)]
        for method in METHODS:
            rounds = found[_key(method, workers)]
            every.append(
                {
                    "benchmark": NAME,
                    "size": given["size"],
                    "batch_size": given["batch"],
                    "workers": workers,
                    "method": method,
                    "images_per_second": machine.median(rounds, "images_per_second"),
                    "cpu_seconds": machine.median(rounds, "cpu_seconds"),
                    # in each round, as other work on the machine differs between them
                    "times_torchvision": _times(rounds, plain, "images_per_second"),
                    "times_torchvisions_cpu": _times(rounds, plain, "cpu_seconds"),
                    "spread": machine.spread(rounds, "images_per_second"),
                    **(held[method] if workers == given["workers"][-1] else {}),
                }
            )
    return every


def _times(rounds: list[dict[str, float]], plain: list[dict[str, float]], name: str) -> float:
    """The median over the rounds of one method's figure divided by another's."""
    return statistics.median(one[name] / other[name] for one, other in zip(rounds, plain, strict=True))
