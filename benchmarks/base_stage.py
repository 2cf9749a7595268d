"""The base stage with its defaults beside timm's train.py and a linear probe, from the same weights, in one run.

    python -m benchmarks.base_stage IMAGES --train-py train.py -o docs/results/base_stage.csv
    python -m benchmarks.base_stage IMAGES --train-py train.py --timed -o docs/results/base_stage_timed.csv

With --timed, the methods that train the whole network, on 15 images per class, each process with one thread. What they
take is CPU time, with the loading of images and the validations: on a machine that others use too, wall time says
little.

IMAGES has train/ and val/, with one folder per class in each. train.py is that of timm's repository (timm's packages
do not have it). All start from EfficientNet-Lite0's ImageNet weights, which come from PyPI, and are measured on the
validation images at the same size with the whole image's centre. The linear probe is a logistic regression on the
pooled features of the test-time transform (L2 penalty of half the squared weights over C, C = 1, by L-BFGS).
"""

import argparse
import csv
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown
from fixefficientnet._internal.files import write_atomically
from fixefficientnet.evaluation.statistics import wilson
from fixefficientnet.evaluation.tables import as_csv, from_csv

VARIANT, ARCHITECTURE = "lite0", "tf_efficientnet_lite0"
OURS = {"base stage": (), "base stage, --tune classifier": ("--tune", "classifier")}
AVERAGED = {
    "base stage, --warmup-epochs 1 --model-ema-decay 0.9998": ("--warmup-epochs", "1", "--model-ema-decay", "0.9998")
}
TIMMS = {"timm's train.py, its defaults": (), "timm's train.py, no warm-up": ("--warmup-epochs", "0")}
TIMED = ("base stage", *AVERAGED, "timm's train.py, its defaults")
PER_CLASS = 15
PROBE = "linear probe"
C = 1.0


def ours(data: Path, folder: Path, more: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Runs the base stage."""
    command = [sys.executable, "-m", "fixefficientnet", "reproduce", VARIANT, "--stage", "base", "--data", str(data)]
    command += ["--train-size", str(options.size), "--seed", str(options.seed), "-j", str(options.workers), *more]
    run([*command, "--epochs", str(options.epochs), "--output", str(folder), "--experiment", "run"])
    report = json.loads((folder / "run" / "report.json").read_text())
    first = json.loads((folder / "run" / "log.jsonl").read_text().splitlines()[0])
    measured, selection = report["measured"]["trained"], report["selection"]
    found = {"top1": measured["top1"], "images": measured["images"], "first_loss": first["loss"]}
    return found | {"last_top1": selection["last_top1"]}


def timms(data: Path, folder: Path, more: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Runs timm's train.py: its own optimizer, learning rate, schedule and augmentation."""
    import safetensors.torch

    import fixefficientnet

    weights = folder / "weights.safetensors"
    model = fixefficientnet.create(VARIANT, "backbone")
    safetensors.torch.save_file(model.state_dict(), weights)
    command = [sys.executable, str(options.train_py), "--data-dir", str(data), "--model", ARCHITECTURE]
    command += ["--pretrained", "--pretrained-path", str(weights), "--num-classes", str(len(classes(data)))]
    command += ["--img-size", str(options.size), "--crop-pct", "1.0", "--batch-size", str(options.batch_size)]
    command += ["--epochs", str(options.epochs), "--seed", str(options.seed), "--workers", str(options.workers)]
    command += ["--device", "cpu", "--log-interval", "1", "--output", str(folder), "--experiment", "run", *more]
    said = run(command)
    first = re.search(r"Loss:\s+([\d.]+)", said)
    with next(folder.glob("run/summary.csv")).open() as file:
        accuracies = [float(line["eval_top1"]) for line in csv.DictReader(file)]
    images = sum(1 for path in (data / "val").glob("*/*") if path.is_file())
    found = {"top1": max(accuracies), "images": images, "first_loss": float(first[1]) if first else None}
    return found | {"last_top1": accuracies[-1]}


def linear_probe(data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Fits a logistic regression on pooled features."""
    import torch
    from torch import nn

    import fixefficientnet
    from fixefficientnet.data.dataset import open_dataset

    model = fixefficientnet.create(VARIANT, "backbone", num_classes=0)
    test = fixefficientnet.preprocess(VARIANT)
    transform = type(test)(options.size, 1.0, test.interpolation, test.mean, test.std)

    def features(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        images = open_dataset(str(data), split)
        found, labels = [], []
        with torch.inference_mode():
            for index in range(len(images)):
                image, label = images[index]
                found.append(model(transform(image)[None]))
                labels.append(label)
        return torch.cat(found).clone(), torch.tensor(labels)

    inputs, labels = features("train")
    classifier = nn.Linear(inputs.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(classifier(inputs), labels, reduction="sum")
        loss = loss + classifier.weight.square().sum() / (2 * C)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    first = objective().item() / len(labels)
    optimizer.step(objective)  # type: ignore[no-untyped-call]
    inputs, labels = features("validation")
    correct = int((classifier(inputs).argmax(1) == labels).sum())
    top1 = 100 * correct / len(labels)
    return {"top1": top1, "images": len(labels), "first_loss": first, "last_top1": top1}


def classes(data: Path) -> list[str]:
    """Returns the names of the classes' folders."""
    return sorted(path.name for path in (data / "train").iterdir() if path.is_dir())


def fewer(data: Path, folder: Path) -> Path:
    """Makes a folder with the first images of each class to train on, and all to measure on."""
    for name in classes(data):
        (folder / "train" / name).mkdir(parents=True)
        for path in sorted((data / "train" / name).iterdir())[:PER_CLASS]:
            (folder / "train" / name / path.name).symlink_to(path.resolve())
    (folder / "val").symlink_to((data / "val").resolve())
    return folder


def cpu_seconds() -> float:
    """Returns the CPU time of the commands that were run to their end so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(command: Sequence[str]) -> str:
    """Runs a command; returns what it said."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs every method; returns a row each."""
    with tempfile.TemporaryDirectory() as folder:
        if options.timed:
            options.data = fewer(options.data, Path(folder))
        return list(measured_rows(options))


def measured_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Gives the row of each method."""
    methods: dict[str, Any] = {name: (ours, more) for name, more in OURS.items()}
    if options.timed:
        methods |= {name: (ours, more) for name, more in AVERAGED.items()}
    if options.train_py:
        methods |= {name: (timms, more) for name, more in TIMMS.items()}
    methods[PROBE] = None
    for name, how in methods.items():
        if options.timed and name not in TIMED:
            continue
        before, start = cpu_seconds(), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            measured = (
                how[0](options.data, Path(folder), how[1], options) if how else linear_probe(options.data, options)
            )
        low, high = wilson(round(measured["top1"] * measured["images"] / 100), measured["images"])
        row = {"method": name, "classes": len(classes(options.data)), "size": options.size, "epochs": options.epochs}
        row["epochs"] = row["epochs"] if how else None
        row |= measured | {"low": low, "high": high}
        if options.timed:
            row |= {"cpu_seconds": cpu_seconds() - before, "wall_seconds": time.monotonic() - start}
        print(row, file=sys.stderr, flush=True)
        yield row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the docs' table as Markdown."""
    lines = [
        (
            row["method"],
            f"{row['first_loss']:.2f}",
            f"{row['top1']:.2f}",
            f"{row['low']:.1f} to {row['high']:.1f}",
        )
        for row in rows
    ]
    return markdown(["", "first loss", "top-1", "95% interval"], lines)


def timed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the docs' table of accuracy and time as Markdown."""
    timms = next((row["cpu_seconds"] for row in rows if row["method"] in TIMMS), None)
    lines = [
        (
            row["method"],
            f"{row['top1']:.2f}",
            f"{row['low']:.1f} to {row['high']:.1f}",
            f"{row['last_top1']:.2f}",
            f"{row['cpu_seconds'] / 60:.1f}",
            f"{row['cpu_seconds'] / timms:.2f}" if timms else "",
        )
        for row in rows
    ]
    titles = ["", "top-1, best epoch", "95% interval", "top-1, last epoch", "CPU minutes", "of timm's"]
    return markdown(titles, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--train-py", type=Path, help="timm's train.py; left out: timm is not measured")
    parser.add_argument("--timed", action="store_true", help="measure CPU time, on fewer images")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32, help="timm's; ours is its default, 32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-j", "--workers", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.timed:  # this process's commands inherit it
        os.environ["OMP_NUM_THREADS"], options.workers = "1", 0
    found = as_csv(rows(options))
    if options.output:
        write_atomically(options.output, found.encode())
    print((timed_table if options.timed else table)(from_csv(found)))


if __name__ == "__main__":
    main()
