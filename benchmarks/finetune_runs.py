"""Table and figure of a folder of fine-tuning runs that start from the same weights.

    python -m benchmarks.finetune_runs runs docs/finetuning.png

Runs that differ in their seed alone are one row. Intervals are 95% (Wilson), tests are McNemar's exact one on the
same pictures; where there are several seeds, both are of the run of middling accuracy.
"""

import argparse
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from fixefficientnet.evaluation import Evaluation, from_json, paired
from fixefficientnet.files import write_atomically


class Row(NamedTuple):
    """What runs have in common that differ in their seed alone."""

    method: str
    tune: str
    epochs: int
    size: int


def read(folder: Path) -> tuple[dict[int, Evaluation], dict[Row, list[Evaluation]], dict[Row, float]]:
    """Untuned evaluations by size, tuned ones by kind of run, forwards per picture."""
    untuned: dict[int, Evaluation] = {}
    tuned: dict[Row, list[Evaluation]] = defaultdict(list)
    forwards: dict[Row, float] = {}
    for path in sorted(folder.glob("*/report.json")):
        report = json.loads(path.read_text())
        recipe = report["recipe"]
        if recipe["stage"] != "fixres":
            continue
        found = {key: from_json(row) for key, row in json.loads((path.parent / "evaluations.json").read_text()).items()}
        untuned[recipe["train_size"]] = found["base"]
        untuned[recipe["test_size"]] = found["base_at_test"]
        row = Row(recipe["method"], recipe["tune"], recipe["epochs"], recipe["test_size"])
        tuned[row].append(found["tuned"])
        forwards[row] = report["forwards"] / report["train_pictures"]
    return dict(sorted(untuned.items())), dict(sorted(tuned.items())), forwards


def middling(evaluations: list[Evaluation]) -> Evaluation:
    return sorted(evaluations, key=lambda evaluation: evaluation.top1)[len(evaluations) // 2]


def table(
    untuned: dict[int, Evaluation], tuned: dict[Row, list[Evaluation]], forwards: dict[Row, float]
) -> list[list[str]]:
    best = max(untuned.values(), key=lambda evaluation: evaluation.top1)
    short = {"all": "", "classifier": ", classifier alone", "bn-stats": ", statistics alone", "bn": ", norm alone"}

    def against(other: Evaluation, one: Evaluation) -> str:
        lost, won, p = paired(other.right, one.right)
        return f"+{won} -{lost}, p = {p:.2g}"

    def interval(one: Evaluation) -> str:
        low, high = one.interval
        return f"{low:.1f} to {high:.1f}"

    rows = [
        [
            "",
            "size",
            "forwards per picture",
            "top-1",
            "95% interval",
            "against untuned at this size",
            f"against untuned at {best.size}",
        ]
    ]
    for size, one in untuned.items():
        rows.append(["untuned", str(size), "0", f"{one.top1:.2f}", interval(one), "", ""])
    for row, found in tuned.items():
        one = middling(found)
        top1 = f"{sum(e.top1 for e in found) / len(found):.2f}"
        if len(found) > 1:
            top1 += f" ({min(e.top1 for e in found):.2f} to {max(e.top1 for e in found):.2f}, {len(found)} seeds)"
        name = row.method + (f", {row.epochs} epochs" if row.method == "online" else "") + short[row.tune]
        cells = [name, str(row.size), f"{forwards[row]:.1f}", top1, interval(one)]
        rows.append([*cells, against(untuned[row.size], one), against(best, one)])
    return rows


STYLES = {
    ("untuned", "", 0): ("#555555", "o", "-"),
    ("online", "all", 8): ("#c1440e", "s", "-"),
    ("cached", "all", 30): ("#1f6f8b", "D", "-"),
    ("cached", "bn-stats", 30): ("#1f6f8b", "^", ":"),
    ("cached", "classifier", 30): ("#1f6f8b", "v", "--"),
}
LABELS = {
    ("untuned", "", 0): "untuned",
    ("online", "all", 8): "FixRes online (8 epochs, 3 seeds)",
    ("cached", "all", 30): "FixRes cached (3 seeds)",
    ("cached", "bn-stats", 30): "cached, statistics alone",
    ("cached", "classifier", 30): "cached, classifier alone",
}


def draw(untuned: dict[int, Evaluation], tuned: dict[Row, list[Evaluation]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for shift, (kind, (colour, marker, line)) in enumerate(STYLES.items()):
        if kind[0] == "untuned":
            points = {size: [one] for size, one in untuned.items()}
        else:
            points = {row.size: found for row, found in tuned.items() if row[:3] == kind}
        if not points:
            continue
        sizes = [size + 1.2 * (shift - 2) for size in points]
        means = [sum(e.top1 for e in found) / len(found) for found in points.values()]
        bounds = [middling(found).interval for found in points.values()]
        spread = [
            [mean - low for mean, (low, _) in zip(means, bounds, strict=True)],
            [high - mean for mean, (_, high) in zip(means, bounds, strict=True)],
        ]
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "elinewidth": 0.8, "capsize": 2}
        axis.errorbar(sizes, means, spread, label=LABELS[kind], **look)
    axis.set_xticks(list(untuned))
    axis.set_xlabel("test size, pixels (trained at 128)")
    axis.set_ylabel("top-1, % (bars: 95% interval)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="upper left", fontsize=9)
    axis.set_ylim(top=96.5)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    write_atomically(path, stream.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("figure", type=Path, help="a .png")
    options = parser.parse_args()
    untuned, tuned, forwards = read(options.runs)
    header, *rows = table(untuned, tuned, forwards)
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |")
    draw(untuned, tuned, options.figure)


if __name__ == "__main__":
    main()
