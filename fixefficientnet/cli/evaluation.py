"""`evaluate`, `sweep`, `paper`, `figure`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fixefficientnet._internal.files import write_atomically
from fixefficientnet.cli.app import AsJson, Engine, Fast, MixedPrecision, app, err, out, print_json, table
from fixefficientnet.errors import FixEfficientNetError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fixefficientnet.data.dataset import ImageDataset
    from fixefficientnet.evaluation.evaluate import Measured, Settings
    from fixefficientnet.models import LoadedModel

MODEL = (
    "A variant (b4_ns; b4_ns:backbone, b4_ns:FILE), a fine-tuning run's folder or file, or timm/NAME (timm/NAME:FILE)."
)
Data = Annotated[
    str, typer.Option(help="A folder with val/, or of classes' folders; or hfds/NAME, torch/NAME, wds/NAME.")
]
DataRoot = Annotated[str | None, typer.Option(help="Where a named dataset lies or is cached.")]
Split = Annotated[str | None, typer.Option(help="Default: validation, or the whole folder.")]
CropPct = Annotated[float | None, typer.Option(help="Share of the resized image to keep. Default: the model's.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", "-b", min=1, help="Images per forward pass. Default: 32, on a CPU 2.")
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-j",
        min=0,
        help="Loading processes per device. Default: 4; none where a CPU computes from files, which is faster.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")]
Restrict = Annotated[
    bool | None,
    typer.Option(
        "--restrict-classes/--no-restrict-classes",
        help="Restrict logits to the classes that the data has. Default: where these are 200 of ImageNet's.",
    ),
]
RealLabels = Annotated[bool, typer.Option("--real-labels", help="Count as correct what ReaL labels allow.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV.")]


@app.command()
def evaluate(
    models: Annotated[list[str] | None, typer.Argument(help=MODEL, show_default=False)] = None,
    data: Data = "",
    data_root: DataRoot = None,
    split: Split = None,
    size: Annotated[int | None, typer.Option(min=1, help="Test size in pixels. Default: the model's.")] = None,
    crop_pct: CropPct = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Is B better than A, on the same images?"),
    ] = None,
    restrict_classes: Restrict = None,
    real_labels: RealLabels = False,
    per_class: Annotated[Path | None, typer.Option(help="Write a table per class to this CSV file.")] = None,
    results_file: Annotated[Path | None, typer.Option(help="Write a CSV file with the columns of timm's.")] = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = None,
    mixed_precision: MixedPrecision = "no",
    engine: Engine = "eager",
    fast_preprocessing: Fast = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for finished batches.")] = Path("evaluations"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed evaluation was.")] = False,
) -> None:
    """Measure the accuracy of models on labelled images.

    On several devices: torchrun --nproc-per-node N -m fixefficientnet evaluate …
    """
    names = list(dict.fromkeys([*(models or []), *(compare or ())]))
    if not names:
        raise typer.BadParameter("Name a model, or two after --compare.")
    _need_data(data)
    if per_class and real_labels:
        raise typer.BadParameter("--per-class needs one label per image, which ReaL labels are not.")
    for path in filter(None, (per_class, results_file)):
        if path.is_dir() or not next(folder for folder in path.absolute().parents if folder.exists()).is_dir():
            raise FixEfficientNetError(f"{path} cannot be written: it is a folder, or what it is in is none.")
    from fixefficientnet.evaluation import tables
    from fixefficientnet.evaluation.evaluate import Settings
    from fixefficientnet.evaluation.statistics import compare as paired

    settings = Settings(
        data=data,
        data_root=data_root,
        split=split,
        size=size,
        crop_pct=crop_pct,
        batch_size=batch_size,
        workers=workers,
        restrict_classes=restrict_classes,
        real_labels=real_labels,
        folder=output,
        resume=resume,
        engine=engine,
        fast_preprocessing=fast_preprocessing,
    )
    from fixefficientnet.runtimes import engines

    accelerator = _accelerator(device or ("cpu" if engine in engines.EXPORTED else None), mixed_precision)
    found: dict[str, Measured] = {}
    for name in names:
        try:
            found[name] = _measure(name, settings, accelerator)
        except (FixEfficientNetError, KeyboardInterrupt) as error:
            if found or isinstance(error, KeyboardInterrupt):
                said = f"What is finished is kept in {output}: the same command with --resume goes on."
                err.print(escape(said), soft_wrap=True)
            raise
        found[name].loaded.network.to("meta")  # frees its memory
    every = list(found.values())
    rows = [tables.row(one) for one in every]
    pair = None
    if compare:
        first, second = (found[name] for name in compare)
        pair = tables.comparison(first, second, paired(first.evaluation.correct, second.evaluation.correct))
    if not accelerator.is_main_process:
        return
    if per_class:
        _write(per_class, tables.as_csv(tables.per_class_rows(every)))
    if results_file:
        best_first = sorted(every, key=lambda one: -one.evaluation.top1)
        _write(results_file, tables.as_csv([tables.timm_row(one) for one in best_first]))
    if as_json:
        unreadable = [{"model": one.loaded.name, "images": _unreadable(one)} for one in every if _unreadable(one)]
        print_json({"results": rows, "comparison": pair, "unreadable": unreadable})
    elif as_csv:
        typer.echo(tables.as_csv(rows), nl=False)
    else:
        _show(every, pair)
    for one in every:
        _complain(one)


@app.command()
def sweep(
    models: Annotated[list[str], typer.Argument(help=MODEL, show_default=False)],
    data: Data = "",
    sizes: Annotated[str, typer.Option(help="FIRST:LAST:STEP in pixels, or with commas.")] = "128:352:32",
    data_root: DataRoot = None,
    split: Split = None,
    crop_pct: CropPct = None,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Also how the pooled activations move with the size.")
    ] = False,
    restrict_classes: Restrict = None,
    real_labels: RealLabels = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = None,
    mixed_precision: MixedPrecision = "no",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for sweep.csv and figures (.png, .svg).")
    ] = Path("sweep"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do finished sizes again.")] = False,
) -> None:
    """Measure models over test sizes: accuracy and cost, before and after FixRes.

    A model that FixRes tuned is measured untuned too. The same command goes on where a killed one was.
    """
    _need_data(data)
    from fixefficientnet.evaluation import figures, tables
    from fixefficientnet.evaluation import sweep as sweeps
    from fixefficientnet.evaluation.evaluate import Settings

    chosen = sweeps.sizes_of(sizes)
    settings = Settings(
        data=data,
        data_root=data_root,
        split=split,
        crop_pct=crop_pct,
        batch_size=batch_size,
        workers=workers,
        restrict_classes=restrict_classes,
        real_labels=real_labels,
        folder=output / "finished",
        resume=not overwrite,
        activations=statistics,
    )
    accelerator = _accelerator(device, mixed_precision)
    every: list[Measured] = []

    def take(loaded: "LoadedModel", settings: "Settings") -> "Measured":
        known = every[-1].dataset if every and every[-1].loaded.name == loaded.name else None
        every.append(_measure(loaded, settings, accelerator, known))
        return every[-1]

    rows = sweeps.sweep(sweeps.with_untuned(models), chosen, settings, take)
    if not accelerator.is_main_process:
        return
    _write(output / "sweep.csv", tables.as_csv(rows))
    for kind in figures.FORMATS:  # an earlier sweep's would not belong to the new table
        (output / f"statistics.{kind}").unlink(missing_ok=True)
    drawn = {"sweep": figures.sweep} | ({"statistics": figures.activations} if statistics else {})
    for name, draw in drawn.items():
        figure = draw(rows)
        for kind in figures.FORMATS:
            figures.save(figure, output / f"{name}.{kind}", rows)
    if as_json:
        print_json(rows)
    elif as_csv:
        typer.echo(tables.as_csv(rows), nl=False)
    else:
        _show_sweep(rows)
        out.print(_said(every), soft_wrap=True)
        written = ", ".join(f"{name}.{kind}" for name in drawn for kind in figures.FORMATS)
        out.print(escape(f"{output}: sweep.csv, {written}"), soft_wrap=True)
    _complain(every[-1])


@app.command()
def paper(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Fine-tuning runs, or folders of them. Default: runs, if there.")
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> None:
    """Show the paper's Tables 1 and 2 beside what has been measured."""
    from fixefficientnet.evaluation import paper as papers

    folders = runs or ([Path("runs")] if any(Path("runs").glob("*/report.json")) else [])
    found = [*papers.published(), *papers.of_runs(folders)]
    rows = papers.rows(found)
    if as_json:
        print_json(rows)
    elif as_csv:
        from fixefficientnet.evaluation.tables import as_csv as csv_of

        typer.echo(csv_of(rows), nl=False)
    elif as_markdown:
        typer.echo(f"{papers.as_markdown(rows)}\n\n{papers.footnote(rows)}")
    else:
        for number, title in papers.TITLES.items():
            shown = table(*papers.HEADER, title=title)
            for row in rows:
                for cells in papers.cells(row) if row["table"] == number else ():
                    shown.add_row(*cells)
            out.print(shown)
        out.print(escape(papers.footnote(rows)))
    for result in papers.elsewhere(found):
        err.print(
            escape(
                f"{result.source}: {result.variant} at {result.fix.test_size}, top-1 {result.fix.top1:.2f} of "
                f"{result.images:,} images: not comparable with the paper (other images, size or network)."
            ),
            soft_wrap=True,
        )


@app.command()
def figure(
    name: Annotated[str, typer.Argument(help="accuracy-params: the paper's Figure 1, all 18 variants.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .png or .svg. Default: NAME.png.")] = None,
) -> None:
    """Draw a figure of the paper."""
    from fixefficientnet.evaluation import figures

    if name != "accuracy-params":
        raise typer.BadParameter(f"There is no figure {name!r}; there is accuracy-params.")
    path = output or Path(f"{name}.png")
    rows = figures.accuracy_params_data()
    figures.save(figures.accuracy_params(rows), path, rows)
    out.print(escape(str(path)), soft_wrap=True)


def _show_sweep(rows: "list[dict[str, Any]]") -> None:
    from fixefficientnet.evaluation.sweep import best_size

    shown = table("model", "size", "top-1", "95%", "top-5", "loss", "GMACs", "img/s", "")
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        best = best_size(own)
        for row in own:
            marks = ["best"] if row["size"] == best else []
            marks += [word for word in ("train", "paper", "test") if row["size"] == row[f"{word}_size"]]
            shown.add_row(
                escape(model),
                str(row["size"]),
                f"{row['top1']:.2f}",
                f"{row['top1_low']:.1f}-{row['top1_high']:.1f}",
                f"{row['top5']:.2f}",
                f"{row['loss']:.3f}",
                f"{row['gmacs']:.2f}",
                f"{row['images_per_second']:.1f}",
                ",".join(marks),
            )
    out.print(shown)


def _show(every: "list[Measured]", pair: "dict[str, Any] | None") -> None:
    shown = table("model", "size", "top-1", "95%", "top-5", "95%", "loss", "ECE", "img/s")
    for one in every:
        found = one.evaluation
        shown.add_row(
            escape(one.loaded.name),
            str(found.size),
            f"{found.top1:.2f}",
            "{:.1f}-{:.1f}".format(*found.interval),
            f"{found.top5:.2f}",
            "{:.1f}-{:.1f}".format(*found.interval5),
            f"{found.loss:.3f}",
            f"{found.calibration_error:.3f}",
            f"{found.rate:.1f}" if found.rate else "-",
        )
    out.print(shown)
    out.print(_said(every), soft_wrap=True)
    if pair:
        out.print(
            f"\n{escape(pair['second'])} against {escape(pair['first'])}: [bold]{pair['difference']:+.2f} points[/] "
            f"top-1 (95%: {pair['difference_low']:+.2f} to {pair['difference_high']:+.2f}), p = {pair['p']:.2g}\n"
            f"correct in the first alone: {pair['only_first_correct']:,}, in the second alone: "
            f"{pair['only_second_correct']:,}, of {pair['images']:,} images (McNemar's exact test)",
            soft_wrap=True,
        )


def _said(every: "list[Measured]") -> str:
    """On what, and how: a line for each that differs."""
    from fixefficientnet.evaluation.evaluate import restriction

    whose: dict[str, list[str]] = {}
    for one in every:
        line = _described(one) + (f"; {more}" if (more := restriction(one)) else "")
        names = whose.setdefault(line, [])
        names += [one.loaded.name] * (one.loaded.name not in names)
    lines = [f"{', '.join(names)}: {line}" if len(whose) > 1 else line for line, names in whose.items()]
    return escape("\n".join(lines))


def _described(one: "Measured") -> str:
    found, test = one.evaluation, one.loaded.test
    left_out = f" ({len(found.unreadable):,} more could not be read)" if found.unreadable else ""
    crop = f"crop_pct {test.crop_pct:g}" + (f", {one.loaded.crop_mode}" if one.loaded.crop_mode != "center" else "")
    words = (
        (one.engine, "eager"),
        (one.precision, "no"),
        (f"{one.preprocessing} preprocessing", "exact preprocessing"),
    )
    how = "".join(f", {word}" for word, usual in words if word != usual)
    return f"{found.images:,} images of {one.dataset.what}{left_out}; {crop}, {test.interpolation}{how}"


def _unreadable(one: "Measured") -> list[str]:
    return list(one.evaluation.unreadable.values())


def _complain(one: "Measured") -> None:
    """Names the images that do not count."""
    reasons = _unreadable(one)
    if reasons:
        err.print(f"{len(reasons)} of {len(one.dataset)} images could not be read and do not count:", soft_wrap=True)
        for reason in reasons[:20]:
            err.print(f"  {escape(reason)}", soft_wrap=True)
        if len(reasons) > 20:
            err.print(f"  and {len(reasons) - 20} more")


def _need_data(data: str) -> None:
    if not data:
        raise typer.BadParameter("--data is missing: a folder with val/ or of classes' folders, or hfds/NAME.")


def _accelerator(device: str | None, mixed_precision: str) -> "Accelerator":
    from fixefficientnet._internal import processes

    return processes.accelerator(device, mixed_precision)


def _measure(
    model: "str | LoadedModel", settings: "Settings", accelerator: "Accelerator", dataset: "ImageDataset | None" = None
) -> "Measured":
    """Measures one model, under a progress bar."""
    from fixefficientnet._internal.progress import bar
    from fixefficientnet.evaluation.evaluate import dataset_for, measure
    from fixefficientnet.models import open_model
    from fixefficientnet.runtimes import engines

    loaded = open_model(model) if isinstance(model, str) else model
    dataset = dataset or dataset_for(loaded, settings)
    short = loaded.name if len(loaded.name) <= 30 else f"…{loaded.name[-29:]}"  # a bar has one line
    said = f"{short} at {settings.size or loaded.test.size}"
    err.quiet = not accelerator.is_main_process

    def say(text: str) -> None:
        err.print(escape(text), soft_wrap=True)

    if settings.engine in engines.EXPORTED:
        engines.check(settings.engine, accelerator.device, accelerator.mixed_precision)
        engines.exported(loaded, loaded.at(settings.size), settings.engine, say)
    with bar(said, len(dataset), err, say) as shown:
        return measure(loaded, settings, accelerator, dataset=dataset, progress=shown)


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise FixEfficientNetError(f"{path} cannot be written: {error.strerror}.") from error
