"""The evaluation loop: a model over labelled images, each evaluated once."""

import contextlib
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixefficientnet._internal.modes import in_eval_mode
from fixefficientnet._internal.progress import Bar
from fixefficientnet._internal.threads import map_in_threads
from fixefficientnet.data.dataset import ImageDataset
from fixefficientnet.data.loading import Batch, InEveryEpoch, Task, load_batch, load_batches, shard_tasks
from fixefficientnet.errors import DataError, EvaluationError, FixEfficientNetError, NotFiniteError
from fixefficientnet.evaluation.journal import Finished, FinishedBatch, Journal
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.evaluation.predictions import ImagePrediction
from fixefficientnet.manifest import TestTime
from fixefficientnet.preprocessing import Preprocess

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fixefficientnet.classes import Subset


@dataclass(frozen=True)
class EvaluationLoop:
    """A model over the labelled images of a dataset, in eval mode; its own mode and device are left as they are.

    The dataset is cut into fixed shards that the processes share out, so their number changes no figure, and each
    image is evaluated once; batches that the journal has are not evaluated again.

    The model is float32 [N, 3, S, S] → logits [N, classes], which are restricted to the classes of the subset, if there
    is one. The transform is that of `test`, unless another one is given. With more than one thread, which load and
    compute a batch each, there are no loading processes. `autocast`: whether to compute in the accelerator's precision.
    """

    model: nn.Module
    dataset: ImageDataset
    test: TestTime
    accelerator: "Accelerator"
    transform: Preprocess | None = None
    batch_size: int = 32
    shard: int = 256
    workers: int = 0
    threads: int = 1
    subset: "Subset | None" = None
    journal: Journal | None = None
    autocast: bool = True
    progress: Bar | None = None

    def run(self) -> Evaluation:
        """Evaluates what the journal does not have yet.

        Returns:
            The whole evaluation, in every process.

        Raises:
            DataError: No image could be read, or a label is out of the model's range.
            EvaluationError: The model gives NaN, or does not take this size.
        """
        done = self.journal.read() if self.journal else Finished()
        done.unreadable.clear()  # these may have been repaired
        if self.progress and (before := int(done.predictions.evaluated.sum())):
            self.progress.skip(before)
        now, failure = Finished(), None
        try:
            self._evaluate(self._tasks(done), now)
        except FixEfficientNetError as error:
            failure = error
        now = _of_all_processes(now, failure)
        now.seconds += done.seconds
        now.add(done)
        total = len(self.dataset)
        if not now.predictions.evaluated.any():
            reason = next(iter(now.unreadable.values()))
            raise DataError(f"None of the {total} images of {self.dataset.name} could be read: {reason}")
        whole = {"size": self.test.size, "crop_pct": self.test.crop_pct, "images": total}
        if self.journal and self.accelerator.is_main_process and not whole.items() <= done.notes.items():
            self.journal.note(whole)
        return now.evaluation(self.test.size, self.test.crop_pct, total)

    def warm_up(self) -> None:
        """Computes one batch for nothing: the first of a size takes longer, as libraries choose how to compute it."""
        images, size = min(self.batch_size, len(self.dataset)), self.test.size
        with in_eval_mode(self.model):
            self._logits(torch.zeros(images, 3, size, size, device=self._device))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _transform(self) -> Preprocess:
        return self.transform or Preprocess.of(self.test)

    def _tasks(self, done: Finished) -> Iterator[list[Task]]:
        """The batches of this process that are not done."""
        shards = math.ceil(len(self.dataset) / self.shard)
        mine = range(self.accelerator.process_index, shards, self.accelerator.num_processes)
        tasks = shard_tasks(len(self.dataset), self.shard, self.batch_size, mine)
        return (batch for batch in tasks if not all(done.predictions.has(index) for _, index in batch))

    def _evaluate(self, tasks: Iterator[list[Task]], now: Finished) -> None:
        """Adds each batch to `now` as it is done."""
        start = time.perf_counter()
        # threads that still compute when this fails must end while the model is in eval mode
        with in_eval_mode(self.model), contextlib.closing(self._results(tasks)) as results:
            for found in results:
                found.seconds, start = time.perf_counter() - start, time.perf_counter()
                if self.journal:
                    self.journal.write(found)
                now.take(found)
                if self.progress:
                    images = len(found.predictions) + len(found.unreadable)
                    self.progress.advance(images * self.accelerator.num_processes)

    def _results(self, tasks: Iterator[list[Task]]) -> Generator[FinishedBatch, None, None]:
        dataset, transform = self.dataset, InEveryEpoch(self._transform.pixels)
        if self.threads > 1:
            work = map_in_threads(lambda task: self._batch(load_batch(dataset, transform, task)), tasks, self.threads)
            yield from work
            return
        first = list(islice(tasks, self.workers))  # fewer batches than workers need fewer workers
        tasks = chain(first, tasks)
        yield from map(self._batch, load_batches(dataset, transform, tasks, workers=len(first), device=self._device))

    def _batch(self, batch: Batch) -> FinishedBatch:
        found = FinishedBatch(unreadable=dict(batch.unreadable), unturned=set(batch.unturned))
        if len(batch.targets):
            inputs = self._transform.normalise(batch.inputs.to(self._device, non_blocking=True))
            logits = self._logits(inputs)
            found.predictions = _predictions(logits, batch, self.dataset, self.subset)
        return found

    @torch.inference_mode()
    def _logits(self, inputs: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        inputs = inputs.to(dtype).contiguous(memory_format=torch.channels_last)
        with self.accelerator.autocast() if self.autocast else contextlib.nullcontext():
            try:
                logits: Tensor = self.model(inputs)
            except (AssertionError, RuntimeError) as error:  # timm's and torch's words for a size that does not fit
                if "memory" in str(error).lower():
                    raise
                reason = str(error).partition("\n")[0]
                raise EvaluationError(f"The model fails on images of {self.test.size} pixels: {reason}") from error
        return logits.float()


def _of_all_processes(mine: Finished, failure: FixEfficientNetError | None) -> Finished:
    """What all processes found together; where one failed, all fail, and one says why."""
    from accelerate.utils import gather_object

    kind = type(failure) if failure else None
    parts: list[tuple[Finished, type[FixEfficientNetError] | None, str]] = gather_object([(mine, kind, str(failure))])
    failures = [(kind, reason) for _, kind, reason in parts if kind]
    if failures:
        first, reason = failures[0]
        # the same in all of them: whoever catches it does so in all
        error = failure if failure and (kind, str(failure)) == failures[0] else first(reason)
        error.said_elsewhere = error is not failure  # type: ignore[attr-defined]
        raise error
    if len(parts) == 1:
        return mine
    together = Finished()
    for part, *_ in parts:
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
            restricted = "" if subset is None else f", restricted to {len(allowed)}"
            raise DataError(
                f"{dataset.image_name(index)} has the label {label}, but the model's classes are 0 to "
                f"{logits.shape[1] - 1}{restricted}. Evaluate it on data whose labels are numbered as the model's "
                "classes."
            )
    if not logits.isfinite().all():
        row = int((~logits.isfinite().all(1)).nonzero()[0])
        raise NotFiniteError(
            f"The model's logits are NaN or infinite for {dataset.image_name(indices[row])}: its weights are damaged, "
            "or half precision overflows (--mixed-precision no)."
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
        index: ImagePrediction((label,), tuple(classes[number] for number in five), confidence, loss)
        for index, label, five, confidence, loss in zip(indices, labels, predicted, confidences, losses, strict=True)
    }
