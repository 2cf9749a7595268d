"""Each export format: written and checked by the package itself, on the CPU; then run on the device, beside eager.

A format whose runtime has nothing for the device says so.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.check.setting import Setting, case, relative
from benchmarks.machine import Row
from fixefficientnet.models import from_module
from fixefficientnet.options import ExportOptions
from fixefficientnet.runtimes import exporting, formats


def rows(setting: Setting) -> Iterator[Row]:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet" if setting.tiny else "tf_efficientnet_lite0").eval()
    size = 64 if setting.tiny else 224
    images = torch.rand(8, 3, size, size)
    for kind in _LOADERS:
        path = Path(setting.folder, f"model{formats.SUFFIXES[kind]}")
        yield case({"format": kind}, lambda: _exported(model, path, images))  # noqa: B023
        if path.exists():
            yield case({"format": kind}, lambda: _on_device(model, path, images, setting.device))  # noqa: B023


def _exported(model: Any, path: Path, images: Tensor) -> Row:
    start = time.perf_counter()
    made = exporting.export(from_module(model.cpu()), path, ExportOptions(size=images.shape[-1]))
    assert made.agreement is not None
    return {"on": "cpu", "seconds to export": time.perf_counter() - start, "logits": made.agreement.relative}


def _on_device(model: Any, path: Path, images: Tensor, device: str) -> Row:
    run = _LOADERS[formats.format_of(path)](path, device)
    if isinstance(run, str):
        return {"on": run}
    there = images.to(device)
    with torch.inference_mode():
        expected = model.to(device)(there)
        found = torch.as_tensor(run(there)).to(device)
        start = machine.settled(device)
        for _ in range(10):
            run(there)
        seconds = machine.settled(device) - start
    return {"on": device, "logits": relative(found, expected), "images/s": 10 * len(images) / seconds}


Runner = Callable[[Tensor], Any]


def _onnx(path: Path, device: str) -> Runner | str:
    import onnxruntime

    provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[device]
    if provider not in onnxruntime.get_available_providers():
        return f"not on {device}: this onnxruntime is not onnxruntime-gpu"
    session = onnxruntime.InferenceSession(str(path), providers=[provider])
    return lambda images: session.run([formats.LOGITS], {formats.INPUT: images.cpu().numpy()})[0]


def _openvino(path: Path, device: str) -> Runner | str:
    return formats.load(path) if device == "cpu" else f"not on {device}: OpenVINO has no such device"


def _torch_export(path: Path, device: str) -> Runner | str:
    from torch.export.passes import move_to_device_pass

    module: Runner = move_to_device_pass(torch.export.load(path), device).module()
    return module


def _torchscript(path: Path, device: str) -> Runner | str:
    module: Runner = torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]
    return module


_LOADERS: dict[str, Callable[[Path, str], Runner | str]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "torch-export": _torch_export,
    "torchscript": _torchscript,
}
