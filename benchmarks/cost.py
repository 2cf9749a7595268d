"""What the paper's gain costs: each variant at its test size against the same network at the size it was trained at.

    python -m benchmarks cost

Billions of multiply-adds are counted; seconds and memory are measured, of one picture's forward pass in PyTorch, in a
fresh process with random weights. Memory is the growth of the process's peak, weights included.
"""

import argparse
import sys
from typing import Any

from benchmarks import machine

NAME = "cost"

LONG_ENOUGH = 3.0
"""Seconds of forward passes, of which the fastest counts."""


def child(given: dict[str, Any]) -> dict[str, Any]:
    import timm
    import torch

    device: str = given["device"]
    before = machine.forget_peak()
    model = timm.create_model(given["architecture"]).eval().to(memory_format=torch.channels_last).to(device)
    picture = torch.rand(1, 3, given["size"], given["size"]).to(memory_format=torch.channels_last).to(device)
    seconds: list[float] = []
    with torch.inference_mode():
        model(picture)
        while sum(seconds) < LONG_ENOUGH:
            start = machine.settled(device)
            model(picture)
            seconds.append(machine.settled(device) - start)
    megabytes = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else machine.grown_since(before)
    return {"seconds": min(seconds), "megabytes": megabytes}


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """One per variant."""
    import fixefficientnet
    from fixefficientnet import cost

    measured: dict[tuple[str, int], dict[str, Any]] = {}

    def take(architecture: str, size: int) -> dict[str, Any]:
        if (architecture, size) not in measured:
            print(f"cost: {architecture} at {size}", file=sys.stderr, flush=True)
            given = {"architecture": architecture, "size": size, "device": options.device}
            found = machine.fresh(NAME, given)
            measured[architecture, size] = {**found, "gmacs": cost.gmacs(architecture, [size])[size]}
        return measured[architecture, size]

    made = []
    for key in options.variants or fixefficientnet.list_models():
        variant = fixefficientnet.info(key)
        row = {"benchmark": NAME, "variant": key, "way": "fixefficientnet", "family": variant.family}
        paper = variant.paper
        for name, size, result in (
            ("base", variant.train_size, paper and paper.base),
            ("fix", variant.test.size, paper and paper.fix),
        ):
            row |= {f"{name}_size": size, f"{name}_top1": result and result.top1}
            row |= {f"{name}_{key}": value for key, value in take(variant.backbone.architecture, size).items()}
        made.append(row)
    return made
