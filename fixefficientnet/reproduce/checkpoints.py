"""A run's state on disk: one safetensors file, renamed into place, that holds only what moves.

Neither the frozen weights (gigabytes for the largest) nor any pickle: random draws are a function of seed,
epoch and image, so there is no generator's state to keep.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fixefficientnet._internal.files import write_atomically
from fixefficientnet.errors import CheckpointError, RunError

_MODEL, _MOMENTUM = "model.", "momentum."


@dataclass(slots=True)
class Position:
    """How far training is: `step` of the epoch are done, `steps` in all."""

    epoch: int = 0
    step: int = 0
    steps: int = 0


@dataclass
class Checkpoints:
    """Saves and restores what moves, at the pace that was asked for.

    Attributes:
        path: The file.
        identity: What run it belongs to; another run's is refused.
        every_steps: Save after so many steps.
        every_seconds: Save after so much time.
        enabled: False on all processes but the first: they hold the same state and do not write.
        unreadable: Images that could not be read so far; saved and restored with the state.
    """

    path: Path
    identity: Mapping[str, Any]
    every_steps: int
    every_seconds: float
    enabled: bool = True
    unreadable: list[str] = field(default_factory=list)
    _saved: float = field(default_factory=time.monotonic)
    _unconfirmed: bool = False

    def due(self, position: Position) -> bool:
        """Whether it is time to save."""
        return position.steps % self.every_steps == 0 or time.monotonic() - self._saved >= self.every_seconds

    def save(
        self,
        position: Position,
        moving: Mapping[str, Tensor],
        optimizer: Optimizer | None,
        scaler: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes the state; whatever happens, either the last state or this one is there.

        The last one stays beside it until `confirm`: only the next loss shows whether an update was good.

        Raises:
            RunError: What moves is NaN or infinite; nothing is written.
        """
        if not all(bool(torch.isfinite(tensor).all()) for tensor in moving.values()):
            raise self.give_up(math.nan, position)
        if not self.enabled:
            return
        tensors = {_MODEL + name: tensor for name, tensor in moving.items()}
        for name, tensor in moving.items():
            buffer = optimizer.state.get(tensor, {}).get("momentum_buffer") if optimizer else None
            if buffer is not None:
                tensors[_MOMENTUM + name] = buffer
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {
            "identity": json.dumps(self.identity, sort_keys=True),
            "position": json.dumps([position.epoch, position.step, position.steps]),
            "scaler": json.dumps(scaler or {}),
            "unreadable": json.dumps(self.unreadable),
        }
        if self.path.exists():
            write_atomically(self._previous, self.path.read_bytes())
        self._unconfirmed = True
        write_atomically(self.path, safetensors.torch.save(tensors, metadata))
        self._saved = time.monotonic()

    def confirm(self) -> None:
        """The state that was saved last gave a finite loss."""
        if self._unconfirmed:
            self._previous.unlink(missing_ok=True)
            self._unconfirmed = False

    def give_up(self, loss: float, position: Position) -> RunError:
        """Puts the last state that is known to be good back; the error to raise.

        Args:
            loss: What is not finite.
            position: After the last step that was.
        """
        if self._unconfirmed:
            self.path.unlink(missing_ok=True)
            if self._previous.exists():
                self._previous.replace(self.path)
        kept = "The last good checkpoint is kept." if self.path.exists() else "Nothing was saved before."
        return RunError(
            f"The loss is {loss} at step {position.steps + 1} (epoch {position.epoch + 1}, step {position.step + 1} in "
            f"it). {kept} Try a smaller base_lr (--set base_lr=…), or look for broken weights."
        )

    @property
    def _previous(self) -> Path:
        return self.path.with_name(f"previous-{self.path.name}")

    def restore(self, moving: Mapping[str, Tensor], optimizer: Optimizer | None, scaler: Any = None) -> Position:
        """Puts the saved state in place; the beginning where nothing is saved.

        Raises:
            CheckpointError: The file is damaged, or does not hold what moves in this run.
        """
        if not self.path.exists():
            return Position()
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            position = Position(*json.loads(metadata["position"]))
            saved_scaler = json.loads(metadata["scaler"])
            unreadable = json.loads(metadata["unreadable"])
        except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{self.path} is damaged ({error}). Delete it to start anew.") from error
        expected = {_MODEL + name: tensor.shape for name, tensor in moving.items()}
        if {name: t.shape for name, t in tensors.items() if name.startswith(_MODEL)} != expected:
            raise CheckpointError(f"{self.path} holds other tensors than this run moves. Delete it to start anew.")
        with torch.no_grad():
            for name, tensor in moving.items():
                tensor.copy_(tensors[_MODEL + name])
                if optimizer and isinstance(tensor, nn.Parameter) and _MOMENTUM + name in tensors:
                    optimizer.state[tensor]["momentum_buffer"] = tensors[_MOMENTUM + name].to(tensor.device)
        if scaler is not None and saved_scaler:
            scaler.load_state_dict(saved_scaler)
        self.unreadable = unreadable
        self._unconfirmed = self.enabled and self._previous.exists()
        return position

    def saved_identity(self) -> Mapping[str, Any] | None:
        """What run the file belongs to; None where there is none."""
        if not self.path.exists():
            return None
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                identity: Mapping[str, Any] = json.loads((file.metadata() or {})["identity"])
                return identity
        except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.path} is damaged ({error}). Delete it to start anew.") from error
