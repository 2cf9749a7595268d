"""Pictures per second from a folder of JPEGs to labels: this package's engines against its peers.

    python -m benchmarks.classify FOLDER --json classify.json

FOLDER has one folder per WordNet id (or val/ with these in it). Each way runs as its users run it, in a fresh process,
in turns with the others; the median of the rounds counts. All read the same files at the same size and batch size,
with the same number of loading processes and threads; the clock runs from the first file to the last label, loading
processes included, models are built and warmed up before it.

fixefficientnet: `evaluate` with each engine. timm: its model, loader and transform, as in its validate.py; "channels
last" is its option of that name. torchvision and transformers: their own EfficientNet of the same kind, transform and
torch's DataLoader. Lite0 has its real weights, the others random ones: the same for us and timm, whose best guesses
must be the same.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIZES = {"lite0": 256, "b0": 320, "b4": 472}
ENGINES = ("eager", "compile", "onnx", "openvino")
OURS = tuple(f"fixefficientnet, {engine}" for engine in ENGINES)
TIMM = "timm"
PEERS = (TIMM, "timm, channels last", "torchvision", "transformers")
TRANSFORMERS = {"b0": (1.0, 1.0, 1280), "b4": (1.4, 1.8, 1792)}
"""Width and depth coefficient, and hidden dimension, in transformers' configuration."""


class Task:
    """What a child process does: a variant on a list of pictures."""

    def __init__(self, options: argparse.Namespace):
        self.variant: str = options.variant
        self.size = SIZES[self.variant]
        self.folder = Path(options.folder)
        self.batch_size: int = options.batch_size
        self.workers: int = options.workers

    @property
    def name(self) -> str:
        """What `evaluate` calls the model."""
        return "lite0:backbone" if self.variant == "lite0" else f"timm/tf_efficientnet_{self.variant}:{self.weights}"

    @property
    def weights(self) -> Path:
        """File of the random weights, beside the pictures."""
        return self.folder.parent / f"{self.variant}.safetensors"

    def timm_model(self) -> Any:
        """timm's own model with these weights."""
        import timm

        import fixefficientnet

        if self.variant == "lite0":
            return fixefficientnet.create("lite0", "backbone")
        return timm.create_model(f"tf_efficientnet_{self.variant}", checkpoint_path=str(self.weights)).eval()


def ours(task: Task, way: str) -> dict[str, Any]:
    import torch

    from fixefficientnet import engines, processes
    from fixefficientnet.evaluation.evaluate import Settings, measure, pictures_for
    from fixefficientnet.evaluation.models import open_model

    engine = way.partition(", ")[2]
    opened = open_model(task.name)
    settings = Settings(
        str(task.folder),
        size=task.size,
        crop_pct=1.0,
        batch_size=task.batch_size,
        workers=task.workers,
        engine=engine,
    )
    accelerator = processes.accelerator("cpu", "no")
    pictures = pictures_for(opened, settings)
    if engine == "compile":  # what is compiled is kept on disk; to read it again is part of what is timed
        with engines.running(opened, opened.at(task.size), engine), torch.inference_mode():
            opened.model(torch.rand(task.batch_size, 3, task.size, task.size))
    elif engine in engines.EXPORTED:
        engines.exported(opened, opened.at(task.size), engine)
    with torch.inference_mode():
        opened.model(torch.rand(task.batch_size, 3, task.size, task.size))
    start = time.perf_counter()
    found = measure(opened, settings, accelerator, pictures=pictures)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "guesses": [judgement.guesses[0] for judgement in found.evaluation.judged]}


def timms(task: Task, way: str) -> dict[str, Any]:
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config

    layout = torch.channels_last if way.endswith("channels last") else torch.contiguous_format
    model = task.timm_model().to(memory_format=layout)
    config = resolve_data_config({"img_size": task.size, "crop_pct": 1.0}, model=model)  # type: ignore[no-untyped-call]

    def batches() -> Iterable[Any]:
        dataset = create_dataset("", root=str(task.folder))
        loader: Iterable[Any] = create_loader(
            dataset,
            input_size=config["input_size"],
            batch_size=task.batch_size,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            num_workers=task.workers,
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
            device=torch.device("cpu"),
        )
        return loader

    return _timed(task, lambda inputs: model(inputs.contiguous(memory_format=layout)), batches)


def torchvisions(task: Task, way: str) -> dict[str, Any]:
    from torch.utils.data import DataLoader
    from torchvision import models
    from torchvision.datasets import ImageFolder
    from torchvision.transforms._presets import ImageClassification

    model = models.get_model(f"efficientnet_{task.variant}", weights=None).eval()
    transform = ImageClassification(crop_size=task.size, resize_size=task.size)
    dataset = ImageFolder(task.folder, transform)
    return _timed(task, model, lambda: DataLoader(dataset, task.batch_size, num_workers=task.workers))


def transformers(task: Task, way: str) -> dict[str, Any]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    peer: Any = importlib.import_module("transformers")  # without types, and only in the benchmark extra
    width, depth, hidden = TRANSFORMERS[task.variant]
    config = peer.EfficientNetConfig(
        width_coefficient=width, depth_coefficient=depth, hidden_dim=hidden, image_size=task.size, num_labels=1000
    )
    model = peer.EfficientNetForImageClassification(config).eval()
    size = {"height": task.size, "width": task.size}
    processor = peer.EfficientNetImageProcessor(size=size)

    def transform(picture: Any) -> Any:
        return processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    dataset = ImageFolder(task.folder, transform)
    return _timed(
        task,
        lambda inputs: model(inputs).logits,
        lambda: DataLoader(dataset, task.batch_size, num_workers=task.workers),
    )


def _timed(task: Task, model: Callable[[Any], Any], batches: Callable[[], Iterable[Any]]) -> dict[str, Any]:
    import torch

    guesses: list[int] = []
    with torch.inference_mode():
        model(torch.rand(task.batch_size, 3, task.size, task.size))
        start = time.perf_counter()
        for inputs, _ in batches():
            guesses += model(inputs).argmax(1).tolist()
        return {"seconds": time.perf_counter() - start, "guesses": guesses}


def ways_of(variant: str) -> tuple[str, ...]:
    """Lite0 is in neither torchvision nor transformers."""
    return (*OURS, *(PEERS[:2] if variant == "lite0" else PEERS))


def child(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(options.threads)
    run = {"fixefficientnet": ours, "timm": timms, "torchvision": torchvisions, "transformers": transformers}
    return run[options.way.partition(",")[0]](Task(options), options.way)


@contextmanager
def prepared(folder: Path, pictures: int, variants: Iterable[str]) -> Iterator[Path]:
    """Links to so many pictures, evenly spread; the random weights beside."""
    import numpy as np
    import timm
    import torch
    from safetensors.torch import save_file

    folder = folder / "val" if (folder / "val").is_dir() else folder
    every = sorted(folder.glob("*/*"))
    with tempfile.TemporaryDirectory(prefix="fixefficientnet-classify-") as temporary:
        for index in np.unique(np.linspace(0, len(every) - 1, min(pictures, len(every))).astype(int)):
            link = Path(temporary) / "pictures" / every[index].parent.name / every[index].name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(every[index].resolve())
        for variant in variants:
            if variant != "lite0":
                torch.manual_seed(0)
                model = timm.create_model(f"tf_efficientnet_{variant}")
                save_file(model.state_dict(), Path(temporary) / f"{variant}.safetensors")
        yield Path(temporary) / "pictures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variants", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    for hidden, kind in (("--way", str), ("--variant", str), ("--batch-size", int)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(child(options)))
        return
    rows = []
    with prepared(options.folder, options.pictures, options.variants) as folder:
        for variant in options.variants:
            for batch_size in options.batch_sizes:
                rows += _rows(options, folder, variant, batch_size)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def _rows(options: argparse.Namespace, folder: Path, variant: str, batch_size: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways_of(variant)}
    for _ in range(options.rounds):
        for way, results in found.items():
            given = {"variant": variant, "batch-size": batch_size, "way": way}
            given |= {"threads": options.threads, "workers": options.workers}
            arguments = [text for key, value in given.items() for text in (f"--{key}", str(value))]
            command = [sys.executable, "-m", "benchmarks.classify", str(folder), *arguments]
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    guesses = {way: results[0]["guesses"] for way, results in found.items()}
    rates = {
        way: statistics.median(len(r["guesses"]) / r["seconds"] for r in results) for way, results in found.items()
    }
    print(f"\n{variant} at {SIZES[variant]} pixels, batches of {batch_size}, {len(guesses[TIMM])} pictures\n")
    print("| | pictures/s | times timm | guesses as timm's |\n|---|---|---|---|")
    rows = []
    for way, rate in rates.items():
        same = sum(one == two for one, two in zip(guesses[way], guesses[TIMM], strict=True))
        alike = f"{same} of {len(guesses[TIMM])}" if way.startswith(("fix", "timm")) else "-"
        print(f"| {way} | {rate:.1f} | {rate / rates[TIMM]:.2f} | {alike} |", flush=True)
        row = {"variant": variant, "size": SIZES[variant], "batch_size": batch_size, "way": way}
        rows.append(row | {"pictures_per_second": rate, "times_timm": rate / rates[TIMM], "same_guesses": alike})
    return rows


if __name__ == "__main__":
    main()
