"""A model as a file that other runtimes run: ONNX, OpenVINO, torch.export, TorchScript.

Every file takes `pixel_values`, float32 [N, 3, S, S] (normalised as its metadata says), and gives `logits`, float32
[N, classes]; N is free.
"""

import copy
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from timm.layers import set_exportable
from torch import Tensor, nn
from torch.export import Dim

from fixefficientnet import prediction
from fixefficientnet.errors import ExportError
from fixefficientnet.manifest import TestTime
from fixefficientnet.runtimes import INPUT, OUTPUT, SUFFIXES

if TYPE_CHECKING:
    from fixefficientnet.evaluation.models import Opened

METADATA = "fixefficientnet"
"""Key of the preprocessing, as JSON, in a file's metadata."""
TOLERANCES = {False: 1e-3, True: 3e-2}
"""Largest difference of logits from eager's, relative to the largest, by whether weights are in half precision."""
_PICTURES = 8


@dataclass(frozen=True, slots=True)
class Checked:
    """What a file gave beside eager.

    Attributes:
        difference: Largest difference of any logit.
        relative: The same, relative to eager's largest logit.
        agreement: Share of pictures with the same best guess.
        pictures: How many there were.
    """

    difference: float
    relative: float
    agreement: float
    pictures: int


def export(
    opened: "Opened", path: Path, kind: str, *, test: TestTime, dynamic_size: bool = False, half: bool = False
) -> Checked:
    """Writes a model as a file, and checks it in its own runtime, in a process of its own.

    Args:
        opened: The model, on the CPU.
        path: The file; its ending must be the format's (see `runtimes.SUFFIXES`). OpenVINO writes a `.bin` beside.
        kind: "onnx", "openvino", "torch-export" or "torchscript".
        test: The preprocessing that it is for.
        dynamic_size: Whether height and width are free too.
        half: Whether weights are float16; inputs and outputs stay float32.

    Returns:
        How the file agrees with eager.

    Raises:
        ExportError: It cannot be exported, or the file disagrees with eager; no file is left then.
        ModuleNotFoundError: The format's packages are not installed.
    """
    if kind not in SUFFIXES:
        raise ExportError(f"There is no format {kind!r}; there are {', '.join(SUFFIXES)}.")
    if path.suffix != SUFFIXES[kind]:
        raise ExportError(f"{path}: a file of the format {kind} ends in {SUFFIXES[kind]}.")
    model = opened.model.eval()
    metadata = json.dumps({"model": opened.name, **asdict(test)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft = Path(folder) / path.name
        example = _pictures(2, test.size)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations inside torch and the exporters
                _WRITERS[kind](model, example, draft, metadata, dynamic_size, half)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            raise ExportError(f"{opened.name} cannot be exported as {kind}: {reason}") from error
        sizes = [test.size, *([test.size + 32] if dynamic_size else [])]
        checked = _check(model, draft, sizes)
        if checked.relative > TOLERANCES[half] or checked.agreement < 1:
            raise ExportError(
                f"The file disagrees with eager: logits differ by up to {checked.difference:.3g} "
                f"({checked.relative:.2g} of the largest), {checked.agreement:.0%} of {checked.pictures} pictures have "
                f"the same best guess. {path} was not written."
            )
        (Path(folder) / f"{path.stem}.labels.txt").write_text("\n".join(_labels(opened)) + "\n", encoding="utf-8")
        # the file itself last: where it is, what belongs to it is there
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            file.chmod(0o644)
            file.replace(path.parent / file.name)
    return checked


def _labels(opened: "Opened") -> Sequence[str]:
    return opened.classes or [name for _, name in prediction.names_of(opened.num_classes)]


def _pictures(count: int, size: int) -> Tensor:
    """Smooth random pictures: noise alone is like nothing that a network was made for."""
    generator = torch.Generator().manual_seed(size)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    return smooth + 0.1 * torch.randn(count, 3, size, size, generator=generator)


def _check(model: nn.Module, path: Path, sizes: Sequence[int]) -> Checked:
    """Runs a file in a fresh process, at batches of one and of several, and holds it against eager."""
    batches = [pictures for size in sizes for pictures in _pictures(_PICTURES, size).tensor_split([1])]
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given", Path(folder) / "found"
        safetensors.torch.save_file({str(i): batch for i, batch in enumerate(batches)}, given)
        command = [sys.executable, "-m", "fixefficientnet.runtimes", str(path), str(given), str(found)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ExportError(f"The exported file does not run: {last}")
        logits = safetensors.torch.load_file(found)
    difference = largest = 0.0
    agree = total = 0
    with torch.inference_mode():
        for index, batch in enumerate(batches):
            expected, got = model(batch).float(), logits[str(index)]
            difference = max(difference, float((got - expected).abs().max().nan_to_num(torch.inf)))
            largest = max(largest, float(expected.abs().max()))
            agree += int((got.argmax(1) == expected.argmax(1)).sum())
            total += len(batch)
    return Checked(difference, difference / largest, agree / total, total)


class _InHalf(nn.Module):
    """A model in float16 between float32 inputs and outputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values.half())
        return logits.float()


def _halved(model: nn.Module) -> nn.Module:
    return _InHalf(copy.deepcopy(model).half())


def _exported(model: nn.Module, example: Tensor, dynamic_size: bool) -> torch.export.ExportedProgram:
    free: dict[int, Any] = {0: Dim("batch")}
    if dynamic_size:
        free |= {2: Dim.AUTO, 3: Dim.AUTO}
    return torch.export.export(model, (example,), dynamic_shapes=(free,))


def _to_torch_export(
    model: nn.Module, example: Tensor, path: Path, metadata: str, dynamic_size: bool, half: bool
) -> None:
    program = _exported(_halved(model) if half else model, example, dynamic_size)
    torch.export.save(program, path, extra_files={METADATA: metadata})


def _to_torchscript(
    model: nn.Module, example: Tensor, path: Path, metadata: str, dynamic_size: bool, half: bool
) -> None:
    source = _halved(model) if half else model
    # a trace freezes what Python computes of the size, as padding "same" does
    script: Any = torch.jit.script(source) if dynamic_size else torch.jit.trace(source, example)  # type: ignore[no-untyped-call]
    torch.jit.save(script, str(path), _extra_files={METADATA: metadata})


def _to_onnx(model: nn.Module, example: Tensor, path: Path, metadata: str, dynamic_size: bool, half: bool) -> None:
    import onnx

    source = _halved(model) if half else model
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT]}
    if dynamic_size:
        # the newer exporter, below, takes minutes over the padding "same" of a free size (B0: 288 s against 0.7 s)
        axes = {INPUT: {0: "batch", 2: "height", 3: "width"}, OUTPUT: {0: "batch"}}
        with set_exportable(True):
            torch.onnx.export(source, (example,), str(path), dynamo=False, dynamic_axes=axes, **names)
    else:
        program = torch.onnx.export(_exported(source, example, False), verbose=False, **names)
        assert program is not None
        program.save(str(path))
    written = onnx.load(str(path))
    onnx.helper.set_model_props(written, {METADATA: metadata})
    onnx.save(written, str(path))


def _to_openvino(model: nn.Module, example: Tensor, path: Path, metadata: str, dynamic_size: bool, half: bool) -> None:
    import openvino

    onnx_file = path.with_suffix(".onnx")
    _to_onnx(model, example, onnx_file, metadata, dynamic_size, False)
    converted = openvino.convert_model(onnx_file)
    onnx_file.unlink()
    converted.set_rt_info(metadata, METADATA)
    openvino.save_model(converted, path, compress_to_fp16=half)


_WRITERS: dict[str, Callable[[nn.Module, Tensor, Path, str, bool, bool], None]] = {
    "onnx": _to_onnx,
    "openvino": _to_openvino,
    "torch-export": _to_torch_export,
    "torchscript": _to_torchscript,
}
