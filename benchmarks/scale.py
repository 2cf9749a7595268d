r"""Data sets as large as ImageNet: time and memory of all that a run does with them, against the number of images.

    python -m benchmarks.scale FOLDER --output docs/results/scale.csv
    python -m benchmarks.figures

FOLDER gets a training folder of each size, if it is not there yet: hard links to a few small JPEGs, in ImageNet's 1000
folders, named as its images are. Each part runs in a fresh process, with a tiny network on 32 pixels and one worker.
The classifier trains for one epoch on the features of the part before. Of opening and the fingerprint, CPU time is
given too, and the round of three that took the least. Memory is the growth of a process's anonymous
memory, at its largest of what is seen every 20 ms; a worker's is what it shares with no other process. What was
measured before, of other sizes or parts, stays in the file.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import machine
from benchmarks.tables import in_order, markdown
from fixefficientnet._internal.files import write_atomically
from fixefficientnet.evaluation.tables import as_csv, from_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "scale"
IMAGENET = 1_281_167
SIZES = (10_000, 100_000, IMAGENET)
CLASSES, JPEGS = 1000, 64
"""Folders, and files that the images of all are links to: a file can have some 65,000."""
PIXELS, BATCH, WORKERS = 32, 256, 1
LOADED = 20_000
"""Images that are loaded to see what a worker takes, where a whole epoch would take long."""
BACKBONE = "test_efficientnet.r160_in1k"


def layout(folder: Path, size: int) -> Path:
    """Makes a data set of a number of images, if it is not there; returns its folder."""
    import numpy as np
    from PIL import Image

    from fixefficientnet.classes import imagenet_order

    data, done = folder / str(size), folder / str(size) / "complete"
    if done.exists():
        return data
    jpegs = [folder / "images" / f"{number}.jpg" for number in range(JPEGS)]
    jpegs[0].parent.mkdir(parents=True, exist_ok=True)
    for number, jpeg in enumerate(jpegs):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC).save(jpeg, quality=90)
    shutil.rmtree(data, ignore_errors=True)
    for label, name in enumerate(imagenet_order()[:size]):
        place = data / "train" / name
        place.mkdir(parents=True)
        for number in range(label, size, CLASSES):
            os.link(jpegs[number % JPEGS], place / f"{name}_{17 * (number // CLASSES) + 2}.JPEG")
    done.touch()
    return data


class Watch(threading.Thread):
    """Sees how much memory this process and its workers take meanwhile, in MiB.

    Attributes:
        memory: Largest growth of this process's anonymous memory.
        worker: Most that one of the workers had for itself.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.memory, self.worker = 0.0, 0.0
        self._before, self._over = machine.kilobytes("RssAnon"), threading.Event()

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Looks until it is over."""
        last = 0.0
        while not self._over.wait(0.02):
            self.memory = max(self.memory, (machine.kilobytes("RssAnon") - self._before) / 1024)
            if time.monotonic() - last >= 1:
                last = time.monotonic()
                self.worker = max([self.worker, *map(_own, multiprocessing.active_children())])


def _own(process: Any) -> float:
    """What a process shares with no other one, in MiB; 0 if it ended."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def _opening(part: str, data: Path) -> Callable[[], Any]:
    import timm.data
    from torchvision.datasets import ImageFolder

    from fixefficientnet.data.dataset import open_dataset

    if part == "torchvision":
        return lambda: ImageFolder(data / "train")
    if part == "timm":
        return lambda: timm.data.create_dataset("", str(data / "train"))
    if part == "open":
        return lambda: open_dataset(str(data), "train")
    return open_dataset(str(data), "train").fingerprint


def _loading(part: str, data: Path) -> Callable[[], Any]:
    """Some images in random order, from all over the data set, as an epoch takes them; the first of it."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from fixefficientnet.data.dataset import open_dataset
    from fixefficientnet.data.loading import InEveryEpoch, load_batches
    from fixefficientnet.preprocessing import Preprocess

    def batches(length: int) -> list[list[int]]:
        chosen = np.random.default_rng(0).permutation(length)[:LOADED].tolist()
        return [chosen[at : at + BATCH] for at in range(0, len(chosen), BATCH)]

    if part == "torchvision loading":
        floats = transforms.Compose([transforms.Resize((PIXELS, PIXELS)), transforms.ToTensor()])
        theirs: Any = ImageFolder(data / "train", floats)
        return lambda: sum(1 for _ in DataLoader(theirs, batch_sampler=batches(len(theirs)), num_workers=WORKERS))
    ours = open_dataset(str(data), "train")
    transform = InEveryEpoch(Preprocess(PIXELS, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).pixels)
    tasks = ([(0, index) for index in batch] for batch in batches(len(ours)))
    device = torch.device("cpu")
    return lambda: sum(1 for _ in load_batches(ours, transform, tasks, workers=WORKERS, device=device))


def _tuning(part: str, data: Path, work: Path) -> Callable[[], Any]:
    """Statistics alone; features and a step of the classifier; or an epoch of it on features that are there."""
    from accelerate import Accelerator

    from fixefficientnet._internal.console import Console
    from fixefficientnet.data.dataset import open_dataset
    from fixefficientnet.reproduce import cached, network, recipe
    from fixefficientnet.reproduce.checkpoints import Checkpoints
    from fixefficientnet.reproduce.log import Log
    from fixefficientnet.reproduce.session import Session

    subject = recipe.subject_of_backbone(BACKBONE)
    chosen = {"tune": "bn-stats" if part == "statistics" else "classifier", "test_size": PIXELS, "epochs": 1}
    chosen |= {"method": "cached", "weights": "random", "forward_batch": BATCH, "statistics_images": 0}
    resolved = recipe.resolve(subject, chosen)
    net = network.prepare(network.load(subject, "random", num_classes=CLASSES, seed=0, size=PIXELS), resolved)
    session = Session(Accelerator(cpu=True), work, Log(work, enabled=True, console=Console(quiet=True)), WORKERS)
    checkpoints = Checkpoints(work / f"{part}.safetensors", {}, sys.maxsize, float("inf"))
    return lambda: cached.tune(session, net, open_dataset(str(data), "train"), checkpoints, work / "features")


def _evaluating(data: Path) -> Callable[[], Any]:
    import timm

    import fixefficientnet
    from fixefficientnet.evaluation import evaluate  # noqa: F401 - before the clock starts

    model = timm.create_model(BACKBONE.partition(".")[0], num_classes=CLASSES)
    settings = {"split": "train", "size": PIXELS, "batch_size": BATCH, "workers": WORKERS, "device": "cpu"}
    return lambda: fixefficientnet.evaluate(model, data, **settings).summary()


PARTS = {
    "torchvision": "opening: torchvision's ImageFolder",
    "timm": "opening: timm's create_dataset",
    "open": "opening",
    "fingerprint": "fingerprint",
    "torchvision loading": f"loading up to {LOADED:,} at random: torchvision",
    "loading": f"loading up to {LOADED:,} at random",
    "statistics": "statistics pass",
    "features": "features pass, and one epoch",
    "classifier": "one epoch on these features",
    "evaluation": "evaluation",
}
"""What is measured, in the order in which it is."""
OPENING, ROUNDS = ("torchvision", "timm", "open", "fingerprint"), 3
"""Parts that are short: the round counts that took the least CPU time."""
OTHERS = ("torchvision", "timm", "torchvision loading")


def child(given: dict[str, Any]) -> dict[str, Any]:
    part, data, work = given["part"], Path(given["data"]), Path(given["work"])
    if part in ("statistics", "features", "classifier"):
        work.mkdir(exist_ok=True)
        take = _tuning(part, data, work)
    elif part == "evaluation":
        take = _evaluating(data)
    else:
        take = (_loading if part.endswith("loading") else _opening)(part, data)
    with Watch() as watch:
        start, used = time.perf_counter(), time.process_time()
        kept = take()
        seconds, used = time.perf_counter() - start, time.process_time() - used
        time.sleep(0.05)  # for a last look
    del kept
    return {"seconds": seconds, "cpu_seconds": used, "memory": watch.memory, "worker": watch.worker or None}


def rows(folder: Path, sizes: Iterable[int], parts: Iterable[str]) -> Iterable[machine.Row]:
    """Measures parts at sizes; gives a row each."""
    for size in sizes:
        data = layout(folder, size)
        work = data / "work"
        if "features" in parts:
            shutil.rmtree(work, ignore_errors=True)
        for part in parts:
            given = {"part": part, "data": str(data), "work": str(work)}
            rounds = [machine.fresh(NAME, given) for _ in range(ROUNDS if part in OPENING else 1)]
            yield {"images": size, "part": part, **min(rounds, key=lambda found: found["cpu_seconds"])}


def merged(earlier: Iterable[Mapping[str, Any]], taken: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Puts a row in the place of the earlier one of the same part and size."""
    every = {(row["images"], row["part"]): row for row in (*earlier, taken)}
    order = list(PARTS)
    return [every[key] for key in sorted(every, key=lambda key: (key[0], order.index(key[1])))]


def table(found: Iterable[Mapping[str, Any]]) -> str:
    """Returns the docs' table as Markdown."""
    every = list(found)
    sizes = in_order(row["images"] for row in every)
    lines = []
    for part, title in PARTS.items():
        cells = []
        for size in sizes:
            row = next((row for row in every if (row["part"], row["images"]) == (part, size)), None)
            worker = f", worker {row['worker']:.0f}" if row and row["worker"] else ""
            used = f" ({row['cpu_seconds']:.2f} of CPU)" if row and row["cpu_seconds"] and part in OPENING else ""
            cells.append(f"{row['seconds']:.2f} s{used}, {row['memory']:.0f} MiB{worker}" if row else "not run")
        lines.append([title, *cells])
    return markdown(["", *(f"{size:,} images" for size in sizes)], lines)


def draw(found: Iterable[Mapping[str, Any]]) -> "Figure":
    """Draws time and memory against the number of images, both axes logarithmic; `found` is the CSV file's rows."""
    from fixefficientnet.evaluation import figures

    every = list(found)
    figure, axes = figures.panels(2, width=11, height=4.2)
    for axis, name, least, what in (
        (axes[0], "seconds", 0.01, "time, s"),
        (axes[1], "memory", 1, "growth of the process's memory, MiB"),
    ):
        for number, (part, title) in enumerate(PARTS.items()):
            mine = [row for row in every if row["part"] == part]
            values = [max(row[name], least) for row in mine]
            look: dict[str, Any] = {"color": f"C{number}", "marker": "os^vDXP*<>"[number]}
            look["linestyle"] = "--" if part in OTHERS else "-"
            axis.plot([row["images"] for row in mine], values, label=title, **look)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("images")
        axis.set_ylabel(what)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the data sets are, or are to be; 7 GB for all")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of images")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="only these")
    parser.add_argument("-o", "--output", type=Path, help="write the figures to this CSV file too")
    options = parser.parse_args()
    found: list[Mapping[str, Any]] = []
    if options.output and options.output.exists():
        found = list(from_csv(options.output.read_text()))
    for row in rows(options.folder, options.sizes, options.parts):
        print(row, file=sys.stderr, flush=True)
        found = merged(found, row)
        if options.output:
            write_atomically(options.output, as_csv(found).encode())
    print(table(found))


if __name__ == "__main__":
    main()
