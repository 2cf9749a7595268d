"""Exported files in their own runtimes; as a command, one batch after the other:

python -m fixefficientnet.runtimes FILE GIVEN.safetensors FOUND.safetensors
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

INPUT, OUTPUT = "pixel_values", "logits"
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2", "torchscript": ".pt"}
"""Endings of the exported files, by format."""


def load(path: Path, *, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Opens an exported file.

    Args:
        path: Its ending tells the format.
        threads: How many ONNX Runtime and OpenVINO compute with; None: as they choose.

    Returns:
        float32 [N, 3, S, S] → float32 [N, classes], on the CPU.

    Raises:
        ModuleNotFoundError: The format's runtime is not installed.
    """
    kind = {suffix: kind for kind, suffix in SUFFIXES.items()}[path.suffix]
    return _LOADERS[kind](path, threads)


def _onnx(path: Path, threads: int | None) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda pictures: torch.from_numpy(session.run([OUTPUT], {INPUT: pictures.numpy()})[0])


def _openvino(path: Path, threads: int | None) -> Callable[[Tensor], Tensor]:
    import openvino

    # else it computes in bfloat16 where the processor can
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda pictures: torch.from_numpy(compiled(pictures.contiguous().numpy())[0].copy())


def _torch_export(path: Path, threads: int | None) -> Callable[[Tensor], Tensor]:
    module: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return module


def _torchscript(path: Path, threads: int | None) -> Callable[[Tensor], Tensor]:
    module: Any = torch.jit.load(str(path), "cpu")  # type: ignore[no-untyped-call]
    return module  # type: ignore[no-any-return]


_LOADERS: dict[str, Callable[[Path, int | None], Callable[[Tensor], Tensor]]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "torch-export": _torch_export,
    "torchscript": _torchscript,
}


def main() -> None:
    """Runs a file over the batches of another."""
    file, given, found = map(Path, sys.argv[1:])
    run = load(file)
    with torch.inference_mode():
        batches = safetensors.torch.load_file(given)
        logits = {name: run(batch).float().contiguous() for name, batch in batches.items()}
    safetensors.torch.save_file(logits, found)


if __name__ == "__main__":
    main()
