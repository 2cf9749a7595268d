"""How many validation images would show that fine-tuning gains accuracy: a power calculation for McNemar's test.

    python -m benchmarks.power docs/results/finetuning.csv

The CSV file is that of `benchmarks.finetune_runs`. Gains are against the best untuned size.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from fixefficientnet.evaluation.tables import from_csv

P, POWER = 0.01, 0.8
"""Two-sided p, and the probability that a real gain gives a p below it."""


def images_needed(gain: float, differing: float) -> int:
    """Number of images that show a gain with `POWER` (Connor, Biometrics 1987).

    Args:
        gain: Difference of the two accuracies, from 0 to 1, above 0.
        differing: Share of the images that one network classifies correctly and the other does not, at least the gain.
    """
    chance, power = NormalDist().inv_cdf(1 - P / 2), NormalDist().inv_cdf(POWER)
    return math.ceil(((chance * math.sqrt(differing) + power * math.sqrt(differing - gain**2)) / gain) ** 2)


def smallest_gain(images: int, differing: float) -> float:
    """The smallest gain, from 0 to 1, that a number of images shows with `POWER`."""
    low, high = 0.0, differing
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if images_needed(middle, differing) <= images else (middle, high)
    return high


def table(rows: Sequence[Mapping[str, Any]], images: int) -> str:
    """Returns the docs' table as Markdown.

    Args:
        rows: Those of the CSV file.
        images: Number of images that they were measured on.
    """
    best = max(row["top1"] for row in rows if row["method"] == "untuned")
    lines = [
        "| tuned | size | gain, points | images that differ | images needed |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        gain, differing = (row["top1"] - best) / 100, (row["won_best"] + row["lost_best"]) / images
        if row["method"] != "untuned" and gain > 0:
            name = f"{row['method']}, {row['tune']}, {row['forwards']:.1f} forwards"
            needed = f"{images_needed(gain, differing):,}"
            lines.append(f"| {name} | {row['size']} | {100 * gain:.2f} | {100 * differing:.1f}% | {needed} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--images", type=int, default=865, help="number of validation images (default: 865)")
    options = parser.parse_args()
    print(table(from_csv(options.csv.read_text(encoding="utf-8")), options.images))
    for share in (0.03, 0.1):
        gain = 100 * smallest_gain(50_000, share)
        print(f"Where {share:.0%} of the images differ, 50,000 images show a gain of {gain:.2f} points.")


if __name__ == "__main__":
    main()
