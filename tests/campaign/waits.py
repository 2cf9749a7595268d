"""What a command would wait for without an end: who holds a lock and has stopped, who never comes, what never gives."""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from huggingface_hub.utils import WeakFileLock
from PIL import Image

import fixefficientnet
from campaign.hub import BACKBONE, ask, overlay, served
from campaign.trial import Attempt, Finding, Outcome, Trial, outcome_of
from fixefficientnet import delta, manifest
from fixefficientnet._internal import processes, waiting
from fixefficientnet.data.dataset import open_dataset
from fixefficientnet.data.loading import load_batches
from fixefficientnet.models import load
from fixefficientnet.publishing import conversion, manifest_rows
from fixefficientnet.reproduce.report import Report

SECONDS = 2
"""What waits are limited to here."""


@contextlib.contextmanager
def _stopped_holder(lock: Path) -> Iterator[int]:
    """A process that took a lock and was stopped; gives its id."""
    context = multiprocessing.get_context("fork")
    held = context.Event()

    def hold() -> None:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            held.set()
            os.kill(os.getpid(), signal.SIGSTOP)

    process = context.Process(target=hold)
    process.start()
    try:
        assert held.wait(30)
        yield process.pid or 0
    finally:
        process.kill()
        process.join()


@contextlib.contextmanager
def _locks(shared: Path) -> Iterator[Attempt]:
    """Locks whose holder has stopped: of the Hub's cache, of a copy to be replaced, of a manifest."""
    with served(shared) as (server, data):

        def attempt(rng: random.Random, folder: Path) -> Finding:
            os.environ[waiting.VARIABLE] = str(SECONDS)
            os.environ[manifest.OVERLAY_VARIABLE] = overlay(True, data)
            ask(server.endpoint(folder.name), cache := folder / "cache")
            rows = folder / "rows.json"
            which = rng.choice(["cache", "copy", "manifest"])
            if which == "cache":
                lock = cache / ".locks" / "models--tiny--b0" / f"{server.etags[BACKBONE]}.lock"
            elif which == "copy":
                fixefficientnet.create("b0", True, cache_dir=cache)
                (blob,) = cache.glob("models--org--deltas/blobs/*")
                blob.write_bytes(b"damaged")
                lock = cache / "models--org--deltas" / ".fixefficientnet.lock"
            else:
                lock = folder / ".rows.json.lock"

            def action() -> object:
                if which == "manifest":
                    return manifest_rows.rewrite(rows, lambda: '{"schema_version": 1, "variants": {}}\n')
                return fixefficientnet.create("b0", True, cache_dir=cache)

            with _stopped_holder(lock) as pid:
                found = outcome_of(action)
            if found.outcome == Outcome.SURVIVED:
                return Finding(Outcome.SILENT, f"{which}: the lock was not kept")
            if found.outcome == Outcome.REFUSED and f"process {pid}" not in found.said:
                return Finding(Outcome.CRASHED, f"{which}: it does not say who holds the lock: {found.said}")
            return found if which != "manifest" or not rows.exists() else Finding(Outcome.LOST, "half a manifest")

        yield attempt


@dataclass
class _Wicked:
    """A transform in whose second image a loading process is killed, or stops."""

    signal: int | None
    main: int

    def __call__(self, image: Image.Image, epoch: int, index: int) -> torch.Tensor:
        if os.getpid() != self.main and index == 1:
            os.kill(os.getpid(), self.signal or signal.SIGSTOP)
        return torch.zeros(3, 8, 8, dtype=torch.uint8)


@contextlib.contextmanager
def _workers(shared: Path) -> Iterator[Attempt]:
    """Loading processes that are killed, or stop."""
    images = tiny.make_data(shared / "data", train=2, val=2)

    def attempt(rng: random.Random, folder: Path) -> Finding:
        os.environ[waiting.VARIABLE] = str(SECONDS)
        transform = _Wicked(rng.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP]), os.getpid())
        tasks = [[(0, 0)], [(0, 1)], [(0, 2)]]
        found = outcome_of(lambda: list(load_batches(open_dataset(str(images), "val"), transform, tasks, workers=2)))
        for process in multiprocessing.active_children():  # a stopped one is not ended by the signal that ends others
            process.kill()
        return Finding(Outcome.SILENT, "it was not noticed") if found.outcome == Outcome.SURVIVED else found

    yield attempt


@contextlib.contextmanager
def _alone(shared: Path) -> Iterator[Attempt]:
    """One of two processes of a run, whose other never comes."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        rank = rng.choice(["0", "1"])
        os.environ |= {waiting.VARIABLE: str(SECONDS), "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
        return outcome_of(lambda: processes.accelerator("cpu", "no"))

    yield attempt


@contextlib.contextmanager
def _pipes(shared: Path) -> Iterator[Attempt]:
    """Pipes, sockets and devices where files are expected, into which nobody writes."""
    images = tiny.make_data(shared / "data", train=2, val=2)

    def attempt(rng: random.Random, folder: Path) -> Finding:
        path = folder / rng.choice(["a.png", "a.safetensors", "a.json", "a.txt", "a.tar", "a.pth"])
        kind = rng.choice(["pipe", "socket", "device"])
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as made:
                os.chdir(folder)  # whose path may be too long for a socket's name
                made.bind(path.name)
        else:
            path.symlink_to("/dev/zero")
        in_folder = folder / "val" / "apple"
        (in_folder).mkdir(parents=True)
        (in_folder / "a.jpg").symlink_to(path)

        def in_data() -> object:
            (folder / "val" / "brick").symlink_to(images / "val" / "brick")
            batches = load_batches(open_dataset(str(folder), "val"), _Wicked(0, os.getpid()), [[(0, 0)]])
            return next(batches).unreadable

        def from_environment() -> object:
            os.environ[manifest.OVERLAY_VARIABLE] = str(path)
            try:
                return manifest.load()
            finally:
                del os.environ[manifest.OVERLAY_VARIABLE]

        model = fixefficientnet.create("b0")
        readers: dict[str, Callable[[], object]] = {
            "image": lambda: fixefficientnet.predict([path], model),
            "images of a folder": in_data,
            "labels": lambda: open_dataset(str(images / "val"), "val", labels=str(path)),
            "delta": lambda: delta.load(path),
            "pretrained": lambda: fixefficientnet.create("b0", path),
            "model": lambda: load(str(path)),
            "network's file": lambda: load(f"timm/test_efficientnet:{path}"),
            "checkpoint": lambda: conversion.read(path, manifest.find("b0")),
            "manifest": from_environment,
            "rows": lambda: manifest_rows.read(path),
            "report": lambda: Report.load(path),
        }
        which = rng.choice(list(readers))
        found = outcome_of(readers[which], lambda result: which == "images of a folder" and bool(result))
        return Finding(found.outcome, f"{which} of a {kind}: {found.said}")

    yield attempt


TRIALS = [
    Trial("locks whose holder has stopped", 60, 2, _locks, limit=30),
    Trial("loading processes that are killed or stop", 60, 1, _workers, limit=30),
    Trial("one of two processes, whose other never comes", 10, 1, _alone, limit=60),
    Trial("pipes, sockets and devices in place of files", 300, 25, _pipes, limit=20),
]
