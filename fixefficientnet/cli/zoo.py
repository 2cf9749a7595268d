"""`list`, `info`, `predict`."""

import contextlib
import glob
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fixefficientnet import manifest
from fixefficientnet.cli.app import AsJson, Engine, Fast, MixedPrecision, app, err, out, print_json
from fixefficientnet.errors import FixEfficientNetError, ImageError
from fixefficientnet.manifest import Variant

if TYPE_CHECKING:
    from fixefficientnet.preprocessing import ImageSource

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
IMAGE_SUFFIXES |= {".jfif", ".avif", ".jp2"}


@app.command("list")
def list_(
    filter: Annotated[str, typer.Argument(help="Wildcard on the name, such as '*_ns'.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the variants: size, the paper's top-1, and whether weights are published."""
    variants = [manifest.load()[key] for key in manifest.list_models(filter)]
    if as_json:
        print_json([_row(variant) for variant in variants])
        return
    if not variants:
        err.print(f"No variant matches {filter!r}.")
        raise typer.Exit(1)
    table = Table(header_style="bold")
    table.add_column("variant")
    for column in ("params", "test size", "paper base", "paper Fix"):
        table.add_column(column, justify="right")
    table.add_column("FixRes weights")
    for variant in variants:
        paper = variant.paper
        table.add_row(
            variant.key,
            f"{variant.parameters / 1e6:.1f}M",
            str(variant.test.size),
            f"{paper.base.top1:.1f}" if paper else "-",
            f"{paper.fix.top1:.1f}" if paper else "-",
            _published(variant),
        )
    out.print(table)
    out.print("paper: ImageNet top-1 (%) as reported in arXiv 2003.08237, Tables 1 and 2")


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="A variant's name or alias.")],
    as_json: AsJson = False,
) -> None:
    """Show everything the manifest knows about one variant."""
    variant = manifest.find(name)
    if as_json:
        print_json(_row(variant))
        return
    test, backbone, paper, weights = variant.test, variant.backbone, variant.paper, variant.weights
    package = f", or the PyPI package {backbone.package.name}" if backbone.package else ""
    lines = {
        "variant": f"{variant.key} ({variant.title})",
        "timm name": variant.timm_name,
        "torch.hub": variant.hub_name,
        "parameters": f"{variant.parameters:,}",
        "backbone": backbone.name,
        "from": f"{backbone.repository}@{backbone.revision} on the Hub{package} ({backbone.license})",
        "train size": f"{variant.train_size}",
        "test size": f"{test.size}, crop_pct {test.crop_pct:g}, {test.interpolation}",
        "mean, std": f"{_triple(test.mean)}, {_triple(test.std)}",
    }
    if paper:
        lines["paper"] = (
            f"Table {paper.table}: top-1 {paper.base.top1} / top-5 {paper.base.top5} at {paper.base.test_size}, "
            f"with FixRes {paper.fix.top1} / {paper.fix.top5} at {paper.fix.test_size}"
        )
    lines["FixRes weights"] = _published(variant)
    if weights:
        lines["weights file"] = str(weights.path or f"{weights.repository}/{weights.filename}@{weights.revision}")
        lines["sha256"] = weights.sha256
        if measured := weights.measured:
            lines["measured"] = (
                f"top-1 {measured.top1} / top-5 {measured.top5} on {measured.images:,} images of {measured.dataset}"
            )
    if variant.note:
        lines["note"] = variant.note
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in lines.items():
        grid.add_row(key, escape(value))
    out.print(grid)


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(help="Files, folders, globs, or - for one image on stdin.")],
    model: Annotated[str, typer.Option(help="A variant's name or alias.")] = manifest.DEFAULT_MODEL,
    pretrained: Annotated[
        str | None,
        typer.Option(
            help="'backbone' for the original weights, a delta's path, or hf://org/repo/file@revision. "
            "Default: the published FixRes weights; 'backbone' for lite0, lite1 and lite2, which have none."
        ),
    ] = None,
    topk: Annotated[int, typer.Option(min=1, help="Labels per image.")] = 5,
    as_json: AsJson = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, …  Default: cuda if there is one.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per forward pass. Default: 16, on a CPU 2.")
    ] = None,
    mixed_precision: MixedPrecision = "no",
    engine: Engine = "eager",
    fast_preprocessing: Fast = False,
) -> None:
    """Classify images into ImageNet's 1000 classes."""
    variant = manifest.find(model)
    failed: list[dict[str, str]] = []

    def report(image: "ImageSource", error: ImageError) -> None:
        failed.append({"file": _shown(image), "error": str(error)})
        err.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True)

    sources = list(_images(images, report))
    if not sources and not as_json:  # no need for a model
        _end_with(failed)
    import torch

    from fixefficientnet import prediction, zoo
    from fixefficientnet._internal import processes
    from fixefficientnet._internal.threads import BATCH_SIZE, default_threads
    from fixefficientnet.runtimes import engines

    if engine in engines.EXPORTED and device is None:
        device = "cpu"
    place = torch.device(_device(device))
    processes.check_precision(mixed_precision, cpu=place.type == "cpu")
    engines.check(engine, place, mixed_precision)
    weights = variant.usual_weights if pretrained is None else pretrained
    network = zoo.create(variant.key, weights, device=place)
    if fast_preprocessing:
        from fixefficientnet.preprocessing import FastPreprocess

        network.preprocess = FastPreprocess.of(network.preprocess)
    tuned = weights != "backbone"
    said = f"{variant.title}, {'FixRes' if tuned else 'backbone'} weights, test size {network.preprocess.size}"
    if not tuned:
        said += " (not tuned by FixRes)"
    batches = math.ceil(len(sources) / (batch_size or BATCH_SIZE))
    threads = 1 if engine == "compile" else default_threads(network, batches)
    with contextlib.ExitStack() as stack:
        if engine != "eager":
            from fixefficientnet.models import from_module

            loaded = from_module(network)
            if engine in engines.EXPORTED:
                engines.exported(loaded, loaded.test, engine, lambda text: err.print(escape(text), soft_wrap=True))
            running = engines.running(loaded, loaded.test, engine, threads=threads, precision=mixed_precision)
            stack.enter_context(running)
        if mixed_precision != "no":
            stack.enter_context(torch.autocast(place.type, torch.bfloat16 if mixed_precision == "bf16" else torch.half))
        predictions = prediction.stream(
            sources, network, topk=topk, batch_size=batch_size, on_error=report, threads=threads
        )
        if as_json:
            found = [{"file": _shown(p.image), "labels": [asdict(label) for label in p.labels]} for p in predictions]
            kind = "fixres" if tuned else "backbone"
            print_json({"model": variant.key, "weights": kind, "predictions": found, "errors": failed})
        else:
            out.print(said, soft_wrap=True)
            for found_one in predictions:
                out.print(f"\n[bold]{escape(_shown(found_one.image))}[/]", soft_wrap=True)
                for label in found_one.labels:
                    out.print(f"  {label.probability:6.1%}  {escape(label.name)}", no_wrap=True, overflow="ellipsis")
    _end_with(failed)


def _end_with(failed: list[dict[str, str]]) -> None:
    if failed:
        err.print(f"{len(failed)} of what was named could not be used.")
        raise typer.Exit(1)


def _images(images: list[str], report: Any) -> Iterator["ImageSource"]:
    """The images that the arguments mean, in a stable order."""
    for image in images:
        if image == "-":
            if data := sys.stdin.buffer.read():
                yield data
            else:
                report(image, ImageError("Nothing came on stdin."))
        elif os.path.isdir(image) or (glob.has_magic(image) and not os.path.exists(image)):
            pattern = os.path.join(glob.escape(image), "**", "*") if os.path.isdir(image) else image
            files = [file for file in sorted(glob.glob(pattern, recursive=True)) if _is_image(file)]
            if not files:
                report(image, ImageError(f"There are no images in {image} (files ending in .jpg, .png, .webp, …)."))
            yield from map(os.path.normpath, files)
        else:
            yield image


def _is_image(file: str) -> bool:
    return Path(file).suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(file)


def _shown(image: "ImageSource") -> str:
    return "-" if isinstance(image, bytes) else str(image)


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise FixEfficientNetError(
            f"The device {name!r} cannot be used here: {reason}. Use --device cpu, or leave it out."
        ) from None
    return name


def _published(variant: Variant) -> str:
    if variant.weights:
        return "local" if variant.weights.path else "published"
    return "none (backbone only)" if variant.backbone_only else "not published yet"


def _triple(values: tuple[float, float, float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _row(variant: Variant) -> dict[str, Any]:
    names = {"key": variant.key, "hub_name": variant.hub_name, "timm_name": variant.timm_name}
    return names | asdict(variant) | {"published": bool(variant.weights and not variant.weights.path)}
