"""The state of a run on disk: one safetensors file that holds only what changes.

It holds neither the frozen weights (gigabytes for the largest network) nor a random generator's state: random draws
are a function of seed, epoch and image.
"""

import json
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from fixefficientnet._internal import records, sealed
from fixefficientnet._internal.files import write_atomically
from fixefficientnet.errors import CheckpointError, RunError
from fixefficientnet.reproduce.network import Best, TrainingState

_MODEL, _MOMENTUM, _AVERAGE, _BEST = "model.", "momentum.", "average.", "best."


@dataclass(slots=True)
class Position:
    """How far training is.

    Attributes:
        epoch: Number of finished epochs.
        step: Number of finished steps of the epoch after these.
        steps: Number of finished steps of all epochs.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 0

    def advance(self, steps_per_epoch: int) -> None:
        """Counts one step."""
        self.step += 1
        self.steps += 1
        if self.step == steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0


@dataclass
class Checkpoints:
    """Saves and restores what a run changes.

    Attributes:
        path: The checkpoint file.
        identity: The run that the file belongs to, as JSON values.
        every_steps: Number of steps between two saves.
        every_seconds: Longest time between two saves.
        enabled: Whether this process writes; all hold the same state, and the first one writes it.
        unreadable: Images that could not be read so far; saved and restored with the state.
        unturned: Images whose EXIF orientation was ignored so far; saved and restored too.
    """

    path: Path
    identity: Mapping[str, Any]
    every_steps: int
    every_seconds: float
    enabled: bool = True
    unreadable: Collection[str] = ()
    unturned: Collection[str] = ()
    _saved: float = field(default_factory=time.monotonic)
    _unconfirmed: bool = False
    _at: Position | None = None

    def due(self, position: Position) -> bool:
        """Whether it is time to save; by the clock, for the process that writes alone."""
        late = self.enabled and time.monotonic() - self._saved >= self.every_seconds
        return late or position.steps % self.every_steps == 0

    def save(self, position: Position, state: TrainingState) -> None:
        """Writes the state; whatever happens, either the last state or this one is on disk.

        The last one stays beside it until `confirm`: only the next loss shows whether an update was good.

        Raises:
            RunError: A tensor is NaN or infinite; nothing is written.
        """
        moving = state.network.moving
        if not all(bool(torch.isfinite(tensor).all()) for tensor in moving.values()):
            raise self.give_up(math.nan, position)
        if not self.enabled or self._at == replace(position):  # the file before it must stay the last good one
            return
        tensors = {_MODEL + name: tensor for name, tensor in moving.items()}
        for name, tensor in moving.items():
            buffer = state.optimizer.state.get(tensor, {}).get("momentum_buffer") if state.optimizer else None
            if buffer is not None:
                tensors[_MOMENTUM + name] = buffer
        tensors |= {_AVERAGE + name: tensor for name, tensor in state.averaged.items()}
        best = state.best or Best()
        tensors |= {_BEST + name: tensor for name, tensor in best.tensors.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {
            "identity": json.dumps(self.identity, sort_keys=True),
            "position": json.dumps([position.epoch, position.step, position.steps]),
            "scaler": json.dumps(state.scaler.state_dict() if state.scaler else {}),
            "unreadable": json.dumps(sorted(self.unreadable)),
            "unturned": json.dumps(sorted(self.unturned)),
        }
        if best.tensors:
            metadata["best"] = json.dumps([best.epoch, best.top1])
        if self.path.exists():
            write_atomically(self._previous, self.path.read_bytes())
        self._unconfirmed = True
        write_atomically(self.path, sealed.dumps(tensors, metadata))
        self._saved, self._at = time.monotonic(), replace(position)

    def confirm(self) -> None:
        """Drops the state before the last one: the last one gave a finite loss."""
        if self._unconfirmed:
            self._previous.unlink(missing_ok=True)
            self._unconfirmed = False

    def give_up(self, loss: float, position: Position) -> RunError:
        """Puts the last state that is known to be good back, and gives the error of a loss that is not finite."""
        if self._unconfirmed:
            self.path.unlink(missing_ok=True)
            if self._previous.exists():
                self._previous.replace(self.path)
        kept = "The last good checkpoint is kept." if self.path.exists() else "Nothing was saved before."
        return RunError(
            f"The loss is {loss} at step {position.steps + 1} (epoch {position.epoch + 1}, step {position.step + 1} in "
            f"it). {kept} Try a smaller --base-lr, or look for broken weights."
        )

    @property
    def _previous(self) -> Path:
        return self.path.with_name(f"previous-{self.path.name}")

    def restore(self, state: TrainingState) -> Position:
        """Puts the saved state in place; where nothing is saved, the position is the beginning.

        Raises:
            CheckpointError: The file is damaged, or does not hold what changes in this run.
        """
        moving = state.network.moving
        if not self.path.exists():
            return Position()
        try:
            tensors, metadata = sealed.load(self.path)
            position = Position(*json.loads(metadata["position"]))
            saved_scaler = json.loads(metadata["scaler"])
            unreadable, unturned = json.loads(metadata["unreadable"]), json.loads(metadata["unturned"])
            epoch, top1 = json.loads(metadata.get("best", "[0, -1]"))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{self.path} is damaged ({error}). Delete it to start anew.") from error
        saved = {
            prefix: {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
            for prefix in (_MODEL, _MOMENTUM, _AVERAGE, _BEST)
        }
        ours = {_MODEL: moving, _AVERAGE: state.averaged, _BEST: moving if state.best and epoch else {}}
        if any(_shapes(saved[prefix]) != _shapes(expected) for prefix, expected in ours.items()):
            raise CheckpointError(f"{self.path} holds other tensors than this run changes. Delete it to start anew.")
        with torch.no_grad():
            for name, tensor in moving.items():
                tensor.copy_(saved[_MODEL][name])
                if state.optimizer and isinstance(tensor, nn.Parameter) and name in saved[_MOMENTUM]:
                    state.optimizer.state[tensor]["momentum_buffer"] = saved[_MOMENTUM][name].to(tensor.device)
            for name, tensor in state.averaged.items():
                tensor.copy_(saved[_AVERAGE][name])
        if state.best:
            state.best.epoch, state.best.top1, state.best.tensors = epoch, top1, saved[_BEST]
        if state.scaler is not None and saved_scaler:
            state.scaler.load_state_dict(saved_scaler)
        self.unreadable, self.unturned = unreadable, unturned
        self._unconfirmed, self._at = self.enabled and self._previous.exists(), replace(position)
        return position

    def saved_identity(self) -> Mapping[str, Any] | None:
        """The run that the file belongs to; None where there is no file."""
        if not self.path.exists():
            return None
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                identity: Mapping[str, Any] = records.decode((file.metadata() or {})["identity"])
                return identity
        except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{self.path} is damaged ({error}). Delete it to start anew.") from error


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
