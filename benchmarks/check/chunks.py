"""Logits, gradients and statistics of a batch that goes through the network as one, against those of its chunks.

Activations of more than 2^31 elements are the point: before cuDNN 9.15, depthwise convolutions of these were wrong.
Cases go from small to large, as an error on the device spoils all that come after it in the process.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.check.online_step import OnlineStep, recipe_of
from benchmarks.check.setting import Setting, case, relative
from benchmarks.machine import Row

CASES = (("b0", "no"), ("b0", "bf16"), ("b2", "bf16"), ("b2", "no"), ("b4", "bf16"), ("b4", "no"), ("b7", "bf16"))
"""Variants and precisions whose recipe's batch of 512 fits 80 GB as one."""


def rows(setting: Setting) -> Iterator[Row]:
    for key, precision in (("tiny", "no"), ("tiny", "bf16")) if setting.tiny else CASES:
        recipe = recipe_of(setting, key, precision)
        names = {"variant": key, "size": recipe.test_size, "batch": recipe.batch_size, "precision": precision}
        yield case(names, lambda: _compared(OnlineStep(setting, recipe), setting.device))  # noqa: B023


def _compared(step: OnlineStep, device: str) -> Row:
    model = step.network.model
    start = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}
    largest = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal largest
        largest = max(largest, output.numel() if isinstance(output, Tensor) else 0)

    def taken(forward: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], float]:
        model.load_state_dict(start, strict=False)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        logits, gradients = step(forward)
        machine.settled(device)
        statistics = {name: model.get_buffer(name).clone() for name in step.network.statistics}
        peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
        return {"logits": logits, **gradients, **statistics}, peak

    chunked, chunked_peak = taken(step.in_chunks)
    hooks = [module.register_forward_hook(count) for module in model.modules()]
    whole, whole_peak = taken(step.whole)
    for hook in hooks:
        hook.remove()
    apart = {name: relative(chunked[name], whole[name]) for name in whole}
    return {
        "largest activation / 2^31": largest / 2**31,
        "logits": apart["logits"],
        "gradients": max(apart[name] for name in step.network.trained),
        "statistics": max(apart[name] for name in step.network.statistics),
        "GB, chunks": chunked_peak,
        "GB, whole": whole_peak,
    }
