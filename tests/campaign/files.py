"""Files of text and lists that are damaged, or were never what they say."""

import contextlib
import dataclasses
import io
import json
import os
import posixpath
import random
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import timm
from conftest import lively, tuned_delta

from campaign.damaged import attempts, finished_report, of_json
from campaign.mutations import mutated, mutated_json, mutated_safetensors, mutated_toml
from campaign.trial import Attempt, Finding, Outcome, Trial, outcome_of
from fixefficientnet import delta, manifest
from fixefficientnet._internal import records
from fixefficientnet.data import labels
from fixefficientnet.data.folders import Exclusion
from fixefficientnet.data.tar_shards import TarShards
from fixefficientnet.evaluation import journal
from fixefficientnet.evaluation.predictions import ImagePrediction
from fixefficientnet.publishing.index import Index, PublishedModel
from fixefficientnet.reproduce import hours, recipe
from fixefficientnet.reproduce.folder import Identity
from fixefficientnet.reproduce.log import Log
from fixefficientnet.reproduce.report import Report


@contextlib.contextmanager
def _deltas(shared: Path) -> Iterator[Attempt]:
    data = delta.dumps(tuned_delta(lively(timm.create_model("test_efficientnet")), "b0"))

    def read(path: Path) -> object:
        found = delta.load(path)
        return dataclasses.replace(found, tensors={}), delta.fingerprint(found.tensors)

    yield attempts(data, "delta.safetensors", mutated_safetensors, read)


@contextlib.contextmanager
def _overlays(shared: Path) -> Iterator[Attempt]:
    (shared / "d.safetensors").write_bytes(b"")
    weights = {"path": "d.safetensors", "sha256": "d" * 64, "bytes": 3, "license": "mit"}
    measured = {"dataset": "imagenet-1k/validation", "images": 50_000, "top1": 80.25, "top5": 95.5}
    row = json.loads(manifest.packaged_path().read_text())["variants"]["b2"] | {"weights": weights}
    small = {"test": {"size": 48, "mean": [0.5, 0.25, 0.5]}, "weights": weights | {"measured": measured}}
    text = json.dumps({"schema_version": 1, "variants": {"b0": small, "b2": row}})

    def attempt(rng: random.Random, folder: Path) -> Finding:
        path = folder / "mine.json"
        path.write_bytes(mutated_json(text, rng))
        with mock.patch.dict(os.environ, FIXEFFICIENTNET_MANIFEST=str(path)):
            return outcome_of(manifest.load, lambda found: _means(path.read_bytes(), found))

    yield attempt


def _means(data: bytes, found: Any) -> bool:
    """Whether the rows are what an overlay says, which nobody but who wrote it knows to be right."""
    document = json.loads(data, object_pairs_hook=_without_twins)
    rows = json.loads(manifest.packaged_path().read_text())["variants"]
    told = {key: records.to_json(variant) for key, variant in found.items()}
    said = document["variants"]
    return told.keys() == rows.keys() | said.keys() and all(
        _lies_in(said.get(key, {}) if key in said else rows[key], row) for key, row in told.items()
    )


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


def _lies_in(said: Any, told: Any) -> bool:
    if isinstance(said, dict):
        return isinstance(told, dict) and all(_lies_in(value, told.get(key)) for key, value in said.items())
    if isinstance(said, str) and isinstance(told, str):
        return said == told or told.endswith(said.removeprefix("./"))  # a path, absolute once read
    return bool(said == told)


@contextlib.contextmanager
def _recipes(shared: Path) -> Iterator[Attempt]:
    text = manifest.packaged_path().with_name("recipes.toml").read_text()
    subject = recipe.subject_of_variant(manifest.find("b4_ns"))
    usual = {method: recipe.resolve(subject, {"method": method}) for method in ("online", "cached")}

    def right(found: Any, data: bytes) -> bool:
        """What is in the file counts; of what is not, the usual."""
        section = tomllib.loads(data.decode())[found.method]
        row = {key: value for key, value in section.items() if key != "variants"}
        row |= section.get("variants", {}).get("b4_ns", {})
        told = records.to_json(found)
        defaults = {one.name: one.default for one in dataclasses.fields(found)}
        known = records.to_json(usual[found.method])
        return all(told[key] == row.get(key, known[key]) or told[key] == defaults[key] for key in told)

    def attempt(rng: random.Random, folder: Path) -> Finding:
        data = mutated_toml(text, rng)
        (folder / "recipes.toml").write_bytes(data)
        choices = {"method": rng.choice([*usual])}
        with mock.patch.object(recipe.manifest, "packaged_path", return_value=folder / "weights_manifest.json"):
            return outcome_of(lambda: recipe.resolve(subject, choices), lambda found: right(found, data))

    yield attempt


@contextlib.contextmanager
def _reports(shared: Path) -> Iterator[Attempt]:
    finished_report().dump(shared)
    yield attempts((shared / "report.json").read_bytes(), "report.json", of_json, Report.load)


@contextlib.contextmanager
def _identities(shared: Path) -> Iterator[Attempt]:
    Identity(finished_report().recipe, "a" * 64, "b" * 64, "c" * 64, 2).dump(shared / "recipe.json")
    yield attempts((shared / "recipe.json").read_bytes(), "recipe.json", of_json, Identity.load)


@contextlib.contextmanager
def _indices(shared: Path) -> Iterator[Attempt]:
    told, variant = finished_report(), manifest.find("b4_ns")
    model = PublishedModel(
        "b4_ns-01234567.safetensors",
        "d" * 64,
        1234,
        "apache-2.0",
        variant.backbone.name,
        variant.backbone.repository,
        variant.parameters,
        variant.test,
        "imagenet",
        told.measured,
        told.paired,
        variant.paper,
        True,
        100,
        1,
        told.recipe,
        {"torch": "2.14"},
        "v1.0",
    )
    data = Index.following(None, {"b4_ns": model}, replaced=False).dump()
    yield attempts(data, "models.json", of_json, lambda path: Index.load(path.read_bytes(), "models.json"))


def _journal(path: Path) -> None:
    made, rng = journal.Journal(path), random.Random(0)
    for batch in range(4):
        predictions = {
            batch * 5 + row: ImagePrediction((rng.randrange(9),), tuple(rng.sample(range(9), 5)), rng.random(), 0.25)
            for row in range(5)
        }
        made.write(journal.FinishedBatch(predictions, {20 + batch: "torn"}, {batch}, 0.5))
    made.note({"size": 48, "crop_pct": 0.875, "images": 24})


@contextlib.contextmanager
def _journals(shared: Path) -> Iterator[Attempt]:
    """Of a damaged journal, a whole evaluation must not be made, and what an evaluation goes on from must be right."""
    _journal(shared / "base")
    data = (shared / "base.0.jsonl").read_bytes()
    whole, parts = journal.load(shared / "base"), journal.Journal(shared / "base").read()

    def attempt(rng: random.Random, folder: Path) -> Finding:
        changed = mutated(data, rng)
        if rng.random() < 0.5:
            lines = data.decode().splitlines()
            number = rng.randrange(len(lines))
            changed = b"\n".join(
                [mutated_json(one, rng) if i == number else one.encode() for i, one in enumerate(lines)]
            )
        (folder / "base.0.jsonl").write_bytes(changed)

        def go_on() -> bool:
            found = journal.Journal(folder / "base").read()
            kept = [(i, one) for i, one in enumerate(found.predictions) if one]
            same = all(parts.predictions[index] == one for index, one in kept)
            return same and found.notes.items() <= parts.notes.items()

        finding = outcome_of(go_on)
        if finding.outcome is not Outcome.SURVIVED:
            return finding
        return outcome_of(lambda: journal.load(folder / "base"), lambda found: found == whole)

    yield attempt


IMAGES = [f"{number // 10}/{number}.jpg" for number in range(30)]


@contextlib.contextmanager
def _labels(shared: Path) -> Iterator[Attempt]:
    """A CSV of labels: what it says counts, and all of the images must have one."""
    rows = dict(zip(IMAGES, "apple brick cloud".split() * 10, strict=True))

    def attempt(rng: random.Random, folder: Path) -> Finding:
        sign = rng.choice(",;\t ")
        text = "".join(f"{name}{sign}{label}\n" for name, label in rows.items())
        data = mutated((f"file{sign}label\n" if sign != " " else "").encode() + text.encode(), rng)
        (folder / "labels.csv").write_bytes(data)
        changed = data.decode("utf-8", "surrogateescape").lstrip("\ufeff")

        def right(found: Any) -> bool:
            stems = {name: name.removesuffix(".jpg") for name in rows}
            lines = changed.split("\n")
            return found.keys() == rows.keys() and all(
                any(stems[name] in line and label in line for line in lines) for name, label in found.items()
            )

        return outcome_of(lambda: labels.read(folder / "labels.csv", folder, IMAGES), right)

    yield attempt


@contextlib.contextmanager
def _lists(shared: Path) -> Iterator[Attempt]:
    """A list of images to leave out."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        data = mutated("\n".join(IMAGES[:9]).encode(), rng)
        (folder / "out.txt").write_bytes(data)

        text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        text = text.replace("\r\n", "\n").replace("\r", "\n")  # each ends a line in text
        said = {posixpath.normpath(line.strip().replace("\\", "/")) for line in text.split("\n") if line.strip()}
        return outcome_of(lambda: Exclusion.of([str(folder / "out.txt")], folder), lambda found: found.names == said)  # type: ignore[attr-defined]

    yield attempt


def _tar(folder: Path) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for number in range(6):
            content = {"jpg": bytes([number]) * 700, "cls": str(number % 3).encode()}
            if number % 2:
                content["json"] = json.dumps({"label": number % 3, "name": "x"}).encode()
            for ending, data in content.items():
                member = tarfile.TarInfo(f"train/{number:04d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return made.getvalue()


@contextlib.contextmanager
def _tar_shards(shared: Path) -> Iterator[Attempt]:
    """Tar files of images, of which Python's tarfile tells what is in them; their contents have no checksum."""
    data = _tar(shared)

    def right(found: Any, changed: bytes) -> bool:
        content: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(changed)) as tar:
            for member in tar:
                if member.isfile():
                    content[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
        for index in range(len(found)):
            image, label = found[index]
            name = found.filename(index).partition("/")[2]
            told = content.get(name.rpartition(".")[0] + ".cls")
            told = told or str(json.loads(content[name.rpartition(".")[0] + ".json"])["label"]).encode()
            if image.read() != content[name] or label != int(told):
                return False
        return len(found) == sum(name.lower().endswith(".jpg") for name in content)

    def attempt(rng: random.Random, folder: Path) -> Finding:
        changed = mutated(data, rng) if rng.random() < 0.5 else _with_headers(data, rng)
        (folder / "a-train-0.tar").write_bytes(changed)
        return outcome_of(lambda: TarShards(folder, ["train"]), lambda found: right(found, changed))

    yield attempt


def _with_headers(data: bytes, rng: random.Random) -> bytes:
    """A tar file with a header of another kind, whose checksum fits."""
    blocks = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
    place = rng.choice(blocks)
    header = bytearray(data[place : place + 512])
    kind = rng.choice(["size", "type", "name"])
    if kind == "size":
        size = rng.choice([b"77777777777\0", b"00000000000\0", b"\x80\0\0\0\0\1\0\0\0\0\0\0", b"\xff" * 12])
        header[124:136] = size
    elif kind == "type":
        header[156:157] = rng.choice([b"S", b"L", b"K", b"x", b"g", b"1", b"2", b"3", b"5", b"6", b"V", b"X", b"D"])
        header[157:170] = b"../../outside"
    else:
        name = rng.choice([b"/etc/passwd.jpg", b"../../x.jpg", b"train/0001.jpg", b"train/\xff\n.cls", b".jpg", b""])
        header[0:100] = name.ljust(100, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:place] + bytes(header) + data[place + 512 :]


@contextlib.contextmanager
def _logs(shared: Path) -> Iterator[Attempt]:
    """log.jsonl and hours.json, which decide no result: a run goes on whatever is in them."""
    lines = [json.dumps({"steps": n, "epoch": 0, "loss": 0.5, "top1": 9.0}) for n in range(1, 9)]

    def attempt(rng: random.Random, folder: Path) -> Finding:
        number = rng.randrange(len(lines))
        text = b"\n".join([mutated_json(one, rng) if n == number else one.encode() for n, one in enumerate(lines)])
        (folder / "log.jsonl").write_bytes(mutated(text, rng) if rng.random() < 0.3 else text + b"\n")
        (folder / "hours.json").write_bytes(mutated_json('{"hours": 1.5}', rng))

        def go_on() -> bool:
            log = Log(folder, enabled=True)
            with mock.patch("torch.utils.tensorboard.SummaryWriter"):
                log.resume(5)
            log.write(6, loss=0.25)
            log.has(5, "val_top1")
            hours.read(folder)
            return log.lines()[-1] == {"steps": 6, "loss": 0.25}

        return outcome_of(go_on)

    yield attempt


TRIALS = [
    Trial("damaged deltas", 2000, 60, _deltas),
    Trial("damaged manifests laid over the packaged one", 1000, 60, _overlays),
    Trial("damaged recipes.toml", 500, 20, _recipes),
    Trial("damaged reports of runs", 800, 60, _reports),
    Trial("damaged recipes of runs", 500, 40, _identities),
    Trial("damaged models.json of publications", 500, 40, _indices),
    Trial("damaged journals of evaluations", 800, 60, _journals),
    Trial("damaged logs of runs", 300, 20, _logs),
    Trial("damaged files of labels", 400, 40, _labels),
    Trial("damaged lists of images", 200, 20, _lists),
    Trial("damaged tar files", 500, 40, _tar_shards),
]
