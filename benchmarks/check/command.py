"""Runs the parts of a check, each in a process of its own and no longer than it may, and shows their rows as tables."""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine, tables
from benchmarks.check import limits
from benchmarks.check.setting import Setting
from benchmarks.machine import Row
from fixefficientnet._internal.files import write_atomically
from fixefficientnet.errors import DataError


class Part(NamedTuple):
    """A part: the module of this name in this package.

    Attributes:
        what: What it shows, for people.
        seconds: How long it may take; its rows so far are kept.
        images: Whether it needs images.
    """

    what: str
    seconds: int
    images: bool = False


PARTS = {
    "chunks": Part("a step's batch in chunks, against the whole batch", 50),
    "runs": Part("both methods in each precision, beside the CPU; the logits kept for publishing", 130, images=True),
    "stop": Part("SIGTERM and the same command again: the same bytes?", 80, images=True),
    "step": Part("a step of the online method: images/s, peak memory beside --plan", 70),
    "forward": Part("forward rates of all 18 variants at their test sizes", 80),
    "loading": Part("loading, beside torchvision and timm", 30, images=True),
    "export": Part("export formats, on the device", 40),
    "compile": Part("recompiles with --compile", 80, images=True),
    "autotune": Part("forward rates with cudnn.benchmark", 40),
}
IMAGES = {"train": 12, "val": 8}
"""Images per class and split that the runs are of."""
TINY_CLASSES, TINY_IMAGES = 3, {"train": 4, "val": 2}
"""Those of a dry run."""


def run(options: argparse.Namespace) -> None:
    """Runs a check.

    Args:
        options: The options of `benchmarks.runner.parser`, and `device`, `only`, `dry_run`.
    """
    images = _checked(options)
    chosen = [name for name in options.only or PARTS if options.train or not PARTS[name].images]
    if lacking := [name for name in options.only or PARTS if name not in chosen]:
        print(f"Left out, as they need --train: {', '.join(lacking)}.", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no part goes on alone
    commit = machine.commit()
    machine.use(options.device, options.threads)
    if options.dry_run:
        os.environ["OMP_NUM_THREADS"] = "1"  # tiny networks wait longer for more threads than these save
    found: dict[str, Any] = {"machine": machine.facts(options.device), "rows": []}
    taken = {"benchmark": "check", "commit": commit, "date": datetime.date.today().isoformat()}
    print(_headline(found["machine"], taken))
    with tempfile.TemporaryDirectory(prefix="fixefficientnet-check-") as folder:
        data = str(_some_of(images, Path(folder, "data"), tiny=options.dry_run)) if images else None
        checkpoint = str(options.checkpoint.absolute()) if options.checkpoint else None
        setting = Setting(options.device, folder, options.dry_run, data, checkpoint)
        for name in chosen:
            start = time.perf_counter()
            found_here = rows_of(name, setting, PARTS[name].seconds * (10 if options.dry_run else 1))
            rows = [limits.checked(name, row) for row in found_here] or [{"failed": "it gave no row"}]
            print(f"\n## {name}: {PARTS[name].what} ({time.perf_counter() - start:.0f} s)\n")
            print(f"{shown(rows)}\n\n{limits.stated(name)}", flush=True)
            found["rows"] += [{**taken, "part": name, **row} for row in rows]
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(options.json, (json.dumps(found, indent=1) + "\n").encode())
    if any("failed" in row for row in found["rows"]):
        raise SystemExit("Something failed or is not acceptable: see the tables, and what was said before them.")


def rows_of(name: str, setting: Setting, seconds: float) -> Iterator[Row]:
    """Runs a part in a fresh process, which is ended when its time is over; what went wrong is its last row."""
    command = [sys.executable, "-m", "benchmarks.check", name, json.dumps(asdict(setting))]
    late = threading.Event()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace", start_new_session=True)

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)  # the processes that it started too

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        assert process.stdout
        for line in process.stdout:
            if (row := _row(line)) is not None:
                yield row
            else:
                print(f"{name} printed, which is no row: {line.rstrip()}", file=sys.stderr)
        status = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status:
        yield {"failed": f"not done after {seconds:g} s" if late.is_set() else f"the process ended with {status}"}


def _row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def shown(rows: Sequence[Row]) -> str:
    """A table with a column for each figure that any of the rows has."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    return tables.markdown(header, ([_cell(row.get(name, "")) for name in header] for row in rows))


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _headline(facts: dict[str, Any], taken: dict[str, str]) -> str:
    import torch

    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    where = f"{facts['gpu'] or 'no GPU'}; {facts['threads']} cores ({facts['cpu']}); torch {torch.__version__}"
    return f"{where}, cuDNN {cudnn}; {taken['date']}, commit {taken['commit']}"


def _checked(options: argparse.Namespace) -> dict[str, list[Path]]:
    """Refuses files that are not there, before anything is computed; the images of each split, if there is --train."""
    if options.checkpoint and options.dry_run:
        raise SystemExit("--checkpoint is of a Lite0, and a dry run trains a tiny network of its own: leave it out.")
    if options.checkpoint and not options.checkpoint.is_file():
        raise SystemExit(f"--checkpoint: there is no file {options.checkpoint}.")
    if not options.train:
        return {}
    if not options.train.is_dir():
        raise SystemExit(f"--train: there is no folder {options.train}.")
    try:
        return {split: machine.images_in(options.train / split) for split in IMAGES}
    except DataError as error:
        raise SystemExit(f"--train: {error} The check needs train/ and val/ with the same classes.") from None


def _some_of(images: Mapping[str, Sequence[Path]], to: Path, *, tiny: bool) -> Path:
    """A dataset of links to the first images of each class; `tiny`: to fewer, and of the first classes alone."""
    shared = set.intersection(*({image.parent.name for image in found} for found in images.values()))
    kinds = sorted(shared)[: TINY_CLASSES if tiny else None]
    if not kinds:
        raise SystemExit("--train: train/ and val/ have no class in common.")
    for split, count in (TINY_IMAGES if tiny else IMAGES).items():
        for kind in kinds:
            (to / split / kind).mkdir(parents=True)
            for image in [image for image in images[split] if image.parent.name == kind][:count]:
                (to / split / kind / image.name).symlink_to(image.resolve())
    return to
