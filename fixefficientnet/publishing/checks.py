"""A finished run, checked before anyone else gets it."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fixefficientnet import delta, manifest, zoo
from fixefficientnet._internal import records
from fixefficientnet.delta import Delta
from fixefficientnet.errors import CheckpointError, PublishError
from fixefficientnet.evaluation import journal
from fixefficientnet.evaluation.outcome import Evaluation, Summary
from fixefficientnet.hub import sha256_of
from fixefficientnet.manifest import TestTime, Variant
from fixefficientnet.models import DELTA, MODEL, LoadedModel, load
from fixefficientnet.publishing import card, index
from fixefficientnet.publishing.index import PublishedModel
from fixefficientnet.reproduce import probe, report
from fixefficientnet.reproduce.folder import EVALUATIONS, RECIPE, Identity
from fixefficientnet.reproduce.report import PairedTest, Report

_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""Errors that a journal of another shape leads to."""


@dataclass(frozen=True)
class ProbeCheck:
    """The probe's images, classified again with backbone and delta.

    Attributes:
        difference: Largest difference of the logits from the run's own, relative to its largest logit.
        correct: Number of images whose top-1 prediction is correct.
        images: Number of images.
    """

    difference: float
    correct: int
    images: int


@dataclass(frozen=True)
class CheckedRun:
    """A finished FixRes run of a variant whose report follows from its files.

    Attributes:
        folder: Folder of the run.
        variant: Row of the manifest.
        delta: The delta that the run tuned.
        data: Content of the delta's file.
        sha256: sha256 of the delta's file.
        report: The run's report.
        test: Test-time preprocessing that the delta was tuned for.
        probe: Result of the probe.
    """

    folder: Path
    variant: Variant
    delta: Delta
    data: bytes
    sha256: str
    report: Report
    test: TestTime
    probe: ProbeCheck

    def as_model(self, file: str) -> PublishedModel:
        """What a repository tells of the run, whose delta gets this name there."""
        return PublishedModel(
            file=file,
            sha256=self.sha256,
            bytes=len(self.data),
            license=self.delta.license,
            backbone=self.variant.backbone.name,
            backbone_repository=self.variant.backbone.repository,
            parameters=self.variant.parameters,
            test=self.test,
            dataset=card.dataset_name(self.report),
            measured=self.report.measured,
            paired=self.report.paired,
            paper=self.variant.paper,
            comparable=self.report.comparable,
            train_images=self.report.train_images,
            processes=self.report.processes,
            recipe=self.report.recipe,
            libraries=dict(self.delta.libraries),
            version=index.FIRST,
        )


def check(folder: Path) -> CheckedRun:
    """Reads a run and compares its report with its files.

    The run is complete; the delta has the recorded hash, and is of the recorded recipe and of a variant that `create`
    builds; the evaluations' batches give the recorded figures; backbone and delta give the logits that the run left.

    Raises:
        PublishError: One of these does not hold.
        FixEfficientNetError: A file is missing or damaged, or the backbone cannot be loaded.
    """
    found = Report.load(folder)
    variant = manifest.find(found.variant)
    if missing := [name for name in (DELTA, probe.FILENAME) if not (folder / name).is_file()]:
        raise PublishError(
            f"{folder} lacks {', '.join(missing)}: something was deleted. The command that made the run, given again, "
            "makes what is missing; with --overwrite it starts anew."
        )
    tuned, data, sha256 = _read_delta(folder, found)
    _check_recipe(folder, found, tuned)
    _check_images(folder, found)
    _check_evaluations(folder, found)
    test = delta.test_time(tuned, variant.test)
    probed = _check_logits(folder, zoo.create(variant.key, folder / DELTA), test)
    return CheckedRun(folder, variant, tuned, data, sha256, found, test, probed)


def check_model(folder: Path) -> tuple[LoadedModel, Report]:
    """Reads a run of any network and of either stage, to publish its model whole: as `check`, without a delta.

    Raises:
        PublishError: Its report does not follow from its files.
        FixEfficientNetError: A file is missing or damaged.
    """
    found = Report.load(folder)
    _check_weights(folder, found)
    _check_images(folder, found)
    _check_evaluations(folder, found)
    loaded = load(str(folder))
    if found.recipe.stage == "fixres":  # a base stage leaves no probe
        _check_logits(folder, loaded.network, loaded.test)
    return loaded, found


def has_delta_to_publish(folder: Path) -> bool:
    """Whether a finished run tuned a variant's original weights, which its delta makes it of.

    Raises:
        PublishError: There is no such folder.
        FixEfficientNetError: The run is not finished, or its report is damaged.
    """
    if not folder.is_dir():
        raise PublishError(f"{folder}: there is no such run.")
    found = Report.load(folder)
    tuned = found.recipe.stage == "fixres" and found.recipe.weights == "pretrained"
    return tuned and found.variant in manifest.load()


def check_all(folders: Sequence[Path]) -> list[CheckedRun]:
    """Checks several runs, and refuses two of the same variant by a PublishError."""
    runs: dict[str, CheckedRun] = {}
    for folder in folders:
        run = check(folder)
        if run.variant.key in runs:
            raise PublishError(f"{runs[run.variant.key].folder} and {folder} are both runs of {run.variant.key}.")
        runs[run.variant.key] = run
    return list(runs.values())


def _read_delta(folder: Path, found: Report) -> tuple[Delta, bytes, str]:
    """The delta, its file's content and sha256."""
    file = folder / DELTA
    with _readable(file):
        data = file.read_bytes()
    sha256 = _checked(file, hashlib.sha256(data).hexdigest(), found.delta_sha256)
    tuned = delta.loads(data, source=str(file))
    delta.check_variant(tuned, found.variant, file)
    return tuned, data, sha256


def _check_weights(folder: Path, found: Report) -> None:
    """The files of weights are those that the run wrote."""
    recorded = {DELTA: found.delta_sha256, MODEL: found.model_sha256}
    if not any(recorded.values()):
        raise PublishError(f"{folder / report.FILENAME} tells no sha256 of the weights: make the run with --overwrite.")
    for file, sha256 in ((folder / name, sha256) for name, sha256 in recorded.items() if sha256):
        with _readable(file):
            _checked(file, sha256_of(file), sha256)


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PublishError(f"{file} cannot be read: {error.strerror}.") from error


def _checked(file: Path, sha256: str, recorded: str | None) -> str:
    """The sha256 of a file, if it is the recorded one."""
    if sha256 != recorded:
        raise PublishError(
            f"{file} has the sha256 {sha256}, the run recorded {recorded}: the file was changed after the run."
        )
    return sha256


def _check_recipe(folder: Path, found: Report, tuned: Delta) -> None:
    """Report and delta have the same recipe, and it is one whose figures stand beside the paper's."""
    if dict(tuned.recipe) != records.to_json(found.recipe):
        raise PublishError(f"{folder}: {DELTA} and {report.FILENAME} have different recipes.")
    if found.recipe.upright:
        raise PublishError(
            f"{folder} was tuned and measured on images turned upright; published figures are, as the paper's, of "
            "images as they are stored. Run it without --upright."
        )


def _check_images(folder: Path, found: Report) -> None:
    """Report and recipe.json have the same recipe, and the run was not measured on its training images."""
    identity = Identity.load(folder / RECIPE)
    if identity.recipe != found.recipe:
        raise PublishError(f"{folder}: {report.FILENAME} and {RECIPE} have different recipes.")
    if identity.train_images == identity.validation_images:
        raise PublishError(f"{folder} was measured on the very images that it was trained on: that is no accuracy.")


def _check_evaluations(folder: Path, found: Report) -> None:
    """The recorded figures follow from the evaluations' own batches."""
    final = "tuned" if found.recipe.stage == "fixres" else "trained"
    if final not in found.measured or (found.measured.keys() - report.TITLES.keys()):
        raise PublishError(f"{folder / report.FILENAME} is damaged: it has figures of {', '.join(found.measured)}.")
    evaluations = {}
    for name, recorded in found.measured.items():
        evaluations[name], counted = _evaluation(folder / EVALUATIONS / name)
        for field in Summary.__slots__:
            if getattr(counted, field) != getattr(recorded, field):
                raise PublishError(
                    f"{folder}: the batches in {EVALUATIONS}/ give {field} {getattr(counted, field)} for {name!r}, "
                    f"{report.FILENAME} says {getattr(recorded, field)}."
                )
    if PairedTest.all_of(evaluations) != found.paired:
        raise PublishError(f"{folder}: the batches in {EVALUATIONS}/ give other paired tests than {report.FILENAME}.")


def _evaluation(path: Path) -> tuple[Evaluation, Summary]:
    try:
        evaluation = journal.load(path)
        return evaluation, evaluation.summary()
    except _DAMAGED as error:
        raise PublishError(f"{path}.*.jsonl is damaged: {error!r}.") from error


def _check_logits(folder: Path, model: nn.Module, test: TestTime) -> ProbeCheck:
    """The weights give the logits that the run left."""
    left = probe.load(folder / probe.FILENAME)
    try:
        found = probe.logits(model, left.images, test)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder / probe.FILENAME} is of another network: {error}") from error
    difference = probe.difference(left, found)
    correct = int((found.argmax(1) == left.labels).sum())
    if difference > probe.TOLERANCE:
        raise PublishError(
            f"{folder}: its weights do not give the logits that the run left: they differ by up to "
            f"{difference:.2g} of the largest, {correct} instead of {left.correct} of {len(left)} images are correct. "
            "The run was of another backbone, or its files were changed."
        )
    return ProbeCheck(difference, correct, len(left))
