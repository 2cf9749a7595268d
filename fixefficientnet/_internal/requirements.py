"""The oldest releases that this package runs with, held against what is installed.

They stand in `pyproject.toml` alone. pip looks at them when it installs the package; nobody does for a checkout that
torch.hub loads, or after an environment changed. Imports nothing outside the standard library.
"""

import contextlib
import functools
import importlib.util
import re
import sys
from pathlib import Path

from fixefficientnet.errors import OutdatedPackageError

MODELS = ("torch", "torchvision", "timm", "huggingface_hub", "safetensors", "numpy", "pillow")
"""What every model needs."""
COMMAND_LINE = ("cyclopts", "rich")
"""What the command line needs besides."""
MODULES = {"pillow": "PIL"}
"""Modules with another name than the package's on PyPI."""


@functools.cache
def need(*packages: str) -> None:
    """Checks that packages are installed and new enough; a check that passed is remembered.

    Args:
        packages: The packages by their names on PyPI, with _ for -.

    Raises:
        ModuleNotFoundError: A package is not there; the message names the first.
        OutdatedPackageError: Packages are older than what the tests pass with; the message names them, and pip's
            command.
    """
    oldest = floors()
    told, wanted = [], []
    for package in packages:
        if not _is_there(package):
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        floor, found = oldest.get(package, "0"), version(package)
        if _release(found) < _release(floor):
            told.append(f"{package} {floor} or newer ({found} is installed)")
            wanted.append(f"'{package}>={floor}'")
    if told:
        raise OutdatedPackageError(
            f"fixefficientnet needs {', '.join(told)}. Run: pip install --upgrade {' '.join(wanted)}"
        )


def need_for_command_line() -> None:
    """Ends the process with one error where what the command line is made of is too old."""
    try:
        need(*COMMAND_LINE)
    except OutdatedPackageError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


def version(package: str) -> str:
    """The installed release of a package, also where another one ships it (onnxruntime-gpu, pillow-simd)."""
    from importlib import metadata  # which takes a while, and listing models needs none of it

    with contextlib.suppress(metadata.PackageNotFoundError):
        found: str | None = metadata.version(package)
        if found:  # None where the folder of a removed package was left behind
            return found
    return str(getattr(importlib.import_module(MODULES.get(package, package)), "__version__", "unknown"))


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(MODULES.get(package, package)) is not None
    except ValueError:  # imported, by whoever put it there without a spec
        return True


@functools.cache
def floors() -> dict[str, str]:
    """The oldest release of each package, extras included, with _ for - in its name."""
    found = (re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", one) for listed in _listed().values() for one in listed)
    return {match[1].replace("-", "_"): match[2] for match in found if match}


def packages(extra: str = "") -> list[str]:
    """Names on PyPI, with _ for -, of what an extra brings, with those of the extras in it; "": the package itself."""
    found: dict[str, None] = {}
    for requirement in _listed().get(extra, []):
        if match := re.match(r"fixefficientnet\[([\w,-]+)\]", requirement):
            found |= dict.fromkeys(name for one in match[1].split(",") for name in packages(one))
        elif match := re.match(r"[\w.-]+", requirement):
            found[match[0].replace("-", "_")] = None
    return list(found)


def extras() -> list[str]:
    """Names of the extras."""
    return [name for name in _listed() if name]


@functools.cache
def _listed() -> dict[str, list[str]]:
    """The requirements by extra, the package's own under "".

    They are the checkout's, or those of what pip installed.
    """
    import tomllib
    from importlib import metadata

    file = Path(__file__).resolve().parents[2] / "pyproject.toml"
    project = {}
    with contextlib.suppress(OSError, ValueError):
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    if project.get("name") == "fixefficientnet":  # and not what somebody left beside an installed package
        return {"": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, list[str]] = {"": []}
    with contextlib.suppress(metadata.PackageNotFoundError):  # copied by hand: nothing to hold anything against
        for line in metadata.requires("fixefficientnet") or []:
            requirement, _, marker = line.partition(";")
            extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
            found.setdefault(extra[1] if extra else "", []).append(requirement.strip())
    return found


def _release(version: str) -> tuple[float, ...]:
    """The numbers at its start: vendors' builds such as 2.6.0a0+ecf3bae count as the release that they are of.

    What tells no release ("unknown", "0+unknown") counts as the newest.
    """
    match = re.match(r"(?:\d+!)?(\d+(?:\.\d+)*)(?!\+unknown)", version)
    numbers = [float(number) for number in match[1].split(".")] if match else [float("inf")]
    return tuple(numbers + [0.0] * (4 - len(numbers)))
