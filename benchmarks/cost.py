"""The cost of the paper's gain: each variant at its test size, and its base model at the size of the paper's figure.

    python -m benchmarks cost

GMACs (billions of multiply-adds) are counted. Seconds and memory of one image's forward pass in PyTorch are measured,
with random weights, in fresh processes that take turns. The fastest forward pass counts. Memory is the growth of the
process's peak, weights included; the median of the rounds counts. Variants with the same architecture and size share
one measurement.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fixefficientnet.manifest import Variant

NAME = "cost"

LONG_ENOUGH = 3.0
"""Seconds of forward passes; the fastest one counts."""


def child(given: dict[str, Any]) -> dict[str, Any]:
    import timm
    import torch

    device: str = given["device"]
    before = machine.forget_peak()
    model = timm.create_model(given["architecture"]).eval().to(memory_format=torch.channels_last).to(device)
    image = torch.rand(1, 3, given["size"], given["size"]).to(memory_format=torch.channels_last).to(device)
    seconds: list[float] = []
    with torch.inference_mode():
        model(image)
        while sum(seconds) < LONG_ENOUGH:
            start = machine.settled(device)
            model(image)
            seconds.append(machine.settled(device) - start)
    megabytes = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else machine.grown_since(before)
    return {"seconds": min(seconds), "megabytes": megabytes}


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """Measures the cost; one row per variant."""
    import fixefficientnet
    from fixefficientnet.evaluation import cost

    variants = [fixefficientnet.info(key) for key in options.variants or fixefficientnet.list_models()]
    sizes: dict[str, set[int]] = {}
    for variant in variants:
        sizes.setdefault(variant.backbone.architecture, set()).update((base_size(variant), variant.test.size))
    measured: dict[tuple[str, int], dict[str, Any]] = {}
    for architecture, wanted in sizes.items():
        given = {"architecture": architecture, "device": options.device}
        found = machine.in_turns(
            [str(size) for size in sorted(wanted)],
            options.rounds,
            lambda size: machine.fresh(NAME, {**given, "size": int(size)}),  # noqa: B023
            f"cost of {architecture} at",
        )
        gmacs = cost.gmacs(architecture, sorted(wanted))
        for size in wanted:
            findings = found[str(size)]
            measured[architecture, size] = {
                "seconds": min(finding["seconds"] for finding in findings),
                "megabytes": machine.median(findings, "megabytes"),
                "gmacs": gmacs[size],
            }

    made = []
    for variant in variants:
        row: machine.Row = {
            "benchmark": NAME,
            "variant": variant.key,
            "family": variant.family,
        }
        paper = variant.paper
        for name, size, result in (
            ("base", base_size(variant), paper and paper.base),
            ("fix", variant.test.size, paper and paper.fix),
        ):
            row |= {f"{name}_size": size, f"{name}_top1": result and result.top1}
            figures = measured[variant.backbone.architecture, size]
            row |= {f"{name}_{key}": value for key, value in figures.items()}
        made.append(row)
    return made


def base_size(variant: "Variant") -> int:
    """Returns the size at which the paper measured the base model: its train size, or 800 for L2."""
    return variant.paper.base.test_size if variant.paper else variant.train_size


def draw(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draws the paper's top-1 against the cost of an image, with an arrow from each base model to its FixRes model."""
    from fixefficientnet.evaluation import figures

    figure, axes = figures.panels(2, width=9, height=4.4)
    for axis, what, title in zip(axes, ("gmacs", "seconds"), ("GMACs per image", "seconds per image"), strict=True):
        for family, (name, colour) in figures.FAMILIES.items():
            mine = [row for row in rows if row["family"] == family]
            places = {
                which: ([row[f"{which}_{what}"] for row in mine], [row[f"{which}_top1"] for row in mine])
                for which in ("base", "fix")
            }
            axis.plot(*places["base"], "o--", color=colour, alpha=0.55, markersize=4, label=name)
            axis.plot(*places["fix"], "s-", color=colour, markersize=4.5, label="the same with FixRes")
            for row, *ends in zip(mine, *(zip(*places[which], strict=True) for which in ("base", "fix")), strict=True):
                axis.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "->", "color": "#555555", "lw": 0.8})
                label = row["variant"].removesuffix("_ns").upper()
                axis.annotate(label, ends[1], (3, -9), textcoords="offset points", fontsize=7, color=colour)
        axis.set_xscale("log")
        axis.set_xlabel(title)
    axes[0].set_ylabel("ImageNet top-1 in the paper, %")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure
