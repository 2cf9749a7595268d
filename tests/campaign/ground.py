"""What the commands of these trials work on, and what each is to leave."""

import atexit
import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import tiny
import torch
from conftest import tiny_variants
from hub_standin import TOKEN, Hub

from campaign.injected import MODULE, Fault
from fixefficientnet import manifest

SPEED = ("seconds", "images_per_second")
KEY, REPOSITORY = "b0", "org/name"
OLDER = "older"
STAYING = (".lock", ".owner")
"""Files of a run's folder that are there by design, whatever ends it."""


@dataclass(frozen=True)
class Ground:
    """Images, networks, a finished run of a variant, and a whole checkpoint of it."""

    folder: Path
    overlay: str

    @property
    def cache(self) -> Path:
        return self.folder / "hub"

    @property
    def images(self) -> Path:
        return self.folder / "data"

    @property
    def run(self) -> Path:
        return self.folder / "runs" / KEY

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_HUB_CACHE": str(self.cache), manifest.OVERLAY_VARIABLE: self.overlay, "COLUMNS": "200"}


@functools.cache
def ground() -> Ground:
    """The same for all trials of a process."""
    folder = Path(tempfile.mkdtemp(prefix="campaign-ground-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny.make_data(folder / "data", ("n01440764", "n02124075", "n07920052"), train=4, val=3)
    made = Ground(folder, tiny_variants(folder / "hub", **{KEY: {}}))
    for name, seed in (("runs", "0"), ("other", "1")):
        place = ["--data", str(made.images), "--output", str(folder / name), "-j", "0", "--method", "cached"]
        # enough epochs for some images to be correct: an accuracy of 0 is not published
        recipe = [*SMALL, "--epochs", "6", "--base-lr", "0.1", "--seed", seed]
        tiny.run([KEY, *place, *recipe], folder / "said.txt", status=0, **made.environment)
    whole = ["merge", KEY, "--delta", str(made.run), "-o", str(folder / "whole.pth")]
    tiny.run(whole, folder / "said.txt", status=0, command=tiny.FIXEFFICIENTNET, **made.environment)
    return made


SMALL = ["--epochs", "2", "--batch-size", "6", "--shard", "4", "--forward-batch", "4", "--checkpoint-steps", "1"]
OWN = [*tiny.NETWORK, "--train-size", "32", "--test-size", "48"]


@dataclass(frozen=True)
class Work:
    """A command that writes into a folder.

    Attributes:
        name: What it does.
        arguments: Its arguments, given the folder.
        module: The command.
        same: Patterns of the files whose bytes are the same whatever happened before.
        grows: Patterns of the files that tell what happened, and so differ.
        processes: How many processes of one run.
        older: Arguments that leave another result in the folder, which the command replaces.
        hub: What the Hub has at first; None: there is no Hub.
        empty_cache: Whether it begins with an empty cache, in the folder.
        folder: Whether it goes on in its own folder, so that an attempt that failed leaves what is of use.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    module: str = tiny.FIXEFFICIENTNET
    same: tuple[str, ...] = (".*",)
    grows: tuple[str, ...] = ()
    processes: int = 1
    older: Callable[[Path], list[str]] | None = None
    hub: Callable[[Hub], object] | None = None
    empty_cache: bool = False
    folder: bool = False


@dataclass
class Place:
    """A folder where a command is at work, and its Hub."""

    work: Work
    folder: Path
    hub: Hub | None = None
    rows: str = ""
    said: Path = field(init=False)

    def __post_init__(self) -> None:
        self.said = self.folder / "said.txt"
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def environment(self) -> dict[str, str]:
        found = ground().environment | {"HOME": str(self.folder / "home"), "TMPDIR": str(self.folder)}
        if self.work.empty_cache:
            found |= {"HF_HUB_CACHE": str(self.out / "hub")}
        if self.hub:
            found |= {"HF_ENDPOINT": self.hub.endpoint, "HF_TOKEN": TOKEN}
        return found | ({manifest.OVERLAY_VARIABLE: self.rows} if self.rows else {})

    def start(self, fault: Fault, arguments: list[str] | None = None) -> list[Any]:
        more = self.environment() | fault.environment(self.work.module)
        given = self.work.arguments(self.out) if arguments is None else arguments
        if self.work.processes == 2:
            return list(tiny.start_two(given, self.said, command=MODULE, **more))
        return [tiny.start(given, self.said, command=MODULE, **more)]

    def run(
        self,
        fault: Fault | None = None,
        *,
        kill_after: float | None = None,
        limit: float = 120,
        arguments: list[str] | None = None,
    ) -> tuple[int | None, str]:
        """Runs the command; its status (None: it had to be ended) and what it said."""
        before = {file: file.stat().st_size for file in self.folder.glob("said.txt*")}
        processes = self.start(fault or Fault(str(self.out)), arguments)
        until = time.monotonic() + (limit if kill_after is None else kill_after)
        while all(process.is_alive() for process in processes) and time.monotonic() < until:
            processes[0].join(0.005)
        if any(process.exitcode for process in processes):  # as a launcher does: one that is gone ends all
            until = min(until, time.monotonic() + 1)
        while any(process.is_alive() for process in processes) and time.monotonic() < until:
            time.sleep(0.005)
        statuses = [process.exitcode for process in processes]
        for process in processes:
            end(process)
        said = [file.read_text(errors="replace")[before.get(file, 0) :] for file in self.folder.glob("said.txt*")]
        known = [status for status in statuses if status is not None]
        status = max(map(abs, known)) if known and (len(known) == len(statuses) or any(known)) else None
        return status, "".join(said)

    def state(self) -> dict[str, str]:
        """What is there: the hash of each file, by its name; and what the Hub has."""
        found = {}
        for path in sorted(self.out.rglob("*")):
            if path.is_file() and path.name not in STAYING:
                data = path.read_bytes()
                found[str(path.relative_to(self.out))] = hashlib.sha256(_without_speed(path, data)).hexdigest()
        if self.hub:
            for name, repository in self.hub.repositories.items():
                found[f"hub: {name}"] = f"{sorted(repository.commits)} {repository.head} {repository.tags}"
        return found

    def grown(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.work.grows)


def _without_speed(path: Path, data: bytes) -> bytes:
    """A table without the columns that no two runs have alike."""
    if path.suffix != ".csv" or b"second" not in data:
        return data
    header, *rows = csv.reader(io.StringIO(data.decode()))
    return json.dumps([dict(zip(header, row, strict=True)) | dict.fromkeys(SPEED) for row in rows]).encode()


def end(process: Any) -> None:
    """Ends a process and those that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


@contextlib.contextmanager
def place(work: Work, folder: Path) -> Iterator[Place]:
    """A place for a command, with a Hub of its own."""
    if work.hub is None:
        yield Place(work, folder)
        return
    with Hub() as hub:
        rows = work.hub(hub)
        yield Place(work, folder, hub, rows if isinstance(rows, str) else "")


@dataclass(frozen=True)
class Undisturbed:
    """What a command leaves, and how long it takes.

    Attributes:
        state: What is there in the end.
        before: What was there before, which it replaces.
        folder: Where that is; None: nothing was there.
        same: The names whose bytes are always the same.
        seconds: How long it takes.
        operations: Number of operations of the file system.
        sizes: Of the files.
    """

    state: dict[str, str]
    before: dict[str, str]
    folder: Path | None
    same: frozenset[str]
    seconds: float
    operations: int
    sizes: tuple[int, ...]


def undisturbed(work: Work, folder: Path) -> list[Undisturbed]:
    """Runs a command, twice, as what is the same then is to be the same always; and once over an older result."""
    found = []
    first, _ = _once(work, folder / "first")
    second, known = _once(work, folder / "second")
    differing = {key for key in known.same if first[key] != second[key]}
    assert not differing, f"{work.name}: {differing} of two undisturbed runs differ"
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    assert known.same, first
    found.append(known)
    if work.older:
        (folder / OLDER).mkdir()
        with place(work, folder / OLDER) as there:
            _well(there.run(arguments=work.older(there.out)))
            before = there.state()
        _, known = _once(work, folder / "over", there.out)
        found.append(replace(known, before=before, folder=there.out))
    return found


def _once(work: Work, folder: Path, older: Path | None = None) -> tuple[dict[str, str], Undisturbed]:
    folder.mkdir()
    if older:
        shutil.copytree(older, folder / "out", symlinks=True)
    with place(work, folder) as there:
        begun = time.monotonic()
        _well(there.run(Fault(str(there.out), count=str(folder / "count"))))
        seconds = time.monotonic() - begun
        state = {key: value for key, value in there.state().items() if not there.grown(key)}
        sizes = tuple(path.stat().st_size for path in there.out.rglob("*") if path.is_file())
    same = frozenset(key for key in state if any(re.fullmatch(pattern, key) for pattern in work.same))
    return state, Undisturbed(state, {}, None, same, seconds, int((folder / "count").read_text()), sizes)


def _well(done: tuple[int | None, str]) -> None:
    status, said = done
    assert status == 0, said


def unlike(there: Place, known: Undisturbed, *, between: bool = False) -> str:
    """How what is there differs from what an undisturbed command leaves; empty where it does not.

    Args:
        there: The place.
        known: What an undisturbed command leaves.
        between: Whether the command is not finished: files may lack, or be those of before.
    """
    found = {key: value for key, value in there.state().items() if not there.grown(key)}
    if not between and found.keys() != known.state.keys():
        lacking, more = known.state.keys() - found.keys(), found.keys() - known.state.keys()
        return f"lacking: {sorted(lacking)}; too much: {sorted(more)}"
    for key in sorted(known.same & found.keys()):
        if between and key.endswith(".jsonl"):  # grows by a line at a time
            continue
        if found[key] not in (known.state[key], known.before.get(key) if between else None):
            return f"{key} has other bytes"
    return ""


# --- the commands ---------------------------------------------------------------------------------------------


def _fine_tuning(*more: str) -> Callable[[Path], list[str]]:
    def arguments(out: Path) -> list[str]:
        own = [KEY] if "base" not in more else [*OWN, "--no-pretrained"]
        return [
            *own,
            "-j",
            "0",
            *SMALL,
            "--data",
            str(ground().images),
            "--output",
            str(out),
            "--experiment",
            "run",
            *more,
        ]

    return arguments


def _hub_with_weights(hub: Hub) -> str:
    """A Hub with a backbone and a delta, and the rows that name them."""
    backbone = next(ground().cache.glob(f"models--tiny--{KEY}/snapshots/*/model.safetensors")).read_bytes()
    data = (ground().run / "delta.safetensors").read_bytes()
    hub.make(f"tiny/{KEY}").add({"model.safetensors": backbone}, "weights")
    commit = hub.make(REPOSITORY).add({"b0.safetensors": data}, "weights")
    rows = json.loads(ground().overlay)
    rows["variants"][KEY]["weights"] = {
        "repository": REPOSITORY,
        "filename": "b0.safetensors",
        "revision": commit,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "license": "apache-2.0",
        "measured": {"dataset": "data/val", "images": 12, "top1": 50.0, "top5": 100.0},
    }
    return json.dumps(rows)


def _run(*more: str) -> list[str]:
    return [str(ground().run), "--data", str(ground().images), "-b", "2", "-j", "0", *more]


RUN_GROWS = (r".*tensorboard/.*", r"run/hours\.json", r"run/recipe\.json")
RUN_SAME = (r"run/(delta|model|last)\.safetensors", r"run/report\.(json|md|html)", r"run/curve\.png", r"run/log\.jsonl")
FINE_TUNING: dict[str, Any] = {"module": tiny.REPRODUCE, "same": RUN_SAME, "grows": RUN_GROWS, "folder": True}

WORKS = {
    work.name: work
    for work in (
        Work("fine-tuning online", _fine_tuning("--method", "online"), **FINE_TUNING),
        Work("fine-tuning cached", _fine_tuning("--method", "cached"), **FINE_TUNING),
        Work("base stage", _fine_tuning("--stage", "base"), **FINE_TUNING),
        Work("fine-tuning online, two processes", _fine_tuning("--method", "online"), processes=2, **FINE_TUNING),
        Work("fine-tuning cached, two processes", _fine_tuning("--method", "cached"), processes=2, **FINE_TUNING),
        Work("base stage, two processes", _fine_tuning("--stage", "base"), processes=2, **FINE_TUNING),
        Work(
            "evaluate",
            lambda out: [
                *["evaluate", *_run(), "--resume", "-o", str(out / "evaluations")],
                *["--predictions", str(out / "rows.csv"), "--html", str(out / "page.html")],
                *["--per-class", str(out / "classes.csv"), "--results-file", str(out / "results.csv")],
            ],
            same=(r"(rows|classes|results)\.csv",),
            grows=(r"evaluations/.*",),
            folder=True,
        ),
        Work(
            "sweep",
            lambda out: ["sweep", *_run("--sizes", "32,48", "-o", str(out))],
            same=(r"sweep\.csv",),
            grows=(r"finished/.*",),
            folder=True,
        ),
        Work(
            "predict",
            lambda out: [
                "predict",
                str(ground().images / "val"),
                "--model",
                str(ground().run),
                "-o",
                str(out / "a.csv"),
            ],
        ),
        Work(
            "export to TorchScript",
            lambda out: ["export", str(ground().run), "-o", str(out / "a.pt"), "--overwrite"],
            older=lambda out: ["export", KEY + ":backbone", "-o", str(out / "a.pt")],
        ),
        Work(
            "export to OpenVINO",
            lambda out: ["export", str(ground().run), "-o", str(out / "a.xml"), "--dynamic-size", "--overwrite"],
            older=lambda out: ["export", KEY + ":backbone", "-o", str(out / "a.xml"), "--dynamic-size"],
        ),
        Work(
            "convert",
            lambda out: ["convert", _whole(), "--variant", KEY, "-o", str(out / "a.safetensors"), "--overwrite"],
            older=lambda out: [
                "convert",
                _whole(),
                "--variant",
                KEY,
                "-o",
                str(out / "a.safetensors"),
                "--license",
                "mit",
            ],
        ),
        Work(
            "merge",
            lambda out: ["merge", KEY, "--delta", str(ground().run), "-o", str(out / "a.safetensors"), "--overwrite"],
            older=lambda out: ["merge", KEY, "--delta", "backbone", "-o", str(out / "a.safetensors")],
        ),
        Work(
            "merge to a folder",
            lambda out: ["merge", KEY, "--delta", str(ground().run), "-o", str(out / "a"), "--overwrite"],
            older=lambda out: ["merge", KEY, "--delta", "backbone", "-o", str(out / "a")],
        ),
        Work(
            "publish to a folder",
            lambda out: ["publish", str(ground().run), "--repo", REPOSITORY, "--to", str(out / "a"), "--replace"],
            older=lambda out: [
                *["publish", str(ground().folder / "other" / KEY), "--repo", REPOSITORY, "--to", str(out / "a")]
            ],
        ),
        Work(
            "publish to the Hub",
            lambda out: ["publish", str(ground().run), "--repo", REPOSITORY, "--manifest", str(out / "rows.json")],
            same=(r"rows\.json", r"hub: .*"),
            hub=lambda hub: None,
        ),
        Work(
            "downloads",
            lambda out: ["predict", str(ground().images / "val"), "--model", KEY, "--json"],
            hub=_hub_with_weights,
            empty_cache=True,
            same=(r"hub/.*/(blobs|snapshots|refs)/.*", r"hub: .*"),
            grows=(r"hub/\.locks/.*", r"hub/.*\.incomplete", r"hub/.*/\.fixefficientnet/.*"),
        ),
    )
}


def _whole() -> str:
    return str(ground().folder / "whole.pth")


def loads(path: Path) -> bool:
    """Whether a file of weights can be read."""
    if path.suffix == ".safetensors":
        return bool(safetensors.torch.load(path.read_bytes()))
    return bool(torch.load(path, weights_only=True))
