"""`predict`, `embed`."""

import glob
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.markup import escape

from fixefficientnet import manifest
from fixefficientnet._internal.text import inert
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
    write_file,
)
from fixefficientnet.data.files import below, is_image
from fixefficientnet.errors import ImageError
from fixefficientnet.options import PredictionOptions

if TYPE_CHECKING:
    from fixefficientnet.models import LoadedModel
    from fixefficientnet.prediction import Prediction
    from fixefficientnet.preprocessing import ImageSource

    OptionFlags = PredictionOptions
    EmbeddingFlags = PredictionOptions
else:
    OptionFlags = flags(PredictionOptions)
    EmbeddingFlags = flags(PredictionOptions, leave_out=("topk", "engine"))

_FORMATS = {".csv": "csv_lines", ".jsonl": "json_lines", ".md": "markdown_lines"}
"""The function of `evaluation.tables` for each ending of a file."""


def _no_option(kind: type, image: str) -> None:
    """Lets "-" through, which means stdin, and no option that there is not."""
    if image.startswith("-") and image != "-":
        raise ValueError(f"There is no option {image}.")


@app.command
def predict(
    *images: Annotated[str, Parameter(allow_leading_hyphen=True, validator=_no_option)],
    model: str = manifest.DEFAULT_MODEL,
    pretrained: str | None = None,
    output: Annotated[Path | None, Output] = None,
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
        output: Write a row per image to this file (.csv, .jsonl, .md) instead of printing.
        options: Options of a prediction.
        as_json: Print JSON.
    """
    chosen = made(PredictionOptions, options)
    if output and output.suffix.lower() not in _FORMATS:
        raise UsageError(f"--output {output}: the file's name ends in {', '.join(_FORMATS)}.")
    if output and as_json:
        raise UsageError("--json prints, and --output writes a file: give one of them.")
    if output:
        check_writable(output)
    name = model if pretrained is None else f"{manifest.find(model).key}:{pretrained}"
    given = _Given(images)
    if not given.sources and not as_json:  # no need for a model
        given.end()
    from fixefficientnet.models import load
    from fixefficientnet.prediction import iter_predictions
    from fixefficientnet.runtimes import engines

    device = engines.device_for(chosen.engine, chosen.device, chosen.mixed_precision)
    loaded = load(name)
    chosen = replace(chosen, device=str(device))
    predictions = iter_predictions(given.sources, loaded, chosen, on_error=given.on_error, on_message=err.say)
    if output:
        from fixefficientnet.evaluation import tables

        rows = given.rows(predictions, min(chosen.topk, loaded.num_classes))
        write_file(output, getattr(tables, _FORMATS[output.suffix.lower()])(rows))
        out.say(f"{output}: {given.usable} images, {_described(loaded)}")
    elif as_json:
        shown = [{"file": _shown(p.image), "labels": [asdict(label) for label in p.labels]} for p in predictions]
        kind = "fixres" if loaded.tuned else "backbone" if loaded.variant else "own"
        model = loaded.variant.key if loaded.variant else loaded.name
        print_json({"model": model, "weights": kind, "predictions": shown, "errors": given.failed})
    else:
        out.say(_described(loaded))
        for one in predictions:
            out.print(f"\n[bold]{escape(inert(_shown(one.image)))}[/]", soft_wrap=True)
            for label in one.labels:
                out.print(f"  {label.probability:6.1%}  {escape(inert(label.name))}", no_wrap=True, overflow="ellipsis")
    given.end()


@app.command
def embed(
    *images: Annotated[str, Parameter(allow_leading_hyphen=True, validator=_no_option)],
    output: Annotated[Path, Output],
    model: str = manifest.DEFAULT_MODEL,
    options: Annotated[EmbeddingFlags, Flags] = EmbeddingFlags(),  # noqa: B008 - frozen
) -> None:
    """Write the pooled features of images, which the classifier is given.

    The file has two arrays for numpy.load: features, float32 [N, channels], and files, the N names.

    Args:
        images: Files, folders, globs, or - for one image on stdin.
        output: The file: .npz.
        model: As for `predict`.
        options: Options of a prediction.
    """
    chosen = made(PredictionOptions, options)
    if output.suffix.lower() != ".npz":
        raise UsageError(f"--output {output}: the file's name ends in .npz.")
    check_writable(output)
    given = _Given(images)
    if not given.sources:
        given.end()
    import numpy as np

    from fixefficientnet.embedding import embed as embed_images

    found = embed_images(given.sources, model, chosen, on_error=given.on_error)
    if not found.images:
        given.end()
    written = io.BytesIO()
    np.savez(written, features=found.features, files=np.array([_shown(image) for image in found.images], dtype=str))
    write_file(output, written.getvalue())
    out.say(f"{output}: features, float32 {list(found.features.shape)}, of {model}")
    given.end()


class _Given:
    """The images that the arguments mean, and what could not be used of them."""

    def __init__(self, images: Sequence[str]):
        if not images:
            raise UsageError("Name an image, a folder, or - for stdin.")
        self.failed: list[dict[str, str]] = []
        self.sources = list(_images(images, self.on_error))
        self.missing = len(self.failed)
        """How many failed that are none of the sources."""

    @property
    def usable(self) -> int:
        return len(self.sources) - len(self.failed) + self.missing

    def on_error(self, image: "ImageSource", error: ImageError) -> None:
        self.failed.append({"file": _shown(image), "error": str(error)})
        err.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True)

    def rows(self, predictions: "Iterable[Prediction]", ranks: int) -> Iterator[dict[str, Any]]:
        """A row per image as soon as it is known, in their order: its labels, or why it has none.

        What was given and names no image comes last.
        """
        places = ["", *map(str, range(2, ranks + 1))]
        nothing = dict.fromkeys(f"{name}{place}" for place in places for name in ("prediction", "confidence"))
        coming, failed = iter(predictions), self.missing
        one = next(coming, None)
        for source in self.sources:
            if one and source is one.image:
                row = dict(nothing)
                for place, label in zip(places, one.labels, strict=True):
                    row |= {f"prediction{place}": label.name, f"confidence{place}": label.probability}
                yield {"image": _shown(source), **row, "left_out": None}
                one = next(coming, None)
            else:  # it failed before the next one's prediction
                yield {"image": _shown(source), **nothing, "left_out": self.failed[failed]["error"]}
                failed += 1
        for what in self.failed[: self.missing]:
            yield {"image": what["file"], **nothing, "left_out": what["error"]}

    def end(self) -> None:
        """Ends the command with the status 1 where an image could not be used."""
        if self.failed:
            err.print(f"{len(self.failed)} {'image' if len(self.failed) == 1 else 'images'} could not be used.")
            raise SystemExit(1)


def _described(loaded: "LoadedModel") -> str:
    """What classifies, in one line."""
    weights = f"{'FixRes' if loaded.tuned else 'backbone'} weights, " if loaded.variant else ""
    title = loaded.variant.title if loaded.variant else f"{loaded.name}, {loaded.num_classes} classes"
    remark = " (not tuned by FixRes)" if loaded.variant and not loaded.tuned else ""
    return f"{title}, {weights}test size {loaded.test.size}{remark}"


def _images(images: Sequence[str], report: Any) -> Iterator["ImageSource"]:
    """The images that the arguments mean, in a stable order."""
    for image in images:
        if image == "-":
            if data := sys.stdin.buffer.read():
                yield data
            else:
                report(image, ImageError("Nothing came on stdin."))
        elif os.path.isdir(image) or (glob.has_magic(image) and not os.path.exists(image)):
            try:
                there = below(image) if os.path.isdir(image) else glob.glob(image, recursive=True)
                files = sorted(file for file in there if is_image(file) and not os.path.isdir(file))
            except OSError as error:
                report(image, ImageError(f"{error.filename} cannot be read: {error.strerror}."))
                continue
            if not files:
                report(image, ImageError(f"There are no images in {image} (files ending in .jpg, .png, .webp, …)."))
            yield from map(os.path.normpath, files)
        else:
            yield image


def _shown(image: "ImageSource") -> str:
    return "-" if isinstance(image, bytes) else str(image)
