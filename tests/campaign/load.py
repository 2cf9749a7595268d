"""Much at once, and much for long: images, models, workers and threads."""

import contextlib
import gc
import json
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import tiny
import torch
from conftest import lively, tiny_variants, tuned_delta
from huggingface_hub import constants

import fixefficientnet
from campaign.trial import Attempt, Finding, Outcome, Trial
from fixefficientnet import classes, delta, manifest
from fixefficientnet.cli import main as command

Prepare = Callable[[Path], AbstractContextManager[Attempt]]
KILOBYTES = 0.3
"""Most memory per image: its path. Rows are written as they are known."""
IMAGES = 8
"""Different images; the rest are other names of these."""


def _memory(which: str) -> float:
    """Of this process, in MB: VmRSS is what it has, VmHWM the most that it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _forget_the_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def _tiny_model(shared: Path) -> Iterator[Path]:
    """A tiny b0 in a Hub cache, which the package finds without a network; gives its delta."""
    os.environ[manifest.OVERLAY_VARIABLE] = tiny_variants(shared / "hub", b0={})
    before, constants.HF_HUB_CACHE = constants.HF_HUB_CACHE, str(shared / "hub")
    try:
        path = shared / "delta.safetensors"
        delta.save(tuned_delta(lively(fixefficientnet.create("b0", "backbone")), "b0"), path)
        yield path
    finally:
        constants.HF_HUB_CACHE = before
        del os.environ[manifest.OVERLAY_VARIABLE]


def _linked(folder: Path, count: int, classes: int = 1) -> list[Path]:
    """So many images, hard links to a few."""
    for index in range(IMAGES):
        tiny.mottle(folder / f"{index}.png", index)
    made = []
    for index in range(count):
        path = folder / "images" / f"c{index % classes}" / f"{index:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / f"{index % IMAGES}.png", path)
        made.append(path)
    return made


def _run(*arguments: object, output: Path) -> int:
    """The exit status of a command in this process; its output goes to a file."""
    sys.argv = ["fixefficientnet", *map(str, arguments)]
    with output.open("w") as file, contextlib.redirect_stdout(file):
        try:
            command()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def _row(line: str) -> dict[str, object]:
    """A line of predictions without the name of its image; the last digits depend on the batch that it was in."""
    found = json.loads(line)
    del found["image"]
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in found.items()}


def _predict(count: int) -> Prepare:
    """`predict` over a folder of many images."""

    @contextlib.contextmanager
    def prepare(shared: Path) -> Iterator[Attempt]:
        with _tiny_model(shared) as tuned:

            def attempt(rng: random.Random, folder: Path) -> Finding:
                few = _linked(folder / "few", 200)
                predict = ["predict", "--model", "b0", "--pretrained", tuned, "--output"]
                if status := _run(*predict, folder / "few.jsonl", few[0].parent, output=folder / "said"):
                    return Finding(Outcome.CRASHED, f"status {status}")
                many = _linked(folder / "many", count)
                _forget_the_peak()
                before = _memory("VmRSS")
                if status := _run(*predict, folder / "many.jsonl", many[0].parent, output=folder / "said"):
                    return Finding(Outcome.CRASHED, f"status {status}")
                growth = _memory("VmHWM") - before
                first = [_row(line) for line in (folder / "few.jsonl").read_text().splitlines()]
                lines = (folder / "many.jsonl").read_text().splitlines()
                if len(lines) != count:
                    return Finding(Outcome.LOST, f"{len(lines)} predictions of {count}")
                for index, line in enumerate(lines):
                    if json.loads(line)["image"] != str(many[index]) or _row(line) != first[index % IMAGES]:
                        return Finding(Outcome.SILENT, f"{line} is not the prediction of {many[index]}")
                most = 40 + count / 1000 * KILOBYTES
                if growth > most:
                    return Finding(Outcome.LOST, f"memory grew by {growth:.0f} MB, by {most:.0f} at most expected")
                return Finding(Outcome.SURVIVED, f"{growth:.0f} MB")

            yield attempt

    return prepare


def _models(count: int) -> Prepare:
    """Models that are created, used and dropped in one process."""

    @contextlib.contextmanager
    def prepare(shared: Path) -> Iterator[Attempt]:
        with _tiny_model(shared) as tuned:

            def attempt(rng: random.Random, folder: Path) -> Finding:
                image = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
                right: torch.Tensor | None = None

                def once() -> bool:
                    nonlocal right
                    model = fixefficientnet.create("b0", tuned)
                    with torch.inference_mode():
                        logits = model(image)
                    right = logits if right is None else right
                    return torch.equal(logits, right)

                for _ in range(20):  # until allocators and caches have what they keep
                    once()
                gc.collect()
                files, threads, before = _open_files(), threading.active_count(), _memory("VmRSS")
                if not all(once() for _ in range(count)):
                    return Finding(Outcome.SILENT, "other logits")
                gc.collect()
                growth = _memory("VmRSS") - before
                left = _open_files() - files, threading.active_count() - threads
                if any(left):
                    return Finding(Outcome.LOST, f"{left[0]} files and {left[1]} threads are left")
                if growth > 20:  # a model that is kept has 1.4 MB
                    return Finding(Outcome.LOST, f"memory grew by {growth:.0f} MB")
                return Finding(Outcome.SURVIVED, f"{growth:.1f} MB")

            yield attempt

    return prepare


def _threads(count: int, rounds: int) -> Prepare:
    """Threads that create models and predict at once."""

    @contextlib.contextmanager
    def prepare(shared: Path) -> Iterator[Attempt]:
        with _tiny_model(shared) as tuned:

            def attempt(rng: random.Random, folder: Path) -> Finding:
                images = _linked(folder, IMAGES)

                def predictions(which: list[Path]) -> list[list[tuple[int, float]]]:
                    model = fixefficientnet.create("b0", tuned)
                    found = fixefficientnet.predict(which, model)
                    return [[(label.index, round(label.probability, 5)) for label in one.labels] for one in found]

                right, wrong = predictions(images), []

                def work(seed: int) -> None:
                    own = random.Random(seed)
                    for _ in range(rounds):
                        order = own.sample(range(IMAGES), IMAGES)
                        try:
                            found = predictions([images[index] for index in order])
                        except Exception as error:
                            wrong.append(repr(error))
                        else:
                            if found != [right[index] for index in order]:
                                wrong.append("other predictions")

                threads = [threading.Thread(target=work, args=(rng.random(),)) for _ in range(count)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                return Finding(Outcome.SILENT, f"{len(wrong)}: {wrong[0]}") if wrong else Finding(Outcome.SURVIVED)

            yield attempt

    return prepare


def _evaluate(count: int) -> Prepare:
    """`evaluate` with more loading processes than there are cores."""

    @contextlib.contextmanager
    def prepare(shared: Path) -> Iterator[Attempt]:
        names = classes.imagenet_order()[:10]
        with _tiny_model(shared) as tuned:

            def attempt(rng: random.Random, folder: Path) -> Finding:
                for index, path in enumerate(_linked(folder, count)):
                    place = folder / "data" / "val" / names[index % len(names)]
                    place.mkdir(parents=True, exist_ok=True)
                    path.rename(place / path.name)
                found = []
                for workers in (0, 8):
                    evaluate = ["evaluate", f"b0:{tuned}", "--data", folder / "data", "-j", workers, "--device", "cpu"]
                    evaluate += ["--output", folder / f"of {workers}", "--json"]
                    if status := _run(*evaluate, output=folder / "said.json"):
                        return Finding(Outcome.CRASHED, f"status {status}")
                    (result,) = json.loads((folder / "said.json").read_text())["results"]
                    found.append({name: result[name] for name in ("images", "top1", "top5")})
                if found[0] != found[1] or found[0]["images"] != count:
                    return Finding(Outcome.SILENT, f"{found[0]} without loading processes, with them {found[1]}")
                return Finding(Outcome.SURVIVED)

            yield attempt

    return prepare


TRIALS = [
    Trial("predict over 2,000 images", 2, 1, _predict(2_000), limit=300),
    Trial("predict over 100,000 images", 1, 0, _predict(100_000), limit=3600),
    Trial("30 models created and dropped", 5, 1, _models(30), limit=300),
    Trial("1,000 models created and dropped", 1, 0, _models(1000), limit=1800),
    Trial("evaluate on 2,000 images with 8 loading processes", 3, 0, _evaluate(2_000), limit=900),
    Trial("4 threads that create and predict at once", 5, 1, _threads(4, 3), limit=300),
    Trial("16 threads that create and predict at once", 5, 0, _threads(16, 5), limit=900),
]
