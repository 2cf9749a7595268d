"""The report of a finished run: report.json, which nothing else parses; the others are for people."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fixefficientnet._internal import records
from fixefficientnet._internal.files import write_atomically, write_text
from fixefficientnet._internal.records import LEFT_OUT_IF_NONE, Count, Percent, Positive
from fixefficientnet._internal.text import markdown
from fixefficientnet.data.dataset import ImageDataset
from fixefficientnet.errors import MissingFileError, RunError
from fixefficientnet.evaluation import figures, page
from fixefficientnet.evaluation.outcome import Evaluation, Summary
from fixefficientnet.evaluation.paper import NOISE, VALIDATION_SET, Result, within_noise
from fixefficientnet.evaluation.statistics import compare
from fixefficientnet.manifest import Accuracy, Variant
from fixefficientnet.reproduce.recipe import Recipe

FILENAME = "report.json"
TEXT, PAGE = "report.md", "report.html"
TITLES = {
    "base": "base, at its train size",
    "base_at_test": "base, at the test size",
    "tuned": "FixRes, at the test size",
    "trained": "base stage, at the train size",
}
"""The evaluations of a run, in order, and what they are called."""
UNTUNED = ("base", "base_at_test")
"""The evaluations of a run before FixRes."""
_LARGEST = 2**30
"""Most bytes of a report, which may list each of a million images."""
SIGNIFICANT = 0.05
"""Above this p-value, a difference is called no gain."""


@dataclass(frozen=True, slots=True)
class PairedTest:
    """The tuned network against the untuned one at one size, on the same images.

    Attributes:
        only_base_correct: Number of images that the untuned network alone classifies correctly.
        only_fixres_correct: Number of images that the tuned network alone classifies correctly.
        difference: Top-1 of the tuned network less that of the untuned one, in points.
        difference_low: Lower end of the 95% interval of the difference.
        difference_high: Upper end of the 95% interval of the difference.
        p: p-value of McNemar's exact test.
    """

    only_base_correct: Count
    only_fixres_correct: Count
    difference: float
    difference_low: float
    difference_high: float
    p: float

    @classmethod
    def all_of(cls, evaluations: Mapping[str, Evaluation]) -> "dict[str, PairedTest]":
        """The tests on the evaluations of a run, by a name in `UNTUNED`; none for a base stage."""
        found = {}
        for name in UNTUNED:
            if name in evaluations and "tuned" in evaluations:
                pair = compare(evaluations[name].correct, evaluations["tuned"].correct)
                found[name] = cls(pair.only_first, pair.only_second, pair.difference, *pair.interval, pair.p)
        return found

    def __str__(self) -> str:
        """The test in words."""
        return (
            f"{self.difference:+.2f} points (95%: {self.difference_low:+.2f} to {self.difference_high:+.2f}; "
            f"{self.only_fixres_correct} images are correct after FixRes only, {self.only_base_correct} before it "
            f"only; McNemar's exact test: p = {self.p:.2g})"
        )


@dataclass(frozen=True, slots=True)
class Gain:
    """What FixRes brought: the tuned network against the best of the untuned evaluations.

    Attributes:
        name: Name of the untuned evaluation of the highest top-1; of equals, of the one at the train size.
        untuned: That evaluation.
        tuned: The evaluation after FixRes.
        test: The tuned network against that untuned one.
    """

    name: str
    untuned: Summary
    tuned: Summary
    test: PairedTest

    @classmethod
    def of(cls, measured: Mapping[str, Summary], paired: Mapping[str, PairedTest]) -> "Gain | None":
        """The gain of a run; None for a base stage."""
        if not paired:
            return None
        best = max(paired, key=lambda name: measured[name].top1)
        return cls(best, measured[best], measured["tuned"], paired[best])

    @property
    def warning(self) -> str | None:
        """Why FixRes was of no use here; None where its gain is shown."""
        test, untuned = self.test, self.untuned
        figures = f"top-1 {untuned.top1:.2f} untuned at {untuned.size} pixels, {self.tuned.top1:.2f} after FixRes"
        if test.difference > 0 and test.p < SIGNIFICANT:
            return None
        if test.difference > 0:
            return f"No gain is shown: {figures}; {untuned.images:,} images do not tell this from chance."
        if test.p < SIGNIFICANT:
            return f"FixRes made it worse: {figures}. Use the untuned network at {untuned.size} pixels."
        return f"FixRes did not help: {figures}. The untuned network at {untuned.size} pixels does as well."


@dataclass(frozen=True, slots=True)
class Selection:
    """Which epoch's weights a base stage kept.

    Attributes:
        epoch: The epoch of the highest top-1 on the validation images, counted from 1; of equals, the earliest.
        epochs: Number of epochs that were trained.
        top1: That top-1, in per cent.
        last_top1: Top-1 after the last epoch, in per cent; None where the logits were not finite then.
    """

    epoch: Positive
    epochs: Positive
    top1: Percent
    last_top1: Percent | None

    def __str__(self) -> str:
        """The choice in words."""
        last = "no number" if self.last_top1 is None else f"{self.last_top1:.2f}"
        after = f", after the last {last}" if self.epoch < self.epochs else ""
        return (
            f"Epoch {self.epoch} of {self.epochs} is the best: top-1 {self.top1:.2f}{after}. The images that it is "
            "measured on chose it, so its accuracy is slightly optimistic."
        )


@dataclass(frozen=True, slots=True)
class PaperFigures:
    """What the paper reports for the variant, beside the run.

    Attributes:
        table: Table of the paper, 1 or 2.
        base_top1: Top-1 of the untuned network in the paper, in per cent.
        fix_top1: Top-1 after FixRes in the paper, in per cent.
        fix_top5: Top-5 after FixRes in the paper, in per cent.
        comparable: Whether the run was measured on what the paper's figures are of.
        difference: Measured top-1 less the paper's, in points; None where they cannot be compared.
        within_noise: Whether the difference is within the paper's noise and rounding.
    """

    table: Positive
    base_top1: Percent
    fix_top1: Percent
    fix_top5: Percent
    comparable: bool
    difference: float | None = None
    within_noise: bool | None = None

    @classmethod
    def beside(
        cls, variant: Variant | None, recipe: Recipe, measured: Mapping[str, Summary], num_classes: int
    ) -> "PaperFigures | None":
        """The paper's figures beside a run's; None for a base stage, or a network that is not in the paper."""
        if variant is None or variant.paper is None or recipe.stage != "fixres":
            return None
        paper = variant.paper
        comparable = (next(iter(measured.values())).images, num_classes) == VALIDATION_SET
        difference = None
        if comparable and "tuned" in measured and recipe.test_size == paper.fix.test_size:
            difference = measured["tuned"].top1 - paper.fix.top1
        within = None if difference is None else within_noise(difference)
        top1, top5 = paper.fix.top1, paper.fix.top5
        return cls(paper.table, paper.base.top1, top1, top5, comparable, difference, within)


@dataclass(frozen=True, slots=True)
class Report:
    """What a finished run tells of itself.

    Attributes:
        variant: Key in the manifest, or timm's name of another network.
        backbone: timm's name of the network.
        recipe: The recipe, resolved.
        train_data: Name of the split that the run trained on.
        validation_data: Name of the split that the run was measured on.
        train_images: Number of images in the training split.
        classes: Names of the classes, by index; empty where the dataset names none.
        processes: Number of processes.
        forwards: Number of images that went forward through the backbone to tune it.
        unreadable: The images that could not be read, each with the reason.
        unturned: Paths of the images that have an EXIF orientation and were not turned.
        measured: Figures of each evaluation, by a name in `TITLES`.
        paired: The tuned network against the untuned one, by a name in `UNTUNED`; empty for a base stage.
        paper: The paper's figures; None where it has none.
        delta_sha256: sha256 of delta.safetensors; None for a base stage.
        model_sha256: sha256 of model.safetensors; None where the run writes no network.
        left_out: The files beside the images that are none by their endings, each with its split.
        excluded: Number of images, of both splits, that were left out because it was asked for.
        selection: Which epoch's weights were kept; None where it is the last epoch's without a choice.
    """

    variant: str
    backbone: str
    recipe: Recipe
    train_data: str
    validation_data: str
    train_images: Positive
    classes: tuple[str, ...]
    processes: Positive
    forwards: Count
    unreadable: tuple[str, ...]
    unturned: tuple[str, ...]
    measured: Mapping[str, Summary]
    paired: Mapping[str, PairedTest]
    paper: PaperFigures | None
    delta_sha256: str | None = None
    model_sha256: str | None = None
    left_out: tuple[str, ...] = ()
    excluded: Count = 0
    selection: Selection | None = field(default=None, metadata=LEFT_OUT_IF_NONE)

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Reads the report of a run, given its folder or its report.json.

        Raises:
            MissingFileError: There is no report: the run is not finished.
            RunError: The file is no report; names the field at fault.
        """
        file = path / FILENAME if path.is_dir() else path
        try:
            document = records.decode_file(file, _LARGEST)
        except FileNotFoundError:
            raise MissingFileError(
                f"{path} has no {FILENAME}: it is no finished run. The command that began it continues it."
            ) from None
        except (OSError, ValueError) as error:
            raise RunError(f"{file} cannot be read as the report of a run: {error}.") from error
        return records.read_sealed(cls, document, str(file), RunError)

    def dump(self, folder: Path) -> None:
        """Writes report.md, then report.json, whose presence says that the run is complete."""
        write_text(folder / TEXT, as_markdown(self))
        write_atomically(folder / FILENAME, records.dumps_sealed(self))

    @property
    def title(self) -> str:
        """What the run was."""
        return f"{self.variant}: {'FixRes fine-tuning' if self.recipe.stage == 'fixres' else 'base stage'}"

    @property
    def comparable(self) -> bool:
        """Whether the run was measured on what the paper's figures are of."""
        return self.paper is not None and self.paper.comparable

    @property
    def gain(self) -> Gain | None:
        """What FixRes brought; None for a base stage."""
        return Gain.of(self.measured, self.paired)

    @property
    def findings(self) -> list[str]:
        """The tuned network against each untuned figure on the same images, the best one first."""
        gain, found = self.gain, []
        for name in sorted(self.paired, key=lambda name: gain is None or name != gain.name):
            best = ", the best untuned" if gain and name == gain.name else ""
            found.append(f"against {TITLES[name]} ({self.measured[name].size}{best}): {self.paired[name]}")
        return found

    def result(self, source: str) -> Result | None:
        """What stands beside the paper's tables; None for a base stage."""
        if "tuned" not in self.measured:
            return None
        rows = {name: Accuracy(row.size, row.top1, row.top5) for name, row in self.measured.items()}
        images = self.measured["tuned"].images
        return Result(self.variant, source, images, self.comparable, rows.get("base"), rows["tuned"])


def results(paths: Iterable[Path]) -> list[Result]:
    """The FixRes runs among reports, run folders, and folders of run folders; raises as `Report.load` does."""
    found = []
    for path in paths:
        reports = [path] if path.is_file() else sorted({*path.glob(FILENAME), *path.glob(f"*/{FILENAME}")})
        if not reports:
            raise MissingFileError(f"{path} holds no {FILENAME}: give finished runs of reproduce, or their folder.")
        found += [Report.load(file).result(str(file.parent)) for file in reports]
    return [result for result in found if result is not None]


def as_markdown(report: Report) -> str:
    """The report as a page."""
    recipe = report.recipe
    lines = [f"# {markdown(report.title)}", ""]
    lines += ["| | size | top-1 | 95% interval | top-5 | loss | images |", "|---|---|---|---|---|---|---|"]
    for name, row in report.measured.items():
        lines.append(
            f"| {TITLES[name]} | {row.size} | {row.top1:.2f} | {row.top1_low:.2f} to {row.top1_high:.2f} "
            f"| {row.top5:.2f} | {row.loss:.4f} | {row.images:,} |"
        )
    if gain := report.gain:
        lines += ["", f"**{gain.warning}**"] if gain.warning else []
        lines += ["", "FixRes at the test size, on the same images:", ""]
        lines += [f"- {finding}" for finding in report.findings]
    if report.selection:
        lines += ["", str(report.selection)]
    if report.paper:
        lines += ["", _beside_paper(report.paper)]
    elif recipe.stage == "fixres":
        lines += ["", "The paper has no figures for this network."]
    unreadable, unturned, left_out = report.unreadable, report.unturned, report.left_out
    lines += _listed(f"Unreadable images: {len(unreadable)}, left out:", unreadable)
    lines += _listed(
        f"Images with an EXIF orientation: {len(unturned)}, not turned (`--upright` turns them):", unturned
    )
    if report.excluded:
        lines += ["", f"Images that were excluded (`--exclude`): {report.excluded:,}."]
    lines += _listed(f"Files that were left out by the endings of their names: {len(left_out):,}:", left_out)
    lines += [
        "",
        f"Forward passes through the backbone: {report.forwards:,} images "
        f"({report.forwards / report.train_images:g} per training image).",
        "",
        "## Recipe",
        "",
        "```json",
        json.dumps(records.to_json(recipe), indent=2),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _listed(heading: str, names: Sequence[str]) -> list[str]:
    """The first of some names under a heading; nothing, where there are none."""
    return ["", heading, *(f"- {markdown(name)}" for name in names[:20])] if names else []


def as_html(report: Report, evaluations: Mapping[str, Evaluation], validation: ImageDataset) -> bytes:
    """The report as a page with the images that are misclassified; evaluations are by a name in `TITLES`."""
    lines = dict.fromkeys(UNTUNED, "untuned")
    rows = {
        name: page.Row(TITLES[name], found, validation, lines.get(name, "FixRes"))
        for name, found in evaluations.items()
    }
    last, gain = list(rows.values())[-1], report.gain
    about = [
        f"Trained on {report.train_images:,} images of {report.train_data}; measured on {last.evaluation.images:,} of "
        f"{report.validation_data}."
    ]
    findings = [f"FixRes at the test size, on the same images, {finding}." for finding in report.findings]
    findings += [str(report.selection)] if report.selection else []
    found = page.Page(
        report.title,
        about,
        list(rows.values()),
        [last],
        compared=(rows[gain.name], last) if gain else None,
        findings=findings + ([_beside_paper(report.paper)] if report.paper else []),
        warning=gain.warning if gain else None,
        lists=page.left_out(report.unreadable, report.unturned),
        choices=records.to_json(report.recipe),
    )
    return page.render(found)


def _beside_paper(paper: PaperFigures) -> str:
    said = (
        f"The paper (ImageNet-2012 validation, Table {paper.table}): base {paper.base_top1}, FixRes {paper.fix_top1} "
        f"top-1, {paper.fix_top5} top-5."
    )
    if paper.difference is None:
        return f"{said} Not comparable: these figures are of other images, or of another test size."
    within = "within" if paper.within_noise else "outside"
    return f"{said} Difference: {paper.difference:+.2f}, {within} the paper's noise of {NOISE} and rounding."


def curve(lines: Sequence[Mapping[str, Any]], measured: Mapping[str, Summary], path: Path, title: str) -> None:
    """Draws loss and accuracy against steps, as in the lines of log.jsonl; accuracy on the validation images too.

    The evaluations of the run, by a name in `TITLES`, give the figures before and after training.
    """
    points = [line for line in lines if "loss" in line]
    if not points:  # nothing was trained by gradients
        return
    figure, axes = figures.panels(2, width=7, height=3.2)
    epochs: dict[Any, list[Mapping[str, Any]]] = {}
    for point in points:
        epochs.setdefault(point.get("epoch"), []).append(point)
    for axis, key, label in zip(axes, ("loss", "top1"), ("loss", "top-1, %"), strict=True):
        values = [point[key] for point in points]
        axis.plot([point["steps"] for point in points], values, color="#1f6f8b", alpha=0.35, linewidth=1)
        ends = [group[-1]["steps"] for group in epochs.values()]
        means = [sum(point[key] for point in group) / len(group) for group in epochs.values()]
        marker = "." if len(ends) < 50 else ""
        axis.plot(ends, means, color="#1f6f8b", linewidth=1.5, marker=marker, label="training images")
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    validated = {line["steps"]: line["val_top1"] for line in lines if "val_top1" in line}
    if "base_at_test" in measured:
        validated[0] = measured["base_at_test"].top1
    if "tuned" in measured:
        validated[points[-1]["steps"]] = measured["tuned"].top1
    steps = sorted(validated)
    look: dict[str, Any] = {"color": "#c1440e", "linewidth": 1.5, "marker": "o", "markersize": 3}
    axes[1].plot(steps, [validated[step] for step in steps], label="validation images", **look)
    if "trained" in measured and validated:
        best = max(steps, key=lambda step: validated[step])
        axes[1].plot(best, validated[best], "*", color="#c1440e", markersize=11, label="the best epoch")
    axes[1].legend(frameon=False, loc="lower right", fontsize=8)
    figure.suptitle(f"{title} (light: each step, dark: mean of each epoch)", fontsize=10)
    figures.save(figure, path, [*points, *validated.items()])
