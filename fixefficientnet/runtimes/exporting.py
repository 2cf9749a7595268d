"""A model as a file that other runtimes run: ONNX, OpenVINO, torch.export, TorchScript.

Every file takes `pixel_values`, float32 [N, 3, S, S] (normalised as its metadata says), and gives `logits`, float32
[N, classes]; N is free.
"""

import copy
import io
import json
import math
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from timm.layers import set_exportable
from torch import Tensor, nn
from torch.export import Dim

from fixefficientnet import prediction
from fixefficientnet._internal import requirements
from fixefficientnet._internal.files import beside
from fixefficientnet._internal.modes import in_eval_mode
from fixefficientnet.errors import ExportError, FixEfficientNetError
from fixefficientnet.manifest import TestTime
from fixefficientnet.runtimes import formats, int8
from fixefficientnet.runtimes.formats import INPUT, METADATA, OUTPUT
from fixefficientnet.runtimes.int8 import Calibration

if TYPE_CHECKING:
    from fixefficientnet.models import LoadedModel

TOLERANCES = {False: 1e-3, True: 3e-2}
"""Largest difference of logits from eager's, relative to the largest, by whether weights are in half precision."""
_IMAGES = 8


@dataclass(frozen=True, slots=True)
class Checked:
    """What a file gave beside eager.

    Attributes:
        difference: Largest difference of any logit.
        relative: The same, relative to eager's largest logit.
        agreement: Share of images with the same top-1 prediction.
        images: How many generated ones these are of.
        correct: In 8 bits: how many of the calibration's images eager and the file classify correctly.
        measured: In 8 bits: how many of these there are.
    """

    difference: float
    relative: float
    agreement: float
    images: int
    correct: tuple[int, int] | None = None
    measured: int = 0


def files(path: Path) -> list[Path]:
    """All files that an export to `path` writes: itself, what belongs to it, the labels."""
    more = [path.with_suffix(".bin")] if path.suffix == ".xml" else []
    return [path, *more, path.with_name(f"{path.name}.labels.txt")]


def export(
    loaded: "LoadedModel",
    path: Path,
    *,
    test: TestTime,
    dynamic_size: bool = False,
    half: bool = False,
    calibration: Calibration | None = None,
    max_drop: float = 2.0,
) -> Checked:
    """Writes a model as a file, and checks it in its own runtime, in a process of its own.

    Args:
        loaded: The model, on the CPU.
        path: The file; its ending tells the format (see `formats.SUFFIXES`). OpenVINO writes a `.bin` beside.
        test: The preprocessing that it is for.
        dynamic_size: Whether height and width are free too.
        half: Whether weights are float16; inputs and outputs stay float32.
        calibration: Images, if it is to compute in 8-bit integers.
        max_drop: In 8 bits, the loss of accuracy on these, in points, that is still accepted.

    Returns:
        How the file agrees with eager.

    Raises:
        ExportError: It cannot be exported, or the file disagrees with eager; no file is left then.
        ModuleNotFoundError: The format's packages are not installed.
    """
    kind = formats.format_of(path)
    requirements.need(*formats.PACKAGES.get(kind, ()))
    if calibration:
        if kind not in int8.PACKAGES or half or dynamic_size:
            raise ExportError("8-bit integers are for onnx and openvino, of one size, and not with half precision.")
        if not math.isfinite(max_drop):
            raise ExportError(f"A drop of accuracy is a number of points, not {max_drop}.")
        requirements.need(*int8.PACKAGES[kind])
    with in_eval_mode(loaded.network):
        return _export(loaded, path, kind, test, dynamic_size, half, calibration, max_drop)


def _export(
    loaded: "LoadedModel",
    path: Path,
    kind: str,
    test: TestTime,
    dynamic_size: bool,
    half: bool,
    calibration: Calibration | None,
    max_drop: float,
) -> Checked:
    model = loaded.network
    metadata = json.dumps({"model": loaded.timm_name, **asdict(test), "crop_mode": loaded.crop_mode})
    with beside(path) as folder:
        draft = folder / path.name
        example = _images(2, test.size, test.size)
        before, measured = calibration.correct(model) if calibration else (0, 0)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations inside torch and the exporters
                _WRITERS[kind](model, example, draft, metadata, dynamic_size, half)
                if calibration:
                    int8.quantise(kind, draft, calibration, metadata)
        except FixEfficientNetError:
            raise
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            raise ExportError(f"{loaded.name} cannot be exported as {kind}: {reason}") from error
        checked = _check(model, draft, _sizes(test.size, dynamic_size), TOLERANCES[half])
        if calibration:
            after, _ = calibration.correct(formats.load(draft))
            checked = replace(checked, correct=(before, after), measured=measured)
            if 100 * (before - after) > max_drop * measured:
                raise ExportError(
                    f"In 8-bit integers {after} instead of {before} of {measured} images are correct, more than "
                    f"{max_drop:g} points less. {path} was not written."
                )
        elif checked.relative > TOLERANCES[half] or checked.agreement < 1:
            raise ExportError(
                f"The file disagrees with eager: logits differ by up to {checked.difference:.3g} "
                f"({checked.relative:.2g} of the largest), {checked.agreement:.0%} of {checked.images} images have "
                f"the same top-1 prediction. {path} was not written."
            )
        files(draft)[-1].write_text("\n".join(_labels(loaded)) + "\n", encoding="utf-8")
        path.unlink(missing_ok=True)  # an older one must not meet the new weights
        for file in reversed(files(draft)):  # the file itself last: where it is, what belongs to it is there
            file.chmod(0o644)
            file.replace(path.parent / file.name)
    return checked


def _labels(loaded: "LoadedModel") -> Sequence[str]:
    return loaded.classes or [name for _, name in prediction.names_of(loaded.num_classes)]


def _sizes(size: int, dynamic: bool) -> list[tuple[int, int]]:
    """Heights and widths to check."""
    return [(size, size), *([(size + 32, size), (max(32, size - 32), size + 31)] if dynamic else [])]


def _images(count: int, height: int, width: int) -> Tensor:
    """Smooth random images: noise alone is like nothing that a network was made for."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return smooth + 0.1 * torch.randn(count, 3, height, width, generator=generator)


def _check(model: nn.Module, path: Path, sizes: Sequence[tuple[int, int]], tolerance: float) -> Checked:
    """Runs a file in a fresh process, at batches of one and of several, and holds it against eager."""
    batches = [images for size in sizes for images in _images(_IMAGES, *size).tensor_split([1])]
    with torch.inference_mode():
        expected = [model(batch).float() for batch in batches]
    if not all(logits.isfinite().all() for logits in expected):
        raise ExportError("The model itself gives NaN or infinite logits: its weights are damaged.")
    logits = _run_afresh(path, batches)
    difference = 0.0
    largest = max(float(one.abs().max()) for one in expected)
    agree = 0
    for eager, found in zip(expected, logits, strict=True):
        difference = max(difference, float((found - eager).abs().max().nan_to_num(torch.inf)))
        best = eager.topk(min(2, eager.shape[1]), dim=1).values
        close = best[:, 0] - best[:, -1] <= tolerance * largest  # a tie, which rounding may turn
        agree += int(((found.argmax(1) == eager.argmax(1)) | close).sum())
    total = sum(map(len, batches))
    return Checked(difference, difference / max(largest, 1e-12), agree / total, total)


def _run_afresh(path: Path, batches: Sequence[Tensor]) -> list[Tensor]:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        given, found = Path(folder) / "given", Path(folder) / "found"
        given.write_bytes(safetensors.torch.save({str(i): batch for i, batch in enumerate(batches)}))
        # this very package is imported, also where it is not installed, and nothing of the working directory's (-P)
        here = str(Path(__file__).resolve().parents[2])
        code = f"import sys; sys.path.append({here!r}); from fixefficientnet.runtimes.formats import main; main()"
        command = [sys.executable, "-P", "-c", code, str(path.resolve()), str(given), str(found)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise ExportError(f"The exported file does not run: {last}")
        logits = safetensors.torch.load(found.read_bytes())
    return [logits[str(index)] for index in range(len(batches))]


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
    written = io.BytesIO()  # torch ends the process where its own writing meets a full disk
    torch.export.save(program, written, extra_files={METADATA: metadata})
    path.write_bytes(written.getbuffer())


def _to_torchscript(
    model: nn.Module, example: Tensor, path: Path, metadata: str, dynamic_size: bool, half: bool
) -> None:
    source = _halved(model) if half else model
    # a trace freezes what Python computes of the size, as padding "same" does
    script: Any = torch.jit.script(source) if dynamic_size else torch.jit.trace(source, example)  # type: ignore[no-untyped-call]
    written = io.BytesIO()
    torch.jit.save(script, written, _extra_files={METADATA: metadata})
    path.write_bytes(written.getbuffer())


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
        program = torch.onnx.export(_exported(source, example, False), verbose=False, optimize=True, **names)
        assert program is not None
        program.save(str(path))
    written = onnx.load(str(path))
    _name_batch(written.graph)
    for node in written.graph.node:
        del node.metadata_props[:]  # whose paths are this machine's
    onnx.helper.set_model_props(written, {METADATA: metadata})
    onnx.save(written, str(path))


def _name_batch(graph: Any) -> None:
    """The newer exporter numbers free dimensions."""
    number = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == number:
                dimension.dim_param = "batch"


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
