"""From JPEG to tensor: the test-time preprocessing alone, on one core, against timm's transform and torchvision's.

    python -m benchmarks preprocess --images FOLDER

Every setup takes the same files (from the page cache) to the same float32 tensor [3, S, S], in one process, in turns;
the median of the rounds counts. "torchvision v2" is its present transforms on Pillow's images; "on tensors" decodes and
resizes with torchvision itself, whose pixels are a little others; so are those of our fast mode. Pixels are compared
with torchvision v2's on every image.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from benchmarks import machine

NAME = "preprocess"

CASES = (("224, crop_pct 0.875", 224, 0.875), ("320", 320, 1.0), ("472", 472, 1.0))
REFERENCE = "torchvision v2"
STD = 0.5
"""Of B0's normalisation: what a tensor's 1 is of an image's 255."""


def setups_of(size: int, crop_pct: float) -> dict[str, Callable[[str], Any]]:
    import torch
    from PIL import Image
    from timm.data import create_transform
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import InterpolationMode, v2

    import fixefficientnet
    from fixefficientnet.preprocessing import FastPreprocess, Preprocess

    test = dataclasses.replace(fixefficientnet.info("b0").test, size=size, crop_pct=crop_pct)
    timms: Any = create_transform(
        size, interpolation=test.interpolation, mean=test.mean, std=test.std, crop_pct=crop_pct
    )
    squares = [v2.Resize(int(size / crop_pct), InterpolationMode.BICUBIC), v2.CenterCrop(size)]
    floats = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(test.mean), list(test.std))]
    on_images, on_tensors = v2.Compose([*squares, v2.ToImage(), *floats]), v2.Compose([*squares, *floats])
    return {
        "fixefficientnet": Preprocess.of(test),
        "fixefficientnet, fast": FastPreprocess.of(test),
        "timm": lambda path: timms(Image.open(path).convert("RGB")),
        REFERENCE: lambda path: on_images(Image.open(path).convert("RGB")),
        "torchvision v2, on tensors": lambda path: on_tensors(decode_image(path, ImageReadMode.RGB)),
    }


def child(given: dict[str, Any]) -> dict[str, Any]:
    import torch

    paths: list[str] = given["paths"]
    setups = setups_of(given["size"], given["crop_pct"])
    differences = dict.fromkeys(setups, 0.0)
    for path in paths:
        tensors = {setup: transform(path) for setup, transform in setups.items()}
        for setup, tensor in tensors.items():
            off = (torch.as_tensor(tensor) - tensors[REFERENCE]).abs().max().item() * STD * 255
            differences[setup] = max(differences[setup], off)
    seconds: dict[str, list[float]] = {setup: [] for setup in setups}
    for _ in range(given["rounds"]):
        for setup, transform in setups.items():
            start = time.perf_counter()
            for path in paths:
                transform(path)
            seconds[setup].append(time.perf_counter() - start)
    return {"seconds": seconds, "differences": differences}


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """One per size and setup."""
    import statistics

    paths = [str(path) for path in machine.images_in(options.images)[:200]]
    every = []
    for case, size, crop_pct in CASES:
        given = {"paths": paths, "size": size, "crop_pct": crop_pct, "rounds": options.rounds}
        found = machine.fresh(NAME, given, {"OMP_NUM_THREADS": "1"})
        rates = {setup: len(paths) / statistics.median(seconds) for setup, seconds in found["seconds"].items()}
        every += [
            {
                "benchmark": NAME,
                "case": case,
                "setup": setup,
                "images": len(paths),
                "images_per_second": rate,
                "times_timm": rate / rates["timm"],
                "largest_difference": found["differences"][setup],  # of 255
            }
            for setup, rate in rates.items()
        ]
    return every
