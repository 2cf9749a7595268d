"""Records: reading, checking, options and JSON Schema follow from the annotations of one dataclass."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest

from fixefficientnet._internal import records
from fixefficientnet._internal.records import Rule
from fixefficientnet.errors import OptionError

pytestmark = pytest.mark.newest

Rate = Annotated[float, Rule("a number above 0 and below 1", above=0, below=1)]


class WrongError(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Local:
    path: Annotated[Path, Rule("a relative path", pattern="[^/].*")]
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Remote:
    url: str
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base.

    Attributes:
        name: Its name,
            on two lines.
        rate: A rate.
    """

    name: str
    rate: Rate = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything(Base):
    """All kinds of fields.

    Attributes:
        count: A number.
    """

    count: Annotated[int, Rule("a whole number from 1 to 9", least=1, most=9)]
    flag: bool = False
    kind: Literal["a", "b", 3] = "a"
    triple: tuple[Rate, Rate, Rate] = (0.1, 0.2, 0.3)
    names: tuple[str, ...] = ()
    place: Local | Remote | None = None
    extra: Mapping[Annotated[str, Rule("lower case", pattern="[a-z]+")], Any] = dataclasses.field(default_factory=dict)
    made: int = dataclasses.field(default=0, init=False)


GOOD = {
    "name": "x",
    "rate": 0.25,
    "count": 3,
    "flag": True,
    "kind": 3,
    "triple": [0.1, 0.2, 0.3],
    "names": ["p", "q"],
    "place": {"path": "a/b"},
    "extra": {"k": [1, None, {"z": 2}]},
}


def test_there_and_back():
    record = records.read(Everything, GOOD, "it", WrongError)
    assert record.triple == (0.1, 0.2, 0.3)
    assert record.place == Local(Path("a/b"))
    assert records.read(Everything, {"name": "x", "count": 1, "rate": 0.5}, "", WrongError).rate == 0.5
    plain = records.to_json(record)
    assert plain.pop("made") == 0 and plain["place"].pop("note", 0) is None
    assert json.loads(json.dumps(plain)) == GOOD
    records.check(record, WrongError)
    assert Everything(**records.values(record)) == record


def test_whole_numbers_become_floats():
    assert type(records.read(Base, {"name": "x", "rate": 0.5}, "", WrongError).rate) is float
    assert type(records.read(Mean, {"value": 1}, "", WrongError).value) is float


@dataclass(frozen=True, slots=True)
class Mean:
    value: float


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": None}, "it.count: must be a whole number from 1 to 9, is null"),
        ({"count": 0}, "it.count: must be a whole number from 1 to 9, is 0"),
        ({"count": 10}, "is 10"),
        ({"count": "3"}, "is '3'"),
        ({"count": True}, "is true"),
        ({"count": 1.5}, "is 1.5"),
        ({"rate": 0}, "it.rate: must be a number above 0 and below 1"),
        ({"rate": 1}, "it.rate"),
        ({"rate": "0.5"}, "it.rate"),
        ({"rate": 10**400}, "it.rate: must be .* is 10{99}…"),
        ({"rate": -(10**400)}, "it.rate"),
        ({"flag": 1}, "it.flag: must be true or false, is 1"),
        ({"name": " "}, "it.name: must be a non-empty string"),
        ({"name": {"a": 1}}, "is an object"),
        ({"kind": "c"}, "it.kind: must be one of a, b, 3, is 'c'"),
        ({"kind": "3"}, "it.kind"),
        ({"triple": [0.1, 0.2]}, "it.triple: must be a list of three, is a list of 2"),
        ({"triple": [0.1, 2, 0.3]}, r"it.triple\[1\]: must be"),
        ({"triple": "123"}, "it.triple: must be a list of three, is '123'"),
        ({"names": ["a", ""]}, r"it.names\[1\]"),
        ({"names": "ab"}, "it.names: must be a list"),
        ({"place": {"path": "/a"}}, "it.place.path: must be a relative path, is '/a'"),
        ({"place": {"url": 3}}, "it.place.url: must be a non-empty string"),
        ({"place": {"url": "u", "path": "p"}}, "it.place: has the unknown key url; the known ones are path, note"),
        ({"place": {}}, "it.place: lacks the key path"),
        ({"place": 3}, "it.place: must be an object, is 3"),
        ({"extra": {"A": 1}}, "it.extra: each key: must be lower case, is 'A'"),
        ({"extra": []}, "it.extra: must be an object, is a list of 0"),
        ({"made": 1}, "it: has the unknown key made"),
    ],
)
def test_what_is_wrong_is_named_and_the_schema_agrees(change: dict[str, Any], said: str):
    with pytest.raises(WrongError, match=said):
        records.read(Everything, GOOD | change, "it", WrongError)
    assert not jsonschema.Draft202012Validator(records.schema(Everything)).is_valid(GOOD | change)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_has_not(value: float):
    with pytest.raises(WrongError, match="must be a number"):
        records.read(Mean, {"value": value}, "", WrongError)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "^must be an object, is a list of 0"),
        ({}, "^lacks the key name"),
        ({"x" * 10**6: 1}, "^has the unknown key x{100}…; the known ones are name"),
    ],
)
def test_errors_of_a_whole_document(document: object, said: str):
    with pytest.raises(WrongError, match=said):
        records.read(Base, document, "", WrongError)


def test_schema():
    schema = records.schema(Everything)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(GOOD, schema)
    assert schema["required"] == ["name", "count"]
    assert schema["description"] == "All kinds of fields."
    assert schema["properties"]["name"]["description"] == "Its name, on two lines."
    assert schema["properties"]["count"] == {"type": "integer", "minimum": 1, "maximum": 9, "description": "A number."}
    assert schema["properties"]["rate"]["exclusiveMaximum"] == 1


def test_check_of_what_code_made():
    record = records.read(Everything, GOOD, "it", WrongError)
    with pytest.raises(WrongError, match=r"^place.path: must be a relative path"):
        records.check(dataclasses.replace(record, place=Local(Path("/etc"))), WrongError)
    with pytest.raises(WrongError, match=r"^place.url: must be a non-empty string"):
        records.check(dataclasses.replace(record, place=Remote("")), WrongError)
    with pytest.raises(WrongError, match=r"^rate: must be"):
        records.check(dataclasses.replace(record, rate=2.0), WrongError)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' stands there twice"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ("[" * 65 + "]" * 65, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[1,]", "Illegal trailing comma|Expecting value"),
    ],
    ids=range(6),
)
def test_json_that_means_nothing_or_two_things_is_refused(text: str, said: str):
    with pytest.raises(ValueError, match=said):
        records.decode(text)


def test_what_was_sealed_tells_of_changes(tmp_path: Path):
    @dataclasses.dataclass(frozen=True)
    class Told:
        number: float
        names: tuple[str, ...]

    told = Told(0.1, ("\u00e9", "\udcff"))
    document = records.decode(records.dumps_sealed(told))
    assert records.read_sealed(Told, document, "f", OptionError) == told
    with pytest.raises(OptionError, match=r"f was damaged or changed.*remove its key sha256"):
        records.read_sealed(Told, document | {"number": 0.2}, "f", OptionError)
    (tmp_path / "large").write_bytes(b" " * 20)
    with pytest.raises(ValueError, match="more than 10 bytes"):
        records.decode_file(tmp_path / "large", 10)
