"""`reproduce`: fine-tuning runs."""

import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.markup import escape

from fixefficientnet import manifest
from fixefficientnet._internal import processes, requirements
from fixefficientnet.cli.app import Output, UsageError, app, flags, made, out, print_labelled, print_table, whole_number
from fixefficientnet.errors import RecipeError, RunError
from fixefficientnet.options import PublishOptions
from fixefficientnet.reproduce import recipe as recipes
from fixefficientnet.reproduce.options import Data, Options

if TYPE_CHECKING:
    from fixefficientnet.publishing.series import Repository
    from fixefficientnet.reproduce.plan import Plan
    from fixefficientnet.reproduce.recipe import Recipe, Subject
    from fixefficientnet.reproduce.table import Row

    Choices = Any
    OptionFlags = Options
else:
    Choices = flags(recipes.Recipe, leave_out=recipes.GIVEN, optional=True)
    OptionFlags = flags(Options, short={"workers": "-j"})


@dataclass(frozen=True)
class Start:
    """What to start from.

    Attributes:
        all: All 18 variants of the paper.
        backbone: Any classifier of timm instead of a variant, by its timm name.
        checkpoint: Weights of your own to start from: the folder of a run, a .safetensors or a .pth.
        no_pretrained: Start from random weights (base stage).
    """

    all: bool = False
    backbone: str | None = None
    checkpoint: Path | None = None
    no_pretrained: bool = False


@dataclass(frozen=True)
class Place:
    """Where a run is kept, and where it computes.

    Attributes:
        output: Folder for runs.
        experiment: Folder of the run in it. Default: the variant.
        keep_features: Keep cached features, for other runs under --output to use.
        device: Device to compute on. Default: cuda if there is one.
    """

    output: Annotated[Path, Output] = Path("runs")
    experiment: str | None = None
    keep_features: bool = False
    device: Literal["cpu", "cuda"] | None = None

    def folder(self, subject: "Subject", recipe: "Recipe") -> Path:
        """Folder of a run."""
        if self.experiment and (Path(self.experiment).name != self.experiment or self.experiment == ".."):
            raise UsageError(f"--experiment {self.experiment}: it is the name of a folder in --output, and no path.")
        return self.output / (self.experiment or subject.folder + ("-base" if recipe.stage == "base" else ""))


@dataclass(frozen=True)
class Publishing:
    """Where finished runs of variants are published.

    Attributes:
        publish: Publish each variant as it finishes: ORGANISATION/NAME on the Hub. What is there already is not run.
        manifest: Manifest that gets the rows of what is published. Default: weights_manifest.json.
        private: Make the repository private, if it is made.
    """

    publish: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None
    manifest: Path | None = None
    private: bool = False

    def repository(self, resolved: "list[Recipe]") -> "Repository | None":
        """The repository for runs of these recipes; None where nothing is published."""
        from fixefficientnet.publishing.series import Repository

        if self.publish is None:
            if self.manifest or self.private:
                raise UsageError("--manifest and --private go with --publish.")
            return None
        known = manifest.load()
        if not all(one.variant in known and one.stage == "fixres" and one.weights == "pretrained" for one in resolved):
            raise UsageError(
                "--publish takes variants with their own weights. A network of your own is published when its run is "
                "finished: fixefficientnet publish FOLDER --repo ORGANISATION/NAME."
            )
        return Repository(self.publish, PublishOptions(manifest=self.manifest, private=self.private))


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        plan: Train nothing; print what it would take.
        gpu: For --plan: hours on such a GPU, with -j loading processes per device (16 if none are given).
        devices: For --plan: how many devices share a batch.
    """

    plan: bool = False
    gpu: Literal["h100", "a100", "a10g", "4090"] | None = None
    devices: Annotated[int, Parameter(converter=whole_number)] = 1

    def check(self) -> None:
        """Refuses numbers out of range, and what goes with a plan only."""
        if self.devices < 1:
            raise UsageError(f"--devices {self.devices}: it is a number of at least 1.")
        if self.gpu and not self.plan:
            raise UsageError("--gpu goes with --plan.")


@app.command
def reproduce(
    *variants: str,
    start: Annotated[Start, Parameter(name="*", group="Start")] = Start(),
    data: Annotated[Data | None, Parameter(name="*", group="Images")] = None,
    choices: Annotated[Choices | None, Parameter(name="*", group="Recipe (default: recipes.toml)")] = None,
    place: Annotated[Place, Parameter(name="*", group="Place")] = Place(),
    options: Annotated[OptionFlags, Parameter(name="*", group="Run")] = OptionFlags(),  # noqa: B008
    publishing: Annotated[Publishing, Parameter(name="*", group="Publish")] = Publishing(),
    estimate: Annotated[Estimate, Parameter(name="*", group="Estimate")] = Estimate(),
) -> None:
    """Fine-tune a network's classifier and last norm at its test size (FixRes).

    The same command continues a killed run. On several devices:

    - torchrun --nproc-per-node N -m fixefficientnet.reproduce …
    - accelerate launch -m fixefficientnet.reproduce …

    Args:
        variants: Variants (b2, b4_ns) or wildcards ('*_ns'); one after the other.
        start: What to start from.
        data: The images.
        choices: Fields of the recipe. Default: those of recipes.toml.
        place: Where a run is kept, and where it computes.
        options: What does not decide the result.
        publishing: Where finished runs of variants are published.
        estimate: What a run would take.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run saves what it has done as it goes
    if sum((bool(variants), start.all, start.backbone is not None)) != 1:
        raise UsageError("Give one of these, and one alone: names of variants, --all, or --backbone with a timm name.")
    estimate.check()
    subjects = recipes.subjects(list(variants), start.backbone)
    chosen: dict[str, Any] = asdict(choices) if choices else {}
    try:
        requirements.need("accelerate", "jinja2", "matplotlib", "tensorboard", "torchmetrics")
    except ModuleNotFoundError as error:
        raise RunError(f"Fine-tuning needs {error.name}: pip install 'fixefficientnet[reproduce]'") from None
    if start.no_pretrained and start.checkpoint:
        raise UsageError("--no-pretrained and --checkpoint exclude each other.")
    if len(subjects) > 1 and (place.experiment or start.checkpoint):
        raise UsageError("--experiment and --checkpoint go with one network only.")
    if estimate.plan and publishing.publish:
        raise UsageError("--plan runs nothing: --publish does not go with it.")
    if data is None and not estimate.plan:
        raise UsageError("--data is missing: a folder with train/ and val/ in it, or hfds/NAME, torch/NAME, wds/NAME.")
    chosen_options = made(Options, options)  # before a checkpoint is read
    from fixefficientnet.models import checkpoint_of
    from fixefficientnet.reproduce.run import with_weights

    checkpoint = start.checkpoint and checkpoint_of(start.checkpoint.expanduser())
    chosen = with_weights(chosen, checkpoint, pretrained=not start.no_pretrained)
    if estimate.plan:
        _plan(subjects, chosen, data, chosen_options, estimate)
    elif data:
        _run_all(subjects, chosen, checkpoint, data, place, publishing, chosen_options)


def _run_all(
    subjects: "list[Subject]",
    chosen: dict[str, Any],
    checkpoint: Path | None,
    data: Data,
    place: Place,
    publishing: Publishing,
    options: Options,
) -> None:
    from fixefficientnet.publishing.series import Series
    from fixefficientnet.reproduce.run import Job

    if chosen.get("stage") != "base" and chosen.get("mixed_precision") is None:
        chosen["mixed_precision"] = processes.usual_precision(place.device)
    resolved = [recipes.resolve(subject, chosen) for subject in subjects]
    if chosen["weights"] == "random" and resolved[0].stage != "base":
        raise RecipeError("FixRes tunes a trained network: --no-pretrained goes with --stage base only.")
    repository = publishing.repository(resolved)
    accelerator = processes.accelerator(place.device, resolved[0].mixed_precision)
    features = place.output / "features" if place.keep_features else None
    jobs = [
        Job(subject, recipe, data, place.folder(subject, recipe), checkpoint, features, options)
        for subject, recipe in zip(subjects, resolved, strict=True)
    ]
    several = len(jobs) > 1 and resolved[0].stage == "fixres"
    Series(jobs, accelerator, place.output, repository, _show if several or repository else None).run()


def _show(rows: "Sequence[Row]") -> None:
    from fixefficientnet.reproduce.table import HEADER

    print_table(HEADER, [row.cells() for row in rows])


def _plan(
    subjects: "list[Subject]", chosen: dict[str, Any], data: Data | None, options: Options, asked: Estimate
) -> None:
    """Prints what runs would take."""
    from fixefficientnet.reproduce import estimate, plan

    def plans(**more: Any) -> "list[Plan]":
        resolved = [recipes.resolve(subject, chosen | more) for subject in subjects]
        return plan.plan_runs(resolved, data, asked.devices, options.val_interval)

    if asked.gpu is None:
        _print_plans(plans())
        return
    if chosen.get("stage") != "base" and chosen.get("mixed_precision") is None:
        chosen = chosen | {"mixed_precision": "bf16"}  # as a run on these chooses by itself
    one = chosen.get("method") or ("online" if chosen.get("stage") == "base" else None)
    workers = estimate.WORKERS if options.workers is None else options.workers
    by_method, refused = {}, {}
    for method in [one] if one else ["online", "cached"]:
        try:
            by_method[method] = [estimate.estimate(each, asked.gpu, workers) for each in plans(method=method)]
        except RecipeError as error:
            refused[method] = error
    if not by_method:
        raise next(iter(refused.values()))
    for method, why in refused.items():
        out.print(escape(f"Not {method}: {why}"))
    first = next(iter(by_method.values()))[0]
    if len(subjects) == 1:
        _print_plans([first.plan])
    header, *rows = estimate.as_table(by_method)
    print_table(header, rows)
    train, validation = first.plan.images
    out.print(
        f"Estimated, not measured: device-hours of one {first.gpu.title}, with {workers or 'no'} loading processes on "
        f"{workers or 1} core{'s' * (workers > 1)}, for {train:,} images to train on and {validation:,} to measure on. "
        "computed/s: images that the GPU computes forward at that size; loaded/s: that the cores bring; the hours say "
        "which of the two they wait for. memory: tensors per device; ! where they exceed the GPU's. Where the rates "
        "are from: gpus.toml."
    )


def _print_plans(plans: "list[Plan]") -> None:
    from fixefficientnet.reproduce.plan import as_table, describe

    if len(plans) == 1:
        print_labelled(describe(plans[0]))
        return
    header, *rows = as_table(plans)
    print_table(header, rows)
    train, validation = plans[0].images
    out.print(
        f"For {train:,} images to train on, {validation:,} to measure on. trained: values that change. GMACs: billions "
        "of multiply-adds per image. memory: tensors per device. EMACs: 10^18 multiply-adds in all. Hours: --gpu."
    )
