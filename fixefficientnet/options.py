"""Options that Python callers and the command line share: one declaration each, whose lines are the flags' help.

Imports no torch, so that `--help` needs none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from fixefficientnet._internal import records
from fixefficientnet._internal.records import Positive, Rule
from fixefficientnet.errors import OptionError

Engine = Literal["eager", "compile", "onnx", "openvino"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
EXPORTED: tuple[Engine, ...] = ("onnx", "openvino")
"""Engines that run an exported file, on the CPU."""
MixedPrecision = Literal["no", "bf16", "fp16"]
Delegate = Literal["xnnpack", "coreml"]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine that no other one reaches."""
DEMO_HOST, DEMO_PORT = LOOPBACK[0], 7860
"""Where the demo's page is, where nothing else is asked for: the port is Gradio's own."""


class Checked:
    """A dataclass of options that are checked when it is made.

    Raises:
        OptionError: A field has a value that it cannot have.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        """Checks every field."""
        records.check(self, OptionError)


@dataclass(frozen=True, slots=True)
class PredictionOptions(Checked):
    """Options of a prediction.

    Attributes:
        topk: Labels per image, the most probable first.
        batch_size: Images per forward pass. Default: 16, on a CPU 2.
        threads: CPU threads that compute a batch each. Default: one per core, at most 8.
        device: Device to compute on: cpu, cuda, mps. Default: cuda if there is one.
        engine: What computes: PyTorch (eager, compile), or onnx and openvino on the CPU.
        mixed_precision: Precision of the forward pass; "no" is the model's own.
        fast_preprocessing: From JPEG to tensor in half the time, with slightly other pixels.
    """

    topk: Positive = 5
    batch_size: Positive | None = None
    threads: Positive | None = None
    device: str | None = None
    engine: Engine = "eager"
    mixed_precision: MixedPrecision = "no"
    fast_preprocessing: bool = False


@dataclass(frozen=True, slots=True)
class ExportOptions(Checked):
    """Options of an export.

    Attributes:
        size: Test size in pixels. Default: the model's.
        dynamic_size: Leave height and width free.
        half: Weights in float16; inputs and outputs stay as they are.
        normalize: Take pixels, uint8 [N, 3, S, S] in RGB, and normalise them inside.
        softmax: Give probabilities instead of logits.
        opset: Opset of ONNX. Default: the exporter's.
        delegate: What computes an ExecuTorch file: XNNPACK on any CPU, or Core ML, on Apple's systems alone.
        images: Number of calibration images for 8-bit integers, evenly spread.
        max_drop: Points of top-1 that 8-bit integers may lose; else nothing is written.
    """

    size: Positive | None = None
    dynamic_size: bool = False
    half: bool = False
    normalize: bool = False
    softmax: bool = False
    opset: Positive | None = None
    delegate: Delegate = "xnnpack"
    images: Positive = 300
    max_drop: Annotated[float, Rule("a number of points")] = 2.0


@dataclass(frozen=True, slots=True)
class PublishOptions(Checked):
    """Options of a publication.

    Attributes:
        to: Write plain files into this folder, and nothing to the Hub; of variants, with a manifest that loads them.
        manifest: Manifest that gets the rows that load variants from the Hub: a whole one, or rows to lay over one;
            made if need be. Default: weights_manifest.json.
        whole: Publish the whole model of each variant too, in a repository of the same organisation (with --to, in a
            folder) that has timm's name of the variant.
        license: License of a network of your own, for its card; SPDX, lower case.
        replace: Replace other weights of the same variants, another model, and files that `publish` did not write.
        private: Make the repository private, if it is made.
        dry_run: Show everything and write nothing.
    """

    to: Path | None = None
    manifest: Path | None = None
    whole: bool = False
    license: str = "unknown"
    replace: bool = False
    private: bool = False
    dry_run: bool = False
