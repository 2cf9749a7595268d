"""FixRes fine-tuning: its step against a plain PyTorch loop, and its two methods against each other.

    python -m benchmarks.finetune step --data FOLDER             # pictures/s and peak memory, side by side
    python -m benchmarks.finetune methods --data FOLDER --checkpoint model.safetensors --train-size 128

FOLDER has train/ and val/ in it, with a folder per class. `step` runs each side in fresh processes that take turns, on
the same pictures, batches, loading processes and threads, with random weights. `methods` runs the command itself and
sets backbone forwards and wall time beside the accuracy reached.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def reset_peak() -> float:
    """Forgets the process's peak memory so far; what it has now, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return megabytes("VmRSS")


def megabytes(name: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024


def plain(options: argparse.Namespace) -> tuple[float, float]:
    """The method as it is described, in the simplest way. Pictures per second, and growth of peak memory in MB."""
    import random

    import timm
    import torch
    from torch import nn
    from torchvision import datasets, transforms
    from torchvision.transforms import functional

    def crop_at_a_random_column(image: Any) -> Any:
        left = random.randint(0, image.width - options.size)
        return functional.crop(image, round((image.height - options.size) / 2), left, options.size, options.size)

    transform = transforms.Compose(
        [
            transforms.Resize(options.size, transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.05, 0.05, 0.05),
            crop_at_a_random_column,
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ]
    )
    pictures = datasets.ImageFolder(f"{options.data}/train", transform)
    model: Any = timm.create_model(options.model, num_classes=len(pictures.classes)).eval()
    model.requires_grad_(False)
    trained = [*model.bn2.parameters(), *model.classifier.parameters()]
    for parameter in trained:
        parameter.requires_grad_()
    model.bn2.train()
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    before = reset_peak()
    start = time.perf_counter()
    loader = torch.utils.data.DataLoader(
        pictures, options.batch, shuffle=True, drop_last=True, num_workers=options.workers
    )
    seen = 0
    for _ in range(options.epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()
            seen += len(targets)
    return seen / (time.perf_counter() - start), megabytes("VmHWM") - before


def ours(options: argparse.Namespace) -> tuple[float, float]:
    """What the command does between its evaluations, logging and checkpoints included."""
    import timm
    from accelerate import Accelerator
    from rich.console import Console

    from fixefficientnet.data import open_pictures
    from fixefficientnet.reproduce import network, online
    from fixefficientnet.reproduce import recipe as recipes
    from fixefficientnet.reproduce.checkpoints import Checkpoints
    from fixefficientnet.reproduce.log import Log
    from fixefficientnet.reproduce.session import Session

    pictures = open_pictures(options.data, "train")
    subject = recipes.subject_of_backbone(options.model)
    settings = [f"test_size={options.size}", f"epochs={options.epochs}", f"batch_size={options.batch}"]
    recipe = recipes.resolve(subject, {}, settings)
    net = network.prepare(timm.create_model(options.model, num_classes=len(pictures.classes)), recipe)
    with tempfile.TemporaryDirectory() as place:
        log = Log(Path(place), enabled=True, console=Console(quiet=True))
        session = Session(Accelerator(cpu=True), Path(place), log, options.workers)
        checkpoints = Checkpoints(Path(place) / "state.safetensors", {}, 1000, 600)
        before = reset_peak()
        start = time.perf_counter()
        done = online.tune(session, net, pictures, recipe, checkpoints)
        return done["forwards"] / (time.perf_counter() - start), megabytes("VmHWM") - before


def step(options: argparse.Namespace) -> None:
    """Both sides in turns."""
    results: dict[str, list[list[float]]] = {"plain": [], "ours": []}
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--side")]
    for _ in range(options.repeat):
        for side, found in results.items():
            command = [sys.executable, "-m", "benchmarks.finetune", *arguments, f"--side={side}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    medians = [[statistics.median(values) for values in zip(*found, strict=True)] for found in results.values()]
    rate, memory = zip(*medians, strict=True)
    print(
        f"{options.model} at {options.size}, batch {options.batch}, {options.workers} loading processes, "
        f"median of {options.repeat} fresh processes"
    )
    print(f"{'':18}{'pictures/s':>12}{'peak MB':>10}")
    for name, speed, peak in zip(("plain loop", "fixefficientnet"), rate, memory, strict=True):
        print(f"{name:18}{speed:12.1f}{peak:10.0f}")
    print(f"{'ratio':18}{rate[1] / rate[0]:11.2f}x{memory[1] / memory[0]:9.2f}x")


def kinds(epochs: list[int]) -> dict[str, list[str]]:
    """Name and arguments of each run."""
    found = {
        "cached, statistics alone": ["--method", "cached", "--tune", "bn-stats"],
        "cached, 1 view": ["--method", "cached", "--set", "views=1"],
        "cached, 2 views": ["--method", "cached"],
    }
    for count in epochs:
        name = f"online, {count} epoch{'s' if count > 1 else ''}"
        found[name] = ["--method", "online", "--set", f"epochs={count}"]
    return found


def methods(options: argparse.Namespace) -> None:
    """Each method's run: forwards per picture, seconds from start to report, accuracy."""
    print(f"{'at ' + str(options.size):26}{'forwards/picture':>17}{'seconds':>9}{'top-1':>8}{'95% interval':>18}")
    for number, (name, arguments) in enumerate(kinds(options.online_epochs).items()):
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "fixefficientnet.reproduce", "--backbone", options.model]
            command += ["--checkpoint", str(options.checkpoint), "--data", options.data, "--output", place]
            command += ["--train-size", str(options.train_size), "--test-size", str(options.size)]
            command += ["-j", str(options.workers), "--experiment", "run", *arguments]
            if "online" in name:
                command += ["--set", f"batch_size={options.batch}", "--set", f"base_lr={options.base_lr}"]
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds = time.perf_counter() - start
            report = json.loads(Path(place, "run", "report.json").read_text())
        row, base = report["measured"]["tuned"], report["measured"]["base_at_test"]
        if number == 0:
            interval = f"{base['top1_low']:.2f} to {base['top1_high']:.2f}"
            print(f"{'untuned':26}{0:17.2f}{0:9.0f}{base['top1']:8.2f}{interval:>18}")
        interval = f"{row['top1_low']:.2f} to {row['top1_high']:.2f}"
        share = report["forwards"] / report["train_pictures"]
        print(f"{name:26}{share:17.2f}{seconds:9.0f}{row['top1']:8.2f}{interval:>18}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "methods"])
    parser.add_argument("--data", required=True, help="folder with train/ and val/")
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="timm name")
    parser.add_argument("--size", type=int, default=160, help="test size, in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1, help="of step")
    parser.add_argument("--repeat", type=int, default=3, help="of step: fresh processes per side")
    parser.add_argument("--side", choices=["plain", "ours"], help="of step: measure one side in this process")
    parser.add_argument("--checkpoint", type=Path, help="of methods: weights to start from")
    parser.add_argument("--train-size", type=int, default=224, help="of methods")
    parser.add_argument("--online-epochs", type=int, nargs="+", default=[1, 3, 8, 31], help="of methods")
    parser.add_argument("--base-lr", type=float, default=1e-2, help="of methods: of online")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    if options.side:
        print(json.dumps({"plain": plain, "ours": ours}[options.side](options)))
    elif options.what == "methods" and options.checkpoint is None:
        parser.error("methods needs --checkpoint")
    else:
        {"step": step, "methods": methods}[options.what](options)


if __name__ == "__main__":
    main()
