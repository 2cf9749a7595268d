"""The machine and its versions; fresh processes on a fixed number of cores; rounds in turns."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from fixefficientnet.errors import DataError

PACKAGES = (
    *("torch", "torchvision", "timm", "transformers", "onnxruntime", "openvino", "pillow", "numpy", "accelerate"),
    *("safetensors", "huggingface_hub"),
)
CHILD = "--child"

Row = dict[str, Any]


def facts(device: str) -> dict[str, Any]:
    """Returns the machine and the versions, which stand beside the figures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    import torch

    return {
        "cpu": names[0] if names else platform.processor(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }


def use(device: str, count: int) -> None:
    """Makes this process and those that it starts run on the device, on `count` cores, with as many threads."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # commands that choose a device choose the CPU too
    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))


def fresh(name: str, given: Mapping[str, Any], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs a benchmark's `child` in a fresh process; returns what it returns."""
    command = [sys.executable, "-m", "benchmarks", CHILD, name, json.dumps(given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **(env or {})})
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def commit() -> str:
    """Returns this project's commit, with a + where files differ from it."""
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True)  # noqa: S607
    except FileNotFoundError:
        return "unknown"
    return said.stdout.strip() or "unknown"


def in_turns(
    methods: Iterable[str], rounds: int, take: Callable[[str], dict[str, Any]], say: str = ""
) -> dict[str, list[dict[str, Any]]]:
    """Measures each method once per round; every second round takes them in reverse order."""
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for number in range(rounds):
        for method in reversed(found) if number % 2 else found:
            print(f"{say} {method}, {number + 1} of {rounds}", file=sys.stderr, flush=True)
            found[method].append(take(method))
    return found


def median(findings: Iterable[Mapping[str, Any]], name: str) -> float:
    """Returns the median of one figure over the rounds."""
    return float(statistics.median(finding[name] for finding in findings))


def spread(findings: Iterable[Mapping[str, Any]], name: str) -> float:
    """Returns the share by which a figure's largest value in the rounds is above its smallest."""
    values = [finding[name] for finding in findings]
    return float(max(values) / min(values) - 1)


def images_in(folder: Path) -> list[Path]:
    """Lists the images in the class folders of a folder, or of its val/.

    Raises:
        DataError: The folder has no class folders with images.
    """
    from timm.data import get_img_extensions

    place = folder / "val" if (folder / "val").is_dir() else folder
    endings = get_img_extensions()  # type: ignore[no-untyped-call]
    found = sorted(path for path in place.glob("*/*") if path.suffix.lower() in endings)
    if not found:
        raise DataError(f"{place} has no folders with images in them, one per class.")
    return found


def loading_processes(device: str) -> int:
    """Returns the number of loading processes for all methods.

    On CUDA, one process would measure little but decoding, and very many little but their start.
    """
    return 1 if device == "cpu" else min(16, len(os.sched_getaffinity(0)))


def settled(device: str) -> float:
    """Waits until the device is done; returns the time in seconds."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def has_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor."""
    from fixefficientnet.runtimes import formats

    return formats.openvino_has("bf16")


def kilobytes(name: str) -> int:
    """Returns a line of /proc/self/status in KiB: VmRSS, or its peak VmHWM."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


def forget_peak() -> float:
    """Resets the peak of the memory in use; returns the memory in use, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return kilobytes("VmRSS") / 1024


def grown_since(before: float) -> float:
    """Returns the growth of peak memory since `forget_peak`, in MiB."""
    return kilobytes("VmHWM") / 1024 - before
