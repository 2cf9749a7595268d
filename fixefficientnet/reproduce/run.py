"""One fine-tuning run, from a network and images to a delta and a report."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from fixefficientnet import delta, models
from fixefficientnet._internal.files import write_atomically
from fixefficientnet.data.dataset import TRAIN, VALIDATION, ImageDataset, follow, open_dataset
from fixefficientnet.errors import CheckpointError, DataError, RunError
from fixefficientnet.evaluation.journal import Journal
from fixefficientnet.evaluation.loop import predict_dataset
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.hub import sha256_of
from fixefficientnet.manifest import TestTime
from fixefficientnet.reproduce import cached, network, online, probe, report
from fixefficientnet.reproduce.checkpoints import Checkpoints
from fixefficientnet.reproduce.log import Log
from fixefficientnet.reproduce.network import Network
from fixefficientnet.reproduce.recipe import Recipe, Subject, differences
from fixefficientnet.reproduce.session import Session

DESCRIBED = ("backbone", "stage", "train_size", "test_size", "crop_pct", "interpolation", "mean", "std")
"""Of the recipe: what is kept in model.safetensors, with the names of the classes."""
CHECKPOINT = Path("checkpoint", "state.safetensors")
EVALUATIONS = "evaluations"


@dataclass(frozen=True)
class Data:
    """Where the images are.

    Attributes:
        name: A folder, or a name for timm's `create_dataset`.
        root: As timm's `root`.
        train_split: Name of the split to train on.
        val_split: Name of the split to measure on.
    """

    name: str
    root: str | None = None
    train_split: str = TRAIN
    val_split: str = VALIDATION


@dataclass(frozen=True)
class Options:
    """What does not decide the result.

    Attributes:
        folder: The run's.
        checkpoint: File of the weights to start from.
        workers: Loading processes per process.
        compile: Whether torch.compile goes over the network's frozen part.
        features: Folder for cached features that stays, for other runs of the same network and images to use;
            None: one in the run's, deleted on success.
        auto_batch: Whether running out of memory halves the batch.
        overwrite: Whether a run of another recipe in the folder is deleted.
        max_unreadable: Largest tolerated share of unreadable images.
        checkpoint_steps: Save after so many steps.
        checkpoint_minutes: Save after so many minutes.
    """

    folder: Path
    checkpoint: Path | None = None
    workers: int = 4
    compile: bool = False
    features: Path | None = None
    auto_batch: bool = False
    overwrite: bool = False
    max_unreadable: float = 0.01
    checkpoint_steps: int = 1000
    checkpoint_minutes: float = 10.0
    console: Any = field(default=None, compare=False)


def run(subject: Subject, recipe: Recipe, data: Data, options: Options, accelerator: Accelerator) -> dict[str, Any]:
    """Tunes, measures and reports; goes on where a killed run of the same recipe was.

    Args:
        subject: The network.
        recipe: How it is tuned.
        data: On what.
        options: How the run behaves.
        accelerator: On which devices.

    Returns:
        The report.

    Raises:
        DataError: The images cannot be used.
        CheckpointError: A checkpoint is damaged or of another network.
        RunError: The folder is in use or holds another run; the loss is NaN; no memory or disk.
        Interrupted: A signal asked to stop; the same call goes on.
    """
    if options.auto_batch:
        recipe = _halved_before(recipe, options.folder)
    while True:
        try:
            return _run(subject, recipe, data, options, accelerator)
        except (RuntimeError, MemoryError) as error:
            if str(error).startswith("DataLoader worker"):
                raise RunError(
                    f"A loading process ended by itself ({error}), as a rule for lack of memory. Try fewer (-j), or "
                    "smaller batches (--set batch_size=… --set forward_batch=…). The same command goes on."
                ) from error
            out_of_memory = isinstance(error, MemoryError) or should_reduce_batch_size(error)
            if isinstance(error, RunError) or not out_of_memory:
                raise
            smaller = _halved(recipe)
            # other processes may be waiting for this one, and what was trained so far is worth more than a retry
            alone = accelerator.num_processes == 1 and not (options.folder / CHECKPOINT).exists()
            if not options.auto_batch or smaller is None or not alone:
                raise RunError(
                    f"Out of memory with batch_size {recipe.batch_size} and forward_batch {recipe.forward_batch}. Set "
                    "smaller ones (--set batch_size=… --set forward_batch=…), or try --auto-batch, which halves both "
                    "where one process has trained nothing yet. --plan estimates what a run takes."
                ) from error
        accelerator.free_memory()
        options = replace(options, overwrite=True)
        recipe = smaller


def _halved_before(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe as an earlier call of the same command halved it; as it is, if none did."""
    saved = (_saved(folder / "recipe.json") or {}).get("recipe")
    smaller: Recipe | None = recipe
    while smaller is not None:
        if saved == json.loads(smaller.dumps()):
            return smaller
        smaller = _halved(smaller)
    return recipe


def _halved(recipe: Recipe) -> Recipe | None:
    if recipe.batch_size == 1 and recipe.forward_batch == 1:
        return None
    return replace(recipe, batch_size=max(1, recipe.batch_size // 2), forward_batch=max(1, recipe.forward_batch // 2))


def _run(subject: Subject, recipe: Recipe, data: Data, options: Options, accelerator: Accelerator) -> dict[str, Any]:
    folder = options.folder
    log = Log(folder, enabled=accelerator.is_main_process, console=options.console)
    session = Session(accelerator, folder, log, options.workers, options.max_unreadable)
    with session.locked(folder):
        try:
            train, validation, model = session.together(lambda: _open(data, subject, recipe, options))
            identity = {
                "recipe": asdict(recipe),
                "images": {"train": train.fingerprint(), "validation": validation.fingerprint()},
                "network": delta.fingerprint(model.state_dict()),
            }
            identity = json.loads(json.dumps(identity))
            finished = session.on_main(lambda: _claim(session, identity, recipe, options))
            if finished is not None:
                log.say(f"{folder} is finished already; --overwrite does it again.")
                return finished
            return _tune(session, subject, recipe, options, model, train, validation, identity)
        finally:
            log.close()
            accelerator.free_memory()


def _open(
    data: Data, subject: Subject, recipe: Recipe, options: Options
) -> tuple[ImageDataset, ImageDataset, nn.Module]:
    """Both splits, numbered as the network's classes, and the network."""
    if options.checkpoint is not None:
        expected: int | None = None
    else:
        expected = 1000 if recipe.stage == "fixres" else None
    train = open_dataset(data.name, data.train_split, root=data.root, num_classes=expected)
    if expected is None and train.imagenet:
        expected = 1000
        train = open_dataset(data.name, data.train_split, root=data.root, num_classes=expected)
    validation = open_dataset(
        data.name, data.val_split, root=data.root, num_classes=expected if train.imagenet else None
    )
    validation = follow(validation, train.classes, train.what)
    num_classes = len(train.classes) or expected or 1000
    weights: str | Path = recipe.weights if options.checkpoint is None else options.checkpoint
    model = network.load(subject, weights, num_classes=num_classes, seed=recipe.seed)
    found = int(getattr(model, "num_classes", num_classes))
    if found != num_classes:
        raise DataError(f"{train.what} has {num_classes} classes, the network of {weights} {found}.")
    return train, validation, model


def _claim(session: Session, identity: Mapping[str, Any], recipe: Recipe, options: Options) -> dict[str, Any] | None:
    """Makes the folder this run's. The report, if the run is finished; refuses another run's folder."""
    folder = session.folder
    if options.overwrite:
        for path in folder.iterdir():
            if path.name in _OURS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    file = folder / "recipe.json"
    for path, there in (
        (file, _saved(file)),
        (folder / "checkpoint", _checkpoints(session, {}, options).saved_identity()),
    ):
        if there is None or there == identity or not any((folder / name).exists() for name in _PROGRESS):
            continue
        differ = differences(there.get("recipe", {}), identity["recipe"])
        differ += [f"other {what}" for what in ("images", "network") if there.get(what) != identity[what]]
        raise RunError(
            f"{path} is of another run:\n  "
            + "\n  ".join(differ)
            + "\nChoose another folder with --experiment, or start anew in this one with --overwrite."
        )
    finished = _saved(folder / "report.json")
    weights = ["delta.safetensors", probe.FILENAME] if recipe.stage == "fixres" else ["model.safetensors"]
    results = ["report.md", *weights]
    if finished is not None and all((folder / name).exists() for name in results):
        return dict(finished)
    write_atomically(file, (json.dumps(identity, indent=2) + "\n").encode())
    return None


_PROGRESS = ("checkpoint", EVALUATIONS, "features", "log.jsonl", "report.json")
"""What a run leaves once it has done something."""
_OURS = (
    "checkpoint",
    "curve.png",
    "delta.safetensors",
    EVALUATIONS,
    "features",
    "log.jsonl",
    "model.safetensors",
    probe.FILENAME,
    "recipe.json",
    "report.json",
    "report.md",
    "tensorboard",
)
"""All that a run writes into its folder."""


def _saved(path: Path) -> Mapping[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Delete it, or start anew with --overwrite.") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is damaged. Delete it, or start anew with --overwrite.")
    return record


def _checkpoints(session: Session, identity: Mapping[str, Any], options: Options) -> Checkpoints:
    path = session.folder / CHECKPOINT
    seconds = options.checkpoint_minutes * 60
    return Checkpoints(path, identity, options.checkpoint_steps, seconds, enabled=session.main)


def _tune(
    session: Session,
    subject: Subject,
    recipe: Recipe,
    options: Options,
    model: torch.nn.Module,
    train: ImageDataset,
    validation: ImageDataset,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    folder, log, accelerator = session.folder, session.log, session.accelerator
    model = model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    net = network.prepare(model, recipe)
    original = {name: tensor.detach().clone() for name, tensor in net.head.select(model.state_dict()).items()}
    _introduce(session, net, recipe, train, validation)
    if options.compile:
        network.compile_frozen(net)
    measured = Measurements(session, net, validation, recipe)
    if recipe.stage == "fixres":
        measured.take("base", recipe.base)
        measured.take("base_at_test", recipe.test)
    checkpoints = _checkpoints(session, identity, options)
    if recipe.method == "cached":
        done = cached.tune(session, net, train, recipe, checkpoints, options.features or folder / "features")
    else:
        done = online.tune(session, net, train, recipe, checkpoints)
    model = net.model.eval()
    if recipe.stage == "fixres":
        measured.take("tuned", recipe.test)
    else:
        measured.take("trained", replace(recipe.base, crop_pct=recipe.crop_pct))

    def finish() -> dict[str, Any]:
        more = {
            "data": {"train": train.what, "validation": validation.what},
            "train_images": len(train),
            "processes": session.world,
            "classes": list(train.classes),
            "unreadable": sorted(set().union(*session.unreadable.values())),
            **done,
            "recipe": asdict(recipe),
        }
        classes = int(getattr(model, "num_classes", 0))
        built = report.build(recipe, subject.variant, measured.found, num_classes=classes, more=more)
        finished: dict[str, Any] = json.loads(json.dumps(built))  # as a later call reads it
        _save_weights(folder, subject, recipe, model, original, finished, own=options.checkpoint is not None)
        if recipe.stage == "fixres":
            probe.save(probe.take(model, validation, measured.found["tuned"], recipe.test), folder / probe.FILENAME)
        report.curve(log.lines(), folder / "curve.png", f"{recipe.variant}, {recipe.stage} stage, {recipe.method}")
        report.write(folder, finished, recipe)
        shutil.rmtree(folder / "features", ignore_errors=True)
        return finished

    done_report = session.on_main(finish)
    if count := len(done_report["unreadable"]):
        log.say(f"{count} images could not be read and were left out: report.md names them.")
    return done_report


def _save_weights(
    folder: Path,
    subject: Subject,
    recipe: Recipe,
    model: nn.Module,
    original: Mapping[str, torch.Tensor],
    finished: dict[str, Any],
    *,
    own: bool,
) -> None:
    """The delta of a FixRes stage (and its hash in the report); the whole network where it is on nobody's Hub."""
    if recipe.stage == "fixres":
        measured = {
            name: {key: row[key] for key in ("size", "crop_pct", "images", "top1", "top5")}
            for name, row in finished["measured"].items()
        }
        tuned = delta.extract(
            model,
            base=original,
            variant=subject.name,
            backbone=subject.backbone,
            license=subject.variant.backbone.license if subject.variant and not own else "unknown",
            recipe=asdict(recipe),
            measured=measured,
        )
        finished["delta_sha256"] = delta.save(tuned, folder / "delta.safetensors")
    if recipe.stage == "base" or recipe.weights != "pretrained":
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        for name, tensor in tensors.items():
            if name.endswith(".num_batches_tracked"):  # without effect, and not kept when a run is interrupted
                tensors[name] = torch.zeros_like(tensor)
        described = {key: finished["recipe"][key] for key in DESCRIBED} | {"classes": finished["classes"]}
        metadata = {models.DESCRIPTION: json.dumps(described)}
        write_atomically(folder / "model.safetensors", safetensors.torch.save(tensors, metadata))


def _introduce(session: Session, net: Network, recipe: Recipe, train: ImageDataset, validation: ImageDataset) -> None:
    size = recipe.train_size if recipe.stage == "base" else recipe.test_size
    session.log.say(
        f"{recipe.variant}: {recipe.stage} stage, {recipe.method}, tune {recipe.tune}, at {size} pixels; "
        f"{len(train):,} images to train on, {len(validation):,} to measure on; {session.world} "
        f"{'process' if session.world == 1 else 'processes'} on {session.accelerator.device.type}"
    )
    count = sum(tensor.numel() for tensor in net.moving.values())
    names = ", ".join(net.moving) if len(net.moving) <= 6 else f"{len(net.moving)} tensors"
    session.log.say(f"moves {count:,} values: {names}")
    if recipe.method == "online":
        steps, batch = online.steps_of_epoch(recipe, len(train), session.world)
        if left := len(train) - steps * batch:
            session.log.say(f"batches of {batch}: {left:,} images, others each time, sit out each epoch")


class Measurements:
    """Evaluations of a run, kept on disk as they go, so that a run that goes on does not repeat them."""

    def __init__(self, session: Session, net: Network, dataset: ImageDataset, recipe: Recipe):
        self._session, self._net, self._images, self._recipe = session, net, dataset, recipe
        self.found: dict[str, Evaluation] = {}

    def take(self, name: str, test: TestTime) -> None:
        """Measures the network as it is now, as far as that was not done."""
        session, recipe = self._session, self._recipe
        with session.log.bar(f"{report.TITLES[name]} ({test.size})", len(self._images)) as bar:
            found = self.found[name] = predict_dataset(
                self._net.model,
                self._images,
                test,
                batch_size=recipe.forward_batch,
                shard=recipe.shard,
                workers=session.workers,
                journal=Journal(session.folder / EVALUATIONS / name, session.rank),
                accelerator=session.accelerator,
                progress=bar,
            )
        low, high = found.interval
        with session.alike():
            session.count_unreadable(self._images.what, list(found.unreadable.values()), len(self._images))
        session.log.say(
            f"  {report.TITLES[name]} ({found.size}): top-1 {found.top1:.2f} (95%: {low:.2f} to {high:.2f}), "
            f"top-5 {found.top5:.2f}, of {found.images:,} images"
        )


def weights_of(checkpoint: Path | None, pretrained: bool) -> str:
    """What a recipe says of where its weights come from.

    Raises:
        DataError: The checkpoint cannot be read.
    """
    if checkpoint is None:
        return "pretrained" if pretrained else "random"
    try:
        return f"sha256:{sha256_of(checkpoint)}"
    except OSError as error:
        raise DataError(f"--checkpoint {checkpoint} cannot be read: {error.strerror}.") from error
