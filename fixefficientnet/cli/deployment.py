"""`convert`, `merge`, `export`, `publish`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.markup import escape

from fixefficientnet.cli.app import Flags, Output, UsageError, app, flags, made, out, print_text, whole_number
from fixefficientnet.options import ExportOptions

if TYPE_CHECKING:
    from fixefficientnet.publishing.publish import PublishResult

    OptionFlags = ExportOptions
else:
    OptionFlags = flags(ExportOptions)


def _say(text: str) -> None:
    out.print(escape(text), soft_wrap=True)


@app.command
def convert(
    checkpoint: Path,
    /,
    *,
    variant: str,
    output: Annotated[Path, Output],
    full: bool = False,
    size: Annotated[int | None, Parameter(converter=whole_number)] = None,
    crop_pct: float | None = None,
    license: str = "unknown",
    overwrite: bool = False,
) -> None:
    """Make a delta of a whole checkpoint.

    Everything outside the classifier and the last batch norm must be the original backbone's.

    Args:
        checkpoint: A whole checkpoint: .safetensors, or .pth of tensors alone.
        variant: Variant that the checkpoint is of.
        output: The delta; with --full, the network.
        full: Write the whole network, also what differs from the backbone.
        size: Test size that it was tuned for, in pixels. Default: the variant's.
        crop_pct: crop_pct that it was tuned for. Default: the variant's.
        license: License of these weights; SPDX, lower case.
        overwrite: Replace the output if it is there.
    """
    from fixefficientnet.publishing import conversion

    options = {"full": full, "size": size, "crop_pct": crop_pct, "license": license, "overwrite": overwrite}
    done = conversion.convert(checkpoint, variant, output, **options)  # type: ignore[arg-type]
    _say(
        f"{checkpoint}: {done.variant.key}, {done.tensors} tensors; of the {done.outside} outside the head "
        f"{done.outside - len(done.differing)} are the backbone's (tolerance {conversion.TOLERANCE:g}), "
        f"{len(done.differing)} differ"
    )
    if not done.tuned:
        _say("The head is the backbone's own too: nothing was tuned.")
    for name, difference in done.differing.items():
        _say(f"  {name}: by up to {difference:.3g}")
    if full:
        _say(f"{output}: the whole network, for timm's {done.variant.backbone.architecture}")
    else:
        _say(
            f"{output}: {done.written} tensors, {done.bytes / 1e6:.1f} MB, test size {done.test.size}, "
            f"license {license}\nsha256 {done.sha256}"
        )


@app.command
def merge(variant: str, *, output: Annotated[Path, Output], delta: str | None = None, overwrite: bool = False) -> None:
    """Make one whole checkpoint of backbone and delta, which plain timm loads.

    Args:
        variant: Name or alias of a variant.
        output: .safetensors, .pth, or a folder in the Hub's layout.
        delta: A delta's path, a run's folder, hf://…, or 'backbone'. Default: the published weights; 'backbone' for
            lite0, lite1 and lite2.
        overwrite: Replace the output if it is there; a folder keeps its other files.
    """
    from fixefficientnet.publishing import conversion

    done = conversion.merge(variant, output, delta=delta, overwrite=overwrite)
    test, name = done.test, done.variant.backbone.name
    said = f"{test.size} pixels, crop_pct {test.crop_pct:g}, {test.interpolation}, mean {test.mean}, std {test.std}"
    how = f"timm.create_model('{name}', checkpoint_path='{output}')\nIts preprocessing is not in the file: {said}."
    if done.folder:
        how = (
            f"timm.create_model('local-dir:{output}', pretrained=True)  # timm 1.0.16 or newer\n"
            f"Its preprocessing is in config.json: {said}."
        )
    weights = "the backbone's own weights" if done.weights == "backbone" else f"FixRes weights ({delta or 'published'})"
    _say(f"{output}: {done.variant.title}, {weights}\n{how}")


@dataclass(frozen=True)
class Int8:
    """8-bit integers.

    Attributes:
        int8: 8-bit integers (onnx, openvino), calibrated on images of --data.
        data: Labelled images, as for `evaluate`.
    """

    int8: bool = False
    data: str = ""


@app.command
def export(
    model: str,
    /,
    *,
    output: Annotated[Path, Output],
    format: Literal["onnx", "openvino", "torch-export", "torchscript"] | None = None,
    options: Annotated[OptionFlags, Flags] = OptionFlags(),  # noqa: B008 - frozen
    calibration: Annotated[Int8, Flags] = Int8(),
    overwrite: bool = False,
) -> None:
    """Write a model as a file for another runtime, and check it there.

    The number of images is free. Preprocessing is in the file's metadata, labels are beside it.

    Args:
        model: A variant (b4_ns; b4_ns:backbone, b4_ns:FILE), a run's folder or file, or timm/NAME.
        output: The file: .onnx, .xml, .pt2 or .pt.
        format: Format of the file. Default: by the ending.
        options: Options of an export.
        calibration: 8-bit integers.
        overwrite: Replace the output if it is there.
    """
    chosen = made(ExportOptions, options)
    if calibration.int8 != bool(calibration.data):
        raise UsageError("--int8 takes its images from --data, and nothing else does.")
    from fixefficientnet._internal import requirements
    from fixefficientnet._internal.files import check_output
    from fixefficientnet.runtimes import formats

    requirements.need(*formats.PACKAGES.get(formats.format_of(output, format), ()))
    from fixefficientnet.evaluation.evaluate import dataset_for
    from fixefficientnet.evaluation.settings import Settings
    from fixefficientnet.models import load
    from fixefficientnet.runtimes import exporting

    check_output(exporting.files(output), overwrite)
    loaded = load(model)
    images = dataset_for(loaded, Settings(calibration.data)) if calibration.int8 else None
    done = exporting.export(loaded, output, chosen, format=format, calibration=images)
    size = "any size" if chosen.dynamic_size else f"{done.test.size} pixels"
    more = ", ".join(file.name for file in done.files[1:])
    _say(f"{output}: {done.name}, {done.format}, {size}, {done.bytes / 1e6:.1f} MB (with {more})")
    if done.int8:
        before, after = (100 * count / done.int8.images for count in (done.int8.before, done.int8.after))
        _say(
            f"top-1 on the {done.int8.images} images of {calibration.data} that it was calibrated on: {before:.2f} "
            f"before, {after:.2f} after"
        )
    else:
        found = done.agreement
        _say(
            f"against eager: logits differ by up to {found.difference:.2g} ({found.relative:.1g} of the largest), "
            f"same top-1 prediction for {found.top1:.0%} of {found.images} generated images"
        )


@app.command
def publish(
    *runs: Path,
    repo: Annotated[str, Parameter(allow_leading_hyphen=True)],
    to: Path | None = None,
    manifest: Path | None = None,
    replace: bool = False,
    private: bool = False,
    dry_run: bool = False,
) -> None:
    """Check finished runs and publish their deltas on the Hub.

    One commit, one tag: deltas, model card, models.json. Who may write there is huggingface_hub's business: `hf auth
    login`, or HF_TOKEN.

    Args:
        runs: Folders of finished runs, of different variants.
        repo: ORGANISATION/NAME on the Hub.
        to: Write plain files into this folder, with a manifest that loads them, and nothing to the Hub.
        manifest: Manifest that gets the rows that load from the Hub; made if need be. Default: weights_manifest.json.
        replace: Replace other weights of the same variants.
        private: Make the repository private, if it is made.
        dry_run: Show everything and write nothing.
    """
    if not runs:
        raise UsageError("Name the folder of a finished run.")
    from fixefficientnet.publishing.publish import publish as publish_runs

    done = publish_runs(runs, repo, to=to, manifest=manifest, replace=replace, private=private, dry_run=dry_run)
    if not done.written:
        _say("Dry run: nothing is published, nothing is written.")
    for run in done.runs:
        _say(
            f"{run.folder}: {run.variant.key}, {len(run.data) / 1e6:.1f} MB, sha256 {run.sha256}\n"
            f"  complete; {run.probe.correct} of {run.probe.images} stored images correct, logits differ by "
            f"{run.probe.difference:.1g} of the largest"
        )
        if (gain := run.report.gain) and gain.warning:
            _say(f"  Warning: {gain.warning}")
    if done.unreachable:
        _say(f"{done.unreachable}\nShown as if {repo} had nothing yet.")
    _say(f"{done.where}, {done.message}")
    if not done.written:
        _show_dry_run(done)
        return
    for key, revision in done.revisions.items():
        _say(f"  {key} at {revision}")
    _say(
        f"{done.manifest_file} has the rows: with FIXEFFICIENTNET_MANIFEST={done.manifest_file}, "
        f"create({done.runs[0].variant.key!r}, pretrained=True) loads them."
    )


def _show_dry_run(done: "PublishResult") -> None:
    for name, data in done.files.items():
        _say(f"  {name}  {len(data):,} bytes")
    if card := done.files.get("README.md"):
        _say("\nREADME.md:")
        print_text(card.decode())
    _say(f"{done.manifest_file}, but for the commit:")
    print_text(done.manifest, end="")
