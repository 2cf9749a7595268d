"""What the commands share: the application, its consoles, JSON and tables."""

import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import cyclopts
from cyclopts import Parameter
from rich import box
from rich.markup import escape
from rich.table import Table

from fixefficientnet._internal import processes
from fixefficientnet._internal.console import Console
from fixefficientnet._internal.files import write_atomically, write_text
from fixefficientnet._internal.text import inert, inert_lines
from fixefficientnet._version import __version__
from fixefficientnet.errors import FixEfficientNetError

app = cyclopts.App(
    name="fixefficientnet",
    help="FixEfficientNet: pretrained EfficientNets, tuned for their test size by FixRes.",
    help_flags=("--help", "-h"),
    help_format="markdown",
    version=__version__,
    version_flags=("--version",),
    default_parameter=Parameter(
        negative=(),
        allow_repeating=True,  # of a flag that is given twice, the last counts
        show_default=lambda value: None if value is False else value,
    ),
)
app.register_install_completion_command(help="Complete commands and options in bash, zsh or fish.")
out = Console(highlight=False, quiet=processes.rank() > 0)  # the first process speaks for all
err = Console(stderr=True, highlight=False)

_SHORTEST = 8
"""Least width that a text is cut to."""
T = TypeVar("T")
Flags = Parameter(name="*")
"""For a dataclass, each field of which becomes a flag."""
AsJson = Annotated[bool, Parameter(name="--json")]
Output = Parameter(name=("--output", "-o"))


def whole_number(kind: Any, tokens: Any) -> int:
    """Reads a whole number, where cyclopts would round 1.5.

    Raises:
        ValueError: It is none.
    """
    text = tokens[0].value
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is no whole number") from None


def flags(
    cls: type, *, short: Mapping[str, str] | None = None, leave_out: Sequence[str] = (), optional: bool = False
) -> Any:
    """A dataclass of flags: those of the fields of another one, with its types, defaults and docstring.

    The library's dataclasses need no cyclopts so, and whole numbers are read as such. Some fields have short names,
    and some are left out. If the flags are optional, one that is not given is None.
    """
    hints, found = get_type_hints(cls, include_extras=True), []
    for one in fields(cls):
        if one.name in leave_out:
            continue
        long = f"--{one.name.replace('_', '-')}"
        # int of Annotated[int, …] and of int | None
        kinds = {getattr(part, "__origin__", part) for part in (hints[one.name], *get_args(hints[one.name]))}
        parameter = Parameter(
            name=(long, short[one.name]) if short and one.name in short else None,
            converter=whole_number if int in kinds else None,
            negative=f"--no-{long[2:]}" if bool in kinds and (optional or one.default is None) else (),
        )
        kind: Any = hints[one.name] | None if optional else hints[one.name]
        default: Any = None if optional else one.default
        found.append((one.name, Annotated[kind, parameter], field(default=default)))
    made_of_flags = make_dataclass(cls.__name__, found, frozen=True)
    made_of_flags.__doc__, made_of_flags.__module__ = cls.__doc__, __name__
    return made_of_flags


def made(cls: type[T], given: object, **more: Any) -> T:
    """The dataclass that flags stand for, with the fields that are no flags."""
    return cls(**vars(given), **more)


class UsageError(Exception):
    """The arguments of a command do not go together; the message says which."""


def show_what_can_be_shown() -> None:
    """Shows a question mark for each letter that a terminal's encoding lacks, where Python would end with an error.

    UTF-8 lacks the bytes of file names that are no text, which it escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="backslashreplace" if utf8 else "replace")


def print_text(text: str, end: str = "\n") -> None:
    """Prints on stdout as it is, for programs; on a terminal, control characters as Python writes them."""
    sys.stdout.write((inert_lines(text) if sys.stdout.isatty() else text) + end)
    sys.stdout.flush()


def print_json(value: object) -> None:
    """Prints JSON on stdout."""
    print_text(json.dumps(value, indent=2, default=str))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, to: Console = out
) -> None:
    """Prints a table: the first column is text, the others are figures and keep to one line.

    A text that is too long for the console loses its beginning, which of a path tells least, and stands whole below.
    """
    cells = [[inert(cell) for cell in row] for row in rows]
    names = dict.fromkeys(row[0] for row in cells)
    unlimited = to.options.update(width=10_000)
    excess = to.measure(_table(columns, cells, title), options=unlimited).maximum - to.width
    width = max(map(len, (columns[0], *names))) - excess
    short = {name: shortened(name, width) for name in names}
    if excess <= 0 or width < _SHORTEST or len({*short.values()}) < len(short):  # else it is folded
        short = {name: name for name in names}
    to.print(_table(columns, [(short[first], *others) for first, *others in cells], title))
    for name, beginning_lost in short.items():
        if beginning_lost != name:
            to.say(f"{beginning_lost}: {name}")


def shortened(text: str, width: int) -> str:
    """A text without its beginning, where it is longer than a width."""
    return text if len(text) <= width else f"…{text[1 - width :]}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None) -> Table:
    made = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    first, *others = columns
    made.add_column(first, overflow="fold")
    for column in others:
        made.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def print_labelled(texts: Mapping[str, str], *, to: Console = out) -> None:
    """Prints texts, each beside its label in bold."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for label, text in texts.items():
        made.add_row(label, escape(text))
    to.print(made)


def check_writable(path: Path) -> None:
    """Refuses a file that cannot be written, before anything is computed.

    Raises:
        FixEfficientNetError: It is a folder, or what it is in is none.
    """
    if path.is_dir() or not next(folder for folder in path.absolute().parents if folder.exists()).is_dir():
        raise FixEfficientNetError(f"{path} cannot be written: it is a folder, or what it is in is none.")


def write_file(path: Path, content: bytes | Iterable[str]) -> None:
    """Writes what a command was asked to write; pieces of a text as they come.

    Raises:
        FixEfficientNetError: It cannot be written.
    """
    try:
        if isinstance(content, bytes):
            write_atomically(path, content)
        else:
            write_text(path, _apart(content))
    except _NotOfWritingError as error:
        raise error.error from None
    except OSError as error:
        raise FixEfficientNetError(f"{path} cannot be written: {error.strerror or error}.") from error


class _NotOfWritingError(Exception):
    def __init__(self, error: OSError):
        self.error = error


def _apart(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces of a text whose making may fail for reasons that the written file has no part in."""
    try:
        yield from pieces
    except OSError as error:
        raise _NotOfWritingError(error) from error
