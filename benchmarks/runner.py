"""Runs benchmarks by name on a fixed number of cores, and writes their rows to one file."""

import argparse
import datetime
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine, tables
from fixefficientnet import manifest
from fixefficientnet._internal.files import write_atomically
from fixefficientnet.errors import FixEfficientNetError, UnknownVariantError

BENCHMARKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "start": ("imports, first predictions, whole evaluations", ("images",)),
    "preprocess": ("from JPEG to tensor", ("images",)),
    "loading": ("from files to batches, for fine-tuning", ("images",)),
    "accuracy": ("top-1 of the faster engines", ("images",)),
    "load": ("loading a model, to its first image", ()),
    "cost": ("each variant and its base model", ()),
    "forward": ("the forward pass alone", ()),
    "classify": ("from a folder of images to labels", ("images",)),
    "serve": ("the server of docs/serving.md, beside predict", ("images",)),
    "export": ("exported files, beside timmx's", ()),
    "finetune": ("fine-tuning steps and whole runs", ("train", "checkpoint")),
}
"""What each benchmark measures, and the options that it needs."""
BY_VARIANT = ("load", "cost", "classify")
"""Benchmarks that take `--variants`."""


def run(options: argparse.Namespace, names: list[str] | None = None) -> None:
    """Runs benchmarks, and writes the file after each; one that fails does not stop the others.

    Args:
        options: The options of `parser`, and `device`.
        names: The benchmarks to run; None: all whose folders were given.
    """
    chosen = _checked(options, names)
    commit = machine.commit()
    machine.use(options.device, options.threads)
    facts = machine.facts(options.device)
    found: dict[str, Any] = {"machine": facts, "rows": []}
    if options.json and options.json.exists():
        found = tables.read(options.json)
        if found["machine"] != facts:
            raise SystemExit(f"{options.json} is of another machine or of other versions: give another file.")
    failed: list[str] = []
    for name in chosen:
        try:
            rows = importlib.import_module(f"benchmarks.{name}").rows(options)
        except (subprocess.CalledProcessError, ImportError, FixEfficientNetError) as error:
            remedy = ": pip install -e '.[benchmark]'" if isinstance(error, ImportError) else ""
            print(f"{name} failed: {error}{remedy}", file=sys.stderr)
            failed.append(name)
            continue
        taken = {"commit": commit, "date": datetime.date.today().isoformat(), "rounds": options.rounds}
        found["rows"] = merged(found["rows"], [{**taken, **row} for row in rows], name, options.variants)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(options.json, (json.dumps(found, indent=1) + "\n").encode())
    if found["rows"] and not options.json:
        print(tables.shown(found))
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}.")


def _checked(options: argparse.Namespace, names: list[str] | None) -> list[str]:
    """Checks the options; returns the benchmarks to run, without those that lack a folder if none was named."""
    try:
        options.variants = options.variants and [manifest.find(key).key for key in options.variants]
    except UnknownVariantError as error:
        raise SystemExit(f"--variants: {error}") from None
    for option in ("images", "train", "checkpoint"):
        path = getattr(options, option)
        if path and not path.exists():
            raise SystemExit(f"--{option}: there is no {path}.")
    chosen = []
    for name in names or BENCHMARKS:
        lacking = [f"--{need}" for need in BENCHMARKS[name][1] if getattr(options, need) is None]
        if lacking and names:
            raise SystemExit(f"{name} needs {' and '.join(lacking)}.")
        if lacking:
            print(f"{name} is left out: it needs {' and '.join(lacking)}.", file=sys.stderr)
        else:
            chosen.append(name)
    return chosen


def merged(
    earlier: list[machine.Row], taken: list[machine.Row], name: str, variants: list[str] | None
) -> list[machine.Row]:
    """Replaces the rows of a benchmark; rows of variants that were not measured again stay, in the manifest's order."""
    others = [row for row in earlier if row["benchmark"] != name]
    if variants is not None and name in BY_VARIANT:
        order = manifest.list_models()
        stay = [row for row in earlier if row["benchmark"] == name and row["variant"] not in variants]
        taken = sorted(stay + taken, key=lambda row: order.index(row["variant"]))
    return others + taken


def _one_or_more(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not {text}")
    return int(text)


def parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Makes the parser of the options that all benchmarks share."""
    every = (
        f"  {name:<11} {', '.join([what, *(f'--{need}' for need in needs)])}"
        for name, (what, needs) in BENCHMARKS.items()
    )
    made = argparse.ArgumentParser(
        prog,
        description=description,
        epilog="\n".join(["The benchmarks, and what they need:", *every]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--images", type=Path, help="folder with one folder per WordNet id, or val/ with these")
    made.add_argument("--train", type=Path, help="folder with train/ and val/, one folder per class in each")
    made.add_argument("--checkpoint", type=Path, help="a network trained on these at 128 pixels")
    made.add_argument("--variants", nargs="+", metavar="VARIANT", help="cost, load and classify: only these")
    made.add_argument("--threads", type=_one_or_more, default=2, help="cores to use, with one thread each (2)")
    made.add_argument(
        "--rounds", type=_one_or_more, default=3, help="measurements of each method, in turns; the median counts (3)"
    )
    made.add_argument("--json", type=Path, help="write the figures to this file, instead of printing tables")
    return made
