"""Python code in a process of its own."""

import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parents[2]


def run_afresh(code: str, *arguments: str, timeout: float | None = None) -> "subprocess.CompletedProcess[str]":
    """Runs code that imports this very package, also where it is not installed, and nothing of the working directory.

    The code finds the arguments in `sys.argv[1:]`.

    Raises:
        subprocess.TimeoutExpired: It took longer than the timeout, in seconds.
    """
    importing = f"import sys; sys.path.append({str(_HERE)!r}); {code}"
    command = [sys.executable, "-P", "-c", importing, *arguments]  # -P: not from the working directory
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def last_words(done: "subprocess.CompletedProcess[str]", otherwise: str) -> str:
    """The last line of what a process said of its failure, which is the exception's."""
    return (done.stderr.strip().splitlines() or [otherwise])[-1]
