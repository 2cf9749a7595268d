"""Several batches at once on a CPU: each thread takes one from its files to its results with cores of its own.

One batch after the other with all cores in each leaves cores idle: they wait for each other at the end of every layer,
and for pictures to be decoded (docs/speed.md has the figures).
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

import torch
from torch import nn

from fixefficientnet import compat

MOST = 8
"""Threads of one interpreter get in each other's way; further cores go into each stream."""
BATCH_SIZE = 2
"""Pictures per forward pass of a stream: more do not fit into a core's caches, which makes them slower."""

_STARTING = threading.Lock()
"""The number of threads is the process's, and another one while streams begin: nobody may take that for the cores."""

Given = TypeVar("Given")
Result = TypeVar("Result")


def number(model: nn.Module, batches: int | None = None) -> int:
    """How many streams a model computes with.

    Args:
        model: On a CPU it has several; unless hooks watch it, which want one forward pass after the other.
        batches: How many there are to compute, if that is known.
    """
    if next(model.parameters()).device.type != "cpu" or any(map(compat.has_hooks, model.modules())):
        return 1
    with _STARTING:
        cores = torch.get_num_threads()
    most = cores // math.ceil(cores / MOST)
    return max(1, min(most, most if batches is None else batches))


def in_order(work: Callable[[Given], Result], items: Iterable[Given], streams: int) -> Generator[Result, None, None]:
    """Does the same work on each item, several at once; gives the results in the items' order.

    Args:
        work: Called in threads that share the cores out, under the caller's autocast; inference mode is its own
            business.
        items: Drawn in the calling thread, a few ahead of the results.
        streams: How many at once; 1 works in the calling thread. Fewer items have all cores among them.
    """
    items = iter(items)
    first = list(islice(items, streams))
    streams = min(streams, len(first))
    if streams < 2:
        yield from map(work, chain(first, items))
        return
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    begun = threading.Barrier(streams + 1)

    def begin() -> None:
        torch.set_num_threads(max(1, cores // streams))  # of this thread, and of all that first ask after it
        torch.get_num_threads()
        begun.wait()

    def working(item: Given) -> Result:
        with torch.autocast("cpu", dtype, enabled=autocast):
            return work(item)

    pool = ThreadPoolExecutor(streams, "stream", begin)
    with _STARTING:
        cores = torch.get_num_threads()
        try:
            waiting: deque[Future[Result]] = deque(pool.submit(working, item) for item in first)
            begun.wait()
        except BaseException:
            begun.abort()  # who could begin must not wait for who could not, or for this caller, if it is interrupted
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(cores)  # threads that others begin are no streams
    try:
        for item in items:
            waiting.append(pool.submit(working, item))
            if len(waiting) > 2 * streams:  # a slow one must not make the others idle
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
