"""A real Hub server on loopback, the git repositories that it serves, and fresh processes that ask it."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import fresh


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


_WITHOUT_WAITING = """
import types
from huggingface_hub.utils import _http
_http.time = types.SimpleNamespace(sleep=lambda seconds: None)
"""
"""Has huggingface_hub try again at once, where it would wait up to 23 seconds."""


def python(code: str, env: dict[str, str], check: bool = True) -> "subprocess.CompletedProcess[str]":
    """What a process printed that asks a Hub."""
    return fresh.python(_WITHOUT_WAITING + code, env=env, check=check)
