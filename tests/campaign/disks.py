"""Disks that are full, read-only, gone, slow of clock, or without locks; and names that few expect."""

import contextlib
import csv
import functools
import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import tiny

from campaign.ground import WORKS, Place, Undisturbed, Work, ground, place, undisturbed, unlike
from campaign.injected import LOCKING, REMOVE, WRITING, Fault
from campaign.trial import Attempt, Finding, Outcome, Trial
from fixefficientnet import hub

_ALL = 1_000_000
"""As many operations as there may be."""

Disk = Callable[[Place, Undisturbed, random.Random], contextlib.AbstractContextManager[Fault]]
"""What is wrong while the command runs."""


@contextlib.contextmanager
def _full_at_an_operation(there: Place, known: Undisturbed, rng: random.Random) -> Iterator[Fault]:
    at = rng.randint(1, known.operations)
    yield Fault(str(there.out), WRITING, at=at, times=_ALL, what=rng.choice(["ENOSPC", "EDQUOT", "EIO"]))


@contextlib.contextmanager
def _full_in_a_write(there: Place, known: Undisturbed, rng: random.Random) -> Iterator[Fault]:
    """A file can have so many bytes: its write fails in the middle, in libraries that are not Python's too."""
    yield Fault(str(there.out), limit=rng.randrange(1, max(known.sizes)))


@contextlib.contextmanager
def _small(there: Place, known: Undisturbed, rng: random.Random) -> Iterator[Fault]:
    """A file system of its own that is too small; where none can be mounted, a limit of the files' sizes."""
    size = rng.randrange(4096, max(8192, sum(known.sizes)))
    kept = there.folder / "kept"
    shutil.copytree(there.out, kept, symlinks=True)
    options = f"size={max(size, sum(path.stat().st_size for path in kept.rglob('*') if path.is_file()) + 8192)}"
    command = ["mount", "-t", "tmpfs", "-o", options, "campaign", str(there.out)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        yield Fault(str(there.out), limit=size)
        return
    try:
        shutil.copytree(kept, there.out, symlinks=True, dirs_exist_ok=True)
        yield Fault(str(there.out))
        shutil.rmtree(kept)
        shutil.copytree(there.out, kept, symlinks=True)
    finally:
        subprocess.run(["umount", "-l", str(there.out)], check=True)
    shutil.copytree(kept, there.out, symlinks=True, dirs_exist_ok=True)


@contextlib.contextmanager
def _rename_that_fails(there: Place, known: Undisturbed, rng: random.Random) -> Iterator[Fault]:
    what = rng.choice(["EIO", "ESTALE", "EBUSY", "EACCES", "EPERM"])
    yield Fault(str(there.out), ("os.rename",), at=rng.randint(1, max(1, known.operations // 5)), what=what)


@contextlib.contextmanager
def _removed_meanwhile(there: Place, known: Undisturbed, rng: random.Random) -> Iterator[Fault]:
    yield Fault(str(there.out), at=rng.randint(1, known.operations), what=REMOVE)


@contextlib.contextmanager
def _without_locks(there: Place, known: Undisturbed, rng: random.Random) -> Iterator[Fault]:
    yield Fault(str(there.out), LOCKING, at=1, times=_ALL, what=rng.choice(["ENOLCK", "EOPNOTSUPP", "EINVAL"]))


@contextlib.contextmanager
def _permission_denied(there: Place, known: Undisturbed, rng: random.Random) -> Iterator[Fault]:
    """The folder and what is in it can only be read, or what is in it alone."""
    inside = [path for path in there.out.rglob("*") if not path.is_symlink()]
    only_inside = any(path.is_dir() for path in inside) and rng.random() < 0.3  # files alone may still be replaced
    denied = inside if only_inside else [there.out, *inside]
    before = {path: path.stat().st_mode for path in denied}
    for path, mode in before.items():
        path.chmod(mode & ~0o222)
    try:
        yield Fault(str(there.out), unprivileged=True)
    finally:
        for path, mode in before.items():
            if path.exists():
                path.chmod(mode)


@contextlib.contextmanager
def _read_only(there: Place, known: Undisturbed, rng: random.Random) -> Iterator[Fault]:
    """All that makes or writes a file is refused, as a read-only file system does."""
    yield Fault(str(there.out), WRITING, at=1, times=_ALL, what="EROFS")


DISKS: dict[str, Disk] = {
    "full at a write": _full_at_an_operation,
    "full in a file's middle": _full_in_a_write,
    "too small": _small,
    "a rename that fails once": _rename_that_fails,
    "folder removed meanwhile": _removed_meanwhile,
    "without locks": _without_locks,
    "permission denied": _permission_denied,
    "read-only": _read_only,
}
_LEFT_OUT = {("too small", "downloads")}


@contextlib.contextmanager
def _faulty(disk: str, names: tuple[str, ...], shared: Path) -> Iterator[Attempt]:
    known: dict[str, list[Undisturbed]] = {}

    def attempt(rng: random.Random, folder: Path) -> Finding:
        work = WORKS[rng.choice([name for name in names if (disk, name) not in _LEFT_OUT])]
        if work.name not in known:
            own = shared / str(len(known))
            own.mkdir()
            known[work.name] = undisturbed(work, own)
        before = rng.choice(known[work.name])
        if before.folder:
            shutil.copytree(before.folder, folder / "out", symlinks=True)
        with place(work, folder) as there:
            finding = _one(DISKS[disk], there, before, rng)
        return Finding(finding.outcome, f"{work.name}{' over another' * bool(before.folder)}: {finding.said}")

    yield attempt


def _one(disk: Disk, there: Place, known: Undisturbed, rng: random.Random) -> Finding:
    with disk(there, known, rng) as fault:
        status, text = there.run(fault)
    there.out.mkdir(exist_ok=True)
    if bad := _wrong(there, known, status, text, whole=fault.what != REMOVE):
        return bad
    again, said = there.run()
    if again != 0:
        return Finding(Outcome.LOST, f"then, with a sound disk: {said[-1500:]}")
    if fault.what == REMOVE and known.folder:
        return Finding(Outcome.REFUSED if status else Outcome.SURVIVED)  # what it would have replaced is gone
    if said := unlike(there, known):
        return Finding(Outcome.LOST, f"then, with a sound disk: {said}; before: {text[-600:]}")
    return Finding(Outcome.REFUSED if status else Outcome.SURVIVED)


def _wrong(there: Place, known: Undisturbed, status: int | None, text: str, *, whole: bool) -> Finding | None:
    """What must not be after a command on a faulty disk; None if there is nothing like that."""
    if status is None:
        return Finding(Outcome.HUNG, text[-1000:])
    if "Traceback" in text or status not in (0, 1):
        return Finding(Outcome.CRASHED, f"status {status}: {text[-2500:]}")
    if status and "Error" not in text:
        return Finding(Outcome.CRASHED, f"no error is told: {text[-1000:]}")
    if status and str(there.out) not in text.partition("Error")[2].replace("\n", ""):
        return Finding(Outcome.CRASHED, f"the error names no file: {text[-1000:]}")
    if litter := [str(path) for path in there.out.rglob(".*") if path.name.endswith(".partial")]:
        return Finding(Outcome.LOST, f"litter: {litter}; {text[-600:]}")
    if said := unlike(there, known, between=bool(status) or not whole):
        return Finding(Outcome.LOST if status else Outcome.SILENT, f"status {status}: {said}; {text[-600:]}")
    return None


QUICK = (
    *("predict", "convert", "merge", "merge to a folder", "publish to a folder", "evaluate", "publish to the Hub"),
    *("downloads", "sweep"),
)
SLOW = ("fine-tuning online", "fine-tuning cached", "base stage", "export to TorchScript", "export to OpenVINO")


# --- names ----------------------------------------------------------------------------------------------------

_ODD = (
    "new\nline",
    "tab\tand space ",
    " leading",
    "-option",
    "--",
    "[bold]rich",
    "ü",
    "u\u0308",
    "\u202egnp",
    "smile \N{GRINNING FACE}",
    "'quoted' \"twice\"",
    "back\\slash",
    "a*b?[c]",
    "{brace}",
    "%s%d",
    "$HOME",
    "~",
    "<b>&amp;",
    os.fsdecode(b"no \xff utf-8"),
    "\x1b[31mred",
    "=1+1",
    "con",
    "x" * 200,
)


@contextlib.contextmanager
def _names(shared: Path) -> Iterator[Attempt]:
    """Folders of outputs, files of outputs, images and classes with odd names."""
    images = [path.read_bytes() for path in sorted((ground().images / "val").glob("*/*.jpg"))]

    def attempt(rng: random.Random, folder: Path) -> Finding:
        odd, other = rng.sample(_ODD, 2)
        out = folder / odd
        there = Place(
            _named(rng.choice(["predict", "convert", "merge", "merge to a folder", "publish", "run"]), other), out
        )
        status, text = there.run()
        if status != 0 or "Traceback" in text:
            return Finding(Outcome.CRASHED, f"{odd!r}, {other!r}: {there.work.name}: {status}: {text[-1500:]}")
        made = [path for path in there.out.rglob("*") if path.is_file()]
        if not made or not any(other in str(path) for path in made):
            return Finding(Outcome.LOST, f"{odd!r}, {other!r}: {there.work.name}: {made}")
        return Finding(Outcome.SURVIVED)

    def _named(name: str, odd: str) -> Work:
        def arguments(out: Path) -> list[str]:
            target = out / odd
            if name == "predict":
                source = out.parent / "images" / odd
                source.mkdir(parents=True)
                (source / f"{odd[:100]}.jpg").write_bytes(images[0])
                return ["predict", str(source), "--model", str(ground().run), "-o", f"{target}.csv"]
            if name == "convert":
                whole = str(ground().folder / "whole.pth")
                return ["convert", whole, "--variant", "b0", "-o", f"{target}.safetensors"]
            if name == "publish":
                return ["publish", str(ground().run), "--repo", "org/name", "--to", str(target)]
            if name == "run":
                data = out.parent / "data"
                for split in ("train", "val"):
                    for number, one in enumerate((odd[:100], "b", "c")):
                        (data / split / one).mkdir(parents=True)
                        (data / split / one / f"{odd[:100]}.jpg").write_bytes(images[3 * number + (split == "val")])
                place = ["--data", str(data), f"--output={out}", f"--experiment={odd}"]
                small = ["--stage", "base", "--no-pretrained", "-j", "0", "--epochs", "1", "--batch-size", "2"]
                return ["reproduce", *tiny.NETWORK, *place, *small, "--train-size", "32", "--test-size", "48"]
            ending = ".safetensors" if name == "merge" else ""
            return ["merge", "b0", "--delta", str(ground().run), "-o", f"{target}{ending}"]

        return Work(name, arguments)

    yield attempt


@contextlib.contextmanager
def _long(shared: Path) -> Iterator[Attempt]:
    """Paths of 4,000 characters and more, of which no system makes files."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        length = rng.choice([300, 4000, 4096, 5000])
        name = "/".join(["x" * rng.choice([50, 200, 300])] * 200)[:length].rstrip("/")
        work = WORKS[
            rng.choice(["predict", "convert", "merge", "merge to a folder", "publish to a folder", "evaluate"])
        ]
        there = Place(work, folder)
        status, text = there.run(arguments=work.arguments(there.out / name))
        if status is None or "Traceback" in text or (status and "Error" not in text) or status > 2:
            return Finding(Outcome.CRASHED, f"{work.name}, {length}: status {status}: {text[-2000:]}")
        made = [path for path in there.out.rglob("*") if path.is_file()]
        if status and [path for path in made if "evaluations" not in str(path)]:
            return Finding(Outcome.LOST, f"left: {made}")
        return Finding(Outcome.REFUSED if status else Outcome.SURVIVED)

    yield attempt


@contextlib.contextmanager
def _same_but_for_case(shared: Path) -> Iterator[Attempt]:
    """Classes `Cat` and `cat`: whatever is written of them is told apart, and no file is named after a class."""

    def attempt(rng: random.Random, folder: Path) -> Finding:
        classes = rng.choice([("Cat", "cat", "dog"), ("a", "A", "ä"), ("\u00fc", "u\u0308", "U")])
        data = tiny.make_data(folder / "data", classes, train=2, val=2)
        arguments = [*tiny.NETWORK, "--data", str(data), "--stage", "base", "--no-pretrained", "-j", "0"]
        arguments += ["--epochs", "1", "--train-size", "32", "--test-size", "48", "--batch-size", "2"]
        there = Place(Work("run", lambda out: ["reproduce", *arguments, "--output", str(out)]), folder)
        status, text = there.run()
        if status != 0:
            return Finding(Outcome.CRASHED, text[-2000:])
        (made,) = there.out.iterdir()
        evaluate = ["evaluate", str(made), "--data", str(data), "-j", "0", "-o", str(folder / "evaluations")]
        evaluate += ["--per-class", str(there.out / "classes.csv"), "--html", str(there.out / "page.html")]
        status, text = there.run(arguments=evaluate)
        if status != 0:
            return Finding(Outcome.CRASHED, text[-2000:])
        rows = list(csv.DictReader((there.out / "classes.csv").open(encoding="utf-8")))
        found = sorted(row["name"] for row in rows)
        known = json.loads((made / "report.json").read_text())["classes"]
        lowered = [str(path.relative_to(folder / "out")).casefold() for path in there.out.rglob("*")]
        if found != sorted(classes) or sorted(known) != sorted(classes) or len({*lowered}) < len(lowered):
            return Finding(Outcome.SILENT, f"{found}, {known}, {lowered}")
        return Finding(Outcome.SURVIVED)

    yield attempt


@contextlib.contextmanager
def _clock_of_seconds(shared: Path) -> Iterator[Attempt]:
    """A cached file that is replaced by one of the same size, in the same second of the file system's clock."""

    fine = Path.stat

    def coarse(self: Path, *, follow_symlinks: bool = True) -> SimpleNamespace:
        found = fine(self, follow_symlinks=follow_symlinks)
        times = {name: int(getattr(found, name)) for name in ("st_mtime", "st_ctime", "st_atime")}
        more = {f"{name}_ns": second * 10**9 for name, second in times.items()}
        return SimpleNamespace(st_size=found.st_size, st_mode=found.st_mode, st_ino=found.st_ino, **times, **more)

    def attempt(rng: random.Random, folder: Path) -> Finding:
        path = folder / "models--o--r" / "snapshots" / "main" / "d.bin"
        path.parent.mkdir(parents=True)
        with mock.patch.object(Path, "stat", coarse):
            for _ in range(5):
                data = rng.randbytes(64)
                path.write_bytes(data)
                if rng.random() < 0.3:
                    hub._cached_sha256(path, folder)
                if hub._cached_sha256(path, folder) != hashlib.sha256(data).hexdigest():
                    return Finding(Outcome.SILENT, "the hash of what was there before")
        return Finding(Outcome.SURVIVED)

    yield attempt


def _disk(disk: str, names: tuple[str, ...], often: int, few: int = 0) -> Trial:
    prepare = functools.partial(_faulty, disk, names)
    kind = "quick commands" if names is QUICK else "long commands"
    return Trial(f"{disk}: {kind}", often, few, prepare, limit=600, isolated=False)


TRIALS = [
    _disk("full at a write", QUICK, 40),
    _disk("full at a write", SLOW, 20),
    _disk("full in a file's middle", QUICK, 24),
    _disk("full in a file's middle", SLOW, 12),
    _disk("too small", QUICK, 20),
    _disk("too small", SLOW, 8),
    _disk("a rename that fails once", QUICK, 24),
    _disk("a rename that fails once", SLOW, 12),
    _disk("folder removed meanwhile", QUICK, 20),
    _disk("folder removed meanwhile", SLOW, 10),
    _disk("without locks", QUICK, 12),
    _disk("without locks", SLOW, 5),
    _disk("permission denied", QUICK, 14),
    _disk("permission denied", SLOW, 5),
    _disk("read-only", QUICK, 12),
    _disk("read-only", SLOW, 5),
    Trial("odd names", 60, 2, _names, isolated=False),
    Trial("paths of 4,000 characters", 24, 1, _long, isolated=False),
    Trial("classes that differ by case", 6, 0, _same_but_for_case, isolated=False),
    Trial("a clock of seconds", 20, 5, _clock_of_seconds),
]
