"""Both methods end to end, in each precision, beside the same run on the CPU; and the logits that each run leaves.

Publishing computes a run's probe again from its delta: `probe` is the largest difference of the run's logits from those
that the CPU computes with the run's weights, relative to the largest; publishing accepts `probe.TOLERANCE`.
`like the CPU's` is whether the same run's top-1 on the CPU lies within the 95% interval of this one's.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

import fixefficientnet
from benchmarks.check.setting import TINY_NETWORK, Setting, case
from benchmarks.machine import Row
from fixefficientnet._internal import processes
from fixefficientnet.reproduce import probe
from fixefficientnet.reproduce import recipe as recipes
from fixefficientnet.reproduce.options import Data, Options
from fixefficientnet.reproduce.report import Report
from fixefficientnet.reproduce.run import Job, run, with_weights

METHODS = ("online", "cached")
SIZES = {"train_size": 128, "test_size": 224}
TINY = {"train_size": 32, "test_size": 48, "batch_size": 6, "forward_batch": 4, "shard": 8}
TUNING: dict[str, dict[str, Any]] = {"online": {"epochs": 2, "batch_size": 64, "base_lr": 1e-2}, "cached": {}}
BASE = {"stage": "base", "epochs": 4}


def rows(setting: Setting) -> Iterator[Row]:
    places = [("cpu", "no"), *((setting.device, precision) for precision in setting.precisions)]
    for method in METHODS:
        on_cpu: float | None = None
        for device, precision in dict.fromkeys(places):
            names = {"method": method, "device": device, "precision": precision}
            row = case(names, lambda: _measured(setting, *names.values(), on_cpu=on_cpu))  # noqa: B023
            if (device, precision) == places[0]:
                on_cpu = row.get("top-1, tuned")
            yield row


def _measured(setting: Setting, method: str, device: str, precision: str, *, on_cpu: float | None) -> Row:
    checkpoint = base_network(setting)
    start, name = time.perf_counter(), f"{method}-{device}-{precision}"
    report = reproduced(setting, name, device, precision, checkpoint, {"method": method, **TUNING[method]})
    seconds = time.perf_counter() - start
    found = {f"top-1, {which}": row.top1 for which, row in report.measured.items()}
    left = probe.load(Path(setting.folder, name, probe.FILENAME))
    network = fixefficientnet.load(str(Path(setting.folder, name))).network
    apart = probe.difference(left, probe.logits(network.cpu(), left.images, report.recipe.test))
    tuned = report.measured["tuned"]
    like = {} if on_cpu is None else {"like the CPU's": tuned.top1_low <= on_cpu <= tuned.top1_high}
    return {**found, **like, "probe": apart, "publishable": apart <= probe.TOLERANCE, "seconds": seconds}


def base_network(setting: Setting) -> Path:
    """The network that FixRes tunes here: the one given, or one that is trained at the first call."""
    if setting.checkpoint:
        return Path(setting.checkpoint)
    path = Path(setting.folder, "base", "model.safetensors")
    if not path.exists():
        reproduced(setting, "base", setting.device, "no", None, BASE)
    return path


def reproduced(
    setting: Setting,
    name: str,
    device: str,
    precision: str,
    checkpoint: Path | None,
    choices: Mapping[str, Any],
    *,
    compiled: bool = False,
) -> Report:
    """Does what the command `reproduce` does, in this process."""
    subject = recipes.subject_of_variant(fixefficientnet.info("lite0"))
    if setting.tiny:
        subject = recipes.subject_of_backbone(TINY_NETWORK)
    chosen = {**choices, **(TINY if setting.tiny else SIZES), "mixed_precision": precision}
    recipe = recipes.resolve(subject, with_weights(chosen, checkpoint, pretrained=not setting.tiny))
    options = Options(workers=setting.workers, compile=compiled)
    folder, data = Path(setting.folder, name), Data(str(setting.data))
    with processes.accelerating(device, precision) as accelerator:
        return run(Job(subject, recipe, data, folder, checkpoint, None, options, Console(stderr=True)), accelerator)
