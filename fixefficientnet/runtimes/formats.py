"""Exported files in their own runtimes."""

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fixefficientnet.errors import ExportError

INPUT, OUTPUT = "pixel_values", "logits"
METADATA = "fixefficientnet"
"""Key of the preprocessing, as JSON, in a file's metadata."""
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2", "torchscript": ".pt"}
"""Endings of the exported files, by format."""
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
"""What a format needs besides torch."""


def format_of(path: Path, kind: str | None = None) -> str:
    """The format of an exported file.

    Args:
        path: Of the file.
        kind: The format's name, if it was given; else the ending tells.

    Raises:
        ExportError: There is no such format, or it has another ending.
    """
    by_suffix = {suffix: name for name, suffix in SUFFIXES.items()}
    endings = ", ".join(f"{suffix} ({name})" for name, suffix in SUFFIXES.items())
    if kind is not None and kind not in SUFFIXES:
        raise ExportError(f"There is no format {kind!r}; there are {', '.join(SUFFIXES)}.")
    if by_suffix.get(path.suffix) is None or by_suffix[path.suffix] != (kind or by_suffix[path.suffix]):
        of = f" of the format {kind}" if kind else ""
        raise ExportError(f"{path}: the ending of a file{of} is {SUFFIXES[kind] if kind else f'one of {endings}'}.")
    return by_suffix[path.suffix]


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """How ONNX Runtime and OpenVINO compute; PyTorch's formats go by its own settings.

    Attributes:
        cores: For all threads together; None: as the runtime chooses.
        threads: How many threads call the model concurrently; they share the cores.
        precision: "no" is float32; "bf16": OpenVINO alone.
    """

    cores: int | None = None
    threads: int = 1
    precision: str = "no"


_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI")
"""What oneDNN may be limited to; OpenVINO looks at the processor alone, and then cannot run what it made."""


def openvino_has(precision: str) -> bool:
    """Whether OpenVINO can compute in it on this processor."""
    import openvino

    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _WITHOUT_BF16 and precision == "bf16":
        return False
    capabilities: list[str] = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return precision.upper() in capabilities


def load(path: Path, how: RuntimeOptions | None = None) -> Callable[[Tensor], Tensor]:
    """Opens an exported file.

    Args:
        path: Its ending tells the format.
        how: It computes; None: in float32, called by one thread, with the runtime's own number of cores.

    Returns:
        float32 [N, 3, S, S] → float32 [N, classes], on the CPU.

    Raises:
        ModuleNotFoundError: The format's runtime is not installed.
    """
    return _LOADERS[format_of(path)](path, how or RuntimeOptions())


def _onnx(path: Path, how: RuntimeOptions) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # each caller computes, and has the help of further threads that all share
    options.intra_op_num_threads = max(1, how.cores - how.threads + 1) if how.cores else 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _openvino(path: Path, how: RuntimeOptions) -> Callable[[Tensor], Tensor]:
    import openvino

    # else it computes in bfloat16 where the processor can
    hint = "f32" if how.precision == "no" else how.precision
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": how.threads}
    if how.cores:
        options["INFERENCE_NUM_THREADS"] = how.cores
    compiled = openvino.Core().compile_model(path, "CPU", options)
    mine = threading.local()

    def run(images: Tensor) -> Tensor:
        if not hasattr(mine, "request"):
            mine.request = compiled.create_infer_request()
        return torch.from_numpy(mine.request.infer([images.contiguous().numpy()])[0].copy())

    return run


def _torch_export(path: Path, how: RuntimeOptions) -> Callable[[Tensor], Tensor]:
    module: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return module


def _torchscript(path: Path, how: RuntimeOptions) -> Callable[[Tensor], Tensor]:
    module: Any = torch.jit.load(str(path), "cpu")  # type: ignore[no-untyped-call]
    return module  # type: ignore[no-any-return]


_LOADERS: dict[str, Callable[[Path, RuntimeOptions], Callable[[Tensor], Tensor]]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "torch-export": _torch_export,
    "torchscript": _torchscript,
}


def main() -> None:
    """Runs a file over the batches of another: FILE GIVEN.safetensors FOUND.safetensors, as `export` asks."""
    file, given, found = map(Path, sys.argv[1:])
    run = load(file)
    with torch.inference_mode():
        batches = safetensors.torch.load_file(given)
        logits = {name: run(batch).float().contiguous() for name, batch in batches.items()}
    safetensors.torch.save_file(logits, found)
