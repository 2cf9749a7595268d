"""What a bug report needs to know of a machine.

Everything that is looked at is named here, one by one: no token is among it, and no name of a user but in paths outside
the home folder, which is written as ~.
"""

import json
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fixefficientnet._internal import processes, requirements
from fixefficientnet._internal.afresh import last_words, run_afresh
from fixefficientnet._version import __version__
from fixefficientnet.errors import redacted

_PACKAGE = Path(__file__).resolve().parents[1]
_FOR_DEVELOPERS = ("benchmark", "test", "dev")
"""Extras that users do not need."""
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "FIXEFFICIENTNET_MANIFEST",
    "FIXEFFICIENTNET_TIMEOUT",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
)
_PATIENCE = 120
"""Seconds that importing torch may take."""


@dataclass(frozen=True)
class Environment:
    """What the package runs in.

    Attributes:
        fixefficientnet: The release.
        folder: Where the package is.
        python: Python's release.
        system: The operating system.
        cpu: The processor's name.
        cores: Number of cores that this process may use.
        packages: Release of each package that is needed, or that an extra brings; None: it is not installed.
        extras: The packages that are missing for each extra, by its name.
        torch: CUDA's and cuDNN's release, the GPUs, threads and instructions of the CPU; or why torch cannot be used.
        caches: The folders that files are kept in.
        variables: Variables of the environment that are set and change what the package does.
    """

    fixefficientnet: str
    folder: str
    python: str
    system: str
    cpu: str
    cores: int
    packages: dict[str, str | None]
    extras: dict[str, list[str]]
    torch: dict[str, Any]
    caches: dict[str, str]
    variables: dict[str, str]


def look() -> Environment:
    """Looks at the machine; what is broken is told of, and is no error."""
    needed = {extra: requirements.packages(extra) for extra in requirements.extras() if extra not in _FOR_DEVELOPERS}
    releases = _releases({*requirements.packages(), *chain.from_iterable(needed.values())})
    torch = json.loads(redacted(json.dumps(_ask_torch())))
    return Environment(
        fixefficientnet=__version__,
        folder=_short(_PACKAGE),
        python=platform.python_version(),
        system=platform.platform(),
        cpu=_cpu(),
        cores=processes.usable_cores(),
        packages=releases,
        extras={extra: [name for name in names if releases[name] is None] for extra, names in needed.items()},
        torch=torch,
        caches=_caches(torch.pop("hub", None)),
        variables={name: _shown(name, os.environ[name]) for name in _VARIABLES if name in os.environ},
    )


def _releases(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed releases, in the order of the names; nothing is imported, as an import may fail."""
    from importlib import metadata

    modules = metadata.packages_distributions()
    found: dict[str, str | None] = {}
    for package in sorted(packages):
        module = requirements.MODULES.get(package, package)
        found[package] = None
        for name in (package, *modules.get(module, [])):  # onnxruntime-gpu brings the module onnxruntime
            try:
                release = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
            found[package] = release if name == package else f"{release} ({name})"
            break
    return found


def _ask_torch() -> dict[str, Any]:
    """What torch tells, in a process of its own: a broken one may end the process that imports it."""
    code = (
        "import json; from fixefficientnet._internal import environment; print(json.dumps(environment.torch_tells()))"
    )
    try:
        done = run_afresh(code, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return {"error": f"Importing it takes more than {_PATIENCE} s."}
    if done.returncode == 0:
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told
    return {"error": _short(last_words(done, f"Importing it ends Python (status {done.returncode})."))}


def torch_tells() -> dict[str, Any]:
    """What torch knows of the machine."""
    with warnings.catch_warnings(record=True) as warned:  # of a driver that is too old, for one
        import torch

        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        gpus = []
        for properties in map(torch.cuda.get_device_properties, devices):
            capability = f"{properties.major}.{properties.minor}"
            memory = round(properties.total_memory / 2**30, 1)
            gpus.append({"name": properties.name, "capability": capability, "memory_gib": memory})
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "warnings": [_short(str(one.message)) for one in warned],
        "hub": torch.hub.get_dir(),
    }


def _caches(torch_hub: str | None) -> dict[str, str]:
    found = {"torch.hub": _short(torch_hub)} if torch_hub else {}
    try:
        from huggingface_hub import constants
    except Exception as error:  # whatever a broken package raises
        return found | {"Hub": _short(f"{type(error).__name__}: {error}")}
    return found | {"Hub": _short(constants.HF_HUB_CACHE), "exported": _short(constants.HF_ASSETS_CACHE)}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _short(text: str | Path) -> str:
    """A path, or a message with paths, without the name of the user."""
    try:
        home = Path.home()
    except RuntimeError:  # there is none
        return str(text)
    if len(home.parts) < 2:  # the root, which every path begins with
        return str(text)
    return re.sub(rf"(?<![\w./~-]){re.escape(str(home))}(?![\w.-])", "~", str(text))


def _shown(name: str, value: str) -> str:
    """A variable's value without a password in an address, and without the whole of a manifest."""
    if name == "FIXEFFICIENTNET_MANIFEST" and value.lstrip().startswith("{"):
        return "JSON"
    if name in ("HF_ENDPOINT", "FIXEFFICIENTNET_MANIFEST"):
        scheme, separator, rest = value.rpartition("://")
        value = _short(f"{scheme}{separator}{re.split('[?#]', rest.rpartition('@')[2])[0]}")
    return redacted(value)
