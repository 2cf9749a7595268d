"""Pickles that would run code when they are read by Python's own reader."""

import io
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

OPCODES = [bytes([code]) for code in range(256)]
_CALLS = (
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("subprocess", "call"),
    ("subprocess", "check_output"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "__import__"),
    ("builtins", "getattr"),
    ("__builtin__", "eval"),
    ("runpy", "run_path"),
    ("importlib", "import_module"),
    ("pathlib", "Path.touch"),
    ("torch.hub", "load"),
    ("torch._dynamo.guards", "eval"),
    ("torch.jit", "load"),
    ("torch.serialization", "load"),
    ("torch", "load"),
    ("numpy", "load"),
    ("numpy.testing._private.utils", "runstring"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.f2py.capi_maps", "load_f2cmap_file"),
    ("collections", "OrderedDict.fromkeys"),
    ("functools", "partial"),
    ("functools", "reduce"),
    ("operator", "attrgetter"),
    ("operator", "methodcaller"),
    ("argparse", "Namespace"),
    ("argparse", "FileType"),
    ("shutil", "rmtree"),
    ("pty", "spawn"),
    ("timeit", "main"),
    ("cProfile", "run"),
    ("bdb", "Bdb.run"),
    ("code", "interact"),
    ("webbrowser", "open"),
    ("logging.config", "_resolve"),
    ("fixefficientnet._internal.files", "write_atomically"),
    ("fixefficientnet._internal.checkpoint_file", "read"),
)


def hostile(rng: random.Random, marker: Path, tensors: dict[str, Any]) -> bytes:
    """A file whose pickle makes a file when it runs: in torch's archive, of the format before 2020, or bare."""
    pickled = _pickle(rng, marker)
    kind = rng.choice(["archive", "archive", "legacy", "bare", "inside", "inside"])
    if kind == "bare":
        return pickled
    if kind == "legacy":
        parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        where = rng.randrange(4)
        return b"".join([*parts[:where], pickled, *parts[where:], pickle.dumps([], 2)])
    made, written = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": tensors, "args": _Call(rng, marker)} if kind == "inside" else tensors, written)
    with zipfile.ZipFile(written) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            whole = kind == "archive" and name.endswith("data.pkl")
            new.writestr(name, pickled if whole else old.read(name))
    return made.getvalue()


class _Call:
    """What a pickle writes as a call."""

    def __init__(self, rng: random.Random, marker: Path):
        self.rng, self.marker = rng, marker

    def __reduce__(self) -> Any:
        state = {"a": 1} if self.rng.random() < 0.5 else None
        call = self.rng.choice([_touch, eval, exec, print, open, __import__, getattr])
        arguments = {
            _touch: (str(self.marker),),
            eval: (f"open({str(self.marker)!r}, 'w')",),
            exec: (f"open({str(self.marker)!r}, 'w')",),
            print: ("it ran",),
            open: (str(self.marker), "w"),
            __import__: ("this",),
            getattr: (str(self.marker), "upper"),
        }
        return (call, arguments[call], *([state] if state else []))


def _touch(path: str) -> None:
    Path(path).touch()


def _pickle(rng: random.Random, marker: Path) -> bytes:
    """A pickle made by hand of one of the calls, by one of the opcodes that import, and one of those that call."""
    module, name = rng.choice(_CALLS)
    shell = f"touch {marker}"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    argument = code if name in ("eval", "exec", "runstring", "run") else shell if "path" not in name else str(marker)
    protocol = rng.choice([b"", b"\x80\x02", b"\x80\x04", b"\x80\x05"])
    text = b"X" + struct.pack("<I", len(argument)) + argument.encode()
    how = rng.choice(["reduce", "inst", "obj", "newobj", "build", "stack", "memo", "extension", "persistent"])
    found = f"c{module}\n{name}\n".encode()
    if how == "inst":
        body = b"(" + text + f"i{module}\n{name}\n".encode()
    elif how == "obj":
        body = b"(" + found + text + b"o"
    elif how == "newobj":
        body = found + text + b"\x85" + rng.choice([b"\x81", b"}\x92"])
    elif how == "build":
        state = b"}X\x0c\x00\x00\x00__setstate__" + found + b"s"
        body = b"cargparse\nNamespace\n" + b")R" + state + b"b" + text + b"b"
    elif how == "stack":
        body = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)) + b"\x93" + text
        body += b"\x85R"
    elif how == "memo":
        body = found + b"q\x00" + b"0" + b"h\x00" + text + b"\x85R"
    elif how == "extension":
        body = b"\x82\x01" + text + b"\x85R"
    elif how == "persistent":
        body = found + text + b"\x85R" + rng.choice([b"Q", b"Pstorage\n"])
    else:
        body = found + text + b"\x85R"
    if rng.random() < 0.3:  # beside what is sound
        body = b"}X\x01\x00\x00\x00a" + body + b"s"
    return protocol + body + b"."
