"""Where figures are taken: this machine, its versions, fresh processes on a fixed number of cores."""

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
    """What stands beside each figure."""
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
    """This process and those that it starts run there, and on so many cores, with as many threads."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # commands that choose for themselves choose the CPU too
    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))


def fresh(name: str, given: Mapping[str, Any], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a benchmark's `child` makes of this, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", CHILD, name, json.dumps(given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **(env or {})})
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def commit() -> str:
    """Of this project, with a + where files differ from it."""
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return said.stdout.strip() or "unknown"


def in_turns(
    setups: Iterable[str], rounds: int, take: Callable[[str], dict[str, Any]], say: str = ""
) -> dict[str, list[dict[str, Any]]]:
    """Each setup's findings of so many rounds; a round takes each setup once, every second one backwards."""
    found: dict[str, list[dict[str, Any]]] = {setup: [] for setup in setups}
    for number in range(rounds):
        for setup in reversed(found) if number % 2 else found:
            print(f"{say} {setup}, {number + 1} of {rounds}", file=sys.stderr, flush=True)
            found[setup].append(take(setup))
    return found


def median(findings: Iterable[Mapping[str, Any]], name: str) -> float:
    """Of one figure over the rounds."""
    return float(statistics.median(finding[name] for finding in findings))


def spread(findings: Iterable[Mapping[str, Any]], name: str) -> float:
    """Of one figure over the rounds: by what share the largest is above the smallest."""
    values = [finding[name] for finding in findings]
    return float(max(values) / min(values) - 1)


def images_in(folder: Path) -> list[Path]:
    """The files in a folder's classes, or in those of its val/."""
    from timm.data import get_img_extensions

    place = folder / "val" if (folder / "val").is_dir() else folder
    endings = get_img_extensions()  # type: ignore[no-untyped-call]
    found = sorted(path for path in place.glob("*/*") if path.suffix.lower() in endings)
    if not found:
        raise DataError(f"{place} has no folders with images in them, one per class.")
    return found


def loading_processes(device: str) -> int:
    """For all sides; on CUDA, decoding would be all that is measured with one, and starting them with very many."""
    return 1 if device == "cpu" else min(16, len(os.sched_getaffinity(0)))


def settled(device: str) -> float:
    """The time, in seconds, when all that was asked of the device is done."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def has_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor."""
    from fixefficientnet.runtimes import formats

    return formats.openvino_has("bf16")


def kilobytes(name: str) -> int:
    """A line of /proc/self/status: VmRSS, or VmHWM, the most that this was."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


def forget_peak() -> float:
    """Makes VmHWM begin anew; the memory in use, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return kilobytes("VmRSS") / 1024


def grown_since(before: float) -> float:
    """Growth of peak memory since `forget_peak`, in MiB."""
    return kilobytes("VmHWM") / 1024 - before
