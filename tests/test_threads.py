"""Batches in threads of a CPU: the same results, in order, and nothing of it left behind."""

import copy
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fixefficientnet._internal.processes import default_workers
from fixefficientnet._internal.threads import default_threads, map_in_threads


def counting(drawn: list[int], count: int) -> Iterator[int]:
    for number in range(count):
        drawn.append(number)
        yield number


@pytest.mark.parametrize(("count", "threads"), list(itertools.product((0, 1, 2, 5, 40), (1, 2, 3))))
def test_results_come_in_order_from_at_most_so_many_threads(count: int, threads: int):
    turns = [threading.Event() for _ in range(count)]
    names: set[str] = set()

    def work(number: int) -> int:
        names.add(threading.current_thread().name)
        if threads > 1 and number % 2 == 0 and number + 1 < count:
            turns[number + 1].wait(0.02)  # every other one is done after the one behind it, where that can be
        turns[number].set()
        return -number

    assert list(map_in_threads(work, counting([], count), threads)) == [-number for number in range(count)]
    assert len(names) <= threads


def test_only_a_few_are_drawn_ahead():
    drawn: list[int] = []
    results = map_in_threads(abs, counting(drawn, 100), 2)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert 10 <= len(drawn) <= 17
    results.close()


def test_cores_are_shared_out_and_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = list(map_in_threads(lambda _: torch.get_num_threads(), range(6), 2))
        assert found == [2] * 6
        assert list(map_in_threads(lambda _: torch.get_num_threads(), range(1), 2)) == [4]  # alone it has them all
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (torch.get_num_threads(), later) == (4, [4])
    finally:
        torch.set_num_threads(before)


def test_an_error_comes_at_its_turn_and_ends_the_threads():
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results = map_in_threads(work, range(50), 2)
    assert list(itertools.islice(results, 3)) == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch")]


def test_the_callers_autocast_holds_in_each():
    weight = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = list(map_in_threads(lambda _: (weight @ weight).dtype, range(4), 2))
    assert found == [torch.bfloat16] * 4
    assert list(map_in_threads(lambda _: (weight @ weight).dtype, range(4), 2)) == [torch.float32] * 4


def test_threads_of_others_that_begin_meanwhile_have_all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        results = map_in_threads(abs, range(20), 2)
        next(results)
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        results.close()
        assert found == [4]
    finally:
        torch.set_num_threads(before)


def test_threads_that_begin_others_concurrently_all_have_all_cores():
    model = nn.Linear(1, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with ThreadPoolExecutor(4) as pool:  # each item in a thread of its own, which has not asked before
            found = list(pool.map(lambda _: in_a_fresh_thread(model), range(200)))
        assert found == [(4, [2] * 4)] * 200
        assert torch.get_num_threads() == 4
        assert in_a_fresh_thread(model) == (4, [2] * 4)
    finally:
        torch.set_num_threads(before)


def in_a_fresh_thread(model: nn.Module) -> tuple[int, list[int]]:
    found: list[tuple[int, list[int]]] = []

    def work() -> None:
        number = default_threads(model)
        found.append((number, list(map_in_threads(lambda _: torch.get_num_threads(), range(4), 2))))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_an_interrupt_while_threads_begin_ends_them(monkeypatch: pytest.MonkeyPatch):
    class Interrupted(threading.Barrier):
        def wait(self, timeout: float | None = None) -> int:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(threading, "Barrier", Interrupted)
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        next(map_in_threads(abs, range(10), 2))
    assert torch.get_num_threads() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch")]


def test_a_cpu_has_one_per_core_and_what_is_watched_one():
    model = nn.Sequential(nn.Linear(1, 1))
    before = torch.get_num_threads()
    try:
        for threads, most in ((1, 1), (3, 3), (8, 8), (9, 4), (12, 6), (16, 8), (64, 8)):
            torch.set_num_threads(threads)
            assert default_threads(model) == most
            assert default_threads(model, batches=2) == min(most, 2)
            assert default_threads(model, batches=0) == 1
            assert default_threads(copy.deepcopy(model).to("meta")) == 1
        hook = model[0].register_forward_hook(lambda *given: None)
        assert default_threads(model) == 1
        hook.remove()
        assert default_threads(model) == 8
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 2), (3, 2, 1), (16, 1, 16), (1, 2, 1), (96, 8, 12)]
)
def test_loading_processes_are_a_processs_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int
):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers() == workers
