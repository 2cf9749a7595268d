"""The page of a run, an evaluation or a sweep: one HTML file for people, which needs no network and runs no script."""

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from fixefficientnet._internal.text import inert
from fixefficientnet.classes import IMAGENET, imagenet_order, labels
from fixefficientnet.data.dataset import ImageDataset
from fixefficientnet.errors import ImageError
from fixefficientnet.evaluation.evaluate import Measured, conditions
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.evaluation.statistics import compare

LONGEST_SIDE = 160
"""Of a thumbnail, in pixels."""
MISTAKES, MISTAKES_IN_ALL = 48, 96
"""Most misclassified images shown of one evaluation, and of several together."""
CHANGED = 12
"""Most images shown that one of two models alone classifies correctly."""
MATRIX = 20
"""Most classes of a confusion matrix; of more, the most confused pairs are shown."""
PAIRS, WORST = 20, 20
"""Most pairs shown, and classes that are shown without being unfolded."""
LISTED = 50
"""Most lines of a list."""


@dataclass(frozen=True)
class Row:
    """An evaluation, as a page tells of it; in the figure of accuracy against size a line joins those of the same."""

    name: str
    evaluation: Evaluation
    dataset: ImageDataset
    line: str


@dataclass(frozen=True)
class Page:
    """What a page tells.

    Attributes:
        title: Its title.
        about: What was evaluated and how, a paragraph each.
        rows: The evaluations, whose figures stand side by side.
        detailed: Those whose classes and misclassified images are shown.
        compared: Two evaluations of the same images, of which is shown what the second classifies otherwise.
        findings: Sentences on the figures.
        warning: The one that must not be overlooked.
        lists: More lines, by their heading.
        choices: What decided the result, by name.
    """

    title: str
    about: Sequence[str]
    rows: Sequence[Row]
    detailed: Sequence[Row]
    compared: tuple[Row, Row] | None = None
    findings: Sequence[str] = ()
    warning: str | None = None
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    choices: Mapping[str, Any] = field(default_factory=dict)


def of_evaluations(every: Sequence[Measured], compared: tuple[Measured, Measured] | None = None) -> Page:
    """The page of evaluations, one of each model; two of them may be compared on the same images."""
    found = _of_measured("Evaluation", every, every)
    if compared is None:
        return found
    first, second = compared
    points, sure, counts = compare(first.evaluation.correct, second.evaluation.correct).words()
    said = f"{second.loaded.name} against {first.loaded.name}, on the same images: {points} {sure}; {counts}."
    return replace(found, compared=(_row(first), _row(second)), findings=[said])


def of_sweep(every: Sequence[Measured]) -> Page:
    """The page of a sweep: all sizes of each model, and more of its best one."""
    best: dict[str, Measured] = {}
    for one in sorted(every, key=lambda one: one.evaluation.size):
        known = best.setdefault(one.loaded.name, one)
        if one.evaluation.top1 > known.evaluation.top1:
            best[one.loaded.name] = one
    return _of_measured("Sweep over test sizes", every, list(best.values()))


def _of_measured(title: str, every: Sequence[Measured], detailed: Sequence[Measured]) -> Page:
    names = ", ".join(dict.fromkeys(one.loaded.name for one in every))
    unreadable = dict.fromkeys(reason for one in every for reason in one.unreadable)
    unturned = dict.fromkeys(name for one in every for name in one.unturned)
    return Page(
        f"{title}: {names}",
        conditions(every),
        [_row(one) for one in every],
        [_row(one, at_size=True) for one in detailed],
        lists=left_out(list(unreadable), list(unturned)),
    )


def _row(one: Measured, *, at_size: bool = False) -> Row:
    name, found = one.loaded.name, one.evaluation
    return Row(f"{name} at {found.size} pixels" if at_size else name, found, one.dataset, name)


def left_out(unreadable: Sequence[str], unturned: Sequence[str]) -> dict[str, Sequence[str]]:
    """The lists of a page that name images: those that could not be read, and those that were not turned."""
    found = {
        f"Images that could not be read and do not count: {len(unreadable):,}": unreadable,
        f"Images with an EXIF orientation, not turned (--upright turns them): {len(unturned):,}": unturned,
    }
    return {heading: lines for heading, lines in found.items() if lines}


def render(page: Page) -> bytes:
    """The page as an HTML file.

    The same evaluations of the same images give the same bytes. An image that cannot be read any more is left out.
    """
    template = Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, finalize=inert, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    most = max(1, min(MISTAKES, MISTAKES_IN_ALL // max(1, len(page.detailed))))
    html = environment.from_string(template).render(
        page=page,
        chart=_chart(page.rows),
        details=[_detail(row, most) for row in page.detailed],
        changes=_changes(*page.compared) if page.compared else (),
        listed=LISTED,
    )
    return html.encode()


def _names(dataset: ImageDataset) -> Callable[[int], str]:
    """What gives the names of a dataset's classes, for people."""
    if dataset.classes != imagenet_order():
        return dataset.class_name
    described = labels(IMAGENET)
    return lambda label: described[label][1]


def _detail(row: Row, most: int) -> dict[str, Any]:
    """What is shown of one evaluation; without tables of classes where images have several labels."""
    found, names = row.evaluation, _names(row.dataset)
    wrong = [index for index, digit in enumerate(found.correct) if digit == "0"]
    shown = {"name": row.name, "wrong": len(wrong), "images": _most_confident(row, wrong, most)}
    shown |= {"classes": [], "confusion": None, "pairs": [], "worst": WORST}
    if found.predictions.several:
        return shown
    classes = sorted(found.per_class(), key=lambda one: (one["top1"], -one["images"], one["class"]))
    for one in classes:
        one["class"] = names(one["class"])
        one["taken_for"] = "" if one["taken_for"] is None else names(one["taken_for"])
    counts = found.confusion()
    occurring = sorted({label for pair in counts for label in pair})
    shown["classes"] = classes
    if len(occurring) <= MATRIX:
        of_class = {label: sum(counts[label, other] for other in occurring) for label in occurring}
        cells = [
            [(counts[truth, other], counts[truth, other] / max(1, of_class[truth])) for other in occurring]
            for truth in occurring
        ]
        shown["confusion"] = {"names": [*map(names, occurring)], "cells": cells}
    else:
        confused = sorted((-times, *pair) for pair, times in counts.items() if pair[0] != pair[1])
        shown["pairs"] = [(names(truth), names(other), -times) for times, truth, other in confused[:PAIRS]]
    return shown


def _changes(before: Row, after: Row) -> list[dict[str, Any]]:
    """The images that one of two evaluations alone classifies correctly."""
    pairs = list(zip(before.evaluation.correct, after.evaluation.correct, strict=True))
    changes = []
    for title, changed in (("Correct only now", ("0", "1")), ("Misclassified only now", ("1", "0"))):
        indices = [index for index, pair in enumerate(pairs) if pair == changed]
        shown = _most_confident(after, indices, CHANGED, before)
        changes.append({"title": title, "count": len(indices), "images": shown})
    return changes


def _most_confident(row: Row, indices: Iterable[int], most: int, before: Row | None = None) -> list[dict[str, Any]]:
    """The images of an evaluation's most confident predictions, and what was predicted before."""
    found, names = row.evaluation.predictions, _names(row.dataset)
    shown: list[dict[str, Any]] = []
    confidences = found.rows["confidence"]
    for index in sorted(indices, key=lambda index: (-confidences[index], index)):
        if len(shown) == most:
            break
        prediction, image = found[index], _thumbnail(row.dataset, index)
        if prediction is None or image is None:
            continue
        shown.append(image)
        image |= {"truth": " or ".join(map(names, prediction.labels)), "prediction": names(prediction.top5[0])}
        image |= {"confidence": 100 * prediction.confidence, "before": ""}
        earlier = before and before.evaluation.predictions[index]
        if before and earlier:
            image["before"] = _names(before.dataset)(earlier.top5[0])
    return shown


def _thumbnail(dataset: ImageDataset, index: int) -> dict[str, Any] | None:
    """A small copy of an image, turned as the network saw it; None where it cannot be read any more."""
    try:
        image, _ = dataset[index]
    except ImageError:
        return None
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    image.info.clear()  # comments go into a JPEG otherwise
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    data = base64.b64encode(stream.getvalue()).decode()
    name = dataset.image_name(index)
    return {"data": data, "width": image.width, "height": image.height, "name": name}


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 220, 40, 14, 12, 36
_APART = 26
"""Least distance of two sizes that are written along the axis."""


def _chart(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Accuracy against test size, in the units of the figure; None for a single point."""
    lines = list(dict.fromkeys(row.line for row in rows))
    sizes = sorted({row.evaluation.size for row in rows})
    if len(lines) == len(sizes) == 1:
        return None
    low, high, step = _axis([end for row in rows for end in row.evaluation.interval])
    inner, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    apart = min(8, inner / 2 / len(lines)) if len(lines) > 1 else 0  # so that intervals at one size are not on another

    def across(size: int) -> float:
        share = (size - sizes[0]) / (sizes[-1] - sizes[0]) if len(sizes) > 1 else 0.5
        return _LEFT + 24 + share * (inner - 48)

    def down(percent: float) -> float:
        return _TOP + (high - percent) / (high - low) * tall

    drawn, shared = [], Counter(row.evaluation.size for row in rows)
    for number, line in enumerate(lines):
        points = []
        for row in sorted((row for row in rows if row.line == line), key=lambda row: row.evaluation.size):
            found = row.evaluation
            x = across(found.size) + (number - (len(lines) - 1) / 2) * apart * (shared[found.size] > 1)
            points.append((x, down(found.top1), *map(down, found.interval)))
        drawn.append({"name": line, "points": points, "path": " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in points)})
    marks: list[tuple[int, float]] = []
    for size in sizes:
        if not marks or across(size) - marks[-1][1] >= _APART:
            marks.append((size, across(size)))
    ticks = [low + step * number for number in range(round((high - low) / step) + 1)]
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "bottom": _HEIGHT - _BOTTOM,
        "lines": drawn,
        "percents": [(f"{tick:g}", down(tick)) for tick in ticks],
        "sizes": marks,
    }


def _axis(values: Sequence[float]) -> tuple[float, float, float]:
    """Both ends of an axis in per cent that has some values on it, and the step between its marks."""
    span = max(values) - min(values)
    step = next(step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if span / step <= 5)
    return step * math.floor(min(values) / step), step * max(math.ceil(max(values) / step), 1), step
