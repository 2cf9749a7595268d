"""A model as a file that other runtimes run: ONNX, OpenVINO, torch.export, TorchScript.

Every file takes `pixel_values`, float32 [N, 3, S, S] (normalised as its metadata says), and gives `logits`, float32
[N, classes]; N is free.
"""

import copy
import io
import json
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

from fixefficientnet._internal import requirements
from fixefficientnet._internal.files import beside
from fixefficientnet._internal.modes import in_eval_mode
from fixefficientnet.data.dataset import ImageDataset
from fixefficientnet.errors import ExportError, FixEfficientNetError
from fixefficientnet.manifest import TestTime
from fixefficientnet.options import ExportOptions
from fixefficientnet.runtimes import formats, int8
from fixefficientnet.runtimes.formats import INPUT, METADATA, OUTPUT
from fixefficientnet.runtimes.int8 import Calibration

if TYPE_CHECKING:
    from fixefficientnet.models import LoadedModel

TOLERANCES = {False: 1e-3, True: 3e-2}
"""Largest accepted difference of logits from eager's, relative to the largest; by whether weights are float16."""
_IMAGES = 8
"""Number of generated images per size that a file is compared with eager on."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an exported file's logits agree with eager's, on generated images.

    Attributes:
        difference: Largest absolute difference of any logit.
        relative: The same, relative to eager's largest absolute logit.
        top1: Share of the images with the same top-1 prediction, in [0, 1].
        images: Number of the images.
    """

    difference: float
    relative: float
    top1: float
    images: int


@dataclass(frozen=True, slots=True)
class Int8Accuracy:
    """What 8-bit integers do to the accuracy on the calibration images.

    Attributes:
        before: Number of images that eager classifies correctly.
        after: Number of images that the file classifies correctly.
        images: Number of the images.
    """

    before: int
    after: int
    images: int


@dataclass(frozen=True, slots=True)
class Exported:
    """An exported model.

    Attributes:
        name: The model's name, as it was opened.
        format: "onnx", "openvino", "torch-export" or "torchscript".
        files: The files written: the model, OpenVINO's weights, the labels.
        test: The test-time preprocessing, as in the file's metadata.
        dynamic_size: Whether height and width are free.
        agreement: Agreement of the logits with eager's.
        int8: Accuracy before and after; None without 8-bit integers.
    """

    name: str
    format: str
    files: tuple[Path, ...]
    test: TestTime
    dynamic_size: bool
    agreement: Agreement
    int8: Int8Accuracy | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.stat().st_size for file in self.files)


def files(path: Path) -> list[Path]:
    """All files that an export to `path` writes: the model, OpenVINO's weights, the labels."""
    more = [path.with_suffix(".bin")] if path.suffix == ".xml" else []
    return [path, *more, path.with_name(f"{path.name}.labels.txt")]


def export(
    loaded: "LoadedModel",
    path: Path,
    options: ExportOptions | None = None,
    *,
    format: str | None = None,
    calibration: ImageDataset | None = None,
) -> Exported:
    """Writes a model as a file for another runtime, and checks it in that runtime, in a process of its own.

    Files that are there already are replaced.

    Args:
        loaded: The model, on the CPU.
        path: The file; its ending tells the format (see `formats.SUFFIXES`). OpenVINO writes a `.bin` beside.
        options: The options; None: the defaults.
        format: Name of the format that the ending must be of, if there is to be a check.
        calibration: Labelled images, in the model's class order, if the file is to compute in 8-bit integers.

    Raises:
        ExportError: The model cannot be exported so, or the file disagrees with eager; no file is left then.
        DataError: None of the calibration images can be read.
        ModuleNotFoundError: The format's packages are not installed.
    """
    options = options or ExportOptions()
    kind = formats.format_of(path, format)
    requirements.need(*formats.PACKAGES.get(kind, ()))
    test = loaded.at(options.size)
    options = replace(options, size=test.size)
    loaded = loaded.for_size(test.size)
    images: Calibration | None = None
    if calibration is not None:
        if kind not in int8.PACKAGES or options.half or options.dynamic_size:
            raise ExportError("8-bit integers are for onnx and openvino, of one size, and not with half precision.")
        requirements.need(*int8.PACKAGES[kind])
        images = Calibration(calibration, loaded.transform(test), options.images)
    metadata = json.dumps({"model": loaded.timm_name, **asdict(test), "crop_mode": loaded.crop_mode})
    with in_eval_mode(loaded.network), beside(path) as folder:
        draft = folder / path.name
        before = images.correct(loaded.network)[0] if images else 0
        _write(loaded, draft, metadata, options, images)
        agreement = _compare(loaded.network, draft, _sizes(test.size, options.dynamic_size), TOLERANCES[options.half])
        accuracy = Int8Accuracy(before, *images.correct(formats.load(draft))) if images else None
        if refusal := _refusal(agreement, accuracy, options):
            raise ExportError(f"{refusal} {path} was not written.")
        names = [name for _, name in loaded.labels]
        files(draft)[-1].write_text("\n".join(names) + "\n", encoding="utf-8")
        path.unlink(missing_ok=True)  # an older one must not meet the new weights
        for file in reversed(files(draft)):  # the model last: where it is, what belongs to it is there
            file.chmod(0o644)
            file.replace(path.parent / file.name)
    return Exported(loaded.name, kind, tuple(files(path)), test, options.dynamic_size, agreement, accuracy)


def _write(
    loaded: "LoadedModel", draft: Path, metadata: str, options: ExportOptions, calibration: Calibration | None
) -> None:
    kind = formats.format_of(draft)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch and the exporters
            _WRITERS[kind](loaded.network, draft, metadata, options)
            if calibration:
                int8.quantise(kind, draft, calibration, metadata)
    except FixEfficientNetError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise ExportError(f"{loaded.name} cannot be exported as {kind}: {reason}") from error


def _refusal(agreement: Agreement, accuracy: Int8Accuracy | None, options: ExportOptions) -> str:
    """Why a file is not good enough to be kept; empty if it is."""
    if accuracy:
        if 100 * (accuracy.before - accuracy.after) <= options.max_drop * accuracy.images:
            return ""
        return (
            f"In 8-bit integers {accuracy.after} instead of {accuracy.before} of {accuracy.images} images are correct, "
            f"more than {options.max_drop:g} points less."
        )
    if agreement.relative <= TOLERANCES[options.half] and agreement.top1 == 1:
        return ""
    return (
        f"The file disagrees with eager: logits differ by up to {agreement.difference:.3g} ({agreement.relative:.2g} "
        f"of the largest), {agreement.top1:.0%} of {agreement.images} images have the same top-1 prediction."
    )


def _sizes(size: int, dynamic: bool) -> list[tuple[int, int]]:
    """Heights and widths to compare at."""
    return [(size, size), *([(size + 32, size), (max(32, size - 32), size + 31)] if dynamic else [])]


def _images(count: int, height: int, width: int) -> Tensor:
    """Smooth random images: noise alone is like nothing that a network was made for."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return smooth + 0.1 * torch.randn(count, 3, height, width, generator=generator)


def _compare(model: nn.Module, path: Path, sizes: Sequence[tuple[int, int]], tolerance: float) -> Agreement:
    """Runs a file in a fresh process, on batches of one image and of several, and compares it with eager."""
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
    return Agreement(difference, difference / max(largest, 1e-12), agree / total, total)


def _run_afresh(path: Path, batches: Sequence[Tensor]) -> list[Tensor]:
    """A file's logits of each batch, by a fresh Python process."""
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


def _source(model: nn.Module, options: ExportOptions) -> nn.Module:
    return _InHalf(copy.deepcopy(model).half()) if options.half else model


def _example(options: ExportOptions) -> Tensor:
    assert options.size is not None  # export() saw to it
    return _images(2, options.size, options.size)


def _program(model: nn.Module, options: ExportOptions) -> torch.export.ExportedProgram:
    free: dict[int, Any] = {0: Dim("batch")}
    if options.dynamic_size:
        free |= {2: Dim.AUTO, 3: Dim.AUTO}
    return torch.export.export(_source(model, options), (_example(options),), dynamic_shapes=(free,))


def _to_torch_export(model: nn.Module, path: Path, metadata: str, options: ExportOptions) -> None:
    program = _program(model, options)
    written = io.BytesIO()  # torch ends the process where its own writing meets a full disk
    torch.export.save(program, written, extra_files={METADATA: metadata})
    path.write_bytes(written.getbuffer())


def _to_torchscript(model: nn.Module, path: Path, metadata: str, options: ExportOptions) -> None:
    source = _source(model, options)
    # a trace freezes what Python computes of the size, as padding "same" does
    script: Any = torch.jit.script(source) if options.dynamic_size else torch.jit.trace(source, _example(options))  # type: ignore[no-untyped-call]
    written = io.BytesIO()
    torch.jit.save(script, written, _extra_files={METADATA: metadata})
    path.write_bytes(written.getbuffer())


def _to_onnx(model: nn.Module, path: Path, metadata: str, options: ExportOptions) -> None:
    import onnx

    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT]}
    if options.dynamic_size:
        # the newer exporter, below, takes minutes over the padding "same" of a free size (B0: 288 s against 0.7 s)
        axes = {INPUT: {0: "batch", 2: "height", 3: "width"}, OUTPUT: {0: "batch"}}
        source, example = _source(model, options), _example(options)
        with set_exportable(True):
            torch.onnx.export(source, (example,), str(path), dynamo=False, dynamic_axes=axes, **names)
    else:
        program = torch.onnx.export(_program(model, options), verbose=False, optimize=True, **names)
        assert program is not None
        program.save(str(path))
    written = onnx.load(str(path))
    _name_batch(written.graph)
    for node in written.graph.node:
        del node.metadata_props[:]  # whose paths are this machine's
    onnx.helper.set_model_props(written, {METADATA: metadata})
    onnx.save(written, str(path))


def _name_batch(graph: Any) -> None:
    """Names the batch dimension, as the newer exporter numbers free dimensions."""
    number = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == number:
                dimension.dim_param = "batch"


def _to_openvino(model: nn.Module, path: Path, metadata: str, options: ExportOptions) -> None:
    import openvino

    onnx_file = path.with_suffix(".onnx")
    _to_onnx(model, onnx_file, metadata, replace(options, half=False))
    converted = openvino.convert_model(onnx_file)
    onnx_file.unlink()
    converted.set_rt_info(metadata, METADATA)
    openvino.save_model(converted, path, compress_to_fp16=options.half)


_WRITERS: dict[str, Callable[[nn.Module, Path, str, ExportOptions], None]] = {
    "onnx": _to_onnx,
    "openvino": _to_openvino,
    "torch-export": _to_torch_export,
    "torchscript": _to_torchscript,
}
