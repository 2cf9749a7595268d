"""A recipe: everything that decides the result of a fine-tuning, except the images and the weights themselves."""

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from fixefficientnet import manifest
from fixefficientnet._internal import records
from fixefficientnet._internal.records import LEFT_OUT_IF_NONE, Count, Fraction, NotNegative, Positive, Rule, Share
from fixefficientnet.errors import RecipeError, UnknownVariantError
from fixefficientnet.manifest import INTERPOLATIONS, TestTime, Triple, Variant

Stage = Literal["fixres", "base"]
Method = Literal["online", "cached"]
Tune = Literal["fixres", "all", "classifier", "bn", "bn-stats"]
Schedule = Literal["step", "cosine"]
Precision = Literal["no", "bf16", "fp16"]
BelowOne = Annotated[float, Rule("a number of at least 0 and below 1", least=0, below=1)]
Size = Annotated[int, Rule("a whole number of at least 32", least=32)]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One fine-tuning, resolved: nothing is left to a default elsewhere.

    The learning rate is 8 · base_lr · batch_size / 512 (the rule of the FixRes code), times a schedule. The fields of
    the base stage alone are None in the other.

    Attributes:
        variant: Key in the manifest, or timm's name of another network.
        backbone: timm's name of the network, with its tag.
        weights: Where training starts: "pretrained" (timm's), "random", or "sha256:…" of the file given.
        stage: "fixres", or "base": the training before it, of the whole network at the train size.
        method: "online" (the paper's), or "cached": features are computed once (fixres stage only).
        tune: What changes: "fixres" (the running statistics of the head norm, and the classifier, as in the FixRes
            authors' code), "all" (the norm's weight and bias too; base stage: the whole network), "classifier" alone,
            "bn" (statistics, weight and bias of the norm alone), or "bn-stats" (its running statistics alone). A norm
            without statistics has none to change.
        test_size: Size that the network is tuned for, in pixels.
        train_size: Size that the network was trained at, in pixels.
        crop_pct: Share of the resized shorter side that the crop keeps at test time.
        interpolation: Interpolation of resizing at test time.
        mean: Mean per channel (RGB), on the [0, 1] scale.
        std: Standard deviation per channel (RGB), on the [0, 1] scale.
        upright: Whether images are turned as their EXIF orientation says. Default: unless there are 1000 classes, as
            ImageNet's, whose accuracies are of images as they are stored.
        base_crop_pct: Like crop_pct, where the untuned network is measured at its train size.
        epochs: Passes over the training images (cached: over their features).
        batch_size: Images per step, all devices together.
        base_lr: Base of the learning rate, which is 8 * base_lr * batch_size / 512.
        schedule: "step": times lr_decay every lr_decay_epochs; "cosine": to 0 along half a cosine.
        lr_decay: Factor of the step schedule.
        lr_decay_epochs: Period of the step schedule, in epochs.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        label_smoothing: Label smoothing of the cross-entropy, below 1.
        hflip: Probability of a horizontal flip (cached: with one view).
        color_jitter: Largest relative change of brightness, contrast and saturation (cached: from view 3 on).
        views: Features per image (cached). One: plain, or flipped. Several: plain, flipped, then random ones.
        statistics_images: Images, drawn at random, that re-estimate the norm's statistics (cached); 0: all.
        forward_batch: Images per forward pass on one device where nothing is trained: of the frozen part too.
        shard: Images whose statistics, features or predictions are computed and saved together.
        feature_dtype: Type that features are stored in.
        sync_bn: Whether the norm's batch statistics are those of all devices together (CUDA only).
        mixed_precision: Precision of the frozen part; "no" is float32. The command takes bf16 on a CUDA device that
            has it. What trains, and what is measured, is float32. Base stage: of the forward and backward passes.
        warmup_epochs: Epochs, the first ones, in which the learning rate rises from 0 to the schedule's full one (base
            stage).
        model_ema_decay: Largest decay of the exponential moving average of all weights and running statistics, which
            is what is validated and kept; 0: none (base stage). It rises to that with the steps, by timm's rule.
        patience: Epochs without a higher validation accuracy after which training stops; 0: never (base stage).
        seed: Seed of every random draw.
    """

    variant: str
    backbone: str
    weights: str
    stage: Stage
    method: Method
    tune: Tune
    test_size: Size
    train_size: Size
    crop_pct: Share
    interpolation: Literal["bilinear", "bicubic"]
    mean: Triple
    std: Triple
    base_crop_pct: Share
    epochs: Positive
    batch_size: Positive
    base_lr: NotNegative
    schedule: Schedule
    lr_decay: NotNegative = 0.1
    lr_decay_epochs: Positive = 30
    momentum: NotNegative = 0.9
    weight_decay: NotNegative = 1e-4
    label_smoothing: BelowOne = 0.1
    hflip: Fraction = 0.5
    color_jitter: Fraction = 0.05
    views: Positive = 1
    statistics_images: Count = 10_000
    forward_batch: Positive = 32
    shard: Positive = 256
    feature_dtype: Literal["float16", "float32"] = "float16"
    sync_bn: bool = False
    mixed_precision: Precision = "no"
    warmup_epochs: Count | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    model_ema_decay: BelowOne | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    patience: Count | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    upright: bool | None = None
    seed: Annotated[int, Rule("a whole number from 0 to 2^63 - 1", least=0, below=2**63)] = 0

    @property
    def test(self) -> TestTime:
        """Test-time preprocessing at the test size."""
        return TestTime(self.test_size, self.crop_pct, self.interpolation, self.mean, self.std)

    @property
    def base(self) -> TestTime:
        """Preprocessing at the train size, as the untuned network is measured."""
        return replace(self.test, size=self.train_size, crop_pct=self.base_crop_pct)

    @property
    def work_size(self) -> int:
        """Size that the stage trains at, in pixels."""
        return self.train_size if self.stage == "base" else self.test_size

    @property
    def moves_statistics(self) -> bool:
        """Whether the head norm's running statistics change, where it keeps any."""
        return self.tune != "classifier"

    @property
    def trains_classifier(self) -> bool:
        """Whether the classifier changes."""
        return self.tune in ("fixres", "all", "classifier")

    @property
    def full_learning_rate(self) -> float:
        """The learning rate that the schedule starts from."""
        return 8 * self.base_lr * self.batch_size / 512

    def learning_rate(self, epoch: float) -> float:
        """The learning rate at a point in time, counted in epochs from 0."""
        rate, warmup = self.full_learning_rate, self.warmup_epochs or 0
        if epoch < warmup:
            return rate * epoch / warmup
        if self.schedule == "cosine":
            return rate * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return rate * self.lr_decay ** (int(epoch) // self.lr_decay_epochs)


@dataclass(frozen=True, slots=True)
class Subject:
    """The network that a recipe is for, before any choice is made.

    Attributes:
        name: Key in the manifest, or timm's name of another network.
        backbone: timm's name, with its tag.
        variant: Row of the manifest; None for other networks.
        test: Test-time preprocessing that the network is tuned for.
        base: Preprocessing that the original weights were made for, at the train size.
    """

    name: str
    backbone: str
    variant: Variant | None
    test: TestTime
    base: TestTime

    @property
    def folder(self) -> str:
        """Name of the folder of a run."""
        return self.name.replace("/", "_")


def subject_of_variant(variant: Variant) -> Subject:
    """The subject for a variant of the zoo."""
    cfg = _timm_cfg(variant.backbone.name)
    base = replace(variant.test, size=variant.train_size, crop_pct=float(cfg["crop_pct"]))
    return Subject(variant.key, variant.backbone.name, variant, variant.test, base)


def subject_of_backbone(name: str) -> Subject:
    """The subject for another network of timm, with its own preprocessing and whole crops at test time.

    Raises:
        RecipeError: timm has no such model.
    """
    cfg = _timm_cfg(name)
    size, mean, std = int(cfg["input_size"][-1]), tuple(cfg["mean"]), tuple(cfg["std"])
    interpolation = cfg["interpolation"] if cfg["interpolation"] in INTERPOLATIONS else "bicubic"
    base = TestTime(size, float(cfg["crop_pct"]), interpolation, mean, std)
    return Subject(name, name, None, replace(base, crop_pct=1.0), base)


def subjects(names: Sequence[str], backbone: str | None = None) -> list[Subject]:
    """The networks that a command means: variants, by names or wildcards, or another one by its timm name.

    Without names, these are all variants of the paper.

    Raises:
        UnknownVariantError: No variant has one of these names.
        RecipeError: timm has no such model.
    """
    if backbone:
        return [subject_of_backbone(backbone.removeprefix("timm/"))]
    keys = [] if names else [key for key, variant in manifest.load().items() if variant.paper]
    for name in names:
        found = manifest.list_models(name) if any(sign in name for sign in "*?[") else [manifest.find(name).key]
        if not found:
            raise UnknownVariantError(f"No variant matches {name!r}.")
        keys += found
    return [subject_of_variant(manifest.find(key)) for key in dict.fromkeys(keys)]


BASE_STAGE = ("warmup_epochs", "model_ema_decay", "patience")
"""Fields of a recipe that the base stage alone has."""
GIVEN = ("variant", "backbone", "weights")
"""Fields of a recipe that the network and its weights decide; all others can be chosen."""


def resolve(subject: Subject, choices: Mapping[str, Any]) -> Recipe:
    """The whole recipe: the network's row in recipes.toml, with what was chosen (not None) on top.

    Raises:
        RecipeError: An unknown field, or a value that a field cannot have.
    """
    chosen = {key: value for key, value in choices.items() if value is not None}
    table, test = _table(), subject.test
    stage, method = chosen.get("stage", "fixres"), chosen.get("method", "online")
    original = chosen.get("weights", "pretrained") == "pretrained"
    given = {
        "variant": subject.name,
        "backbone": subject.backbone,
        "weights": "pretrained",
        "stage": stage,
        "tune": "all" if stage == "base" else "fixres",
        "test_size": test.size,
        "train_size": subject.base.size,
        "base_crop_pct": (subject.base if original else test).crop_pct,
        **{name: getattr(test, name) for name in ("crop_pct", "interpolation", "mean", "std")},
    }
    section = "base" if stage == "base" else str(method)
    if section not in table:
        raise RecipeError(f"recipe.method: must be one of online, cached, is {method!r}")
    defaults = dict(table[section])
    row = defaults.pop("variants", {}).get(subject.name, {})
    values = {**given, **defaults, **row, "method": method, **chosen}
    recipe = records.read(Recipe, values, "recipe", RecipeError)
    _check_combination(recipe)
    return recipe


def _check_combination(recipe: Recipe) -> None:
    """Refuses values that are fine each, and not together."""
    if min(recipe.std) <= 0:
        raise RecipeError(f"recipe.std: must be above 0, is {recipe.std}")
    if recipe.stage != "base" and (given := [name for name in BASE_STAGE if getattr(recipe, name) is not None]):
        raise RecipeError(f"Of the base stage alone: {', '.join(given)}. Leave it out, or choose the stage base.")
    if recipe.warmup_epochs and recipe.warmup_epochs >= recipe.epochs:
        raise RecipeError(f"warmup_epochs is {recipe.warmup_epochs}: it must be below epochs, {recipe.epochs} here.")
    if recipe.stage == "base" and recipe.sync_bn:
        raise RecipeError("sync_bn synchronises the head norm of the fixres stage; the base stage has no such option.")
    if recipe.stage == "base" and (recipe.method == "cached" or recipe.tune not in ("all", "classifier")):
        raise RecipeError("The base stage trains online, and takes tune all (the whole network) or classifier.")
    if recipe.method == "cached" and recipe.tune in ("all", "bn"):
        instead = "fixres" if recipe.tune == "all" else "bn-stats"
        raise RecipeError(
            f"tune {recipe.tune} trains the norm's weight and bias, which cached features already contain: use "
            f"--method online, or --tune {instead}, which only re-estimates its statistics."
        )


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Where two recipes differ, for people: "base_lr: 0.001 there, 0.01 here"."""
    here = asdict(other)
    return [f"{key}: {value} there, {here[key]} here" for key, value in asdict(one).items() if value != here[key]]


def _table() -> dict[str, dict[str, Any]]:
    path = manifest.packaged_path().with_name("recipes.toml")
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is damaged, which the package brings: {error}. Install it again.") from error
    for name, section in found.items():
        rows = section.get("variants", {}) if isinstance(section, dict) else None
        if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
            raise RecipeError(f"{path} is damaged, which the package brings: {name} is no table. Install it again.")
    return found


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
