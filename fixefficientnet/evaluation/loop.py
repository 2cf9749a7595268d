"""The engine: a model over labelled images, each evaluated once."""

import contextlib
import math
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fixefficientnet._internal.modes import in_eval_mode
from fixefficientnet._internal.progress import Bar
from fixefficientnet._internal.threads import map_in_threads
from fixefficientnet.data.dataset import ImageDataset
from fixefficientnet.data.loading import Batch, InEveryEpoch, load_batch, load_batches, shard_tasks
from fixefficientnet.errors import DataError, EvaluationError, FixEfficientNetError
from fixefficientnet.evaluation.journal import Finished, Journal
from fixefficientnet.evaluation.outcome import Evaluation, ImagePrediction
from fixefficientnet.manifest import TestTime
from fixefficientnet.preprocessing import Preprocess

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fixefficientnet.classes import Subset

TestTransform = Callable[[Image.Image], Tensor]
"""RGB image → float32 [3, S, S]."""


def predict_dataset(
    model: nn.Module,
    dataset: ImageDataset,
    test: TestTime,
    *,
    transform: TestTransform | None = None,
    batch_size: int = 32,
    shard: int = 256,
    workers: int = 0,
    threads: int = 1,
    subset: "Subset | None" = None,
    journal: Journal | None = None,
    accelerator: "Accelerator | None" = None,
    progress: Bar | None = None,
) -> Evaluation:
    """Measures a model, in eval mode; its own mode and place are left as they are.

    The dataset is cut into fixed shards that the processes share out, so their number changes no figure, and each
    image is evaluated once.

    Args:
        model: float32 [N, 3, S, S] → logits [N, classes].
        dataset: What to measure on.
        test: Test-time preprocessing.
        transform: What to do instead of it, where it cannot say it all.
        batch_size: Images per forward pass.
        shard: Images per shard.
        workers: Loading processes.
        threads: How many threads of this process load and compute a batch each; more than 1: without
            loading processes.
        subset: The classes that logits are restricted to.
        journal: Keeps finished batches; those that it has are not evaluated again.
        accelerator: Shares the work among its processes, and computes in its precision.
        progress: Counts the images as they are done.

    Raises:
        DataError: No image could be read, or a label is out of the model's range.
        EvaluationError: The model gives NaN, or does not take this size.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    done = journal.read() if journal else Finished()
    done.unreadable.clear()  # these may have been fixed
    mine = range(rank, math.ceil(len(dataset) / shard), world)
    tasks = shard_tasks(len(dataset), shard, batch_size, mine)
    tasks = [batch for batch in tasks if not all(index in done.predictions for _, index in batch)]
    if progress and done.predictions:
        progress.skip(len(done.predictions))
    failure: FixEfficientNetError | None = None
    now = Finished()
    device = next(model.parameters()).device
    every = InEveryEpoch(transform or Preprocess.of(test))

    def evaluated(batch: Batch) -> Finished:
        found = Finished(unreadable=dict(batch.unreadable))
        if len(batch.targets):
            logits = _logits(model, batch.inputs.to(device, non_blocking=True), test.size, accelerator)
            found.predictions = _predictions(logits, batch, dataset, subset)
        return found

    def results() -> Generator[Finished, None, None]:
        if threads > 1:
            yield from map_in_threads(lambda task: evaluated(load_batch(dataset, every, task)), tasks, threads)
            return
        pin = device.type == "cuda"
        yield from map(evaluated, load_batches(dataset, every, tasks, workers=min(workers, len(tasks)), pin_memory=pin))

    start = time.perf_counter()
    try:
        # threads that still compute when this fails must end while the model is in eval mode
        with in_eval_mode(model), contextlib.closing(results()) as done_now:
            for found in done_now:
                found.seconds, start = time.perf_counter() - start, time.perf_counter()
                if journal:
                    journal.write(found)
                now.predictions |= found.predictions
                now.unreadable |= found.unreadable
                now.seconds += found.seconds
                if progress:
                    progress.advance((len(found.predictions) + len(found.unreadable)) * world)
    except FixEfficientNetError as error:
        failure = error
    now = _of_all_processes(now, failure, world)
    now.seconds += done.seconds
    now.add(done)
    if not now.predictions:
        raise DataError(
            f"None of the {len(dataset)} images of {dataset.what} could be read: {next(iter(now.unreadable.values()))}"
        )
    whole = {"size": test.size, "crop_pct": test.crop_pct, "images": len(dataset)}
    if journal and rank == 0 and not whole.items() <= done.notes.items():
        journal.note(whole)
    return now.evaluation(test.size, test.crop_pct, len(dataset))


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


def _predictions(
    logits: Tensor, batch: Batch, dataset: ImageDataset, subset: "Subset | None"
) -> dict[int, ImagePrediction]:
    """By image index."""
    indices, labels = batch.indices.tolist(), batch.targets.tolist()
    classes = range(logits.shape[1]) if subset is None else subset.classes
    allowed = set(classes)
    for index, label in zip(indices, labels, strict=True):
        if label not in allowed:
            raise DataError(
                f"{dataset.name(index)} has the label {label}, but the model's classes are 0 to {logits.shape[1] - 1}"
                f"{'' if subset is None else ', restricted to ' + str(len(allowed))}. Evaluate it on data whose labels "
                "are numbered as the model's classes."
            )
    if not logits.isfinite().all():
        row = int((~logits.isfinite().all(1)).nonzero()[0])
        raise EvaluationError(
            f"The model's logits are NaN or infinite for {dataset.name(indices[row])}: its weights are damaged, or "
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
    predicted = best.indices.tolist()
    return {
        index: ImagePrediction((label,), tuple(classes[predicted] for predicted in five), confidence, loss)
        for index, label, five, confidence, loss in zip(indices, labels, predicted, confidences, losses, strict=True)
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
            raise EvaluationError(f"The model fails on images of {size} pixels: {reason}") from error
    return logits.float()
