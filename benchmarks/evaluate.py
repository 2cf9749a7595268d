"""Pictures per second of an evaluation, end to end, against timm's validation loop.

    python -m benchmarks.evaluate FOLDER

FOLDER has val/ in it, with one folder per WordNet id. Both read the same files with the same number of loading
processes and threads, at the same batch size, with the same model (EfficientNet-Lite0, real weights), in fresh
processes in turns; the median counts. timm's loop is that of its validate.py, with its loader's defaults; "channels
last" is its option of that name.
The same right answers are asserted.
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

WAYS = ("fixefficientnet", "timm", "timm, channels last")


def ours(folder: str, size: int, batch_size: int, workers: int) -> dict[str, Any]:
    import torch

    from fixefficientnet import processes
    from fixefficientnet.evaluation.evaluate import Settings, measure
    from fixefficientnet.evaluation.models import open_model

    opened = open_model("lite0:backbone")
    with torch.inference_mode():
        opened.model(torch.randn(batch_size, 3, size, size))
    with tempfile.TemporaryDirectory() as kept:
        settings = Settings(
            folder, size=size, crop_pct=0.875, batch_size=batch_size, workers=workers, folder=Path(kept)
        )
        start = time.perf_counter()
        found = measure(opened, settings, processes.accelerator("cpu", "no")).evaluation
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "pictures": found.pictures, "right": found.right.count("1")}


def timms(folder: str, size: int, batch_size: int, workers: int, *, channels_last: bool) -> dict[str, Any]:
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.utils import AverageMeter, accuracy

    import fixefficientnet
    from fixefficientnet.classes import imagenet_order

    model = fixefficientnet.create("lite0", "backbone")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    config = resolve_data_config({"img_size": size, "crop_pct": 0.875}, model=model)  # type: ignore[no-untyped-call]
    class_map = {name: index for index, name in enumerate(imagenet_order())}
    dataset = create_dataset("", root=folder, split="validation", class_map=class_map)
    with torch.inference_mode():
        model(torch.randn(batch_size, 3, size, size).contiguous(memory_format=layout))
        start = time.perf_counter()
        loader = create_loader(
            dataset,
            input_size=config["input_size"],
            batch_size=batch_size,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            num_workers=workers,
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
            device=torch.device("cpu"),
        )
        losses, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()  # type: ignore[no-untyped-call]
        criterion = torch.nn.CrossEntropyLoss()
        for inputs, target in loader:
            output = model(inputs.contiguous(memory_format=layout))
            loss = criterion(output, target)
            best, best5 = accuracy(output, target, topk=(1, 5))  # type: ignore[no-untyped-call]
            losses.update(loss.item(), len(output))  # type: ignore[no-untyped-call]
            top1.update(best.item(), len(output))  # type: ignore[no-untyped-call]
            top5.update(best5.item(), len(output))  # type: ignore[no-untyped-call]
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "pictures": top1.count, "right": round(top1.sum / 100)}


def child(way: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(options.threads)
    where = (options.folder, options.size, options.batch_size, options.workers)
    return ours(*where) if way == WAYS[0] else timms(*where, channels_last=way == WAYS[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(child(options.way, options)))
        return
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.evaluate", *sys.argv[1:], "--way", way]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ))
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    counts = {(one["pictures"], one["right"]) for every in found.values() for one in every}
    assert len(counts) == 1, f"pictures, right: {sorted(counts)}"
    print(f"pictures, right: {counts.pop()}")
    rates = {way: statistics.median(one["pictures"] / one["seconds"] for one in every) for way, every in found.items()}
    print("| | pictures/s | fixefficientnet is, times as fast |\n|---|---|---|")
    for way, rate in rates.items():
        print(f"| {way} | {rate:.1f} | {rates[WAYS[0]] / rate:.2f} |")


if __name__ == "__main__":
    main()
