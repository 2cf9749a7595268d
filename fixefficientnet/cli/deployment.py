"""`convert`, `merge`, `export`, `publish`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from fixefficientnet.cli.app import Flags, Output, UsageError, app, flags, made, out, print_text, whole_number
from fixefficientnet.options import ExportOptions, PublishOptions

if TYPE_CHECKING:
    from fixefficientnet.publishing.publish import PublishResult
    from fixefficientnet.publishing.whole_repository import WholeResult

    OptionFlags = ExportOptions
    PublishFlags = PublishOptions
else:
    OptionFlags = flags(ExportOptions)
    PublishFlags = flags(PublishOptions)


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
        checkpoint: A whole checkpoint, as a training script saved it.
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
    found = done.checkpoint
    out.say(
        f"{checkpoint}: {done.variant.key}, {len(found.tensors)} tensors; of the {found.outside} outside the head "
        f"{found.outside - len(found.differing)} are the backbone's (tolerance {conversion.TOLERANCE:g}), "
        f"{len(found.differing)} differ"
    )
    if not found.tuned:
        out.say("The head is the backbone's own too: nothing was tuned.")
    for name, difference in found.differing.items():
        out.say(f"  {name}: by up to {difference:.3g}")
    if full:
        out.say(f"{output}: the whole network, for timm's {done.variant.backbone.architecture}")
    else:
        out.say(
            f"{output}: {done.written} tensors, {done.bytes / 1e6:.1f} MB, test size {done.test.size}, "
            f"license {license}\nsha256 {done.sha256}"
        )


@app.command
def merge(
    model: str,
    /,
    *,
    output: Annotated[Path, Output],
    delta: str | None = None,
    license: str = "unknown",
    overwrite: bool = False,
) -> None:
    """Make one whole checkpoint of a model, which plain timm loads.

    A folder in the Hub's layout has the class names and the preprocessing too, and loads in transformers as well.

    Args:
        model: A variant, a run's folder, or any other model that `predict` takes.
        output: .safetensors, .pth, or a folder in the Hub's layout.
        delta: Of a variant: a delta's path, a run's folder, hf://…, or 'backbone'. Default: the published weights;
            'backbone' for lite0, lite1 and lite2.
        license: License of a network of your own, for the card; SPDX, lower case.
        overwrite: Replace the output if it is there; a folder keeps its other files.
    """
    from fixefficientnet.publishing import whole

    done = whole.merge(model, output, delta=delta, license=license, overwrite=overwrite)
    loaded, test = done.loaded, done.loaded.test
    said = f"{test.size} pixels, crop_pct {test.crop_pct:g}, {test.interpolation}, mean {test.mean}, std {test.std}"
    how = f"timm.create_model({loaded.timm_backbone!r}, checkpoint_path='{output}'"
    how += "" if loaded.variant else f", num_classes={loaded.num_classes}"
    how += f", img_size={test.size})" if loaded.saved else ")"
    how += f"\nIts preprocessing is not in the file: {said}."
    if done.folder:
        how = (
            f"timm.create_model('local-dir:{output}', pretrained=True)  # timm 1.0.16 or newer\n"
            f"transformers.pipeline('image-classification', model='{output}')\n"
            f"Its preprocessing is in config.json: {said}."
        )
    title = loaded.variant.title if loaded.variant else loaded.name
    weights = f"FixRes weights ({delta or 'published'})" if loaded.tuned else "the backbone's own weights"
    weights = weights if loaded.variant else f"{loaded.num_classes} classes"
    out.say(f"{output}: {title}, {weights}\n{how}")


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
    format: Literal["onnx", "openvino", "executorch", "torch-export", "torchscript", "aotinductor"] | None = None,
    options: Annotated[OptionFlags, Flags] = OptionFlags(),  # noqa: B008 - frozen
    calibration: Annotated[Int8, Flags] = Int8(),
    overwrite: bool = False,
) -> None:
    """Write a model as a file for another runtime, and check it there.

    The number of images is free. Preprocessing is in the file's metadata, labels are beside it.

    Args:
        model: A variant (b4_ns; b4_ns:backbone, b4_ns:FILE), or any other model that `predict` takes.
        output: The file: .onnx, .xml, .pte, .pt2 or .pt.
        format: Format of the file. Default: by the ending; .pt2 is torch-export.
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
    out.say(f"{output}: {done.name}, {done.format}, {size}, {done.bytes / 1e6:.1f} MB (with {more})")
    if done.int8:
        before, after = (100 * count / done.int8.images for count in (done.int8.before, done.int8.after))
        out.say(
            f"top-1 on the {done.int8.images} images of {calibration.data} that it was calibrated on: {before:.2f} "
            f"before, {after:.2f} after"
        )
    elif found := done.agreement:
        out.say(
            f"against eager: {done.output} differ by up to {found.difference:.2g} ({found.relative:.1g} of the "
            f"largest), same top-1 prediction for {found.top1:.0%} of {found.images} generated images"
        )
    else:
        out.say("Not checked: Core ML runs on Apple's systems alone. Export it on a Mac to have it checked.")


@app.command
def publish(
    *runs: Path,
    repo: Annotated[str, Parameter(allow_leading_hyphen=True)],
    options: Annotated[PublishFlags, Flags] = PublishFlags(),  # noqa: B008 - frozen
) -> None:
    """Check finished runs and publish them on the Hub.

    Runs of variants: one commit, one tag, with deltas, model card, models.json. A run of another network or of your own
    classes: a repository that timm and transformers load. Who may write there is huggingface_hub's business: `hf auth
    login`, or HF_TOKEN.

    Args:
        runs: Folders of finished runs, of different variants; or of one other network.
        repo: ORGANISATION/NAME on the Hub.
        options: Options of a publication.
    """
    if not runs:
        raise UsageError("Name the folder of a finished run.")
    from fixefficientnet.publishing.publish import publish as publish_runs

    chosen = made(PublishOptions, options)
    done = publish_runs(runs, repo, chosen)
    if chosen.dry_run:
        out.say("Dry run: nothing is published, nothing is written.")
    if done.deltas:
        _show_deltas(done.deltas, repo)
    for model in done.models:
        _show_model(model)


def _show_deltas(done: "PublishResult", repo: str) -> None:
    for run in done.runs:
        out.say(
            f"{run.folder}: {run.variant.key}, {len(run.data) / 1e6:.1f} MB, sha256 {run.sha256}\n"
            f"  complete; {run.probe.correct} of {run.probe.images} stored images correct, logits differ by "
            f"{run.probe.difference:.1g} of the largest"
        )
        if (gain := run.report.gain) and gain.warning:
            out.say(f"  Warning: {gain.warning}")
    if done.unreachable:
        out.say(f"{done.unreachable}\nShown as if {repo} had nothing yet.")
    out.say(f"{done.where}, {done.message}")
    if not done.written:
        card = done.files.get("README.md", b"").decode()
        _show_files({name: len(data) for name, data in done.files.items()}, card)
        out.say(f"{done.manifest_file}, but for the commit:")
        print_text(done.manifest, end="")
        return
    for key, revision in done.revisions.items():
        out.say(f"  {key} at {revision}")
    out.say(
        f"{done.manifest_file} has the rows: with FIXEFFICIENTNET_MANIFEST={done.manifest_file}, "
        f"create({done.runs[0].variant.key!r}, pretrained=True) loads them."
    )


def _show_model(done: "WholeResult") -> None:
    loaded, gain = done.loaded, done.report.gain
    out.say(f"{loaded.name}: {loaded.architecture}, {loaded.num_classes} classes, test size {loaded.test.size}")
    if gain and gain.warning:
        out.say(f"  Warning: {gain.warning}")
    if done.unreachable:
        out.say(f"{done.unreachable}\nShown as if {done.repository} had nothing yet.")
    at = f" at {done.revision}" if done.revision else ""
    where = f"{done.folder} ({done.repository})" if done.folder else done.repository
    out.say(f"{where}{at}{'' if done.files else ': all was there already'}")
    _show_files(done.files, "" if done.written else done.card)
    if done.written:
        place = f"local-dir:{done.folder}" if done.folder else f"hf-hub:{done.repository}"
        out.say(f"timm.create_model({place!r}, pretrained=True) loads it.")


def _show_files(files: Mapping[str, int], card: str) -> None:
    for name, size in files.items():
        out.say(f"  {name}  {size:,} bytes")
    if card:
        out.say("\nREADME.md:")
        print_text(card)
