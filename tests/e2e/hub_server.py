"""A real Hub server on loopback, the git repositories that it serves, and fresh processes that ask it."""

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from conftest import ROOT


def git(*arguments: str, cwd: Path) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "init.defaultBranch=main"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout.strip()


def commit(folder: Path) -> str:
    git("add", "-A", cwd=folder)
    git("commit", "-qm", "files", cwd=folder)
    return git("rev-parse", "HEAD", cwd=folder)


def start_olah(folder: Path, port: int) -> subprocess.Popen[bytes]:
    config = folder / "olah.toml"
    config.write_text(
        f"""
[basic]
host = "127.0.0.1"
port = {port}
repos-path = "{folder / "cache"}"
mirrors-path = ["{folder / "hub"}"]
[accessibility]
offline = true
"""
    )
    with (folder / "olah.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "olah.server", "--config", str(config), "--log-path", str(folder / "logs")],
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    for _ in range(150):
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.2)
    process.kill()
    process.wait()
    raise RuntimeError((folder / "olah.log").read_text())


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


_IN_EACH = """
import types
from huggingface_hub.utils import _http
_http.time = types.SimpleNamespace(sleep=lambda seconds: None)
"""
"""Has huggingface_hub try again without waiting, up to 23 seconds."""

_asking = threading.Lock()
_SERVER = """
import json, os, sys
import torchvision.models.feature_extraction  # brings torch; they are two thirds of what timm imports
for line in sys.stdin:
    code, environment, out, err, ended = json.loads(line)
    if waiting := os.fork():
        os.waitpid(waiting, 0)
    elif os.fork():
        os._exit(0)
    elif process := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        with open(ended, "w") as file:
            file.write(str(status))
        os._exit(0)
    else:
        break
else:
    sys.exit()
os.environ.clear()
os.environ.update(environment)
for number, name in ((1, out), (2, err)):
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
exec(code)
"""


@functools.cache
def _server() -> "subprocess.Popen[str]":
    """A process that has imported torch, and nothing that reads the environment; it forks one for each code."""
    process = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, text=True, cwd=ROOT)
    atexit.register(process.kill)
    return process


def python(code: str, env: dict[str, str], check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Runs code in a process of its own, in this environment; may be called in several threads."""
    with tempfile.TemporaryDirectory() as folder:
        out, err, ended = (Path(folder, name) for name in ("out", "err", "ended"))
        os.mkfifo(ended)
        request = json.dumps([_IN_EACH + code, env, *map(str, (out, err, ended))]) + "\n"
        stdin = _server().stdin
        assert stdin
        with _asking:
            stdin.write(request)
            stdin.flush()
        status = int(ended.read_text())  # waits for the process
        done = subprocess.CompletedProcess([code], status, out.read_text(), err.read_text())
    assert not check or done.returncode == 0, done.stderr
    return done
