"""Files that would fill the memory, or Python's stack, when they are read."""

import contextlib
import io
import json
import os
import random
import resource
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch

from campaign.trial import Attempt, Finding, Trial, outcome_of
from fixefficientnet import delta, manifest, models
from fixefficientnet.data import labels
from fixefficientnet.data.tar_shards import TarShards
from fixefficientnet.evaluation import journal
from fixefficientnet.publishing import manifest_rows
from fixefficientnet.publishing.index import Index
from fixefficientnet.reproduce import hours
from fixefficientnet.reproduce.checkpoints import Checkpoints
from fixefficientnet.reproduce.folder import Identity
from fixefficientnet.reproduce.log import Log
from fixefficientnet.reproduce.report import Report

MEMORY = 4 * 2**30
"""Bytes that reading a hostile file may take."""


def _description(folder: Path, text: str) -> object:
    file = folder / "model.safetensors"
    file.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, {models.DESCRIPTION: text}))
    return models.Description.load(file)


def _delta_told(folder: Path, text: str) -> object:
    (folder / "d").write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, {delta.FORMAT: text}))
    return delta.load(folder / "d")


def _written(name: str, read: Callable[[Path], object]) -> Callable[[Path, str], object]:
    def write_and_read(folder: Path, text: str) -> object:
        (folder / name).write_text(text)
        return read(folder)

    return write_and_read


def _overlay(folder: Path) -> object:
    with mock.patch.dict(os.environ, FIXEFFICIENTNET_MANIFEST=str(folder / "mine.json")):
        return manifest.load()


def _in_tar(folder: Path, text: str) -> object:
    with tarfile.open(folder / "a-train-0.tar", "w") as tar:
        for name, data in (("a.jpg", b"x"), ("a.json", text.encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return TarShards(folder, ["train"])


def _checkpoint_told(folder: Path, text: str) -> object:
    (folder / "s").write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, {"identity": text}))
    return Checkpoints(folder / "s", {}, 1, 60).saved_identity()


_READERS: dict[str, Callable[[Path, str], object]] = {
    "overlay": _written("mine.json", _overlay),
    "manifest to write": _written("m.json", lambda folder: manifest_rows.read(folder / "m.json")),
    "report.json": _written("report.json", Report.load),
    "recipe.json": _written("recipe.json", lambda folder: Identity.load(folder / "recipe.json")),
    "models.json": _written("models.json", lambda folder: Index.load((folder / "models.json").read_bytes(), "m")),
    "description": _description,
    "config.json": _written("config.json", lambda folder: models.Description.beside(folder / "model.safetensors")),
    "a folder of timm's": _written("config.json", lambda folder: models.load(str(folder))),
    "delta": _delta_told,
    "checkpoint": _checkpoint_told,
    "journal": _written("j.0.jsonl", lambda folder: journal.load(folder / "j")),
    "log": _written("log.jsonl", lambda folder: Log(folder, enabled=True).lines()),
    "hours": _written("hours.json", hours.read),
    "tar": _in_tar,
    "tar files": _written("_info.json", lambda folder: TarShards(folder, ["train"])),
    "labels": _written("l.csv", lambda folder: labels.read(folder / "l.csv", folder, ["a.jpg"])),
}
_JSON: dict[str, Callable[[], str]] = {
    **{f"{levels} lists": partial(lambda n: "[" * n + "]" * n, levels) for levels in (100, 500, 950, 10_000, 100_000)},
    **{
        f"{levels} objects": partial(lambda n: '{"variants":' * n + "1" + "}" * n, levels)
        for levels in (100, 500, 950, 10_000, 100_000)
    },
    "empty lists of 100 MB": lambda: "[" + "[]," * (100 * 2**20 // 3) + "[]]",
    "text of 90 MB": lambda: '{"schema_version": "' + "x" * (90 * 10**6) + '"}',  # as much as safetensors takes
    "keys of 100 MB": lambda: "{" + ",".join(f'"{number}":0' for number in range(100 * 2**20 // 11)) + "}",
    "digits of 100 MB": lambda: '{"schema_version": ' + "9" * (100 * 2**20) + "}",
    "blanks of 100 MB": lambda: " " * (100 * 2**20) + "[]",
}


@contextlib.contextmanager
def _large_json(shared: Path) -> Iterator[Attempt]:
    """JSON of 100 MB and of 100,000 levels, for each reader of JSON."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        reader, made = rng.choice([*_READERS]), rng.choice([*_JSON])
        while reader in ("description", "delta", "checkpoint") and "100 MB" in made:
            made = rng.choice([*_JSON])  # safetensors itself takes no such header
        text = _JSON[made]()
        with limited_memory():
            finding = outcome_of(lambda: _READERS[reader](folder, text), lambda found: not found)
        return Finding(finding.outcome, f"{reader}, {made}: {finding.said[:2000]}")

    yield attempt


@contextlib.contextmanager
def limited_memory(more: int = MEMORY) -> Iterator[None]:
    """Within, this process has no more memory than now and some bytes; for processes that end soon."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _sparse(folder: Path) -> object:
    """A GNU sparse member, of a byte and a terabyte of nothing."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:482] = (b"%011o\0" % 0 + b"%011o\0" % 0) * 4
    header[483:495] = b"\x80" + (2**40).to_bytes(11, "big")
    return _raw_tar(folder, [bytes(_summed(header))])


def _summed(header: bytearray) -> bytearray:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


def _raw_tar(folder: Path, blocks: list[bytes]) -> object:
    label = tarfile.TarInfo("a.cls")
    label.size = 1
    blocks += [label.tobuf(), b"1".ljust(512, b"\0"), bytes(1024)]
    (folder / "a-train-0.tar").write_bytes(b"".join(blocks))
    found = TarShards(folder, ["train"])
    return [found[index][0].read() for index in range(len(found))]


def _of_size(size: int, kind: bytes = b"0", name: str = "a.jpg") -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        member = tarfile.TarInfo(name)
        member.size, member.type = size, kind
        return _raw_tar(folder, [member.tobuf(tarfile.GNU_FORMAT), bytes(512)])

    return read


def _headers(folder: Path) -> object:
    pax = tarfile.TarInfo("././@PaxHeader")
    pax.type = tarfile.XHDTYPE
    return _raw_tar(folder, [pax.tobuf()] * 5000)


def _label_of(text: bytes, ending: str = "cls") -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        with tarfile.open(folder / "a-train-0.tar", "w") as tar:
            for name, data in (("a.jpg", b"x"), (f"a.{ending}", text)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return TarShards(folder, ["train"])

    return read


def _gzipped(folder: Path) -> object:
    with tarfile.open(folder / "a-train-0.tar", "w:gz") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size = 200 * 2**20
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    return TarShards(folder, ["train"])


def _link(kind: bytes) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        return _raw_tar(folder, [member.tobuf()])

    return read


def _checkpoint(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        make(folder / "w.pth")
        return models.load(f"timm/test_efficientnet:{folder / 'w.pth'}")

    return read


def _deflated(path: Path) -> None:
    made = io.BytesIO()
    torch.save({"classifier.weight": torch.zeros(8)}, made)
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(300 * 2**20) if name.endswith("data/0") else old.read(name))


def _repeated(path: Path) -> None:
    weight = torch.zeros(1).expand(10**9, 256)
    torch.save({"classifier.weight": weight, "classifier.bias": torch.zeros(1).expand(10**9)}, path)


def _many_classes(path: Path) -> None:
    torch.save({"classifier.weight": torch.zeros(10**12, 0)}, path)


def _laughing(path: Path) -> None:
    inner: dict[str, object] = {"a": 1}
    for _ in range(6):
        inner = {str(number): inner for number in range(1000)}
    torch.save(inner, path)


def _loop(path: Path) -> None:
    inner: dict[str, object] = {}
    inner |= {str(number): inner for number in range(300)}
    torch.save(inner, path)


def _own(tensors: dict[str, Any]) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        header = json.dumps(tensors).encode()
        (folder / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        return models.load(f"timm/test_efficientnet:{folder / 'w.safetensors'}")

    return read


_BOMBS: dict[str, Callable[[Path], object]] = {
    "sparse member": _sparse,
    "member of 1 TB": _of_size(2**40),
    "label of 1 TB": _of_size(2**40, name="b.cls"),
    "long name of 1 TB": _of_size(2**40, b"L"),
    "long link of 1 TB": _of_size(2**40, b"K"),
    "header of 1 TB": _of_size(2**40, b"x"),
    "global header of 1 TB": _of_size(2**40, b"g"),
    "5000 headers": _headers,
    "class 2,000,000,000": _label_of(b"2000000000"),
    "class of 10,000 digits": _label_of(b"9" * 10_000),
    "class -1": _label_of(b"-1"),
    "class null": _label_of(b'{"label": null}', "json"),
    "class list": _label_of(b'{"label": [1]}', "json"),
    "class 1.5": _label_of(b'{"label": 1.5}', "json"),
    "class 1e400": _label_of(b'{"label": 1e400}', "json"),
    "gzipped": _gzipped,
    "symbolic link": _link(tarfile.SYMTYPE),
    "hard link": _link(tarfile.LNKTYPE),
    "device": _link(tarfile.CHRTYPE),
    "deflated checkpoint": _checkpoint(_deflated),
    "checkpoint of repeated values": _checkpoint(_repeated),
    "checkpoint of 10^12 classes": _checkpoint(_many_classes),
    "checkpoint of dicts in dicts": _checkpoint(_laughing),
    "checkpoint in itself": _checkpoint(_loop),
    "safetensors of 10^9 classes": _own(
        {"classifier.weight": {"dtype": "F32", "shape": [10**9, 0], "data_offsets": [0, 0]}}
    ),
    "safetensors of 2^64": _own({"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
}


@contextlib.contextmanager
def _bombs(shared: Path) -> Iterator[Attempt]:
    """Tar files and checkpoints that would take the machine's memory."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        kind = rng.choice([*_BOMBS])
        with limited_memory():
            finding = outcome_of(lambda: _BOMBS[kind](folder), lambda found: False)
        return Finding(finding.outcome, f"{kind}: {finding.said[:2000]}")

    yield attempt


TRIALS = [
    Trial("JSON of 100 MB or of many levels", 200, 2, _large_json, limit=60),
    Trial("archives and checkpoints that would fill the memory", 120, 12, _bombs, limit=30),
]
