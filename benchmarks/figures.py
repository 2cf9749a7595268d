"""Draws every figure of the docs, from the manifest and the measurements in docs/results.

    python -m benchmarks.figures

A test fails when a committed figure is of other data, or is drawn in another style.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import cost, finetune_runs, scale
from fixefficientnet.evaluation import figures
from fixefficientnet.evaluation.tables import from_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent / "docs"
SPEED = DOCS / "results" / "speed.json"
Rows = Sequence[Mapping[str, Any]]
RESULTS: dict[str, tuple[str, "Callable[[Rows], Figure]"]] = {
    "finetuning.png": ("finetuning.csv", finetune_runs.draw),
    "scale.png": ("scale.csv", scale.draw),
    "sweep.png": ("sweep.csv", figures.sweep),
    "statistics.png": ("sweep.csv", figures.activations),
    "sweep-lite0.png": ("sweep-lite0.csv", figures.sweep),
}


def every() -> dict[str, tuple[Rows, "Callable[[Rows], Figure]"]]:
    """Returns the data and the drawing function of each figure, by file name."""
    found: dict[str, tuple[Rows, Callable[[Rows], Figure]]] = {
        "accuracy-params.png": (figures.accuracy_params_data(), figures.accuracy_params)
    }
    if costs := [row for row in json.loads(SPEED.read_text())["rows"] if row["benchmark"] == cost.NAME]:
        found["cost.png"] = costs, cost.draw
    for name, (file, draw) in RESULTS.items():
        found[name] = from_csv((DOCS / "results" / file).read_text()), draw
    return found


def main() -> None:
    argparse.ArgumentParser(
        "python -m benchmarks.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for name, (rows, draw) in every().items():
        figures.save(draw(rows), DOCS / name, rows)
        print(DOCS / name)


if __name__ == "__main__":
    main()
