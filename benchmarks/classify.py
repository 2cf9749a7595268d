"""Throughput in images/s from a folder of JPEG files to labels: this package's engines beside other libraries.

    python -m benchmarks classify --images FOLDER

FOLDER has one folder per WordNet id, or a val/ with these in it. Each method runs as its users run it, in fresh
processes; the methods take turns, and the median of the rounds counts. All methods read the same files at the same
size and batch size on the same cores. After a warm-up, the clock runs from the first file to the last label.

| library | what runs |
|---|---|
| fixefficientnet | `evaluate` with each engine but compile (see benchmarks/forward.py), `predict` with ONNX Runtime |
| timm | its model, loader and transform, as in its validate.py; "channels last" and "bf16" are its options |
| torchvision, transformers | their own EfficientNet and transform, with torch's DataLoader |

fixefficientnet loads images in the threads that compute, which is its default; with "-j 1" it computes one batch at a
time, and one process loads. The other libraries load in one process; timm is measured with none and with two as well.
The time of an export is measured apart, before any exported file is kept. Lite0 has its real weights. B0 and B4 have
random weights, the same for this package and timm; in float32 both must make the same predictions.
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
"""Images per variant: enough for some seconds each."""
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
"""Engine and mixed precision of `evaluate`, by method."""
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
"""Variants that a library has; neither of these has Lite0."""
BATCHES = {"cpu": (1, 2, 16), "cuda": (1, 16)}
OUR_BATCH = 2
"""The default batch size of this package on a CPU."""
TRANSFORMERS = {"b0": (1.0, 1.0, 1280), "b4": (1.4, 1.8, 1792)}
"""Width coefficient, depth coefficient and hidden dimension in transformers' configuration."""


class Task:
    """What a child process does: it classifies a list of images with a variant."""

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
        """The model's name for `evaluate`."""
        return "lite0:backbone" if self.variant == "lite0" else f"timm/tf_efficientnet_{self.variant}:{self.weights}"

    @property
    def weights(self) -> Path:
        """The file with the random weights, beside the images."""
        return self.folder.parent / f"{self.variant}.safetensors"

    def timm_model(self) -> Any:
        """Builds timm's own model with these weights."""
        import timm

        import fixefficientnet

        if self.variant == "lite0":
            return fixefficientnet.create("lite0", "backbone")
        return timm.create_model(f"tf_efficientnet_{self.variant}", checkpoint_path=str(self.weights)).eval()


def ours(task: Task, method: str) -> dict[str, Any]:
    import math

    from fixefficientnet import prediction
    from fixefficientnet._internal.processes import accelerator
    from fixefficientnet._internal.threads import default_threads
    from fixefficientnet.evaluation.evaluate import Settings, dataset_for
    from fixefficientnet.evaluation.loop import EvaluationLoop
    from fixefficientnet.models import load
    from fixefficientnet.options import PredictionOptions
    from fixefficientnet.runtimes import engines

    engine, precision = {**OURS, **ON_CUDA, PREDICT: ("onnx", "no")}[method]
    loaded = load(task.name)
    test = loaded.at(task.size, 1.0)
    settings = Settings(str(task.folder))
    images = dataset_for(loaded, settings)
    loaded.network.to(task.device)
    computing = accelerator(task.device, precision)
    workers = task.workers if method == ALONE or task.device == "cuda" else 0
    batches = math.ceil(len(images) / task.batch_size)
    threads = 1 if workers or engine == "compile" else default_threads(loaded.network, batches)
    exporting = 0.0
    if engine in engines.EXPORTED:
        start = time.perf_counter()
        engines.exported(loaded, test, engine)
        exporting = time.perf_counter() - start

    def once() -> list[int]:
        if method == PREDICT:
            model: Any = loaded.network
            model.preprocess = loaded.transform(test)
            options = PredictionOptions(batch_size=task.batch_size, threads=threads)
            found = prediction.iter_predictions(task.paths, model, options)
            return [one.labels[0].index for one in found]
        evaluation = EvaluationLoop(
            loaded.network,
            images,
            test,
            transform=loaded.transform(test, fast="fast" in method),
            batch_size=task.batch_size,
            shard=task.batch_size,
            workers=workers,
            threads=threads,
            accelerator=computing,
        ).run()
        return [prediction.top5[0] for prediction in evaluation.predictions if prediction]

    with engines.running(loaded, test, engine, threads=threads, precision=precision):
        return {**_timed(task, loaded.network, once), "exporting": exporting}


def timms(task: Task, method: str) -> dict[str, Any]:
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config

    layout = torch.channels_last if "channels last" in method else torch.contiguous_format
    model = task.timm_model().to(memory_format=layout).to(task.device)
    config = resolve_data_config({"img_size": task.size, "crop_pct": 1.0}, model=model)  # type: ignore[no-untyped-call]

    dataset = create_dataset("", root=str(task.folder))

    def forward(inputs: Any) -> Any:
        with torch.autocast(task.device, torch.bfloat16, enabled=method.endswith("bf16")):
            return model(inputs.contiguous(memory_format=layout))

    def batches() -> Iterable[Any]:
        batches_of: Iterable[Any] = create_loader(
            dataset,
            input_size=config["input_size"],
            batch_size=task.batch_size,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            num_workers=LOADING.get(method, task.workers),
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


def torchvisions(task: Task, method: str) -> dict[str, Any]:
    from torchvision import models
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode

    name = f"efficientnet_{task.variant}"
    model = models.get_model(name, weights=None).eval().to(task.device)
    preset = models.get_model_weights(name).DEFAULT.transforms
    transform = preset(crop_size=task.size, resize_size=task.size, interpolation=InterpolationMode.BICUBIC)
    dataset = ImageFolder(task.folder, transform)
    return _loop(task, model, lambda: loader(task, dataset))


def transformers(task: Task, method: str) -> dict[str, Any]:
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
    """Times `once` when the model is warm.

    On CUDA everything runs once before: the first run chooses and loads the kernels.
    """
    import torch

    if task.device == "cuda":
        once()
    with torch.inference_mode():
        model(torch.rand(task.batch_size, 3, task.size, task.size, device=task.device))
    start = machine.settled(task.device)
    predicted = once()
    return {"seconds": machine.settled(task.device) - start, "predictions": predicted}


def methods_of(variant: str, device: str) -> list[str]:
    """Lists the methods for a variant; on CUDA, all methods load in the same number of processes."""
    peers = [method for method in PEERS if variant in ONLY_IN.get(method, SIZES)]
    if device == "cuda":
        return [*ON_CUDA, *(method for method in peers if method not in LOADING)]
    ours = [method for method in (*OURS, PREDICT) if "bf16" not in method or machine.has_bf16()]
    return [*ours, *peers]


def child(given: dict[str, Any]) -> dict[str, Any]:
    method: str = given["method"]
    run = {"fixefficientnet": ours, "timm": timms, "torchvision": torchvisions, "transformers": transformers}
    return run[method.replace(",", " ").split()[0]](Task(given), method)


@contextmanager
def prepared(folder: Path, variant: str, device: str) -> Iterator[tuple[Path, list[int]]]:
    """Makes a folder with links to evenly spread images and the random weights; yields it and the images' labels."""
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
            link.read_bytes()  # puts the file into the page cache for all methods
            labels.append(classes.index(every[index].parent.name))
        if variant != "lite0":
            torch.manual_seed(0)
            model = timm.create_model(f"tf_efficientnet_{variant}")
            save_file(model.state_dict(), Path(temporary) / f"{variant}.safetensors")
        yield Path(temporary) / "images", labels


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """Measures throughput; one row per variant, batch size and method."""
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
        methods_of(variant, options.device),
        options.rounds,
        lambda method: machine.fresh(
            NAME, {**given, "method": method}, env={"HF_ASSETS_CACHE": str(folder.parent / "assets")}
        ),
        f"{variant} in batches of {batch_size}:",
    )
    rates = {method: len(labels) / machine.median(findings, "seconds") for method, findings in found.items()}
    theirs = found[TIMM][0]["predictions"]
    made = []
    for method, findings in found.items():
        predicted = findings[0]["predictions"]
        comparable = method.startswith(("fix", "timm"))
        made.append(
            {
                "benchmark": NAME,
                "variant": variant,
                "size": SIZES[variant],
                "batch_size": batch_size,
                "method": method,
                "images": len(labels),
                "images_per_second": rates[method],
                "times_timm": rates[method] / rates[TIMM],
                "spread": machine.spread(findings, "seconds"),
                # the first process exports; the others find the kept file
                "exporting_seconds": max(finding.get("exporting", 0) for finding in findings),
                "same_predictions": sum(map(int.__eq__, predicted, theirs)) if comparable else None,
                "correct": sum(map(int.__eq__, predicted, labels)) if variant == "lite0" else None,
            }
        )
    return made
