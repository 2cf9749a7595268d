"""The forward rates again with `torch.backends.cudnn.benchmark`, which tries the algorithms at the first pass."""

import time
from collections.abc import Iterator

import torch

from benchmarks.check import forward
from benchmarks.check.setting import Setting, case
from benchmarks.machine import Row


def rows(setting: Setting) -> Iterator[Row]:
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        for keys, recipe in forward.networks(setting):
            for precision in ("no", "bf16"):
                start = time.perf_counter()
                names = {"variants": ", ".join(keys), "size": recipe.test_size, "batch": recipe.forward_batch}
                row = case(
                    {**names, "precision": precision},
                    lambda: forward.rates(setting, recipe, precision, larger=False),  # noqa: B023
                )
                yield {**row, "seconds, both": time.perf_counter() - start}
    finally:
        torch.backends.cudnn.benchmark = before
