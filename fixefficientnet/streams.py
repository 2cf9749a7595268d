"""Several batches at once on a CPU: each thread takes one from its files to its results with cores of its own.

One batch after the other with all cores in each leaves cores idle: they wait for each other at the end of every layer,
and for pictures to be decoded (docs/speed.md has the figures).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

import torch

MOST = 8
"""Threads of one interpreter get in each other's way; further cores go into each stream."""
BATCH_SIZE = 2
"""Pictures per forward pass on a CPU: more do not fit into its caches, which makes them slower."""

Given = TypeVar("Given")
Result = TypeVar("Result")


def number(device: torch.device | str, batches: int | None = None) -> int:
    """How many streams a model on this device computes with.

    Args:
        device: Of the model; only a CPU has several.
        batches: How many there are to compute, if that is known.
    """
    if torch.device(device).type != "cpu":
        return 1
    return max(1, min(MOST, torch.get_num_threads(), MOST if batches is None else batches))


def batch_size(device: torch.device | str, on_accelerator: int) -> int:
    """Pictures per forward pass where nobody says."""
    return BATCH_SIZE if torch.device(device).type == "cpu" else on_accelerator


def in_order(work: Callable[[Given], Result], items: Iterable[Given], streams: int) -> Generator[Result, None, None]:
    """Does the same work on each item, several at once; gives the results in the items' order.

    Args:
        work: Called in threads that share the cores out; thread-local settings of torch's (inference mode, autocast)
            are its own business.
        items: Drawn in the calling thread, a few ahead of the results.
        streams: How many at once; 1 works in the calling thread. Fewer items have all cores among them.
    """
    items = iter(items)
    first = list(islice(items, streams))
    streams = min(streams, len(first))
    if streams < 2:
        yield from map(work, chain(first, items))
        return
    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(streams, "stream", torch.set_num_threads, (max(1, cores // streams),))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in chain(first, items):
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * streams:  # a slow one must not make the others idle
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)  # threads to come would have a stream's number
