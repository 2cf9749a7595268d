"""A step of the online method with the recipe's own batch: images/s and peak memory, beside what `--plan` says of it.

GB is of tensors, as `--plan` counts them; reserved is what the allocator took from the card for them. Loading and the
optimizer are left out.
"""

from collections.abc import Iterator
from itertools import product

import torch

from benchmarks import machine
from benchmarks.check.online_step import OnlineStep, recipe_of
from benchmarks.check.setting import Setting, case
from benchmarks.machine import Row
from fixefficientnet.reproduce import plan

VARIANTS = ("b0", "b2", "b4", "b5", "b7", "l2", "b8")


def rows(setting: Setting) -> Iterator[Row]:
    keys = ("tiny",) if setting.tiny else VARIANTS
    for key, precision in product(keys, ("no", "bf16")):
        recipe = recipe_of(setting, key, precision)
        names = {"variant": key, "size": recipe.test_size, "batch": recipe.batch_size, "precision": precision}
        yield case(names, lambda: _measured(OnlineStep(setting, recipe), setting.device))  # noqa: B023


def _measured(step: OnlineStep, device: str) -> Row:
    planned = plan.plan(step.recipe).memory
    on_cuda = device == "cuda"
    before = 0.0 if on_cuda else machine.forget_peak()
    if on_cuda:
        torch.cuda.empty_cache()  # what making network and images took is no part of it
        torch.cuda.reset_peak_memory_stats()
    step(step.in_chunks, 2 * step.recipe.forward_batch)  # loads the kernels
    start = machine.settled(device)
    step(step.in_chunks)
    seconds = machine.settled(device) - start
    peak = torch.cuda.max_memory_allocated() if on_cuda else machine.grown_since(before) * 2**20
    found = {"images/s": step.recipe.batch_size / seconds, "GB": peak / 1e9, "GB, --plan": planned / 1e9}
    if on_cuda:  # of the CPU, it is the growth of the process, which no plan tells
        found |= {"times --plan": peak / planned, "GB, reserved": torch.cuda.max_memory_reserved() / 1e9}
    return found
