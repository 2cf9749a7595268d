"""evaluate(): a model by name on a dataset by name."""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fixefficientnet._internal import processes
from fixefficientnet._internal.progress import Bar
from fixefficientnet._internal.threads import BATCH_SIZE, default_threads
from fixefficientnet.classes import IMAGENET, SUBSET, Subset, real_labels, turned_upright
from fixefficientnet.data.dataset import VALIDATION, ImageDataset, follow, open_dataset
from fixefficientnet.errors import EvaluationError
from fixefficientnet.evaluation.activations import PooledActivations
from fixefficientnet.evaluation.journal import Journal
from fixefficientnet.evaluation.loop import EvaluationLoop
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.evaluation.settings import Settings
from fixefficientnet.models import LoadedModel, from_module, load
from fixefficientnet.runtimes import engines

if TYPE_CHECKING:
    from accelerate import Accelerator

_ACTIVATIONS = "pooled_activations"
"""Key of their figures in a journal."""


@dataclass(frozen=True)
class Measured:
    """A model, the dataset (in the model's numbering) that it was evaluated on and how, and what that gave.

    The subset is of the classes that the logits were restricted to; None: all. There are figures of the pooled
    activations if these were observed.
    """

    loaded: LoadedModel
    dataset: ImageDataset
    settings: Settings
    subset: Subset | None
    evaluation: Evaluation
    activations: dict[str, float] | None

    @property
    def unreadable(self) -> list[str]:
        """Why images could not be read, one reason each."""
        return list(self.evaluation.unreadable.values())

    @property
    def unturned(self) -> list[str]:
        """Paths of the images that have an EXIF orientation and were not turned."""
        return [self.dataset.image_path(index) for index in self.evaluation.unturned]


def evaluate(model: str | os.PathLike[str] | nn.Module, data: str | os.PathLike[str], **settings: Any) -> Evaluation:
    """Evaluates a model's accuracy on labelled images.

    Under torchrun or `accelerate launch` the processes share the images out, and all get the whole result.

    Args:
        model: A variant's name ("b4_ns", "b4_ns:backbone"), the folder or file of a fine-tuning run, a timm name
            ("timm/resnet50.a1_in1k"); or a model of `create`'s or timm's. A module is moved to the device.
        data: A folder with val/ or of classes' folders, or "hfds/NAME" and the like, as timm opens it.
        **settings: Other fields of `fixefficientnet.evaluation.settings.Settings`: split, size, crop_pct, device,
            mixed_precision, batch_size, workers, threads, restrict_classes, real_labels, data_root, labels, exclude,
            folder, resume, engine, upright, fast_preprocessing.

    Raises:
        UnknownVariantError: No variant has this name.
        DataError: The dataset cannot be used: no images, other classes than the model's, labels out of range.
        EvaluationError: The model cannot be used: NaN, a size that it does not take.
    """
    for name, as_text in (("device", str), ("labels", os.fspath)):
        if settings.get(name) is not None:
            settings[name] = as_text(settings[name])
    chosen = Settings(os.fspath(data), **settings)
    loaded = from_module(model) if isinstance(model, nn.Module) else load(os.fspath(model))
    with processes.accelerating(chosen.usual_device, chosen.mixed_precision) as accelerator:
        return evaluate_model(loaded, chosen, accelerator).evaluation


def dataset_for(loaded: LoadedModel, settings: Settings) -> ImageDataset:
    """The dataset, its classes numbered as the model's, its images upright or not as for the model."""
    own, split = loaded.own_classes, settings.split
    opened = partial(
        open_dataset,
        settings.data,
        root=settings.data_root,
        labels=settings.labels,
        num_classes=None if own else loaded.num_classes,
        numbered=not own,
    )
    if loaded.part_of and split is None and not settings.labels and opened(None).fingerprint() == loaded.part_of:
        split = VALIDATION  # the rest trained the model
    dataset = opened(split, exclude=settings.exclude)
    upright = loaded.upright if settings.upright is None else settings.upright
    dataset = replace(dataset, upright=turned_upright(loaded.num_classes) if upright is None else upright)
    return follow(dataset, own, loaded.name)


def evaluate_model(
    loaded: LoadedModel,
    settings: Settings,
    accelerator: "Accelerator",
    *,
    dataset: ImageDataset | None = None,
    progress: Bar | None = None,
) -> Measured:
    """Evaluates a loaded model, whose network is moved to the accelerator's device; see `evaluate`.

    The dataset is what `dataset_for` gave, if that was asked for before. The accelerator must compute in the precision
    of the settings.
    """
    engines.check(settings.engine, accelerator.device, accelerator.mixed_precision)
    dataset = dataset or dataset_for(loaded, settings)
    test = loaded.at(settings.size, settings.crop_pct)
    loaded = loaded.for_size(test.size)
    transform = loaded.transform(test, fast=settings.fast_preprocessing)
    subset = _subset(dataset, loaded, settings.restrict_classes)
    labels = _real_labels(dataset, loaded) if settings.real_labels else None
    network = loaded.network.to(accelerator.device)
    batch_size, workers, threads = _batching(network, dataset, settings, accelerator)
    loop = EvaluationLoop(
        network,
        dataset,
        test,
        accelerator,
        transform,
        batch_size=batch_size,
        shard=batch_size,
        workers=workers,
        threads=threads,
        subset=subset,
        progress=progress,
    )
    journal, activations = _journal(loaded, loop, settings)
    loop = replace(loop, journal=journal)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_explaining_lack_of_memory(loop))
        precision = accelerator.mixed_precision
        stack.enter_context(engines.running(loaded, test, settings.engine, threads=threads, precision=precision))
        if settings.warm_up:
            loop.warm_up()
        observer = None
        if settings.activations and activations is None:
            observer = PooledActivations(network)
            stack.enter_context(observer.watched())
        found = loop.run()
    if observer:
        activations = observer.summary()
        if journal and accelerator.is_main_process:
            journal.note({_ACTIVATIONS: activations})
    if labels is not None:
        found = found.relabelled(labels)
    return Measured(replace(loaded, test=test), dataset, settings, subset, found, activations)


def _real_labels(dataset: ImageDataset, loaded: LoadedModel) -> list[list[int]]:
    if loaded.num_classes != IMAGENET:
        raise EvaluationError(f"ReaL labels are of ImageNet's 1000 classes; {loaded.name} has {loaded.num_classes}.")
    return real_labels([dataset.image_name(index) for index in range(len(dataset))])


def _batching(
    network: nn.Module, dataset: ImageDataset, settings: Settings, accelerator: "Accelerator"
) -> tuple[int, int, int]:
    """Images per forward pass, loading processes, and threads that load and compute a batch each."""
    # sums over images, which the activations' figures are, depend on their order; what is compiled is of one thread
    alone = settings.workers or settings.activations or settings.engine == "compile" or not dataset.files
    several = accelerator.device.type == "cpu" and not alone
    threads = (settings.threads or default_threads(network)) if several else 1
    # whatever the number of cores: what is kept of an evaluation is of its batches
    size = settings.batch_size or (BATCH_SIZE if several else 32)
    workers = (0 if several else processes.default_workers()) if settings.workers is None else settings.workers
    return size, workers, max(1, min(threads, math.ceil(len(dataset) / size / accelerator.num_processes)))


def _journal(
    loaded: LoadedModel, loop: EvaluationLoop, settings: Settings
) -> tuple[Journal | None, dict[str, float] | None]:
    """The journal of this evaluation, if it is kept, and what it has of the pooled activations."""
    if not settings.folder:
        return None, None
    dataset, test, accelerator = loop.dataset, loop.test, loop.accelerator
    place = Path(dataset.name)
    identity = {
        **loaded.identity,
        "place": str(place.resolve()) if place.exists() else dataset.name,  # fingerprints know names, not pixels
        "images": dataset.fingerprint(),
        "upright": dataset.upright,
        "test": asdict(test),
        "crop_mode": loaded.crop_mode,
        "batch_size": loop.batch_size,
        "precision": accelerator.mixed_precision,
        "engine": settings.engine,
        "preprocessing": settings.preprocessing,
        "subset": loop.subset and loop.subset.classes,
    }
    readable = re.sub(r"[^\w.-]+", "_", loaded.name)[-60:].strip("._")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = Path(settings.folder) / f"{readable}-{test.size}-{digest[:16]}"
    journal = Journal(path, accelerator.process_index)
    known = journal.read().notes.get(_ACTIVATIONS) if settings.activations else None
    accelerator.wait_for_everyone()  # all have read before the first one clears
    # activations that were not observed when a batch was done need the batch again
    anew = not settings.resume or (settings.activations and known is None)
    if anew and accelerator.is_main_process:
        journal.clear()
    accelerator.wait_for_everyone()
    return journal, (None if anew else known)


@contextlib.contextmanager
def _explaining_lack_of_memory(loop: EvaluationLoop) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        goes_on = " With --resume the finished batches are taken over." if loop.journal else ""
        fewer = "fewer (-b)" if loop.batch_size > 1 or loop.threads == 1 else "one batch at a time (-j 1)"
        if str(error).startswith("DataLoader worker"):
            raise EvaluationError(
                f"A loading process ended by itself ({error}), usually because memory ran out: try fewer (-j).{goes_on}"
            ) from error
        if isinstance(error, MemoryError) or "memory" in str(error).lower():
            raise EvaluationError(
                f"Out of memory with {loop.batch_size * loop.threads} images in flight: try {fewer}.{goes_on}"
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
            f"{dataset.name} names no classes that logits could be restricted to: its folders must be named by "
            "WordNet ids, or as the model's classes."
        )
    return there if len(there.classes) < loaded.num_classes else None


def conditions(every: Sequence[Measured]) -> list[str]:
    """On what models were evaluated, and how: a line for each that differs."""
    models: dict[str, dict[str, None]] = {}
    policies = {one.dataset.upright for one in every}
    for one in every:
        line = _described(one)
        if len(policies) > 1:
            line += "; turned upright" if one.dataset.upright else "; EXIF orientation ignored"
        models.setdefault(line, {})[one.loaded.name] = None
    return [f"{', '.join(names)}: {line}" if len(models) > 1 else line for line, names in models.items()]


def _described(one: Measured) -> str:
    """What an output must say of how the figures were taken."""
    found, test, settings, dataset = one.evaluation, one.loaded.test, one.settings, one.dataset
    counted = ((len(found.unreadable) or None, "more could not be read"), (dataset.excluded, "excluded"))
    left_out = "; ".join(f"{count:,} {what}" for count, what in counted if count is not None)
    left_out = f" ({left_out})" if left_out else ""
    crop = f"crop_pct {test.crop_pct:g}" + (f", {one.loaded.crop_mode}" if one.loaded.crop_mode != "center" else "")
    words = (
        (settings.engine, "eager"),
        (settings.mixed_precision, "no"),
        (f"{settings.preprocessing} preprocessing", "exact preprocessing"),
    )
    how = "".join(f", {word}" for word, usual in words if word != usual)
    said = [f"{found.images:,} images of {dataset.name}{left_out}", f"{crop}, {test.interpolation}{how}"]
    if one.subset:
        said.append(f"logits restricted to the {len(one.subset.classes)} classes of the dataset")
    if settings.real_labels:
        without = len(dataset) - found.images - len(found.unreadable)
        said.append(f"ReaL labels (images without any, which do not count: {without:,})")
    if dataset.numbering:
        said.append(dataset.numbering)
    return "; ".join(said)
