"""A recipe: everything that decides the result of a fine-tuning, but for the images and the weights themselves."""

import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fixefficientnet import manifest
from fixefficientnet.errors import RecipeError
from fixefficientnet.manifest import TestTime, Triple, Variant

Stage = Literal["fixres", "base"]
Method = Literal["online", "cached"]
Tune = Literal["all", "classifier", "bn", "bn-stats"]
Schedule = Literal["step", "cosine"]
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One fine-tuning, resolved: nothing is left to a default elsewhere.

    Attributes:
        variant: The manifest's key, or the network's timm name where it is none of ours.
        backbone: timm name of the network, with its tag.
        weights: What training starts from: "pretrained" (timm's), "random", or "sha256:…" of the file given.
        stage: "fixres", or "base": the training before it, of the whole network at the train size.
        method: "online" (the paper's), or "cached" (features computed once; FixRes stage only).
        tune: What moves. "all": the head norm's statistics, its weight and bias, and the classifier (cached:
            not its weight and bias); in the base stage the whole network. "classifier": it alone. "bn": the
            norm's statistics, weight and bias. "bn-stats": its statistics alone.
        test_size: Size that the network is tuned for, in pixels.
        train_size: Size that it was, or in the base stage is, trained at.
        crop_pct: At test time; see `TestTime`.
        interpolation: At test time.
        mean: Per channel (RGB), on the [0, 1] scale.
        std: Per channel (RGB), on the [0, 1] scale.
        base_crop_pct: At which the untuned network is measured at its train size.
        epochs: Over the training images (online), or over their features (cached).
        batch_size: Images per step, all devices together.
        base_lr: The learning rate is 8 · base_lr · batch_size / 512 (FixRes's rule).
        schedule: "step": times `lr_decay` every `lr_decay_epochs`; "cosine": to 0 along half a cosine.
        lr_decay: Factor of the step schedule.
        lr_decay_epochs: Its period.
        momentum: Of SGD.
        weight_decay: Of SGD.
        label_smoothing: In [0, 1).
        hflip: Probability of mirroring an image (online, base).
        color_jitter: Most relative change of brightness, contrast and saturation (online; cached from view 3 on).
        views: Features per image (cached): plain, mirrored, then random ones.
        statistics_images: How many images, drawn at random, re-estimate the norm's statistics (cached); 0: all.
        forward_batch: Images per forward pass on one device where nothing is trained.
        shard: Images whose statistics, features or evaluation are computed, saved and summed together.
        feature_dtype: How features are stored.
        sync_bn: Whether the norm's batch statistics are those of all devices together (CUDA only).
        mixed_precision: Of the frozen part: "no" is float32. The FixRes stage always trains in float32.
        seed: Decides every draw.
    """

    variant: str
    backbone: str
    weights: str
    stage: Stage
    method: Method
    tune: Tune
    test_size: int
    train_size: int
    crop_pct: float
    interpolation: str
    mean: Triple
    std: Triple
    base_crop_pct: float
    epochs: int
    batch_size: int
    base_lr: float
    schedule: Schedule
    lr_decay: float = 0.1
    lr_decay_epochs: int = 30
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    hflip: float = 0.5
    color_jitter: float = 0.05
    views: int = 2
    statistics_images: int = 0
    forward_batch: int = 32
    shard: int = 256
    feature_dtype: Literal["float16", "float32"] = "float16"
    sync_bn: bool = False
    mixed_precision: Precision = "no"
    seed: int = 0

    @property
    def test(self) -> TestTime:
        """Test-time preprocessing at the test size."""
        return TestTime(self.test_size, self.crop_pct, self.interpolation, self.mean, self.std)

    @property
    def base(self) -> TestTime:
        """Preprocessing at the train size, as the untuned network is measured."""
        return replace(self.test, size=self.train_size, crop_pct=self.base_crop_pct)

    @property
    def moves_statistics(self) -> bool:
        """Whether the head norm's running statistics change."""
        return self.tune != "classifier"

    @property
    def trains_classifier(self) -> bool:
        """Whether the classifier changes."""
        return self.tune in ("all", "classifier")

    def learning_rate(self, epoch: float) -> float:
        """The learning rate at a point in time, counted in epochs from 0."""
        rate = 8 * self.base_lr * self.batch_size / 512
        if self.schedule == "cosine":
            return rate * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return rate * self.lr_decay ** (int(epoch) // self.lr_decay_epochs)

    def dumps(self) -> str:
        """The recipe as JSON text."""
        return json.dumps(asdict(self), indent=2)


@dataclass(frozen=True, slots=True)
class Subject:
    """The network that a recipe is for, before any choice is made.

    Attributes:
        name: The manifest's key, or a timm name.
        backbone: timm name.
        variant: The manifest's row; None for other networks.
        test: Test-time preprocessing that it would be tuned for.
        base: Preprocessing that its own weights were made for, at the train size.
    """

    name: str
    backbone: str
    variant: Variant | None
    test: TestTime
    base: TestTime

    @property
    def folder(self) -> str:
        """What its run is called."""
        return self.name.replace("/", "_")


def subject_of_variant(variant: Variant) -> Subject:
    """A variant of the zoo."""
    cfg = _timm_cfg(variant.backbone.name)
    base = replace(variant.test, size=variant.train_size, crop_pct=float(cfg["crop_pct"]))
    return Subject(variant.key, variant.backbone.name, variant, variant.test, base)


def subject_of_backbone(name: str) -> Subject:
    """Any other timm network, by its timm name; its own preprocessing, whole crops at test time.

    Raises:
        RecipeError: timm has no such model.
    """
    cfg = _timm_cfg(name)
    size, mean, std = int(cfg["input_size"][-1]), tuple(cfg["mean"]), tuple(cfg["std"])
    interpolation = cfg["interpolation"] if cfg["interpolation"] in manifest.INTERPOLATIONS else "bicubic"
    base = TestTime(size, float(cfg["crop_pct"]), interpolation, mean, std)
    return Subject(name, name, None, replace(base, crop_pct=1.0), base)


def resolve(subject: Subject, choices: Mapping[str, Any], settings: Sequence[str] = ()) -> Recipe:
    """The whole recipe: the network's row, what was chosen, and `key=value` settings on top.

    Args:
        subject: What is fine-tuned.
        choices: Fields of the recipe that were chosen; None means not chosen.
        settings: Such as "base_lr=1e-4"; they go before everything else.

    Raises:
        RecipeError: An unknown key, or a value that cannot be.
    """
    chosen = {key: value for key, value in choices.items() if value is not None} | parse_settings(settings)
    table = _table()
    row = dict(table["variants"].get(subject.name, {}))
    stage = chosen.get("stage", "fixres")
    method = chosen.get("method") or ("online" if stage == "base" else row.get("method", "online"))
    if stage == "base" or method != row.get("method"):
        row = {}
    for name, value, hint in (("stage", stage, Stage), ("method", method, Method)):
        if value not in get_args(hint):
            raise RecipeError(f"{name} is {value!r}, but must be one of {', '.join(get_args(hint))}.")
    defaults = table["base" if stage == "base" else method]
    values = {
        "variant": subject.name,
        "backbone": subject.backbone,
        "weights": "pretrained",
        "stage": stage,
        "tune": "all",
        "test_size": subject.test.size,
        "train_size": subject.base.size,
        "crop_pct": subject.test.crop_pct,
        "interpolation": subject.test.interpolation,
        "mean": subject.test.mean,
        "std": subject.test.std,
        "base_crop_pct": subject.base.crop_pct
        if chosen.get("weights", "pretrained") == "pretrained"
        else subject.test.crop_pct,
    }
    recipe = Recipe(**(values | defaults | row | {"method": method} | chosen))
    check(recipe)
    return recipe


_GIVEN = ("variant", "backbone", "weights")
"""What the command's other arguments decide."""


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts as fields of a recipe, each in its field's type.

    Raises:
        RecipeError: No such field, or no value of its type.
    """
    hints = {name: hint for name, hint in get_type_hints(Recipe).items() if name not in _GIVEN}
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise RecipeError(f"--set {setting}: it takes key=value, such as --set base_lr=1e-4.")
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=3)
            hint = f"Did you mean {', '.join(close)}?" if close else f"There are: {', '.join(hints)}."
            raise RecipeError(f"--set {setting}: a recipe has no {key!r} to set. {hint}")
        parsed[key] = _parse(text.strip(), hints[key], setting)
    return parsed


def check(recipe: Recipe) -> None:
    """Refuses values that cannot be.

    Raises:
        RecipeError: Names the field, its value and what it may be.
    """
    hints = get_type_hints(Recipe)
    for name, hint in hints.items():
        allowed = get_args(hint) if get_origin(hint) is Literal else ()
        if allowed and getattr(recipe, name) not in allowed:
            raise RecipeError(f"{name} is {getattr(recipe, name)!r}, but must be one of {', '.join(allowed)}.")
    least: dict[str, float] = {
        "test_size": 32,
        "train_size": 32,
        "epochs": 1,
        "batch_size": 1,
        "lr_decay_epochs": 1,
        "views": 1,
        "forward_batch": 1,
        "shard": 1,
        "statistics_images": 0,
        "seed": 0,
        "base_lr": 0,
        "momentum": 0,
        "weight_decay": 0,
        "lr_decay": 0,
    }
    for name, low in least.items():
        value = getattr(recipe, name)
        if not (math.isfinite(value) and value >= low):
            raise RecipeError(f"{name} is {value}, but must be at least {low:g}.")
    if not recipe.label_smoothing < 1:
        raise RecipeError(f"label_smoothing is {recipe.label_smoothing}, but must be below 1.")
    if not all(map(math.isfinite, recipe.mean)) or not all(math.isfinite(value) and value > 0 for value in recipe.std):
        raise RecipeError(f"mean is {recipe.mean} and std {recipe.std}, but must be finite, and std above 0.")
    for name in ("hflip", "color_jitter", "label_smoothing"):
        if not 0 <= getattr(recipe, name) <= 1:
            raise RecipeError(f"{name} is {getattr(recipe, name)}, but must be within 0 and 1.")
    for name in ("crop_pct", "base_crop_pct"):
        if not 0 < getattr(recipe, name) <= 1:
            raise RecipeError(f"{name} is {getattr(recipe, name)}, but must be above 0 and at most 1.")
    if recipe.interpolation not in manifest.INTERPOLATIONS:
        raise RecipeError(f"interpolation must be one of {', '.join(manifest.INTERPOLATIONS)}.")
    if recipe.seed >= 2**63:
        raise RecipeError(f"seed is {recipe.seed}, but must be below 2^63.")
    if recipe.stage == "base" and recipe.sync_bn:
        raise RecipeError("sync_bn synchronises the head norm of the FixRes stage; the base stage has no such option.")
    if recipe.stage == "base" and (recipe.method == "cached" or recipe.tune not in ("all", "classifier")):
        raise RecipeError("The base stage trains online, and takes tune all (the whole network) or classifier.")
    if recipe.method == "cached" and recipe.tune == "bn":
        raise RecipeError(
            "tune bn trains the norm's weight and bias, which cached features already contain: use --method online, "
            "or --tune bn-stats, which only re-estimates its statistics."
        )


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Where two recipes differ, for people: "base_lr: 0.001 there, 0.01 here"."""
    keys = dict.fromkeys([*one, *other])
    return [f"{k}: {one.get(k)} there, {other.get(k)} here" for k in keys if one.get(k) != other.get(k)]


def _parse(text: str, hint: Any, setting: str) -> Any:
    try:
        if hint is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if hint is int:
            return int(text)
        if hint is float:
            return float(text)
        if hint == Triple:
            first, second, third = (float(part) for part in text.strip("()").split(","))
            return first, second, third
    except (KeyError, ValueError):
        kind = (
            "three numbers" if hint == Triple else {bool: "true or false", int: "a whole number"}.get(hint, "a number")
        )
        raise RecipeError(f"--set {setting}: the value must be {kind}.") from None
    return text


def _table() -> dict[str, dict[str, Any]]:
    path = manifest.packaged_path().with_name("recipes.toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _timm_cfg(name: str) -> dict[str, Any]:
    import timm

    try:
        cfg = timm.get_pretrained_cfg(name)
    except (RuntimeError, KeyError, ValueError):
        cfg = None
    if cfg is None or not timm.is_model(name.partition(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(pretrained=True) + timm.list_models(), n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise RecipeError(f"timm has no model {name!r}.{hint} timm.list_models() lists them.")
    return dict(asdict(cfg))
