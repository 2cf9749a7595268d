"""Files that are damaged, or were never what they say."""

import contextlib
import dataclasses
import faulthandler
import io
import json
import os
import posixpath
import random
import resource
import shutil
import signal
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import safetensors.torch
import timm
import torch
from conftest import lively, put_in_cache, tuned_delta
from test_paper import report as typed_report

import fixefficientnet
from campaign import pickles
from campaign.mutations import mutated, mutated_json, mutated_safetensors, mutated_toml
from campaign.trial import Attempt, Finding, Outcome, Trial, outcome_of
from fixefficientnet import delta, hub, manifest, models
from fixefficientnet._internal import checkpoint_file, records
from fixefficientnet.data import labels
from fixefficientnet.data.folders import Exclusion
from fixefficientnet.data.tar_shards import TarShards
from fixefficientnet.errors import FixEfficientNetError
from fixefficientnet.evaluation import journal
from fixefficientnet.evaluation.predictions import ImagePrediction
from fixefficientnet.publishing import manifest_rows
from fixefficientnet.publishing.index import Index, PublishedModel
from fixefficientnet.reproduce import hours, network, probe, recipe
from fixefficientnet.reproduce.checkpoints import Checkpoints, Position
from fixefficientnet.reproduce.folder import Identity
from fixefficientnet.reproduce.log import Log
from fixefficientnet.reproduce.report import Report
from fixefficientnet.reproduce.run import _save_network
from fixefficientnet.reproduce.shards import ShardPass
from fixefficientnet.runtimes import engines, exporting

Mutate = Callable[[bytes, random.Random], bytes]
MEMORY = 4 * 2**30
"""Bytes that reading a hostile file may take."""


def _attempts(data: bytes, name: str, mutate: Mutate, read: Callable[[Path], object]) -> Attempt:
    """Attempts to read a changed file, which must be refused, or give what the unchanged one gives."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        (folder / name).write_bytes(mutate(data, rng))
        return outcome_of(lambda: read(folder / name), lambda found: found == expected(folder))

    def expected(folder: Path) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return attempt


def _of_json(data: bytes, rng: random.Random) -> bytes:
    return mutated_json(data.decode(), rng)


@contextlib.contextmanager
def _deltas(shared: Path) -> Iterator[Attempt]:
    data = delta.dumps(tuned_delta(lively(timm.create_model("test_efficientnet")), "b0"))

    def read(path: Path) -> object:
        found = delta.load(path)
        return dataclasses.replace(found, tensors={}), delta.fingerprint(found.tensors)

    yield _attempts(data, "delta.safetensors", mutated_safetensors, read)


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


def _report() -> Report:
    found = typed_report("b4_ns", (472, 85.91, 97.5), (380, 85.32, 97.4))
    found |= {
        "unreadable": ["data/a.jpg cannot be read"],
        "classes": ["apple", "b\u00e9b\u00e9"],
        "left_out": ["a.txt"],
    }
    pair = {"only_base_correct": 3, "only_fixres_correct": 9, "difference": 0.59, "p": 0.01}
    found["paired"] = {"base": pair | {"difference_low": 0.1, "difference_high": 0.9}}
    return records.read(Report, found, "report", FixEfficientNetError)


@contextlib.contextmanager
def _reports(shared: Path) -> Iterator[Attempt]:
    _report().dump(shared)
    yield _attempts((shared / "report.json").read_bytes(), "report.json", _of_json, Report.load)


@contextlib.contextmanager
def _identities(shared: Path) -> Iterator[Attempt]:
    Identity(_report().recipe, "a" * 64, "b" * 64, "c" * 64, 2).dump(shared / "recipe.json")
    yield _attempts((shared / "recipe.json").read_bytes(), "recipe.json", _of_json, Identity.load)


@contextlib.contextmanager
def _indices(shared: Path) -> Iterator[Attempt]:
    told, variant = _report(), manifest.find("b4_ns")
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
    yield _attempts(data, "models.json", _of_json, lambda path: Index.load(path.read_bytes(), "models.json"))


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


@contextlib.contextmanager
def _checkpoints(shared: Path) -> Iterator[Attempt]:
    made = recipe.resolve(recipe.subject_of_backbone("test_efficientnet"), {"stage": "base"})

    def fresh() -> Any:
        torch.manual_seed(0)
        net = network.prepare(timm.create_model("test_efficientnet", num_classes=3), made)
        return network.TrainingState(net, network.optimizer_of(net, made), best=network.Best())

    state, identity = fresh(), {"recipe": {"seed": 1, "mean": [0.5, 0.25]}, "network": "a" * 64}
    for tensor in state.network.moving.values():
        if isinstance(tensor, torch.nn.Parameter):
            state.optimizer.state[tensor]["momentum_buffer"] = torch.rand_like(tensor)
    state.best.offer(1, 50.0, {name: tensor.detach() + 1 for name, tensor in state.network.moving.items()})
    Checkpoints(shared / "state.safetensors", identity, 1, 60, unreadable=["a.jpg"]).save(Position(1, 2, 9), state)
    empty = fresh()

    def read(path: Path) -> object:
        checkpoints = Checkpoints(path, identity, 1, 60)
        position = checkpoints.restore(empty)
        moving = {name: tensor.detach() for name, tensor in empty.network.moving.items()}
        buffers = {
            name: empty.optimizer.state[tensor].get("momentum_buffer", torch.zeros(1))
            for name, tensor in empty.network.moving.items()
        }
        best = (empty.best.epoch, empty.best.top1, delta.fingerprint(empty.best.tensors))
        prints = delta.fingerprint(moving), delta.fingerprint(buffers), best
        return position, prints, checkpoints.saved_identity(), checkpoints.unreadable, checkpoints.unturned

    yield _attempts((shared / "state.safetensors").read_bytes(), "state.safetensors", mutated_safetensors, read)


@contextlib.contextmanager
def _shards(shared: Path) -> Iterator[Attempt]:
    """A damaged shard is computed anew, which is no result but None here."""
    rows = bytes(range(200))
    session: Any = SimpleNamespace(
        rank=0, count_unturned=lambda *_: None, count_unreadable=lambda *_: None, alike=contextlib.nullcontext
    )
    dataset: Any = SimpleNamespace(name="d", __len__=lambda: 4)
    made = recipe.resolve(recipe.subject_of_backbone("test_efficientnet"), {"method": "cached"})

    def passing(folder: Path) -> Any:
        nothing: Any = None
        return ShardPass(session, "", dataset, nothing, made, folder, nothing, nothing, lambda number: rows)

    from fixefficientnet._internal import sealed

    shard = {"indices": torch.arange(4), "targets": torch.tensor([2, 0, 1, 1])}
    data = sealed.dumps(shard, {"unreadable": '["a.jpg"]', "unturned": "[]"}, rows)

    def attempt(rng: random.Random, folder: Path) -> Finding:
        (folder / "0.safetensors").write_bytes(mutated_safetensors(data, rng))
        finding = outcome_of(lambda: passing(folder)._read(folder / "0.safetensors", 0), _is_none_or(shard))
        with contextlib.suppress(ValueError):  # else the shard is computed again
            metadata = sealed.load(folder / "0.safetensors", rows)[1]
            if metadata != {"unreadable": '["a.jpg"]', "unturned": "[]"}:
                return Finding(Outcome.SILENT, str(metadata))
        return finding

    yield attempt


def _is_none_or(shard: dict[str, torch.Tensor]) -> Callable[[Any], bool]:
    return lambda found: found is None or delta.fingerprint(found) == delta.fingerprint(shard)


@contextlib.contextmanager
def _probes(shared: Path) -> Iterator[Attempt]:
    images = torch.randint(256, (3, 6, 6, 3), dtype=torch.uint8)
    probe.save(probe.Probe(images, torch.rand(3, 5), torch.tensor([0, 4, 2])), shared / probe.FILENAME)

    def read(path: Path) -> object:
        found = probe.load(path)
        return delta.fingerprint({name: getattr(found, name) for name in ("images", "logits", "labels")})

    yield _attempts((shared / probe.FILENAME).read_bytes(), probe.FILENAME, mutated_safetensors, read)


@contextlib.contextmanager
def _networks(shared: Path) -> Iterator[Attempt]:
    """A run's model.safetensors."""
    model = lively(timm.create_model("test_efficientnet", num_classes=2))
    told = _report()
    row = dataclasses.replace(told.recipe, backbone="test_efficientnet", train_size=32, test_size=48)
    told = dataclasses.replace(told, recipe=row)
    _save_network(shared / models.MODEL, model.state_dict(), told, None)

    def read(path: Path) -> object:
        found = models.load(str(path))
        return delta.fingerprint(found.network.state_dict()), found.test, found.classes, found.upright, found.train_size

    yield _attempts((shared / models.MODEL).read_bytes(), models.MODEL, mutated_safetensors, read)


@contextlib.contextmanager
def _backbones(shared: Path) -> Iterator[Attempt]:
    """A pinned backbone in the Hub's cache, without the Hub."""
    torch.manual_seed(0)
    model = lively(timm.create_model("test_efficientnet"))
    path = put_in_cache(shared, "tiny/b0", "model.safetensors", model.state_dict())
    data = path.read_bytes()
    place = {"repository": "tiny/b0", "filename": "model.safetensors", "sha256": hub.sha256_of(path)}
    row = {"backbone": {"name": "test_efficientnet.r160_in1k", "top1": None, **place}, "train_size": 32}
    overlay = json.dumps({"schema_version": 1, "variants": {"b0": row | {"test": {"size": 48}}}})
    right = delta.fingerprint(model.state_dict())

    def attempt(rng: random.Random, folder: Path) -> Finding:
        put_in_cache(folder, "tiny/b0", "model.safetensors", {"a": torch.zeros(1)}).write_bytes(
            mutated_safetensors(data, rng)
        )
        offline = mock.patch.object(hub.constants, "HF_HUB_OFFLINE", True)
        with offline, mock.patch.dict(os.environ, FIXEFFICIENTNET_MANIFEST=overlay):
            return outcome_of(
                lambda: fixefficientnet.create("b0", "backbone", cache_dir=folder),
                lambda found: delta.fingerprint(found.state_dict()) == right,  # type: ignore[attr-defined]
            )

    yield attempt


def _as_a_command(said: Path) -> None:
    """Lets this process say what the command line would, in a file."""
    from fixefficientnet import cli

    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = sys.__stderr__
    faulthandler.disable()  # pytest's
    cli._speak_of_fatal_signals()


@contextlib.contextmanager
def _mapped(shared: Path) -> Iterator[Attempt]:
    """The file of a backbone that a model is mapped from is replaced, removed, or cut off.

    What is replaced or removed stays as it was for the model. Where it is cut off, the system ends the process; the
    command line says so.
    """
    torch.manual_seed(0)
    network = lively(timm.create_model("test_efficientnet"))
    image = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        right = network(image)
    place = {"name": "test_efficientnet.r160_in1k", "top1": None, "repository": "tiny/b0"}
    row = {"backbone": place | {"filename": "model.safetensors"}, "train_size": 32, "test": {"size": 48}}
    overlay = json.dumps({"schema_version": 1, "variants": {"b0": row}})

    def use(path: Path, folder: Path, kind: str) -> bool:
        with (
            mock.patch.object(hub.constants, "HF_HUB_OFFLINE", True),
            mock.patch.dict(os.environ, FIXEFFICIENTNET_MANIFEST=overlay),
        ):
            model = fixefficientnet.create("b0", "backbone", cache_dir=folder)
        if kind == "replaced":
            (folder / "other").write_bytes(b"something else")
            (folder / "other").replace(path)
        elif kind == "removed":
            path.unlink()
        else:
            os.truncate(path, 4096)
        with torch.inference_mode():
            return torch.allclose(model(image), right, atol=1e-5)  # where memory begins, sums may be ordered otherwise

    def attempt(rng: random.Random, folder: Path) -> Finding:
        path = put_in_cache(folder, "tiny/b0", "model.safetensors", network.state_dict())
        kind = rng.choice(["replaced", "removed", "cut off"])
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _as_a_command(folder / "said")
                status = 0 if use(path, folder, kind) else 2
            finally:
                os._exit(status)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = (folder / "said").read_text()
        if ended == 0:
            return Finding(Outcome.SURVIVED)
        if kind == "cut off" and ended == -signal.SIGBUS and "Bus error" in said:
            return Finding(Outcome.REFUSED, said)
        return Finding(Outcome.SILENT if ended == 2 else Outcome.CRASHED, f"{kind}: {ended}: {said}")

    yield attempt


@contextlib.contextmanager
def _own_safetensors(shared: Path) -> Iterator[Attempt]:
    """Weights of another's making: without a sha256, their values are what they are; all else must fit."""
    model = lively(timm.create_model("test_efficientnet", num_classes=3))
    data = safetensors.torch.save(model.state_dict(), {"format": "pt"})
    start = 8 + int.from_bytes(data[:8], "little")
    right = delta.fingerprint(model.state_dict())

    def attempt(rng: random.Random, folder: Path) -> Finding:
        changed = mutated_safetensors(data, rng)
        if len(changed) == len(data) and changed[:start] == data[:start]:  # of values alone, which nobody can know
            changed = mutated(changed[:start], rng) + changed[start:]
        (folder / "w.safetensors").write_bytes(changed)
        return outcome_of(
            lambda: models.load(f"timm/test_efficientnet:{folder / 'w.safetensors'}"),
            lambda found: (
                delta.fingerprint(found.network.state_dict()) == right  # type: ignore[attr-defined]
                or changed[-(len(data) - start) :] != data[start:]
            ),
        )

    yield attempt


@contextlib.contextmanager
def _pth(shared: Path) -> Iterator[Attempt]:
    """A training script's checkpoint: the archive, whose checksums tell; and damaged pickles in whole archives."""
    model = lively(timm.create_model("test_efficientnet", num_classes=3))
    right = delta.fingerprint(model.state_dict())
    written = io.BytesIO()
    torch.save({"epoch": 3, "state_dict": model.state_dict(), "args": {"lr": 0.1}}, written)
    data = written.getvalue()

    def attempt(rng: random.Random, folder: Path) -> Finding:
        path = folder / "w.pth"
        path.write_bytes(mutated(data, rng) if rng.random() < 0.6 else _with_pickle(data, rng))
        return outcome_of(
            lambda: models.load(f"timm/test_efficientnet:{path}"),
            lambda found: delta.fingerprint(found.network.state_dict()) == right,  # type: ignore[attr-defined]
        )

    yield attempt


def _with_pickle(data: bytes, rng: random.Random) -> bytes:
    """The archive with a part of its pickle cut, doubled or zeroed, and checksums that fit."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith("data.pkl"):
                place, length = rng.randrange(len(content)), rng.randrange(1, 9)
                kind = rng.choice(["cut", "lost", "opcode"])
                if kind == "cut":
                    content = content[:place]
                elif kind == "lost":
                    content = content[:place] + content[place + length :]
                else:
                    content = content[:place] + rng.choice(pickles.OPCODES) + content[place + 1 :]
            new.writestr(member.filename, content)
    return made.getvalue()


@contextlib.contextmanager
def _hostile_pickles(shared: Path) -> Iterator[Attempt]:
    """Pickles made to run code when they are read: none may, whatever else becomes of them."""
    model = timm.create_model("test_efficientnet", num_classes=3)

    def attempt(rng: random.Random, folder: Path) -> Finding:
        marker, path = folder / "ran", folder / f"w{rng.choice(['.pth', '.pt', '.bin', '.tar', '.safetensors'])}"
        path.write_bytes(pickles.hostile(rng, marker, model.state_dict()))
        finding = outcome_of(lambda: models.load(f"timm/test_efficientnet:{path}"), lambda found: True)
        if finding.outcome is not Outcome.CRASHED:
            finding = min(
                (finding, outcome_of(lambda: checkpoint_file.read(path), lambda found: True)),
                key=lambda one: one.outcome is not Outcome.CRASHED,
            )
        return Finding(Outcome.SILENT, "its code ran") if marker.exists() else finding

    yield attempt


@contextlib.contextmanager
def _exports(shared: Path) -> Iterator[Attempt]:
    """Kept exports; a damaged one is exported anew, which a copy stands in for here."""
    model = lively(timm.create_model("test_efficientnet", num_classes=3))
    loaded = dataclasses.replace(models.from_module(model), name="tiny")
    test = dataclasses.replace(loaded.test, size=32)
    image = torch.rand(1, 3, 32, 32)
    with mock.patch.object(engines.constants, "HF_ASSETS_CACHE", str(shared)):
        for engine in ("onnx", "openvino"):
            engines.exported(loaded, test, engine)
    (kept, *_) = [path.parent.parent for path in shared.rglob("*.onnx")]
    with torch.inference_mode():
        right = model(image)

    def again(made: Any, path: Path, *_: object) -> None:
        (source,) = shared.rglob(path.name)
        for file in exporting.files(source):
            if file.exists():
                shutil.copy(file, path.with_name(file.name))

    def attempt(rng: random.Random, folder: Path) -> Finding:
        shutil.copytree(kept, folder / kept.relative_to(shared))
        engine = rng.choice(["onnx", "openvino"])
        files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size]
        victim = rng.choice(sorted(files))
        victim.write_bytes(mutated(victim.read_bytes(), rng))
        with (
            mock.patch.object(engines.constants, "HF_ASSETS_CACHE", str(folder)),
            mock.patch.object(exporting, "export", again),
        ):
            return outcome_of(
                lambda: engines.forward_of(loaded, test, engine)(image),
                lambda found: torch.allclose(found, right, atol=1e-3),  # type: ignore[arg-type]
            )

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
    Trial("damaged deltas", 2000, 60, _deltas),
    Trial("damaged manifests laid over the packaged one", 1000, 60, _overlays),
    Trial("damaged recipes.toml", 500, 20, _recipes),
    Trial("damaged reports of runs", 800, 60, _reports),
    Trial("damaged recipes of runs", 500, 40, _identities),
    Trial("damaged models.json of publications", 500, 40, _indices),
    Trial("damaged journals of evaluations", 800, 60, _journals),
    Trial("damaged checkpoints of runs", 500, 30, _checkpoints),
    Trial("damaged shards of features", 400, 40, _shards),
    Trial("damaged probes", 300, 30, _probes),
    Trial("damaged networks of runs", 400, 8, _networks),
    Trial("damaged logs of runs", 300, 20, _logs),
    Trial("damaged pinned backbones", 300, 15, _backbones),
    Trial("mapped backbones that change while a model uses them", 60, 4, _mapped),
    Trial("damaged safetensors of one's own", 400, 15, _own_safetensors),
    Trial("damaged .pth files", 500, 20, _pth),
    Trial("pickles that would run code", 600, 15, _hostile_pickles),
    Trial("damaged exports that are kept", 200, 3, _exports),
    Trial("damaged files of labels", 400, 40, _labels),
    Trial("damaged lists of images", 200, 20, _lists),
    Trial("damaged tar files", 500, 40, _tar_shards),
    Trial("JSON of 100 MB or of many levels", 200, 2, _large_json, limit=60),
    Trial("archives and checkpoints that would fill the memory", 120, 12, _bombs, limit=30),
]
