"""A live bar over images in a terminal, and plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 20.0
"""Seconds between two lines of one pass where no terminal shows a bar."""


@contextlib.contextmanager
def bar(title: str, total: int, console: Console, say: Callable[[str], None]) -> Iterator["Bar"]:
    """Shows a pass over `total` images; a quiet console, and what is no terminal, gets plain lines by `say`."""
    with contextlib.ExitStack() as stack:
        progress = None
        if console.is_terminal and not console.quiet:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=16), MofNCompleteColumn())
            more = (TextColumn("{task.fields[said]}", markup=False), TimeRemainingColumn(compact=True))
            progress = stack.enter_context(Progress(*columns, *more, console=console, transient=True))
        shown = Bar(say, title, total, progress)
        yield shown
        shown.end()


class Bar:
    """One pass over the images; see `bar`."""

    def __init__(self, say: Callable[[str], None], title: str, total: int, progress: Progress | None):
        self._say, self._title, self._total, self._progress = say, title, total, progress
        self._task: TaskID | None = progress.add_task(title, total=total, said="") if progress else None
        self._start = self._spoken = time.monotonic()
        self._done = self._skipped = 0
        self._said = ""

    def skip(self, images: int) -> None:
        """Counts images that an earlier run has finished."""
        self._skipped += images
        self.advance(images)

    def advance(self, images: int, said: str = "") -> None:
        """Counts finished images; `said` stands beside the bar, such as loss or accuracy."""
        self._done = min(self._done + images, self._total)
        self._said = said
        now = time.monotonic()
        if self._progress and self._task is not None:
            text = f"{self._rate(now)} {said}".strip()
            self._progress.update(self._task, completed=self._done, said=text)
        elif now - self._spoken >= PLAIN_SECONDS:
            self._spoken = now
            left = (now - self._start) / max(1, self._done - self._skipped) * (self._total - self._done)
            self._say(f"{self._line(now)}, {left:.0f} s left")

    def end(self) -> None:
        """Prints one line about the whole pass."""
        if self._done > self._skipped:
            self._say(f"{self._line(time.monotonic())}, {time.monotonic() - self._start:.1f} s")
        elif self._done:
            self._say(f"{self._title}: {self._done}/{self._total}, from before")

    def _line(self, now: float) -> str:
        said = f", {self._said}" if self._said else ""
        return f"{self._title}: {self._done}/{self._total}, {self._rate(now)}{said}"

    def _rate(self, now: float) -> str:
        return f"{(self._done - self._skipped) / max(now - self._start, 1e-6):.1f} images/s"
