"""The training loop: learning rate, steps, progress, checkpoints, and how to stop; what a step does is given."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fixefficientnet._internal.progress import Bar
from fixefficientnet.errors import Interrupted
from fixefficientnet.reproduce.checkpoints import Checkpoints, Position
from fixefficientnet.reproduce.network import Best, TrainingState
from fixefficientnet.reproduce.session import Session

_READ_TOGETHER = 50
"""Steps whose losses are read from the device together: each reading waits for it."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step gave, over all processes.

    Attributes:
        loss: Mean loss of the step's images; a tensor where nobody has read it from the device yet.
        correct: Number of images whose top-1 prediction is the label; a tensor likewise.
        images: Number of images.
        stop: Number of the signal that asked to stop; 0: none did.
    """

    loss: float | Tensor
    correct: float | Tensor
    images: float
    stop: int


@dataclass(frozen=True)
class EpochSize:
    """The number of steps in an epoch, and of images in a step, all processes together."""

    steps: int
    batch_size: int


@dataclass(frozen=True)
class Validation:
    """The accuracy on the validation images between epochs.

    The result depends on it where the best weights are kept: in the base stage.

    Attributes:
        interval: Number of epochs between two.
        top1: Gives top-1 at a position, in per cent; None where it is not wanted, or the logits are not finite.
    """

    interval: int
    top1: Callable[[Position], float | None]


def train(
    session: Session,
    state: TrainingState,
    epoch_size: EpochSize,
    checkpoints: Checkpoints,
    position: Position,
    step: Callable[[Position], StepResult],
    validation: Validation | None = None,
) -> None:
    """Trains from a position, which is counted on as steps are done, to the end of the recipe's epochs.

    The optimizer gets the learning rate before each step. After the last epoch, which the run's evaluation follows,
    there is a validation only where the best weights are kept.

    Raises:
        RunError: The loss is NaN or infinite.
        Interrupted: A signal asked to stop; the state is saved.
    """
    recipe, size, best = state.network.recipe, epoch_size.batch_size, state.best
    while True:
        epoch = position.epoch
        between = epoch and not position.step and (best or epoch < recipe.epochs)
        if validation and between and epoch % validation.interval == 0:
            _validate(session, state, position, validation)
        if epoch == recipe.epochs or _in_vain(session, best, recipe.patience, position):
            break
        with session.log.bar(f"Epoch {epoch + 1}/{recipe.epochs}", epoch_size.steps * size) as bar:
            bar.skip(position.step * size)
            ledger = _Ledger(session, checkpoints, bar)
            while position.epoch == epoch:
                rate = recipe.learning_rate(epoch + position.step / epoch_size.steps)
                for group in state.optimizer.param_groups if state.optimizer else ():
                    group["lr"] = rate
                at = replace(position)
                done = step(position)
                position.advance(epoch_size.steps)
                ledger.note(at, done, rate)
                last = done.stop or position.epoch == recipe.epochs
                saves = last or checkpoints.due(position)
                if saves or position.epoch > epoch:
                    ledger.read()
                if last:  # others wait, as a launcher kills what is left once one process has ended
                    session.on_main(lambda: checkpoints.save(position, state))
                elif saves:
                    with session.alike():
                        checkpoints.save(position, state)
                if done.stop:
                    session.stopped_by = done.stop
                    with session.alike():
                        raise Interrupted(done.stop)
    checkpoints.confirm()


@dataclass
class _Ledger:
    """What an epoch's steps gave, logged and shown once it is read from the device, of many steps together."""

    session: Session
    checkpoints: Checkpoints
    bar: Bar
    _unread: list[tuple[Position, StepResult, float]] = field(default_factory=list)
    _images: float = 0
    _correct: float = 0
    _loss_sum: float = 0

    def note(self, at: Position, done: StepResult, rate: float) -> None:
        """Takes the result of the step at a position; many are logged together, and raise as `read` does."""
        self._unread.append((at, done, rate))
        if isinstance(done.loss, float) or len(self._unread) == _READ_TOGETHER:
            self.read()

    def read(self) -> None:
        """Logs what was noted; a RunError says that a loss is NaN or infinite."""
        if not self._unread:
            return
        pairs = [(torch.as_tensor(done.loss), torch.as_tensor(done.correct)) for _, done, _ in self._unread]
        values = torch.stack([torch.stack([loss.double(), correct.double()]) for loss, correct in pairs]).tolist()
        for (at, done, rate), (loss, correct) in zip(self._unread, values, strict=True):
            if not math.isfinite(loss):
                with self.session.alike():
                    raise self.checkpoints.give_up(loss, at)
            self.checkpoints.confirm()
            self._images, self._correct = self._images + done.images, self._correct + correct
            self._loss_sum += loss * done.images
            top1 = 100 * self._correct / self._images
            self.bar.advance(int(done.images), f"loss {self._loss_sum / self._images:.3f}, top-1 {top1:.1f}")
            self.session.log.write(at.steps + 1, epoch=at.epoch, loss=loss, top1=100 * correct / done.images, lr=rate)
        self._unread.clear()


def _validate(session: Session, state: TrainingState, position: Position, validation: Validation) -> None:
    top1 = validation.top1(position)
    if state.best:
        state.best.offer(position.epoch, top1, state.result)
    if top1 is not None and not session.log.has(position.steps, "val_top1"):
        session.log.write(position.steps, epoch=position.epoch - 1, val_top1=top1)


def _in_vain(session: Session, best: Best | None, patience: int | None, position: Position) -> bool:
    """Whether so many epochs brought nothing that training stops here."""
    if not best or not patience or position.step or position.epoch - best.epoch < patience:
        return False
    session.log.say(f"No gain since epoch {best.epoch}: stopped after epoch {position.epoch}.")
    return True
