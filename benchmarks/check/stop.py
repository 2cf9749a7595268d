"""A run that SIGTERM stops and the same command continues, beside one that nothing stops: the same bytes?

Several such pairs run side by side. Of fp16, the gradient scaler's state at the end is compared too.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors

from benchmarks.check.runs import SIZES, TINY, base_network
from benchmarks.check.setting import TINY_NETWORK, Setting, case
from benchmarks.machine import Row

LONG: dict[str, dict[str, float]] = {
    "online": {"epochs": 6, "batch_size": 32, "base_lr": 1e-2},
    "cached": {"epochs": 3000, "base_lr": 1e-4},
}
"""Long enough to be stopped in the middle."""
LONG_TINY: dict[str, dict[str, float]] = {"online": {"epochs": 20}, "cached": {"epochs": 300}}


def rows(setting: Setting) -> Iterator[Row]:
    precisions = ("bf16",) if setting.tiny and setting.device == "cpu" else setting.precisions
    chains = [("online", precision) for precision in precisions] + [("cached", "no")]
    base_network(setting)
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 4)) as pool:
        yield from pool.map(
            lambda chain: case(
                {"method": chain[0], "precision": chain[1]},
                lambda: _chain(setting, *chain),
            ),
            chains,
        )


def _chain(setting: Setting, method: str, precision: str) -> Row:
    whole, stopped = (Path(setting.folder, f"{kind}-{method}-{precision}") for kind in ("whole", "stopped"))
    uninterrupted = _start(setting, whole, method, precision)
    process = _start(setting, stopped, method, precision)
    while process.poll() is None and not (stopped / "log.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    if process.returncode != 128 + signal.SIGTERM:
        raise RuntimeError(f"SIGTERM ended it with {process.returncode}, not {128 + signal.SIGTERM}: {said[-300:]}")
    at = _kept(stopped)["position"]
    for going in (_start(setting, stopped, method, precision), uninterrupted):
        _finish(going)
    scalers = [_kept(folder)["scaler"] for folder in (stopped, whole)]
    return {
        "stopped after step": json.loads(at)[2],
        "same bytes": _sha(stopped) == _sha(whole),
        "scaler": scalers[0],
        "same scaler": scalers[0] == scalers[1] and (scalers[0] != "{}") == (precision == "fp16"),
    }


def _start(setting: Setting, folder: Path, method: str, precision: str) -> "subprocess.Popen[str]":
    choices = {**SIZES, **LONG[method]}
    if setting.tiny:
        choices |= {**TINY, **LONG_TINY[method]}
    network = ["--backbone", TINY_NETWORK] if setting.tiny else ["lite0"]
    given: dict[str, object] = {"checkpoint": base_network(setting), "data": setting.data, "output": folder.parent}
    given |= {"experiment": folder.name, "method": method, "device": setting.device, "mixed_precision": precision}
    given |= {"val_interval": 0, "workers": setting.workers // 4, **choices}
    flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "fixefficientnet.reproduce", *network, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process: "subprocess.Popen[str]") -> None:
    said = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}: {said[-300:]}")


def _kept(folder: Path) -> dict[str, str]:
    with safetensors.safe_open(folder / "checkpoint" / "state.safetensors", "pt") as file:
        return dict(file.metadata())


def _sha(folder: Path) -> str:
    return hashlib.sha256((folder / "delta.safetensors").read_bytes()).hexdigest()
