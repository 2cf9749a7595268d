"""The paper's Tables 1 and 2, beside what has been measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fixefficientnet import manifest
from fixefficientnet.manifest import Accuracy, PaperRow, Variant

NOISE = 0.1
"""Accuracy points between runs of the same training (the note, section 3.4)."""
ROUNDING = 0.05
"""The paper gives one decimal."""
VALIDATION_SET = (50_000, 1000)
"""Images and classes of ImageNet-2012's validation set: only there the paper's figures can be compared."""
IMAGENET_NAME = "imagenet-1k"
"""What a manifest's measured dataset begins with where it is that."""


def within_noise(difference: float) -> bool:
    """Whether a measured accuracy is the paper's, as far as anyone can tell."""
    return abs(difference) <= NOISE + ROUNDING + 1e-9


@dataclass(frozen=True, slots=True)
class Result:
    """What somebody measured for a variant, in per cent; the source is a run's folder, or "published".

    It is comparable if it was measured on what the paper's figures are of. The accuracy of the untuned model, at its
    train size, is None where that is not known.
    """

    variant: str
    source: str
    images: int
    comparable: bool
    base: Accuracy | None
    fix: Accuracy


def published() -> list[Result]:
    """What the manifest tells of published weights."""
    found = []
    for variant in manifest.load().values():
        measured = variant.weights.measured if variant.weights else None
        if measured:
            named = measured.dataset.lower().startswith((IMAGENET_NAME, "imagenet-2012"))
            comparable = named and measured.images == VALIDATION_SET[0]
            fix = Accuracy(variant.test.size, measured.top1, measured.top5)
            found.append(Result(variant.key, "published", measured.images, comparable, None, fix))
    return found


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The paper's rows, each with the comparable results beside it; a variant that has none has one row.

    Differences are measured less paper, in points; None where the sizes differ.
    """
    found, variants = [], manifest.load()
    of_paper = [(variant, variant.paper) for variant in variants.values() if variant.paper]
    for variant, paper in sorted(of_paper, key=lambda pair: pair[1].table):
        row: dict[str, Any] = {"table": paper.table, "variant": variant.key}
        row |= {"parameters": variant.parameters, "train_size": variant.train_size}
        for what, said in (("base", paper.base), ("fix", paper.fix)):
            row |= {f"{what}_size": said.test_size, f"{what}_top1": said.top1, f"{what}_top5": said.top5}
        own = [result for result in results if result.variant == variant.key and _fits(result, variants)]
        found += [row | _beside(result, paper) for result in own] or [row | _NOTHING]
    return found


_NOTHING: dict[str, Any] = {
    f"{what}_{key}": None
    for what in ("base", "fix")
    for key in ("measured_top1", "measured_top5", "difference", "within_noise")
} | {"source": None}


def _beside(result: Result, paper: PaperRow) -> dict[str, Any]:
    beside = dict(_NOTHING, source=result.source)
    for what, said, measured in (("base", paper.base, result.base), ("fix", paper.fix, result.fix)):
        if measured is not None and measured.test_size == said.test_size:
            difference = measured.top1 - said.top1
            beside |= {f"{what}_measured_top1": measured.top1, f"{what}_measured_top5": measured.top5}
            beside |= {f"{what}_difference": difference, f"{what}_within_noise": within_noise(difference)}
    return beside


def elsewhere(results: Iterable[Result]) -> list[Result]:
    """Results that cannot stand beside the paper's: of other images or sizes, or of a model that is not in it."""
    variants = manifest.load()
    return [result for result in results if not _fits(result, variants)]


def _fits(result: Result, variants: Mapping[str, Variant]) -> bool:
    variant = variants.get(result.variant)
    if variant is None or variant.paper is None or not result.comparable:
        return False
    base, fix = variant.paper.base, variant.paper.fix
    return result.fix.test_size == fix.test_size or bool(result.base and result.base.test_size == base.test_size)


TITLES = {1: "Table 1: with extra data (Noisy Student)", 2: "Table 2: without extra data (AdvProp)"}
HEADER = ("variant", "base", "at", "Fix", "at", "measured", "at", "diff.", "noise")


def cells(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What a table for people shows of a row, under `HEADER`: top-1 / top-5; one line, two where base was measured."""
    lines = []
    paper = {what: f"{row[f'{what}_top1']:.1f}/{row[f'{what}_top5']:.1f}" for what in ("base", "fix")}
    for what in ("fix", "base"):
        beside: tuple[str, ...] = ("-", "-", "-", "-")
        if row[f"{what}_measured_top1"] is not None:
            measured = f"{row[f'{what}_measured_top1']:.2f}/{row[f'{what}_measured_top5']:.2f}"
            noise = "within" if row[f"{what}_within_noise"] else "outside"
            beside = (measured, str(row[f"{what}_size"]), f"{row[f'{what}_difference']:+.2f}", noise)
        elif what == "base":
            continue
        said = (paper["base"], str(row["base_size"]), paper["fix"], str(row["fix_size"]))
        lines.append((row["variant"], *said, *beside))
    return lines


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Both tables as Markdown."""
    blocks = []
    for table, title in TITLES.items():
        lines = [f"**{title}**", "", f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
        lines += [f"| {' | '.join(line)} |" for row in rows if row["table"] == table for line in cells(row)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def footnote(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the figures are, and where the measured ones come from."""
    sources = [f"{row['variant']}: {row['source']}" for row in rows if row["source"]]
    return _FOOTNOTE + (f" Measured: {', '.join(sources)}." if sources else " Nothing of this has been measured yet.")


_FOOTNOTE = (
    "top-1/top-5 in per cent, ImageNet-2012 validation, single crop; base and Fix as reported in arXiv 2003.08237. "
    f"noise: {NOISE} between runs of the same training (its section 3.4) and {ROUNDING} of rounding."
)
