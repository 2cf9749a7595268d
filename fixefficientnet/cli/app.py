"""What the commands share: the application, where it speaks, JSON."""

import io
import json
import sys
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fixefficientnet._internal import processes, requirements
from fixefficientnet._version import __version__

app = typer.Typer(
    help="FixEfficientNet: pretrained EfficientNets, tuned for their test size by FixRes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's table of options has no room for their names in 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False, quiet=processes.rank() > 0)  # the first process speaks for all
err = Console(stderr=True, highlight=False)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Engine = Annotated[str, typer.Option(help="What computes: eager (PyTorch), compile, onnx or openvino.")]

MixedPrecision = Annotated[str, typer.Option(help="no, bf16 or fp16.")]

Fast = Annotated[
    bool,
    typer.Option("--fast-preprocessing", help="From JPEG to tensor in half the time, with slightly other pixels."),
]


def show_what_can_be_shown() -> None:
    """Shows a question mark for each letter that a terminal's encoding lacks, where Python would end with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")


def print_json(value: object) -> None:
    """Prints JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, default=str))


def table(*columns: str, title: str | None = None) -> Table:
    """A table for 80 columns: the first column is text, the others are figures and keep to one line."""
    made = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    first, *others = columns
    made.add_column(first, overflow="fold")
    for column in others:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if context.invoked_subcommand not in ("list", "info"):  # which need no model
        requirements.need(*requirements.MODELS)
