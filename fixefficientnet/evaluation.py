"""Accuracy of a model on labelled pictures, with what is needed to judge a difference."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fixefficientnet.data import Batch, Pictures, load_batches, shard_tasks
from fixefficientnet.errors import DataError
from fixefficientnet.manifest import TestTime
from fixefficientnet.modes import in_eval_mode
from fixefficientnet.preprocessing import Preprocess

if TYPE_CHECKING:
    from accelerate import Accelerator

_Z = 1.959963984540054  # the normal distribution's 97.5% point


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one model made of one data set at one size.

    Attributes:
        size: Test size, in pixels.
        crop_pct: See `TestTime`.
        right: Per picture, in the data set's order: is its label the best guess? "1", "0", or "-" where the
            picture could not be read.
        right5: The same for the best five.
        loss: Mean cross-entropy, in nats.
    """

    size: int
    crop_pct: float
    right: str
    right5: str
    loss: float

    @property
    def pictures(self) -> int:
        """How many were judged; unreadable ones are not."""
        return len(self.right) - self.right.count("-")

    @property
    def top1(self) -> float:
        """Top-1 accuracy, in per cent."""
        return 100 * self.right.count("1") / self.pictures

    @property
    def top5(self) -> float:
        """Top-5 accuracy, in per cent."""
        return 100 * self.right5.count("1") / self.pictures

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of `top1` (Wilson), in per cent."""
        return wilson(self.right.count("1"), self.pictures)

    def summary(self) -> dict[str, Any]:
        """The figures alone, as JSON values."""
        low, high = self.interval
        return {
            "size": self.size,
            "crop_pct": self.crop_pct,
            "pictures": self.pictures,
            "unreadable": len(self.right) - self.pictures,
            "top1": self.top1,
            "top1_low": low,
            "top1_high": high,
            "top5": self.top5,
            "loss": self.loss,
        }


def evaluate(
    model: nn.Module,
    pictures: Pictures,
    test: TestTime,
    *,
    batch_size: int = 32,
    shard: int = 256,
    workers: int = 0,
    accelerator: "Accelerator | None" = None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Evaluation:
    """Measures a model, in eval mode; its own mode and place are left as they are.

    The data set is cut into fixed shards that the processes share out, so their number changes no figure.

    Args:
        model: float32 [N, 3, S, S] → logits [N, classes].
        pictures: What to measure on.
        test: Test-time preprocessing.
        batch_size: Pictures per forward pass.
        shard: Pictures per shard.
        workers: Loading processes.
        accelerator: Shares the work among its processes, and computes in its precision.
        on_batch: Called after each batch.

    Raises:
        DataError: No picture could be read.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = range(rank, math.ceil(len(pictures) / shard), world)
    tasks = shard_tasks(len(pictures), shard, batch_size, mine)
    device = next(model.parameters()).device
    found: dict[int, tuple[str, str]] = {}
    losses: dict[int, float] = {}
    transform = _TestTimeTransform(Preprocess.of(test))
    for batch in load_batches(
        pictures, transform, tasks, workers=min(workers, len(tasks)), pin_memory=device.type == "cuda"
    ):
        if len(batch.targets):
            logits = _logits(model, batch.inputs.to(device, non_blocking=True), accelerator)
            targets = batch.targets.to(logits.device)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
            right, right5 = best[:, 0].tolist(), best.any(1).tolist()
            found |= {i: ("01"[a], "01"[b]) for i, a, b in zip(batch.indices.tolist(), right, right5, strict=True)}
            number = int(batch.indices[0]) // shard
            loss = F.cross_entropy(logits, targets, reduction="sum").double()
            losses[number] = losses.get(number, 0.0) + loss.item()
        on_batch(batch)
    if world > 1:
        from accelerate.utils import gather_object

        found = dict(item for part in gather_object([found]) for item in part.items())
        losses = dict(item for part in gather_object([losses]) for item in part.items())
    if not found:
        raise DataError(f"None of the {len(pictures)} pictures of {pictures.what} could be read.")
    judged = [found.get(index, ("-", "-")) for index in range(len(pictures))]
    return Evaluation(
        size=test.size,
        crop_pct=test.crop_pct,
        right="".join(first for first, _ in judged),
        right5="".join(second for _, second in judged),
        loss=sum(losses[number] for number in sorted(losses)) / len(found),
    )


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a share (Wilson's score interval), in per cent."""
    share, z2 = successes / trials, _Z**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def paired(one: str, other: str) -> tuple[int, int, float]:
    """Compares two evaluations of the same pictures: McNemar's exact test.

    Args:
        one: `Evaluation.right` of the first.
        other: Of the second.

    Returns:
        How many pictures only the first got right, how many only the second, and the two-sided probability of
        a difference at least as large if neither were better.

    Raises:
        DataError: They are not of the same number of pictures.
    """
    if len(one) != len(other):
        raise DataError(f"Evaluations of {len(one)} and of {len(other)} pictures cannot be paired.")
    pairs = list(zip(one, other, strict=True))
    first, second = pairs.count(("1", "0")), pairs.count(("0", "1"))
    trials = first + second
    ways = tail = 1  # to choose k of the trials: for k = 0, and summed up
    for k in range(min(first, second)):
        ways = ways * (trials - k) // (k + 1)
        tail += ways
    return first, second, min(1.0, 2 * tail / 2**trials)


def from_json(record: Mapping[str, Any]) -> Evaluation:
    """The inverse of `dataclasses.asdict`."""
    return Evaluation(**{name: record[name] for name in Evaluation.__slots__})


@dataclass(frozen=True, slots=True)
class _TestTimeTransform:
    """The same in every epoch."""

    preprocess: Preprocess

    def __call__(self, picture: Image.Image, epoch: int, index: int) -> Tensor:
        return self.preprocess(picture)


@torch.inference_mode()
def _logits(model: nn.Module, inputs: Tensor, accelerator: "Accelerator | None") -> Tensor:
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    with in_eval_mode(model), accelerator.autocast() if accelerator else contextlib.nullcontext():
        logits: Tensor = model(inputs)
    return logits.float()
