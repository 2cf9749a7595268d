"""The images: accuracy and cost against test size, pooled activations, accuracy against parameters."""

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fixefficientnet import manifest
from fixefficientnet._internal.files import write_atomically
from fixefficientnet._internal.text import inert_lines
from fixefficientnet.errors import EvaluationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
COLOURS = ("#1f6f8b", "#c1440e", "#5b7f2b", "#7a4fa3", "#b8860b", "#3d3d3d")
UNTUNED = "#777777"


def panels(
    count: int, *, width: float, height: float, ratios: Sequence[float] | None = None, sharex: bool = False
) -> "tuple[Figure, list[Axes]]":
    """A figure of panels, one below the other if they share their x axis, else side by side; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if sharex:
        found = figure.subplots(count, 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": ratios})
    else:
        found = figure.subplots(1, count, squeeze=False, gridspec_kw={"width_ratios": ratios})
    axes: list[Axes] = list(found.flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def save(figure: "Figure", path: Path, data: object) -> None:
    """Writes a figure as .png or .svg, deterministic but for matplotlib's version.

    The sha256 of the data that it shows, JSON values, goes into the file's Description, so that a figure of other data
    is recognised.

    Raises:
        EvaluationError: Another ending, or the file cannot be written.
    """
    import matplotlib.text

    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise EvaluationError(f"{path}: a figure is a .png or a .svg.")
    both = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = {id(text) for axis in both for text in (*axis.get_ticklabels(which="both"), axis.get_offset_text())}
    for text in figure.findobj(matplotlib.text.Text):
        if id(text) not in ticks:  # names: a dollar in them begins no formula
            text.set_parse_math(False)
            text.set_text(inert_lines(text.get_text()))
    stream = io.BytesIO()
    more: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "fixefficientnet"}):
        figure.savefig(stream, format=kind, dpi=150, metadata={"Description": fingerprint(data), **more})
    try:
        write_atomically(path, stream.getvalue())
    except OSError as error:
        raise EvaluationError(f"{path} cannot be written: {error.strerror}.") from error


def fingerprint(data: object) -> str:
    """What `save` puts into a file's Description."""
    return f"data sha256 {hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()}"


def _by_model(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row)
    return found


def _looks(lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Tuned models in colour, untuned ones grey while there is but one of them."""
    colours = iter(COLOURS * len(lines))
    untuned = [name for name, rows in lines.items() if not rows[0]["tuned"]]
    looks = {}
    for name, rows in lines.items():
        tuned = rows[0]["tuned"]
        colour = next(colours) if tuned or len(untuned) > 1 or len(lines) == 1 else UNTUNED
        look: dict[str, Any] = {"color": colour, "marker": "s" if tuned else "o", "markersize": 4.5}
        looks[name] = look | {"linestyle": "-" if tuned else "--", "label": name}
    return looks


def _name(axis: "Axes", text: str, at: tuple[float, float], offset: tuple[int, int], **look: Any) -> None:
    """Writes a name beside a point; the offset is in points of type."""
    axis.annotate(text, at, offset, textcoords="offset points", fontsize=8, **look)


def _mark_sizes(axes: "Sequence[Axes]", rows: Iterable[Mapping[str, Any]], named_on: "Sequence[Axes]") -> None:
    """Vertical lines at the sizes that count, named along the top of a panel, in turns of several."""
    labels_at: dict[int, list[str]] = {}
    for row in rows:
        for key, label in (("train_size", "train size"), ("paper_size", "paper's size"), ("test_size", "test size")):
            size = row[key]
            is_papers = key == "test_size" and (size == row["paper_size"] or not row["tuned"])
            if size and not is_papers and label not in labels_at.setdefault(size, []):
                labels_at[size].append(label)
    low, high = named_on[0].get_xlim()
    labels_at = {size: labels for size, labels in sorted(labels_at.items()) if labels and low <= size <= high}
    for (size, labels), named in zip(labels_at.items(), itertools.cycle(named_on), strict=False):
        for axis in axes:
            axis.axvline(size, color="#999999", linewidth=0.9, linestyle=":" if "train size" in labels else "-.")
        first, last = named.get_xlim()
        late = size > (first + last) / 2
        text, side = f"{', '.join(labels)} {size}", "right" if late else "left"
        _name(named, text, (size, 1), (-2 if late else 2, 2), xycoords=("data", "axes fraction"), ha=side)


def sweep(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Accuracy and cost against test size; each row as `sweep.row` gives it.

    Bars are 95% intervals, a star is each model's best size.
    """
    from fixefficientnet.evaluation.sweep import best_size

    lines = _by_model(rows)
    figure, (accuracy, gmacs, rate) = panels(3, width=7, height=6.2, ratios=(3, 1, 1), sharex=True)
    looks = _looks(lines)
    for name, points in lines.items():
        sizes = [row["size"] for row in points]
        top1 = [row["top1"] for row in points]
        spread = [[row["top1"] - row["top1_low"] for row in points], [row["top1_high"] - row["top1"] for row in points]]
        accuracy.errorbar(sizes, top1, spread, elinewidth=0.7, capsize=2, **looks[name])
        best = best_size(points)
        accuracy.plot(best, top1[sizes.index(best)], "*", markersize=14, color=looks[name]["color"], zorder=3)
        rate.plot(sizes, [row["images_per_second"] for row in points], **looks[name])
    for network, points in {row["network"]: lines[row["model"]] for row in rows}.items():
        gmacs.plot([row["size"] for row in points], [row["gmacs"] for row in points], ".-", color="#333333")
        _name(gmacs, network, (points[-1]["size"], points[-1]["gmacs"]), (-4, 3), ha="right")
    accuracy.set_ylabel("top-1, %")
    gmacs.set_ylabel("GMACs")
    rate.set(xlabel="test size, pixels", ylabel="images/s")
    for axis, key in ((gmacs, "gmacs"), (rate, "images_per_second")):
        axis.set_ylim(0, 1.15 * max(row[key] for row in rows))
    rate.set_xticks(sorted({row["size"] for row in rows}))
    _mark_sizes((accuracy, gmacs, rate), rows, [accuracy])
    accuracy.legend(frameon=False, fontsize=9, loc="best")
    return figure


def activations(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """How the pooled activations move with the test size; bands hold the middle half of the channels."""
    lines = _by_model(rows)
    looks = _looks(lines)
    sizes_of_all = sorted({row["size"] for row in rows})
    figure, axes = panels(3, width=9.5, height=3.6)
    for name, points in lines.items():
        sizes = [row["size"] for row in points]
        look = looks[name]
        axes[0].plot(sizes, [100 * row["pooled_near_zero"] for row in points], **look)
        for axis, key in zip(axes[1:], ("mean", "spread"), strict=True):
            low, middle, high = ([row[f"pooled_{key}_{q}"] for row in points] for q in ("q25", "median", "q75"))
            axis.plot(sizes, middle, **look)
            axis.fill_between(sizes, low, high, color=look["color"], alpha=0.15, linewidth=0)
    for axis, label in zip(axes, ("near zero, %", "mean of a channel", "spread of a channel over images"), strict=True):
        axis.set(xlabel="test size, pixels", ylabel=label)
        axis.set_xticks(sizes_of_all, sizes_of_all, rotation=90 if len(sizes_of_all) > 6 else 0, fontsize=9)
    figure.suptitle(
        "pooled activations (lines: all, the median channel; bands: the middle half of the channels)", fontsize=9
    )
    _mark_sizes(axes, rows, axes)
    axes[0].legend(frameon=False, fontsize=8, loc="best")
    return figure


FAMILIES = {
    "noisy_student": ("Noisy Student (extra data)", "#1f6f8b"),
    "advprop": ("AdvProp (no extra data)", "#c1440e"),
}


def accuracy_params_data() -> list[dict[str, Any]]:
    """What `accuracy_params` shows: one row per variant of the paper."""
    return [
        {
            "variant": variant.key,
            "family": variant.family,
            "parameters": variant.parameters,
            "base": variant.paper.base.top1,
            "fix": variant.paper.fix.top1,
        }
        for variant in manifest.load().values()
        if variant.paper
    ]


def accuracy_params(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """The paper's Figure 1: accuracy against parameters, base models beside their Fix versions."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, (axis,) = panels(1, width=7, height=4.6)
    for family, (label, colour) in FAMILIES.items():
        members = sorted((row for row in rows if row["family"] == family), key=lambda row: row["parameters"])
        millions = [row["parameters"] / 1e6 for row in members]
        fix = [row["fix"] for row in members]
        axis.plot(millions, fix, "s-", color=colour, markersize=5, label=f"FixEfficientNet, {label}")
        base = [row["base"] for row in members]
        look: dict[str, Any] = {
            "markersize": 4,
            "linewidth": 1,
            "markerfacecolor": "white",
            "label": f"EfficientNet, {label}",
        }
        axis.plot(millions, base, "o--", color=colour, **look)
        above = family == "noisy_student"
        for row, x, y in zip(members, millions, fix, strict=True):
            name = row["variant"].removesuffix("_ns").upper()
            place, down, side = ((-3, 6), y, "right") if above else ((4, -11), row["base"], "left")
            _name(axis, name, (x, down), place, color=colour, ha=side)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator([5, 10, 20, 50, 100, 200, 500]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}M"))
    axis.set(xlabel="parameters", ylabel="ImageNet top-1, % (as reported in the paper)")
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    return figure
