"""Collects fine-tuning runs from the same weights in a CSV file, of which the docs' table and figure are made.

    python -m benchmarks.finetune_runs runs docs/results/finetuning.csv
    python -m benchmarks.figures

Runs that differ only in their seed are one row. Intervals are 95% (Wilson). Tests are McNemar's exact test on the same
images. With several seeds, interval and test are those of the run with the median accuracy.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fixefficientnet._internal.files import write_atomically
from fixefficientnet.evaluation import journal
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.evaluation.statistics import compare
from fixefficientnet.evaluation.tables import as_csv, from_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Kind(NamedTuple):
    """What runs that differ only in their seed have in common."""

    method: str
    tune: str | None
    epochs: int
    size: int


def read(folder: Path) -> tuple[dict[int, Evaluation], dict[Kind, list[Evaluation]], dict[Kind, float]]:
    """Reads runs: untuned evaluations by size, tuned ones by kind of run, and forward passes per image."""
    untuned: dict[int, Evaluation] = {}
    tuned: dict[Kind, list[Evaluation]] = defaultdict(list)
    forwards: dict[Kind, float] = {}
    for path in sorted(folder.glob("*/report.json")):
        report = json.loads(path.read_text())
        recipe = report["recipe"]
        if recipe["stage"] != "fixres":
            continue
        found = {name: journal.load(path.parent / "evaluations" / name) for name in report["measured"]}
        untuned[recipe["train_size"]] = found["base"]
        untuned[recipe["test_size"]] = found["base_at_test"]
        kind = Kind(recipe["method"], recipe["tune"], recipe["epochs"], recipe["test_size"])
        tuned[kind].append(found["tuned"])
        forwards[kind] = report["forwards"] / report["train_images"]
    return dict(sorted(untuned.items())), dict(sorted(tuned.items())), forwards


def rows(
    untuned: Mapping[int, Evaluation], tuned: Mapping[Kind, Sequence[Evaluation]], forwards: Mapping[Kind, float]
) -> list[dict[str, Any]]:
    """Returns one row per kind of run, after one per size of the untuned network."""
    best = max(untuned.values(), key=lambda evaluation: evaluation.top1)

    def row(kind: Kind, found: Sequence[Evaluation], forwards: float) -> dict[str, Any]:
        one = sorted(found, key=lambda evaluation: evaluation.top1)[len(found) // 2]
        top1 = [evaluation.top1 for evaluation in found]
        low, high = one.interval
        line = {**kind._asdict(), "forwards": round(forwards, 2), "seeds": len(found)}
        line |= {"top1": sum(top1) / len(top1), "lowest": min(top1), "highest": max(top1), "low": low, "high": high}
        for name, other in (("this", untuned[kind.size]), ("best", best)):
            pair = compare(other.correct, one.correct)
            line |= {f"won_{name}": pair.only_second, f"lost_{name}": pair.only_first, f"p_{name}": pair.p}
        return line | {"best_size": best.size}

    found = [row(Kind("untuned", None, 0, size), [one], 0.0) for size, one in untuned.items()]
    return found + [row(kind, evaluations, forwards[kind]) for kind, evaluations in tuned.items()]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the docs' table as Markdown."""
    short = {None: "", "fixres": "", "classifier": ", classifier alone", "bn-stats": ", statistics alone"}
    short |= {"all": ", norm's weight and bias too", "bn": ", norm alone"}
    best = rows[0]["best_size"]
    lines = [
        f"|  | size | forwards per image | top-1 | 95% interval | against untuned at this size | against \
untuned at {best} |"
    ]
    lines.append("| --- " * 7 + "|")
    for row in rows:
        name = row["method"] + (f", {row['epochs']} epochs" if row["method"] == "online" else "") + short[row["tune"]]
        top1 = f"{row['top1']:.2f}"
        if row["seeds"] > 1:
            top1 += f" ({row['lowest']:.2f} to {row['highest']:.2f}, {row['seeds']} seeds)"
        forwards = f"{row['forwards']:.1f}" if row["forwards"] else "0"
        cells = [name, str(row["size"]), forwards, top1, f"{row['low']:.1f} to {row['high']:.1f}"]
        for which in ("this", "best"):
            tests = f"+{row[f'won_{which}']} -{row[f'lost_{which}']}, p = {row[f'p_{which}']:.2g}"
            cells.append("" if row["method"] == "untuned" else tests)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


STYLES = {
    ("untuned", None, 0): ("untuned", "#555555", "o", "-"),
    ("online", "all", 8): ("FixRes online (8 epochs, 3 seeds)", "#c1440e", "s", "-"),
    ("cached", "fixres", 30): ("FixRes cached (3 seeds)", "#1f6f8b", "D", "-"),
    ("cached", "bn-stats", 30): ("cached, statistics alone", "#1f6f8b", "^", ":"),
    ("cached", "classifier", 30): ("cached, classifier alone", "#1f6f8b", "v", "--"),
}


def draw(rows: Iterable[Mapping[str, Any]]) -> "Figure":
    """Draws accuracy against test size; `rows` are the CSV file's."""
    from fixefficientnet.evaluation import figures

    every = list(rows)
    figure, (axis,) = figures.panels(1, width=7, height=4.2)
    for shift, (kind, (label, colour, marker, line)) in enumerate(STYLES.items()):
        points = [row for row in every if (row["method"], row["tune"], row["epochs"]) == kind]
        sizes = [row["size"] + 1.2 * (shift - 2) for row in points]
        spread = [[row["top1"] - row["low"] for row in points], [row["high"] - row["top1"] for row in points]]
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "elinewidth": 0.8, "capsize": 2}
        axis.errorbar(sizes, [row["top1"] for row in points], spread, label=label, **look)
    axis.set_xticks([row["size"] for row in every if row["method"] == "untuned"])
    axis.set_xlabel("test size, pixels (trained at 128)")
    axis.set_ylabel("top-1, % (bars: 95% interval)")
    axis.legend(frameon=False, loc="lower right", fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("csv", type=Path)
    options = parser.parse_args()
    found = as_csv(rows(*read(options.runs)))
    write_atomically(options.csv, found.encode())
    print(table(from_csv(found)))


if __name__ == "__main__":
    main()
