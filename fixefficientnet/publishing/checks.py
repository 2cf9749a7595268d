"""A finished run, checked before anyone else gets it."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from fixefficientnet import delta, manifest, zoo
from fixefficientnet.delta import Delta
from fixefficientnet.errors import CheckpointError, PublishError
from fixefficientnet.evaluation import journal
from fixefficientnet.evaluation.paper import IMAGENET_NAME
from fixefficientnet.manifest import TestTime, Variant
from fixefficientnet.reproduce import probe
from fixefficientnet.reproduce.report import PAIRED, paired

DELTA, REPORT, RECIPE = "delta.safetensors", "report.json", "recipe.json"
_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Run:
    """A finished FixRes run of a variant, all of whose promises hold.

    Attributes:
        folder: Where it is.
        variant: The manifest's row.
        delta: What it tuned.
        data: The delta file's bytes.
        sha256: Of these.
        report: What it says of itself.
        test: The test-time preprocessing that it was tuned for.
        difference: Largest difference of its logits, computed again, relative to the largest.
        correct: How many of the probe's images are correct.
        probed: How many there are.
    """

    folder: Path
    variant: Variant
    delta: Delta
    data: bytes
    sha256: str
    report: dict[str, Any]
    test: TestTime
    difference: float
    correct: int
    probed: int

    @property
    def dataset(self) -> str:
        """What it was measured on, without places on this machine."""
        if self.comparable:
            return f"{IMAGENET_NAME}, validation"
        path = PurePath(str(self.report["data"]["validation"]))
        whose = 3 if path.parts[1:2] in (("home",), ("Users",)) else 1  # /home/NAME tells who it was
        return "/".join(path.parts[whose if path.is_absolute() else 0 :][-2:]) or "images of one's own"

    @property
    def filename(self) -> str:
        """Of its delta in a repository."""
        return f"{self.variant.key}.safetensors"

    @property
    def comparable(self) -> bool:
        """Whether it was measured on what the paper's figures are of."""
        return bool((self.report.get("paper") or {}).get("comparable"))

    def entry(self) -> dict[str, Any]:
        """What the repository tells about it, as JSON values."""
        report, paper = self.report, self.variant.paper
        return {
            "file": self.filename,
            "sha256": self.sha256,
            "bytes": len(self.data),
            "license": self.delta.license,
            "backbone": self.variant.backbone.name,
            "backbone_repository": self.variant.backbone.repository,
            "parameters": self.variant.parameters,
            "test": asdict(self.test),
            "dataset": self.dataset,
            "measured": report["measured"],
            PAIRED: report.get(PAIRED),
            "paper": asdict(paper) | {"comparable": self.comparable} if paper else None,
            "train_images": report["train_images"],
            "processes": report["processes"],
            "recipe": report["recipe"],
            "libraries": dict(self.delta.libraries),
        }


def check(folder: Path, *, cache_dir: str | os.PathLike[str] | None = None) -> Run:
    """Reads a run and holds what it says against what its files give.

    That is: it is complete; the delta has the recorded hash, is of the recorded recipe and of a variant that `create`
    builds; the evaluation's batches give the recorded accuracy; backbone and delta give the logits that the run left.

    Args:
        folder: The run's.
        cache_dir: Hub cache to use instead of the user's.

    Raises:
        PublishError: One of these does not hold.
        FixEfficientNetError: A file is damaged, or the backbone is not to be had.
    """
    report = _json(folder, REPORT)
    saved = _json(folder, RECIPE)
    recipe = report.get("recipe")
    if not isinstance(recipe, dict) or recipe.get("stage") != "fixres":
        raise PublishError(f"{folder} is no FixRes run: only these have a delta to publish.")
    key, known = str(report.get("variant")), manifest.load()
    if key not in known or recipe.get("weights") != "pretrained":
        raise PublishError(
            f"{folder} is a run of {key} that did not start from a variant's original weights, so no delta makes it of "
            "what is on the Hub. Its model.safetensors is the whole network: timm.models.push_to_hf_hub uploads that."
        )
    variant = known[key]
    missing = [name for name in ("delta_sha256", "data", "measured", "train_images", "processes") if name not in report]
    missing += [name for name in (DELTA, probe.FILENAME) if not (folder / name).is_file()]
    if missing:
        raise PublishError(
            f"{folder} lacks {', '.join(missing)}: the run is of an older release, or something was deleted. The "
            "command that made it, given again, makes what is missing; with --overwrite it starts anew."
        )
    whole = {"data": "validation", "measured": "tuned"}
    sound = all(isinstance(report[name], dict) and key in report[name] for name, key in whole.items())
    if not sound or not all(isinstance(row, dict) for row in report["measured"].values()):
        raise PublishError(f"{folder / REPORT} is damaged.")
    try:
        data = (folder / DELTA).read_bytes()
    except OSError as error:
        raise PublishError(f"{folder / DELTA} cannot be read: {error.strerror}.") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != report["delta_sha256"]:
        raise PublishError(
            f"{folder / DELTA} has the sha256 {sha256}, the run recorded {report['delta_sha256']}: the file was "
            "changed after the run."
        )
    tuned = delta.loads(data, source=str(folder / DELTA))
    delta.check_variant(tuned, key, folder / DELTA)
    if dict(tuned.recipe) != recipe or saved.get("recipe") != recipe:
        raise PublishError(f"{folder}: {DELTA}, {REPORT} and {RECIPE} tell of different recipes.")
    seen = saved.get("images")
    if isinstance(seen, dict) and seen.get("train") == seen.get("validation"):
        raise PublishError(f"{folder} was measured on the very images that it was trained on: that is no accuracy.")
    _check_evaluation(folder, report)
    test = delta.test_time(tuned, variant.test)
    difference, correct, probed = _check_logits(folder, variant, test, cache_dir)
    return Run(folder, variant, tuned, data, sha256, report, test, difference, correct, probed)


def _json(folder: Path, name: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise PublishError(f"{folder}: there is no such run.")
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PublishError(
            f"{folder} has no {name}: it is no finished run. The command that began it goes on."
        ) from None
    except (OSError, ValueError) as error:
        raise PublishError(f"{folder / name} is damaged: {error}.") from error
    if not isinstance(found, dict):
        raise PublishError(f"{folder / name} is damaged.")
    return found


def _check_evaluation(folder: Path, report: dict[str, Any]) -> None:
    """The recorded figures follow from the evaluations' own batches."""
    evaluations = {}
    for name, row in report["measured"].items():
        try:
            evaluations[name] = journal.load(folder / "evaluations" / name)
            found = evaluations[name].summary()
        except _DAMAGED as error:
            raise PublishError(f"{folder / 'evaluations' / name}.*.jsonl is damaged: {error!r}.") from error
        if wrong := [key for key in {**found, **row} if found.get(key) != row.get(key)]:
            raise PublishError(
                f"{folder}: the batches in evaluations/ give {wrong[0]} {found.get(wrong[0])} for {name!r}, {REPORT} "
                f"says {row.get(wrong[0])}."
            )
    if paired(evaluations) != report.get(PAIRED):
        raise PublishError(f"{folder}: the batches in evaluations/ give another {PAIRED} than {REPORT} says.")


def _check_logits(
    folder: Path, variant: Variant, test: TestTime, cache_dir: str | os.PathLike[str] | None
) -> tuple[float, int, int]:
    """Backbone and delta give the logits that the run left: relative difference, correct predictions, images."""
    left = probe.load(folder / probe.FILENAME)
    model = zoo.create(variant.key, folder / DELTA, cache_dir=cache_dir)
    try:
        found = probe.logits(model, left.images, test)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder / probe.FILENAME} is of another network: {error}") from error
    difference = probe.difference(left, found)
    correct = int((found.argmax(1) == left.labels).sum())
    if difference > probe.TOLERANCE:
        raise PublishError(
            f"{folder}: backbone and delta do not give the logits that the run left: they differ by up to "
            f"{difference:.2g} of the largest, {correct} instead of {left.correct} of {len(left)} images are correct. "
            "The run was of another backbone, or its files were changed."
        )
    return difference, correct, len(left)


def check_all(folders: list[Path], *, cache_dir: str | os.PathLike[str] | None = None) -> list[Run]:
    """Checks several runs, of different variants.

    Raises:
        PublishError: As `check`; or two are of the same variant.
    """
    runs: dict[str, Run] = {}
    for folder in folders:
        run = check(folder, cache_dir=cache_dir)
        if run.variant.key in runs:
            raise PublishError(f"{runs[run.variant.key].folder} and {folder} are both runs of {run.variant.key}.")
        runs[run.variant.key] = run
    return list(runs.values())
