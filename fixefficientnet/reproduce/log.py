"""What a run tells while it goes: a live bar or plain lines, log.jsonl, TensorBoard events."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fixefficientnet.files import write_atomically

PLAIN_SECONDS = 20.0
"""Between two lines of one pass where no terminal shows a bar."""


class Log:
    """Speaks for the first process; on the others everything here is silent and writes nothing.

    Args:
        folder: Of the run.
        enabled: Whether this is the first process.
        console: Where to.
    """

    def __init__(self, folder: Path, *, enabled: bool, console: Console | None = None):
        self.enabled = enabled
        self.console = console or Console(highlight=False, quiet=not enabled)
        self._file = folder / "log.jsonl"
        self._events = folder / "tensorboard"
        self._writer: Any = None

    def say(self, text: str) -> None:
        """One line for people."""
        if self.enabled:
            # a terminal's lines break between words, a file's stay whole
            self.console.print(escape(text), soft_wrap=not self.console.is_terminal)

    def resume(self, steps: int) -> None:
        """Starts or goes on logging: lines and events of steps after the restored one are dropped."""
        if not self.enabled:
            return
        if self._file.exists():
            lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line).get("steps", 0) <= steps]
            write_atomically(self._file, "".join(kept).encode())
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._events), purge_step=steps + 1)

    def write(self, steps: int, **values: float) -> None:
        """One line of log.jsonl, and the same as TensorBoard scalars."""
        if not self.enabled:
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"steps": steps, **values}) + "\n")
        for name, value in values.items():
            if self._writer and isinstance(value, float) and math.isfinite(value):
                self._writer.add_scalar(name, value, steps)

    def lines(self) -> list[dict[str, Any]]:
        """log.jsonl so far."""
        if not self._file.exists():
            return []
        return [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        """Flushes the events."""
        if self._writer:
            self._writer.close()
            self._writer = None

    @contextlib.contextmanager
    def bar(self, title: str, total: int) -> Iterator["Bar"]:
        """Shows a pass over `total` pictures; the bar's `advance` counts them."""
        live = self.enabled and self.console.is_terminal
        with contextlib.ExitStack() as stack:
            progress = None
            if live:
                columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn())
                more = (TextColumn("{task.fields[said]}"), TimeRemainingColumn(compact=True))
                progress = stack.enter_context(Progress(*columns, *more, console=self.console, transient=True))
            bar = Bar(self, title, total, progress)
            yield bar
            bar.end()


class Bar:
    """One pass over the pictures; see `Log.bar`."""

    def __init__(self, log: Log, title: str, total: int, progress: Progress | None):
        self._log, self._title, self._total, self._progress = log, title, total, progress
        self._task: TaskID | None = progress.add_task(title, total=total, said="") if progress else None
        self._start = self._spoken = time.monotonic()
        self._done = self._skipped = 0
        self._said = ""

    def skip(self, pictures: int) -> None:
        """Counts pictures that an earlier run did."""
        self._skipped += pictures
        self.advance(pictures)

    def advance(self, pictures: int, said: str = "") -> None:
        """Counts pictures; `said` stands beside the bar (loss, accuracy)."""
        self._done = min(self._done + pictures, self._total)
        self._said = said
        now = time.monotonic()
        if self._progress and self._task is not None:
            text = f"{self._rate(now)} {said}".strip()
            self._progress.update(self._task, completed=self._done, said=text)
        elif now - self._spoken >= PLAIN_SECONDS:
            self._spoken = now
            left = (now - self._start) / max(1, self._done - self._skipped) * (self._total - self._done)
            self._log.say(f"{self._line(now)}, {left:.0f} s left")

    def end(self) -> None:
        """Says once how the whole pass went."""
        if self._done > self._skipped:
            self._log.say(f"{self._line(time.monotonic())}, {time.monotonic() - self._start:.1f} s")
        elif self._done:
            self._log.say(f"{self._title}: {self._done}/{self._total}, from before")

    def _line(self, now: float) -> str:
        said = f", {self._said}" if self._said else ""
        return f"{self._title}: {self._done}/{self._total}, {self._rate(now)}{said}"

    def _rate(self, now: float) -> str:
        return f"{(self._done - self._skipped) / max(now - self._start, 1e-6):.1f} pictures/s"
