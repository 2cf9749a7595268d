"""Images per second from a folder of JPEGs to labels: this package's engines against its peers.

    python -m benchmarks classify --images FOLDER

FOLDER has one folder per WordNet id (or val/ with these in it). Each setup runs as its users run it, in fresh processes
that take turns with the others'; the median of the rounds counts. All read the same files at the same size and batch
size, on the same cores, at first with a warm-up; the clock runs from the first file to the last label.

fixefficientnet: `evaluate` with each engine but compile (which benchmarks/forward.py has), and `predict` with ONNX
Runtime; without loading processes, as is the default, but for "-j 1": one batch at a time, and one process that loads.
What exporting takes is measured apart, where nothing is kept yet. timm: its model, loader and transform, as in its
validate.py; "channels last" and "bf16" are its options. torchvision and transformers: their own EfficientNet of the
same kind, transform and torch's DataLoader. The peers load in one process beside, timm in none and in two as well.
Lite0 has its real weights, the others random ones, the same for us and timm; in float32 both must predict the
same. Batches of 2 are our default.
"""

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import machine

NAME = "classify"

SIZES = {"lite0": 256, "b0": 320, "b4": 472}
IMAGES = {"lite0": 192, "b0": 128, "b4": 48}
"""How many are enough for some seconds each."""
TIMES_ON_CUDA = 32
ALONE = "fixefficientnet, -j 1"
OURS = {
    "fixefficientnet": ("eager", "no"),
    ALONE: ("eager", "no"),
    "fixefficientnet in bf16": ("eager", "bf16"),
    "fixefficientnet, onnx": ("onnx", "no"),
    "fixefficientnet, openvino": ("openvino", "no"),
    "fixefficientnet, openvino in bf16": ("openvino", "bf16"),
    "fixefficientnet, openvino in bf16, fast preprocessing": ("openvino", "bf16"),
}
"""Engine and precision of `evaluate`."""
ON_CUDA = {
    "fixefficientnet": ("eager", "no"),
    "fixefficientnet, compile": ("compile", "no"),
    "fixefficientnet in bf16": ("eager", "bf16"),
}
PREDICT = "fixefficientnet predict, onnx"
TIMM = "timm"
LOADING = {"timm, 0 loading processes": 0, "timm, 2 loading processes": 2}
PEERS = (TIMM, "timm, channels last", "timm, channels last, bf16", *LOADING, "torchvision", "transformers")
ONLY_IN = {"torchvision": ("b0", "b4"), "transformers": ("b0", "b4")}
"""Lite0 is in neither."""
BATCHES = {"cpu": (1, 2, 16), "cuda": (1, 16)}
OUR_BATCH = 2
"""Our default on a CPU."""
TRANSFORMERS = {"b0": (1.0, 1.0, 1280), "b4": (1.4, 1.8, 1792)}
"""Width and depth coefficient, and hidden dimension, in transformers' configuration."""


class Task:
    """What a child process does: a variant on a list of images."""

    def __init__(self, given: dict[str, Any]):
        self.variant: str = given["variant"]
        self.size = SIZES[self.variant]
        self.folder = Path(given["folder"])
        self.batch_size: int = given["batch_size"]
        self.device: str = given["device"]
        self.workers = machine.loading_processes(self.device)
        self.paths = [str(path) for path in sorted(self.folder.glob("*/*"))]

    @property
    def name(self) -> str:
        """What `evaluate` calls the model."""
        return "lite0:backbone" if self.variant == "lite0" else f"timm/tf_efficientnet_{self.variant}:{self.weights}"

    @property
    def weights(self) -> Path:
        """File of the random weights, beside the images."""
        return self.folder.parent / f"{self.variant}.safetensors"

    def timm_model(self) -> Any:
        """timm's own model with these weights."""
        import timm

        import fixefficientnet

        if self.variant == "lite0":
            return fixefficientnet.create("lite0", "backbone")
        return timm.create_model(f"tf_efficientnet_{self.variant}", checkpoint_path=str(self.weights)).eval()


def ours(task: Task, setup: str) -> dict[str, Any]:
    import math

    from fixefficientnet import prediction
    from fixefficientnet._internal.processes import accelerator
    from fixefficientnet._internal.threads import default_threads
    from fixefficientnet.evaluation.evaluate import Settings, dataset_for
    from fixefficientnet.evaluation.loop import predict_dataset
    from fixefficientnet.models import open_model
    from fixefficientnet.runtimes import engines

    engine, precision = {**OURS, **ON_CUDA, PREDICT: ("onnx", "no")}[setup]
    loaded = open_model(task.name)
    test = loaded.at(task.size, 1.0)
    settings = Settings(str(task.folder))
    images = dataset_for(loaded, settings)
    loaded.network.to(task.device)
    computing = accelerator(task.device, precision)
    workers = task.workers if setup == ALONE or task.device == "cuda" else 0
    batches = math.ceil(len(images) / task.batch_size)
    threads = 1 if workers or engine == "compile" else default_threads(loaded.network, batches)
    exporting = 0.0
    if engine in engines.EXPORTED:
        start = time.perf_counter()
        engines.exported(loaded, test, engine)
        exporting = time.perf_counter() - start

    def once() -> list[int]:
        if setup == PREDICT:
            model: Any = loaded.network
            model.preprocess = loaded.transform(test)
            found = prediction.stream(task.paths, model, batch_size=task.batch_size, threads=threads)
            return [one.labels[0].index for one in found]
        evaluated = predict_dataset(
            loaded.network,
            images,
            test,
            transform=loaded.transform(test, fast="fast" in setup),
            batch_size=task.batch_size,
            shard=task.batch_size,
            workers=workers,
            threads=threads,
            accelerator=computing,
        ).evaluated
        return [prediction.top5[0] for prediction in evaluated]

    with engines.running(loaded, test, engine, threads=threads, precision=precision):
        return {**_timed(task, loaded.network, once), "exporting": exporting}


def timms(task: Task, setup: str) -> dict[str, Any]:
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config

    layout = torch.channels_last if "channels last" in setup else torch.contiguous_format
    model = task.timm_model().to(memory_format=layout).to(task.device)
    config = resolve_data_config({"img_size": task.size, "crop_pct": 1.0}, model=model)  # type: ignore[no-untyped-call]

    dataset = create_dataset("", root=str(task.folder))

    def forward(inputs: Any) -> Any:
        with torch.autocast(task.device, torch.bfloat16, enabled=setup.endswith("bf16")):
            return model(inputs.contiguous(memory_format=layout))

    def batches() -> Iterable[Any]:
        batches_of: Iterable[Any] = create_loader(
            dataset,
            input_size=config["input_size"],
            batch_size=task.batch_size,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            num_workers=LOADING.get(setup, task.workers),
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
            device=torch.device(task.device),
            pin_memory=task.device == "cuda",
        )
        return batches_of

    return _loop(task, forward, batches)


def loader(task: Task, dataset: Any) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(dataset, task.batch_size, num_workers=task.workers, pin_memory=task.device == "cuda")


def torchvisions(task: Task, setup: str) -> dict[str, Any]:
    from torchvision import models
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode

    name = f"efficientnet_{task.variant}"
    model = models.get_model(name, weights=None).eval().to(task.device)
    preset = models.get_model_weights(name).DEFAULT.transforms
    transform = preset(crop_size=task.size, resize_size=task.size, interpolation=InterpolationMode.BICUBIC)
    dataset = ImageFolder(task.folder, transform)
    return _loop(task, model, lambda: loader(task, dataset))


def transformers(task: Task, setup: str) -> dict[str, Any]:
    from torchvision.datasets import ImageFolder

    peer: Any = importlib.import_module("transformers")  # without types, and only in the benchmark extra
    width, depth, hidden = TRANSFORMERS[task.variant]
    config = peer.EfficientNetConfig(
        width_coefficient=width, depth_coefficient=depth, hidden_dim=hidden, image_size=task.size, num_labels=1000
    )
    model = peer.EfficientNetForImageClassification(config).eval().to(task.device)
    size = {"height": task.size, "width": task.size}
    processor = peer.EfficientNetImageProcessor(size=size)

    def transform(image: Any) -> Any:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    dataset = ImageFolder(task.folder, transform)
    return _loop(task, lambda inputs: model(inputs).logits, lambda: loader(task, dataset))


def _loop(task: Task, model: Callable[[Any], Any], batches: Callable[[], Iterable[Any]]) -> dict[str, Any]:
    import torch

    @torch.inference_mode()
    def once() -> list[int]:
        predicted: list[int] = []
        for inputs, _ in batches():
            predicted += model(inputs.to(task.device, non_blocking=True)).argmax(1).tolist()
        return predicted

    return _timed(task, model, once)


def _timed(task: Task, model: Callable[[Any], Any], once: Callable[[], list[int]]) -> dict[str, Any]:
    """Times it when warm: on CUDA after doing it all once, as kernels are chosen and loaded at first."""
    import torch

    if task.device == "cuda":
        once()
    with torch.inference_mode():
        model(torch.rand(task.batch_size, 3, task.size, task.size, device=task.device))
    start = machine.settled(task.device)
    predicted = once()
    return {"seconds": machine.settled(task.device) - start, "predictions": predicted}


def setups_of(variant: str, device: str) -> list[str]:
    """What there is for a variant; on CUDA, all sides load in as many processes."""
    peers = [setup for setup in PEERS if variant in ONLY_IN.get(setup, SIZES)]
    if device == "cuda":
        return [*ON_CUDA, *(setup for setup in peers if setup not in LOADING)]
    ours = [setup for setup in (*OURS, PREDICT) if "bf16" not in setup or machine.has_bf16()]
    return [*ours, *peers]


def child(given: dict[str, Any]) -> dict[str, Any]:
    setup: str = given["setup"]
    run = {"fixefficientnet": ours, "timm": timms, "torchvision": torchvisions, "transformers": transformers}
    return run[setup.replace(",", " ").split()[0]](Task(given), setup)


@contextmanager
def prepared(folder: Path, variant: str, device: str) -> Iterator[tuple[Path, list[int]]]:
    """Links to so many images, evenly spread, and their classes; the random weights beside."""
    import numpy as np
    import timm
    import torch
    from safetensors.torch import save_file

    from fixefficientnet.classes import imagenet_order

    every = machine.images_in(folder)
    classes = imagenet_order()
    with tempfile.TemporaryDirectory(prefix="fixefficientnet-classify-") as temporary:
        labels = []
        chosen = np.unique(np.linspace(0, len(every) - 1, min(IMAGES[variant], len(every))).astype(int))
        for number, index in enumerate(np.repeat(chosen, 1 if device == "cpu" else TIMES_ON_CUDA)):
            link = Path(temporary) / "images" / every[index].parent.name / f"{number:06}{every[index].suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(every[index].resolve())
            link.read_bytes()  # all setups find it in the page cache
            labels.append(classes.index(every[index].parent.name))
        if variant != "lite0":
            torch.manual_seed(0)
            model = timm.create_model(f"tf_efficientnet_{variant}")
            save_file(model.state_dict(), Path(temporary) / f"{variant}.safetensors")
        yield Path(temporary) / "images", labels


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """One per variant, batch size and setup."""
    every = []
    for variant in SIZES:
        if variant not in (options.variants or SIZES):
            continue
        with prepared(options.images, variant, options.device) as (folder, labels):
            for batch_size in BATCHES[options.device]:
                every += _rows(options, folder, labels, variant, batch_size)
    return every


def _rows(
    options: argparse.Namespace, folder: Path, labels: list[int], variant: str, batch_size: int
) -> list[machine.Row]:
    given = {"folder": str(folder), "variant": variant, "batch_size": batch_size, "device": options.device}
    found = machine.in_turns(
        setups_of(variant, options.device),
        options.rounds,
        lambda setup: machine.fresh(
            NAME, {**given, "setup": setup}, env={"HF_ASSETS_CACHE": str(folder.parent / "assets")}
        ),
        f"{variant} in batches of {batch_size}:",
    )
    rates = {setup: len(labels) / machine.median(findings, "seconds") for setup, findings in found.items()}
    theirs = found[TIMM][0]["predictions"]
    made = []
    for setup, findings in found.items():
        predicted = findings[0]["predictions"]
        comparable = setup.startswith(("fix", "timm"))
        made.append(
            {
                "benchmark": NAME,
                "variant": variant,
                "size": SIZES[variant],
                "batch_size": batch_size,
                "setup": setup,
                "images": len(labels),
                "images_per_second": rates[setup],
                "times_timm": rates[setup] / rates[TIMM],
                "spread": machine.spread(findings, "seconds"),
                # the first that comes exports, the others find what is kept
                "exporting_seconds": max(finding.get("exporting", 0) for finding in findings),
                "same_predictions": sum(map(int.__eq__, predicted, theirs)) if comparable else None,
                "correct": sum(map(int.__eq__, predicted, labels)) if variant == "lite0" else None,
            }
        )
    return made
