"""The command line: each command calls one function of the package.

`list`, `info` and `--help` import no torch.
"""

import gc
import signal
import sys

from fixefficientnet._internal import processes, requirements

requirements.need_for_command_line()  # before these are imported: old ones may fail at that

from rich.markup import escape

from fixefficientnet.cli.app import app, err, show_what_can_be_shown
from fixefficientnet.errors import FixEfficientNetError

# the modules add their commands, which stand in this order in --help
# isort: off
from fixefficientnet.cli import zoo, evaluation, deployment  # noqa: F401
# isort: on

_EXTRAS = {"accelerate": "evaluate", "matplotlib": "evaluate", "torchmetrics": "evaluate"}
_EXTRAS |= dict.fromkeys(("onnx", "onnxruntime", "onnxscript", "sympy"), "onnx")
_EXTRAS |= dict.fromkeys(("nncf", "openvino"), "openvino")

_OBJECTS_BETWEEN_COLLECTIONS = 100_000
"""Importing torch and timm makes hundreds of thousands of objects that stay: looking for garbage there takes 0.3 s."""


def _end(number: int, frame: object) -> None:
    """Ends as an exception does, so that what is half done is cleaned up."""
    sys.exit(128 + number)


def main() -> None:
    """Runs the command line; an error of this package becomes one message and status 1."""
    before, thresholds = signal.signal(signal.SIGTERM, _end), gc.get_threshold()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    try:
        show_what_can_be_shown()
        app()
    except FixEfficientNetError as error:
        if not getattr(error, "said_elsewhere", False):
            where = f" (process {processes.rank()})" if processes.rank() else ""
            err.quiet = False
            err.print(f"[red]Error{where}:[/] {escape(str(error))}", soft_wrap=True)
    except OSError as error:
        where, reason = error.filename or "Writing", error.strerror or str(error) or type(error).__name__
        err.print(f"[red]Error:[/] {escape(f'{where}: {reason}')}.", soft_wrap=True)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        command = f"pip install 'fixefficientnet[{_EXTRAS[error.name]}]'"
        err.print(f"[red]Error:[/] This needs {error.name}: {escape(command)}", soft_wrap=True)
    finally:
        signal.signal(signal.SIGTERM, before)
        gc.set_threshold(*thresholds)
    if processes.several():
        processes.leave(1)
    sys.exit(1)
