"""What is tried, how often, and what became of each attempt."""

import contextlib
import enum
import multiprocessing
import random
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from fixefficientnet.errors import FixEfficientNetError


class Outcome(enum.StrEnum):
    """What became of an attempt; the last four must not be."""

    REFUSED = "refused"  # one clear error, and nothing changed
    SURVIVED = "survived"  # the right result
    LOST = "lost"  # work or a file is gone, or half a file is left
    CRASHED = "crashed"  # the process died, or an error that is not the package's own came out
    SILENT = "silent"  # another result, and not a word
    HUNG = "hung"  # no end within the limit


BAD = (Outcome.LOST, Outcome.CRASHED, Outcome.SILENT, Outcome.HUNG)


@dataclass(frozen=True)
class Finding:
    """What became of one attempt."""

    outcome: Outcome
    said: str = ""


Attempt = Callable[[random.Random, Path], Finding]
"""One attempt: a generator of its own, and an empty folder of its own."""


@dataclass(frozen=True)
class Trial:
    """One line of the table.

    Attributes:
        name: What is tried.
        attempts: How often, in the campaign.
        few: How often, in the fast suite; 0 where it takes too long for that.
        prepare: Makes what all attempts share in a folder, and gives the attempt.
        limit: Seconds that one attempt may take.
        isolated: Whether attempts run in forked processes, whose death is a finding; not for those that start
            processes themselves.
    """

    name: str
    attempts: int
    few: int
    prepare: Callable[[Path], AbstractContextManager[Attempt]]
    limit: float = 60
    isolated: bool = True


@dataclass
class Tally:
    """What became of the attempts of a trial.

    Attributes:
        counts: Attempts by outcome.
        bad: What was said where it must not be, by the attempt's number; the first few.
        longest: Seconds of the longest attempt.
    """

    counts: Counter[Outcome] = field(default_factory=Counter)
    bad: dict[int, str] = field(default_factory=dict)
    longest: float = 0.0

    def add(self, number: int, finding: Finding, seconds: float) -> None:
        """Counts an attempt."""
        self.counts[finding.outcome] += 1
        self.longest = max(self.longest, seconds)
        if finding.outcome in BAD and len(self.bad) < 20:
            self.bad[number] = f"{finding.outcome}: {finding.said}"


def outcome_of(action: Callable[[], object], is_right: Callable[[object], bool] = bool) -> Finding:
    """What became of an action that may be refused by an error of the package.

    Args:
        action: What is done.
        is_right: Whether what it returns is what an undamaged input gives.
    """
    try:
        found = action()
    except FixEfficientNetError as error:
        said = str(error)
        return Finding(Outcome.REFUSED if said.strip() else Outcome.CRASHED, said or f"{type(error)} without a word")
    except Exception:
        return Finding(Outcome.CRASHED, traceback.format_exc(limit=-8))
    return Finding(Outcome.SURVIVED) if is_right(found) else Finding(Outcome.SILENT, repr(found)[:300])


def run(trial: Trial, numbers: range, seed: int, tell: Callable[[int], object] = lambda done: None) -> Tally:
    """Makes attempts.

    Args:
        trial: What is tried.
        numbers: Of the attempts; each has a generator of its own, of `seed`, the trial's name and its number.
        seed: Of the campaign.
        tell: Called with the number of attempts that are done.
    """
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        shared = Path(folder, "shared")
        shared.mkdir()
        with trial.prepare(shared) as attempt:
            each = _in_child_processes if trial.isolated else _here
            for number, finding, seconds in each(trial, attempt, numbers, seed, Path(folder)):
                tally.add(number, finding, seconds)
                tell(tally.counts.total())
    return tally


def _attempt(trial: Trial, attempt: Attempt, number: int, seed: int, folder: Path) -> tuple[int, Finding, float]:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as own:
        try:
            finding = attempt(random.Random(f"{seed} {trial.name} {number}"), Path(own))
        except Exception:
            finding = Finding(Outcome.CRASHED, traceback.format_exc(limit=-8))
    return number, finding, time.perf_counter() - started


def _here(
    trial: Trial, attempt: Attempt, numbers: range, seed: int, folder: Path
) -> Iterator[tuple[int, Finding, float]]:
    for number in numbers:
        _, finding, seconds = _attempt(trial, attempt, number, seed, folder)
        if seconds > trial.limit:
            finding = Finding(Outcome.HUNG, f"{seconds:.0f} s")
        yield number, finding, seconds


def _in_child_processes(
    trial: Trial, attempt: Attempt, numbers: range, seed: int, folder: Path
) -> Iterator[tuple[int, Finding, float]]:
    """Makes attempts in a forked process; where it dies, or does not end, the next one goes on after that attempt."""
    context, rest = multiprocessing.get_context("fork"), list(numbers)
    while rest:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(theirs, trial, attempt, rest, seed, folder))
        process.start()
        theirs.close()
        try:
            while rest:
                started = time.perf_counter()
                if not ours.poll(trial.limit):
                    yield rest.pop(0), Finding(Outcome.HUNG, f"{trial.limit} s"), time.perf_counter() - started
                    break
                try:
                    told = ours.recv()
                except EOFError:
                    process.join()
                    said = f"the process ended with {process.exitcode}"
                    yield rest.pop(0), Finding(Outcome.CRASHED, said), time.perf_counter() - started
                    break
                rest.pop(0)
                yield told
        finally:
            process.kill()
            process.join()
            ours.close()


def _child(pipe: Connection, trial: Trial, attempt: Attempt, numbers: list[int], seed: int, folder: Path) -> None:
    with contextlib.suppress(BrokenPipeError):
        for number in numbers:
            pipe.send(_attempt(trial, attempt, number, seed, folder))
