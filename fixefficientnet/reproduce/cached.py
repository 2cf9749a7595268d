"""Fine-tuning on features: the backbone sees each image a few times only, however many epochs follow.

One pass over some of the images estimates the statistics of the head norm at the test size. One pass computes the
pooled features of each view, with that norm in place. Then the classifier trains on the features.

A norm without statistics (layer norm) has nothing to estimate. Its weight and bias are not tuned here: where it is the
last thing before the linear classifier, the classifier alone can become all that both could.
"""

import functools
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from fixefficientnet import delta
from fixefficientnet.data.dataset import ImageDataset
from fixefficientnet.data.loading import Batch
from fixefficientnet.errors import DataError, RunError, UnsupportedModelError
from fixefficientnet.preprocessing import Preprocess, Views
from fixefficientnet.reproduce.checkpoints import Checkpoints, Position
from fixefficientnet.reproduce.network import Network, TrainingState, optimizer_of
from fixefficientnet.reproduce.online import Tuned, order, transform_of
from fixefficientnet.reproduce.recipe import Recipe
from fixefficientnet.reproduce.session import Session
from fixefficientnet.reproduce.shards import Shard, ShardPass, one_thread
from fixefficientnet.reproduce.training import EpochSize, StepResult, Validation, train

Array = np.ndarray[Any, Any]
_VALIDATION_BATCH = 4096
"""Features that are validated together."""


@dataclass(frozen=True)
class Features:
    """The features of a dataset, on disk.

    Attributes:
        values: float16 or float32 [images, views, channels], memory-mapped.
        targets: int64 [images]: the label; -1 where the image could not be read.
    """

    values: Array
    targets: Array


def tune(
    session: Session,
    network: Network,
    dataset: ImageDataset,
    checkpoints: Checkpoints,
    folder: Path,
    validation: tuple[ImageDataset, int] | None = None,
) -> Tuned:
    """Estimates the statistics, computes features, trains the classifier; continues where an earlier call stopped.

    Shards and features that the folder has are used if they are of this network and dataset. Where validation images
    are given, it is with the number of epochs between two validations. The network is left in eval mode.

    Raises:
        RunError: Too little disk for the features; NaN or Inf in features or loss.
        Interrupted: A signal asked to stop; what was done is saved.
    """
    recipe = network.recipe
    network.model.eval()
    with session.stoppable():
        if network.statistics:
            _estimate_statistics(session, network, dataset, folder)
        if recipe.trains_classifier:
            with ExitStack() as locks:
                features = _features_of(session, network, dataset, folder, locks)
                between = None
                if validation and recipe.epochs > validation[1]:
                    plain = replace(network, recipe=replace(recipe, views=1, hflip=0.0, feature_dtype="float32"))
                    measured = _features_of(session, plain, validation[0], folder, locks, "validation")
                    between = Validation(validation[1], lambda position: _top1(session, network, measured, position))
                session.on_main(lambda: _train_classifier(session, network, features, checkpoints, between))
            with torch.no_grad():
                for tensor in network.moving.values():
                    tensor.copy_(cast(Tensor, broadcast(tensor.detach().clone())))
    return Tuned(forwards(network, len(dataset), recipe.views), recipe.epochs)


def _features_of(
    session: Session, network: Network, dataset: ImageDataset, folder: Path, locks: ExitStack, split: str = ""
) -> Features:
    """Computes the features of a split in their own folder, which is locked for as long as they are used."""
    place = folder / f"{split and f'{split}-'}features-{_key(network, dataset, 'features')}"
    locks.enter_context(session.locked(place))
    return _compute_features(session, network, dataset, place, f"{split} features".strip().capitalize())


def forwards(network: Network, dataset: int, views: int) -> int:
    """Number of images that go forward through the backbone, where each of a dataset has so many views."""
    recipe = network.recipe
    statistics = min(recipe.statistics_images or dataset, dataset) if network.statistics else 0
    return statistics + (views * dataset if recipe.trains_classifier else 0)


def feature_bytes(recipe: Recipe, dataset: int, channels: int) -> int:
    """Size of the feature file, in bytes."""
    return dataset * recipe.views * channels * np.dtype(recipe.feature_dtype).itemsize


def _chosen(recipe: Recipe, length: int) -> Array:
    """Indices of the images for the statistics; datasets are sorted by class, so a part is drawn at random."""
    asked = recipe.statistics_images
    return np.arange(length) if not asked or asked >= length else np.sort(order(recipe, 0, length)[:asked])


def _estimate_statistics(session: Session, network: Network, dataset: ImageDataset, folder: Path) -> None:
    norm: Any = network.norm
    recipe, channels = network.recipe, norm.running_mean.numel()
    sums: Shard = {}

    def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        with one_thread():
            values = inputs[0].double()
            sums["sum"] = values.sum((0, 2, 3))
            sums["squares"] = values.square().sum((0, 2, 3))
        sums["count"] = torch.tensor(values.numel() // channels, dtype=torch.float64)

    def forward(batch: Batch) -> Shard:
        _forward(session, network, batch.inputs)
        return {name: tensor.cpu() for name, tensor in sums.items()}

    chosen = _chosen(recipe, len(dataset))
    key = _key(network, dataset, "statistics", chosen=hashlib.sha256(chosen.tobytes()).hexdigest())
    place = folder / f"statistics-{key}"
    transform = Views(1, cast(Any, transform_of(replace(recipe, hflip=0.0))))
    hook = norm.register_forward_pre_hook(take)
    with session.locked(place):
        try:
            images = _Subset(dataset, chosen)
            shards = ShardPass(session, "Statistics", images, transform, recipe, place, forward, _sum).run()
        finally:
            hook.remove()
    found = [shard for shard in shards if shard]
    if not found:
        raise DataError(f"None of the images of {dataset.name} could be read.")
    total = functools.reduce(_sum, found)
    count = float(total["count"])
    mean = total["sum"] / count
    variance = (total["squares"] / count - mean.square()).clamp_min(0) * (count / max(1.0, count - 1))
    if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
        raise RunError("The statistics of the head norm are NaN or infinite: look for broken weights.")
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def _sum(total: Shard, part: Shard) -> Shard:
    return {name: total[name] + part[name] for name in total}


class _Subset:
    """Some images of a dataset, as a dataset."""

    def __init__(self, dataset: ImageDataset, chosen: Array):
        self._images, self._chosen, self.name = dataset, chosen, dataset.name

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Any:
        return self._images[int(self._chosen[index])]

    def image_path(self, index: int) -> str:
        return self._images.image_path(int(self._chosen[index]))


def _compute_features(session: Session, network: Network, dataset: ImageDataset, place: Path, title: str) -> Features:
    recipe, channels = network.recipe, cast(Tensor, network.classifier.weight).shape[1]
    shape = (len(dataset), recipe.views, channels)
    path = place / "features.bin"
    session.on_main(lambda: _allocate(path, feature_bytes(recipe, len(dataset), channels)))
    features = np.memmap(path, dtype=recipe.feature_dtype, mode="r+", shape=shape)
    seen: list[tuple[Tensor, Tensor]] = []

    def take(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        seen.append((inputs[0].flatten(1).float(), logits.flatten(1).float()))

    def forward(batch: Batch) -> Shard:
        seen.clear()
        logits = _forward(session, network, batch.inputs)
        (pooled, classified), *more = seen
        same = classified.shape == logits.shape and classified.allclose(logits, 0, 0, equal_nan=True)
        if more or pooled.shape != (len(logits), channels) or not same:
            raise UnsupportedModelError(
                f"The logits of {recipe.backbone} are not what its {network.head.classifier} makes of one vector of "
                "features per image, so features cannot be cached: use --method online."
            )
        values = pooled.view(len(batch.targets), recipe.views, channels).cpu().numpy().astype(recipe.feature_dtype)
        if not np.isfinite(values).all():
            raise RunError(
                f"The features of {dataset.image_name(int(batch.indices[0]))} or one after it are NaN or infinite in "
                f"{recipe.feature_dtype}. Try --feature-dtype float32, or look for broken weights."
            )
        features[batch.indices.numpy()] = values
        return {"indices": batch.indices, "targets": batch.targets}

    def rows(number: int) -> Array:
        # opened each time: on a network file system, an open map may not show what other nodes wrote
        written = np.memmap(path, dtype=recipe.feature_dtype, mode="r", shape=shape)
        return np.ascontiguousarray(written[number * recipe.shard : (number + 1) * recipe.shard])

    transform = Views(recipe.views, cast(Any, transform_of(recipe)))
    hook = network.classifier.register_forward_hook(take)
    try:
        shards = ShardPass(
            session, title, dataset, transform, recipe, place, forward, _join, rows=rows, flush=features.flush
        ).run()
    finally:
        hook.remove()
    targets = np.full(len(dataset), -1, dtype=np.int64)
    for shard in filter(None, shards):
        targets[shard["indices"].numpy()] = shard["targets"].numpy()
    return Features(np.memmap(path, dtype=recipe.feature_dtype, mode="r", shape=shape), targets)


def _join(total: Shard, part: Shard) -> Shard:
    return {name: torch.cat([total[name], part[name]]) for name in total}


def _allocate(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.stat().st_blocks * 512 if path.exists() else 0
    free = shutil.disk_usage(path.parent).free
    if size - there > free:
        raise RunError(
            f"The features take {size / 1e9:.2f} GB, {path.parent} has {free / 1e9:.2f} GB free. Make room, choose "
            "another place with --output, or take fewer --views, --val-interval 0, or --method online, which has none."
        )
    with path.open("ab") as file:
        file.truncate(size)
        try:
            if hasattr(os, "posix_fallocate"):  # a hole in a memory map that the disk cannot fill is fatal
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            reason = f"{path.parent} has no room for {size / 1e9:.2f} GB of features: {error.strerror}."
            raise RunError(reason) from error


@torch.no_grad()
def _top1(session: Session, network: Network, features: Features, position: Position) -> float | None:
    """Top-1 of the classifier on the features of plain views, in per cent; None where the log has it."""
    if session.log.has(position.steps, "val_top1"):
        return None
    images = np.flatnonzero(features.targets >= 0)
    if not len(images):
        return None
    correct = 0
    for chosen in np.array_split(images, math.ceil(len(images) / _VALIDATION_BATCH)):
        logits = _logits(session, network, torch.from_numpy(features.values[chosen, 0]))
        correct += int((logits.argmax(1).cpu() == torch.from_numpy(features.targets[chosen])).sum())
    return 100 * correct / len(images)


def _logits(session: Session, network: Network, values: Tensor) -> Tensor:
    """The classifier's logits of features; float16 or float32 [n, channels] to float32 [n, classes]."""
    inputs = values.to(session.accelerator.device, non_blocking=True).float()
    if isinstance(network.classifier, nn.Conv2d):
        inputs = inputs[:, :, None, None]
    logits: Tensor = network.classifier(inputs).flatten(1)
    return logits


def _train_classifier(
    session: Session, network: Network, features: Features, checkpoints: Checkpoints, validation: Validation | None
) -> None:
    """Trains on every view of every image, in one process alone, as it takes seconds."""
    recipe, device = network.recipe, session.accelerator.device
    images = np.flatnonzero(features.targets >= 0)
    if not len(images):
        raise DataError("None of the images could be read.")
    examples = len(images) * recipe.views
    size = min(recipe.batch_size, examples)
    epoch_size = EpochSize(examples // size, size)
    optimizer = optimizer_of(network)
    state = TrainingState(network, optimizer)
    # the statistics, which the passes before put in place, are in the checkpoint too
    position = checkpoints.restore(state)
    session.log.resume(position.steps)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    channels = features.values.shape[-1]
    flat = _near(features.values.reshape(-1, channels), device)
    targets = torch.from_numpy(features.targets).to(device)
    sequences: dict[int, Array] = {}

    def step(position: Position) -> StepResult:
        if position.epoch not in sequences:
            sequences.clear()
            sequences[position.epoch] = order(recipe, position.epoch, examples)
        chosen = sequences[position.epoch][position.step * size : (position.step + 1) * size]
        row, view = np.divmod(chosen, recipe.views)
        places = torch.from_numpy(images[row] * recipe.views + view)
        logits = _logits(session, network, flat[places.to(flat.device, non_blocking=True)])
        labels = targets[torch.from_numpy(images[row]).to(device, non_blocking=True)]
        loss = criterion(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return StepResult(loss.detach(), (logits.argmax(1) == labels).sum(), size, session.stopped_by)

    with one_thread():
        train(session, state, epoch_size, checkpoints, position, step, validation)


def _near(values: Array, device: torch.device) -> Tensor:
    """Features on a GPU, if they take at most half of its free memory; else where they are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes
        there = torch.from_numpy(values)
    fits = device.type == "cuda" and values.nbytes <= torch.cuda.mem_get_info(device)[0] // 2
    return there.to(device) if fits else there


@torch.inference_mode()
def _forward(session: Session, network: Network, pixels: Tensor) -> Tensor:
    """Runs the whole network, whose hooks take what is wanted; uint8 [n, views, 3, S, S] → [n x views, classes]."""
    with session.accelerator.autocast():
        logits: Tensor = network.model(Preprocess.of(network.recipe.test).normalise(pixels.flatten(0, 1)))
    return logits.float()


def _key(network: Network, dataset: ImageDataset, kind: str, **more: Any) -> str:
    """A hash of all that decides these shards: the network as it is now, the images, the views."""
    recipe = network.recipe
    fields = ["test_size", "crop_pct", "interpolation", "mean", "std", "upright"]
    fields += ["forward_batch", "shard", "mixed_precision"]
    if kind == "features":
        fields += ["views", "feature_dtype"]
        if recipe.views > 2:
            fields += ["seed", "hflip", "color_jitter"]
        elif recipe.views == 1:
            fields += ["seed", "hflip"] if recipe.hflip else ["hflip"]
    state: Mapping[str, Tensor] = {
        name: tensor
        for name, tensor in network.model.state_dict().items()
        if not name.startswith(f"{network.head.classifier}.") and not name.endswith("num_batches_tracked")
    }
    if kind == "statistics":  # which the norm's own values do not enter
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{network.head.norm}.")}
    decides = {name: getattr(recipe, name) for name in fields} | more
    decides |= {"network": delta.fingerprint(state), "images": dataset.fingerprint()}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
