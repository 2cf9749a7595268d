"""`convert`, `merge`, `export`, `publish`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fixefficientnet import manifest
from fixefficientnet.cli.app import app, out
from fixefficientnet.errors import FixEfficientNetError, PublishError


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A whole checkpoint: .safetensors, or .pth of tensors alone.")],
    variant: Annotated[str, typer.Option(help="Which variant it is of.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The delta; with --full, the network.")],
    full: Annotated[
        bool, typer.Option("--full", help="Write the whole network, also what differs from the backbone.")
    ] = False,
    size: Annotated[
        int | None, typer.Option(min=1, help="Test size that it was tuned for, in pixels. Default: the variant's.")
    ] = None,
    crop_pct: Annotated[float | None, typer.Option(help="And its crop_pct.")] = None,
    license: Annotated[str, typer.Option(help="Of these weights; SPDX, lower case.")] = "unknown",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is there.")] = False,
) -> None:
    """Make a delta of a whole checkpoint.

    Everything outside the classifier and the last batch norm must be the original backbone's.
    """
    from fixefficientnet import delta
    from fixefficientnet.publishing import conversion as converting

    row = manifest.find(variant)
    _ending(output, (".safetensors", ".pth") if full else (".safetensors",))
    _not_there([output], overwrite)
    crop_pct = row.test.crop_pct if crop_pct is None else crop_pct
    test = replace(row.test, size=size or row.test.size, crop_pct=crop_pct)
    if not delta.is_sound(test):
        raise typer.BadParameter(f"No image can be shown at {test.size} pixels with crop_pct {test.crop_pct:g}.")
    found = converting.read(checkpoint, row)
    out.print(
        escape(
            f"{checkpoint}: {row.key}, {len(found.tensors)} tensors; of the {found.outside} outside the head "
            f"{found.outside - len(found.differing)} are the backbone's (tolerance {converting.TOLERANCE:g}), "
            f"{len(found.differing)} differ"
        ),
        soft_wrap=True,
    )
    if not found.tuned:
        out.print("The head is the backbone's own too: nothing was tuned.")
    if full:
        for name, difference in found.differing.items():
            out.print(escape(f"  {name}: by up to {difference:.3g}"), soft_wrap=True)
        converting.save_whole(found.tensors, output)
        out.print(escape(f"{output}: the whole network, for timm's {row.backbone.architecture}"), soft_wrap=True)
        return
    made = converting.to_delta(found, row, license=license, source=checkpoint.name, test=test)
    sha256 = delta.save(made, output)
    bytes_ = output.stat().st_size
    out.print(
        escape(
            f"{output}: {len(made.tensors)} tensors, {bytes_ / 1e6:.1f} MB, test size {test.size}, license {license}\n"
            f"sha256 {sha256}"
        ),
        soft_wrap=True,
    )


@app.command()
def merge(
    variant: Annotated[str, typer.Argument(help="A variant's name or alias.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help=".safetensors, .pth, or a folder in the Hub's layout.")
    ],
    delta: Annotated[
        str | None,
        typer.Option(
            help="A delta's path, a run's folder, hf://…, or 'backbone'. Default: the published weights; 'backbone' "
            "for lite0, lite1 and lite2."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output if it is there; a folder keeps its other files.")
    ] = False,
) -> None:
    """Make one whole checkpoint of backbone and delta, which plain timm loads."""
    from fixefficientnet import zoo
    from fixefficientnet.publishing import conversion as converting

    row = manifest.find(variant)
    if output.suffix.lower() in _WEIGHTS:
        _ending(output, (".safetensors", ".pth"))
    folder = output.suffix not in (".safetensors", ".pth")
    _not_there([output], overwrite, may_be_folder=folder)
    weights = row.usual_weights if delta is None else delta
    if delta and Path(delta).is_dir():
        weights = str(Path(delta) / "delta.safetensors")
    model = zoo.create(row.key, weights)
    converting.merge(model, output)
    test, name = model.preprocess, row.backbone.name
    said = f"{test.size} pixels, crop_pct {test.crop_pct:g}, {test.interpolation}, mean {test.mean}, std {test.std}"
    how = f"timm.create_model('{name}', checkpoint_path='{output}')\nIts preprocessing is not in the file: {said}."
    if folder:
        how = (
            f"timm.create_model('local-dir:{output}', pretrained=True)  # timm 1.0.16 or newer\n"
            f"Its preprocessing is in config.json: {said}."
        )
    whose = "the backbone's own weights" if weights == "backbone" else f"FixRes weights ({delta or 'published'})"
    out.print(escape(f"{output}: {row.title}, {whose}\n{how}"), soft_wrap=True)


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(help="A variant (b4_ns; b4_ns:backbone, b4_ns:FILE), a run's folder or file, or timm/NAME."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file: .onnx, .xml, .pt2 or .pt.")],
    kind: Annotated[
        str | None,
        typer.Option("--format", help="onnx, openvino, torch-export or torchscript. Default: by the ending."),
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Test size in pixels. Default: the model's.")] = None,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Leave height and width free.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Weights in float16; inputs and outputs stay float32.")] = False,
    eight_bit: Annotated[
        bool, typer.Option("--int8", help="8-bit integers (onnx, openvino), calibrated on images of --data.")
    ] = False,
    data: Annotated[str, typer.Option(help="Labelled images, as for `evaluate`.")] = "",
    images: Annotated[int, typer.Option(min=1, help="How many of them --int8 takes, evenly spread.")] = 300,
    max_drop: Annotated[
        float, typer.Option(help="Points of accuracy on these that --int8 may lose; more, and nothing is written.")
    ] = 2.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is there.")] = False,
) -> None:
    """Write a model as a file for another runtime, and check it there.

    The number of images is free. Preprocessing is in the file's metadata, labels are beside it.
    """
    from fixefficientnet._internal import requirements
    from fixefficientnet.runtimes import formats

    kind = formats.format_of(output, kind)
    requirements.need(*formats.PACKAGES.get(kind, ()))
    if eight_bit != bool(data):
        raise typer.BadParameter("--int8 takes its images from --data, and nothing else does.")
    from fixefficientnet.evaluation.evaluate import Settings, dataset_for
    from fixefficientnet.models import open_model
    from fixefficientnet.runtimes import exporting as exporting
    from fixefficientnet.runtimes.int8 import Calibration

    written = exporting.files(output)
    _not_there(written, overwrite)
    loaded = open_model(model)
    test = loaded.at(size)
    calibration = None
    if eight_bit:
        calibration = Calibration(dataset_for(loaded, Settings(data)), loaded.transform(test), images)
    checked = exporting.export(
        loaded,
        output,
        test=test,
        dynamic_size=dynamic_size,
        half=half,
        calibration=calibration,
        max_drop=max_drop,
    )
    size_of = sum(file.stat().st_size for file in written)
    said = [
        f"{output}: {loaded.name}, {kind}, {'any size' if dynamic_size else f'{test.size} pixels'}, "
        f"{size_of / 1e6:.1f} MB (with {', '.join(file.name for file in written[1:])})",
        f"against eager: logits differ by up to {checked.difference:.2g} ({checked.relative:.1g} of the largest), "
        f"same top-1 prediction for {checked.agreement:.0%} of {checked.images} generated images",
    ]
    if checked.correct:
        before, after = (100 * count / checked.measured for count in checked.correct)
        said[1] = (
            f"top-1 on the {checked.measured} images of {data} that it was calibrated on: {before:.2f} before, "
            f"{after:.2f} after"
        )
    out.print(escape("\n".join(said)), soft_wrap=True)


@app.command()
def publish(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, of different variants.")],
    repo: Annotated[str, typer.Option(help="ORGANISATION/NAME on the Hub.")],
    to: Annotated[
        Path | None, typer.Option(help="Write it as a git repository in this folder, and nothing to the Hub.")
    ] = None,
    manifest_file: Annotated[
        Path, typer.Option("--manifest", help="Gets the rows that load from there; made if need be.")
    ] = Path("weights_manifest.json"),
    replacing: Annotated[bool, typer.Option("--replace", help="Replace other weights of the same variants.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is made.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show everything and write nothing.")] = False,
) -> None:
    """Check finished runs and publish their deltas on the Hub.

    One commit, one tag: deltas, model card, models.json. Who may write there is huggingface_hub's business: `hf auth
    login`, or HF_TOKEN.
    """
    from fixefficientnet.publishing import checks as checking
    from fixefficientnet.publishing import manifest_rows
    from fixefficientnet.publishing.publish import CARD, plan
    from fixefficientnet.publishing.publish import publish as publishing
    from fixefficientnet.publishing.repository import InFolder, OnHub, Present, check_name

    check_name(repo)
    if private and to is not None:
        raise typer.BadParameter("--private is for the Hub; a folder is as private as it is.")
    checked = checking.check_all(runs)
    for run in checked:
        said = (
            f"{run.folder}: {run.variant.key}, {len(run.data) / 1e6:.1f} MB, sha256 {run.sha256}\n"
            f"  complete; {run.correct} of {run.probed} stored images correct, logits differ by {run.difference:.1g} "
            "of the largest"
        )
        out.print(escape(said), soft_wrap=True)
    place = OnHub(repo, private) if to is None else InFolder(to)
    try:
        present = place.present()
    except PublishError as error:
        if not dry_run or to is not None:
            raise
        present = Present()
        out.print(escape(f"{error}\nShown as if {repo} had nothing yet."), soft_wrap=True)
    chosen = plan(checked, repo, present, replace=replacing)
    where = repo if to is None else f"{to} ({repo})"
    if dry_run:
        said = f"\n{where}, {chosen.message if chosen.files else f'{chosen.version}: all is there'}"
        out.print(escape(said), soft_wrap=True)
        for name, data in chosen.files.items():
            out.print(escape(f"  {name}  {len(data):,} bytes"), soft_wrap=True)
        if card := chosen.files.get(CARD):
            out.print(f"\n{CARD}:", soft_wrap=True)
            typer.echo(card.decode())
        revisions = {run.variant.key: "0" * 40 for run in checked}
        out.print(escape(f"{manifest_file}, but for the commit:"), soft_wrap=True)
        typer.echo(manifest_rows.updated(manifest_file, checked, repo, revisions), nl=False)
        out.print("Nothing was written (--dry-run).")
        return
    done = publishing(checked, chosen, place, present, manifest_file)
    said = f"{where}, {chosen.message if chosen.files else f'{chosen.version}: all was there already'}"
    out.print(escape(said), soft_wrap=True)
    for key, revision in done.revisions.items():
        out.print(escape(f"  {key} at {revision}"), soft_wrap=True)
    served = "" if to is None else f", once {to} is served as {repo}"
    out.print(
        escape(
            f"{manifest_file} has the rows: with FIXEFFICIENTNET_MANIFEST={manifest_file}, "
            f"create({next(iter(done.revisions))!r}, pretrained=True) loads them{served}."
        ),
        soft_wrap=True,
    )


_WEIGHTS = {".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar"}
"""Endings that no folder is meant to have."""


def _ending(output: Path, allowed: tuple[str, ...]) -> None:
    if output.suffix not in allowed:
        raise FixEfficientNetError(f"{output}: the ending of such a file is {' or '.join(allowed)}.")


def _not_there(outputs: list[Path], overwrite: bool, *, may_be_folder: bool = False) -> None:
    """Refuses to replace files unasked, and what is no file at all: a device, a folder."""
    for output in outputs:
        if may_be_folder and output.is_dir():
            wrong, there = False, any(output.iterdir())
        else:
            there = output.exists() or output.is_symlink()
            wrong = there and not output.is_file()
        if wrong:
            raise FixEfficientNetError(f"{output} is there, and is no file. Choose another --output.")
        if there and not overwrite:
            raise FixEfficientNetError(
                f"{output} is there already. Choose another --output, or replace it: --overwrite."
            )
