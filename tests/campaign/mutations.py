"""What accidents, and people, do to files."""

import json
import random
import re
from typing import Any

_DEEP = "<deep>"
_OTHERS: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**63,
    10**40,
    0.5,
    -1e-300,
    1e300,
    "",
    " ",
    "nan",
    "\ud800",
    "\x00\x1b[31m\u202e",
    "x" * 10_000,
    "../../../etc/passwd",
    [],
    {},
    [[]],
    {"": ""},
    ["a"] * 1000,
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file that differs from another by one accident."""
    kind = rng.choice(["bit", "byte", "cut", "block", "append", "insert", "swap"])
    place, length = rng.randrange(len(data)), rng.randrange(1, 65)
    if kind == "bit":
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == "byte":
        return data[:place] + rng.randbytes(1) + data[place + 1 :]
    if kind == "cut":
        return data[:place]
    if kind == "block":  # zeros, as a file system leaves them after a power cut
        return data[:place] + bytes(len(data[place : place + length])) + data[place + length :]
    if kind == "append":
        return data + rng.randbytes(length)
    if kind == "insert":
        return data[:place] + rng.randbytes(length) + data[place:]
    other = rng.randrange(len(data))
    start, end = sorted((place, other))
    return data[:start] + data[end:] + data[start:end]


def mutated_json(text: str, rng: random.Random) -> bytes:
    """JSON that differs from other JSON by an accident of its bytes, or in what it says."""
    if rng.random() < 0.3:
        return mutated(text.encode(), rng)
    document = json.loads(text)
    places = _places(document)
    if not places:
        return mutated(text.encode(), rng)
    holder, key = rng.choice(places)
    kind = rng.choice(["other", "other", "digit", "lost", "swapped", "new", "deep", "twice", "constant", "number"])
    if kind == "other":
        holder[key] = rng.choice(_OTHERS)
    elif kind == "digit":
        return _another_digit(text, rng)
    elif kind == "lost":
        del holder[key]
    elif kind == "swapped":
        other, there = rng.choice(places)
        holder[key], other[there] = other[there], holder[key]
        if _has_itself(document):
            return mutated(text.encode(), rng)
    elif kind == "new" and isinstance(holder, dict):
        holder[rng.choice(["", "sha256", "__class__", "\u00e9", str(key).upper()])] = rng.choice(_OTHERS)
    else:
        holder[key] = _DEEP
        levels = int(10 ** rng.uniform(1, 5))
        value = {
            "deep": rng.choice(["[" * levels + "]" * levels, '{"a":' * levels + "1" + "}" * levels]),
            "constant": rng.choice(["NaN", "Infinity", "-Infinity"]),
            "number": rng.choice(["1e999", "1" * 5000, "-0", "0." + "1" * 500, "1e-999", "01", "0x1", "1_0"]),
        }.get(kind)
        text = json.dumps(document)
        if value is None:  # the key stands there twice
            name = json.dumps(key) if isinstance(holder, dict) else '"a"'
            said = f'"{_DEEP}"' + (f", {name}: {json.dumps(rng.choice(_OTHERS))}" if isinstance(holder, dict) else "")
            return text.replace(f'"{_DEEP}"', said.replace(_DEEP, "a"), 1).encode()
        return text.replace(f'"{_DEEP}"', value, 1).encode()
    return json.dumps(document, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def _another_digit(text: str, rng: random.Random) -> bytes:
    digits = [found.start() for found in re.finditer(r"\d", text)]
    if not digits:
        return mutated(text.encode(), rng)
    place = rng.choice(digits)
    return (text[:place] + str(rng.randrange(10)) + text[place + 1 :]).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        for key, inner in [*(value.items() if isinstance(value, dict) else enumerate(value))]:
            found += [(value, key), *_places(inner)]
    return found


def _has_itself(document: Any) -> bool:
    try:
        json.dumps(document)
    except (ValueError, RecursionError):
        return True
    return False


def mutated_toml(text: str, rng: random.Random) -> bytes:
    """TOML that differs from other TOML."""
    lines = text.splitlines(keepends=True)
    kind = rng.choice(["bytes", "value", "value", "lost", "twice", "deep"])
    assigned = [number for number, line in enumerate(lines) if "=" in line and not line.startswith("#")]
    if kind == "bytes" or not assigned:
        return mutated(text.encode(), rng)
    number = rng.choice(assigned)
    name = lines[number].partition("=")[0]
    values = ["nan", "inf", "-1", "0", "1e400", '"x"', "true", "[]", "{}", "1979-05-27", '"\\u202e"', "9" * 5000]
    if kind == "lost":
        del lines[number]
    elif kind == "twice":
        lines.insert(number, lines[number])
    elif kind == "deep":
        levels = int(10 ** rng.uniform(1, 5))
        lines[number] = f"{name}= {'[' * levels}{']' * levels}\n"
    else:
        lines[number] = f"{name}= {rng.choice(values)}\n"
    return "".join(lines).encode()


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with an accident in its bytes, its header, or the JSON in its metadata."""
    if rng.random() < 0.5:
        return mutated(data, rng)
    end = 8 + int.from_bytes(data[:8], "little")
    header, body = data[8:end].decode(), data[end:]
    metadata = json.loads(header).get("__metadata__") or {}
    inside = [key for key, value in metadata.items() if value[:1] in "{["]
    if inside and rng.random() < 0.5:
        key = rng.choice(inside)
        told = mutated_json(metadata[key], rng).decode("utf-8", "replace")
        document = json.loads(header)
        document["__metadata__"][key] = told
        changed = json.dumps(document).encode()
    else:
        changed = mutated_json(header, rng)
    length = len(changed) if rng.random() < 0.9 else rng.choice([0, 2**63 - 1, 2**64 - 1, len(changed) + 1, 10**8 + 1])
    return length.to_bytes(8, "little") + changed + body
