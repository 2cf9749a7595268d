"""Throughput of the test-time preprocessing alone, from JPEG to tensor, on one core.

    python -m benchmarks preprocess --images FOLDER

Every method makes a float32 tensor [3, S, S] of the same files (from the page cache), in one process, in turns; the
median of the rounds counts. "torchvision v2" is torchvision's transforms v2 on Pillow's images. "on tensors" decodes
and resizes with torchvision itself, whose pixels differ a little, as those of --fast-preprocessing do. Pixels are
compared with torchvision v2's on every image.
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
"""B0's standard deviation for normalisation; it turns differences of tensors into those of pixels."""


def methods_of(size: int, crop_pct: float) -> dict[str, Callable[[str], Any]]:
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
    methods = methods_of(given["size"], given["crop_pct"])
    differences = dict.fromkeys(methods, 0.0)
    for path in paths:
        tensors = {method: transform(path) for method, transform in methods.items()}
        for method, tensor in tensors.items():
            off = (torch.as_tensor(tensor) - tensors[REFERENCE]).abs().max().item() * STD * 255
            differences[method] = max(differences[method], off)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(given["rounds"]):
        for method, transform in methods.items():
            start = time.perf_counter()
            for path in paths:
                transform(path)
            seconds[method].append(time.perf_counter() - start)
    return {"seconds": seconds, "differences": differences}


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """Measures preprocessing; one row per size and method."""
    import statistics

    paths = [str(path) for path in machine.images_in(options.images)[:200]]
    every = []
    for case, size, crop_pct in CASES:
        given = {"paths": paths, "size": size, "crop_pct": crop_pct, "rounds": options.rounds}
        found = machine.fresh(NAME, given, {"OMP_NUM_THREADS": "1"})
        rates = {method: len(paths) / statistics.median(seconds) for method, seconds in found["seconds"].items()}
        every += [
            {
                "benchmark": NAME,
                "case": case,
                "method": method,
                "images": len(paths),
                "images_per_second": rate,
                "times_timm": rate / rates["timm"],
                "largest_difference": found["differences"][method],  # of 255
            }
            for method, rate in rates.items()
        ]
    return every
