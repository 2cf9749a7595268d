"""A real Hub server on loopback, the git repositories that it serves, and fresh processes that ask it."""

import socket
import subprocess
import sys
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


_AT_ONCE = """
import types
from huggingface_hub.utils import _http
_http.time = types.SimpleNamespace(sleep=lambda seconds: None)
"""
"""Has huggingface_hub try again without waiting, up to 23 seconds."""


def python(code: str, env: dict[str, str], check: bool = True) -> subprocess.CompletedProcess[str]:
    code = _AT_ONCE + code
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, cwd=ROOT)
    assert not check or done.returncode == 0, done.stderr
    return done
