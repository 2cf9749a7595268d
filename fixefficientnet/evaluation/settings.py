"""What a model is evaluated on, and how: each field is an argument of `evaluate` and a flag of the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fixefficientnet._internal.records import Count, Positive, Share
from fixefficientnet.errors import OptionError
from fixefficientnet.options import EXPORTED, Checked, Engine, MixedPrecision


@dataclass(frozen=True)
class Settings(Checked):
    """What a model is evaluated on, and how.

    Attributes:
        data: A folder with val/, or of classes' folders; or hfds/NAME, torch/NAME, wds/NAME.
        data_root: Folder that a named dataset lies or is cached in.
        labels: File that tells the classes of the images of one folder: CSV of file and label, or ImageNet's own.
        exclude: Images to leave out: a glob pattern, or a text file of paths; may be repeated.
        split: Split of the dataset. Default: validation, or the whole folder.
        crop_pct: Share of the resized image that the crop keeps. Default: the model's.
        restrict_classes: Restrict logits to the classes of the dataset. Default: where these are 200 of ImageNet's.
        real_labels: Count as correct what ReaL labels allow.
        batch_size: Images per forward pass. Default: 32; 2 where threads of a CPU compute a batch each.
        workers: Loading processes per device. Default: the usable cores, shared among the processes; none where
            threads of a CPU load and compute.
        threads: Threads of a CPU that load and compute a batch each, and share its cores. Default: one per core, up to
            8; 1 is for a model that keeps something between the layers of a forward pass.
        device: Device to compute on. Default: cuda if there is one.
        mixed_precision: Precision to compute in; "no" is float32.
        engine: Engine to compute with; onnx and openvino export the model first, and keep the file.
        upright: Turn images as their EXIF orientation says. Default: as the model's fine-tuning run did; of other
            models, for those with other classes than ImageNet's.
        fast_preprocessing: From JPEG to tensor in half the time, with slightly different pixels.
        size: Test size in pixels; None: the model's.
        folder: Folder where finished batches are kept; None: nowhere.
        resume: Whether batches that are in the folder are taken over.
        activations: Whether the pooled activations are observed too.
        warm_up: Whether a batch is computed before time counts.
    """

    data: str
    data_root: str | None = None
    labels: str | None = None
    exclude: tuple[str, ...] = ()
    split: str | None = None
    crop_pct: Share | None = None
    restrict_classes: bool | None = None
    real_labels: bool = False
    batch_size: Positive | None = None
    workers: Count | None = None
    threads: Positive | None = None
    device: Literal["cpu", "cuda"] | None = None
    mixed_precision: MixedPrecision = "no"
    engine: Engine = "eager"
    upright: bool | None = None
    fast_preprocessing: bool = False
    size: Positive | None = None
    folder: Path | str | None = None
    resume: bool = False
    activations: bool = False
    warm_up: bool = False

    def __post_init__(self) -> None:
        """Checks every field, and that they go together."""
        super().__post_init__()
        if self.activations and self.engine in EXPORTED:
            raise OptionError(
                f"The pooled activations (--statistics) are PyTorch's: with them, leave --engine {self.engine} out."
            )

    @property
    def preprocessing(self) -> str:
        """How images become tensors: "exact" or "fast"."""
        return "fast" if self.fast_preprocessing else "exact"

    @property
    def usual_device(self) -> str | None:
        """The device to ask for: engines that run exported files run on the CPU."""
        return self.device or ("cpu" if self.engine in EXPORTED else None)
