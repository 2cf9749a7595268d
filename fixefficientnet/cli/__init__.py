"""The command line: each command calls one function of the package.

`list`, `info` and `--help` import no torch.
"""

import sys

from rich.markup import escape

from fixefficientnet import processes
from fixefficientnet.cli import (
    deploy,  # noqa: F401
    measure,  # noqa: F401
    zoo,  # noqa: F401 - modules add their commands, in the order of --help
)
from fixefficientnet.cli.app import app, err
from fixefficientnet.errors import FixEfficientNetError

_EXTRAS = {"accelerate": "evaluate", "matplotlib": "evaluate", "torchmetrics": "evaluate"}
_EXTRAS |= {"onnx": "onnx", "onnxruntime": "onnx", "onnxscript": "onnx", "openvino": "openvino"}


def main() -> None:
    """Runs the command line; an error of this package becomes one message and status 1."""
    try:
        app()
    except FixEfficientNetError as error:
        if not getattr(error, "said_elsewhere", False):
            where = f" (process {processes.rank()})" if processes.rank() else ""
            err.quiet = False
            err.print(f"[red]Error{where}:[/] {escape(str(error))}", soft_wrap=True)
    except OSError as error:
        err.print(f"[red]Error:[/] {escape(str(error.filename or 'Writing'))}: {error.strerror}.", soft_wrap=True)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        command = f"pip install 'fixefficientnet[{_EXTRAS[error.name]}]'"
        err.print(f"[red]Error:[/] This needs {error.name}: {escape(command)}", soft_wrap=True)
    if processes.several():
        processes.leave(1)
    sys.exit(1)
