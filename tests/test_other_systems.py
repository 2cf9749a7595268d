"""What must work without fcntl, prctl and fork, as on Windows, each in a fresh process where they are hidden."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, python_path
from tiny import make_data

pytestmark = pytest.mark.newest

HIDDEN = """
import ctypes, multiprocessing, os, sys
sys.modules["fcntl"] = None
for name in ("fork", "forkpty", "posix_fallocate", "sched_getaffinity", "killpg", "getuid"):
    if hasattr(os, name):
        delattr(os, name)
loaded = ctypes.CDLL
class Without(loaded):
    def __getattr__(self, name):
        if name == "prctl":
            raise AttributeError(name)
        return super().__getattr__(name)
ctypes.CDLL = Without
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """An environment where Python, and every process that it begins, starts with these hidden."""
    folder = tmp_path / "hidden"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDDEN + "multiprocessing.set_start_method('spawn')\n")
    return {"PYTHONPATH": python_path(folder)}


def run(*arguments: object, env: dict[str, str], status: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_they_are_hidden(elsewhere: dict[str, str]):
    code = "import multiprocessing, os; print(hasattr(os, 'fork'), multiprocessing.get_start_method()); import fcntl"
    out, err = run("-c", code, env=elsewhere, status=1)
    assert out == "False spawn\n" and "ModuleNotFoundError" in err


def test_create_and_predict(elsewhere: dict[str, str]):
    code = "import fixefficientnet; print(fixefficientnet.create('lite0', 'backbone').variant.key)"
    assert run("-c", code, env=elsewhere)[0] == "lite0\n"
    out, _ = run("-m", "fixefficientnet", "predict", "examples/cat.jpg", "--json", env=elsewhere)
    assert json.loads(out)["predictions"][0]["labels"][0]["name"].startswith("Egyptian cat")


def test_evaluate_with_loading_processes(elsewhere: dict[str, str], tmp_path: Path):
    data = make_data(tmp_path / "data", ("n01440764", "n02124075"), train=1, val=3)
    command = ["-m", "fixefficientnet", "evaluate", "lite0", "--data", data, "--json", "-o", tmp_path / "out"]
    found = [json.loads(run(*command, "-j", workers, env=elsewhere)[0])["results"][0] for workers in (0, 2)]
    assert found[0]["images"] == 6
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)


def test_fine_tuning(elsewhere: dict[str, str], tmp_path: Path):
    data = make_data(tmp_path / "data", train=2, val=2)
    command = ["-m", "fixefficientnet.reproduce", "--backbone", "test_efficientnet.r160_in1k", "--no-pretrained"]
    command += ["--stage", "base", "--data", str(data), "--output", str(tmp_path / "runs")]
    command += ["--train-size", "32", "-j", "0"]
    run(*command, "--epochs", "1", env=elsewhere)
    assert (tmp_path / "runs" / "test_efficientnet.r160_in1k-base" / "report.json").exists()
    assert "finished already" in run(*command, "--epochs", "1", env=elsewhere)[0]
    run("-m", "fixefficientnet.reproduce", "b0", "--plan", env=elsewhere)
