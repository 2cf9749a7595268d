"""Exported files in their own runtimes."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fixefficientnet._internal import compat, requirements
from fixefficientnet.errors import ExportError

Forward = Callable[[Tensor], Tensor]
"""A forward pass: float32 [N, 3, S, S] → float32 [N, classes]."""
INPUT, LOGITS, PROBABILITIES = "pixel_values", "logits", "probabilities"
METADATA = "fixefficientnet"
"""Key of the preprocessing, as JSON, in a file's metadata."""
SUFFIXES = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "executorch": ".pte",
    "torch-export": ".pt2",
    "torchscript": ".pt",
    "aotinductor": ".pt2",
}
"""File name endings by format; of two with one ending, the first is meant where no format is named."""
PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "executorch": ("executorch",),
}
"""Packages that a format needs besides torch."""


def format_of(path: Path, format: str | None = None) -> str:
    """The format of an exported file, as its ending tells; the ending must be that of the format, if one is named.

    Raises:
        ExportError: There is no such format, or it has another ending.
    """
    if format is not None and format not in SUFFIXES:
        raise ExportError(f"There is no format {format!r}; there are {', '.join(SUFFIXES)}.")
    found = [name for name, suffix in SUFFIXES.items() if suffix == path.suffix]
    if format is not None and format not in found:
        raise ExportError(f"{path}: the ending of a file of the format {format} is {SUFFIXES[format]}.")
    if not found:
        endings = ", ".join(f"{suffix} ({name})" for name, suffix in SUFFIXES.items())
        raise ExportError(f"{path}: the ending of a file is one of {endings}.")
    return format or found[0]


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """Options of ONNX Runtime and OpenVINO; PyTorch's formats go by its own settings.

    Attributes:
        cores: Number of cores for all threads together; None: as the runtime chooses.
        threads: Number of threads that call the model concurrently; they share the cores.
        precision: Precision of the forward pass: "no" is float32; OpenVINO alone has "bf16".
    """

    cores: int | None = None
    threads: int = 1
    precision: str = "no"


_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI")
"""Values of ONEDNN_MAX_CPU_ISA that exclude bfloat16; OpenVINO looks at the processor alone, and then fails."""


def openvino_has(precision: str) -> bool:
    """Whether OpenVINO can compute in a precision ("bf16", "fp16") on this processor."""
    import openvino

    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _WITHOUT_BF16 and precision == "bf16":
        return False
    capabilities: list[str] = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return precision.upper() in capabilities


def load(path: Path, options: RuntimeOptions | None = None, *, format: str | None = None) -> Forward:
    """Opens an exported file.

    Args:
        path: Path of the file, whose ending tells the format.
        options: The runtime's options; None: float32, one calling thread, the runtime's own number of cores.
        format: Name of the format; "aotinductor", whose files are native code that loading runs, must be named.

    Returns:
        The file's forward pass, on the CPU: of a file that normalises inside it takes pixels, uint8 [N, 3, S, S].

    Raises:
        ExportError: The file is native code, and nobody said so; or the runtime does not go with this torch.
        ModuleNotFoundError: The format's runtime is not installed.
    """
    return _LOADERS[format_of(path, format)](path, options or RuntimeOptions())


def _onnx(path: Path, options: RuntimeOptions) -> Forward:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    # each caller computes, and has the help of further threads that all share
    settings.intra_op_num_threads = max(1, options.cores - options.threads + 1) if options.cores else 0
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def _openvino(path: Path, options: RuntimeOptions) -> Forward:
    import openvino

    # else it computes in bfloat16 where the processor can
    hint = "f32" if options.precision == "no" else options.precision
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": options.threads}
    if options.cores:
        settings["INFERENCE_NUM_THREADS"] = options.cores
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    mine = threading.local()

    def run(images: Tensor) -> Tensor:
        if not hasattr(mine, "request"):
            mine.request = compiled.create_infer_request()
        return torch.from_numpy(mine.request.infer([images.contiguous().numpy()])[0].copy())

    return run


def _executorch(path: Path, options: RuntimeOptions) -> Forward:
    with executorch_going():
        from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda images: method.execute([images.contiguous()])[0]


@contextlib.contextmanager
def executorch_going() -> Iterator[None]:
    """Within, ExecuTorch is imported, which says which torch it wants by failing with another.

    Raises:
        ExportError: The two releases do not go together.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        releases = " and ".join(f"{name} {requirements.version(name)}" for name in ("executorch", "torch"))
        raise ExportError(
            f"{releases} do not go together: {error}. Of each, take the newest release: "
            "pip install --upgrade torch torchvision executorch"
        ) from error


def executorch_backends() -> list[str]:
    """What ExecuTorch can compute with on this machine: "XnnpackBackend", "CoreMLBackend", …"""
    with executorch_going():
        from executorch.runtime import Runtime

    names: list[str] = Runtime.get().backend_registry.registered_backend_names
    return names


def _torch_export(path: Path, options: RuntimeOptions) -> Forward:
    # torch.export.load runs any native code in the file, which whoever opens a program does not expect
    if any("data/aotinductor/" in name for name in compat.names_in_archive(path)):
        raise ExportError(
            f"{path} holds native code, which loading would run: it is of the format aotinductor. Name the format if "
            "you trust who made the file."
        )
    module: Forward = torch.export.load(path).module()
    return module


def _torchscript(path: Path, options: RuntimeOptions) -> Forward:
    module: Any = torch.jit.load(str(path), "cpu")  # type: ignore[no-untyped-call]
    return module  # type: ignore[no-any-return]


def _aotinductor(path: Path, options: RuntimeOptions) -> Forward:
    package = compat.load_package(path)
    return lambda images: package(images.contiguous())  # it takes the strides for granted


_LOADERS: dict[str, Callable[[Path, RuntimeOptions], Forward]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "executorch": _executorch,
    "torch-export": _torch_export,
    "torchscript": _torchscript,
    "aotinductor": _aotinductor,
}


def main() -> None:
    """Runs an exported file on batches, for `export`'s check: FORMAT MODEL IMAGES.safetensors LOGITS.safetensors."""
    path, images, logits = map(Path, sys.argv[2:])
    forward = load(path, format=sys.argv[1])
    with torch.inference_mode():
        batches = safetensors.torch.load_file(images)
        found = {name: forward(batch).float().contiguous() for name, batch in batches.items()}
    safetensors.torch.save_file(found, logits)
