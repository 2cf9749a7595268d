"""Fine-tuning on features: the backbone sees each image a few times only, however many epochs follow.

One pass re-estimates the head norm's statistics at the test size, exactly. One pass computes the pooled
features of each view with that norm in place. Then the classifier trains on them. Statistics and features
are computed in fixed shards of images, each saved when done: a killed run goes on with the next shard, and
any number of processes shares them out without changing a bit of the result.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import safetensors.torch
import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from fixefficientnet import delta
from fixefficientnet._internal.files import write_atomically
from fixefficientnet.data.dataset import ImageDataset
from fixefficientnet.data.loading import Batch, Transform, load_batches, shard_tasks
from fixefficientnet.errors import DataError, RunError
from fixefficientnet.preprocessing import Views
from fixefficientnet.reproduce.checkpoints import Checkpoints
from fixefficientnet.reproduce.network import Network, optimizer_of
from fixefficientnet.reproduce.online import order, transform_of
from fixefficientnet.reproduce.recipe import Recipe
from fixefficientnet.reproduce.session import Interrupted, Session

Shard = dict[str, Tensor]
_EMPTY = "none"  # for a shard without a readable image: a file must hold something


def tune(
    session: Session,
    network: Network,
    dataset: ImageDataset,
    recipe: Recipe,
    checkpoints: Checkpoints,
    folder: Path,
) -> dict[str, int]:
    """Re-estimates the statistics, computes features, trains the classifier; goes on where it was.

    Args:
        session: The run's surroundings.
        network: Prepared for the recipe; left in eval mode.
        dataset: To tune on.
        recipe: How.
        checkpoints: Of the classifier's training.
        folder: For shards and features; those already there are used if they are of this network and images.

    Returns:
        How many images went forward through the backbone.

    Raises:
        RunError: Too little disk for the features; NaN or Inf in features or loss.
        Interrupted: A signal asked to stop; what was done is saved.
    """
    network.model.eval()
    with session.stoppable():
        if recipe.moves_statistics:
            chosen = _subset(recipe, len(dataset))
            _estimate_statistics(session, network, dataset, chosen, recipe, folder)
        if recipe.trains_classifier:
            place = folder / f"features-{_key(network, dataset, recipe, 'features')}"
            with session.locked(place):
                features, targets = _compute_features(session, network, dataset, recipe, place)
                session.on_main(lambda: _train_classifier(session, network, features, targets, recipe, checkpoints))
            with torch.no_grad():
                for tensor in network.moving.values():
                    tensor.copy_(cast(Tensor, broadcast(tensor.detach().clone())))
    return {"forwards": forwards(recipe, len(dataset))}


def forwards(recipe: Recipe, dataset: int) -> int:
    """How many images go forward through the backbone."""
    statistics = min(recipe.statistics_images or dataset, dataset) if recipe.moves_statistics else 0
    return statistics + (recipe.views * dataset if recipe.trains_classifier else 0)


def feature_bytes(recipe: Recipe, dataset: int, channels: int) -> int:
    """Size of the feature file."""
    return dataset * recipe.views * channels * np.dtype(recipe.feature_dtype).itemsize


def _subset(recipe: Recipe, length: int) -> list[int]:
    """The images that the statistics come from; folders are sorted by class, so a part is drawn at random."""
    asked = recipe.statistics_images
    return list(range(length)) if not asked or asked >= length else sorted(order(recipe, 0, length)[:asked])


# --- statistics -------------------------------------------------------------------------------------------


def _estimate_statistics(
    session: Session, network: Network, dataset: ImageDataset, chosen: list[int], recipe: Recipe, folder: Path
) -> None:
    channels = cast(Tensor, network.norm.running_mean).numel()
    sums: Shard = {}

    def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        with _one_thread():
            values = inputs[0].double()
            sums["sum"] = values.sum((0, 2, 3))
            sums["squares"] = values.square().sum((0, 2, 3))
        sums["count"] = torch.tensor(values.numel() // channels, dtype=torch.float64)

    def forward(batch: Batch) -> Shard:
        _forward(session, network, batch.inputs)
        return {name: tensor.cpu() for name, tensor in sums.items()}

    def add(total: Shard | None, part: Shard) -> Shard:
        return part if total is None else {name: total[name] + part[name] for name in total}

    key = _key(network, dataset, recipe, "statistics", chosen=chosen if len(chosen) < len(dataset) else None)
    place = folder / f"statistics-{key}"
    chosen_images = _Chosen(dataset, chosen)
    transform = Views(1, cast(Any, transform_of(recipe)))
    hook = network.norm.register_forward_pre_hook(take)
    with session.locked(place):
        try:
            shards = _over_shards(session, "Statistics", chosen_images, transform, recipe, place, forward, add)
        finally:
            hook.remove()
    total: Shard | None = None
    for part in shards:
        if part:
            total = add(total, part)
    if total is None:
        raise DataError(f"None of the images of {dataset.what} could be read.")
    count = float(total["count"])
    mean = total["sum"] / count
    variance = (total["squares"] / count - mean.square()).clamp_min(0) * (count / max(1.0, count - 1))
    if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
        raise RunError("The statistics of the head norm are NaN or infinite: look for broken weights.")
    cast(Tensor, network.norm.running_mean).copy_(mean)
    cast(Tensor, network.norm.running_var).copy_(variance)


class _Chosen:
    """Some images of a dataset, as a dataset."""

    def __init__(self, dataset: ImageDataset, chosen: list[int]):
        self._images, self._chosen, self.what = dataset, chosen, dataset.what

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Any:
        return self._images[self._chosen[index]]


# --- features ---------------------------------------------------------------------------------------------


def _compute_features(
    session: Session, network: Network, dataset: ImageDataset, recipe: Recipe, place: Path
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Memory-mapped features [images, views, channels], and targets [images] (-1: unreadable)."""
    channels = cast(Tensor, network.classifier.weight).shape[1]
    shape = (len(dataset), recipe.views, channels)
    path = place / "features.bin"
    session.on_main(lambda: _allocate(path, feature_bytes(recipe, len(dataset), channels)))
    features = np.memmap(path, dtype=recipe.feature_dtype, mode="r+", shape=shape)
    pooled: list[Tensor] = []

    def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pooled.append(inputs[0].flatten(1).float())

    def forward(batch: Batch) -> Shard:
        pooled.clear()
        _forward(session, network, batch.inputs)
        values = pooled[0].view(len(batch.targets), recipe.views, channels).cpu().numpy().astype(recipe.feature_dtype)
        if not np.isfinite(values).all():
            raise RunError(
                f"The features of {dataset.name(int(batch.indices[0]))} or one after it are NaN or infinite in "
                f"{recipe.feature_dtype}. Try --set feature_dtype=float32, or look for broken weights."
            )
        features[batch.indices.numpy()] = values
        return {"indices": batch.indices, "targets": batch.targets}

    def add(total: Shard | None, part: Shard) -> Shard:
        return part if total is None else {name: torch.cat([total[name], part[name]]) for name in total}

    def rows(number: int) -> np.ndarray[Any, Any]:
        # opened anew each time: on a network file system, an open map may not show what other nodes wrote
        written = np.memmap(path, dtype=recipe.feature_dtype, mode="r", shape=shape)
        return np.ascontiguousarray(written[number * recipe.shard : (number + 1) * recipe.shard])

    transform = Views(recipe.views, cast(Any, transform_of(recipe)))
    hook = network.classifier.register_forward_pre_hook(take)
    try:
        parts = (place, forward, add, rows, features.flush)
        shards = _over_shards(session, "Features", dataset, transform, recipe, *parts)
    finally:
        hook.remove()
    targets = np.full(len(dataset), -1, dtype=np.int64)
    for shard in shards:
        if shard:
            targets[shard["indices"].numpy()] = shard["targets"].numpy()
    return np.memmap(path, dtype=recipe.feature_dtype, mode="r", shape=shape), targets


def _allocate(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.stat().st_blocks * 512 if path.exists() else 0
    free = shutil.disk_usage(path.parent).free
    if size - there > free:
        raise RunError(
            f"The features take {size / 1e9:.2f} GB, {path.parent} has {free / 1e9:.2f} GB free. Make room, choose "
            "another place with --output, or take --set views=1 or --method online, which stores none."
        )
    with path.open("ab") as file:
        file.truncate(size)
        try:
            if hasattr(os, "posix_fallocate"):  # a hole in a memory map that the disk cannot fill is fatal
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            reason = f"{path.parent} has no room for {size / 1e9:.2f} GB of features: {error.strerror}."
            raise RunError(reason) from error


# --- the classifier ---------------------------------------------------------------------------------------


def _train_classifier(
    session: Session,
    network: Network,
    features: np.ndarray[Any, Any],
    targets: np.ndarray[Any, Any],
    recipe: Recipe,
    checkpoints: Checkpoints,
) -> None:
    """Every view of every image is one example; one process alone, as it takes seconds."""
    device = session.accelerator.device
    rows = np.flatnonzero(targets >= 0)
    if not len(rows):
        raise DataError("None of the images could be read.")
    examples = len(rows) * recipe.views
    size = min(recipe.batch_size, examples)
    steps = examples // size
    optimizer = optimizer_of(network, recipe)
    # statistics were put in place by the passes before, and are in the checkpoint with all that moves
    position = checkpoints.restore(network.moving, optimizer)
    session.log.resume(position.steps)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    flat = features.reshape(-1, features.shape[-1])
    image_shape = (
        (-1, features.shape[-1], 1, 1) if isinstance(network.classifier, nn.Conv2d) else (-1, features.shape[-1])
    )
    with _one_thread(), session.log.bar("Classifier", recipe.epochs * steps * size) as bar:
        bar.skip(position.steps * size)
        while position.epoch < recipe.epochs:
            epoch = position.epoch
            sequence = np.array(order(recipe, epoch, examples))
            loss_sum = correct = seen = 0.0
            while position.epoch == epoch:
                chosen = sequence[position.step * size : (position.step + 1) * size]
                image, view = np.divmod(chosen, recipe.views)
                values = flat[rows[image] * recipe.views + view]
                inputs = torch.from_numpy(values).to(device).float().view(image_shape)
                labels = torch.from_numpy(targets[rows[image]]).to(device)
                rate = recipe.learning_rate(epoch + position.step / steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                logits = network.classifier(inputs).flatten(1)
                loss = criterion(logits, labels)
                if not math.isfinite(value := loss.item()):
                    raise checkpoints.give_up(value, position)
                checkpoints.confirm()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                position.step += 1
                position.steps += 1
                if position.step == steps:
                    position.epoch, position.step = epoch + 1, 0
                seen, loss_sum = seen + size, loss_sum + value * size
                correct += float((logits.argmax(1) == labels).sum())
                said = f"loss {loss_sum / seen:.3f}, top-1 {100 * correct / seen:.1f}"
                bar.advance(size, said)
                if position.epoch > epoch:
                    top1 = 100 * correct / seen
                    session.log.write(position.steps, epoch=epoch, loss=loss_sum / seen, top1=top1, lr=rate)
                if session.stopped_by or checkpoints.due(position) or position.epoch == recipe.epochs:
                    checkpoints.save(position, network.moving, optimizer)
                if session.stopped_by:
                    raise Interrupted(session.stopped_by)
    checkpoints.confirm()


# --- shards -----------------------------------------------------------------------------------------------


def _over_shards(
    session: Session,
    title: str,
    dataset: Any,
    transform: Transform,
    recipe: Recipe,
    place: Path,
    forward: Callable[[Batch], Shard],
    add: Callable[[Shard | None, Shard], Shard],
    rows: Callable[[int], Any] = lambda number: b"",
    flush: Callable[[], None] = lambda: None,
) -> list[Shard]:
    """Computes the shards that are not done yet, each process its share, and saves each when it is complete.

    Returns:
        All shards, in order; empty ones for those without a readable image.
    """
    paths = [place / f"{number:06d}.safetensors" for number in range(math.ceil(len(dataset) / recipe.shard))]
    mine = range(session.rank, len(paths), session.world)
    left = [number for number in mine if _read(paths[number], rows, number) is None]
    lengths = {number: min(recipe.shard, len(dataset) - number * recipe.shard) for number in mine}
    tasks = shard_tasks(len(dataset), recipe.shard, recipe.forward_batch, left)
    pin = session.accelerator.device.type == "cuda"
    with session.log.bar(title, sum(lengths.values())) as bar:
        bar.skip(sum(lengths[number] for number in set(mine) - set(left)))
        batches = load_batches(dataset, transform, tasks, workers=min(session.workers, len(tasks)), pin_memory=pin)
        for number in left:
            total: Shard | None = None
            unreadable: list[str] = []
            for batch in _take(batches, -(-lengths[number] // recipe.forward_batch)):
                unreadable += [reason for _, reason in batch.unreadable]
                session.count_unreadable(dataset.what, unreadable, len(dataset))
                if len(batch.targets):
                    total = add(total, forward(batch))
                bar.advance(len(batch.targets) + len(batch.unreadable))
            flush()
            total = total or {_EMPTY: torch.zeros(0)}
            metadata = {"digest": _digest(total, rows(number)), "unreadable": json.dumps(unreadable)}
            write_atomically(paths[number], safetensors.torch.save(total, metadata))
            if session.stopped_by:
                raise Interrupted(session.stopped_by)
    session.accelerator.wait_for_everyone()

    def check() -> None:
        for number, path in enumerate(paths):
            if _read(path, rows, number) is None:
                raise RunError(f"{path} lacks what was just written. Do all processes see the same folder?")

    session.on_main(check)
    shards = []
    for path in paths:
        with safetensors.safe_open(path, "pt") as file:
            reasons = json.loads((file.metadata() or {})["unreadable"])
            shards.append({name: file.get_tensor(name) for name in file.keys() if name != _EMPTY})  # noqa: SIM118
        with session.alike():
            session.count_unreadable(dataset.what, reasons, len(dataset))
    return shards


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The bits of a sum or matrix product on a CPU depend on the number of threads, and that on the processes'."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _take(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    for _ in range(count):
        yield next(batches)


def _read(path: Path, rows: Callable[[int], Any], number: int) -> Shard | None:
    """A shard's tensors; None if it is not there, not whole, or not what was saved."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            shard = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return shard if (file.metadata() or {}).get("digest") == _digest(shard, rows(number)) else None
    except (safetensors.SafetensorError, OSError):
        return None


def _digest(shard: Shard, rows: Any) -> str:
    """Of a shard's tensors and of its rows in the feature file."""
    digest = hashlib.sha256(safetensors.torch.save(shard))
    digest.update(rows)
    return digest.hexdigest()


@torch.inference_mode()
def _forward(session: Session, network: Network, inputs: Tensor) -> None:
    """Runs the whole network for its hooks' sake; inputs [n, views, 3, S, S]."""
    dataset = inputs.flatten(0, 1).to(session.accelerator.device, non_blocking=True)
    with session.accelerator.autocast():
        network.model(dataset.contiguous(memory_format=torch.channels_last))


def _key(network: Network, dataset: ImageDataset, recipe: Recipe, kind: str, **more: Any) -> str:
    """What decides these shards: the network as it is now, the images, the views. Others are computed anew."""
    fields = ["test_size", "crop_pct", "interpolation", "mean", "std", "forward_batch", "shard", "mixed_precision"]
    if kind == "features":
        fields += ["views", "feature_dtype"]
        if recipe.views > 2:
            fields += ["seed", "hflip", "color_jitter"]
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
