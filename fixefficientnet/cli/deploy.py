"""`convert`, `merge`, `export`, `publish`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fixefficientnet import manifest
from fixefficientnet.cli.app import app, out
from fixefficientnet.errors import FixEfficientNetError


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A whole checkpoint: .safetensors, or .pth of tensors alone.")],
    variant: Annotated[str, typer.Option(help="Which variant it is of.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The delta; with --full, the network.")],
    full: Annotated[
        bool, typer.Option("--full", help="Write the whole network, also what differs from the backbone.")
    ] = False,
    license: Annotated[str, typer.Option(help="Of these weights; SPDX, lower case.")] = "unknown",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is there.")] = False,
) -> None:
    """Make a delta of a whole checkpoint.

    Everything outside the classifier and the last batch norm must be the original backbone's.
    """
    from fixefficientnet import convert as converting
    from fixefficientnet import delta

    row = manifest.find(variant)
    _not_there(output, overwrite)
    found = converting.read(checkpoint, row)
    head = len(found.tensors) - found.outside
    out.print(
        escape(
            f"{checkpoint}: {row.key}, {len(found.tensors)} tensors; of the {found.outside} outside the head "
            f"{found.outside - len(found.differing)} are the backbone's (tolerance {converting.TOLERANCE:g}), "
            f"{len(found.differing)} differ"
        ),
        soft_wrap=True,
    )
    if full:
        for name, difference in found.differing.items():
            out.print(escape(f"  {name}: by up to {difference:.3g}"), soft_wrap=True)
        converting.save_whole(found.tensors, output)
        out.print(escape(f"{output}: the whole network, for timm's {row.backbone.architecture}"), soft_wrap=True)
        return
    made = converting.to_delta(found, row, license=license, source=checkpoint.name)
    sha256 = delta.save(made, output)
    size = output.stat().st_size
    out.print(
        escape(f"{output}: {head} tensors, {size / 1e6:.1f} MB, license {license}\nsha256 {sha256}"), soft_wrap=True
    )


@app.command()
def merge(
    variant: Annotated[str, typer.Argument(help="A variant's name or alias.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help=".safetensors, .pth, or a folder in the Hub's layout.")
    ],
    delta: Annotated[
        str | None, typer.Option(help="A delta's path or hf://…, or 'backbone'. Default: the published weights.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is there.")] = False,
) -> None:
    """Make one whole checkpoint of backbone and delta, which plain timm loads."""
    from fixefficientnet import convert as converting
    from fixefficientnet import zoo

    row = manifest.find(variant)
    _not_there(output, overwrite)
    model = zoo.create(row.key, row.usual_weights if delta is None else delta)
    converting.merge(model, output)
    name = row.backbone.architecture
    how = f"timm.create_model('{name}', checkpoint_path='{output}')"
    if output.is_dir():
        how = f"timm.create_model('local-dir:{output}', pretrained=True)"
    out.print(escape(f"{output}: {row.title}, test size {model.preprocess.size}\n{how}"), soft_wrap=True)


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is there.")] = False,
) -> None:
    """Write a model as a file for another runtime, and check it there.

    The number of pictures is free. Preprocessing is in the file's metadata, labels are beside it.
    """
    from fixefficientnet.runtimes import SUFFIXES

    if kind is None:
        kind = next((name for name, suffix in SUFFIXES.items() if suffix == output.suffix), None)
    if kind not in SUFFIXES:
        raise typer.BadParameter(f"--format is one of {', '.join(SUFFIXES)}.")
    _not_there(output, overwrite)
    from fixefficientnet import export as exporting
    from fixefficientnet.evaluation.models import open_model

    opened = open_model(model)
    test = opened.at(size)
    checked = exporting.export(opened, output, kind, test=test, dynamic_size=dynamic_size, half=half)
    out.print(
        escape(
            f"{output}: {opened.name}, {kind}, {'any size' if dynamic_size else f'{test.size} pixels'}, "
            f"{output.stat().st_size / 1e6:.1f} MB\n"
            f"against eager: logits differ by up to {checked.difference:.2g} ({checked.relative:.1g} of the largest), "
            f"same best guess for {checked.agreement:.0%} of {checked.pictures} pictures"
        ),
        soft_wrap=True,
    )


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
    replace: Annotated[bool, typer.Option("--replace", help="Replace other weights of the same variants.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is made.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show everything and write nothing.")] = False,
) -> None:
    """Check finished runs and publish their deltas on the Hub.

    One commit, one tag: deltas, model card, models.json. Who may write there is huggingface_hub's business: `hf auth
    login`, or HF_TOKEN.
    """
    from fixefficientnet.publishing import rows
    from fixefficientnet.publishing import runs as checking
    from fixefficientnet.publishing.places import InFolder, OnHub, check_name
    from fixefficientnet.publishing.publish import CARD, plan
    from fixefficientnet.publishing.publish import publish as publishing

    check_name(repo)
    checked = checking.check_all(runs)
    for run in checked:
        said = (
            f"{run.folder}: {run.variant.key}, {len(run.data) / 1e6:.1f} MB, sha256 {run.sha256}\n"
            f"  complete; {run.right} of {run.probed} stored pictures right, logits differ by {run.difference:.1g} of "
            "the largest"
        )
        out.print(escape(said), soft_wrap=True)
    place = OnHub(repo, private) if to is None else InFolder(to)
    present = place.present()
    chosen = plan(checked, repo, present, replace=replace)
    where = repo if to is None else f"{to} ({repo})"
    if dry_run:
        out.print(escape(f"\n{where}, {chosen.message if chosen.files else f'{chosen.version}: all is there'}"))
        for name, data in chosen.files.items():
            out.print(escape(f"  {name}  {len(data):,} bytes"), soft_wrap=True)
        if card := chosen.files.get(CARD):
            out.print(f"\n{CARD}:", soft_wrap=True)
            typer.echo(card.decode())
        revisions = {run.variant.key: "0" * 40 for run in checked}
        out.print(escape(f"{manifest_file}, but for the commit:"), soft_wrap=True)
        typer.echo(rows.updated(manifest_file, checked, repo, revisions), nl=False)
        out.print("Nothing was written (--dry-run).")
        return
    done = publishing(checked, chosen, place, present, manifest_file)
    out.print(escape(f"{where}, {chosen.message if chosen.files else f'{chosen.version}: all was there already'}"))
    for key, revision in done.revisions.items():
        out.print(escape(f"  {key} at {revision}"), soft_wrap=True)
    out.print(
        escape(
            f"{manifest_file} has the rows: with FIXEFFICIENTNET_MANIFEST={manifest_file}, "
            f"create({next(iter(done.revisions))!r}, pretrained=True) loads them."
        ),
        soft_wrap=True,
    )


def _not_there(output: Path, overwrite: bool) -> None:
    if not overwrite and (output.is_file() or (output.is_dir() and any(output.iterdir()))):
        raise FixEfficientNetError(f"{output} is there already. Choose another --output, or replace it: --overwrite.")
