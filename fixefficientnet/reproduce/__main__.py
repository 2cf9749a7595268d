"""`python -m fixefficientnet.reproduce`: each option fills a field of the recipe or of the run's options."""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

from fixefficientnet import manifest
from fixefficientnet._internal import processes, requirements

requirements.need_for_command_line()  # before these are imported: old ones may fail at that

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fixefficientnet.cli.app import show_what_can_be_shown, table
from fixefficientnet.errors import FixEfficientNetError, RecipeError, UnknownVariantError

EXTRA = "pip install 'fixefficientnet[reproduce]'"

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's table of options has no room for their names in 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
err = Console(stderr=True, highlight=False)


@app.command()
def reproduce(
    variants: Annotated[
        list[str] | None, typer.Argument(help="Variants (b2, b4_ns) or wildcards ('*_ns'); one after the other.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder with train/ and val/, one folder per class in each; or hfds/NAME, torch/NAME, wds/NAME."
        ),
    ] = None,
    data_root: Annotated[
        str | None, typer.Option(help="Where a named dataset lies or is cached, such as wds/ shards.")
    ] = None,
    train_split: Annotated[str, typer.Option(help="Split to train on.")] = "train",
    val_split: Annotated[str, typer.Option(help="Split to measure on.")] = "validation",
    all_: Annotated[bool, typer.Option("--all", help="All 18 variants of the paper.")] = False,
    backbone: Annotated[str | None, typer.Option(help="Any timm CNN instead of a variant, by its timm name.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of your own to start from (.safetensors or .pth).")
    ] = None,
    no_pretrained: Annotated[
        bool, typer.Option("--no-pretrained", help="Start from random weights (base stage).")
    ] = False,
    stage: Annotated[str | None, typer.Option(help="fixres, or base: the training before it.")] = None,
    method: Annotated[str | None, typer.Option(help="online (the paper's) or cached. Default: the recipe's.")] = None,
    tune: Annotated[str | None, typer.Option(help="all, classifier, bn or bn-stats.")] = None,
    train_size: Annotated[int | None, typer.Option(help="Size it was trained at, in pixels.")] = None,
    test_size: Annotated[int | None, typer.Option(help="Size to tune it for, in pixels.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides every random draw.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other field of the recipe; repeatable.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for runs.")] = Path("runs"),
    experiment: Annotated[str | None, typer.Option(help="The run's folder in it. Default: the variant.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what an earlier run left in the folder.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Train nothing; print what it would take.")] = False,
    throughput: Annotated[
        float | None, typer.Option(help="For --plan: what a device sustains, in GMAC/s (images/s x GMACs each).")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="For --plan: how many devices share a batch.")] = 1,
    workers: Annotated[int, typer.Option("--workers", "-j", min=0, help="Loading processes per device.")] = 4,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="Of the frozen part: no, bf16 or fp16.")] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the frozen part.")] = False,
    sync_bn: Annotated[bool | None, typer.Option("--sync-bn", help="Synchronise the norm's statistics (CUDA).")] = None,
    auto_batch: Annotated[bool, typer.Option("--auto-batch", help="Halve the batch when memory runs out.")] = False,
    keep_features: Annotated[
        bool, typer.Option("--keep-features", help="Keep cached features, for other runs under --output to use.")
    ] = False,
    max_unreadable: Annotated[float, typer.Option(min=0, max=1, help="Tolerated share of bad images.")] = 0.01,
    checkpoint_steps: Annotated[int, typer.Option(min=1, help="Save after so many steps.")] = 1000,
    checkpoint_minutes: Annotated[float, typer.Option(min=0, help="Save after so many minutes.")] = 10.0,
) -> None:
    """Fine-tune a network's classifier and last batch norm at its test size (FixRes).

    The same command goes on where a killed run was. On several devices:

    \b
      torchrun --nproc-per-node N -m fixefficientnet.reproduce …
      accelerate launch -m fixefficientnet.reproduce …
    """  # noqa: D301 - a backspace tells click to leave the lines as they are
    from fixefficientnet import models
    from fixefficientnet.reproduce import recipe as recipes

    subjects = _subjects(variants or [], all_, backbone)
    choices = {
        "stage": stage,
        "method": method,
        "tune": tune,
        "train_size": train_size,
        "test_size": test_size,
        "seed": seed,
        "mixed_precision": mixed_precision,
        "sync_bn": sync_bn,
    }
    if throughput is not None and not (math.isfinite(throughput) and throughput > 0):
        raise typer.BadParameter(f"--throughput {throughput}: it is a number above 0, in GMAC/s.")
    if checkpoint is not None:
        described = models.description(checkpoint)
        choices["train_size"] = train_size or described.get("train_size")
    if plan:
        planned = [recipes.resolve(subject, choices, set_ or []) for subject in subjects]
        _print_plan(planned, throughput, devices, (data, data_root, train_split, val_split))
        return
    if data is None:
        raise typer.BadParameter(
            "--data is missing: a folder with train/ and val/ in it, or hfds/NAME, torch/NAME, wds/NAME."
        )
    if len(subjects) > 1 and (experiment or checkpoint):
        raise typer.BadParameter("--experiment and --checkpoint go with one network only.")
    from fixefficientnet.reproduce.run import Data, Options, run, weights_of

    choices["weights"] = weights_of(checkpoint, not no_pretrained)
    resolved = [recipes.resolve(subject, choices, set_ or []) for subject in subjects]
    if no_pretrained and resolved[0].stage != "base":
        raise RecipeError("FixRes tunes a trained network: --no-pretrained goes with --stage base only.")
    accelerator = processes.accelerator(device, resolved[0].mixed_precision)
    where = Data(data, data_root, train_split, val_split)
    for subject, recipe in zip(subjects, resolved, strict=True):
        name = experiment or (subject.folder + ("-base" if recipe.stage == "base" else ""))
        options = Options(
            folder=output / name,
            checkpoint=checkpoint,
            workers=workers,
            compile=compile_,
            features=output / "features" if keep_features else None,
            auto_batch=auto_batch,
            overwrite=overwrite,
            max_unreadable=max_unreadable,
            checkpoint_steps=checkpoint_steps,
            checkpoint_minutes=checkpoint_minutes,
        )
        run(subject, recipe, where, options, accelerator)
        if accelerator.is_main_process:
            Console(highlight=False).print(escape(f"{output / name}/report.md"), soft_wrap=True)


def _subjects(names: list[str], everything: bool, backbone: str | None) -> list[Any]:
    from fixefficientnet.reproduce import recipe as recipes

    if sum((bool(names), everything, backbone is not None)) != 1:
        raise typer.BadParameter(
            "Give one of these, and one alone: names of variants, --all, or --backbone with a timm name."
        )
    if backbone:
        return [recipes.subject_of_backbone(backbone.removeprefix("timm/"))]
    paper = [key for key, variant in manifest.load().items() if variant.paper]
    keys = paper if everything else []
    for name in names:
        if any(sign in name for sign in "*?["):
            found = manifest.list_models(name)
            if not found:
                raise typer.BadParameter(f"No variant matches {name!r}.")
            keys += found
        else:
            keys.append(manifest.find(name).key)
    return [recipes.subject_of_variant(manifest.find(key)) for key in dict.fromkeys(keys)]


def _print_plan(
    planned: list[Any], throughput: float | None, devices: int, where: tuple[str | None, str | None, str, str]
) -> None:
    from fixefficientnet.reproduce import plan

    images, num_classes = plan.IMAGENET, 1000
    if where[0] is not None:
        from fixefficientnet.data.dataset import open_dataset

        train, validation = (open_dataset(where[0], split, root=where[1]) for split in where[2:])
        images = len(train), len(validation)
        num_classes = 1000 if train.imagenet else len(train.classes) or 1000
    plans = [plan.plan(recipe, images=images, num_classes=num_classes, devices=devices) for recipe in planned]
    console = Console(highlight=False)
    if len(plans) == 1:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in plan.describe(plans[0], throughput).items():
            grid.add_row(label, escape(text))
        console.print(grid)
        return
    header, *rows = plan.as_table(plans, throughput)
    shown = table(*header)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    console.print(
        f"For {images[0]:,} images to train on, {images[1]:,} to measure on. trained: values that change. GMACs: "
        "billions of multiply-adds per image. memory: tensors per device, float32. "
        + ("hours: of one device." if throughput else "EMACs: 10^18 multiply-adds in all; hours with --throughput.")
    )


def main() -> None:
    """Runs the command; an error of this package becomes one message and status 1, a signal its own status."""
    try:
        show_what_can_be_shown()
        requirements.need(*requirements.MODELS)
        app()
    except (FixEfficientNetError, OSError) as error:
        rank = processes.rank()
        of_the_command = isinstance(error, RecipeError | UnknownVariantError)  # which all processes were given alike
        if not getattr(error, "said_elsewhere", of_the_command and rank > 0):
            where = f" (process {rank})" if rank else ""
            text = str(error)
            if isinstance(error, OSError) and not isinstance(error, FixEfficientNetError):
                text = f"{error.filename or 'Writing'}: {error.strerror}. Once that is fixed, the same command goes on."
            err.print(f"[red]Error{where}:[/] {escape(text)}", soft_wrap=True)
        processes.leave(1)
    except ModuleNotFoundError as error:
        if error.name not in ("accelerate", "matplotlib", "tensorboard", "torchmetrics"):
            raise
        err.print(f"[red]Error:[/] Fine-tuning needs {error.name}: {escape(EXTRA)}", soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        from fixefficientnet.reproduce.session import Interrupted

        if not isinstance(error, Interrupted):
            raise
        if not getattr(error, "said_elsewhere", False):
            err.print(f"{error} The same command goes on from here.")
        processes.leave(128 + error.number)


if __name__ == "__main__":
    main()
