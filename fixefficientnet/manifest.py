"""The one reader of `weights_manifest.json`: everything known about a variant, as frozen dataclasses.

Imports neither torch nor timm, so that listing models feels instant.

`FIXEFFICIENTNET_MANIFEST` (a path, or the JSON itself) lays rows over the packaged ones: an
organisation's own published weights, or a run of one's own, without touching the package.
"""

import difflib
import fnmatch
import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fixefficientnet.errors import ManifestError, UnknownVariantError

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

SCHEMA_VERSION = 1
OVERLAY_VARIABLE = "FIXEFFICIENTNET_MANIFEST"
FAMILIES = ("advprop", "noisy_student", "lite")
INTERPOLATIONS = ("bilinear", "bicubic")
PREFIX = "fixefficientnet"
DEFAULT_MODEL = "lite0"
"""What `predict` runs when it is not told: its weights need no Hub."""

STEM, CLASSIFIER = "conv_stem", "classifier"
"""timm's names of the first and the last layer of an EfficientNet."""

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Package:
    """A PyPI package that ships the backbone's weights.

    Attributes:
        name: The distribution's name on PyPI.
        filename: The file inside it, relative to its installation folder.
        sha256: Of that file.
    """

    name: str
    filename: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Backbone:
    """The network that FixRes starts from, with its original weights.

    Attributes:
        name: timm's name, architecture and tag.
        repository: On the Hugging Face Hub.
        filename: In that repository; safetensors.
        revision: Branch, tag or commit.
        sha256: Of the file; None where it was never recorded (the delta's fingerprint guards then).
        license: SPDX identifier, lower case.
        package: A PyPI package that ships the same network's weights, if there is one.
    """

    name: str
    repository: str
    filename: str
    revision: str
    sha256: str | None
    license: str
    package: Package | None

    @property
    def architecture(self) -> str:
        """timm's architecture name, without the pretrained tag."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """timm's pretrained tag, such as "ns_jft_in1k"."""
        return self.name.partition(".")[2]


@dataclass(frozen=True, slots=True)
class TestTime:
    """Test-time preprocessing of a variant (the released FixEfficientNet evaluation).

    Attributes:
        size: Test size: side of the square crop, in pixels.
        crop_pct: Share of the resized shorter side that the crop keeps, in (0, 1].
        interpolation: "bicubic" or "bilinear".
        mean: Per channel (RGB), on the [0, 1] scale.
        std: Per channel (RGB), on the [0, 1] scale.
    """

    size: int
    crop_pct: float
    interpolation: str
    mean: Triple
    std: Triple

    def timm_fields(self) -> dict[str, Any]:
        """The same as fields of timm's `PretrainedCfg`."""
        return {
            "input_size": (3, self.size, self.size),
            "pool_size": (-(-self.size // 32),) * 2,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
        }


@dataclass(frozen=True, slots=True)
class Accuracy:
    """ImageNet-2012 validation accuracy, single crop, in per cent, at one test size in pixels."""

    test_size: int
    top1: float
    top5: float


@dataclass(frozen=True, slots=True)
class PaperRow:
    """What the paper reports for a variant (arXiv 2003.08237, Table 1 or 2).

    Attributes:
        table: 1 (with extra data, Noisy Student) or 2 (without, AdvProp).
        parameters_millions: As printed there.
        base: The baseline that FixRes starts from.
        fix: The result of FixRes.
    """

    table: int
    parameters_millions: float
    base: Accuracy
    fix: Accuracy


@dataclass(frozen=True, slots=True)
class Measured:
    """Accuracy that was measured with the published weights, in per cent, and on what."""

    dataset: str
    images: int
    top1: float
    top5: float


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the FixRes delta of a variant lies: a pinned Hub file, or (overlays only) a local one.

    Attributes:
        repository: On the Hugging Face Hub; None for a local file.
        filename: In that repository; None for a local file.
        revision: Full commit hash, 40 hex digits; None for a local file.
        path: A local file beside the overlay manifest; None for a Hub file.
        sha256: Of the file, checked at every load.
        bytes: Size of the file.
        license: SPDX identifier, lower case.
        measured: Accuracy of these very weights.
    """

    repository: str | None
    filename: str | None
    revision: str | None
    path: Path | None
    sha256: str
    bytes: int | None
    license: str | None
    measured: Measured | None


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the manifest: one model of the zoo.

    Attributes:
        key: Its short name, such as "b4_ns".
        title: Its full name, for people.
        family: "advprop", "noisy_student" or "lite".
        backbone: The original network.
        parameters: Exact number of parameters with 1000 classes.
        train_size: Size at which the backbone was trained, in pixels.
        test: Test-time preprocessing.
        paper: The paper's figures; None for our own extension (the lite family).
        weights: The published FixRes delta; None while nothing is published.
        note: What a user must know besides; None where there is nothing.
    """

    key: str
    title: str
    family: str
    backbone: Backbone
    parameters: int
    train_size: int
    test: TestTime
    paper: PaperRow | None
    weights: Weights | None
    note: str | None

    @property
    def hub_name(self) -> str:
        """The entrypoint in hubconf.py, such as "fixefficientnet_b4_ns"."""
        return f"{PREFIX}_{self.key}"

    @property
    def architecture(self) -> str:
        """timm's architecture name, such as "fixefficientnet_b4"; families share it."""
        return f"{PREFIX}_{self.key.removesuffix('_ns')}"

    @property
    def timm_name(self) -> str:
        """timm's full name, such as "fixefficientnet_b4.ns_jft_in1k"."""
        return f"{self.architecture}.{self.backbone.tag}"

    @property
    def backbone_only(self) -> bool:
        """Whether no FixRes weights exist by design: our extension, which the paper did not tune."""
        return self.paper is None and self.weights is None

    @property
    def usual_weights(self) -> bool | str:
        """What `predict` takes for `pretrained` when it is not told: "backbone" where nothing else exists."""
        return "backbone" if self.backbone_only else True

    def pretrained_cfg(self) -> "PretrainedCfg":
        """timm's description of this variant; its data config gives the same pixels as `model.preprocess`."""
        from timm.models import PretrainedCfg

        weights = self.weights
        return PretrainedCfg(
            hf_hub_id=weights.repository if weights else None,
            hf_hub_filename=weights.filename if weights else None,
            architecture=self.architecture,
            tag=self.backbone.tag,
            first_conv=STEM,
            classifier=CLASSIFIER,
            license=weights.license if weights else self.backbone.license,
            paper_ids="arXiv:2003.08237",
            paper_name="Fixing the train-test resolution discrepancy: FixEfficientNet",
            origin_url="https://github.com/facebookresearch/FixRes",
            **self.test.timm_fields(),
        )

    def aliases(self) -> set[str]:
        """All names that mean this variant, in the normal form of `find`."""
        names = {self.key, self.timm_name.removeprefix(f"{PREFIX}_"), self.backbone.name}
        stem = self.key.removesuffix("_ns")
        if self.family == "advprop":
            names.add(f"{stem}_ap")
        elif self.family == "noisy_student":
            names.add(f"{stem}_ns")
        return names


def load() -> Mapping[str, Variant]:
    """All variants by key, in the manifest's order, with the overlay of the environment applied.

    Raises:
        ManifestError: The manifest or the overlay is malformed; names row and key.
    """
    overlay = os.environ.get(OVERLAY_VARIABLE, "").strip()
    if not overlay or overlay.startswith("{"):
        return _load(overlay, Path.cwd() if overlay else Path())
    file = Path(overlay).expanduser().absolute()
    try:
        stat = file.stat()
    except OSError as error:
        raise ManifestError(
            f"{OVERLAY_VARIABLE} names {overlay!r}, which cannot be read ({error.strerror}). "
            "Give the path of a manifest, or the JSON itself, or unset the variable."
        ) from None
    return _load("", file, (stat.st_mtime_ns, stat.st_size))


def find(name: str) -> Variant:
    """The variant of this name: its key, an alias, the hub entrypoint's name or a timm name.

    Args:
        name: Such as "b4", "b4_ap", "fixefficientnet_b4_ns", "FixEfficientNet-B4",
            "fixefficientnet_b4.ns_jft_in1k" or "tf_efficientnet_b4.ns_jft_in1k".

    Raises:
        UnknownVariantError: No variant has this name; the message has the closest ones.
    """
    variants = load()
    wanted = name.strip().lower().replace("-", "_").removeprefix(f"{PREFIX}_")
    known = dict(variants)  # a key goes before an alias, and a packaged row's alias before an added one's
    for variant in variants.values():
        for alias in variant.aliases():
            known.setdefault(alias, variant)
    for variant in variants.values():  # an architecture without a tag
        known.setdefault(variant.architecture.removeprefix(f"{PREFIX}_"), variant)
    if wanted in known:
        return known[wanted]
    close = dict.fromkeys(known[n].key for n in difflib.get_close_matches(wanted, known, n=6, cutoff=0.3))
    hint = f"Did you mean {', '.join(list(close)[:3])}?" if close else f"There are: {', '.join(variants)}."
    raise UnknownVariantError(f"No variant is named {name!r}. {hint} `fixefficientnet list` shows them all.")


def list_models(filter: str = "", *, pretrained: bool = False) -> list[str]:
    """Keys of the variants, in the manifest's order.

    Args:
        filter: Shell-style wildcard on the key, such as "*_ns"; all if empty.
        pretrained: Only those with published FixRes weights.
    """
    return [
        key
        for key, variant in load().items()
        if (not filter or fnmatch.fnmatch(key, filter)) and (variant.weights or not pretrained)
    ]


def packaged_path() -> Path:
    """Where the manifest lies: inside an installed package, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    inside = here / "weights_manifest.json"
    return inside if inside.exists() else here.parent / "weights_manifest.json"


def parse(document: object, *, folder: Path | None = None, source: str = "manifest") -> dict[str, Variant]:
    """Checks a whole manifest document and turns it into variants.

    Args:
        document: The decoded JSON.
        folder: Folder that local weights may lie in; None where they are not allowed.
        source: What to call the document in errors.

    Raises:
        ManifestError: Names the row and the key at fault.
    """
    try:
        variants = {key: _variant(key, row, folder) for key, row in _rows(document).items()}
        names: dict[str, str] = {}
        for key, variant in variants.items():
            if (other := names.setdefault(variant.timm_name, key)) != key:
                raise ManifestError(f"{key}: its timm name {variant.timm_name} is that of the row {other}")
        return variants
    except ManifestError as error:
        raise ManifestError(f"{source}: {error}") from None


@functools.lru_cache(maxsize=8)
def _load(overlay: str, place: Path, _version: object = None) -> Mapping[str, Variant]:
    """The packaged rows with an overlay: JSON text relative to the folder `place`, or the file `place`."""
    path = packaged_path()
    packaged = _read_json(path.read_text(encoding="utf-8"), str(path))
    variants = parse(packaged, source=str(path))
    if place == Path():
        return MappingProxyType(variants)
    if overlay:
        source, folder, text = OVERLAY_VARIABLE, place, overlay
    else:
        source, folder = str(place), place.resolve().parent
        try:
            text = place.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ManifestError(f"{place} ({OVERLAY_VARIABLE}) cannot be read: {error}") from None
    return MappingProxyType(parse_overlay(_read_json(text, source), folder=folder, source=source))


def parse_overlay(document: object, *, folder: Path, source: str) -> dict[str, Variant]:
    """Checks rows that lie over the packaged ones, and turns all into variants; see `parse`.

    Raises:
        ManifestError: Names the row and the key at fault.
    """
    packaged = _read_json(packaged_path().read_text(encoding="utf-8"), str(packaged_path()))
    try:
        merged = _merge(_rows(packaged), _rows(document))
    except ManifestError as error:
        raise ManifestError(f"{source}: {error}") from None
    return parse(merged, folder=folder, source=source)


def _read_json(text: str, source: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{source}: not JSON: {error}") from None


def _rows(document: object) -> dict[str, Any]:
    top = _object(document, "the document", {"schema_version", "variants"})
    if top["schema_version"] != SCHEMA_VERSION:
        raise ManifestError(
            f"schema_version: is {top['schema_version']!r}, this release reads {SCHEMA_VERSION}. "
            "Upgrade fixefficientnet, or write the manifest in that version."
        )
    variants = top["variants"]
    if not isinstance(variants, dict):
        raise ManifestError(f"variants: must be an object, is {_kind(variants)}")
    return variants


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lays `over` on `base` row by row; within a row, objects merge and everything else is replaced."""

    def deep(low: Any, high: Any) -> Any:
        if isinstance(low, dict) and isinstance(high, dict):
            return low | {key: deep(low.get(key), value) for key, value in high.items()}
        return high

    rows = dict(base)
    for key, row in over.items():
        rows[key] = deep(base.get(key), row)
        weights = row.get("weights") if isinstance(row, dict) else None
        if weights is not None:  # never half of one place's weights and half of another's
            rows[key]["weights"] = weights
    return {"schema_version": SCHEMA_VERSION, "variants": rows}


def _variant(key: str, row: object, folder: Path | None) -> Variant:
    if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", key):
        raise ManifestError(f"row {key!r}: a key has lower-case letters, digits and single underscores")
    keys = {"title", "family", "backbone", "parameters", "train_size", "test", "paper", "weights"}
    fields = _object(row, key, keys, {"note"})
    return Variant(
        key=key,
        title=_text(fields["title"], f"{key}.title"),
        family=_one_of(fields["family"], FAMILIES, f"{key}.family"),
        backbone=_backbone(fields["backbone"], f"{key}.backbone"),
        parameters=_whole(fields["parameters"], f"{key}.parameters"),
        train_size=_whole(fields["train_size"], f"{key}.train_size"),
        test=_test_time(fields["test"], f"{key}.test"),
        paper=None if fields["paper"] is None else _paper(fields["paper"], f"{key}.paper"),
        weights=None if fields["weights"] is None else _weights(fields["weights"], f"{key}.weights", folder),
        note=None if fields.get("note") is None else _text(fields["note"], f"{key}.note"),
    )


def _backbone(value: object, where: str) -> Backbone:
    keys = {"name", "repository", "filename", "revision", "sha256", "license", "package"}
    fields = _object(value, where, keys)
    package = None
    if fields["package"] is not None:
        inner = _object(fields["package"], f"{where}.package", {"name", "filename", "sha256"})
        package = Package(
            name=_text(inner["name"], f"{where}.package.name"),
            filename=relative_filename(inner["filename"], f"{where}.package.filename"),
            sha256=_hex(inner["sha256"], 64, f"{where}.package.sha256"),
        )
    name = _text(fields["name"], f"{where}.name")
    if not re.fullmatch(r"[a-z0-9_]+\.[a-z0-9_]+", name):
        raise ManifestError(f"{where}.name: must be timm's architecture.tag, is {name!r}")
    filename = relative_filename(fields["filename"], f"{where}.filename")
    _safetensors(filename, f"{where}.filename")
    return Backbone(
        name=name,
        repository=_repository(fields["repository"], f"{where}.repository"),
        filename=filename,
        revision=_text(fields["revision"], f"{where}.revision"),
        sha256=None if fields["sha256"] is None else _hex(fields["sha256"], 64, f"{where}.sha256"),
        license=_text(fields["license"], f"{where}.license"),
        package=package,
    )


def _test_time(value: object, where: str) -> TestTime:
    fields = _object(value, where, {"size", "crop_pct", "interpolation", "mean", "std"})
    return TestTime(
        size=_whole(fields["size"], f"{where}.size"),
        crop_pct=_number(fields["crop_pct"], f"{where}.crop_pct", 0, 1),
        interpolation=_one_of(fields["interpolation"], INTERPOLATIONS, f"{where}.interpolation"),
        mean=_triple(fields["mean"], f"{where}.mean"),
        std=_triple(fields["std"], f"{where}.std"),
    )


def _paper(value: object, where: str) -> PaperRow:
    fields = _object(value, where, {"table", "parameters_millions", "base", "fix"})
    table = _whole(fields["table"], f"{where}.table")
    if table not in (1, 2):
        raise ManifestError(f"{where}.table: must be 1 or 2, is {table}")
    return PaperRow(
        table=table,
        parameters_millions=_number(fields["parameters_millions"], f"{where}.parameters_millions", 0, 1e6),
        base=_accuracy(fields["base"], f"{where}.base"),
        fix=_accuracy(fields["fix"], f"{where}.fix"),
    )


def _accuracy(value: object, where: str) -> Accuracy:
    fields = _object(value, where, {"test_size", "top1", "top5"})
    return Accuracy(
        test_size=_whole(fields["test_size"], f"{where}.test_size"),
        top1=_number(fields["top1"], f"{where}.top1", 0, 100),
        top5=_number(fields["top5"], f"{where}.top5", 0, 100),
    )


def _weights(value: object, where: str, folder: Path | None) -> Weights:
    # the packaged manifest tells the whole story; an overlay must only pin the file
    story = {"bytes", "license", "measured"}
    must, optional = (story, set[str]()) if folder is None else (set[str](), story)
    if isinstance(value, dict) and "path" in value:
        fields = _object(value, where, {"path", "sha256"}, story)
    else:
        fields = _object(value, where, {"repository", "filename", "revision", "sha256"} | must, optional)
    local = "path" in fields
    measured = fields.get("measured")
    if measured is not None:
        inner = _object(measured, f"{where}.measured", {"dataset", "images", "top1", "top5"})
        measured = Measured(
            dataset=_text(inner["dataset"], f"{where}.measured.dataset"),
            images=_whole(inner["images"], f"{where}.measured.images"),
            top1=_number(inner["top1"], f"{where}.measured.top1", 0, 100),
            top5=_number(inner["top5"], f"{where}.measured.top5", 0, 100),
        )
    found = Weights(
        repository=None if local else _repository(fields["repository"], f"{where}.repository"),
        filename=None if local else relative_filename(fields["filename"], f"{where}.filename"),
        revision=None if local else _hex(fields["revision"], 40, f"{where}.revision"),
        path=_local(fields["path"], f"{where}.path", folder) if local else None,
        sha256=_hex(fields["sha256"], 64, f"{where}.sha256"),
        bytes=None if fields.get("bytes") is None else _whole(fields["bytes"], f"{where}.bytes"),
        license=None if fields.get("license") is None else _text(fields["license"], f"{where}.license"),
        measured=measured,
    )
    _safetensors(str(found.path or found.filename), f"{where}.{'path' if local else 'filename'}")
    return found


def _local(value: object, where: str, folder: Path | None) -> Path:
    if folder is None:
        raise ManifestError(
            f"{where}: a local path stands only in an overlay ({OVERLAY_VARIABLE}); "
            "the packaged manifest names Hub files"
        )
    path = (folder / relative_filename(value, where)).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ManifestError(f"{where}: {value!r} leads out of the manifest's folder {folder}")
    return path


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), f"the number {value!r}")


def _object(
    value: object, where: str, required: set[str], optional: frozenset[str] | set[str] = frozenset()
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: must be an object, is {_kind(value)}")
    if missing := sorted(required - set(value)):
        raise ManifestError(f"{where}: lacks the key {', '.join(missing)}")
    if extra := sorted(set(value) - required - optional):
        raise ManifestError(f"{where}: has the unknown key {', '.join(extra)}")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ManifestError(f"{where}: must be a non-empty string, is {value!r}")
    return value


def _one_of(value: object, allowed: tuple[str, ...], where: str) -> str:
    if value not in allowed:
        raise ManifestError(f"{where}: must be one of {', '.join(allowed)}, is {value!r}")
    return str(value)


def _whole(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ManifestError(f"{where}: must be a whole number above 0, is {value!r}")
    return value


def _number(value: object, where: str, above: float, up_to: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= up_to:
        raise ManifestError(f"{where}: must be a number in ({above:g}, {up_to:g}], is {value!r}")
    return float(value)


def _triple(value: object, where: str) -> Triple:
    if not isinstance(value, list) or len(value) != 3:
        raise ManifestError(f"{where}: must be a list of three numbers, is {value!r}")
    red, green, blue = (_number(number, f"{where}[{i}]", 0, 1) for i, number in enumerate(value))
    return red, green, blue


def _hex(value: object, digits: int, where: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
        raise ManifestError(f"{where}: must be {digits} lower-case hex digits, is {value!r}")
    return value


def _repository(value: object, where: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", value) or ".." in value:
        raise ManifestError(f"{where}: must be organisation/name on the Hub, is {value!r}")
    return value


def relative_filename(value: object, where: str) -> str:
    """Checks that a path from a file or a URI stays in its folder, and returns it.

    Raises:
        ManifestError: It is absolute, or leads out, or is empty.
    """
    path = PurePosixPath(_text(value, where))
    if path.is_absolute() or ".." in path.parts or "\\" in str(value) or ":" in str(value):
        raise ManifestError(f"{where}: must be a relative path that does not leave its folder, is {value!r}")
    return str(path)


def _safetensors(filename: str, where: str) -> None:
    if not filename.endswith(".safetensors"):
        raise ManifestError(f"{where}: must be a .safetensors file, is {filename!r}")
