"""`reproduce`: fine-tuning runs."""

import math
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape

from fixefficientnet.cli.app import Output, UsageError, app, flags, grid, made, out, print_table, whole_number
from fixefficientnet.errors import RecipeError, RunError
from fixefficientnet.reproduce import recipe as recipes
from fixefficientnet.reproduce.options import Data, Options

if TYPE_CHECKING:
    from fixefficientnet.reproduce.plan import Plan
    from fixefficientnet.reproduce.recipe import Recipe, Subject

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
class Estimate:
    """What a run would take.

    Attributes:
        plan: Train nothing; print what it would take.
        throughput: For --plan: what a device sustains, in GMAC/s (images/s x GMACs each).
        devices: For --plan: how many devices share a batch.
    """

    plan: bool = False
    throughput: float | None = None
    devices: Annotated[int, Parameter(converter=whole_number)] = 1

    def check(self) -> None:
        """Refuses numbers out of range."""
        if self.throughput is not None and not (math.isfinite(self.throughput) and self.throughput > 0):
            raise UsageError(f"--throughput {self.throughput}: it is a number above 0, in GMAC/s.")
        if self.devices < 1:
            raise UsageError(f"--devices {self.devices}: it is a number of at least 1.")


@app.command
def reproduce(
    *variants: str,
    start: Annotated[Start, Parameter(name="*", group="Start")] = Start(),
    data: Annotated[Data | None, Parameter(name="*", group="Images")] = None,
    choices: Annotated[Choices | None, Parameter(name="*", group="Recipe (default: recipes.toml)")] = None,
    place: Annotated[Place, Parameter(name="*", group="Place")] = Place(),
    options: Annotated[OptionFlags, Parameter(name="*", group="Run")] = OptionFlags(),  # noqa: B008
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
        estimate: What a run would take.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run saves what it has done as it goes
    if sum((bool(variants), start.all, start.backbone is not None)) != 1:
        raise UsageError("Give one of these, and one alone: names of variants, --all, or --backbone with a timm name.")
    estimate.check()
    subjects = recipes.subjects(list(variants), start.backbone)
    chosen: dict[str, Any] = asdict(choices) if choices else {}
    if estimate.plan:
        from fixefficientnet.reproduce.plan import plan_runs

        planned = [recipes.resolve(subject, chosen) for subject in subjects]
        _print_plans(
            plan_runs(planned, data, estimate.devices, made(Options, options).val_interval), estimate.throughput
        )
        return
    if data is None:
        raise UsageError("--data is missing: a folder with train/ and val/ in it, or hfds/NAME, torch/NAME, wds/NAME.")
    if start.no_pretrained and start.checkpoint:
        raise UsageError("--no-pretrained and --checkpoint exclude each other.")
    if len(subjects) > 1 and (place.experiment or start.checkpoint):
        raise UsageError("--experiment and --checkpoint go with one network only.")
    _run_all(subjects, chosen, start, data, place, made(Options, options))


def _run_all(
    subjects: "list[Subject]", chosen: dict[str, Any], start: Start, data: Data, place: Place, options: Options
) -> None:
    from fixefficientnet._internal import processes, requirements

    try:
        requirements.need("accelerate", "jinja2", "matplotlib", "tensorboard", "torchmetrics")
    except ModuleNotFoundError as error:
        extra = "pip install 'fixefficientnet[reproduce]'"
        raise RunError(f"Fine-tuning needs {error.name}: {extra}") from None
    from fixefficientnet.models import checkpoint_of
    from fixefficientnet.reproduce.run import Job, run, with_weights

    checkpoint = start.checkpoint and checkpoint_of(start.checkpoint.expanduser())
    chosen = with_weights(chosen, checkpoint, pretrained=not start.no_pretrained)
    if chosen.get("stage") != "base" and chosen.get("mixed_precision") is None:
        chosen["mixed_precision"] = processes.usual_precision(place.device)
    resolved = [recipes.resolve(subject, chosen) for subject in subjects]
    if start.no_pretrained and resolved[0].stage != "base":
        raise RecipeError("FixRes tunes a trained network: --no-pretrained goes with --stage base only.")
    accelerator = processes.accelerator(place.device, resolved[0].mixed_precision)
    for subject, recipe in zip(subjects, resolved, strict=True):
        folder = place.folder(subject, recipe)
        features = place.output / "features" if place.keep_features else None
        run(Job(subject, recipe, data, folder, checkpoint, features, options), accelerator)
        out.print(escape(f"{folder}/report.md, {folder}/report.html"), soft_wrap=True)


def _print_plans(plans: "list[Plan]", throughput: float | None) -> None:
    from fixefficientnet.reproduce.plan import as_table, describe

    console = Console(highlight=False)
    if len(plans) == 1:
        shown = grid()
        for label, text in describe(plans[0], throughput).items():
            shown.add_row(label, escape(text))
        console.print(shown)
        return
    header, *rows = as_table(plans, throughput)
    print_table(header, rows, to=console)
    train, validation = plans[0].images
    console.print(
        f"For {train:,} images to train on, {validation:,} to measure on. trained: values that change. GMACs: billions "
        "of multiply-adds per image. memory: tensors per device. "
        + ("hours: of one device." if throughput else "EMACs: 10^18 multiply-adds in all; hours with --throughput.")
    )
