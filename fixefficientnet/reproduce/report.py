"""What a run leaves to read: report.json, report.md and curve.png."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fixefficientnet._internal.files import write_atomically
from fixefficientnet.evaluation import figures
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.evaluation.paper import IMAGENET, NOISE, within_noise
from fixefficientnet.evaluation.statistics import compare
from fixefficientnet.manifest import Variant
from fixefficientnet.reproduce.recipe import Recipe

PAIRED = "fixres_against_base_at_test_size"
"""Where in a report the paired test is."""
TITLES = {
    "base": "base, at its train size",
    "base_at_test": "base, at the test size",
    "tuned": "FixRes, at the test size",
    "trained": "base stage, at the train size",
}


def build(
    recipe: Recipe,
    variant: Variant | None,
    evaluations: Mapping[str, Evaluation],
    *,
    num_classes: int,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """The report as JSON values: figures, intervals, the paired test, and the paper's figures beside."""
    report: dict[str, Any] = {"variant": recipe.variant, "backbone": recipe.backbone, **more}
    report["measured"] = {name: evaluation.summary() for name, evaluation in evaluations.items()}
    if pair := paired(evaluations):
        report[PAIRED] = pair
    if variant and variant.paper and recipe.stage == "fixres":
        paper = variant.paper
        found = next(iter(evaluations.values()))
        comparable = (found.images, num_classes) == IMAGENET
        report["paper"] = {
            "table": paper.table,
            "base_top1": paper.base.top1,
            "fix_top1": paper.fix.top1,
            "fix_top5": paper.fix.top5,
            "comparable": comparable,
        }
        if comparable and "tuned" in evaluations and recipe.test_size == paper.fix.test_size:
            difference = evaluations["tuned"].top1 - paper.fix.top1
            report["paper"] |= {"difference": difference, "within_noise": within_noise(difference)}
    return report


def paired(evaluations: Mapping[str, Evaluation]) -> dict[str, Any] | None:
    """The tuned network against the untuned one at the same size, as JSON values; None for a base stage."""
    if "tuned" not in evaluations or "base_at_test" not in evaluations:
        return None
    pair = compare(evaluations["base_at_test"].correct, evaluations["tuned"].correct)
    low, high = pair.interval
    return {
        "only_base_correct": pair.only_first,
        "only_fixres_correct": pair.only_second,
        "difference": pair.difference,
        "difference_low": low,
        "difference_high": high,
        "p": pair.p,
    }


def as_markdown(report: Mapping[str, Any], recipe: Recipe) -> str:
    """The report as a page."""
    title = "FixRes fine-tuning" if recipe.stage == "fixres" else "base stage"
    lines = [f"# {report['variant']}: {title}", ""]
    lines += ["| | size | top-1 | 95% interval | top-5 | loss | images |", "|---|---|---|---|---|---|---|"]
    for name, row in report["measured"].items():
        lines.append(
            f"| {TITLES[name]} | {row['size']} | {row['top1']:.2f} | {row['top1_low']:.2f} to {row['top1_high']:.2f} "
            f"| {row['top5']:.2f} | {row['loss']:.4f} | {row['images']:,} |"
        )
    if test := report.get(PAIRED):
        lines += [
            "",
            f"Of the same images at the test size, {test['only_fixres_correct']} are correct after FixRes only and "
            f"{test['only_base_correct']} before it only: {test['difference']:+.2f} points (95%: "
            f"{test['difference_low']:+.2f} to {test['difference_high']:+.2f}; McNemar's exact test: p = "
            f"{test['p']:.2g}).",
        ]
    if paper := report.get("paper"):
        lines += [
            "",
            f"The paper (ImageNet-2012 validation, Table {paper['table']}): base {paper['base_top1']}, FixRes "
            f"{paper['fix_top1']} top-1, {paper['fix_top5']} top-5.",
        ]
        if "difference" in paper:
            within = "within" if paper["within_noise"] else "outside"
            lines[-1] += f" Difference: {paper['difference']:+.2f}, {within} the paper's noise of {NOISE} and rounding."
        else:
            lines[-1] += " Not comparable: these figures are of other images, or of another test size."
    elif recipe.stage == "fixres":
        lines += ["", "The paper has no figures for this network."]
    if report["unreadable"]:
        lines += ["", f"Unreadable images: {len(report['unreadable'])}, left out:"]
        lines += [f"- {reason}" for reason in report["unreadable"][:20]]
    lines += [
        "",
        f"Forward passes of an image through the backbone that this method takes: {report['forwards']:,} "
        f"({report['forwards'] / max(1, report['train_images']):g} per training image).",
        "",
        "## Recipe",
        "",
        "```json",
        recipe.dumps(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def curve(lines: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws loss and accuracy on the training images against steps, as logged."""
    points = [line for line in lines if "loss" in line]
    if not points:  # statistics alone are no curve
        return
    figure, axes = figures.panels(2, width=7, height=3.2)
    epochs: dict[Any, list[Mapping[str, Any]]] = {}
    for point in points:
        epochs.setdefault(point.get("epoch"), []).append(point)
    for axis, key, label in zip(axes, ("loss", "top1"), ("loss", "top-1, %"), strict=True):
        values = [point[key] for point in points]
        axis.plot([point["steps"] for point in points], values, color="#1f6f8b", alpha=0.35, linewidth=1)
        ends = [group[-1]["steps"] for group in epochs.values()]
        means = [sum(point[key] for point in group) / len(group) for group in epochs.values()]
        axis.plot(ends, means, color="#1f6f8b", linewidth=1.5, marker="." if len(ends) < 50 else "")
        axis.set_xlabel("step")
        axis.set_ylabel(f"{label} (training images)")
    figure.suptitle(f"{title} (light: each step, dark: mean of each epoch)", fontsize=10)
    figures.save(figure, path, points)


def write(folder: Path, report: Mapping[str, Any], recipe: Recipe) -> None:
    """Writes report.md, then report.json, whose presence says that the run is complete."""
    write_atomically(folder / "report.md", as_markdown(report, recipe).encode())
    write_atomically(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())
