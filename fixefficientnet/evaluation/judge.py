"""The engine: a model over labelled pictures, each judged once."""

import contextlib
import math
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fixefficientnet.data import Batch, InEveryEpoch, Pictures, load_batch, load_batches, shard_tasks
from fixefficientnet.errors import DataError, EvaluationError, FixEfficientNetError
from fixefficientnet.evaluation.journal import Finished, Journal
from fixefficientnet.evaluation.outcome import Evaluation, Judgement
from fixefficientnet.manifest import TestTime
from fixefficientnet.modes import in_eval_mode
from fixefficientnet.preprocessing import Preprocess
from fixefficientnet.progress import Bar
from fixefficientnet.streams import in_order

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fixefficientnet.classes import Subset

TestTransform = Callable[[Image.Image], Tensor]
"""RGB picture → float32 [3, S, S]."""


def judge(
    model: nn.Module,
    pictures: Pictures,
    test: TestTime,
    *,
    transform: TestTransform | None = None,
    batch_size: int = 32,
    shard: int = 256,
    workers: int = 0,
    streams: int = 1,
    subset: "Subset | None" = None,
    journal: Journal | None = None,
    accelerator: "Accelerator | None" = None,
    progress: Bar | None = None,
) -> Evaluation:
    """Measures a model, in eval mode; its own mode and place are left as they are.

    The data set is cut into fixed shards that the processes share out, so their number changes no figure, and each
    picture is judged once.

    Args:
        model: float32 [N, 3, S, S] → logits [N, classes].
        pictures: What to measure on.
        test: Test-time preprocessing.
        transform: What to do instead of it, where it cannot say it all.
        batch_size: Pictures per forward pass.
        shard: Pictures per shard.
        workers: Loading processes.
        streams: How many batches are loaded and computed at once, by threads of this process; more than 1: without
            loading processes.
        subset: The classes that logits are restricted to.
        journal: Keeps finished batches; those that it has are not evaluated again.
        accelerator: Shares the work among its processes, and computes in its precision.
        progress: Counts the pictures as they are done.

    Raises:
        DataError: No picture could be read, or a label is out of the model's range.
        EvaluationError: The model gives NaN, or does not take this size.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    done = journal.read() if journal else Finished()
    done.unreadable.clear()  # these may have been mended
    mine = range(rank, math.ceil(len(pictures) / shard), world)
    tasks = shard_tasks(len(pictures), shard, batch_size, mine)
    tasks = [batch for batch in tasks if not all(index in done.judgements for _, index in batch)]
    if progress and done.judgements:
        progress.skip(len(done.judgements))
    failure: FixEfficientNetError | None = None
    now = Finished()
    device = next(model.parameters()).device
    every = InEveryEpoch(transform or Preprocess.of(test))

    def judged(batch: Batch) -> Finished:
        found = Finished(unreadable=dict(batch.unreadable))
        if len(batch.targets):
            logits = _logits(model, batch.inputs.to(device, non_blocking=True), test.size, accelerator)
            found.judgements = _judgements(logits, batch, pictures, subset)
        return found

    def results() -> Generator[Finished, None, None]:
        if streams > 1:
            yield from in_order(lambda task: judged(load_batch(pictures, every, task)), tasks, streams)
            return
        pin = device.type == "cuda"
        yield from map(judged, load_batches(pictures, every, tasks, workers=min(workers, len(tasks)), pin_memory=pin))

    start = time.perf_counter()
    try:
        # threads that still compute when this fails must end while the model is in eval mode
        with in_eval_mode(model), contextlib.closing(results()) as done_now:
            for found in done_now:
                found.seconds, start = time.perf_counter() - start, time.perf_counter()
                if journal:
                    journal.write(found)
                now.judgements |= found.judgements
                now.unreadable |= found.unreadable
                now.seconds += found.seconds
                if progress:
                    progress.advance((len(found.judgements) + len(found.unreadable)) * world)
    except FixEfficientNetError as error:
        failure = error
    now = _of_all_processes(now, failure, world)
    now.seconds += done.seconds
    now.add(done)
    if not now.judgements:
        raise DataError(
            f"None of the {len(pictures)} pictures of {pictures.what} could be read: "
            f"{next(iter(now.unreadable.values()))}"
        )
    whole = {"size": test.size, "crop_pct": test.crop_pct, "pictures": len(pictures)}
    if journal and rank == 0 and not whole.items() <= done.notes.items():
        journal.note(whole)
    return now.evaluation(test.size, test.crop_pct, len(pictures))


def _of_all_processes(mine: Finished, failure: FixEfficientNetError | None, world: int) -> Finished:
    """What all processes found together; where one failed, all fail, and one says why."""
    if world == 1:
        if failure:
            raise failure
        return mine
    from accelerate.utils import gather_object

    parts: list[tuple[Finished, str]] = gather_object([(mine, str(failure or ""))])
    reasons = [(rank, reason) for rank, (_, reason) in enumerate(parts) if reason]
    if reasons:
        error = failure or EvaluationError(reasons[0][1])
        error.said_elsewhere = failure is None or reasons[0][1] != str(failure)  # type: ignore[attr-defined]
        raise error
    together = Finished()
    for part, _ in parts:
        together.add(part)
    return together


def _judgements(logits: Tensor, batch: Batch, pictures: Pictures, subset: "Subset | None") -> dict[int, Judgement]:
    """By picture index."""
    indices, labels = batch.indices.tolist(), batch.targets.tolist()
    classes = range(logits.shape[1]) if subset is None else subset.classes
    allowed = set(classes)
    for index, label in zip(indices, labels, strict=True):
        if label not in allowed:
            raise DataError(
                f"{pictures.name(index)} has the label {label}, but the model's classes are 0 to {logits.shape[1] - 1}"
                f"{'' if subset is None else ', restricted to ' + str(len(allowed))}. Evaluate it on data whose labels "
                "are numbered as the model's classes."
            )
    if not logits.isfinite().all():
        row = int((~logits.isfinite().all(1)).nonzero()[0])
        raise EvaluationError(
            f"The model's logits are NaN or infinite for {pictures.name(indices[row])}: its weights are damaged, or "
            "half precision overflows (--mixed-precision no)."
        )
    targets = batch.targets
    if subset is not None:
        chosen = torch.tensor(subset.classes, device=logits.device)
        logits = logits[:, chosen]
        targets = torch.searchsorted(torch.tensor(subset.classes), targets)
    losses = F.cross_entropy(logits, targets.to(logits.device), reduction="none").tolist()
    best = logits.topk(min(5, logits.shape[1]), dim=1)
    confidences = (best.values[:, 0] - logits.logsumexp(1)).exp().clamp(max=1).tolist()
    guesses = best.indices.tolist()
    return {
        index: Judgement((label,), tuple(classes[guess] for guess in five), confidence, loss)
        for index, label, five, confidence, loss in zip(indices, labels, guesses, confidences, losses, strict=True)
    }


@torch.inference_mode()
def _logits(model: nn.Module, inputs: Tensor, size: int, accelerator: "Accelerator | None") -> Tensor:
    dtype = next(model.parameters()).dtype
    inputs = inputs.to(dtype).contiguous(memory_format=torch.channels_last)
    with accelerator.autocast() if accelerator else contextlib.nullcontext():
        try:
            logits: Tensor = model(inputs)
        except (AssertionError, RuntimeError) as error:  # timm's and torch's words for a size that does not fit
            if "memory" in str(error).lower():
                raise
            reason = str(error).partition("\n")[0]
            raise EvaluationError(f"The model fails on pictures of {size} pixels: {reason}") from error
    return logits.float()
