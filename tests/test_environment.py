"""`fixefficientnet env`: what a bug report needs, also where packages are broken, and no secret."""

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT, python_path

import fixefficientnet
from fixefficientnet._internal import environment

pytestmark = pytest.mark.newest

SECRET = "hf_SecretSecretSecretSecretSecretSecret"


def put(folder: Path, package: str, code: str) -> dict[str, str]:
    """An environment in which a package is another one."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(code)
    return {"PYTHONPATH": python_path(folder)}


def env(*arguments: str, **variables: str) -> str:
    """Runs the command as a user does: in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "fixefficientnet", "env", *arguments],
        env=os.environ | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_what_is_told_is_what_is_here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HF_ENDPOINT", f"https://me:{SECRET}@mirror.example:8000/hub?token={SECRET}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, err = tiny.cli("env", "--json")
    assert SECRET not in out + err
    found = json.loads(out)
    assert found["fixefficientnet"] == fixefficientnet.__version__
    assert Path(found["folder"]).expanduser() == ROOT / "fixefficientnet"
    assert found["python"] == platform.python_version()
    for package in ("torch", "timm", "pillow", "cyclopts", "openvino"):
        assert found["packages"][package] == metadata.version(package)
    for extra in ("bundled", "evaluate", "heic", "onnx", "openvino", "reproduce"):  # the tests have them all
        assert found["extras"][extra] == []
    told = found["torch"]
    assert (told["cuda"], told["cudnn"]) == (torch.version.cuda, torch.backends.cudnn.version())
    assert (told["threads"], len(told["gpus"])) == (1, torch.cuda.device_count())
    assert found["caches"]["Hub"].startswith(os.environ["HF_HOME"])
    assert found["caches"]["torch.hub"].startswith(os.environ["TORCH_HOME"])
    assert found["variables"]["HF_ENDPOINT"] == "https://mirror.example:8000/hub"


@pytest.mark.parametrize("name", ["HF_ENDPOINT", "FIXEFFICIENTNET_MANIFEST"])
@pytest.mark.parametrize("address", [f"me:{SECRET}@mirror", f"https://[me:{SECRET}@mirror", f"mirror?token={SECRET}"])
def test_a_malformed_address_is_told_without_its_password(name: str, address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, address)
    monkeypatch.setattr(environment, "_ask_torch", lambda: {})
    found = environment.look().variables[name]
    assert "mirror" in found and SECRET not in found


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "OSError: libcudart.so.12: cannot open"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "Importing it ends Python (status -11)"),
    ],
)
def test_a_broken_torch_is_told_of(tmp_path: Path, code: str, told: str):
    out = env(HF_TOKEN=SECRET, COLUMNS="200", **put(tmp_path, "torch", code))
    assert f"cannot be used: {told}" in out
    assert f"timm {metadata.version('timm')}" in out
    assert SECRET not in out


def test_what_is_missing_and_what_others_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = metadata.version

    def version(name: str) -> str:
        if name in ("openvino", "onnxruntime"):
            raise metadata.PackageNotFoundError(name)
        return "1.2.3" if name == "onnxruntime-gpu" else known(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    for name, value in put(tmp_path, "torch", "raise ImportError('none')").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    found = environment.look()
    assert found.packages["openvino"] is None
    assert found.packages["onnxruntime"] == "1.2.3 (onnxruntime-gpu)"
    assert found.extras["openvino"] == ["openvino"]
    assert found.extras["onnx"] == []
    assert found.caches["Hub"].startswith("ModuleNotFoundError")
    out, _ = tiny.cli("env", columns=1000)
    assert "openvino missing" in out
    (extras,) = re.findall(r"^extras +(.*?) *$", out, re.M)
    assert "onnx" in extras.split(", ") and "openvino" not in extras.split(", ")


def test_the_home_folder_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "jane"
    for name, value in put(tmp_path, "torch", "raise ImportError('none')").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setenv("FIXEFFICIENTNET_MANIFEST", str(home / "rows.json"))
    out, _ = tiny.cli("env", columns=200)
    assert "jane" not in out
    assert str(Path("~") / "hub") in out and str(Path("~") / "rows.json") in out
    monkeypatch.setenv("FIXEFFICIENTNET_MANIFEST", '{"schema_version": 1, "variants": {}}')
    assert environment.look().variables["FIXEFFICIENTNET_MANIFEST"] == "JSON"
