"""Throughput of the forward pass alone, with the methods that this package uses and those that it dropped.

    python -m benchmarks forward

B0 at 320 and B4 at 472 pixels, with random weights. On a CPU in batches of 2: one batch at a time on all cores, and
one batch per core concurrently. On CUDA in batches of 64, one at a time, without the engines for CPUs.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

from benchmarks import machine
from benchmarks.classify import SIZES

NAME = "forward"
BATCH = {"cpu": 2, "cuda": 64}
LONG_ENOUGH = 3.0
"""Seconds of forward passes to measure."""
ENGINES = {
    "compile": ("compile", "no"),
    "ONNX Runtime": ("onnx", "no"),
    "OpenVINO": ("openvino", "no"),
    "OpenVINO, bf16": ("openvino", "bf16"),
}
FOLDED = "channels last, batch norm folded"
AHEAD = "compiled ahead (AOTInductor)"
METHODS = ("plain", "channels last", FOLDED, "channels last, bf16", *ENGINES, AHEAD)
ON_CUDA = ("plain", "channels last", FOLDED, "channels last, bf16", "compile")
ONE_BATCH = ("compile", AHEAD)
"""Methods for one batch at a time: compiled code keeps the number of threads that it was compiled for."""


def folded(model: Any) -> Any:
    """Returns a copy whose batch norms are folded into the convolutions before them."""
    import torch
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    original, model = model, copy.deepcopy(model)
    modules = dict(model.named_modules())
    before: tuple[Any, str] | None = None
    for name, module in modules.items():  # in timm's EfficientNets, a norm follows its convolution
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, nn.Conv2d):
            before = (modules[parent], leaf)
        elif before and isinstance(module, nn.BatchNorm2d):
            convolution = getattr(*before)
            setattr(*before, fuse_conv_bn_eval(convolution, module))
            setattr(modules[parent], leaf, nn.Sequential(module.drop, module.act))  # type: ignore[arg-type]
            before = None
    with torch.inference_mode():
        image = torch.rand(1, 3, 64, 64, device=next(model.parameters()).device)
        logits = original(image)  # random weights make them tiny
        torch.testing.assert_close(model(image), logits, rtol=0, atol=1e-3 * logits.abs().max().item())
    return model


def child(given: dict[str, Any]) -> dict[str, Any]:
    import contextlib

    import timm
    import torch

    from fixefficientnet._internal.threads import map_in_threads
    from fixefficientnet.models import from_module
    from fixefficientnet.runtimes import engines

    method: str = given["method"]
    device: str = given["device"]
    size, threads = SIZES[given["variant"]], given["threads"]
    torch.manual_seed(0)
    model: Any = timm.create_model(f"tf_efficientnet_{given['variant']}").eval().to(device)
    images = torch.rand(BATCH[device], 3, size, size, device=device)
    with torch.inference_mode():
        expected = model(images)
    run: Callable[[Any], Any] = model
    with contextlib.ExitStack() as stack:
        if method in ENGINES:
            engine, precision = ENGINES[method]
            loaded = from_module(model)
            test = loaded.at(size, 1.0)
            stack.enter_context(engines.running(loaded, test, engine, threads=threads, precision=precision))
        elif method == AHEAD:
            run = _ahead(model, images)
        else:
            run = folded(model) if method == FOLDED else model
            if "channels last" in method:
                run = run.to(memory_format=torch.channels_last)  # type: ignore[attr-defined]
                images = images.contiguous(memory_format=torch.channels_last)

        @torch.inference_mode()
        def once(_: int) -> Any:
            with torch.autocast(device, torch.bfloat16, enabled=method.endswith(", bf16") and method not in ENGINES):
                return run(images).float()

        list(map_in_threads(once, range(2 * threads), threads))
        rounds = 0
        start = machine.settled(device)
        while (seconds := machine.settled(device) - start) < LONG_ENOUGH:
            *others, logits = map_in_threads(once, range(4 * threads), threads)
            rounds += 1 + len(others)
        off = ((logits - expected).abs().max() / expected.abs().max()).item()
    return {"images_per_second": rounds * BATCH[device] / seconds, "largest_difference": off}


def _ahead(model: Any, images: Any) -> Callable[[Any], Any]:
    import tempfile

    import torch

    from fixefficientnet._internal import compat

    with torch.no_grad(), compat.freezing(), tempfile.TemporaryDirectory() as folder:
        exported = torch.export.export(model, (images,))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=f"{folder}/model.pt2")
        loaded: Callable[[Any], Any] = torch._inductor.aoti_load_package(path)
        return loaded


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """Measures the forward pass; one row per variant, number of threads and method."""
    from fixefficientnet._internal.threads import MOST

    made = []
    on_cuda = options.device == "cuda"
    every = ON_CUDA if on_cuda else [method for method in METHODS if method != "OpenVINO, bf16" or machine.has_bf16()]
    for variant in ("b0", "b4"):
        for threads in (1,) if on_cuda else dict.fromkeys((1, min(options.threads, MOST))):
            given = {"variant": variant, "threads": threads, "device": options.device}
            found = machine.in_turns(
                [method for method in every if threads == 1 or method not in ONE_BATCH],
                options.rounds,
                lambda method: machine.fresh(NAME, {**given, "method": method}),  # noqa: B023
                f"forward of {variant}, {threads} concurrently:",
            )
            for method, findings in found.items():
                row = {
                    "benchmark": NAME,
                    "variant": variant,
                    "size": SIZES[variant],
                    "method": method,
                    "threads": threads,
                }
                medians = {name: machine.median(findings, name) for name in findings[0]}
                made.append({**row, **medians, "spread": machine.spread(findings, "images_per_second")})
    return made
