"""A step of the online method with the recipe's own batch: images/s and peak memory, beside what `--plan` says of it.

GB is of tensors, as `--plan` counts them; reserved is what the allocator took from the card for them. Loading and the
optimizer are left out.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import product

import torch

from benchmarks import machine
from benchmarks.check.online_step import OnlineStep, recipe_of
from benchmarks.check.setting import Setting, case
from benchmarks.machine import Row
from fixefficientnet.reproduce import plan
from fixefficientnet.reproduce.recipe import Recipe

VARIANTS = ("b0", "b2", "b4", "b5", "b7", "l2", "b8")


def rows(setting: Setting) -> Iterator[Row]:
    keys = ("tiny",) if setting.tiny else VARIANTS
    recipes = {(key, precision): recipe_of(setting, key, precision) for key, precision in product(keys, ("no", "bf16"))}
    with _planners(setting) as planners:  # a plan takes seconds on one core
        planned = {names: planners.submit(_planned, recipe) for names, recipe in recipes.items()}
        for (key, precision), recipe in recipes.items():
            names = {"variant": key, "size": recipe.test_size, "batch": recipe.batch_size, "precision": precision}
            found = case(names, lambda: _measured(OnlineStep(setting, recipe), setting.device))  # noqa: B023
            said = planned[key, precision].result()
            beside = {"GB, --plan": said / 1e9, "times --plan": found["GB"] * 1e9 / said} if "GB" in found else {}
            yield found | beside


def _planners(setting: Setting) -> Executor:
    if setting.tiny:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(max(1, setting.workers // 2), multiprocessing.get_context("spawn"))


def _planned(recipe: Recipe) -> int:
    return plan.plan(recipe).memory


def _measured(step: OnlineStep, device: str) -> Row:
    on_cuda = device == "cuda"
    step(step.in_chunks, 2 * step.recipe.forward_batch)  # loads the kernels
    before = 0.0 if on_cuda else machine.forget_peak()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    start = machine.settled(device)
    step(step.in_chunks)
    seconds = machine.settled(device) - start
    peak = torch.cuda.max_memory_allocated() if on_cuda else machine.grown_since(before) * 2**20
    reserved = {"GB, reserved": torch.cuda.max_memory_reserved() / 1e9} if on_cuda else {}
    return {"images/s": step.recipe.batch_size / seconds, "GB": peak / 1e9, **reserved}
