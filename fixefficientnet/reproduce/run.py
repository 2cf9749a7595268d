"""One fine-tuning run, from a network and images to a delta and a report."""

import contextlib
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from fixefficientnet import delta
from fixefficientnet._internal import input_size, processes, records
from fixefficientnet._internal.checkpoint_file import listed
from fixefficientnet._internal.files import write_atomically
from fixefficientnet.classes import IMAGENET, are_imagenets, turned_upright
from fixefficientnet.data.dataset import ImageDataset, follow, open_dataset
from fixefficientnet.data.folders import VALIDATION_SHARE
from fixefficientnet.errors import (
    DataError,
    EvaluationError,
    FixEfficientNetError,
    MissingFileError,
    NotFiniteError,
    RecipeError,
    RunError,
)
from fixefficientnet.evaluation import cost
from fixefficientnet.evaluation import journal as journals
from fixefficientnet.evaluation.journal import Journal
from fixefficientnet.evaluation.loop import EvaluationLoop
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.hub import sha256_of
from fixefficientnet.manifest import TestTime
from fixefficientnet.models import DELTA, DESCRIPTION, MODEL, Description
from fixefficientnet.reproduce import cached, gate, hours, network, online, probe, report
from fixefficientnet.reproduce.checkpoints import Checkpoints
from fixefficientnet.reproduce.folder import CHECKPOINT, EVALUATIONS, LAST, OURS, PROGRESS, RECIPE, Identity
from fixefficientnet.reproduce.log import Log
from fixefficientnet.reproduce.network import Network
from fixefficientnet.reproduce.online import Tuned
from fixefficientnet.reproduce.options import Data, Options
from fixefficientnet.reproduce.recipe import Recipe, Subject
from fixefficientnet.reproduce.report import PairedTest, PaperFigures, Report, Selection
from fixefficientnet.reproduce.session import Session


@dataclass(frozen=True)
class Job:
    """One run: what is tuned, how, on what, and where it is kept.

    Attributes:
        subject: The network.
        recipe: The recipe, resolved.
        data: The images.
        folder: Folder of the run.
        checkpoint: File of the weights to start from; None: those that the recipe names.
        features: Folder for cached features that stay, for other runs of the same network and images to use; None:
            a folder in the run's, deleted on success.
        options: What does not decide the result.
        console: Where the run prints; None: to the terminal.
    """

    subject: Subject
    recipe: Recipe
    data: Data
    folder: Path
    checkpoint: Path | None = None
    features: Path | None = None
    options: Options = field(default_factory=Options)
    console: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class _Inputs:
    """What a job opens.

    Attributes:
        train: The split to train on, numbered as the network's classes.
        validation: The split to measure on, numbered alike.
        untuned: The network, for images of the train size.
        model: The network, for images of the size that the stage trains at; often the same one.
        recipe: The recipe on these.
    """

    train: ImageDataset
    validation: ImageDataset
    untuned: nn.Module
    model: nn.Module
    recipe: Recipe

    def identity(self, world: int) -> Identity:
        """The identity of a run on these in so many processes."""
        network = delta.fingerprint(self.model.state_dict())
        processes = world if self.recipe.method == "online" else None
        return Identity(self.recipe, self.train.fingerprint(), self.validation.fingerprint(), network, processes)


def run(job: Job, accelerator: Accelerator) -> Report:
    """Tunes, measures and reports; continues where a killed run of the same recipe was.

    Raises:
        DataError: The images cannot be used.
        CheckpointError: A checkpoint is damaged or of another network.
        RunError: The folder is in use or holds another run; the untuned network is not as accurate as timm publishes
            it; the loss is NaN; no memory or disk.
        RecipeError: The base stage is to validate other than after each epoch.
        Interrupted: A signal asked to stop; the same call continues.
    """
    if job.recipe.stage == "base" and job.options.val_interval != 1:
        raise RecipeError("The base stage keeps the best epoch, and so validates each: leave --val-interval out.")
    if job.options.auto_batch:
        job = replace(job, recipe=halved_before(job.recipe, job.folder))
    while True:
        try:
            return _run(job, accelerator)
        except FixEfficientNetError:
            raise
        except OSError as error:
            where = error.filename or "Writing"
            raise RunError(f"{where}: {error.strerror}. Once that is fixed, the same command continues.") from error
        except (RuntimeError, MemoryError) as error:
            job = _after_failure(job, error, accelerator)
        accelerator.free_memory()


def _after_failure(job: Job, error: Exception, accelerator: Accelerator) -> Job:
    """The job with half the batch, where memory ran out and the job may do that; else raises."""
    recipe = job.recipe
    if str(error).startswith("DataLoader worker"):
        raise RunError(
            f"A loading process ended by itself ({error}), usually because memory ran out. Try fewer (-j), or smaller "
            "batches (--batch-size, --forward-batch). The same command continues."
        ) from error
    out_of_memory = isinstance(error, MemoryError) or should_reduce_batch_size(error)
    if not out_of_memory:
        raise error
    smaller = _halved(recipe)
    # other processes may be waiting for this one, and what was trained so far is worth more than a retry
    alone = accelerator.num_processes == 1 and not (job.folder / CHECKPOINT).exists()
    if not job.options.auto_batch or smaller is None or not alone:
        raise RunError(
            f"Out of memory with batch_size {recipe.batch_size} and forward_batch {recipe.forward_batch}. Set smaller "
            "ones (--batch-size, --forward-batch), or try --auto-batch, which halves both where one process has "
            "trained nothing yet. --plan estimates what a run takes."
        ) from error
    return replace(job, recipe=smaller, options=replace(job.options, overwrite=True))


def halved_before(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe as an earlier call of the same command, with `auto_batch`, halved it; unchanged, if none did."""
    try:
        saved = Identity.load(folder / RECIPE).recipe
    except MissingFileError:
        return recipe
    smaller: Recipe | None = recipe if recipe.upright is not None else replace(recipe, upright=saved.upright)
    while smaller is not None:
        if saved == smaller:
            return smaller
        smaller = _halved(smaller)
    return recipe


def _halved(recipe: Recipe) -> Recipe | None:
    if recipe.batch_size == 1 and recipe.forward_batch == 1:
        return None
    return replace(recipe, batch_size=max(1, recipe.batch_size // 2), forward_batch=max(1, recipe.forward_batch // 2))


def _run(job: Job, accelerator: Accelerator) -> Report:
    log = Log(job.folder, enabled=accelerator.is_main_process, console=job.console)
    workers = processes.default_workers() if job.options.workers is None else job.options.workers
    session = Session(accelerator, job.folder, log, workers, job.options.max_unreadable)
    with session.locked(job.folder):
        try:
            inputs = session.together(lambda: _open(job, session.world))
            job = replace(job, recipe=inputs.recipe)
            identity = inputs.identity(session.world)
            finished = session.on_main(lambda: _claim(session, job, identity))
            if finished is not None:
                session.on_main(lambda: _complete(job.folder, finished, inputs.validation))
                log.say(f"{job.folder} is finished already; --overwrite does it again.")
                return finished
            with hours.counted(job.folder) if session.main else contextlib.nullcontext():
                return _tune(session, job, inputs, identity)
        finally:
            log.close()
            accelerator.free_memory()


def _open(job: Job, world: int) -> _Inputs:
    data, recipe = job.data, job.recipe

    def opened(split: str, num_classes: int | None, labels: str | None = None) -> ImageDataset:
        root, exclude = data.data_root, data.exclude
        return open_dataset(data.data, split, root=root, num_classes=num_classes, labels=labels, exclude=exclude)

    described = Description.load(job.checkpoint) if job.checkpoint else None
    named = described.classes if described else ()
    tuned = recipe.stage == "fixres"  # and measured untuned: the classes must be the network's
    expected = IMAGENET if tuned and (job.checkpoint is None or are_imagenets(named)) else None
    train = opened(data.train_split, expected)
    if expected is None and (train.imagenet or (tuned and not named)):
        expected = IMAGENET if train.imagenet else len(train.classes) or None
        train = opened(data.train_split, expected)
    validation = opened(data.val_split, expected if train.imagenet else None, data.labels)
    num_classes = len(train.classes) or expected or IMAGENET
    weights: str | Path = job.checkpoint or recipe.weights
    size = recipe.train_size
    model = network.load(job.subject, weights, num_classes=num_classes, seed=recipe.seed, size=size)
    found = int(getattr(model, "num_classes", num_classes))
    if found != num_classes:
        lacking = sorted(set(named) - set(train.classes))
        lacks = f" There is no folder for {listed(lacking)}." if lacking else ""
        raise DataError(f"{train.name} has {num_classes} classes, the network of {weights} {found}.{lacks}")
    if tuned and not train.imagenet:
        train = follow(train, named, str(job.checkpoint))
    validation = follow(validation, train.classes, train.name)
    # what it cannot do is said before anything is trained
    cost.gmacs(recipe.backbone.partition(".")[0], {size, recipe.work_size}, num_classes)
    if recipe.method == "online" and online.steps_of_epoch(recipe, len(train), world)[1] == world:
        network.check_single_image(network.without_weights(recipe, num_classes))
    upright = turned_upright(num_classes) if recipe.upright is None else recipe.upright
    train, validation = replace(train, upright=upright), replace(validation, upright=upright)
    untuned, model = (input_size.at_size(model, each) for each in (size, recipe.work_size))
    return _Inputs(train, validation, untuned, model, replace(recipe, upright=upright))


def _claim(session: Session, job: Job, identity: Identity) -> Report | None:
    """Makes the folder this run's, or gives the report of a finished run; refuses the folder of another run."""
    folder = job.folder
    if job.options.overwrite:
        for path in folder.iterdir():
            if path.name in OURS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    file = folder / RECIPE
    saved = _checkpoints(session, job, identity).saved_identity()
    earlier = {file: Identity.load(file) if file.exists() else None}
    earlier[folder / CHECKPOINT] = Identity.of(saved, folder / CHECKPOINT) if saved is not None else None
    weights = [DELTA, probe.FILENAME] * (job.recipe.stage == "fixres") + [MODEL] * _keeps_network(job.recipe)
    finished = all((folder / name).exists() for name in (report.FILENAME, report.TEXT, *weights))
    begun = any((folder / name).exists() for name in PROGRESS)
    for path, there in earlier.items():
        if there is None or not begun:
            continue
        if finished or saved is None:  # nothing is trained, or all of it anew: any number of processes may do that
            there = replace(there, processes=identity.processes)
        if found := there.differences(identity):
            raise RunError(
                f"{path} is of another run:\n  "
                + "\n  ".join(found)
                + "\nMove this folder away, choose another one (--experiment, --output), or start anew in it with "
                "--overwrite."
            )
    if finished:
        return Report.load(folder)
    identity.dump(file)
    return None


def _checkpoints(session: Session, job: Job, identity: Identity) -> Checkpoints:
    path, options = session.folder / CHECKPOINT, job.options
    seconds = options.checkpoint_minutes * 60
    return Checkpoints(path, records.to_json(identity), options.checkpoint_steps, seconds, enabled=session.main)


def _tune(session: Session, job: Job, inputs: _Inputs, identity: Identity) -> Report:
    recipe, train, validation = job.recipe, inputs.train, inputs.validation

    def prepared(model: nn.Module) -> Network:
        placed = model.to(session.accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network.prepare(placed, recipe)

    net = prepared(inputs.model)
    model = net.model
    original = {name: tensor.detach().clone() for name, tensor in net.head.select(model.state_dict()).items()}
    _introduce(session, net, train, validation)
    if job.options.compile:
        network.compile_frozen(net)
    measurements = Measurements(session, net, validation)
    if recipe.stage == "fixres":
        untuned = model if inputs.untuned is inputs.model else prepared(inputs.untuned).model
        _measure_untuned(session, job, measurements, untuned, validation.name)
    checkpoints, interval = _checkpoints(session, job, identity), job.options.val_interval
    test = recipe.test if recipe.stage == "fixres" else replace(recipe.base, crop_pct=recipe.crop_pct)
    if recipe.method == "cached":
        features = job.features or job.folder / "features"
        between = (validation, interval) if interval else None
        tuned = cached.tune(session, net, train, checkpoints, features, between)
    else:
        measured = (lambda model: measurements.top1(test, model), interval) if interval else None
        tuned = online.tune(session, net, train, checkpoints, measured)
    net.model.eval()
    measurements.take("tuned" if recipe.stage == "fixres" else "trained", test)
    finished = session.on_main(lambda: _finish(session, job, inputs, net, original, measurements, tuned))
    if gain := finished.gain:
        session.log.say(f"  against the best untuned of this run ({gain.untuned.size}): {gain.test}")
        if gain.warning:
            session.log.say(f"Warning: {gain.warning}")
    if finished.selection:
        session.log.say(str(finished.selection))
    if count := len(finished.unreadable):
        images = "image" if count == 1 else "images"
        session.log.say(f"{count} {images} could not be read, and left out: report.md names them.")
    if count := len(finished.unturned):
        session.log.say(
            f"{count} of the images have an EXIF orientation and were not turned (--upright turns them): report.md "
            "names them."
        )
    return finished


def _measure_untuned(session: Session, job: Job, measurements: "Measurements", untuned: nn.Module, images: str) -> None:
    """Takes both figures of the untuned network; the first is held against timm's."""
    measurements.take("base", job.recipe.base, untuned)
    if not job.options.no_check_base:
        base = measurements.found["base"]
        if said := session.on_main(lambda: gate.check(job.subject, job.recipe, base, images)):
            session.log.say(f"  {said}")
    measurements.take("base_at_test", job.recipe.test)


def _finish(
    session: Session,
    job: Job,
    inputs: _Inputs,
    net: Network,
    original: Mapping[str, torch.Tensor],
    measurements: "Measurements",
    tuned: Tuned,
) -> Report:
    """Writes weights, probe, curve and report."""
    folder, recipe, variant = job.folder, job.recipe, job.subject.variant
    measured = {name: evaluation.summary() for name, evaluation in measurements.found.items()}
    classes = int(getattr(net.model, "num_classes", 0))
    finished = Report(
        variant=recipe.variant,
        backbone=recipe.backbone,
        recipe=recipe,
        train_data=inputs.train.name,
        validation_data=inputs.validation.name,
        train_images=len(inputs.train),
        classes=tuple(inputs.train.classes),
        processes=session.world,
        forwards=tuned.forwards,
        unreadable=tuple(sorted(set().union(*session.unreadable.values()))),
        unturned=tuple(sorted(set().union(*session.unturned.values()))),
        left_out=tuple(f"{one.name}: {name}" for one in (inputs.train, inputs.validation) for name in one.left_out),
        excluded=(inputs.train.excluded or 0) + (inputs.validation.excluded or 0),
        measured=measured,
        paired=PairedTest.all_of(measurements.found),
        paper=PaperFigures.beside(variant, recipe, measured, classes),
        selection=Selection(tuned.best.epoch, tuned.epochs, tuned.best.top1, tuned.best.latest) if tuned.best else None,
    )
    if recipe.stage == "fixres":
        finished = replace(finished, delta_sha256=_save_delta(job, net.model, original, finished))
        evaluation = measurements.found["tuned"]
        probe.save(probe.take(net.model, inputs.validation, evaluation, recipe.test), folder / probe.FILENAME)
    if _keeps_network(recipe):
        written = _save_network(folder / MODEL, net.model.state_dict(), finished, inputs.train.part_of)
        finished = replace(finished, model_sha256=written)
    (folder / LAST).unlink(missing_ok=True)
    if tuned.last:
        _save_network(folder / LAST, {**net.model.state_dict(), **tuned.last}, finished, inputs.train.part_of)
    title = f"{recipe.variant}, {recipe.stage} stage, {recipe.method}"
    report.curve(session.log.lines(), measured, folder / "curve.png", title)
    page = report.as_html(finished, measurements.found, inputs.validation)
    write_atomically(folder / report.PAGE, page)
    finished.dump(folder)
    shutil.rmtree(folder / "features", ignore_errors=True)
    return finished


def _complete(folder: Path, finished: Report, validation: ImageDataset) -> None:
    """Removes what a finished run needs no more, as it may have been killed before it did.

    Where its page is not there, it is written from the evaluations that the run keeps.
    """
    shutil.rmtree(folder / "features", ignore_errors=True)
    if (folder / report.PAGE).exists():
        return
    with contextlib.suppress(EvaluationError):  # these were deleted: the run is finished all the same
        found = {name: journals.load(folder / EVALUATIONS / name) for name in finished.measured}
        write_atomically(folder / report.PAGE, report.as_html(finished, found, validation))


def _keeps_network(recipe: Recipe) -> bool:
    """Whether a run writes the whole network: where it is in no repository on the Hub."""
    return recipe.stage == "base" or recipe.weights != "pretrained"


def _save_delta(job: Job, model: nn.Module, original: Mapping[str, torch.Tensor], finished: Report) -> str:
    """Writes the delta; gives the sha256 of its file, in hex."""
    variant = job.subject.variant
    kept = ("size", "crop_pct", "images", "top1", "top5")
    measured = {name: {key: getattr(row, key) for key in kept} for name, row in finished.measured.items()}
    tuned = delta.extract(
        model,
        base=original,
        variant=job.subject.name,
        backbone=job.subject.backbone,
        license=variant.backbone.license if variant and job.checkpoint is None else "unknown",
        recipe=records.to_json(job.recipe),
        measured=measured,
    )
    return delta.save(tuned, job.folder / DELTA)


def _save_network(path: Path, weights: Mapping[str, torch.Tensor], finished: Report, part_of: str | None) -> str:
    """Writes a whole network; gives the sha256 of its file, in hex."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    for name, tensor in tensors.items():
        if name.endswith(".num_batches_tracked"):  # without effect, and not kept when a run is interrupted
            tensors[name] = torch.zeros_like(tensor)
    recipe = finished.recipe
    described = Description(
        recipe.backbone,
        recipe.stage,
        recipe.train_size,
        recipe.test_size,
        recipe.crop_pct,
        recipe.interpolation,
        recipe.mean,
        recipe.std,
        finished.classes,
        bool(recipe.upright),
        part_of,
    )
    metadata = {DESCRIPTION: described.sealed(tensors).dumps()}
    written = safetensors.torch.save(tensors, metadata)
    write_atomically(path, written)
    return hashlib.sha256(written).hexdigest()


def _introduce(session: Session, net: Network, train: ImageDataset, validation: ImageDataset) -> None:
    recipe = net.recipe
    session.log.say(
        f"{recipe.variant}: {recipe.stage} stage, {recipe.method}, tune {recipe.tune}, at {recipe.work_size} pixels; "
        f"{len(train):,} images to train on, {len(validation):,} to measure on; {session.world} "
        f"{'process' if session.world == 1 else 'processes'} on {session.accelerator.device.type}"
    )
    if train.part_of:
        session.log.say(
            f"no train/ and val/: about {VALIDATION_SHARE:.0%} of each class's images validate, the same in each run"
        )
    if train.numbering:
        session.log.say(train.numbering)
    for images in (train, validation):
        if images.excluded is not None:
            session.log.say(f"{images.name}: {images.excluded:,} excluded")
        if images.left_out:
            some = f"{len(images.left_out):,} left out by the endings of their names: {listed(images.left_out)}"
            session.log.say(f"{images.name}: {some}")
    session.log.say(f"head: {net.described}")
    count = sum(tensor.numel() for tensor in net.moving.values())
    names = ", ".join(net.moving) if len(net.moving) <= 6 else f"{len(net.moving)} tensors"
    session.log.say(f"changes {count:,} values: {names}")
    if recipe.method == "online":
        steps, batch = online.steps_of_epoch(recipe, len(train), session.world)
        if left := len(train) - steps * batch:
            session.log.say(f"batches of {batch}: {left:,} images, others each time, are left out of each epoch")


class Measurements:
    """The evaluations of a run, kept on disk as they go, so that a run that continues does not repeat them."""

    def __init__(self, session: Session, net: Network, dataset: ImageDataset):
        self._session, self._net, self._dataset = session, net, dataset
        self.found: dict[str, Evaluation] = {}

    def take(self, name: str, test: TestTime, model: nn.Module | None = None) -> None:
        """Evaluates the network (or one for images of another size) as it is now, as far as that is not done yet.

        The name is one in `report.TITLES`.
        """
        session = self._session
        journal = Journal(session.folder / EVALUATIONS / name, session.rank)
        title = f"{report.TITLES[name]} ({test.size})"
        found = self.found[name] = self._evaluate(title, test, journal, model or self._net.model)
        low, high = found.interval
        with session.alike():
            session.count_unreadable(self._dataset.name, list(found.unreadable.values()), len(self._dataset))
        session.count_unturned(self._dataset.name, map(self._dataset.image_path, found.unturned))
        session.log.say(
            f"  {report.TITLES[name]} ({found.size}): top-1 {found.top1:.2f} (95%: {low:.2f} to {high:.2f}), "
            f"top-5 {found.top5:.2f}, of {found.images:,} images"
        )

    def top1(self, test: TestTime, model: nn.Module) -> float | None:
        """Top-1 of a network as it is now, in per cent, kept nowhere; None where its logits are NaN or infinite."""
        try:
            return self._evaluate(f"Validation ({test.size})", test, None, model).top1
        except NotFiniteError:  # the next step's loss will say so
            return None

    def _evaluate(self, title: str, test: TestTime, journal: Journal | None, model: nn.Module) -> Evaluation:
        session, recipe = self._session, self._net.recipe
        with session.log.bar(title, len(self._dataset)) as bar:
            return EvaluationLoop(
                model,
                self._dataset,
                test,
                batch_size=recipe.forward_batch,
                shard=recipe.shard,
                workers=session.workers,
                journal=journal,
                accelerator=session.accelerator,
                autocast=False,  # the weights are float32, and their users compute in it
                progress=bar,
            ).run()


def with_weights(choices: Mapping[str, Any], checkpoint: Path | None, *, pretrained: bool) -> dict[str, Any]:
    """Choices for a recipe (None: not chosen), with where its weights come from: a file, timm or nowhere.

    A checkpoint may tell the size that it was trained at.

    Raises:
        MissingFileError: There is no such checkpoint.
        DataError: The checkpoint cannot be read.
    """
    if checkpoint is None:
        return {**choices, "weights": "pretrained" if pretrained else "random"}
    described = Description.load(checkpoint)
    train_size = choices.get("train_size") or (described.train_size if described else None)
    try:
        return {**choices, "train_size": train_size, "weights": f"sha256:{sha256_of(checkpoint)}"}
    except OSError as error:
        raise DataError(f"--checkpoint {checkpoint} cannot be read: {error.strerror}.") from error
