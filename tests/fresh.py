"""Processes in which this package, timm and huggingface_hub are not imported yet, and torch is.

Importing torch and torchvision takes most of the time of a process that does little else.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from conftest import ROOT

_asking = threading.Lock()
_SERVER = """
import json, os, sys
import torch
import torchvision.models.feature_extraction  # with torch, two thirds of what timm imports
for line in sys.stdin:
    code, environment, folder, out, err, ended = json.loads(line)
    if waiting := os.fork():
        os.waitpid(waiting, 0)
    elif os.fork():
        os._exit(0)
    elif process := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        with open(ended + ".part", "w") as file:
            file.write(str(status))
        os.rename(file.name, ended)
        os._exit(0)
    else:
        break
else:
    sys.exit()
os.environ.clear()
os.environ.update(environment)
os.chdir(folder)
for number, name in enumerate((os.devnull, out, err)):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
code = compile(code, "<string>", "exec")
for name in [name for name in globals() if not name.startswith("__") and name != "code"]:
    del globals()[name]
exec(code)
"""


@functools.cache
def _server() -> "subprocess.Popen[str]":
    """A process that has imported torch, and nothing that reads the environment; it forks one for each code."""
    process = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, text=True, cwd=ROOT)
    atexit.register(process.kill)
    return process


def python(
    code: str, *, cwd: Path = ROOT, env: dict[str, str] | None = None, check: bool = True
) -> "subprocess.CompletedProcess[str]":
    """Runs code in a process of its own; may be called in several threads.

    Args:
        code: The code.
        cwd: The folder that it runs in, from which it imports.
        env: The environment; None: that of the tests. What Python reads of it when it
            starts, and torch when it is imported, has no effect; but for OMP_NUM_THREADS.
        check: Whether it must succeed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err, ended = (Path(folder, name) for name in ("out", "err", "ended"))
        request = [code, dict(os.environ) if env is None else env, *map(str, (cwd, out, err, ended))]
        with _asking:
            server = _server()
            assert server.stdin
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
        until = time.monotonic() + 500
        while not ended.exists():
            assert server.poll() is None and time.monotonic() < until, f"no end of {code}"
            time.sleep(0.01)
        status = int(ended.read_text())
        done = subprocess.CompletedProcess([code], status, out.read_text(), err.read_text())
    assert not check or done.returncode == 0, done.stderr
    return done
