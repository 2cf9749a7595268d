"""What a run tells while it goes: a live bar or plain lines, log.jsonl, TensorBoard events."""

import json
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.markup import escape

from fixefficientnet._internal.console import Console
from fixefficientnet._internal.files import append, write_atomically
from fixefficientnet._internal.progress import Bar, bar


class Log:
    """Speaks for the first process (`enabled`), on a console (None: the terminal); on others, it does nothing."""

    def __init__(self, folder: Path, *, enabled: bool, console: Console | None = None):
        self.enabled = enabled
        self.console = console or Console(highlight=False, quiet=not enabled)
        self._file = folder / "log.jsonl"
        self._events = folder / "tensorboard"
        self._writer: Any = None
        self._kept: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        """One line for people."""
        if self.enabled:
            # a terminal's lines break between words, a file's stay whole
            self.console.print(escape(text), soft_wrap=not self.console.is_terminal)

    def resume(self, steps: int) -> None:
        """Starts or continues logging: lines and events of steps after the restored one are dropped."""
        if not self.enabled:
            return
        if self._file.exists():
            kept = [line for line in self.lines() if line["steps"] <= steps]
            self._kept = kept[-2:]
            write_atomically(self._file, "".join(f"{json.dumps(line)}\n" for line in kept).encode())
        try:
            str(self._events).encode()
        except UnicodeEncodeError:
            self.say(f"TensorBoard writes into no folder whose name is not UTF-8: {self._file} alone has the figures.")
            return
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._events), purge_step=steps + 1)

    def write(self, steps: int, **values: float) -> None:
        """One line of log.jsonl, and the same as TensorBoard scalars."""
        if not self.enabled:
            return
        append(self._file, f"{json.dumps({'steps': steps, **values})}\n".encode())
        for name, value in values.items():
            if self._writer and isinstance(value, float) and math.isfinite(value):
                self._writer.add_scalar(name, value, steps)

    def lines(self) -> list[dict[str, Any]]:
        """log.jsonl so far; without lines that are torn or damaged."""
        if not self._file.exists():
            return []
        return [found for line in self._file.read_bytes().splitlines(keepends=True) if (found := _read(line))]

    def has(self, steps: int, key: str) -> bool:
        """Whether an earlier process logged the key at these steps, the last before this one continues."""
        return any(line["steps"] == steps and key in line for line in self._kept)

    def close(self) -> None:
        """Flushes the events."""
        if self._writer:
            self._writer.close()
            self._writer = None

    def bar(self, title: str, total: int) -> AbstractContextManager[Bar]:
        """Shows a pass over `total` images."""
        return bar(title, total, self.console, self.say)


def _read(line: bytes) -> dict[str, Any] | None:
    """What a line tells; None for one that a killed process left half written, or that is damaged."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("steps"), int):
        return None
    return found if all(isinstance(value, int | float | None) for value in found.values()) else None
