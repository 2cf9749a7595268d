"""`evaluate`, `sweep`, `paper`, `figure`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.markup import escape

from fixefficientnet._internal import processes
from fixefficientnet.cli.app import (
    AsJson,
    Flags,
    Output,
    UsageError,
    app,
    check_writable,
    err,
    flags,
    made,
    out,
    print_json,
    print_table,
    print_text,
    shortened,
    whole_number,
    write_file,
)
from fixefficientnet.errors import FixEfficientNetError
from fixefficientnet.evaluation.settings import Settings
from fixefficientnet.options import EXPORTED

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fixefficientnet.data.dataset import ImageDataset
    from fixefficientnet.evaluation.evaluate import Measured
    from fixefficientnet.evaluation.statistics import Comparison
    from fixefficientnet.models import LoadedModel

    SettingFlags = Settings
else:
    # the fields left out are flags of the commands
    SettingFlags = flags(
        Settings,
        short={"batch_size": "-b", "workers": "-j"},
        leave_out=("size", "folder", "resume", "activations", "warm_up"),
    )

AsCsv = Annotated[bool, Parameter(name="--csv")]


@dataclass(frozen=True)
class Form:
    """What is printed and written.

    Attributes:
        as_json: Print JSON.
        as_csv: Print CSV.
        per_class: Write a table per class to this CSV file.
        predictions: Write a row per image to this file (.csv, .jsonl).
        html: Write a page to look at: figures, confused classes, misclassified images.
        results_file: Write a CSV file with the columns of timm's.
    """

    as_json: AsJson = False
    as_csv: AsCsv = False
    per_class: Path | None = None
    predictions: Path | None = None
    html: Path | None = None
    results_file: Path | None = None

    def check(self, settings: Settings) -> None:
        """Refuses what cannot be written, before anything is computed."""
        if self.as_json and self.as_csv:
            raise UsageError("--json and --csv exclude each other.")
        if self.per_class and settings.real_labels:
            raise UsageError("--per-class needs one label per image, which ReaL labels are not.")
        if self.predictions and self.predictions.suffix.lower() not in (".csv", ".jsonl"):
            raise UsageError(f"--predictions {self.predictions}: the file's name ends in .csv or .jsonl.")
        for path in self._files:
            check_writable(path)

    @property
    def _files(self) -> list[Path]:
        return [path for path in (self.per_class, self.predictions, self.html, self.results_file) if path]

    def show(
        self, every: "list[Measured]", compared: "tuple[Measured, Measured] | None", pair: "Comparison | None"
    ) -> None:
        """Writes the files, and prints."""
        from fixefficientnet.evaluation import page, tables

        if self.per_class:
            write_file(self.per_class, tables.csv_lines(tables.per_class_rows(every)))
        if self.predictions:
            form = tables.csv_lines if self.predictions.suffix.lower() == ".csv" else tables.json_lines
            write_file(self.predictions, form(tables.prediction_rows(every)))
        if self.html:
            write_file(self.html, page.render(page.of_evaluations(every, compared)))
        if self.results_file:
            best_first = sorted(every, key=lambda one: -one.evaluation.top1)
            write_file(self.results_file, tables.csv_lines(map(tables.timm_row, best_first)))
        for path in self._files:
            err.say(f"written: {path}")
        rows = [tables.row(one) for one in every]
        if self.as_json:
            unreadable = [{"model": one.loaded.name, "images": one.unreadable} for one in every if one.unreadable]
            unturned = [{"model": one.loaded.name, "images": one.unturned} for one in every if one.unturned]
            left_out = list(dict.fromkeys(name for one in every for name in one.dataset.left_out))
            comparison = tables.comparison(*compared, pair) if compared and pair else None
            found = {"results": rows, "comparison": comparison, "unreadable": unreadable, "unturned": unturned}
            print_json(found | {"left_out": left_out})
        elif self.as_csv:
            print_text(tables.as_csv(rows), end="")
        else:
            _show(every, compared, pair)


@app.command
def evaluate(
    *models: str,
    settings: Annotated[SettingFlags, Flags],
    size: Annotated[int | None, Parameter(converter=whole_number)] = None,
    compare: tuple[str, str] | None = None,
    form: Annotated[Form, Flags] = Form(),
    output: Annotated[Path, Output] = Path("evaluations"),
    resume: bool = False,
) -> None:
    """Evaluate the accuracy of models on labelled images.

    On several devices: torchrun --nproc-per-node N -m fixefficientnet evaluate …

    Args:
        models: Variants (b4_ns; b4_ns:backbone, b4_ns:FILE), folders or files of fine-tuning runs, or timm/NAME
            (timm/NAME:FILE).
        settings: What the models are evaluated on, and how.
        size: Test size in pixels. Default: the model's.
        compare: Two models: is the second better than the first, on the same images?
        form: What is printed and written.
        output: Folder for finished batches.
        resume: Continue a killed evaluation.
    """
    names = list(dict.fromkeys([*models, *(compare or ())]))
    if not names:
        raise UsageError("Name a model, or two after --compare.")
    chosen = made(Settings, settings, size=size, folder=output, resume=resume)
    form.check(chosen)
    from fixefficientnet.evaluation import statistics

    accelerator = processes.accelerator(chosen.usual_device, chosen.mixed_precision)
    found = _evaluate_all(names, chosen, accelerator)
    every = list(found.values())
    compared = (found[compare[0]], found[compare[1]]) if compare else None
    pair = statistics.compare(*(one.evaluation.correct for one in compared)) if compared else None
    if not accelerator.is_main_process:
        return
    form.show(every, compared, pair)
    _name_images(every)


@app.command
def sweep(
    *models: str,
    settings: Annotated[SettingFlags, Flags],
    sizes: str = "128:352:32",
    statistics: bool = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    output: Annotated[Path, Output] = Path("sweep"),
    overwrite: bool = False,
) -> None:
    """Evaluate models over test sizes: accuracy and cost, before and after FixRes.

    A model that FixRes tuned is evaluated untuned too. The same command continues a killed one.

    Args:
        models: Variants (b4_ns; b4_ns:backbone, b4_ns:FILE), folders or files of fine-tuning runs, or timm/NAME
            (timm/NAME:FILE).
        settings: What the models are evaluated on, and how.
        sizes: Test sizes: FIRST:LAST:STEP in pixels, or with commas.
        statistics: Also show how the pooled activations move with the size.
        as_json: Print JSON.
        as_csv: Print CSV.
        output: Folder for sweep.csv, report.html and figures (.png, .svg).
        overwrite: Evaluate finished sizes again.
    """
    if not models:
        raise UsageError("Name a model.")
    from fixefficientnet.evaluation import sweep as sweeping
    from fixefficientnet.evaluation import tables
    from fixefficientnet.evaluation.evaluate import dataset_for

    pixels = sweeping.sizes_of(sizes)
    finished = output / "finished"
    chosen = made(Settings, settings, folder=finished, resume=not overwrite, activations=statistics, warm_up=True)
    accelerator = processes.accelerator(chosen.usual_device, chosen.mixed_precision)
    every, rows = [], []
    for loaded in sweeping.with_untuned(models):
        dataset = dataset_for(loaded, chosen)
        for size in pixels:
            every.append(_evaluate(loaded, dataset, replace(chosen, size=size), accelerator))
            rows.append(sweeping.row(loaded, every[-1]))
    if not accelerator.is_main_process:
        return
    written = sweeping.write(rows, every, output, statistics=statistics)
    if as_json:
        print_json(rows)
    elif as_csv:
        print_text(tables.as_csv(rows), end="")
    else:
        _show_sweep(rows)
        _show_conditions(every)
        out.say(f"{output}: {', '.join(written)}")
    _name_images(every)


@app.command
def paper(
    *runs: Path,
    as_markdown: Annotated[bool, Parameter(name="--markdown")] = False,
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> None:
    """Show the paper's Tables 1 and 2 beside what has been measured.

    Args:
        runs: Fine-tuning runs, or folders of them. Default: runs, if there.
        as_markdown: Print Markdown.
        as_csv: Print CSV.
        as_json: Print JSON.
    """
    from fixefficientnet.evaluation import paper as papers

    folders = list(runs) or ([Path("runs")] if any(Path("runs").glob("*/report.json")) else [])
    found = papers.published()
    if folders:
        from fixefficientnet.reproduce import report

        found += report.results(folders)
    rows = papers.rows(found)
    if as_json:
        print_json(rows)
    elif as_csv:
        from fixefficientnet.evaluation.tables import as_csv as csv_of

        print_text(csv_of(rows), end="")
    elif as_markdown:
        print_text(f"{papers.as_markdown(rows)}\n\n{papers.footnote(rows)}")
    else:
        for number, title in papers.TITLES.items():
            lines = [cells for row in rows if row["table"] == number for cells in papers.cells(row)]
            print_table(papers.HEADER, lines, title=title)
        out.print(escape(papers.footnote(rows)))
    for result in papers.elsewhere(found):
        err.say(
            f"{result.source}: {result.variant} at {result.fix.test_size}, top-1 {result.fix.top1:.2f} of "
            f"{result.images:,} images: not comparable with the paper (other images, size or network)."
        )


@app.command
def figure(name: Literal["accuracy-params"], /, *, output: Annotated[Path | None, Output] = None) -> None:
    """Draw a figure of the paper.

    Args:
        name: accuracy-params: the paper's Figure 1, all 18 variants.
        output: A .png or .svg. Default: NAME.png.
    """
    from fixefficientnet.evaluation import figures

    path = output or Path(f"{name}.png")
    rows = figures.accuracy_params_data()
    figures.save(figures.accuracy_params(rows), path, rows)
    out.say(str(path))


def _show_sweep(rows: "list[dict[str, Any]]") -> None:
    from fixefficientnet.evaluation.sweep import best_size

    cells = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        best = best_size(own)
        for row in own:
            notes = ["best"] if row["size"] == best else []
            notes += [word for word in ("train", "paper", "test") if row["size"] == row[f"{word}_size"]]
            figures = (
                str(row["size"]),
                f"{row['top1']:.2f}",
                f"{row['top1_low']:.1f}-{row['top1_high']:.1f}",
                f"{row['top5']:.2f}",
                f"{row['loss']:.3f}",
                f"{row['gmacs']:.2f}",
                f"{row['images_per_second']:.1f}",
            )
            cells.append((model, *figures, ", ".join(notes)))
    print_table(("model", "size", "top-1", "95%", "top-5", "loss", "GMACs", "img/s", ""), cells)


def _show(every: "list[Measured]", compared: "tuple[Measured, Measured] | None", pair: "Comparison | None") -> None:
    cells = []
    for one in every:
        found = one.evaluation
        figures = (
            str(found.size),
            f"{found.top1:.2f}",
            "{:.1f}-{:.1f}".format(*found.interval),
            f"{found.top5:.2f}",
            "{:.1f}-{:.1f}".format(*found.interval5),
            f"{found.loss:.3f}",
            f"{found.calibration_error:.3f}",
            f"{found.rate:.1f}" if found.rate else "-",
        )
        cells.append((one.loaded.name, *figures))
    print_table(("model", "size", "top-1", "95%", "top-5", "95%", "loss", "ECE", "img/s"), cells)
    _show_conditions(every)
    if compared and pair:
        first, second = (escape(one.loaded.name) for one in compared)
        points, sure, counts = pair.words()
        out.print(f"\n{second} against {first}: [bold]{points}[/] {sure}\n{counts}", soft_wrap=True)


def _show_conditions(every: "list[Measured]") -> None:
    from fixefficientnet.evaluation.evaluate import conditions

    out.say("\n".join(conditions(every)))


def _name_images(every: "list[Measured]") -> None:
    """Names what does not count: files that are no images, unreadable images; and those that were not turned."""
    for names, one in {one.dataset.left_out: one for one in every}.items():
        _list_some(f"left out of {one.dataset.name} by the endings of their names", names)
    for reasons, one in {tuple(one.unreadable): one for one in every}.items():
        _list_some(f"of {len(one.dataset):,} images could not be read and do not count", reasons)
    for names, one in {tuple(one.unturned): one for one in reversed(every)}.items():
        _list_some(f"images have an EXIF orientation that {one.loaded.name} ignored (--upright turns them)", names)


def _list_some(what: str, lines: Sequence[str]) -> None:
    if lines:
        err.say(f"{len(lines):,} {what}:")
        for line in lines[:20]:
            err.say(f"  {line}")
        if len(lines) > 20:
            err.print(f"  and {len(lines) - 20:,} more")


def _evaluate_all(names: list[str], settings: Settings, accelerator: "Accelerator") -> "dict[str, Measured]":
    """Evaluates models one after the other; tells how to continue where one fails."""
    from fixefficientnet.evaluation.evaluate import dataset_for
    from fixefficientnet.models import load

    found: dict[str, Measured] = {}
    for name in names:
        try:
            loaded = load(name)
            found[name] = _evaluate(loaded, dataset_for(loaded, settings), settings, accelerator)
        except (FixEfficientNetError, KeyboardInterrupt) as error:
            if found or isinstance(error, KeyboardInterrupt):
                said = f"What is finished is kept in {settings.folder}: the same command with --resume continues."
                err.say(said)
            raise
        found[name].loaded.network.to("meta")  # frees its memory
    return found


def _evaluate(
    loaded: "LoadedModel", dataset: "ImageDataset", settings: Settings, accelerator: "Accelerator"
) -> "Measured":
    """Evaluates one model, under a progress bar."""
    from fixefficientnet._internal.progress import bar
    from fixefficientnet.evaluation.evaluate import evaluate_model
    from fixefficientnet.runtimes import engines

    title = f"{shortened(loaded.name, 30)} at {settings.size or loaded.test.size}"
    err.quiet = not accelerator.is_main_process

    if settings.engine in EXPORTED:
        engines.check(settings.engine, accelerator.device, accelerator.mixed_precision)
        engines.exported(loaded, loaded.at(settings.size), settings.engine, err.say)
    with bar(title, len(dataset), err, err.say) as shown:
        return evaluate_model(loaded, settings, accelerator, dataset=dataset, progress=shown)
