"""Text from elsewhere (names of files, classes, models) in what people read: it stays text, whatever is in it."""

import re
from typing import Any

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters, and those that turn the direction of the text around them."""
_MARKUP = re.compile(r"[\\`*{}\[\]()#!|~$]|(?<![^\W_])_|_(?![^\W_])")
"""What may be markup anywhere; an underscore within a word is none."""
_LIST = re.compile(r"^(\d*)([-+=.)])")
"""What begins a list, or underlines a heading."""


def inert(value: Any) -> Any:
    """Text that a page can hold: half of a surrogate pair and control characters become what Python writes for them."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    valid = value.encode("utf-8", "backslashreplace").decode()
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), valid)


def inert_lines(text: str) -> str:
    """As `inert`, of text that has lines of its own."""
    return "\n".join(map(inert, text.split("\n")))


def markdown(value: Any) -> str:
    """Text as text in Markdown, in a line or a cell of a table: nothing in it is markup, HTML, TeX or a link."""
    text = str(inert(str(value))).strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _MARKUP.sub(r"\\\g<0>", text).replace("://", ":&#8203;//")
    text = re.sub(r"(?i)\b(www)\.", r"\1&#8203;.", text).replace("@", "@&#8203;")  # GitHub links these too
    return _LIST.sub(r"\1\\\2", text)


def code(value: Any) -> str:
    """Text within backquotes in Markdown."""
    return str(inert(str(value)).replace("`", "'"))
