"""Files of weights that are damaged, change while they are used, or hold code."""

import contextlib
import dataclasses
import faulthandler
import io
import json
import os
import random
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import safetensors.torch
import timm
import torch
from conftest import lively, put_in_cache

import fixefficientnet
from campaign import pickles
from campaign.damaged import attempts, finished_report
from campaign.mutations import mutated, mutated_safetensors
from campaign.trial import Attempt, Finding, Outcome, Trial, outcome_of
from fixefficientnet import delta, hub, models
from fixefficientnet._internal import checkpoint_file
from fixefficientnet.reproduce import network, probe, recipe
from fixefficientnet.reproduce.checkpoints import Checkpoints, Position
from fixefficientnet.reproduce.run import _save_network
from fixefficientnet.reproduce.shards import ShardPass
from fixefficientnet.runtimes import engines, exporting


@contextlib.contextmanager
def _checkpoints(shared: Path) -> Iterator[Attempt]:
    made = recipe.resolve(recipe.subject_of_backbone("test_efficientnet"), {"stage": "base"})

    def fresh() -> Any:
        torch.manual_seed(0)
        net = network.prepare(timm.create_model("test_efficientnet", num_classes=3), made)
        return network.TrainingState(net, network.optimizer_of(net), best=network.Best())

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

    yield attempts((shared / "state.safetensors").read_bytes(), "state.safetensors", mutated_safetensors, read)


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

    yield attempts((shared / probe.FILENAME).read_bytes(), probe.FILENAME, mutated_safetensors, read)


@contextlib.contextmanager
def _networks(shared: Path) -> Iterator[Attempt]:
    """A run's model.safetensors."""
    model = lively(timm.create_model("test_efficientnet", num_classes=2))
    told = finished_report()
    row = dataclasses.replace(told.recipe, backbone="test_efficientnet", train_size=32, test_size=48)
    told = dataclasses.replace(told, recipe=row)
    _save_network(shared / models.MODEL, model.state_dict(), told, None)

    def read(path: Path) -> object:
        found = models.load(str(path))
        return delta.fingerprint(found.network.state_dict()), found.test, found.classes, found.upright, found.train_size

    yield attempts((shared / models.MODEL).read_bytes(), models.MODEL, mutated_safetensors, read)


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


TRIALS = [
    Trial("damaged checkpoints of runs", 500, 30, _checkpoints),
    Trial("damaged shards of features", 400, 40, _shards),
    Trial("damaged probes", 300, 30, _probes),
    Trial("damaged networks of runs", 400, 8, _networks),
    Trial("damaged pinned backbones", 300, 15, _backbones),
    Trial("mapped backbones that change while a model uses them", 60, 4, _mapped),
    Trial("damaged safetensors of one's own", 400, 15, _own_safetensors),
    Trial("damaged .pth files", 500, 20, _pth),
    Trial("pickles that would run code", 600, 15, _hostile_pickles),
    Trial("damaged exports that are kept", 200, 0, _exports),
]
