"""Any model, by a name: its network, its classes, its test-time transform.

| name | model |
|---|---|
| `b4_ns` | a variant with its published FixRes weights (lite0, lite1, lite2: the backbone's) |
| `b4_ns:backbone`, `b4_ns:FILE`, `b4_ns:hf://…` | a variant with other weights, as `create`'s `pretrained` |
| `runs/b4_ns`, `…/delta.safetensors`, `…/model.safetensors` | what a fine-tuning run left |
| `timm/resnet50.a1_in1k` | any model of timm's, with its own weights |
| `timm/resnet50:FILE` | a timm network with a whole checkpoint of one's own, as any training script saved it |
| `hf-hub:org/name`, `local-dir:FOLDER` | a model as timm keeps it on the Hub, or in a folder such as `merge` writes |
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import safetensors
import timm
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from fixefficientnet import classes, delta, hub, manifest, zoo
from fixefficientnet._internal import checkpoint_file, input_size, records
from fixefficientnet._internal.checkpoint_file import listed
from fixefficientnet._internal.meta_device import without_weights
from fixefficientnet._internal.records import LEFT_OUT_IF_NONE, AboveZero, Share
from fixefficientnet.delta import Delta
from fixefficientnet.errors import (
    CheckpointError,
    DownloadError,
    EvaluationError,
    MissingFileError,
    UnknownVariantError,
    WeightsNotPublishedError,
)
from fixefficientnet.hub import HubFile
from fixefficientnet.manifest import INTERPOLATIONS, Interpolation, Pixels, Sha256, TestTime, Triple, Variant
from fixefficientnet.preprocessing import FastPreprocess, Preprocess

_logger = logging.getLogger(__name__)

TIMM = "timm/"
REPOSITORIES = ("hf-hub:", "hf_hub:", "local-dir:")
"""What the names of models begin with that timm reads from a repository or a folder, classes and all."""
DESCRIPTION = "fixefficientnet"
"""Key of a run's `Description` in the metadata of its model.safetensors."""
DELTA, MODEL = "delta.safetensors", "model.safetensors"
"""The files of a run's folder that hold what it tuned: the delta, or the whole network."""
CONFIG = "config.json"
"""The file that makes a folder a model of timm's."""
WEIGHTS_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin", ".tar"}


@dataclass(frozen=True, slots=True)
class Description:
    """A fine-tuning run's description of its network, in the metadata of model.safetensors.

    Attributes:
        backbone: timm's name of the network, with its tag.
        stage: "fixres", or "base" for the training before it, of the whole network at the train size.
        train_size: Size of the training images, in pixels.
        test_size: Size that FixRes tunes for, in pixels.
        crop_pct, interpolation, mean, std: As `TestTime` has them.
        classes: Names of the classes, by the network's index; empty if the dataset names none.
        upright: Whether training and evaluation turned images as their EXIF orientation says.
        part_of: Fingerprint of the folder whose automatic split was used; None where the splits had folders.
        sha256: Over the description and the network's tensors, see `sealed`; None where it was not taken.
    """

    backbone: str
    stage: Literal["fixres", "base"]
    train_size: Pixels
    test_size: Pixels
    crop_pct: Share
    interpolation: Interpolation
    mean: Triple
    std: tuple[AboveZero, AboveZero, AboveZero]
    classes: tuple[str, ...]
    upright: bool = False
    part_of: str | None = None
    sha256: Sha256 | None = field(default=None, metadata=LEFT_OUT_IF_NONE)

    def sealed(self, tensors: Mapping[str, Tensor]) -> "Description":
        """The same, with a sha256 over it and the network's tensors, so that no bit of them changes unnoticed."""
        plain = records.read(Description, records.to_json(replace(self, sha256=None)), "", EvaluationError)  # 1 is 1.0
        return replace(plain, sha256=delta.sha256_over(plain, tensors))

    @property
    def size(self) -> int:
        """The size that the weights are for, in pixels: that of the stage's training."""
        return self.train_size if self.stage == "base" else self.test_size

    @classmethod
    def load(cls, path: Path) -> "Description | None":
        """Reads the description of a model.safetensors; None: it has none. An EvaluationError names a wrong field."""
        checkpoint_file.check_there(path)
        try:
            with safetensors.safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get(DESCRIPTION)
        except (safetensors.SafetensorError, OSError):  # a legacy .pth, or damaged: reading its tensors will tell
            return None
        if text is None:
            return None
        where = f"{path}: its description in the metadata"
        try:
            document = records.decode(text)
        except ValueError as error:
            raise EvaluationError(f"{where} is not JSON: {error}") from error
        return records.read(cls, document, where, EvaluationError)

    @classmethod
    def beside(cls, path: Path) -> "Description | None":
        """Reads the description in the config.json beside a file; None where it has none. See `load` for the rest."""
        file = path.parent / CONFIG
        try:
            found = records.decode_file(file).get(DESCRIPTION)
        except (OSError, ValueError, AttributeError):  # timm says what is wrong with it
            return None
        return None if found is None else records.read(cls, found, f"{file}: {DESCRIPTION}", EvaluationError)

    @classmethod
    def of(cls, loaded: "LoadedModel") -> "Description | None":
        """The description of a model that a run made of a network of one's own; None for another."""
        if loaded.variant or loaded.train_size is None or loaded.upright is None:
            return None
        test, stage = loaded.test, "fixres" if loaded.tuned else "base"
        return cls(
            loaded.timm_name,
            cast(Any, stage),
            loaded.train_size,
            test.size,
            test.crop_pct,
            test.interpolation,
            test.mean,
            test.std,
            loaded.classes,
            loaded.upright,
            loaded.part_of,
        ).sealed(loaded.network.state_dict())

    def dumps(self) -> str:
        """The description as JSON text, the value of `DESCRIPTION` in the file's metadata."""
        return json.dumps(records.to_json(self))

    @property
    def test(self) -> TestTime:
        """The test-time preprocessing: at the test size, or at the train size before FixRes."""
        return TestTime(self.size, self.crop_pct, self.interpolation, self.mean, self.std)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its classes and its test-time preprocessing.

    Attributes:
        name: The name that it was opened by.
        network: The network: float32 [N, 3, S, S] → logits [N, classes].
        test: The model's own test-time preprocessing.
        crop_mode: timm's crop mode: "center", or "squash" or "border", which timm's transform alone knows.
        timm_name: The name in timm's result files.
        train_size: Size of the training images, in pixels; None if not known.
        tuned: Whether FixRes has tuned the model.
        untuned: Name of the same model before FixRes; None if not known, or if the model is not tuned.
        classes: Names of the classes by index; empty if the weights do not tell them.
        variant: The manifest's row; None for a model outside the zoo.
        own_weights: Whether the weights are others than those that `timm_name` stands for.
        upright: Whether images are turned as their EXIF orientation says; None if the weights do not tell.
        part_of: Fingerprint of the folder of which an automatic split trained the model; None if none did.
        saved: The network at the size of its saved weights, which timm resizes for others (see `for_size`); None where
            it takes any size, or is used as it was given.
    """

    name: str
    network: nn.Module
    test: TestTime
    crop_mode: str = "center"
    timm_name: str = ""
    train_size: int | None = None
    tuned: bool = False
    untuned: str | None = None
    classes: tuple[str, ...] = ()
    variant: Variant | None = None
    own_weights: bool = False
    upright: bool | None = None
    part_of: str | None = None
    saved: nn.Module | None = None

    @property
    def num_classes(self) -> int:
        """Number of the classifier's classes."""
        return int(cast(Any, self.network).num_classes)

    @cached_property
    def own_classes(self) -> tuple[str, ...]:
        """Names of the classes where they are not ImageNet's; empty if the weights do not tell them."""
        return () if classes.are_imagenets(self.classes) else self.classes

    @property
    def labels(self) -> Sequence[tuple[str | None, str]]:
        """WordNet id and name of each class, by index; ids are None unless the classes are ImageNet's."""
        if self.own_classes:
            return [(None, name) for name in self.own_classes]
        return classes.labels(self.num_classes)

    @property
    def architecture(self) -> str:
        """timm's name of the network, without a tag."""
        return self.variant.backbone.architecture if self.variant else self.timm_name.partition(".")[0]

    @property
    def timm_backbone(self) -> str:
        """timm's name of the network, with the tag of the weights that it was made of where that is known."""
        return self.variant.backbone.name if self.variant else self.timm_name

    @property
    def parameters(self) -> int:
        """Number of the network's parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @cached_property
    def identity(self) -> dict[str, str]:
        """Hashes that tell this network with these weights from every other."""
        return {
            "weights": delta.fingerprint(self.network.state_dict()),
            "network": hashlib.sha256(repr(self.network).encode()).hexdigest(),  # equal weights, another padding
        }

    def at(self, size: int | None, crop_pct: float | None = None) -> TestTime:
        """The test-time preprocessing at another size, in pixels, or crop_pct; None keeps the model's own."""
        return replace(
            self.test,
            size=self.test.size if size is None else size,
            crop_pct=self.test.crop_pct if crop_pct is None else crop_pct,
        )

    def for_size(self, size: int) -> "LoadedModel":
        """The model with its network built for images of a size, in pixels, where it takes those of one size only."""
        return replace(self, network=input_size.at_size(self.saved, size)) if self.saved else self

    def transform(self, test: TestTime, *, fast: bool = False) -> Preprocess:
        """The transform for a preprocessing: `Preprocess`, or `FastPreprocess`; or timm's, which has no fast form."""
        if self.crop_mode == "center" and test.interpolation in INTERPOLATIONS:
            return (FastPreprocess if fast else Preprocess).of(test)
        if fast:
            raise EvaluationError(
                f"{self.name} takes its images by {test.interpolation} interpolation and crop mode {self.crop_mode}, "
                "which fast preprocessing cannot do: leave --fast-preprocessing out."
            )
        return _TimmPreprocess(**asdict(test), crop_mode=self.crop_mode)


@dataclass(frozen=True)
class _TimmPreprocess(Preprocess):
    """A test-time transform whose images timm resizes and crops."""

    crop_mode: str

    def crop(self, image: Image.Image) -> Image.Image:
        """The first steps: an RGB image, resized and cropped to a square of `size` pixels."""
        steps = create_transform(
            (3, self.size, self.size),
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            use_prefetcher=True,
        )
        for step in steps.transforms[:-1]:  # the last one makes an array
            image = step(image)
        return image


def load(name: str) -> LoadedModel:
    """Opens a model; see the module's table for names.

    Raises:
        UnknownVariantError: The name is no variant's, and no file or folder either.
        MissingFileError: A file is not there.
        EvaluationError: timm has no such model, or its weights could not be had.
        FixEfficientNetError: As `create` raises.
    """
    return replace(_open(name), name=name)


def _open(name: str) -> LoadedModel:
    if name.startswith(TIMM):
        return _of_timm(name)
    if name.startswith(REPOSITORIES):
        return _of_repository(name)
    key, _, weights = name.partition(":")
    try:
        variant = manifest.find(key)
    except UnknownVariantError as error:
        path = Path(name).expanduser()
        if path.is_dir():
            return _of_run(path)
        if path.is_file():
            return _of_file(path)
        if path.suffix in WEIGHTS_SUFFIXES or "/" in key:
            raise MissingFileError(f"{name}: there is no such file or folder.") from None
        raise UnknownVariantError(
            f"{error} A model of timm's is timm/NAME (timm/resnet50.a1_in1k) or hf-hub:ORG/NAME, a fine-tuning run its "
            "folder."
        ) from None
    return _of_variant(variant, weights or variant.usual_weights)


def from_module(model: nn.Module) -> LoadedModel:
    """A model of `create`'s or timm's as it is, with the preprocessing that it describes (else EvaluationError)."""
    variant = getattr(model, "variant", None)
    preprocess = getattr(model, "preprocess", None)
    name = type(model).__name__
    if isinstance(variant, Variant) and isinstance(preprocess, Preprocess):
        return LoadedModel(variant.key, model, preprocess, timm_name=variant.timm_name, train_size=variant.train_size)
    if not getattr(model, "pretrained_cfg", None) or not getattr(model, "num_classes", 0):
        raise EvaluationError(f"{name} is no classifier of timm's: it has no pretrained_cfg, or no classes.")
    return _described_by_timm(name, model)


def _of_variant(variant: Variant, weights: bool | str) -> LoadedModel:
    try:
        model = zoo.create(variant.key, weights)
    except WeightsNotPublishedError as error:
        raise WeightsNotPublishedError(
            f"{error}\nAs a MODEL here: {variant.key}:backbone, {variant.key}:PATH, or the run's folder."
        ) from None
    tuned = weights != "backbone"
    return LoadedModel(
        name=variant.key,
        network=model,
        test=model.preprocess,
        timm_name=variant.timm_name if tuned else variant.backbone.name,
        train_size=variant.train_size,
        tuned=tuned,
        untuned=f"{variant.key}:backbone" if tuned else None,
        variant=variant,
        own_weights=weights not in (True, "backbone"),
    )


def checkpoint_of(path: Path) -> Path:
    """The whole checkpoint that a path names: the file itself, or that of a run's folder (else MissingFileError)."""
    if not path.is_dir():
        return path
    if (path / DELTA).is_file() and not (path / MODEL).is_file():
        raise MissingFileError(
            f"{path} has a delta alone, for a variant's original weights: --checkpoint takes a run with a {MODEL}."
        )
    if not (path / MODEL).is_file():
        raise MissingFileError(
            f"{path} has no {MODEL}: it is no finished run with a network of its own. The command that began it "
            "continues it."
        )
    return path / MODEL


def _of_run(folder: Path) -> LoadedModel:
    if (folder / CONFIG).is_file():  # as timm and `merge` write them
        return _of_repository(f"local-dir:{folder}")
    for file in (MODEL, DELTA):
        if (folder / file).is_file():
            return _of_file(folder / file)
    raise MissingFileError(
        f"{folder} has no {MODEL} and no {DELTA}: it is no finished run. The command that began it continues it."
    )


def _of_repository(name: str) -> LoadedModel:
    source, _, place = name.partition(":")
    if source == "local-dir":
        place = str(Path(place).expanduser())
        config, file = Path(place, CONFIG), Path(place, MODEL)
        if not config.is_file():
            raise MissingFileError(f"{place} has no {CONFIG}: it is no folder of a model of timm's.")
        if config.stat().st_size > records.LARGEST:
            raise EvaluationError(f"{config} has more than {records.LARGEST:,} bytes.")
        if file.is_file() and (described := Description.beside(file)):
            return _of_description(described, file)
    missing = None
    try:
        if source != "local-dir":
            _check_config(hub.fetch(HubFile.of(place, CONFIG)))
            missing = hub.bring(HubFile.of(place, MODEL))
        model = timm.create_model(f"{source}:{place}", pretrained=True).eval()
    except Exception as error:  # timm and huggingface_hub raise a dozen kinds
        raise EvaluationError(f"{name} could not be loaded by timm {timm.__version__}: {missing or error}") from error
    loaded = _described_by_timm(name, model)
    names = cast(dict[str, Any], model.pretrained_cfg).get("label_names")
    names = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names or ()
    own = tuple(map(str, names)) if len(names) == loaded.num_classes else ()
    return replace(loaded, classes=own, own_weights=True)


def _check_config(path: Path) -> None:
    """Refuses a repository that names another file of weights: older releases of timm run the code in a pickle."""
    found = records.decode_file(path)
    config = found.get("pretrained_cfg") if isinstance(found, dict) else None
    for told in (found, config):
        if isinstance(told, dict) and (told.get("hf_hub_filename") or told.get("custom_load")):
            raise EvaluationError(f"its {CONFIG} names weights other than {MODEL}, which may be code and are not read")


def _of_file(path: Path) -> LoadedModel:
    if delta.is_delta(path):
        return _of_delta(path, delta.load(path))
    if found := _of_its_own(path):
        return found
    raise EvaluationError(f"{path} does not say of which network it is: give it as timm/NAME:{path}, with timm's name.")


def _of_its_own(path: Path) -> LoadedModel | None:
    """The model of a file that tells its network, or lies where timm's config.json tells it; None for another."""
    if described := Description.load(path):
        return _of_description(described, path)
    in_repository = path.name == MODEL and (path.parent / CONFIG).is_file()
    return _of_repository(f"local-dir:{path.parent}") if in_repository else None


def _of_description(described: Description, path: Path) -> LoadedModel:
    network = from_checkpoint(described.backbone.partition(".")[0], path, described.size)
    if described.sha256 and described.sealed(network.state_dict()) != described:
        raise CheckpointError(
            f"{path} was damaged or changed after it was written: it has not the sha256 that its description records. "
            "Get the file again from where it was made."
        )
    return LoadedModel(
        name=str(path),
        network=network,
        test=described.test,
        timm_name=described.backbone,
        train_size=described.train_size,
        tuned=described.stage == "fixres",
        classes=described.classes,
        own_weights=True,
        upright=described.upright,
        part_of=described.part_of,
        saved=network,
    )


def _of_delta(path: Path, tuned: Delta) -> LoadedModel:
    if tuned.variant in manifest.load():
        loaded = _of_variant(manifest.find(tuned.variant), str(path))
    else:
        untuned = f"{TIMM}{tuned.backbone}"
        loaded = _of_timm(untuned)
        delta.apply(loaded.saved or loaded.network, tuned)
        test = delta.test_time(tuned, loaded.test)
        loaded = replace(loaded.for_size(test.size), test=test, tuned=True, untuned=untuned, own_weights=True)
    size, upright = tuned.recipe.get("train_size", loaded.train_size), tuned.recipe.get("upright")
    if size is not None and not isinstance(size, int):
        raise EvaluationError(f"{path}: the train_size {size!r} of its recipe is no size.")
    return replace(loaded, train_size=size, upright=upright if isinstance(upright, bool) else None)


def _of_timm(name: str) -> LoadedModel:
    known, _, file = name.removeprefix(TIMM).partition(":")
    architecture = known.partition(".")[0]
    if not timm.is_model(architecture):
        raise EvaluationError(f"timm {timm.__version__} has no model {known!r} (timm.list_models() names them).")
    if file:
        path = Path(file).expanduser()
        if (own := _of_its_own(path)) and own.architecture == architecture:
            return own
        model = from_checkpoint(known, path)
    else:
        missing = None
        try:
            missing = bring_timms(known)
            model = timm.create_model(known, pretrained=True).eval()
        except Exception as error:  # timm and huggingface_hub raise a dozen kinds
            reason = str(missing or error).rstrip(".")
            raise EvaluationError(
                f"timm's weights of {known} could not be had: {reason}. They come from the Hugging Face Hub; a file of "
                f"one's own goes in as {TIMM}{known}:FILE."
            ) from error
    described = _described_by_timm(name, model)
    tag = cast(dict[str, Any], model.pretrained_cfg).get("tag")
    full = f"{architecture}.{tag}" if tag and "." not in known else known
    described = replace(described, timm_name=full, own_weights=bool(file), saved=model)
    return described.for_size(described.test.size)


def bring_timms(name: str) -> DownloadError | None:
    """Brings timm's own weights of a network to the Hub's cache, where timm finds them; see `hub.bring`.

    Weights that timm takes from elsewhere, or from a file of another name, are left to timm.
    """
    cfg = timm.get_pretrained_cfg(name)
    if not cfg or not cfg.hf_hub_id or cfg.hf_hub_filename:
        return None
    return hub.bring(HubFile.of(cfg.hf_hub_id, MODEL))


def _described_by_timm(name: str, model: nn.Module) -> LoadedModel:
    if not getattr(model, "num_classes", 0):
        raise EvaluationError(f"{name} has no classifier to evaluate.")
    config = resolve_model_data_config(model, use_test_size=True)  # type: ignore[no-untyped-call]
    height, width = config["input_size"][1:]
    if height != width:
        raise EvaluationError(f"{name} takes images of {height} x {width} pixels; only squares can be evaluated.")
    cfg = cast(dict[str, Any], model.pretrained_cfg)
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return LoadedModel(
        name=name,
        network=model,
        test=TestTime(height, config["crop_pct"], config["interpolation"], mean, std),
        crop_mode=config["crop_mode"],
        timm_name=str(cfg.get("architecture") or name),
        train_size=cfg["input_size"][-1] if cfg.get("input_size") else None,
    )


def from_checkpoint(architecture: str, path: Path, size: int | None = None) -> nn.Module:
    """Builds a timm network with as many classes as a checkpoint of it has, in eval mode.

    With a tag in the architecture's name, the model's preprocessing is the tag's. The checkpoint is as a training
    script saved it (see `checkpoint_file.read_trained`). `size`, in pixels, is what it is for, where the network takes
    images of one size only; None: the usual one.

    Raises:
        MissingFileError: There is no such file.
        CheckpointError: The file cannot be read, or is not of this network.
    """
    checkpoint_file.check_there(path)
    if not timm.is_model(architecture):
        raise CheckpointError(
            f"{path} is of the network {architecture!r}, which timm {timm.__version__} does not have."
        )
    try:
        model = without_weights(architecture, num_classes=1)  # some have none by default
    except RuntimeError as error:  # a tag that is none
        raise CheckpointError(f"timm {timm.__version__} has no {architecture}: {error}") from error
    found = checkpoint_file.read_trained(path, model.state_dict())
    if found.taken:
        _logger.info("%s: took %s", path, found.taken)
    tensors, name = found.tensors, delta.find_classifier(model)
    weight = tensors.get(f"{name}.weight")
    if weight is None or weight.ndim == 0 or weight.untyped_storage().nbytes() < weight.nbytes:
        raise CheckpointError(
            f"{path} has no {name}.weight, so it is no checkpoint of {architecture}. The names in it begin with "
            f"{listed(dict.fromkeys(key.partition('.')[0] for key in tensors))}."
        )
    usual = cast(Any, model.get_submodule(name)).weight.shape
    if weight.shape[1:] != usual[1:]:  # before memory is taken for it
        raise CheckpointError(
            f"{path} is no checkpoint of {architecture}: its {name}.weight has the shape {list(weight.shape)}, the "
            f"network's {['classes', *usual[1:]]}."
        )
    kwargs = input_size.arguments(architecture, size)
    model = timm.create_model(architecture, pretrained=False, num_classes=len(weight), **kwargs)
    wanted = model.state_dict()
    wrong = [
        key
        for key in wanted
        if not key.endswith(".num_batches_tracked") and (key not in tensors or tensors[key].shape != wanted[key].shape)
    ]
    wrong += sorted(set(tensors) - set(wanted))
    if wrong:
        raise CheckpointError(
            f"{path} is no checkpoint of {architecture}: {listed(wrong)} missing, too many, or of another shape."
            + (f" Was it trained at another size than {own} pixels?" if (own := input_size.of(model)) else "")
        )
    model.load_state_dict(tensors, strict=False)
    return model.eval()
