"""`list`, `info`, `predict`."""

import glob
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.markup import escape

from fixefficientnet import manifest
from fixefficientnet.cli.app import AsJson, Flags, UsageError, app, err, flags, grid, made, out, print_json, print_table
from fixefficientnet.errors import ImageError
from fixefficientnet.manifest import LocalWeights, Variant, Weights
from fixefficientnet.options import PredictionOptions

if TYPE_CHECKING:
    from fixefficientnet.models import LoadedModel
    from fixefficientnet.preprocessing import ImageSource

    OptionFlags = PredictionOptions
else:
    OptionFlags = flags(PredictionOptions)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
IMAGE_SUFFIXES |= {".jfif", ".avif", ".jp2"}


def _no_option(kind: type, image: str) -> None:
    """Lets "-" through, which means stdin, and no option that there is not."""
    if image.startswith("-") and image != "-":
        raise ValueError(f"There is no option {image}.")


@app.command(name="list")
def list_(filter: str = "", /, *, as_json: AsJson = False) -> None:
    """List the variants: size, the paper's top-1, and whether weights are published.

    Args:
        filter: Wildcard on the name, such as '*_ns'.
        as_json: Print JSON.
    """
    variants = [manifest.load()[key] for key in manifest.list_models(filter)]
    if as_json:
        print_json([_row(variant) for variant in variants])
        return
    if not variants:
        err.print(f"No variant matches {filter!r}.")
        raise SystemExit(1)
    rows = [
        (
            variant.key,
            f"{variant.parameters / 1e6:.1f}M",
            str(variant.test.size),
            f"{variant.paper.base.top1:.1f}" if variant.paper else "-",
            f"{variant.paper.fix.top1:.1f}" if variant.paper else "-",
            _published(variant),
        )
        for variant in variants
    ]
    print_table(("variant", "params", "test size", "paper base", "paper Fix", "FixRes weights"), rows)
    out.print("paper: ImageNet top-1 (%) as reported in arXiv 2003.08237, Tables 1 and 2")


@app.command
def info(name: str, /, *, as_json: AsJson = False) -> None:
    """Show everything the manifest knows about one variant.

    Args:
        name: Name or alias of a variant.
        as_json: Print JSON.
    """
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
        lines["weights file"] = str(weights)
        lines["sha256"] = weights.sha256
        if measured := weights.measured:
            lines["measured"] = (
                f"top-1 {measured.top1} / top-5 {measured.top5} on {measured.images:,} images of {measured.dataset}"
            )
    if variant.note:
        lines["note"] = variant.note
    shown = grid()
    for key, value in lines.items():
        shown.add_row(key, escape(value))
    out.print(shown)


@app.command
def predict(
    *images: Annotated[str, Parameter(allow_leading_hyphen=True, validator=_no_option)],
    model: str = manifest.DEFAULT_MODEL,
    pretrained: str | None = None,
    options: Annotated[OptionFlags, Flags] = OptionFlags(),  # noqa: B008 - frozen
    as_json: AsJson = False,
) -> None:
    """Classify images: into ImageNet's 1000 classes, or those of your own model.

    Args:
        images: Files, folders, globs, or - for one image on stdin.
        model: A variant, the folder or file of a fine-tuning run, timm/NAME (timm/NAME:FILE), hf-hub:ORG/NAME or
            local-dir:FOLDER.
        pretrained: Of a variant: 'backbone' for the original weights, a delta's path, or hf://org/repo/file@revision.
            Default: the published FixRes weights; 'backbone' for lite0, lite1 and lite2, which have none.
        options: Options of a prediction.
        as_json: Print JSON.
    """
    if not images:
        raise UsageError("Name an image, a folder, or - for stdin.")
    chosen = made(PredictionOptions, options)
    name = model if pretrained is None else f"{manifest.find(model).key}:{pretrained}"
    failed: list[dict[str, str]] = []

    def on_error(image: "ImageSource", error: ImageError) -> None:
        failed.append({"file": _shown(image), "error": str(error)})
        err.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True)

    def on_message(text: str) -> None:
        err.print(escape(text), soft_wrap=True)

    sources = list(_images(list(images), on_error))
    if not sources and not as_json:  # no need for a model
        _end_with(failed)
    from fixefficientnet.models import load
    from fixefficientnet.prediction import iter_predictions
    from fixefficientnet.runtimes import engines

    device = engines.device_for(chosen.engine, chosen.device, chosen.mixed_precision)
    loaded = load(name)
    chosen = replace(chosen, device=str(device))
    predictions = iter_predictions(sources, loaded, chosen, on_error=on_error, on_message=on_message)
    if as_json:
        found = [{"file": _shown(p.image), "labels": [asdict(label) for label in p.labels]} for p in predictions]
        kind = "fixres" if loaded.tuned else "backbone" if loaded.variant else "own"
        model = loaded.variant.key if loaded.variant else loaded.name
        print_json({"model": model, "weights": kind, "predictions": found, "errors": failed})
    else:
        out.print(escape(_described(loaded)), soft_wrap=True)
        for one in predictions:
            out.print(f"\n[bold]{escape(_shown(one.image))}[/]", soft_wrap=True)
            for label in one.labels:
                out.print(f"  {label.probability:6.1%}  {escape(label.name)}", no_wrap=True, overflow="ellipsis")
    _end_with(failed)


def _described(loaded: "LoadedModel") -> str:
    """What classifies, in one line."""
    weights = f"{'FixRes' if loaded.tuned else 'backbone'} weights, " if loaded.variant else ""
    title = loaded.variant.title if loaded.variant else f"{loaded.name}, {loaded.num_classes} classes"
    remark = " (not tuned by FixRes)" if loaded.variant and not loaded.tuned else ""
    return f"{title}, {weights}test size {loaded.test.size}{remark}"


def _end_with(failed: list[dict[str, str]]) -> None:
    if failed:
        err.print(f"{len(failed)} {'image' if len(failed) == 1 else 'images'} could not be used.")
        raise SystemExit(1)


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


def _published(variant: Variant) -> str:
    if variant.weights:
        return "local" if isinstance(variant.weights, LocalWeights) else "published"
    return "none (backbone only)" if variant.backbone_only else "not published yet"


def _triple(values: tuple[float, float, float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _row(variant: Variant) -> dict[str, Any]:
    names = {"key": variant.key, "hub_name": variant.hub_name, "timm_name": variant.timm_name}
    return names | asdict(variant) | {"published": isinstance(variant.weights, Weights)}
