"""What pip installs from a wheel and from an sdist works outside the checkout."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, python_path

from fixefficientnet import manifest
from fixefficientnet._internal import requirements

pytestmark = pytest.mark.newest


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, kind: str, target: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", target, cwd=source)
    (built,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist as a packager unpacks it: another folder, with other times than the checkout's."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, **safe)
    (source,) = folder.glob("fixefficientnet-*")
    return source


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(unpacked, "wheel", tmp_path_factory.mktemp("wheel"))


def test_a_release_has_the_same_bytes_wherever_and_whenever_it_is_built(
    sdist: Path, unpacked: Path, wheel: Path, tmp_path: Path
):
    assert build(unpacked, "sdist", tmp_path).read_bytes() == sdist.read_bytes()
    assert build(ROOT, "wheel", tmp_path).read_bytes() == wheel.read_bytes()


@pytest.mark.slow  # not for its time: what it needs is installed for developers
def test_pypi_would_take_the_release(sdist: Path, wheel: Path):
    pytest.importorskip("twine")
    assert run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=ROOT).count("PASSED") == 2


def test_sdist_holds_what_a_packager_needs(sdist: Path):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "weights_manifest.json",
        "recipes.toml",
        "hubconf.py",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "tests/conftest.py",
        "examples/cat.jpg",
    ):
        assert name in names


def test_wheel_from_the_sdist_works_outside_the_checkout(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        packaged = archive.read("fixefficientnet/weights_manifest.json")
    assert packaged == (ROOT / "weights_manifest.json").read_bytes()
    assert "fixefficientnet/py.typed" in names
    for name in ("evaluation/page.html.jinja", "publishing/card.md.jinja", "publishing/citation.bib"):
        assert f"fixefficientnet/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "benchmarks", "hubconf")) for name in names)

    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    run(*pip, cwd=tmp_path)
    code = (
        "import fixefficientnet as f; print(f.__file__, len(f.list_models()));"
        "print(f.predict('cat.jpg')[0].labels[0].name)"
    )
    (tmp_path / "cat.jpg").write_bytes((ROOT / "examples" / "cat.jpg").read_bytes())
    out = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=python_path(site))
    assert out.splitlines() == [f"{site / 'fixefficientnet' / '__init__.py'} {len(manifest.load())}", "Egyptian cat"]
    told = "{name: sorted(requirements.packages(name)) for name in ['', *requirements.extras()]}, requirements.floors()"
    code = f"from fixefficientnet import requirements; print(({told}))"
    out = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=python_path(site))  # from the wheel's metadata
    packages = {name: sorted(requirements.packages(name)) for name in ["", *requirements.extras()]}
    assert ast.literal_eval(out) == (packages, requirements.floors())
    command = site / "bin" / "fixefficientnet"
    assert "b4_ns" in run(sys.executable, command, "list", cwd=tmp_path, PYTHONPATH=python_path(site))
    plan = run(
        sys.executable, "-m", "fixefficientnet.reproduce", "b2", "--plan", cwd=tmp_path, PYTHONPATH=python_path(site)
    )
    assert "39,711,744 forward passes" in plan  # which needs the packaged recipes.toml


@pytest.mark.parametrize("arguments", [["--data", "."], ["--plan"]])
def test_fine_tuning_without_its_extra_says_what_to_install(arguments: list[str]):
    code = (
        f"import sys; sys.modules['accelerate'] = None; sys.argv = ['reproduce', 'b2', *{arguments}];"
        "from fixefficientnet.reproduce.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'fixefficientnet[reproduce]'" in done.stderr
    assert "Traceback" not in done.stderr


def private_names(path: Path) -> Iterator[str]:
    """Names of other libraries that begin with an underscore: imported, or looked up on what is not one's own."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("fixefficientnet"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in OWN):
            names = [node.attr]
        else:
            continue
        yield from (f"{path.name}:{node.lineno}: {name}" for name in names if PRIVATE.fullmatch(name))


OWN = ("self", "cls")
PRIVATE = re.compile(r"_(?!_)(?!exit|replace|asdict)\w+")
"""os._exit and a named tuple's methods are documented."""


def test_private_names_of_other_libraries_stand_in_one_module():
    package = ROOT / "fixefficientnet"
    found = [name for path in package.rglob("*.py") if path.name != "compat.py" for name in private_names(path)]
    assert found == []
    assert list(private_names(package / "_internal" / "compat.py"))
