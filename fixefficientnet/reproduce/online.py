"""Fine-tuning as the paper does it: a forward pass per image and epoch, the head norm in train mode.

Serves the base stage too, where the whole network trains.
"""

import math
import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fixefficientnet._internal import compat
from fixefficientnet.data.dataset import ImageDataset
from fixefficientnet.data.loading import Batch, Task, load_batches
from fixefficientnet.errors import DataError, RecipeError
from fixefficientnet.preprocessing import FineTuningTransform, Preprocess, TrainingTransform
from fixefficientnet.reproduce.checkpoints import Checkpoints, Position
from fixefficientnet.reproduce.network import Network, optimizer_of
from fixefficientnet.reproduce.recipe import Recipe
from fixefficientnet.reproduce.session import Interrupted, Session


def transform_of(recipe: Recipe) -> FineTuningTransform | TrainingTransform:
    """The augmentation of the recipe's stage."""
    if recipe.stage == "base":
        return TrainingTransform(Preprocess.of(recipe.base), recipe.seed, recipe.hflip)
    return FineTuningTransform(Preprocess.of(recipe.test), recipe.seed, recipe.hflip, recipe.color_jitter)


def order(recipe: Recipe, epoch: int, length: int) -> list[int]:
    """In which order an epoch takes the images."""
    return cast("list[int]", np.random.default_rng([recipe.seed, epoch]).permutation(length).tolist())


def steps_of_epoch(recipe: Recipe, length: int, world: int = 1) -> tuple[int, int]:
    """Steps per epoch and images per step; a last, partial batch is left out unless it is the only one.

    Raises:
        RecipeError: The batch cannot be shared out evenly.
    """
    size = min(recipe.batch_size, length - length % world)
    if size % world or not size:
        raise RecipeError(f"batch_size is {size}, which {world} processes cannot share evenly.")
    return length // size, size


def tasks_from(position: Position, recipe: Recipe, length: int, rank: int = 0, world: int = 1) -> Iterator[list[Task]]:
    """One process's share of each step's batch, from a position to the end of training."""
    steps, size = steps_of_epoch(recipe, length, world)
    for epoch in range(position.epoch, recipe.epochs):
        sequence = order(recipe, epoch, length)
        for step in range(position.step if epoch == position.epoch else 0, steps):
            yield [(epoch, index) for index in sequence[step * size + rank : (step + 1) * size : world]]


def tune(
    session: Session, network: Network, dataset: ImageDataset, recipe: Recipe, checkpoints: Checkpoints
) -> dict[str, int]:
    """Trains from where the checkpoint is to the end; the network is left in eval mode.

    Returns:
        How many images went forward through the backbone.

    Raises:
        RunError: The loss is NaN or infinite.
        Interrupted: A signal asked to stop; the state is saved.
    """
    accelerator = session.accelerator
    optimizer = optimizer_of(network, recipe) if network.trained else None
    position = checkpoints.restore(network.moving, optimizer, accelerator.scaler)
    session.count_unreadable(dataset.what, checkpoints.unreadable, len(dataset))
    if position.steps:
        session.log.say(f"Going on after step {position.steps} (epoch {position.epoch}).")
    session.log.resume(position.steps)
    model, stepper = _distributed(session, network, recipe, optimizer)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    statistics = [network.model.get_buffer(name) for name in network.statistics]

    def save() -> None:
        checkpoints.unreadable = sorted(session.unreadable.get(dataset.what, ()))
        scaler = accelerator.scaler and accelerator.scaler.state_dict()
        with session.alike():
            checkpoints.save(position, network.moving, optimizer, scaler)

    steps, size = steps_of_epoch(recipe, len(dataset), session.world)
    network.train(recipe)
    with session.stoppable():
        batches = _batches(session, dataset, recipe, replace(position))
        while position.epoch < recipe.epochs:
            epoch = position.epoch
            with session.log.bar(f"Epoch {epoch + 1}/{recipe.epochs}", steps * size) as bar:
                bar.skip(position.step * size)
                seen = correct = loss_sum = 0.0
                while position.epoch == epoch:
                    batch = next(batches)
                    rate = recipe.learning_rate(epoch + position.step / steps)
                    for group in optimizer.param_groups if optimizer else ():
                        group["lr"] = rate
                    loss, top1, count, stop = _step(session, model, criterion, stepper, batch, position, checkpoints)
                    _average(session, statistics, recipe)
                    position.step += 1
                    position.steps += 1
                    seen, correct, loss_sum = seen + count, correct + top1, loss_sum + loss * count
                    if position.step == steps:
                        position.epoch, position.step = epoch + 1, 0
                    said = f"loss {loss_sum / seen:.3f}, top-1 {100 * correct / seen:.1f}"
                    bar.advance(int(count), said)
                    session.log.write(position.steps, epoch=epoch, loss=loss, top1=100 * top1 / count, lr=rate)
                    if position.epoch > epoch:
                        session.share_unreadable(dataset.what, len(dataset))
                    if stop or checkpoints.due(position) or position.epoch == recipe.epochs:
                        save()
                    if stop:
                        session.stopped_by = stop
                        with session.alike():
                            raise Interrupted(stop)
    checkpoints.confirm()
    network.model.eval()
    return {"forwards": recipe.epochs * steps * size}


def _distributed(session: Session, network: Network, recipe: Recipe, optimizer: Any) -> tuple[nn.Module, Any]:
    """The model and optimizer as Accelerate wraps them; nothing to wrap where no gradient flows."""
    if recipe.sync_bn and session.accelerator.device.type != "cuda":
        raise RecipeError("sync_bn works on CUDA devices only.")
    if recipe.sync_bn and session.world > 1:
        _synchronise(network)
    if optimizer is None:
        return network.model, None
    with warnings.catch_warnings():
        # torch's successor to broadcast_buffers is not in Accelerate yet
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        model, stepper = session.accelerator.prepare(network.model, optimizer)
    return model, stepper


def _synchronise(network: Network) -> None:
    """Makes the head norm compute its batch statistics over all devices; its tensors stay the same objects."""
    norm = cast(Any, network.norm)
    group = torch.distributed.group.WORLD
    batch_norm = torch.nn.SyncBatchNorm.forward

    def forward(inputs: Tensor) -> Any:
        with torch.autocast(inputs.device.type, enabled=False):
            result = batch_norm(norm, inputs.float())
        return norm.act(norm.drop(result)) if hasattr(norm, "act") else result

    norm.process_group = group
    compat.expect_any_device(norm)
    norm.forward = forward


def _batches(session: Session, dataset: ImageDataset, recipe: Recipe, position: Position) -> Iterator[Batch]:
    tasks = tasks_from(position, recipe, len(dataset), session.rank, session.world)
    pin = session.accelerator.device.type == "cuda"
    transform = transform_of(recipe)
    for batch in load_batches(dataset, transform, tasks, workers=session.workers, substitute=True, pin_memory=pin):
        session.count_unreadable(dataset.what, [reason for _, reason in batch.unreadable], len(dataset))
        if not len(batch.targets):
            raise DataError(f"Ten images of {dataset.what} in a row cannot be read: {batch.unreadable[-1][1]}")
        yield batch


def _step(
    session: Session,
    model: nn.Module,
    criterion: nn.Module,
    stepper: Any,
    batch: Batch,
    position: Position,
    checkpoints: Checkpoints,
) -> tuple[float, float, float, int]:
    """One step; mean loss, correct predictions, images, and signal to stop (0: none), of all processes."""
    accelerator = session.accelerator
    device = accelerator.device
    inputs = batch.inputs.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    targets = batch.targets.to(device, non_blocking=True)
    with torch.set_grad_enabled(stepper is not None), accelerator.autocast():
        logits = model(inputs).float()
        loss = criterion(logits, targets)
    correct = (logits.detach().argmax(1) == targets).sum()
    count = len(targets)
    stops = [float(session.stopped_by == number) for number in (signal.SIGTERM, signal.SIGINT)]
    totals = torch.cat([torch.stack([loss.detach() * count, correct]), torch.tensor([count, *stops], device=device)])
    loss_sum, correct, seen, terminate, interrupt = cast(Tensor, accelerator.reduce(totals, "sum")).tolist()
    if not math.isfinite(loss_sum):
        with session.alike():
            raise checkpoints.give_up(loss_sum / seen, position)
    checkpoints.confirm()
    if stepper is not None:
        accelerator.backward(loss)
        stepper.step()
        stepper.zero_grad()
    stop = signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0
    return loss_sum / seen, correct, seen, int(stop)


def _average(session: Session, statistics: list[Tensor], recipe: Recipe) -> None:
    """Gives all processes the mean of their running statistics, so that each holds the same state."""
    if session.world == 1 or not statistics or recipe.sync_bn:
        return
    flat = cast(Tensor, session.accelerator.reduce(torch.cat([tensor.view(-1) for tensor in statistics]), "mean"))
    for tensor, part in zip(statistics, torch.split(flat, [tensor.numel() for tensor in statistics]), strict=True):
        tensor.copy_(part.view_as(tensor))
