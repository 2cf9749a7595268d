"""Accuracy and cost of models over a range of test sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fixefficientnet._internal.files import write_atomically
from fixefficientnet.errors import EvaluationError
from fixefficientnet.evaluation import cost, figures, page, tables
from fixefficientnet.evaluation.evaluate import Measured
from fixefficientnet.models import LoadedModel, load

PAGE = "report.html"


def sizes_of(text: str) -> list[int]:
    """Reads "128:352:32" (both ends count), "224", or several of these with commas between, in ascending order.

    Raises:
        EvaluationError: It is none of these.
    """
    found: set[int] = set()
    for part in text.split(","):
        try:
            first, *more = (int(number) for number in part.split(":"))
            last, step = more or (first, 1)
            if not 1 <= first <= last or step < 1:
                raise ValueError
        except ValueError:
            raise EvaluationError(
                f"--sizes {text!r}: {part!r} is no size. It takes FIRST:LAST:STEP in pixels (128:352:32), or sizes "
                "with commas between (224,256,320)."
            ) from None
        found |= set(range(first, last + 1, step))
    return sorted(found)


def with_untuned(names: Sequence[str]) -> list[LoadedModel]:
    """Opens models; before each that FixRes tuned comes the same one untuned, where that is known."""
    loaded: dict[str, LoadedModel] = {}
    for name in names:
        one = load(name)
        if one.untuned and one.untuned not in loaded:
            base = load(one.untuned)
            # only then the difference is FixRes alone
            test = replace(base.test, crop_pct=one.test.crop_pct, interpolation=one.test.interpolation)
            loaded[one.untuned] = replace(base, test=test, upright=one.upright)
        loaded.setdefault(name, one)
    return list(loaded.values())


def row(loaded: LoadedModel, measured: Measured) -> dict[str, Any]:
    """What a sweep tells of a model at one size.

    Beside `tables.row`: what an image costs (`gmacs`, billions of multiply-adds), the sizes that the model was trained
    at (`train_size`) and is meant for (`test_size`, and the paper's), and the pooled activations' figures where they
    were asked for.
    """
    size, paper = measured.evaluation.size, loaded.variant.paper if loaded.variant else None
    return {
        "network": loaded.architecture,
        **tables.row(measured),
        "gmacs": cost.gmacs(loaded.architecture, [size], loaded.num_classes)[size],
        "train_size": loaded.train_size,
        "test_size": loaded.test.size,
        "paper_size": paper.fix.test_size if paper else None,
        **{f"pooled_{key}": value for key, value in (measured.activations or {}).items()},
    }


def best_size(rows: Sequence[Mapping[str, Any]]) -> int:
    """The size of highest top-1; of several, the smallest."""
    return int(min(rows, key=lambda row: (-row["top1"], row["size"]))["size"])


def write(rows: Sequence[Mapping[str, Any]], every: Sequence[Measured], folder: Path, *, statistics: bool) -> list[str]:
    """Writes the table of a sweep, its figures (of the pooled activations too, if wanted) and its page; their names.

    Raises:
        EvaluationError: A file cannot be written.
    """
    csv = tables.as_csv(rows).encode("utf-8", "backslashreplace")
    for name, content in {"sweep.csv": csv, PAGE: page.render(page.of_sweep(every))}.items():
        try:
            write_atomically(folder / name, content)
        except OSError as error:
            raise EvaluationError(f"{folder / name} cannot be written: {error.strerror}.") from error
    for kind in figures.FORMATS:  # an earlier sweep's would not belong to the new table
        (folder / f"statistics.{kind}").unlink(missing_ok=True)
    drawn = {"sweep": figures.sweep(rows)} | ({"statistics": figures.activations(rows)} if statistics else {})
    for name, figure in drawn.items():
        for kind in figures.FORMATS:
            figures.save(figure, folder / f"{name}.{kind}", rows)
    return ["sweep.csv", PAGE, *(f"{name}.{kind}" for name in drawn for kind in figures.FORMATS)]
