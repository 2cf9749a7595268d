"""Fine-tuning as in the paper: a forward pass per image and epoch, the head norm in train mode where it is batch norm.

The base stage, where the whole network trains, runs here too.
"""

import contextlib
import signal
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
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
from fixefficientnet.reproduce.chunks import StepNetwork
from fixefficientnet.reproduce.network import Best, Network, TrainingState, average_of, copied, optimizer_of
from fixefficientnet.reproduce.recipe import Recipe
from fixefficientnet.reproduce.session import Session
from fixefficientnet.reproduce.training import EpochSize, StepResult, Validation, train

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tuned:
    """What training did.

    Attributes:
        forwards: Number of images that went forward through the backbone.
        epochs: Number of epochs.
        best: The best weights, which the network has now; None where the last ones count.
        last: The weights after the last epoch, by state-dict name, where the best ones are others; else empty.
    """

    forwards: int
    epochs: int
    best: Best | None = None
    last: Mapping[str, Tensor] = field(default_factory=dict)


def transform_of(recipe: Recipe) -> FineTuningTransform | TrainingTransform:
    """The augmentation of the recipe's stage."""
    if recipe.stage == "base":
        return TrainingTransform(Preprocess.of(recipe.base), recipe.seed, recipe.hflip)
    return FineTuningTransform(Preprocess.of(recipe.test), recipe.seed, recipe.hflip, recipe.color_jitter)


def order(recipe: Recipe, epoch: int, length: int) -> Array:
    """The order in which an epoch takes the images: their indices; int64 [length]."""
    return np.random.default_rng([recipe.seed, epoch]).permutation(length)


def steps_of_epoch(recipe: Recipe, length: int, world: int = 1) -> tuple[int, int]:
    """Steps per epoch and images per step; a partial last batch is left out unless it is the only one.

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
            yield [(epoch, index) for index in sequence[step * size + rank : (step + 1) * size : world].tolist()]


def tune(
    session: Session,
    network: Network,
    dataset: ImageDataset,
    checkpoints: Checkpoints,
    validation: tuple[Callable[[nn.Module], float | None], int] | None = None,
) -> Tuned:
    """Trains from the checkpoint to the end; the network is left in eval mode, in the base stage with the best weights.

    The validation, which the base stage needs, is what gives a network's top-1 on the validation images, in per cent,
    and the number of epochs between two of them.

    Raises:
        RunError: The loss is NaN or infinite.
        Interrupted: A signal asked to stop; the state is saved.
    """
    recipe, optimizer = network.recipe, optimizer_of(network) if network.trained else None
    average, best = average_of(network), Best() if recipe.stage == "base" else None
    state = TrainingState(network, optimizer, session.accelerator.scaler, average, best)
    position = checkpoints.restore(state)
    session.count_unreadable(dataset.name, sorted(checkpoints.unreadable), len(dataset))
    session.count_unturned(dataset.name, checkpoints.unturned)
    checkpoints.unreadable, checkpoints.unturned = session.unreadable[dataset.name], session.unturned[dataset.name]
    if position.steps:
        session.log.say(f"Continuing after step {position.steps} (epoch {position.epoch}).")
    session.log.resume(position.steps)
    model, stepper = _distributed(session, network, optimizer)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    epoch_size = EpochSize(*steps_of_epoch(recipe, len(dataset), session.world))
    network.train()
    loaded = _batches(session, dataset, recipe, replace(position))
    # a failure must not leave loading processes behind
    with session.stoppable(), contextlib.closing(loaded) as batches:

        def step(position: Position) -> StepResult:
            batch = next(batches)  # the first one draws a seed for the loading processes
            # dropout and stochastic depth, which some networks train with
            torch.manual_seed(_seed(recipe.seed, position.steps, session.rank))
            result = _step(session, model, criterion, stepper, batch)
            _average(session, network)
            if average:
                average.update(network.model, step=position.steps + 1)
            if position.step + 1 == epoch_size.steps:
                session.share_counted(dataset.name, len(dataset))
            return result

        def validate(position: Position) -> float | None:
            logged = session.on_main(lambda: session.log.has(position.steps, "val_top1"))
            if not validation or (logged and not best):
                return None
            with session.alike():
                checkpoints.save(position, state)  # this may take a while
            top1 = validation[0](state.validated)
            if top1 is not None:
                session.log.say(f"  validation after epoch {position.epoch}: top-1 {top1:.2f}")
            return top1

        between = Validation(validation[1], validate) if validation else None
        train(session, state, epoch_size, checkpoints, position, step, between)
    network.model.eval()
    last = copied(state.result) if best and best.epoch < position.epoch else {}
    if best:
        best.put_into(network)
    return Tuned(position.steps * epoch_size.batch_size, position.epoch, best, last)


def _seed(*numbers: int) -> int:
    """A seed that is a function of these numbers alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _distributed(session: Session, network: Network, optimizer: Any) -> tuple[nn.Module, Any]:
    """What a step runs, and the optimizer, as Accelerate wraps them; unwrapped where no gradient flows."""
    if network.recipe.sync_bn and session.accelerator.device.type != "cuda":
        raise RecipeError("sync_bn works on CUDA devices only.")
    if network.recipe.sync_bn and session.world > 1:
        _synchronise(network)
    step_network = StepNetwork(network)
    if optimizer is None:
        return step_network, None
    with warnings.catch_warnings():
        # torch's successor to broadcast_buffers is not in Accelerate yet
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        model, stepper = session.accelerator.prepare(step_network, optimizer)
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


def _batches(
    session: Session, dataset: ImageDataset, recipe: Recipe, position: Position
) -> Generator[Batch, None, None]:
    tasks = tasks_from(position, recipe, len(dataset), session.rank, session.world)
    transform, device = transform_of(recipe), session.accelerator.device
    for batch in load_batches(dataset, transform, tasks, workers=session.workers, substitute=True, device=device):
        session.count_unreadable(dataset.name, [reason for _, reason in batch.unreadable], len(dataset))
        session.count_unturned(dataset.name, map(dataset.image_path, batch.unturned))
        if not len(batch.targets):
            raise DataError(f"Ten images of {dataset.name} in a row cannot be read: {batch.unreadable[-1][1]}")
        yield batch


def _step(session: Session, model: nn.Module, criterion: nn.Module, stepper: Any, batch: Batch) -> StepResult:
    """One step of all processes."""
    accelerator, device = session.accelerator, session.accelerator.device
    targets = batch.targets.to(device, non_blocking=True)
    with torch.set_grad_enabled(stepper is not None), accelerator.autocast():
        logits = model(batch.inputs).float()
        loss = criterion(logits, targets)
    correct = (logits.detach().argmax(1) == targets).sum()
    count = len(targets)
    stops = [float(session.stopped_by == number) for number in (signal.SIGTERM, signal.SIGINT)]
    totals = torch.cat([torch.stack([loss.detach() * count, correct]), torch.tensor([count, *stops], device=device)])
    loss_sum, hits, images, terminate, interrupt = cast(Tensor, accelerator.reduce(totals, "sum")).tolist()
    if stepper is not None:
        accelerator.backward(loss)
        stepper.step()
        stepper.zero_grad()
    stop = signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0
    return StepResult(loss_sum / images, hits, images, int(stop))


def _average(session: Session, network: Network) -> None:
    """Gives all processes the mean of their running statistics, so that each holds the same state."""
    if session.world == 1 or not network.statistics or network.recipe.sync_bn:
        return
    statistics = [network.model.get_buffer(name) for name in network.statistics]
    flat = cast(Tensor, session.accelerator.reduce(torch.cat([tensor.view(-1) for tensor in statistics]), "mean"))
    for tensor, part in zip(statistics, torch.split(flat, [tensor.numel() for tensor in statistics]), strict=True):
        tensor.copy_(part.view_as(tensor))
