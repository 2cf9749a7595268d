"""The online run of `runs` with `--compile`: how often torch compiled a part anew, and why.

Expected is a graph per part, and another where a size is the first other one: of images, and of a last batch.
"""

import time
from collections import Counter
from collections.abc import Iterator

import torch
from torch._dynamo.utils import counters, get_compilation_metrics

from benchmarks.check.runs import TUNING, base_network, reproduced
from benchmarks.check.setting import Setting, case
from benchmarks.machine import Row


def rows(setting: Setting) -> Iterator[Row]:
    for precision in ("bf16",) if setting.tiny else ("no", "bf16"):
        yield case({"precision": precision}, lambda: _measured(setting, precision))  # noqa: B023


def _measured(setting: Setting, precision: str) -> Row:
    checkpoint = base_network(setting)
    torch._dynamo.reset()
    torch._dynamo.utils.clear_compilation_metrics()
    counters.clear()
    start, name = time.perf_counter(), f"compile-{precision}"
    choices = {"method": "online", **TUNING["online"]}
    report = reproduced(setting, name, setting.device, precision, checkpoint, choices, compiled=True)
    seconds = time.perf_counter() - start
    metrics = get_compilation_metrics()
    # a compile id is FRAME/N or FRAME/N_ATTEMPT, N counting how often the frame was compiled before
    earlier = [int(str(one.compile_id).partition("/")[2].partition("_")[0]) for one in metrics]
    again = [one for one, count in zip(metrics, earlier, strict=True) if count]
    reasons = Counter(_short(getattr(one, "recompile_reason", None) or ": not told by this torch") for one in again)
    return {
        "seconds": seconds,
        "top-1": report.measured["tuned"].top1,
        "graphs": counters["stats"]["unique_graphs"],
        "recompiles": len(again),
        "of one part": max(earlier, default=0),
        "reasons": "; ".join(f"{count}x {reason}" for reason, count in reasons.items()),
    }


def _short(reason: str) -> str:
    """A reason, which reads "0/1: GUARD  # CODE", as its guard, not all of it where that is long."""
    return reason.partition(": ")[2].partition("  #")[0][:80]
