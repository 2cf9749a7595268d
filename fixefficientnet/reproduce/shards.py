"""One pass over a dataset in shards: fixed runs of images, computed by any number of processes, each saved when done.

A killed run continues with the next shard. How many processes share the shards out changes no bit of the result.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from fixefficientnet._internal import sealed
from fixefficientnet._internal.files import write_atomically
from fixefficientnet.data.loading import Batch, Transform, load_batches, shard_tasks
from fixefficientnet.errors import Interrupted, RunError
from fixefficientnet.reproduce.recipe import Recipe
from fixefficientnet.reproduce.session import Session

Shard = dict[str, Tensor]
_EMPTY = "none"
"""Name of the only tensor of a shard without a readable image: a safetensors file must hold something."""


@dataclass(frozen=True)
class ShardPass:
    """A pass over a dataset, and what it computes.

    Attributes:
        session: Processes, log, signals.
        title: Title of the progress bar.
        dataset: The dataset: has a length, gives images with labels by index, and has a name.
        transform: Turns an image into the network's input.
        recipe: Sizes of shards and batches.
        folder: Folder of the finished shards.
        forward: Computes the tensors of one batch.
        add: Joins the tensors of a batch to those of the shard's earlier batches.
        rows: The bytes that a shard has written elsewhere; they are part of its checksum.
        flush: Brings these bytes to disk.
    """

    session: Session
    title: str
    dataset: Any
    transform: Transform
    recipe: Recipe
    folder: Path
    forward: Callable[[Batch], Shard]
    add: Callable[[Shard, Shard], Shard]
    rows: Callable[[int], Any] = lambda number: b""
    flush: Callable[[], None] = lambda: None

    def run(self) -> list[Shard]:
        """Computes the shards that are not done yet, each process its share; gives all of them, in order.

        Raises:
            RunError: A shard is not on disk after it was written.
            Interrupted: A signal asked to stop; finished shards are saved.
        """
        session = self.session
        count = math.ceil(len(self.dataset) / self.recipe.shard)
        paths = [self.folder / f"{number:06d}.safetensors" for number in range(count)]
        mine = range(session.rank, len(paths), session.world)
        left = [number for number in mine if self._read(paths[number], number) is None]
        tasks = shard_tasks(len(self.dataset), self.recipe.shard, self.recipe.forward_batch, left)
        device, workers = session.accelerator.device, min(session.workers, sum(map(self._length, left)))
        with session.log.bar(self.title, sum(map(self._length, mine))) as bar:
            bar.skip(sum(self._length(number) for number in set(mine) - set(left)))
            loaded = load_batches(self.dataset, self.transform, tasks, workers=workers, device=device)
            with contextlib.closing(loaded) as batches:  # a failure must not leave loading processes behind
                for number in left:
                    self._compute(number, paths[number], batches, bar.advance)
                    if session.stopped_by:
                        raise Interrupted(session.stopped_by)
        session.accelerator.wait_for_everyone()
        session.on_main(lambda: self._check(paths))
        return [self._load(path) for path in paths]

    def _length(self, number: int) -> int:
        return min(self.recipe.shard, len(self.dataset) - number * self.recipe.shard)

    def _compute(self, number: int, path: Path, batches: Iterator[Batch], advance: Callable[[int], None]) -> None:
        shard: Shard | None = None
        unreadable: list[str] = []
        unturned: list[str] = []
        for batch in islice(batches, math.ceil(self._length(number) / self.recipe.forward_batch)):
            unreadable += [reason for _, reason in batch.unreadable]
            self.session.count_unreadable(self.dataset.name, unreadable, len(self.dataset))
            unturned += map(self.dataset.image_path, batch.unturned)
            if len(batch.targets):
                part = self.forward(batch)
                shard = part if shard is None else self.add(shard, part)
            advance(len(batch.targets) + len(batch.unreadable))
        self.flush()
        shard = shard or {_EMPTY: torch.zeros(0)}
        metadata = {"unreadable": json.dumps(unreadable), "unturned": json.dumps(unturned)}
        write_atomically(path, sealed.dumps(shard, metadata, self.rows(number)))

    def _check(self, paths: list[Path]) -> None:
        for number, path in enumerate(paths):
            if self._read(path, number) is None:
                raise RunError(f"{path} lacks what was just written. Do all processes see the same folder?")

    def _read(self, path: Path, number: int) -> Shard | None:
        """The tensors of a shard; None if it is not there, not whole, or not what was saved."""
        try:
            return sealed.load(path, self.rows(number))[0]
        except (OSError, ValueError):
            return None

    def _load(self, path: Path) -> Shard:
        """A finished shard, whose unreadable images are counted; empty, if none of its images is readable."""
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            reasons = json.loads(metadata["unreadable"])
            self.session.count_unturned(self.dataset.name, json.loads(metadata["unturned"]))
            shard = {name: file.get_tensor(name) for name in file.keys() if name != _EMPTY}  # noqa: SIM118
        with self.session.alike():
            self.session.count_unreadable(self.dataset.name, reasons, len(self.dataset))
        return shard


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Computes on one thread: the bits of a sum or matrix product on a CPU depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
