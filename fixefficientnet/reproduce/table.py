"""The table of several runs of variants, which grows as they finish."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fixefficientnet.errors import FixEfficientNetError
from fixefficientnet.evaluation.outcome import Summary
from fixefficientnet.manifest import Variant
from fixefficientnet.reproduce import hours
from fixefficientnet.reproduce.report import Report

FILENAME = "table.md"
HEADER = ("variant", "base", "at", "base", "at", "tuned", "paper", "diff.", "hours", "Hub")
FOOTNOTE = (
    "Top-1 in per cent: of the untuned network at its train size and at the test size, of the tuned one, and the "
    "paper's after FixRes. diff.: tuned less paper, where both are of all of ImageNet's validation images at the same "
    "size. hours: of all calls of a run, but for those that were killed. Hub: version of the repository that has it."
)


@dataclass(frozen=True, slots=True)
class Row:
    """What a variant has come to.

    Attributes:
        variant: The variant.
        measured: Figures of each evaluation, by a name in `report.TITLES`; empty where nothing is finished.
        comparable: Whether they are of what the paper's figures are of.
        hours: Hours that its run took; None where that is not known.
        version: Version of the repository that has it; None where none has.
    """

    variant: Variant
    measured: Mapping[str, Summary]
    comparable: bool = False
    hours: float | None = None
    version: str | None = None

    @classmethod
    def of_run(cls, variant: Variant, folder: Path) -> "Row":
        """The row of a run, by its folder; one without figures, where it is not finished."""
        with contextlib.suppress(FixEfficientNetError):
            found = Report.load(folder)
            return cls(variant, found.measured, found.comparable, hours.read(folder))
        return cls(variant, {})

    def cells(self) -> list[str]:
        """The texts under `HEADER`."""
        tuned, paper = self.measured.get("tuned"), self.variant.paper
        sizes = {"base": self.variant.train_size, "base_at_test": self.variant.test.size}
        found = [self.variant.key]
        for name, size in sizes.items():
            row = self.measured.get(name)
            found += [f"{row.top1:.2f}", str(row.size)] if row else ["-", str(size)]
        difference = None
        if tuned and paper and self.comparable and tuned.size == paper.fix.test_size:
            difference = tuned.top1 - paper.fix.top1
        return [
            *found,
            f"{tuned.top1:.2f}" if tuned else "-",
            f"{paper.fix.top1:.1f}" if paper else "-",
            "-" if difference is None else f"{difference:+.2f}",
            "-" if self.hours is None else f"{self.hours:.1f}",
            self.version or "-",
        ]


def as_markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    lines = [f"| {' | '.join(HEADER)} |", f"|---|{'---:|' * (len(HEADER) - 1)}"]
    lines += [f"| {' | '.join(row.cells())} |" for row in rows]
    return "\n".join([*lines, "", FOOTNOTE]) + "\n"
