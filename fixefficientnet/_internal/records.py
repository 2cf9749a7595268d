"""Records: a dataclass whose annotations alone say what its JSON may hold.

The same annotations read JSON and name what is wrong in it, check a record that Python code made, read the text of an
option, and give the JSON Schema. Imports nothing outside the standard library.
"""

import dataclasses
import functools
import inspect
import json
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_DEFAULT_TEXTS = {bool: "true or false", int: "a whole number", float: "a number", str: "a non-empty string"}
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_SCHEMA_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}
_NUMBERS = ("no", "one", "two", "three", "four")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value may be beyond its type; stands in `Annotated[type, Rule(…)]`.

    Attributes:
        text: Completes "must be …".
        least: Smallest number.
        above: Every number is larger than this.
        most: Largest number.
        below: Every number is smaller than this.
        pattern: Regular expression that matches the whole text.
    """

    text: str
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    pattern: str = ""

    def accepts(self, value: Any) -> bool:
        """Whether a value of the right type obeys this rule."""
        if self.pattern:
            return re.fullmatch(self.pattern, str(value)) is not None
        return bool(self.least <= value <= self.most and self.above < value < self.below)

    def schema(self) -> dict[str, Any]:
        """The rule as keywords of JSON Schema."""
        bounds = {"minimum": self.least, "exclusiveMinimum": self.above}
        bounds |= {"maximum": self.most, "exclusiveMaximum": self.below}
        found: dict[str, Any] = {key: bound for key, bound in bounds.items() if math.isfinite(bound)}
        return found | ({"pattern": f"^(?:{self.pattern})$"} if self.pattern else {})


def read(cls: type[T], value: object, where: str, error: type[Exception]) -> T:
    """Makes a record of decoded JSON.

    Args:
        cls: The dataclass. A field without a default must be given.
        value: The decoded JSON.
        where: What to call it in messages, such as "b4.test".
        error: Raised with a message that names the field, what it must be and what it is.
    """
    if not isinstance(value, Mapping):
        raise error(f"{where}: must be an object, is {_kind(value)}")
    kind: Any = cls
    hints = _hints(kind)
    if missing := sorted(_required(kind) - set(value)):
        raise error(f"{where}: lacks the key {', '.join(missing)}")
    if extra := sorted(set(value) - set(hints)):
        raise error(f"{where}: has the unknown key {', '.join(extra)}")
    return cls(**{name: _read(hints[name], item, f"{where}.{name}", error) for name, item in value.items()})


def check(record: Any, error: type[Exception]) -> None:
    """Holds the fields of a record that Python code made against its annotations; raises `error` as `read` does."""
    kind: Any = type(record)
    for name, hint in _hints(kind).items():
        _read(hint, getattr(record, name), name, error)


def parse(cls: type, name: str, text: str, where: str, error: type[Exception]) -> Any:
    """Reads the text of an option as the value of a field.

    Args:
        cls: The dataclass.
        name: Of its field.
        text: Such as "1e-4", "true" or "0.5,0.5,0.5".
        where: What to call it in messages.
        error: Raised where the field cannot be that.
    """
    hint = _hints(cls)[name]
    base = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    value: Any = text
    if base is bool:
        value = _WORDS.get(text.lower(), text)
    elif get_origin(base) is tuple:
        value = [_number(part) for part in text.strip("()[]").split(",")]
    elif base in (int, float):
        value = _number(text)
    return _read(hint, value, where, error)


def to_json(record: Any) -> Any:
    """A record as JSON values: lists for tuples, text for paths."""
    return json.loads(json.dumps(dataclasses.asdict(record), default=str))


def schema(cls: type) -> dict[str, Any]:
    """The JSON Schema of a record; descriptions are those of its docstring."""
    described = _descriptions(cls)
    properties = {}
    for name, hint in _hints(cls).items():
        properties[name] = _schema(hint)
        if name in described:
            properties[name] |= {"description": described[name]}
    found = {"type": "object", "description": (inspect.getdoc(cls) or "").partition("\n")[0]}
    return found | {"required": sorted(_required(cls)), "additionalProperties": False, "properties": properties}


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


@functools.cache
def _required(cls: Any) -> set[str]:
    missing = dataclasses.MISSING
    fields = [field for field in dataclasses.fields(cls) if field.init]
    return {field.name for field in fields if field.default is missing and field.default_factory is missing}


def _read(hint: Any, value: Any, where: str, error: type[Exception], rule: Rule | None = None) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _read(arguments[0], value, where, error, arguments[1])
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _read(inner, value, where, error, rule)
    if origin is Literal:
        if not any(value == allowed and type(value) is type(allowed) for allowed in arguments):
            raise error(f"{where}: must be one of {', '.join(map(str, arguments))}, is {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            check(value, error)
            return value
        return read(hint, value, where, error)  # type: ignore[arg-type]
    if origin is tuple:
        return _read_tuple(arguments, value, where, error)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise error(f"{where}: must be an object, is {_kind(value)}")
        return {str(key): _read(arguments[1], item, f"{where}.{key}", error) for key, item in value.items()}
    return value if hint is Any else _read_plain(hint, value, where, error, rule)


def _read_tuple(arguments: tuple[Any, ...], value: Any, where: str, error: type[Exception]) -> tuple[Any, ...]:
    free = arguments[1:] == (...,)
    if not isinstance(value, list | tuple) or not (free or len(value) == len(arguments)):
        wanted = "a list" if free else f"a list of {_NUMBERS[len(arguments)]}"
        raise error(f"{where}: must be {wanted}, is {value!r}")
    hints = [arguments[0]] * len(value) if free else arguments
    return tuple(
        _read(hint, item, f"{where}[{i}]", error) for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _read_plain(hint: Any, value: Any, where: str, error: type[Exception], rule: Rule | None) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float:
        fits = is_number and math.isfinite(value)
    elif hint is int:
        fits = is_number and isinstance(value, int)
    elif hint in (str, Path):
        fits = bool(str(value).strip()) if isinstance(value, str | hint) else False
    else:
        fits = isinstance(value, hint)
    if not fits or (rule and not rule.accepts(value)):
        text = rule.text if rule else _DEFAULT_TEXTS.get(hint, "a path")
        raise error(f"{where}: must be {text}, is {value!r}")
    return hint(value) if hint in (float, Path) else value


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), f"the number {value!r}")


def _schema(hint: Any) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return {**_schema(arguments[0]), **arguments[1].schema()}
    if origin in (Union, types.UnionType):
        return {"anyOf": [{"type": "null"}, *(_schema(a) for a in arguments if a is not type(None))]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if dataclasses.is_dataclass(hint):
        return schema(hint)  # type: ignore[arg-type]
    if origin is tuple:
        size = {} if arguments[1:] == (...,) else {"minItems": len(arguments), "maxItems": len(arguments)}
        return {"type": "array", "items": _schema(arguments[0]), **size}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _schema(arguments[1])}
    if hint is Any:
        return {}
    return {"type": _SCHEMA_TYPES[hint]} | ({"minLength": 1} if hint in (str, Path) else {})


def _descriptions(cls: type) -> dict[str, str]:
    """What a docstring's `Attributes:` says of each field."""
    _, _, attributes = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n      .*)*)", attributes, flags=re.M)
    return {name: " ".join(text.split()) for name, text in found}
