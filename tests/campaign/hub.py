"""A Hub that fails, and many who want the same of it at once."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import time
import types
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import tiny
from conftest import lively, save_for_hf, tuned_delta
from faulty_hub import COMMIT, FaultyHub
from hub_standin import Hub
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from torch import nn

import fixefficientnet
from campaign.ground import KEY, REPOSITORY, WORKS, Place, end, ground
from campaign.injected import Fault
from campaign.trial import Attempt, Finding, Outcome, Trial, outcome_of
from fixefficientnet import delta, hub, manifest, models
from fixefficientnet.publishing import manifest_rows

BACKBONE, DELTA, WHOLE = "tiny/b0/model.safetensors", "org/deltas/b0.safetensors", "org/whole/model.safetensors"
INDEX, CONFIG = "org/deltas/models.json", "org/whole/config.json"
TOKEN = "hf_" + "A" * 34
DAY = 86_400


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def overlay(pinned: bool, data: dict[str, bytes]) -> str:
    """The manifest's row of a tiny b0 with published weights."""

    def sha256(name: str) -> str:
        return hashlib.sha256(data[name]).hexdigest()

    network: dict[str, Any] = {"name": "test_efficientnet.r160_in1k", "top1": None}
    network |= {"repository": "tiny/b0", "filename": "model.safetensors"}
    if pinned:
        network |= {"revision": COMMIT, "sha256": sha256(BACKBONE)}
    weights: dict[str, Any] = {
        "repository": "org/deltas",
        "filename": "b0.safetensors",
        "revision": COMMIT,
        "sha256": sha256(DELTA),
    }
    weights |= {"bytes": len(data[DELTA]), "license": "apache-2.0"}
    weights["measured"] = {"dataset": "val", "images": 6, "top1": 50.0, "top5": 100.0}
    row = {"backbone": network, "train_size": 32, "test": {"size": 48}, "weights": weights}
    return json.dumps({"schema_version": manifest.SCHEMA_VERSION, "variants": {"b0": row}})


def _right(data: dict[str, bytes]) -> str:
    """Fingerprint of the b0 that these files make."""
    tensors = safetensors.torch.load(data[BACKBONE])
    return delta.fingerprint({**tensors, **delta.loads(data[DELTA], source=DELTA).tensors})


def _fingerprint(model: nn.Module) -> str:
    return delta.fingerprint(model.state_dict())


def _loads(cache: Path) -> dict[str, Callable[[], object]]:
    """What is downloaded by the package, each with a result that tells right from wrong."""
    index = hub.HubFile("org/deltas", "models.json", "main")
    return {
        "pinned": lambda: _fingerprint(fixefficientnet.create("b0", True, cache_dir=cache)),
        "unpinned": lambda: _fingerprint(fixefficientnet.create("b0", True, cache_dir=cache)),
        "uri": lambda: _fingerprint(
            fixefficientnet.create("b0", "hf://org/deltas/b0.safetensors@main", cache_dir=cache)
        ),
        "whole": lambda: _fingerprint(models.load("hf-hub:org/whole").network),
        "index": lambda: hub.read(index, cache),
    }


def ask(endpoint: str, cache: Path, **settings: int) -> None:
    """Has huggingface_hub ask another Hub in this process, with short times and this cache."""
    for where, name, value in tiny.hub_settings(endpoint):
        setattr(where, name, value)
    constants.HF_HUB_CACHE = str(cache)
    for name, seconds in ({"HF_HUB_DOWNLOAD_TIMEOUT": 1, "HF_HUB_ETAG_TIMEOUT": 1} | settings).items():
        setattr(constants, name, seconds)
    if hasattr(file_download, "_ETAG_RETRY_TIMEOUT"):
        file_download._ETAG_RETRY_TIMEOUT = 1  # it waits a minute, six times
    # what it would sleep between its tries, up to 23 seconds; a longer sleep is the server's will, and is slept
    quick = types.SimpleNamespace(sleep=lambda seconds: time.sleep(seconds if seconds > 30 else 0))
    _http.time = quick  # type: ignore[assignment]
    file_download.time = quick  # type: ignore[assignment]


def apart(work: Callable[[], Finding]) -> Finding:
    """The finding of a process of its own, which ends: so do its downloads that were given up."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(work()))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        return Finding(Outcome.CRASHED, f"the process ended with {process.exitcode}")
    finally:
        process.join()


FAULTS = [
    *(f"cut={tenth}" for tenth in range(10)),
    *(f"cutonce={tenth}" for tenth in range(10)),
    *(f"status={status}" for status in (400, 401, 403, 404, 416, 429, 500, 502, 503, 504)),
    *(f"getstatus={status}" for status in (401, 403, 404, 416, 429, 500, 502, 503)),
    *("once=429", "once=503", "status=429~1", "getstatus=429~1", f"status=429~{DAY}", f"getstatus=429~{DAY}"),
    *("page", "getpage", "fullpage", "silent=30", "getsilent=30"),
    *("etag=wrong", "etag=" + "0" * 64, "etag=" + "0" * 40, "noetag"),
    *("headlength=7", "length=7", "length=9999999", "longer", "changes"),
    *("redirect", "loop", "slow=0.002", "trickle=0.2"),
]


@contextlib.contextmanager
def served(shared: Path) -> Iterator[tuple[FaultyHub, dict[str, bytes]]]:
    """A faulty Hub that has a tiny backbone, its delta, a whole model and an index."""
    model = lively(timm.create_model("test_efficientnet"))
    whole = timm.create_model("test_efficientnet", num_classes=3)
    save_for_hf(lively(whole, 2), str(shared / "whole"), safe_serialization=True)
    data = {
        BACKBONE: safetensors.torch.save(model.state_dict()),
        DELTA: delta.dumps(tuned_delta(model, "b0")),
        WHOLE: (shared / "whole" / "model.safetensors").read_bytes(),
        CONFIG: (shared / "whole" / "config.json").read_bytes(),
        INDEX: json.dumps({"models": ["b0"] * 500}).encode(),
    }
    etags = {
        name: hashlib.sha256(content).hexdigest() if name.endswith(".safetensors") else _git_hash(content)
        for name, content in data.items()
    }
    with FaultyHub(data, etags, TOKEN) as server:
        yield server, data


@contextlib.contextmanager
def _faults(shared: Path) -> Iterator[Attempt]:
    with served(shared) as (server, data):
        overlays = {name: overlay(name == "pinned", data) for name in _loads(shared)}
        right = _right(data)
        expected = {"pinned": right, "unpinned": right, "uri": right, "index": data[INDEX]}
        expected["whole"] = delta.fingerprint(safetensors.torch.load(data[WHOLE]))

        def _load(endpoint: str, name: str, cache: Path) -> object:
            os.environ[manifest.OVERLAY_VARIABLE] = overlays[name]
            os.environ["HF_TOKEN"] = TOKEN
            os.environ["FIXEFFICIENTNET_TIMEOUT"] = "4"
            ask(endpoint, cache)
            return _loads(cache)[name]()

        def attempt(rng: random.Random, folder: Path) -> Finding:
            which, fault = rng.choice(list(overlays)), rng.choice(FAULTS)
            files = {"pinned": [BACKBONE, DELTA], "unpinned": [BACKBONE, DELTA], "uri": [DELTA], "index": [INDEX]}
            file = rng.choice(files.get(which, [WHOLE, CONFIG]))
            cache = folder / "one" / "two" / "cache"
            case = f"{which} {file} {fault}"
            own = folder.name
            host = server.endpoint(own, fault, file.replace("/", "."))
            if rng.random() < 0.03:
                host, fault = "http://hub.invalid", "dns"
            found = apart(lambda: outcome_of(lambda: _load(host, which, cache), lambda got: got == expected[which]))
            with urllib.request.urlopen(f"{server.address}/told/{own}") as answer:
                told = json.load(answer)
            if told["leaked"]:
                return Finding(Outcome.SILENT, f"{case}: the token went to another host, or into the User-Agent")
            strays = [path for path in folder.rglob("*") if path.is_file() and cache not in path.parents]
            if strays:
                return Finding(Outcome.SILENT, f"{case}: {strays} written outside of the cache")
            if found.outcome == Outcome.REFUSED and not any(part in found.said for part in file.split("/")[:2]):
                return Finding(Outcome.CRASHED, f"{case}: the error does not name the file: {found.said}")
            if found.outcome not in (Outcome.REFUSED, Outcome.SURVIVED):
                return Finding(found.outcome, f"{case}: {found.said}")
            after = outcome_of(lambda: _load(server.endpoint(own), which, cache), lambda got: got == expected[which])
            if after.outcome != Outcome.SURVIVED:
                return Finding(Outcome.LOST, f"{case} ({found.said}): afterwards {after.said}")
            if os.environ.get("SHOW"):
                print(case, found.outcome, found.said.replace("\n", " / ")[:300], flush=True)
            return found

        yield attempt


def _damage(path: Path, rng: random.Random) -> None:
    """Spoils a file as disks and killed copies do."""
    data = path.read_bytes()
    at = rng.randrange(len(data))
    kind = rng.choice(["bit", "cut", "empty", "gone"])
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes({"bit": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "cut": data[:at]}.get(kind, b""))


def _at_once(count: int) -> Callable[[Path], contextlib.AbstractContextManager[Attempt]]:
    """Many processes that load the same model from one cache."""

    @contextlib.contextmanager
    def prepare(shared: Path) -> Iterator[Attempt]:
        with served(shared) as (server, data):
            right = _right(data)

            def attempt(rng: random.Random, folder: Path) -> Finding:
                pinned, damaged, own = rng.random() < 0.5, rng.random() < 0.5, folder.name
                os.environ[manifest.OVERLAY_VARIABLE] = overlay(pinned, data)
                cache = folder / "cache"
                load = _loads(cache)["pinned"]
                ask(server.endpoint(own + "first"), cache, HF_HUB_DOWNLOAD_TIMEOUT=60, HF_HUB_ETAG_TIMEOUT=60)
                if damaged:
                    load()
                    for blob in sorted(cache.glob("models--*/blobs/*")):
                        _damage(blob, rng)
                ask(server.endpoint(own), cache, HF_HUB_DOWNLOAD_TIMEOUT=60, HF_HUB_ETAG_TIMEOUT=60)
                context = multiprocessing.get_context("fork")
                start, told = context.Event(), context.SimpleQueue()

                def one() -> None:
                    start.wait(60)
                    told.put(outcome_of(load, lambda got: got == right))

                processes = [context.Process(target=one) for _ in range(count)]
                for process in processes:
                    process.start()
                start.set()
                found = [told.get() for _ in processes]  # one that dies without a word: the attempt's limit
                for process in processes:
                    process.join()
                case = f"{'pinned' if pinned else 'not pinned'}, {'damaged' if damaged else 'empty'} cache"
                if wrong := [one for one in found if one.outcome != Outcome.SURVIVED]:
                    return Finding(Outcome.LOST, f"{case}: {len(wrong)} of {count} did not get it: {wrong[0]}")
                with urllib.request.urlopen(f"{server.address}/told/{own}") as answer:
                    requests = json.load(answer)["requests"]
                downloads = {name: requests.get(f"GET {name}", 0) for name in (BACKBONE, DELTA)}
                if max(downloads.values()) > 1:
                    return Finding(Outcome.LOST, f"{case}: downloaded more than once: {downloads}")
                return Finding(Outcome.SURVIVED)

            yield attempt

    return prepare


@contextlib.contextmanager
def _manifest_writers(shared: Path) -> Iterator[Attempt]:
    """Processes that write rows to one manifest at once, as publishing does."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        path, count = folder / "rows.json", rng.randrange(2, 9)
        keys = rng.sample(list(manifest.load()), count)
        context = multiprocessing.get_context("fork")
        start = context.Event()

        def text(key: str) -> str:
            document = manifest_rows.read(path)
            time.sleep(0.02)  # as if the disk were slow
            rows = {**document["variants"], key: {"note": f"of {key}"}}
            return manifest_rows.dumps({**document, "variants": rows}) + "\n"

        def one(key: str) -> None:
            start.wait(60)
            manifest_rows.rewrite(path, lambda: text(key))

        processes = [context.Process(target=one, args=(key,)) for key in keys]
        for process in processes:
            process.start()
        start.set()
        for process in processes:
            process.join(30)
        rows = manifest_rows.read(path)["variants"]
        if rows != {key: {"note": f"of {key}"} for key in keys}:
            return Finding(Outcome.LOST, f"{sorted(rows)} of {sorted(keys)} are there")
        return Finding(Outcome.SURVIVED)

    yield attempt


def _row_of_nothing(rows: Path, server: Hub) -> str:
    """What is wrong with the manifest's row; empty: it pins bytes that the Hub has, or there is none yet."""
    if not rows.exists():
        return ""
    weights = json.loads(rows.read_text())["variants"][KEY]["weights"]
    there = server.repositories[REPOSITORY].commits.get(weights["revision"], {}).get(weights["filename"], b"")
    return "" if hashlib.sha256(there).hexdigest() == weights["sha256"] else f"what is not there: {weights}"


@contextlib.contextmanager
def _publishers(shared: Path) -> Iterator[Attempt]:
    """Two that publish to one repository and one manifest at once, the same run or two of one variant."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        runs = [ground().run, rng.choice([ground().run, ground().folder / "other" / KEY])]
        rows = folder / "rows.json"
        commands = [["publish", str(run), "--repo", REPOSITORY, "--manifest", str(rows), "--replace"] for run in runs]
        with Hub() as server:
            places = [Place(WORKS["publish to the Hub"], folder / str(number), server) for number in range(2)]
            processes = []
            for place, command in zip(places, commands, strict=True):
                processes += place.start(Fault(str(place.out)), command)
                time.sleep(rng.choice([0, 0, rng.random()]))
            for process in processes:
                process.join(60)
            statuses = [process.exitcode for process in processes]
            for process in processes:
                end(process)
            if wrong := _row_of_nothing(rows, server):
                return Finding(Outcome.LOST, wrong)
            for place, command, status in zip(places, commands, statuses, strict=True):
                said = place.said.read_text()
                if status is None:
                    return Finding(Outcome.HUNG, said)
                if status and ("Traceback" in said or "Error" not in said):
                    return Finding(Outcome.CRASHED, said[-2000:])
                if status:
                    status, again = place.run(arguments=command)
                    if status != 0:
                        return Finding(Outcome.LOST, f"{said[-1000:]}; then, alone: {again[-1000:]}")
            if not rows.exists() or (wrong := _row_of_nothing(rows, server)):
                return Finding(Outcome.LOST, wrong or "no row")
        return Finding(Outcome.REFUSED if any(statuses) else Outcome.SURVIVED)

    yield attempt


TRIALS = [
    Trial("downloads from a Hub that fails", 1000, 12, _faults),
    Trial("8 processes that load one model, from an empty or a damaged cache", 40, 3, _at_once(8)),
    Trial("64 processes that load one model, from an empty or a damaged cache", 10, 0, _at_once(64), limit=300),
    Trial("2 to 8 processes that write one manifest", 100, 4, _manifest_writers),
    Trial("two that publish to one repository and one manifest", 40, 1, _publishers, limit=300, isolated=False),
]
