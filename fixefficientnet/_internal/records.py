"""Records: dataclasses whose annotations alone say what their JSON may hold.

From the same annotations follow: reading JSON with errors that name the place (`read`), checking a record that Python
code made (`check`), and the JSON Schema (`schema`). An annotation is bool,
int, float, str, Path or Any, a Literal, a tuple, a Mapping from str, another record, one of these in
`Annotated[type, Rule(…)]`, a union of one with None, or a union of records. Standard library only.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import re
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fixefficientnet._internal.files import check_file

LARGEST = 2**26
"""Most bytes of a JSON file that is no list of images."""
_DEEPEST = 64
"""Most levels of JSON: what goes through it level by level must not meet Python's own limit."""

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Error = type[Exception]
Reader = Callable[[Any, str, Error], Any]

_DEFAULT_TEXTS = {bool: "true or false", int: "a whole number", float: "a number", str: "a non-empty string"}
_NUMBERS = ("no items", "one", "two", "three", "four")
LEFT_OUT_IF_NONE = types.MappingProxyType({"left out if None": True})
"""Metadata of a field that is not in the JSON where it is None: JSON from before there was one stays as it is."""
_SHA256 = "sha256"
_LONGEST = 100
"""Most characters of a wrong value that an error message repeats."""


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """What a value may be beyond its type; stands in `Annotated[type, Rule(…)]`.

    Attributes:
        text: The rule in words, after "must be".
        least: The smallest number.
        above: A bound that numbers must exceed.
        most: The largest number.
        below: A bound that numbers must stay under.
        pattern: A regular expression that must match the whole text. Of the syntax that Python and ECMAScript share.
    """

    text: str
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    pattern: str = ""

    def accepts(self, value: Any) -> bool:
        """Whether a value of the annotated type satisfies the rule."""
        if self.pattern:
            return re.fullmatch(self.pattern, str(value)) is not None
        return bool(self.least <= value <= self.most and self.above < value < self.below)

    def schema(self) -> dict[str, Any]:
        """The rule as keywords of JSON Schema."""
        bounds = {"minimum": self.least, "exclusiveMinimum": self.above}
        bounds |= {"maximum": self.most, "exclusiveMaximum": self.below}
        found: dict[str, Any] = {key: bound for key, bound in bounds.items() if math.isfinite(bound)}
        return found | ({"pattern": f"^(?:{self.pattern})$"} if self.pattern else {})


Positive = Annotated[int, Rule("a whole number above 0", least=1)]
Count = Annotated[int, Rule("a whole number of at least 0", least=0)]
Percent = Annotated[float, Rule("a number from 0 to 100", least=0, most=100)]
Share = Annotated[float, Rule("a number in (0, 1]", above=0, most=1)]
AboveZero = Annotated[float, Rule("a number above 0", above=0)]
NotNegative = Annotated[float, Rule("a number of at least 0", least=0)]
Fraction = Annotated[float, Rule("a number from 0 to 1", least=0, most=1)]


def decode(text: str | bytes, most: int = LARGEST) -> Any:
    """Decodes JSON of so many letters or bytes at most, which must mean one thing only.

    Raises:
        ValueError: It is no JSON; an object has a key twice, of which readers take one or the other; it has NaN or
            Infinity, which JSON has not; or it is nested too deeply, or too long.
    """
    if len(text) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(_DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [one for each in inner for one in each if isinstance(one, dict | list)]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def decode_file(path: Path, most: int = LARGEST) -> Any:
    """Decodes a JSON file of so many bytes at most.

    Raises:
        OSError: It cannot be read.
        ValueError: As `decode` raises.
    """
    return decode(read_text(path, most), most)


def read_text(path: Path, most: int = LARGEST) -> str:
    """The text of a file that may be anything, of so many bytes at most.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too long, or not in UTF-8.
    """
    check_file(path)
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return data.decode()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_shown(twice)} stands there twice")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def read(cls: type[T], value: object, where: str, error: Error) -> T:
    """Makes a record of decoded JSON.

    Args:
        cls: The dataclass. A field without a default is a required key.
        value: The decoded JSON; a record of the class itself is checked and returned.
        where: The value's place, for messages, such as "variants.b4.test"; empty for a whole document.
        error: The exception to raise.

    Raises:
        error: The message names the key, what it must be and what it is.
    """
    if isinstance(value, cls):
        check(value, error, where)
        return value
    at = f"{where}: " if where else ""
    if not isinstance(value, Mapping):
        raise error(f"{at}must be an object, is {_shown(value)}")
    readers = _readers(cls)
    if unknown := sorted(value.keys() - readers.keys()):
        raise error(f"{at}has the unknown key {_short(', '.join(unknown))}; the known ones are {', '.join(readers)}")
    if missing := sorted(_required(cls) - value.keys()):
        raise error(f"{at}lacks the key {', '.join(missing)}")
    return cls(**{name: readers[name](item, _at(where, name), error) for name, item in value.items()})


def check(record: Any, error: Error, where: str = "") -> None:
    """Checks the fields of a record that Python code made against its annotations; raises `error` as `read` does."""
    for name, reader in _readers(type(record)).items():
        reader(getattr(record, name), _at(where, name), error)


def to_json(value: Any) -> Any:
    """A record as JSON values: objects for records, lists for tuples, strings for paths."""
    if dataclasses.is_dataclass(value):
        items = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        kept = [(field.name, item) for field, item in items if item is not None or field.metadata != LEFT_OUT_IF_NONE]
        return {name: to_json(item) for name, item in kept}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def dumps(record: Any) -> bytes:
    """A record as the content of a JSON file."""
    return (json.dumps(to_json(record), indent=2) + "\n").encode()


def dumps_sealed(record: Any) -> bytes:
    """As `dumps`, with a sha256 over the rest, by which `read_sealed` tells that something was changed."""
    return dumps({**to_json(record), _SHA256: _sha256(to_json(record))})


def read_sealed(cls: type[T], value: object, where: str, error: Error) -> T:
    """As `read`, of what `dumps_sealed` wrote; without its sha256, whoever wrote it vouches for it.

    Raises:
        error: As `read` raises; or it was changed.
    """
    if isinstance(value, dict) and _SHA256 in value:
        value = dict(value)
        if value.pop(_SHA256) != _sha256(value):
            raise error(
                f"{where} was damaged or changed after it was written. Get it again from where it was made; if it was "
                f"changed on purpose, remove its key {_SHA256}"
            )
    return read(cls, value, where, error)


def _sha256(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def values(record: Any) -> dict[str, Any]:
    """The fields of a record by name, as they are; to make another record that has them too."""
    return {name: getattr(record, name) for name in _hints(type(record))}


def schema(cls: type) -> dict[str, Any]:
    """The JSON Schema of a record; its descriptions come from the docstrings."""
    described = _descriptions(cls)
    properties = {name: _schema(hint) for name, hint in _hints(cls).items()}
    for name in properties.keys() & described.keys():
        properties[name] = properties[name] | {"description": described[name]}
    required = [name for name in properties if name in _required(cls)]
    found = {"type": "object", "description": (cls.__doc__ or "").partition("\n")[0]}
    return found | {"required": required, "additionalProperties": False, "properties": properties}


def _cached(function: F) -> F:
    """functools.cache, but for classes, which mypy holds for unhashable."""
    return cast(F, functools.cache(function))


@_cached
def _hints(cls: Any) -> dict[str, Any]:
    """The annotations of the fields that a record is made from, by name."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


@_cached
def _required(cls: Any) -> set[str]:
    """The names of the fields without a default."""
    missing = dataclasses.MISSING
    fields = [field for field in dataclasses.fields(cls) if field.init]
    return {field.name for field in fields if field.default is missing and field.default_factory is missing}


@_cached
def _readers(cls: Any) -> dict[str, Reader]:
    return {name: _reader(hint) for name, hint in _hints(cls).items()}


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _reader(hint: Any, rule: Rule | None = None) -> Reader:
    """What reads a value of an annotation: taken apart once, since a manifest has thousands of values."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _reader(arguments[0], arguments[1])
    if origin in (Union, types.UnionType):
        readers = {kind: _reader(kind) for kind in arguments if kind is not type(None)}
        return partial(_read_union, readers, type(None) in arguments)
    if origin is Literal:
        return partial(_read_literal, arguments)
    if origin is tuple and arguments[1:] == (...,):
        return partial(_read_list, _reader(arguments[0]))
    if origin is tuple:
        return partial(_read_tuple, [_reader(kind) for kind in arguments])
    if origin is Mapping:
        return partial(_read_mapping, _reader(arguments[0]), _reader(arguments[1]))
    read_record: Any = read
    return partial(read_record, hint) if dataclasses.is_dataclass(hint) else partial(_read_plain, hint, rule)


def _read_union(readers: dict[Any, Reader], optional: bool, value: Any, where: str, error: Error) -> Any:
    """Reads what may be None, or of several records the one that has the most of the given keys."""
    if value is None and optional:
        return None

    def common(kind: Any) -> int:
        return len(_hints(kind).keys() & value.keys()) if isinstance(value, Mapping) else isinstance(value, kind)

    kind = next(iter(readers)) if len(readers) == 1 else max(readers, key=common)
    return readers[kind](value, where, error)


def _read_literal(allowed: tuple[Any, ...], value: Any, where: str, error: Error) -> Any:
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise error(f"{where}: must be one of {', '.join(map(str, allowed))}, is {_shown(value)}")
    return value


def _read_list(reader: Reader, value: Any, where: str, error: Error) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise error(f"{where}: must be a list, is {_shown(value)}")
    return tuple(reader(item, f"{where}[{i}]", error) for i, item in enumerate(value))


def _read_tuple(readers: list[Reader], value: Any, where: str, error: Error) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or len(value) != len(readers):
        raise error(f"{where}: must be a list of {_NUMBERS[len(readers)]}, is {_shown(value)}")
    return tuple(readers[i](item, f"{where}[{i}]", error) for i, item in enumerate(value))


def _read_mapping(key_reader: Reader, reader: Reader, value: Any, where: str, error: Error) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise error(f"{where}: must be an object, is {_shown(value)}")
    keys = [key_reader(key, f"{where}: each key", error) for key in value]
    return {key: reader(value[key], _at(where, key), error) for key in keys}


def _read_plain(hint: Any, rule: Rule | None, value: Any, where: str, error: Error) -> Any:
    if hint is Any:
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float:
        fits = is_number and abs(value) <= sys.float_info.max  # neither NaN nor Inf, nor an int that no float holds
    elif hint is int:
        fits = is_number and isinstance(value, int)
    elif hint in (str, Path):
        fits = isinstance(value, str | hint) and bool(str(value).strip())
    else:
        fits = isinstance(value, hint)
    if not fits or (rule and not rule.accepts(value)):
        text = rule.text if rule else _DEFAULT_TEXTS.get(hint, "a path")
        raise error(f"{where}: must be {text}, is {_shown(value)}")
    return hint(value) if hint in (float, Path) else value


def _shown(value: object) -> str:
    """A wrong value for an error message: short, whatever it is."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


_SCHEMAS: dict[Any, dict[str, Any]] = {
    Any: {},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string", "pattern": r"\S"},
    Path: {"type": "string", "pattern": r"\S"},
}


def _schema(hint: Any) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        rule: Rule = arguments[1]
        return _schema(arguments[0]) | rule.schema()
    if origin in (Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if kind is type(None) else _schema(kind) for kind in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        size = {} if arguments[1:] == (...,) else {"minItems": len(arguments), "maxItems": len(arguments)}
        return {"type": "array", "items": _schema(arguments[0])} | size
    if origin is Mapping:
        return {"type": "object", "propertyNames": _schema(arguments[0]), "additionalProperties": _schema(arguments[1])}
    return _SCHEMAS[hint] if hint in _SCHEMAS else schema(hint)


def _descriptions(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say under `Attributes:`, by field."""
    found = {}
    for base in reversed(cls.__mro__):
        _, _, attributes = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", attributes, flags=re.M):
            found[name] = " ".join(text.split())
    return found
