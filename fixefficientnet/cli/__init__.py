"""The command line: each command calls one function of the package.

`list`, `info`, `env` and `--help` import no torch.
"""

import contextlib
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from fixefficientnet._internal import processes, requirements
from fixefficientnet._internal.files import WRITING

requirements.need_for_command_line()  # before these are imported: old ones may fail at that

from cyclopts import CycloptsError
from rich.markup import escape

from fixefficientnet.cli.app import UsageError, app, err, show_what_can_be_shown
from fixefficientnet.cli.suggestions import explain
from fixefficientnet.errors import (
    FixEfficientNetError,
    Interrupted,
    OptionError,
    RecipeError,
    UnknownVariantError,
    redacted,
)

# the modules add their commands, which stand in this order in --help
# isort: off
from fixefficientnet.cli import zoo, prediction, demo, evaluation, reproduce, deployment, environment  # noqa: F401
# isort: on

_EXTRAS = dict.fromkeys(("accelerate", "jinja2", "matplotlib", "torchmetrics"), "evaluate")
_EXTRAS |= dict.fromkeys(("onnx", "onnxruntime", "onnxscript", "sympy"), "onnx")
_EXTRAS |= dict.fromkeys(("nncf", "openvino"), "openvino")
_EXTRAS |= {"executorch": "executorch", "gradio": "demo"}
_WITHOUT_MODELS = (zoo.list_, zoo.info, environment.env)

_OBJECTS_BETWEEN_COLLECTIONS = 100_000
"""Importing torch and timm makes hundreds of thousands of objects that stay: looking for garbage there takes 0.3 s."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line, by default with the arguments of the process, and ends the process.

    An error of this package becomes one message and the status 1, wrong arguments the status 2, a signal its own.
    """
    show_what_can_be_shown()
    sys.excepthook = _without_secrets
    _speak_of_fatal_signals()
    status = 0
    try:
        with _settings_of_the_process():
            _run(sys.argv[1:] if arguments is None else list(arguments))
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        status, text = _outcome(error)
        # an error of all processes alike is told by the first one
        if text and not getattr(error, "said_elsewhere", isinstance(error, _ALIKE) and processes.rank() > 0):
            _say(text)
    if status and processes.several():
        processes.leave(status)
    sys.exit(status)


def _speak_of_fatal_signals() -> None:
    """Lets Python say where a signal ends it: SIGBUS, for one, where a file shrinks that weights are mapped from."""
    if not faulthandler.is_enabled() and sys.stderr is sys.__stderr__:
        with contextlib.suppress(ValueError, OSError):  # a stderr that is no file
            faulthandler.enable()


def _without_secrets(*raised: Any) -> None:
    """Shows the traceback of an error that nobody expected, as Python does, but for what is secret."""
    sys.stderr.write(redacted("".join(traceback.format_exception(*raised))))


def _in_a_thread(raised: threading.ExceptHookArgs) -> None:
    """Shows what ended a thread; a full disk in one line, as whoever waits for what the thread writes fails too."""
    if isinstance(raised.exc_value, OSError) and raised.exc_value.errno in WRITING:
        _say(_outcome(raised.exc_value)[1])
    elif raised.exc_type is not SystemExit:
        _without_secrets(raised.exc_type, raised.exc_value, raised.exc_traceback)


_ALIKE = (CycloptsError, UsageError, OptionError, RecipeError, UnknownVariantError)
"""What is wrong with the arguments, which all processes were given alike."""


def _outcome(error: BaseException) -> tuple[int, str]:
    """The status that an error ends the process with, and what is said; raises what is no error of a user's."""
    match error:
        case CycloptsError():
            return 2, f"{explain(error)}\nTry --help."
        case UsageError() | OptionError() | RecipeError():
            return 2, f"{error}\nTry --help."
        case FixEfficientNetError():
            return 1, str(error)
        case Interrupted():
            return 128 + error.number, f"{error} The same command continues from here (without --overwrite)."
        case KeyboardInterrupt():
            return 130, "Aborted."
        case BrokenPipeError():  # whoever read the output has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1, ""
        case OSError():
            return 1, redacted(f"{error.filename or 'Writing'}: {error.strerror or error or type(error).__name__}.")
        case ModuleNotFoundError() if error.name in _EXTRAS:
            return 1, f"This needs {error.name}: pip install 'fixefficientnet[{_EXTRAS[error.name]}]'"
    raise error


def _run(arguments: list[str]) -> None:
    command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    if command.__module__.startswith(__name__) and command not in _WITHOUT_MODELS:  # and not --help
        requirements.need(*requirements.MODELS)
    command(*bound.args, **bound.kwargs)


@contextlib.contextmanager
def _settings_of_the_process() -> Iterator[None]:
    """SIGTERM ends the process as an exception does, so that what is half done is cleaned up."""

    def end(number: int, frame: object) -> Any:
        sys.exit(128 + number)

    before, thresholds = signal.signal(signal.SIGTERM, end), gc.get_threshold()
    of_threads, threading.excepthook = threading.excepthook, _in_a_thread
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    log, handler = logging.getLogger("fixefficientnet"), _Remarks()
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        threading.excepthook = of_threads
        signal.signal(signal.SIGTERM, before)
        gc.set_threshold(*thresholds)


class _Remarks(logging.Handler):
    """Shows what the package logs."""

    def emit(self, record: logging.LogRecord) -> None:
        err.say(redacted(record.getMessage()))


def _say(text: str) -> None:
    where = f" (process {processes.rank()})" if processes.rank() else ""
    err.quiet = False
    err.print(f"[red]Error{where}:[/] {escape(text)}", soft_wrap=True)
