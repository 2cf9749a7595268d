"""A model as a file that other runtimes run: ONNX, OpenVINO, ExecuTorch, torch.export, TorchScript, AOTInductor.

Every file takes `pixel_values`, float32 [N, 3, S, S] (normalised as its metadata says), and gives `logits`, float32
[N, classes]; N is free. On request it takes pixels, uint8, which it normalises itself, and gives `probabilities`.
"""

import contextlib
import copy
import io
import json
import logging
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from timm.layers import set_exportable
from torch import Tensor, nn
from torch.export import Dim

from fixefficientnet._internal import compat, requirements, waiting
from fixefficientnet._internal.afresh import last_words, run_afresh
from fixefficientnet._internal.files import beside, give_usual_rights
from fixefficientnet._internal.modes import in_eval_mode
from fixefficientnet._internal.text import inert
from fixefficientnet.data.dataset import ImageDataset
from fixefficientnet.errors import ExportError, FixEfficientNetError
from fixefficientnet.manifest import TestTime
from fixefficientnet.options import ExportOptions
from fixefficientnet.preprocessing import Preprocess
from fixefficientnet.runtimes import formats, int8
from fixefficientnet.runtimes.formats import INPUT, LOGITS, METADATA, PROBABILITIES
from fixefficientnet.runtimes.int8 import Calibration

if TYPE_CHECKING:
    from fixefficientnet.models import LoadedModel

TOLERANCES = {False: 1e-3, True: 3e-2}
"""Largest accepted difference from eager's output, relative to the largest; by whether weights are float16."""
EXECUTORCH_BATCH = 8
"""Largest batch of an ExecuTorch file, whose memory is planned for it; from 16 on, lowering loses track of it."""
OLDEST_OPSET = 13
"""The first opset with all that 8-bit integers take."""
_NEWER_EXPORTER, _OLDER_EXPORTER = 18, 20
"""The first opset that torch's newer ONNX exporter writes, and the last of the older one's."""
_IMAGES = 8
"""Number of generated images per size that a file is compared with eager on."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an exported file's output agrees with eager's, on generated images.

    Attributes:
        difference: Largest absolute difference of any logit (of any probability, if the file gives these).
        relative: The same, relative to eager's largest absolute value.
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
        format: A name of `formats.SUFFIXES`.
        files: The files written: the model, OpenVINO's weights, the labels.
        test: The test-time preprocessing, as in the file's metadata.
        dynamic_size: Whether height and width are free.
        output: What it gives: "logits" or "probabilities".
        agreement: Agreement of the output with eager's; None where the file's runtime does not run on this machine.
        int8: Accuracy before and after; None without 8-bit integers.
    """

    name: str
    format: str
    files: tuple[Path, ...]
    test: TestTime
    dynamic_size: bool
    output: str
    agreement: Agreement | None
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

    A file for Core ML is checked on Apple's systems alone; elsewhere there is nothing that runs it.

    Files that are there already are replaced.

    Args:
        loaded: The model, on the CPU.
        path: The file; its ending tells the format (see `formats.SUFFIXES`). OpenVINO writes a `.bin` beside.
        options: The options; None: the defaults.
        format: Name of the format; None: by the ending, of which "aotinductor" has none of its own.
        calibration: Labelled images, in the model's class order, if the file is to compute in 8-bit integers.

    Raises:
        ExportError: The model cannot be exported so, or the file disagrees with eager; no file is left then.
        DataError: None of the calibration images can be read.
        ModuleNotFoundError: The format's packages are not installed.
    """
    options = options or ExportOptions()
    kind = formats.format_of(path, format)
    requirements.need(*formats.PACKAGES.get(kind, ()))
    _check(kind, options)
    test = loaded.at(options.size)
    options = replace(options, size=test.size)
    loaded = loaded.for_size(test.size)
    images: Calibration | None = None
    if calibration is not None:
        if kind not in int8.PACKAGES or options.half or options.dynamic_size:
            raise ExportError("8-bit integers are for onnx and openvino, of one size, and not with half precision.")
        requirements.need(*int8.PACKAGES[kind])
        images = Calibration(calibration, loaded.transform(test), options.images)
    output = PROBABILITIES if options.softmax else LOGITS
    described = {"model": loaded.timm_name, **asdict(test), "crop_mode": loaded.crop_mode}
    metadata = json.dumps({**described, "input": "uint8" if options.normalize else "float32", "output": output})
    with in_eval_mode(loaded.network), beside(path) as folder:
        draft = folder / path.name
        before = images.correct(loaded.network)[0] if images else 0
        if images and options.normalize:
            images = replace(images, raw=True)
        _write(loaded, kind, draft, metadata, options, images)
        agreement = _compare(loaded.network, test, kind, draft, options)
        accuracy = Int8Accuracy(before, *images.correct(formats.load(draft))) if images else None
        if refusal := _refusal(agreement, accuracy, options, output):
            raise ExportError(f"{refusal} {path} was not written.")
        names = [name for _, name in loaded.labels]
        files(draft)[-1].write_text("\n".join(map(inert, names)) + "\n", encoding="utf-8")
        path.unlink(missing_ok=True)  # an older one must not meet the new weights
        for file in reversed(files(draft)):  # the model last: where it is, what belongs to it is there
            give_usual_rights(file)
            file.replace(path.parent / file.name)
    return Exported(loaded.name, kind, tuple(files(path)), test, options.dynamic_size, output, agreement, accuracy)


def _check(kind: str, options: ExportOptions) -> None:
    """Refuses options that a format does not have."""
    if options.opset is not None and kind != "onnx":
        raise ExportError(f"--opset is ONNX's; a file of the format {kind} has none.")
    if options.opset is not None and options.opset < OLDEST_OPSET:
        raise ExportError(f"--opset {options.opset}: the oldest is {OLDEST_OPSET}.")
    if options.opset is not None and options.dynamic_size and options.opset > _OLDER_EXPORTER:
        raise ExportError(f"--opset {options.opset}: with --dynamic-size, the newest is {_OLDER_EXPORTER}.")
    if options.delegate != "xnnpack" and kind != "executorch":
        raise ExportError(f"--delegate is ExecuTorch's; a file of the format {kind} has none.")
    if kind == "executorch" and (options.dynamic_size or (options.half and options.delegate == "xnnpack")):
        raise ExportError(
            "An ExecuTorch file has one size, and XNNPACK computes it in float32: leave --dynamic-size and --half out."
        )
    if options.delegate == "coreml" and options.normalize:
        raise ExportError("Core ML's delegate takes no pixels of 8 bits: leave --normalize out.")


def _write(
    loaded: "LoadedModel",
    kind: str,
    draft: Path,
    metadata: str,
    options: ExportOptions,
    calibration: Calibration | None,
) -> None:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch and the exporters
            with _silent():
                _WRITERS[kind](_source(loaded, kind, options), draft, metadata, options)
            if calibration:
                int8.quantise(kind, draft, calibration, metadata)
    except FixEfficientNetError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise ExportError(f"{loaded.name} cannot be exported as {kind}: {reason}") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Within, exporters say nothing of what they try: what they write is checked, and what fails is raised."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _refusal(agreement: Agreement | None, accuracy: Int8Accuracy | None, options: ExportOptions, output: str) -> str:
    """Why a file is not good enough to be kept; empty if it is."""
    if accuracy:
        if 100 * (accuracy.before - accuracy.after) <= options.max_drop * accuracy.images:
            return ""
        return (
            f"In 8-bit integers {accuracy.after} instead of {accuracy.before} of {accuracy.images} images are correct, "
            f"more than {options.max_drop:g} points less."
        )
    if agreement is None or (agreement.relative <= TOLERANCES[options.half] and agreement.top1 == 1):
        return ""
    return (
        f"The file disagrees with eager: {output} differ by up to {agreement.difference:.3g} ({agreement.relative:.2g} "
        f"of the largest), {agreement.top1:.0%} of {agreement.images} images have the same top-1 prediction."
    )


def _sizes(size: int, dynamic: bool) -> list[tuple[int, int]]:
    """Heights and widths to compare at."""
    return [(size, size), *([(size + 32, size), (max(32, size - 32), size + 31)] if dynamic else [])]


def _images(count: int, height: int, width: int, *, raw: bool) -> Tensor:
    """Smooth random images, normalised or raw: noise alone is like nothing that a network was made for."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    images = smooth + 0.1 * torch.randn(count, 3, height, width, generator=generator)
    return (images * 64 + 128).clamp(0, 255).to(torch.uint8) if raw else images


def _compare(model: nn.Module, test: TestTime, kind: str, path: Path, options: ExportOptions) -> Agreement | None:
    """Runs a file in a fresh process, on batches of one image and of several, and compares it with eager."""
    if options.delegate == "coreml" and "CoreMLBackend" not in formats.executorch_backends():
        return None
    every = [_images(_IMAGES, *size, raw=options.normalize) for size in _sizes(test.size, options.dynamic_size)]
    cuts = list(range(1, _IMAGES)) if _single(options) else [1]
    batches = [part for images in every for part in images.tensor_split(cuts)]
    transform = Preprocess.of(test)
    with torch.inference_mode():
        logits = [model(transform.normalise(batch) if options.normalize else batch).float() for batch in batches]
    if not all(one.isfinite().all() for one in logits):
        raise ExportError("The model itself gives NaN or infinite logits: its weights are damaged.")
    expected = [one.softmax(1) for one in logits] if options.softmax else logits
    difference, tolerance = 0.0, TOLERANCES[options.half]
    largest = max(float(one.abs().max()) for one in expected)
    agree = 0
    for eager, found in zip(expected, _run(kind, path, batches), strict=True):
        difference = max(difference, float((found - eager).abs().max().nan_to_num(torch.inf)))
        best = eager.topk(min(2, eager.shape[1]), dim=1).values
        close = best[:, 0] - best[:, -1] <= tolerance * largest  # a tie, which rounding may turn
        agree += int(((found.argmax(1) == eager.argmax(1)) | close).sum())
    total = sum(map(len, batches))
    return Agreement(difference, difference / max(largest, 1e-12), agree / total, total)


def _run(kind: str, path: Path, batches: Sequence[Tensor]) -> list[Tensor]:
    """A file's output of each batch, by a fresh Python process."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        given, found = Path(folder) / "given", Path(folder) / "found"
        given.write_bytes(safetensors.torch.save({str(i): batch for i, batch in enumerate(batches)}))
        code = "from fixefficientnet.runtimes.formats import main; main()"
        try:
            done = run_afresh(code, kind, str(path.resolve()), str(given), str(found), timeout=waiting.longest())
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"The exported file does not run: it gave nothing in {error.timeout:g} s ({waiting.VARIABLE} sets how "
                "long it may take)."
            ) from None
        if done.returncode:
            last = last_words(done, f"it ended with {done.returncode}")
            raise ExportError(f"The exported file does not run: {last}")
        logits = safetensors.torch.load(found.read_bytes())
    return [logits[str(index)] for index in range(len(batches))]


class _Around(nn.Module):
    """A model between what a file takes and what it gives."""

    pixel_whole: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: nn.Module, test: TestTime, options: ExportOptions, *, half: bool):
        super().__init__()
        self.model = copy.deepcopy(model).half() if half else model
        self.half_, self.normalize, self.softmax = half, options.normalize, options.softmax
        # names that no operation has: older exporters take one for the other
        for name, value in (("pixel_whole", (255.0,) * 3), ("pixel_mean", test.mean), ("pixel_std", test.std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32)[:, None, None])

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.normalize:  # in the order of `Preprocess.normalise`
            pixel_values = pixel_values.float().div(self.pixel_whole).sub(self.pixel_mean).div(self.pixel_std)
        logits: Tensor = self.model(pixel_values.half() if self.half_ else pixel_values).float()
        return logits.softmax(1) if self.softmax else logits


def _source(loaded: "LoadedModel", kind: str, options: ExportOptions) -> nn.Module:
    half = options.half and kind not in _HALVING
    if not (half or options.normalize or options.softmax):
        return loaded.network
    return _Around(loaded.network, loaded.at(options.size), options, half=half).eval()


_HALVING = ("openvino", "executorch")
"""Formats whose own converters make the weights float16."""


def _single(options: ExportOptions) -> bool:
    """Whether a file takes one image at a time: with a free N, Core ML's delegate takes no less than two."""
    return options.delegate == "coreml"


def _example(options: ExportOptions) -> Tensor:
    assert options.size is not None  # export() saw to it
    return _images(1 if _single(options) else 2, options.size, options.size, raw=options.normalize)


def _program(source: nn.Module, options: ExportOptions, batch: Any = None) -> torch.export.ExportedProgram:
    free: dict[int, Any] = {} if _single(options) else {0: batch or Dim("batch")}
    if options.dynamic_size:
        free |= {2: Dim.AUTO, 3: Dim.AUTO}
    return torch.export.export(source, (_example(options),), dynamic_shapes=(free,))


def _to_torch_export(source: nn.Module, path: Path, metadata: str, options: ExportOptions) -> None:
    program = _program(source, options)
    written = io.BytesIO()  # torch ends the process where its own writing meets a full disk
    torch.export.save(program, written, extra_files={METADATA: metadata})
    path.write_bytes(written.getbuffer())


def _to_aotinductor(source: nn.Module, path: Path, metadata: str, options: ExportOptions) -> None:
    try:
        compat.compile_package(_program(source, options), path, {METADATA: metadata})
    except RuntimeError as error:
        if "C++ compiler" not in str(error):
            raise
        raise ExportError(
            "AOTInductor compiles with a C++ compiler, and found none: install g++, or name one in the environment "
            "variable CXX."
        ) from error


def _to_executorch(source: nn.Module, path: Path, metadata: str, options: ExportOptions) -> None:
    with formats.executorch_going():
        from executorch.exir import to_edge_transform_and_lower

        partitioner = _PARTITIONERS[options.delegate](options)
    program = _program(source, options, Dim("batch", min=1, max=EXECUTORCH_BATCH))
    lowered = to_edge_transform_and_lower(program, partitioner=[partitioner], constant_methods={METADATA: metadata})
    path.write_bytes(lowered.to_executorch().buffer)


def _xnnpack(options: ExportOptions) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return XnnpackPartitioner()


def _coreml(options: ExportOptions) -> Any:
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    precision = coremltools.precision.FLOAT16 if options.half else coremltools.precision.FLOAT32
    return CoreMLPartitioner(compile_specs=CoreMLBackend.generate_compile_specs(compute_precision=precision))


_PARTITIONERS: dict[str, Callable[[ExportOptions], Any]] = {"xnnpack": _xnnpack, "coreml": _coreml}


def _to_torchscript(source: nn.Module, path: Path, metadata: str, options: ExportOptions) -> None:
    # a trace freezes what Python computes of the size, as padding "same" does
    script: Any = torch.jit.script(source) if options.dynamic_size else torch.jit.trace(source, _example(options))  # type: ignore[no-untyped-call]
    written = io.BytesIO()
    torch.jit.save(script, written, _extra_files={METADATA: metadata})
    path.write_bytes(written.getbuffer())


def _to_onnx(source: nn.Module, path: Path, metadata: str, options: ExportOptions) -> None:
    import onnx

    output = PROBABILITIES if options.softmax else LOGITS
    how: dict[str, Any] = {"input_names": [INPUT], "output_names": [output], "opset_version": options.opset}
    # the newer exporter, below, takes minutes over the padding "same" of a free size (B0: 288 s against 0.7 s)
    if options.dynamic_size or (options.opset or _NEWER_EXPORTER) < _NEWER_EXPORTER:
        free = {0: "batch", 2: "height", 3: "width"} if options.dynamic_size else {0: "batch"}
        axes = {INPUT: free, output: {0: "batch"}}
        with set_exportable(True):
            torch.onnx.export(source, (_example(options),), str(path), dynamo=False, dynamic_axes=axes, **how)
    else:
        program = torch.onnx.export(_program(source, options), verbose=False, optimize=True, **how)
        assert program is not None
        program.save(str(path))
    written = onnx.load(str(path))
    (opset,) = (entry.version for entry in written.opset_import if not entry.domain)
    if options.opset not in (None, opset):
        raise ExportError(f"--opset {options.opset}: the exporter got no further than {opset} with this network.")
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


def _to_openvino(source: nn.Module, path: Path, metadata: str, options: ExportOptions) -> None:
    import openvino

    onnx_file = path.with_suffix(".onnx")
    _to_onnx(source, onnx_file, metadata, options)
    converted = openvino.convert_model(onnx_file)
    onnx_file.unlink()
    converted.set_rt_info(metadata, METADATA)
    openvino.save_model(converted, path, compress_to_fp16=options.half)


_WRITERS: dict[str, Callable[[nn.Module, Path, str, ExportOptions], None]] = {
    "onnx": _to_onnx,
    "openvino": _to_openvino,
    "executorch": _to_executorch,
    "torch-export": _to_torch_export,
    "torchscript": _to_torchscript,
    "aotinductor": _to_aotinductor,
}
