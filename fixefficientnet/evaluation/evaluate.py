"""evaluate(): a model by name, a dataset by name, what the one makes of the other."""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fixefficientnet._internal import processes
from fixefficientnet._internal.progress import Bar
from fixefficientnet._internal.threads import BATCH_SIZE, default_threads
from fixefficientnet.classes import IMAGENET, SUBSET, Subset, are_wordnet_ids, imagenet_order, real_labels
from fixefficientnet.data.dataset import ImageDataset, class_names, follow, open_dataset
from fixefficientnet.errors import EvaluationError
from fixefficientnet.evaluation.activations import PooledActivations
from fixefficientnet.evaluation.journal import Journal
from fixefficientnet.evaluation.loop import predict_dataset
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.models import LoadedModel, from_module, open_model
from fixefficientnet.runtimes import engines

if TYPE_CHECKING:
    from accelerate import Accelerator

_ACTIVATIONS = "pooled_activations"
"""Key of their figures in a journal."""


@dataclass(frozen=True)
class Settings:
    """On what a model is measured, and how.

    Attributes:
        data: A folder, or a name for timm's `create_dataset`; see `open_dataset`.
        data_root: Where a named dataset lies or is cached.
        split: "validation" and the like; None: that, or the whole folder.
        size: Test size in pixels; None: the model's own.
        crop_pct: See `TestTime`; None: the model's own.
        batch_size: Images per forward pass; None: 32, or 2 where threads of a CPU compute a batch each, or
            could if it had more cores.
        workers: Loading processes; 0: this process loads. None: 4, but 0 in the same case.
        threads: How many threads of a CPU load and compute a batch each, without loading processes; they share its
            cores. None: as many as it has cores for; 1 is for a model that keeps something between the
            layers of a forward pass.
        restrict_classes: Whether logits are restricted to the classes that the dataset has; None: where these are
            200 of ImageNet's, as ImageNet-A's and ImageNet-R's.
        real_labels: Whether ReaL labels decide which predictions are correct.
        folder: Where finished batches are kept; None: nowhere.
        resume: Whether batches that are there are taken over.
        activations: Whether the pooled activations are watched too.
        engine: What computes the forward pass: "eager" (PyTorch), "compile", "onnx" or "openvino".
        fast_preprocessing: Whether pixels may differ a little, see `preprocessing.FastPreprocess`.
    """

    data: str
    data_root: str | None = None
    split: str | None = None
    size: int | None = None
    crop_pct: float | None = None
    batch_size: int | None = None
    workers: int | None = None
    threads: int | None = None
    restrict_classes: bool | None = None
    real_labels: bool = False
    folder: str | os.PathLike[str] | None = None
    resume: bool = False
    activations: bool = False
    engine: str = "eager"
    fast_preprocessing: bool = False

    def __post_init__(self) -> None:
        """Refuses what cannot be.

        Raises:
            EvaluationError: A number is out of its range.
        """
        for name, least in (("batch_size", 1), ("workers", 0), ("threads", 1), ("size", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise EvaluationError(f"{name} is a whole number of at least {least}, not {value!r}.")
        if self.engine not in engines.ENGINES:
            raise EvaluationError(f"There is no engine {self.engine!r}; there are {', '.join(engines.ENGINES)}.")
        if self.activations and self.engine in engines.EXPORTED:
            raise EvaluationError(
                f"The pooled activations (--statistics) are PyTorch's: with them, leave --engine {self.engine} out."
            )


@dataclass(frozen=True)
class Measured:
    """A model, what it was measured on, what came out.

    Attributes:
        loaded: The model.
        dataset: The dataset, in the model's numbering.
        subset: Classes that its logits were restricted to.
        real_labels: Whether ReaL labels decide which predictions are correct.
        evaluation: What came out.
        engine: What computed the forward pass.
        precision: Accelerate's: "no", "bf16" or "fp16".
        preprocessing: "exact" or "fast".
        activations: Figures of the pooled activations, if these were watched.
    """

    loaded: LoadedModel
    dataset: ImageDataset
    subset: Subset | None
    real_labels: bool
    evaluation: Evaluation
    engine: str = "eager"
    precision: str = "no"
    preprocessing: str = "exact"
    activations: dict[str, float] | None = None


def evaluate(
    model: str | os.PathLike[str] | nn.Module,
    data: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    mixed_precision: str = "no",
    **settings: Any,
) -> Evaluation:
    """Measures a model's accuracy on labelled images.

    Under torchrun or `accelerate launch` the processes share the images out, and all get the whole result.

    Args:
        model: A variant's name ("b4_ns", "b4_ns:backbone"), the folder or file of a fine-tuning run, a timm name
            ("timm/resnet50.a1_in1k"); or a model of `create`'s or timm's. A module is moved to the device.
        data: A folder with val/ or of classes' folders, or "hfds/NAME" and the like, as timm opens it.
        device: "cpu" or "cuda". Default: cuda if there is one.
        mixed_precision: "no", "bf16" or "fp16".
        **settings: Other fields of `Settings`: split, size, crop_pct, batch_size, workers, threads, restrict_classes,
            real_labels, data_root, folder, resume, engine, fast_preprocessing.

    Raises:
        UnknownVariantError: No variant has this name.
        DataError: The dataset cannot be used: no images, other classes than the model's, labels out of range.
        EvaluationError: The model cannot be used: NaN, a size that it does not take.
    """
    chosen = Settings(os.fspath(data), **settings)
    loaded = from_module(model) if isinstance(model, nn.Module) else open_model(os.fspath(model))
    with processes.accelerating(None if device is None else str(device), mixed_precision) as accelerator:
        return measure(loaded, chosen, accelerator).evaluation


def dataset_for(loaded: LoadedModel, settings: Settings) -> ImageDataset:
    """The dataset, its classes numbered as the model's."""
    own = bool(loaded.classes) and loaded.classes != imagenet_order()
    number = None if own else loaded.num_classes
    dataset = open_dataset(settings.data, settings.split, root=settings.data_root, num_classes=number, numbered=True)
    return follow(dataset, loaded.classes, loaded.name) if own else dataset


def measure(
    loaded: LoadedModel,
    settings: Settings,
    accelerator: "Accelerator",
    *,
    dataset: ImageDataset | None = None,
    progress: Bar | None = None,
) -> Measured:
    """Measures an opened model; see `evaluate`.

    Args:
        loaded: The model; it is moved to the accelerator's device.
        settings: On what, and how.
        accelerator: Processes, device, precision.
        dataset: What `dataset_for` gave, if that was asked for before.
        progress: Counts the images as they are done.
    """
    engines.check(settings.engine, accelerator.device, accelerator.mixed_precision)
    dataset = dataset or dataset_for(loaded, settings)
    test = loaded.at(settings.size, settings.crop_pct)
    if test.size < 1 or not 0 < test.crop_pct <= 1:
        raise EvaluationError(f"A test size is at least 1 and a crop_pct in (0, 1], not {test.size}, {test.crop_pct}.")
    transform = loaded.transform(test, fast=settings.fast_preprocessing)
    subset = _subset(dataset, loaded, settings.restrict_classes)
    labels = None
    if settings.real_labels:
        if loaded.num_classes != IMAGENET:
            raise EvaluationError(
                f"ReaL labels are of ImageNet's 1000 classes; {loaded.name} has {loaded.num_classes}."
            )
        labels = real_labels([dataset.name(index) for index in range(len(dataset))])
    model = loaded.network.to(accelerator.device)
    # sums over images, which the activations' figures are, depend on their order; what is compiled is of one thread
    alone = settings.workers or settings.activations or settings.engine == "compile" or not dataset.files
    several = accelerator.device.type == "cpu" and not alone
    threads = (settings.threads or default_threads(model)) if several else 1
    # whatever the number of cores: what is kept of an evaluation is of its batches
    batch_size = settings.batch_size or (BATCH_SIZE if several else 32)
    workers = (0 if several else 4) if settings.workers is None else settings.workers
    threads = max(1, min(threads, math.ceil(len(dataset) / batch_size / accelerator.num_processes)))
    journal: Journal | None = None
    activations: dict[str, float] | None = None
    if settings.folder:
        place = Path(dataset.what)
        identity = {
            **loaded.identity,
            "place": str(place.resolve()) if place.exists() else dataset.what,  # fingerprints know names, not pixels
            "images": dataset.fingerprint(),
            "test": asdict(test),
            "crop_mode": loaded.crop_mode,
            "batch_size": batch_size,
            "precision": accelerator.mixed_precision,
            "engine": settings.engine,
            **({"preprocessing": "fast"} if settings.fast_preprocessing else {}),
            "subset": subset and subset.classes,
        }
        path = Path(settings.folder) / _filename(loaded.name, test.size, identity)
        journal = Journal(path, accelerator.process_index)
        known = journal.read().notes.get(_ACTIVATIONS) if settings.activations else None
        accelerator.wait_for_everyone()  # all have looked before the first clears
        # what was not watched when its batch was done needs the batch again
        anew = not settings.resume or (settings.activations and known is None)
        if anew and accelerator.is_main_process:
            journal.clear()
        accelerator.wait_for_everyone()
        activations = known if settings.activations and not anew else None
    with contextlib.ExitStack() as stack:
        watched = None
        if settings.activations and activations is None:
            watched = stack.enter_context(PooledActivations(model))
        stack.enter_context(_telling_what_ran_out(batch_size, threads, resumable=bool(settings.folder)))
        precision = accelerator.mixed_precision
        stack.enter_context(engines.running(loaded, test, settings.engine, threads=threads, precision=precision))
        found = predict_dataset(
            model,
            dataset,
            test,
            transform=transform,
            batch_size=batch_size,
            shard=batch_size,
            workers=workers,
            threads=threads,
            subset=subset,
            journal=journal,
            accelerator=accelerator,
            progress=progress,
        )
    if watched:
        activations = watched.summary(accelerator)
        if journal and accelerator.is_main_process:
            journal.note({_ACTIVATIONS: activations})
    if labels is not None:
        found = found.relabelled(labels)
    return Measured(
        replace(loaded, test=test),
        dataset,
        subset,
        settings.real_labels,
        found,
        engine=settings.engine,
        precision=accelerator.mixed_precision,
        preprocessing="fast" if settings.fast_preprocessing else "exact",
        activations=activations,
    )


@contextlib.contextmanager
def _telling_what_ran_out(batch_size: int, threads: int, *, resumable: bool) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        goes_on = " With --resume the finished batches are taken over." if resumable else ""
        fewer = "fewer (-b)" if batch_size > 1 or threads == 1 else "one batch at a time (-j 1)"
        if str(error).startswith("DataLoader worker"):
            raise EvaluationError(
                f"A loading process ended by itself ({error}), as a rule for lack of memory: try fewer (-j).{goes_on}"
            ) from error
        if isinstance(error, MemoryError) or "memory" in str(error).lower():
            raise EvaluationError(
                f"Out of memory with {batch_size * threads} images at once: try {fewer}.{goes_on}"
            ) from error
        raise


def _subset(dataset: ImageDataset, loaded: LoadedModel, restrict: bool | None) -> Subset | None:
    there = Subset.of(dataset.present() if dataset.classes else ())
    if restrict is None:
        restrict = dataset.imagenet and loaded.num_classes == IMAGENET and len(there.classes) == SUBSET
    if not restrict:
        return None
    if not there.classes:
        raise EvaluationError(
            f"{dataset.what} names no classes that logits could be restricted to: its folders must be named by "
            "WordNet ids, or as the model's classes."
        )
    return there if len(there.classes) < loaded.num_classes else None


def _filename(name: str, size: int, identity: dict[str, Any]) -> str:
    readable = re.sub(r"[^\w.-]+", "_", name)[-60:].strip("._")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{readable}-{size}-{digest[:16]}"


def restriction(measured: Measured) -> str:
    """What an output must say of how the figures were taken; empty: nothing."""
    said = []
    if measured.subset:
        said.append(f"logits restricted to the {len(measured.subset.classes)} classes of the dataset")
    if measured.real_labels:
        without = len(measured.dataset) - measured.evaluation.images - len(measured.evaluation.unreadable)
        said.append(f"ReaL labels (images without any, which do not count: {without:,})")
    if measured.dataset.imagenet and not are_wordnet_ids(class_names(measured.dataset.source)):
        said.append("class names taken as the numbers of ImageNet's classes")
    return "; ".join(said)
