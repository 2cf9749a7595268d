"""Batches in threads of a CPU: each thread takes a batch from its files to its results, on cores of its own.

One batch after the other with all cores in each leaves cores idle: they wait for each other at the end of every layer,
and for images to be decoded (docs/speed.md has the figures).
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

from fixefficientnet._internal import compat

MOST = 8
"""Largest number of threads: more of one interpreter wait for each other; further cores go to each thread."""
BATCH_SIZE = 2
"""Images per forward pass of a thread: more do not fit into a core's caches, which makes them slower."""

_STARTING = threading.Lock()
"""Held while torch's number of threads, which is the process's, is another than the number of cores."""

Given = TypeVar("Given")
Result = TypeVar("Result")


def default_threads(model: nn.Module, batches: int | None = None) -> int:
    """The number of threads that compute a batch each; never more than there are batches (None: not known).

    On a CPU there are several, unless hooks watch the model: they want one forward pass at a time.
    """
    if next(model.parameters()).device.type != "cpu" or any(map(compat.has_hooks, model.modules())):
        return 1
    with _STARTING:
        cores = torch.get_num_threads()
    most = cores // math.ceil(cores / MOST)
    return max(1, min(most, most if batches is None else batches))


def map_in_threads(
    work: Callable[[Given], Result], items: Iterable[Given], threads: int
) -> Generator[Result, None, None]:
    """Does the same work on each item, in threads; gives the results in the items' order.

    Args:
        work: The function of one item. It is called in threads that share the cores out, under the caller's autocast,
            but not under the caller's inference mode.
        items: The items, drawn in the calling thread, a few ahead of the results.
        threads: Number of threads; 1 works in the calling thread. Fewer items than that share out all cores.
    """
    items = iter(items)
    first = list(islice(items, threads))
    threads = min(threads, len(first))
    if threads < 2:
        yield from map(work, chain(first, items))
        return
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    begun = threading.Barrier(threads + 1)

    def begin() -> None:
        torch.set_num_threads(max(1, cores // threads))  # of this thread, and of all that first ask after it
        torch.get_num_threads()
        begun.wait()

    def working(item: Given) -> Result:
        with torch.autocast("cpu", dtype, enabled=autocast):
            return work(item)

    pool = ThreadPoolExecutor(threads, "batch", begin)
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
            torch.set_num_threads(cores)  # for threads that others begin
    try:
        for item in items:
            waiting.append(pool.submit(working, item))
            if len(waiting) > 2 * threads:  # a slow one must not make the others idle
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
