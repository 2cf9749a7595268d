"""FixRes fine-tuning: a training step beside a plain PyTorch loop, and the whole command.

    python -m benchmarks finetune --train FOLDER --checkpoint model.safetensors

FOLDER has train/ and val/, with one folder per class in each. The checkpoint is a network trained on it, as
`fixefficientnet reproduce lite0 --stage base` leaves it (docs/finetuning.md). There are three parts:

- step: throughput and memory of the online method's training step, beside a plain loop, in fresh processes that take
  turns, on the same images, batches, threads and number of loading processes; then at other sizes and batch sizes.
- methods: seconds from start to report of the whole command, cached and online.
- growth: the same command on more images (links to those of the folder), with one process and with two.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine

NAME = "finetune"
OURS = "fixefficientnet"
PLAIN = "plain loop"
PLAIN_CHANNELS_LAST = f"{PLAIN}, channels last"

MODEL = "tf_efficientnet_lite0"
TRAIN_SIZE, SIZE, BATCH = 128, 160, 64
METHODS_SIZE = 224
"""Test size of the part "methods": far enough from the train size for FixRes to win accuracy back."""
ONLINE = ("--method", "online", "--batch-size", str(BATCH), "--base-lr", "1e-2")
METHODS = {
    "cached, statistics alone": ("--method", "cached", "--tune", "bn-stats"),
    "cached, 1 view": ("--method", "cached", "--views", "1"),
    "cached, 2 views": ("--method", "cached"),
    "online, 1 epoch": (*ONLINE, "--epochs", "1"),
    "online, 3 epochs": (*ONLINE, "--epochs", "3"),
}


def plain(given: dict[str, Any]) -> dict[str, Any]:
    """Runs the online method as the paper describes it, in a plain PyTorch loop."""
    import random

    import timm
    import torch
    from torch import nn
    from torchvision import datasets, transforms
    from torchvision.transforms import functional

    def crop_at_a_random_column(image: Any) -> Any:
        left = random.randint(0, image.width - given["size"])
        return functional.crop(image, round((image.height - given["size"]) / 2), left, given["size"], given["size"])

    transform = transforms.Compose(
        [
            transforms.Resize(given["size"], transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.05, 0.05, 0.05),
            crop_at_a_random_column,
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ]
    )
    images = datasets.ImageFolder(Path(given["data"], "train"), transform)
    model: Any = timm.create_model(given["model"], num_classes=len(images.classes)).eval()
    layout = torch.channels_last if given["method"] == PLAIN_CHANNELS_LAST else torch.contiguous_format
    model.requires_grad_(False).to(given["device"], memory_format=layout)
    trained = [*model.classifier.parameters()]
    for parameter in trained:
        parameter.requires_grad_()
    model.bn2.train()
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    workers = machine.loading_processes(given["device"])
    loader = torch.utils.data.DataLoader(
        images,
        given["batch"],
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=given["device"] == "cuda",
    )
    before = machine.forget_peak()
    start = machine.settled(given["device"])
    seen = 0
    for inputs, targets in loader:
        optimizer.zero_grad()
        inputs, targets = (tensor.to(given["device"], non_blocking=True) for tensor in (inputs, targets))
        criterion(model(inputs.contiguous(memory_format=layout)), targets).backward()
        optimizer.step()
        seen += len(targets)
    return found(given, seen, start, before)


def ours(given: dict[str, Any]) -> dict[str, Any]:
    """Runs what the command does between its evaluations, logging and checkpoints included."""
    import timm
    import torch
    import torch.utils.tensorboard  # before the clock starts
    from accelerate import Accelerator

    from fixefficientnet._internal.console import Console
    from fixefficientnet.data.dataset import open_dataset
    from fixefficientnet.reproduce import network, online
    from fixefficientnet.reproduce import recipe as recipes
    from fixefficientnet.reproduce.checkpoints import Checkpoints
    from fixefficientnet.reproduce.log import Log
    from fixefficientnet.reproduce.session import Session

    images = open_dataset(given["data"], "train")
    subject = recipes.subject_of_backbone(given["model"])
    recipe = recipes.resolve(subject, {"test_size": given["size"], "epochs": 1, "batch_size": given["batch"]})
    model: Any = timm.create_model(given["model"], num_classes=len(images.classes))
    net = network.prepare(model.to(given["device"], memory_format=torch.channels_last), recipe)
    with tempfile.TemporaryDirectory() as place:
        log = Log(Path(place), enabled=True, console=Console(quiet=True))
        session = Session(
            Accelerator(cpu=given["device"] == "cpu"), Path(place), log, machine.loading_processes(given["device"])
        )
        checkpoints = Checkpoints(Path(place) / "state.safetensors", {}, 1000, 600)
        before = machine.forget_peak()
        start = machine.settled(given["device"])
        tuned = online.tune(session, net, images, checkpoints)
        return found(given, tuned.forwards, start, before)


def found(given: dict[str, Any], images: int, start: float, before: float) -> dict[str, Any]:
    import torch

    seconds = machine.settled(given["device"]) - start
    on_cuda = given["device"] == "cuda"
    megabytes = torch.cuda.max_memory_allocated() / 2**20 if on_cuda else machine.grown_since(before)
    return {"images_per_second": images / seconds, "megabytes": megabytes}


def child(given: dict[str, Any]) -> dict[str, Any]:
    return plain(given) if given["method"].startswith(PLAIN) else ours(given)


def links(folder: Path, images: int, to: Path) -> Path:
    """Makes a dataset of `images` links to training images, repeated as needed, and one validation image per class."""
    classes = [sorted(of_class.iterdir()) for of_class in sorted((folder / "train").iterdir())]
    every = [path for turn in itertools.zip_longest(*classes) for path in turn if path]  # every class comes early
    for number, path in zip(range(images), itertools.cycle(every), strict=False):
        link = to / "train" / path.parent.name / f"{number}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    for kind in (folder / "val").iterdir():
        link = to / "val" / kind.name / "0.jpg"
        link.parent.mkdir(parents=True)
        link.symlink_to(min(kind.iterdir()).resolve())
    return to


def command(
    options: argparse.Namespace, data: Path, arguments: Sequence[str], *, size: int = SIZE, processes: int = 1
) -> dict[str, Any]:
    """Runs `reproduce`; returns its seconds, the peak memory of its largest process in MiB, and its report."""
    launcher = [sys.executable, "-m"]
    env = dict(os.environ)
    if processes > 1:
        launcher += ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
        env["OMP_NUM_THREADS"] = str(max(1, options.threads // processes))
    with tempfile.TemporaryDirectory() as place:
        said = [*launcher, "fixefficientnet.reproduce", "--backbone", MODEL, "--checkpoint", str(options.checkpoint)]
        said += ["--data", str(data), "--output", place, "--experiment", "run", "--device", options.device]
        said += ["-j", str(machine.loading_processes(options.device))]
        said += ["--train-size", str(TRAIN_SIZE), "--test-size", str(size), "--val-interval", "0", *arguments]
        start = time.perf_counter()
        with subprocess.Popen(said, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) as process:
            errors = process.stderr.read() if process.stderr else ""
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if process.returncode:
            print(errors, file=sys.stderr)
            raise subprocess.CalledProcessError(process.returncode, said)
        report = json.loads(Path(place, "run", "report.json").read_text())
    return {"seconds": seconds, "megabytes": usage.ru_maxrss / 1024, "report": report}


def steps(options: argparse.Namespace, data: Path) -> list[machine.Row]:
    """Measures training steps: beside a plain loop, then at other sizes and batch sizes."""
    made = []
    cases: list[tuple[int, int, tuple[str, ...]]] = [(SIZE, BATCH, (PLAIN, PLAIN_CHANNELS_LAST, OURS))]
    cases += [(size, BATCH, (OURS,)) for size in (128, 224)]
    cases += [(SIZE, batch, (OURS,)) for batch in (16, 32, 128)]
    for size, batch, names in cases:
        given = {"data": str(data), "model": MODEL, "size": size, "batch": batch, "device": options.device}
        rounds = options.rounds if len(names) > 1 else 1
        findings = machine.in_turns(
            names,
            rounds,
            lambda method: machine.fresh(NAME, {**given, "method": method}),  # noqa: B023
            f"step at {size} in batches of {batch}:",
        )
        for method, taken in findings.items():
            medians = {name: machine.median(taken, name) for name in ("images_per_second", "megabytes")}
            row = {
                "benchmark": NAME,
                "part": "step",
                "method": method,
                "size": size,
                "batch_size": batch,
                "rounds": rounds,
            }
            made.append({**row, **medians})
    return made


def methods(options: argparse.Namespace) -> list[machine.Row]:
    """Measures each method: forward passes per image, seconds from start to report."""
    made: list[machine.Row] = []
    for name, arguments in METHODS.items():
        print(f"method: {name}", file=sys.stderr, flush=True)
        done = command(options, options.train, arguments, size=METHODS_SIZE)
        report = done["report"]
        row = {"benchmark": NAME, "part": "methods", "method": name, "size": METHODS_SIZE, "rounds": 1}
        row["seconds"] = done["seconds"]
        row["forwards_per_image"] = report["forwards"] / report["train_images"]
        made.append(row)
    return made


def _may_be_two(options: argparse.Namespace) -> bool:
    import torch

    return options.device == "cpu" or torch.cuda.device_count() > 1


def growth(options: argparse.Namespace) -> list[machine.Row]:
    """Measures both methods on more images, with one process and with two."""
    made: list[machine.Row] = []
    chosen = {name: METHODS[name] for name in ("cached, 2 views", "online, 1 epoch")}
    for images in (1000, 2000, 4000):
        with tempfile.TemporaryDirectory(prefix="fixefficientnet-finetune-") as temporary:
            data = links(options.train, images, Path(temporary))
            for processes in (1, 2) if images == 2000 and _may_be_two(options) else (1,):
                for name, arguments in chosen.items():
                    print(f"growth: {images}, {name}, {processes}", file=sys.stderr, flush=True)
                    done = command(options, data, arguments, processes=processes)
                    made.append(
                        {
                            "benchmark": NAME,
                            "part": "growth",
                            "method": name,
                            "images": images,
                            "processes": processes,
                            "rounds": 1,
                            "seconds": done["seconds"],
                            "megabytes": done["megabytes"],
                        }
                    )
    return made


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """Measures the three parts; one row per measurement."""
    with tempfile.TemporaryDirectory(prefix="fixefficientnet-finetune-") as temporary:
        images = 1000 if options.device == "cpu" else 32000  # enough for the start not to count
        made = steps(options, links(options.train, images, Path(temporary)))
    return made + growth(options) + methods(options)
