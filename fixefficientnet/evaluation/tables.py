"""Measured figures as rows: for programs (JSON, CSV), and for timm's own result files."""

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from timm.data import ImageNetInfo

from fixefficientnet._internal.text import markdown
from fixefficientnet.classes import imagenet_order
from fixefficientnet.evaluation.evaluate import Measured
from fixefficientnet.evaluation.statistics import Comparison


def row(measured: Measured) -> dict[str, Any]:
    """Everything about one evaluation, as JSON values; accuracies in per cent, loss in nats."""
    loaded, found, settings = measured.loaded, measured.evaluation, measured.settings
    return {
        "model": loaded.name,
        "timm_name": loaded.timm_name,
        "tuned": loaded.tuned,
        "parameters": loaded.parameters,
        "data": measured.dataset.name,
        "interpolation": loaded.test.interpolation,
        **asdict(found.summary()),
        "calibration_error": found.calibration_error,
        "restricted_to_classes": len(measured.subset.classes) if measured.subset else None,
        "real_labels": settings.real_labels,
        "engine": settings.engine,
        "precision": settings.mixed_precision,
        "preprocessing": settings.preprocessing,
        "upright": measured.dataset.upright,
        "left_out": len(measured.dataset.left_out),
        "excluded": measured.dataset.excluded,
        "seconds": found.seconds,
        "images_per_second": found.rate,
    }


def timm_row(measured: Measured) -> dict[str, Any]:
    """One evaluation with the columns of the files in timm's results folder, rounded as there."""
    loaded, found = measured.loaded, measured.evaluation
    return {
        "model": loaded.name if loaded.own_weights else loaded.timm_name,
        "img_size": found.size,
        "top1": round(found.top1, 4),
        "top1_err": round(100 - found.top1, 4),
        "top5": round(found.top5, 4),
        "top5_err": round(100 - found.top5, 4),
        "param_count": round(loaded.parameters / 1e6, 2),
        "crop_pct": found.crop_pct,
        "interpolation": loaded.test.interpolation,
    }


def per_class_rows(measured: Iterable[Measured]) -> Iterator[dict[str, Any]]:
    """One row per model and class, the classes by name."""
    described = ImageNetInfo("imagenet-1k").label_name_to_description
    for one in measured:
        names = one.dataset.classes
        known = set(imagenet_order()) & set(names)
        for line in one.evaluation.per_class():
            index, taken_for = line["class"], line["taken_for"]
            who = {"model": one.loaded.name, "class": index, "name": names[index] if names else ""}
            who["description"] = described(names[index]) if names and names[index] in known else ""
            line["taken_for"] = "" if taken_for is None else names[taken_for] if names else taken_for
            yield who | line


def prediction_rows(measured: Iterable[Measured]) -> Iterator[dict[str, Any]]:
    """One row per model and image, in the dataset's order; None where there is nothing to tell.

    Classes are given by name, or by index where the dataset names none. "image" is the file's path in the split's
    folder; "truth" joins several ReaL labels with |; "left_out" says why an image does not count.
    """
    for one in measured:
        dataset, found = one.dataset, one.evaluation
        for index, (prediction, correct) in enumerate(zip(found.predictions, found.correct, strict=True)):
            image = dataset.image_name(index)
            row: dict[str, Any] = {"model": one.loaded.name, "image": image, **_NO_PREDICTION}
            if prediction:
                truth, best = ([*map(dataset.class_name, which)] for which in prediction[:2])
                row |= {"truth": "|".join(truth), **dict(zip(_PREDICTIONS, best, strict=False))}
                row |= {"confidence": prediction.confidence, "correct": int(correct), "loss": prediction.loss}
            else:
                row["left_out"] = found.unreadable.get(index, "no ReaL label").removeprefix(f"{image}: ")
            yield row


_PREDICTIONS = ("prediction", *(f"prediction{place}" for place in range(2, 6)))
_NO_PREDICTION = dict.fromkeys(("truth", "prediction", "confidence", "correct", "loss", *_PREDICTIONS[1:], "left_out"))


def comparison(first: Measured, second: Measured, found: Comparison) -> dict[str, Any]:
    """A comparison as JSON values; differences in points, of the second less the first."""
    low, high = found.interval
    return {
        "first": first.loaded.name,
        "second": second.loaded.name,
        "images": found.images,
        "both_correct": found.both,
        "only_first_correct": found.only_first,
        "only_second_correct": found.only_second,
        "neither_correct": found.neither,
        "difference": found.difference,
        "difference_low": low,
        "difference_high": high,
        "p": found.p,
    }


def csv_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Rows that have the same keys, as CSV with a header."""
    for index, row in enumerate(rows):
        if index == 0:
            yield _csv_line(row)
        yield _csv_line(row.values())


def _csv_line(cells: Iterable[Any]) -> str:
    r"""A line that ends in \n, of a writer to which \r too ends one: else it would not quote it in a name."""
    line = io.StringIO(newline="")
    csv.writer(line).writerow(cells)
    return f"{line.getvalue()[:-2]}\n"


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """The lines of `csv_lines` as one text."""
    return "".join(csv_lines(rows))


def json_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Rows as one JSON object a line."""
    return (f"{json.dumps(row)}\n" for row in rows)


def markdown_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Rows that have the same keys, as a table in Markdown; shares with three digits."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.3f}" if isinstance(value, float) else markdown(value)

    for index, row in enumerate(rows):
        if index == 0:
            yield _markdown_line(row)
            yield _markdown_line(["---"] * len(row))
        yield _markdown_line(map(cell, row.values()))


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def from_csv(text: str) -> list[dict[str, Any]]:
    """The inverse of `as_csv`: numbers as numbers, an empty field as None."""
    rows = csv.DictReader(io.StringIO(text))
    return [{key: field if key in _NAMES else _value(field) for key, field in row.items()} for row in rows]


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


_NAMES = {"model", "timm_name", "network", "data"}
_WORDS = {"": None, "True": True, "False": False}
