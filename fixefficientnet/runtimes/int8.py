"""Exported files in 8-bit integers, by the runtimes' own quantizers: ONNX Runtime's, and NNCF for OpenVINO."""

import contextlib
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fixefficientnet.data.dataset import ImageDataset
from fixefficientnet.data.loading import InEveryEpoch, load_batches
from fixefficientnet.errors import DataError
from fixefficientnet.preprocessing import Preprocess
from fixefficientnet.runtimes import formats
from fixefficientnet.runtimes.formats import Forward

PACKAGES = {"onnx": ("sympy",), "openvino": ("nncf",)}
"""Packages that quantizing a format needs besides its own."""
_BATCH = 8


@dataclass(frozen=True)
class Calibration:
    """Labelled images, evenly spread over a dataset, that give ranges of activations, and accuracy.

    Attributes:
        dataset: The dataset, in the model's class order.
        transform: The test-time transform.
        count: Number of the images, at most.
        raw: Whether the file takes pixels, which it normalises itself.
    """

    dataset: ImageDataset
    transform: Preprocess
    count: int
    raw: bool = False

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs, float32 or uint8 [n, 3, S, S], and classes, int64 [n]; images that cannot be read are left out."""
        count = min(self.count, len(self.dataset))
        indices = np.linspace(0, len(self.dataset) - 1, count).astype(int).tolist()
        tasks = [[(0, index) for index in indices[at : at + _BATCH]] for at in range(0, count, _BATCH)]
        for batch in load_batches(self.dataset, InEveryEpoch(self.transform.pixels), tasks):
            if len(batch.targets):
                inputs = batch.inputs if self.raw else self.transform.normalise(batch.inputs)
                yield inputs.contiguous(), batch.targets

    @torch.inference_mode()
    def correct(self, forward: Forward) -> tuple[int, int]:
        """Counts the images that a forward pass classifies correctly, and all.

        Raises:
            DataError: None of the images can be read.
        """
        correct = total = 0
        for inputs, targets in self.batches():
            correct += int((forward(inputs).argmax(1) == targets).sum())
            total += len(targets)
        if not total:
            raise DataError(f"None of the images of {self.dataset.name} could be read.")
        return correct, total


def quantise(format: str, path: Path, calibration: Calibration, metadata: str) -> None:
    """Replaces an exported file of one size ("onnx" or "openvino", in float32) by its 8-bit form.

    That gets the metadata, JSON text, as its value under `formats.METADATA`.
    """
    with contextlib.redirect_stdout(sys.stderr):  # both print their progress
        _QUANTIZERS[format](path, calibration, metadata)


def _onnx(path: Path, calibration: Calibration, metadata: str) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = calibration.batches()

        def get_next(self) -> dict[str, Any] | None:
            inputs, _ = next(self.batches, (None, None))
            return None if inputs is None else {formats.INPUT: inputs.numpy()}

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        prepared = Path(folder) / path.name
        # symbolic shapes are for transformers, and a free batch is too much for some releases
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    written = onnx.load(str(path))
    onnx.helper.set_model_props(written, {formats.METADATA: metadata})
    onnx.save(written, str(path))


def _openvino(path: Path, calibration: Calibration, metadata: str) -> None:
    import nncf
    import openvino

    class Singles:
        def __iter__(self) -> Iterator[Any]:
            for inputs, _ in calibration.batches():
                yield from (inputs[index : index + 1] for index in range(len(inputs)))

    nncf.set_log_level(logging.ERROR)
    model = openvino.Core().read_model(path)
    quantised = nncf.quantize(
        model,
        nncf.Dataset(Singles(), lambda image: {formats.INPUT: image.numpy()}),
        preset=nncf.QuantizationPreset.MIXED,  # activations that SiLU leaves are not symmetric
        subset_size=min(calibration.count, len(calibration.dataset)),
    )
    quantised.set_rt_info(metadata, formats.METADATA)
    # the weights that stay as they are are mapped from the file: it is replaced, not written over
    draft = path.with_name(f"int8-{path.name}")
    openvino.save_model(quantised, draft, compress_to_fp16=False)
    draft.with_suffix(".bin").replace(path.with_suffix(".bin"))
    draft.replace(path)


_QUANTIZERS: dict[str, Callable[[Path, Calibration, str], None]] = {"onnx": _onnx, "openvino": _openvino}
