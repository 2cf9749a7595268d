"""What computes a model's forward pass: PyTorch itself, torch.compile, or another runtime from an exported file.

Exported files are kept (in huggingface_hub's assets cache), named by a hash of the weights, the network, the size and
the exporter's versions: the same model is exported once.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import cached_assets_path, constants
from torch import Tensor

from fixefficientnet._internal import compat, processes, requirements
from fixefficientnet._internal.files import remove_partial, write_atomically
from fixefficientnet._internal.waiting import locked
from fixefficientnet.errors import ExportError
from fixefficientnet.hub import sha256_of
from fixefficientnet.manifest import TestTime
from fixefficientnet.options import ENGINES, EXPORTED
from fixefficientnet.runtimes import formats
from fixefficientnet.runtimes.formats import Forward

if TYPE_CHECKING:
    from fixefficientnet.models import LoadedModel

OnMessage = Callable[[str], None]
EXPORTER = 1
"""Version of what `export` writes; a new one makes files that were kept before unused."""


def check(engine: str, device: torch.device | str, precision: str = "no") -> None:
    """Refuses an engine that cannot compute on a device or in a precision ("no", "bf16", "fp16").

    Raises:
        ExportError: There is no such engine, or it does not run there, or not in this precision.
        ModuleNotFoundError: OpenVINO, asked for a precision, is not installed.
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


def device_for(engine: str, device: torch.device | str | None, precision: str = "no") -> torch.device:
    """The device to compute on, after all checks that engine, device and precision go together here.

    Where none is asked for, an engine that runs an exported file takes the CPU, the others cuda if there is one.

    Raises:
        FixEfficientNetError: The device cannot be used here, or lacks the precision.
        ExportError: As `check` raises.
    """
    found = processes.usable_device("cpu" if device is None and engine in EXPORTED else device)
    processes.check_precision(precision, cpu=found.type == "cpu")
    check(engine, found, precision)
    return found


def exported(loaded: "LoadedModel", test: TestTime, engine: str, on_message: OnMessage | None = None) -> Path:
    """The exported file of a model on the CPU, at the size of `test`; made and checked where it is not kept yet.

    The engine is "onnx" or "openvino". An export takes its time: `on_message` is called with one line before.

    Raises:
        ExportError: The model cannot be exported, or the runtime disagrees with PyTorch.
        ModuleNotFoundError: The runtime is not installed.
    """
    requirements.need(*formats.PACKAGES[engine])
    deciding = ("torch", "timm", *formats.PACKAGES[engine])
    identity = {"engine": engine, "size": test.size, "exporter": EXPORTER, **loaded.identity}
    identity |= {package: requirements.version(package) for package in deciding}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    folder = _folder(digest, on_message)
    path = folder / f"model-{test.size}{formats.SUFFIXES[engine]}"
    if not _is_whole(path):
        from fixefficientnet.runtimes import exporting

        with contextlib.ExitStack() as stack:
            try:  # other processes of the same evaluation want it too
                stack.enter_context(locked(folder / ".lock", f"{folder}, where exported files are kept,"))
            except OSError as error:
                raise ExportError(f"{error}. End that process, or set HF_ASSETS_CACHE to another place.") from error
            remove_partial(folder)
            if not _is_whole(path):
                if on_message:
                    on_message(f"{loaded.name}: exporting for {engine} at {test.size} pixels; kept for the next time")
                _sum_of(path).unlink(missing_ok=True)
                exporting.export(replace(loaded, test=test), path)
                write_atomically(_sum_of(path), _sha256(path).encode())
    return path


def _sum_of(path: Path) -> Path:
    """The file with the hash of an exported file."""
    return path.with_name(f"{path.name}.sha256")


def _is_whole(path: Path) -> bool:
    """Whether an exported file is kept, and is what was exported: runtimes compute with damaged weights as with any."""
    try:
        return _sum_of(path).read_text(encoding="ascii") == _sha256(path)
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    """sha256 of an exported file and of what belongs to it."""
    digest = hashlib.sha256()
    for file in (path, path.with_suffix(".bin")):  # OpenVINO's weights
        if file.is_file():
            digest.update(bytes.fromhex(sha256_of(file)))
    return digest.hexdigest()


def _folder(digest: str, on_message: OnMessage | None) -> Path:
    """Where an exported file is kept: in the Hub's cache, or for this process alone where that cannot be written."""
    try:
        folder = cached_assets_path(
            "fixefficientnet", namespace="exports", subfolder=digest, assets_dir=constants.HF_ASSETS_CACHE
        )
        if os.access(folder, os.W_OK) or any(folder.glob("model-*")):
            return folder
        reason = "it is read-only"
    except OSError as error:
        reason = error.strerror or str(error)
    folder = _temporary() / digest
    if on_message and not folder.is_dir():
        on_message(
            f"{constants.HF_ASSETS_CACHE} cannot be written ({reason}): exported files are kept for this process only. "
            "HF_ASSETS_CACHE, or HF_HOME, names another place."
        )
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def _temporary() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="fixefficientnet-exports-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def forward_of(
    loaded: "LoadedModel",
    test: TestTime,
    engine: str,
    *,
    threads: int = 1,
    precision: str = "no",
    on_message: OnMessage | None = None,
) -> Forward:
    """A model's forward pass by an engine: float32 [N, 3, S, S] → float32 [N, classes]; the model stays as it is.

    `threads` is how many threads call it concurrently; they share the cores, and "compile" takes one. The precision is
    "no", or "bf16" for OpenVINO alone: PyTorch's engines follow autocast.

    Raises:
        ExportError: As `exported` raises; or the model is not in float32, as exported files are.
    """
    model = loaded.network
    if engine == "eager":
        return model
    if engine == "compile":
        return _compiled(model.forward)
    if (dtype := next(model.parameters()).dtype) != torch.float32:
        raise ExportError(f"The engine {engine} computes in float32, and the model is in {dtype}.")
    options = formats.RuntimeOptions(torch.get_num_threads(), threads, precision)
    path = exported(loaded, test, engine, on_message)
    try:
        return formats.load(path, options)
    except (ModuleNotFoundError, MemoryError):
        raise
    except Exception:  # the kept file is damaged, and each runtime has its own words for that
        path.unlink(missing_ok=True)
        return formats.load(exported(loaded, test, engine, on_message), options)


@contextlib.contextmanager
def running(
    loaded: "LoadedModel", test: TestTime, engine: str, *, threads: int = 1, precision: str = "no"
) -> Iterator[None]:
    """Within, the model's own forward pass is the engine's; arguments and errors as in `forward_of`."""
    if engine == "eager":
        yield
        return
    model: Any = loaded.network
    own = vars(model).get("forward")
    model.forward = forward_of(loaded, test, engine, threads=threads, precision=precision)
    try:
        yield
    finally:
        del model.forward  # the class's own again
        if own is not None:
            model.forward = own


def _compiled(forward: Forward) -> Forward:
    """Compiles a forward pass once: batches smaller than the largest so far (a dataset's last) are filled up.

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
