"""What computes a model's forward pass: PyTorch itself, torch.compile, or another runtime from an exported file.

Exported files are kept (in huggingface_hub's assets cache), named by a hash of the weights, the network, the size and
the exporter's versions: the same model is exported once.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import cached_assets_path, constants
from huggingface_hub.utils import WeakFileLock
from torch import Tensor

from fixefficientnet._internal import compat, requirements
from fixefficientnet._internal.files import remove_partial
from fixefficientnet.errors import ExportError
from fixefficientnet.manifest import TestTime
from fixefficientnet.runtimes import formats

if TYPE_CHECKING:
    from fixefficientnet.models import LoadedModel

EXPORTED = ("onnx", "openvino")
"""Engines that run an exported file."""
EXPORTER = 1
"""Raised when what `export` writes changes: files that are kept from before are not used then."""
ENGINES = ("eager", "compile", *EXPORTED)


def check(engine: str, device: torch.device | str, precision: str = "no") -> None:
    """Refuses an engine that does not run there.

    Raises:
        ExportError: There is none of this name, or it does not run there, or not in this precision.
    """
    if engine not in ENGINES:
        raise ExportError(f"--engine {engine}: there are {', '.join(ENGINES)}.")
    if engine in EXPORTED and torch.device(device).type != "cpu":
        raise ExportError(f"--engine {engine} runs on the CPU: --device cpu.")
    if engine == "onnx" and precision != "no":
        raise ExportError("--engine onnx computes in float32: leave --mixed-precision out.")
    if engine == "openvino" and precision != "no":
        requirements.need("openvino")
        if not formats.openvino_has(precision):
            raise ExportError(f"--engine openvino: this processor cannot compute in {precision}.")


def exported(loaded: "LoadedModel", test: TestTime, engine: str, say: Callable[[str], None] | None = None) -> Path:
    """The exported file of a model at one size; made and checked where it is not kept yet.

    Args:
        loaded: The model, on the CPU.
        test: Its test-time preprocessing.
        engine: "onnx" or "openvino".
        say: Told what takes its time.

    Raises:
        ExportError: It cannot be exported, or the runtime disagrees with PyTorch.
        ModuleNotFoundError: The runtime is not installed.
    """
    requirements.need(*formats.PACKAGES[engine])
    deciding = ("torch", "timm", *formats.PACKAGES[engine])
    identity = {"engine": engine, "size": test.size, "exporter": EXPORTER, **loaded.identity}
    identity |= {package: requirements.version(package) for package in deciding}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    folder = cached_assets_path(
        "fixefficientnet", namespace="exports", subfolder=digest, assets_dir=constants.HF_ASSETS_CACHE
    )
    path = folder / f"model-{test.size}{formats.SUFFIXES[engine]}"
    if not path.is_file():
        from fixefficientnet.runtimes import exporting

        with WeakFileLock(folder / ".lock"):  # other processes of the same evaluation want it too
            remove_partial(folder)
            if not path.is_file():
                if say:
                    say(f"{loaded.name}: exporting for {engine} at {test.size} pixels; kept for the next time")
                exporting.export(loaded, path, test=test)
    return path


@contextlib.contextmanager
def running(
    loaded: "LoadedModel", test: TestTime, engine: str, *, threads: int = 1, precision: str = "no"
) -> Iterator[None]:
    """Within, the model's forward pass is the engine's: float32 [N, 3, S, S] → float32 [N, classes].

    Args:
        loaded: The model; its weights, mode and attributes stay as they are.
        test: The size that it is shown images at.
        engine: One of `ENGINES`.
        threads: How many threads call it concurrently; they share the cores. "compile" takes one.
        precision: "no" or "bf16": what OpenVINO computes in.

    Raises:
        ExportError: As `exported`; or the model is not float32, which exported files are.
    """
    if engine == "eager":
        yield
        return
    model: Any = loaded.network
    if engine in EXPORTED and (dtype := next(model.parameters()).dtype) != torch.float32:
        raise ExportError(f"The engine {engine} computes in float32, and the model is in {dtype}.")
    own = vars(model).get("forward")
    if engine == "compile":
        forward = _compiled(model.forward)
    else:
        forward = _loaded(loaded, test, engine, formats.RuntimeOptions(torch.get_num_threads(), threads, precision))
    model.forward = forward
    try:
        yield
    finally:
        del model.forward  # the class's own again
        if own is not None:
            model.forward = own


def _loaded(
    loaded: "LoadedModel", test: TestTime, engine: str, how: formats.RuntimeOptions
) -> Callable[[Tensor], Tensor]:
    path = exported(loaded, test, engine)
    try:
        return formats.load(path, how)
    except (ModuleNotFoundError, MemoryError):
        raise
    except Exception:  # the kept file is damaged, and each runtime has its own words for that
        path.unlink(missing_ok=True)
        return formats.load(exported(loaded, test, engine), how)


def _compiled(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Compiles once: smaller batches than the largest so far (a dataset's last) are filled up.

    Weights are frozen into the code, so what was compiled for another model before must be forgotten.
    """
    torch.compiler.reset()
    compiled = torch.compile(forward, dynamic=False)
    largest = 0

    def run(images: Tensor) -> Tensor:
        nonlocal largest
        count = len(images)
        largest = max(largest, count)
        if count < largest:
            images = torch.cat([images, images[:1].expand(largest - count, -1, -1, -1)])
        with compat.freezing(), torch.no_grad():
            logits: Tensor = compiled(images.contiguous(memory_format=torch.channels_last))
        return logits[:count]

    return run
