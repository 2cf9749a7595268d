"""Rich's console, on which text from elsewhere cannot move the cursor, change colours or the terminal's title."""

from collections.abc import Iterable
from typing import Any

import rich.console
from rich.markup import escape
from rich.segment import Segment

from fixefficientnet._internal.text import inert_lines


class Console(rich.console.Console):
    """A console that shows what Python writes for control characters, but for line breaks."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Renders an object; all else that is printed goes through here too."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else inert_lines(text), style, control)

    def say(self, text: str) -> None:
        """Prints plain text, without markup; a line of it is one line, however wide the console is."""
        self.print(escape(text), soft_wrap=True)
