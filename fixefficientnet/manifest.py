"""The one reader of `weights_manifest.json`: everything known about a variant, as frozen dataclasses.

The annotations of the dataclasses are the manifest's only rules: reading, its errors and the JSON Schema follow from
them. Imports neither torch nor timm, so that listing models feels instant.

`FIXEFFICIENTNET_MANIFEST` (a path, or the JSON itself) lays rows over the packaged ones: an organisation's own
published weights, or a run of one's own, without touching the package.
"""

import difflib
import fnmatch
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fixefficientnet._internal import records
from fixefficientnet._internal.records import AboveZero, Percent, Positive, Rule, Share
from fixefficientnet.errors import ManifestError, UnknownVariantError

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

SCHEMA_VERSION = 1
OVERLAY_VARIABLE = "FIXEFFICIENTNET_MANIFEST"
INTERPOLATIONS = ("bilinear", "bicubic")
PREFIX = "fixefficientnet"
DEFAULT_MODEL = "lite0"
"""The default model of `predict`: its weights need no Hub."""

STEM, CLASSIFIER = "conv_stem", "classifier"
"""timm's names of the first and the last layer of an EfficientNet."""

_PART = r"(?!\.\.?(?:/|$))[^/\\:\x00-\x1f]+"
"""One part of a relative path: neither "." nor "..", and without what starts a root or a drive on any system."""
RELATIVE_FILE = Rule("a relative path that does not leave its folder", pattern=f"{_PART}(?:/{_PART})*")
_SAFETENSORS = "a .safetensors file, by a relative path that does not leave its folder"

T = TypeVar("T")
Key = Annotated[str, Rule("lower-case letters, digits and single underscores", pattern="[a-z0-9]+(?:_[a-z0-9]+)*")]
TimmName = Annotated[str, Rule("timm's architecture.tag", pattern=r"[a-z0-9_]+\.[a-z0-9_]+")]
Repository = Annotated[str, Rule("organisation/name on the Hub", pattern=r"(?!.*\.\.)[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")]
RelativeFile = Annotated[str, RELATIVE_FILE]
Safetensors = Annotated[str, Rule(_SAFETENSORS, pattern=rf"(?:{_PART}/)*{_PART}\.safetensors")]
LocalSafetensors = Annotated[Path, Rule(_SAFETENSORS, pattern=rf"(?:\./)*(?:{_PART}/)*{_PART}\.safetensors")]
Sha256 = Annotated[str, Rule("64 lower-case hex digits", pattern="[0-9a-f]{64}")]
Commit = Annotated[str, Rule("40 lower-case hex digits", pattern="[0-9a-f]{40}")]
Pixels = Annotated[int, Rule("a whole number of pixels from 1 to 65535", least=1, most=65535)]
Mean = Annotated[float, Rule("a number in [0, 1]", least=0, most=1)]
Interpolation = Annotated[str, Rule("bilinear or bicubic", pattern="|".join(INTERPOLATIONS))]
Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Package:
    """A PyPI package that ships the backbone's weights.

    Attributes:
        name: The distribution's name on PyPI.
        filename: The weights file, relative to the package's installation folder.
        sha256: The file's hash.
    """

    name: str
    filename: RelativeFile
    sha256: Sha256


def hub_url(repository: str) -> str:
    """Address of a repository's page on the Hugging Face Hub."""
    return f"https://huggingface.co/{repository}"


@dataclass(frozen=True, slots=True)
class Backbone:
    """The network that FixRes starts from, with its original weights.

    Attributes:
        name: timm's name, architecture and tag.
        repository: The repository on the Hugging Face Hub.
        filename: The file in that repository.
        revision: The branch, tag or commit of that repository.
        sha256: The file's hash; null where it was never recorded (the delta's fingerprint guards then).
        license: SPDX identifier, lower case.
        package: A PyPI package that ships the same network's weights, if there is one.
        top1: Top-1 accuracy at the train size as timm publishes it (ImageNet-2012 validation), in per cent; null where
            it publishes none.
    """

    name: TimmName
    repository: Repository
    filename: Safetensors
    revision: str
    sha256: Sha256 | None
    license: str
    package: Package | None
    top1: Percent | None = None

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
        mean: Mean per channel (RGB), on the [0, 1] scale.
        std: Standard deviation per channel (RGB), on the [0, 1] scale.
    """

    size: Pixels
    crop_pct: Share
    interpolation: Interpolation
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Share, Share, Share]

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
    """ImageNet-2012 validation accuracy, single crop.

    Attributes:
        test_size: Test size, in pixels.
        top1: Top-1 accuracy, in per cent.
        top5: Top-5 accuracy, in per cent.
    """

    test_size: Pixels
    top1: Percent
    top5: Percent


@dataclass(frozen=True, slots=True)
class PaperRow:
    """What the paper reports for a variant (arXiv 2003.08237, Table 1 or 2).

    Attributes:
        table: 1 (with extra data, Noisy Student) or 2 (without, AdvProp).
        parameters_millions: The number of parameters as printed there, in millions.
        base: The baseline that FixRes starts from.
        fix: The result of FixRes.
    """

    table: Literal[1, 2]
    parameters_millions: AboveZero
    base: Accuracy
    fix: Accuracy


@dataclass(frozen=True, slots=True)
class Measured:
    """Accuracy that was measured with the published weights.

    Attributes:
        dataset: The dataset and its split.
        images: The number of images.
        top1: Top-1 accuracy, in per cent.
        top5: Top-5 accuracy, in per cent.
    """

    dataset: str
    images: Positive
    top1: Percent
    top5: Percent


@dataclass(frozen=True, slots=True)
class Weights:
    """The FixRes delta of a variant: a file on the Hub, pinned.

    Attributes:
        repository: The repository on the Hugging Face Hub.
        filename: The file in that repository.
        revision: The commit's full hash.
        sha256: The file's hash, checked at every load.
        bytes: The file's size.
        license: SPDX identifier, lower case.
        measured: The accuracy of these very weights.
    """

    repository: Repository
    filename: Safetensors
    revision: Commit
    sha256: Sha256
    bytes: Positive | None = None
    license: str | None = None
    measured: Measured | None = None

    def __str__(self) -> str:
        return f"{self.repository}/{self.filename}@{self.revision}"


@dataclass(frozen=True, slots=True)
class PackagedWeights(Weights):
    """The FixRes delta of a variant as the packaged manifest tells it: with all that is known."""

    bytes: Positive
    license: str
    measured: Measured


@dataclass(frozen=True, slots=True)
class LocalWeights:
    """The FixRes delta of a variant: a local file in the folder of the overlay that names it, or below.

    Its path is relative to that folder in JSON, absolute once read. See `Weights` for the other attributes.
    """

    path: LocalSafetensors
    sha256: Sha256
    bytes: Positive | None = None
    license: str | None = None
    measured: Measured | None = None

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a manifest.

    Attributes:
        title: The variant's full name, for people.
        family: "advprop", "noisy_student" or "lite".
        backbone: The original network.
        parameters: Exact number of parameters with 1000 classes.
        train_size: Size at which the backbone was trained, in pixels.
        test: Test-time preprocessing.
        paper: The paper's figures; null for our own extension (the lite family).
        weights: The FixRes delta; null while nothing is published.
        note: A sentence that users must know; null where there is none.
    """

    title: str
    family: Literal["advprop", "noisy_student", "lite"]
    backbone: Backbone
    parameters: Positive
    train_size: Pixels
    test: TestTime
    paper: PaperRow | None
    weights: Weights | LocalWeights | None
    note: str | None = None


class PackagedRow(Row):  # no dataclass anew: the fields are Row's, and each dataclass takes a millisecond to import
    """One row of the packaged manifest: everything about one variant."""

    __slots__ = ()
    weights: PackagedWeights | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant(Row):
    """One model of the zoo: a row of the manifest and its key; see `Row` for the other attributes.

    Attributes:
        key: The variant's short name, such as "b4_ns".
    """

    key: str

    @property
    def hub_name(self) -> str:
        """The entry point in hubconf.py, such as "fixefficientnet_b4_ns"."""
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
        """The default of `pretrained` in `predict`: "backbone" where nothing else exists."""
        return "backbone" if self.backbone_only else True

    def pretrained_cfg(self) -> "PretrainedCfg":
        """timm's description of this variant; its data config gives the same pixels as `model.preprocess`."""
        from timm.models import PretrainedCfg

        weights = self.weights
        on_hub = weights if isinstance(weights, Weights) else None
        return PretrainedCfg(
            hf_hub_id=on_hub.repository if on_hub else None,
            hf_hub_filename=on_hub.filename if on_hub else None,
            architecture=self.architecture,
            tag=self.backbone.tag,
            first_conv=STEM,
            classifier=CLASSIFIER,
            license=weights.license if weights else self.backbone.license,
            paper_ids="arXiv:2003.08237",
            paper_name="Fixing the train-test resolution discrepancy: FixEfficientNet",
            origin_url=hub_url((on_hub or self.backbone).repository),
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


@dataclass(frozen=True, slots=True)
class Manifest:
    """weights_manifest.json: one row per variant, the single source of everything about a model.

    Attributes:
        schema_version: The version of this format.
        variants: The rows by key, in the order of listings.
    """

    schema_version: Literal[1]
    variants: Mapping[Key, Mapping[str, Any]]


def load() -> Mapping[str, Variant]:
    """All variants by key, in the manifest's order, with the overlay of the environment applied.

    Raises:
        ManifestError: The manifest or the overlay is malformed; the message names row and key.
    """
    overlay = os.environ.get(OVERLAY_VARIABLE, "").strip()
    if not overlay:
        return _load_packaged()
    if overlay.startswith("{"):
        return _load_overlay(overlay, Path.cwd(), OVERLAY_VARIABLE)
    file = Path(overlay).expanduser().absolute()
    try:
        text = records.read_text(file)
    except (OSError, ValueError) as error:
        raise ManifestError(
            f"{OVERLAY_VARIABLE} names {overlay!r}, which cannot be read ({error}). "
            "Give the path of a manifest, or the JSON itself, or unset the variable."
        ) from None
    return _load_overlay(text, file.resolve().parent, str(file))


def find(name: str) -> Variant:
    """The variant of this name: its key, an alias, the torch.hub entry point's name or a timm name.

    Args:
        name: The name, such as "b4", "b4_ap", "fixefficientnet_b4_ns", "FixEfficientNet-B4",
            "fixefficientnet_b4.ns_jft_in1k" or "tf_efficientnet_b4.ns_jft_in1k".

    Raises:
        UnknownVariantError: No variant has this name; the message names the closest ones.
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
        filter: A shell-style wildcard on the key, such as "*_ns"; empty for all variants.
        pretrained: Whether to leave out variants without published FixRes weights.
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


def parse(document: object, *, source: str = "manifest") -> dict[str, Variant]:
    """Makes variants of a whole, decoded manifest, as the packaged one must be; a ManifestError names row and key."""
    return _variants(_rows(document, source), PackagedRow, source)


def parse_overlay(document: object, *, folder: Path, source: str) -> dict[str, Variant]:
    """Lays rows (decoded JSON) over the packaged ones, and turns all into variants; see `parse` for what it raises.

    Within a row, objects merge and everything else is replaced; `weights` is replaced as a whole. Local weights lie in
    `folder`, or below: symbolic links too must not lead out of it.
    """
    packaged = str(packaged_path())
    rows = dict(_rows(_packaged(), packaged))
    for key, row in _rows(document, source).items():
        # never half of one place's weights and half of another's
        rows[key] = _merge(rows.get(key), row) | {key: row[key] for key in ("weights",) if key in row}
    found = _variants(rows, Row, source)
    for key, variant in found.items():
        if isinstance(variant.weights, LocalWeights):
            path = (folder / variant.weights.path).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise ManifestError(
                    f"{source}: variants.{key}.weights.path: {str(variant.weights.path)!r} leads out of the manifest's "
                    f"folder {folder}"
                )
            found[key] = replace(variant, weights=replace(variant.weights, path=path))
    return found


def schema() -> dict[str, Any]:
    """The JSON Schema of the packaged manifest; `weights_manifest.schema.json` is its text."""
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | records.schema(Manifest)
    found["properties"]["variants"]["additionalProperties"] = records.schema(PackagedRow)
    return found


@functools.cache
def _load_packaged() -> Mapping[str, Variant]:
    return MappingProxyType(parse(_packaged(), source=str(packaged_path())))


@functools.lru_cache(maxsize=8)
def _load_overlay(text: str, folder: Path, source: str) -> Mapping[str, Variant]:
    return MappingProxyType(parse_overlay(_decode(text, source), folder=folder, source=source))


def _packaged() -> Any:
    path = packaged_path()
    return _decode(path.read_text(encoding="utf-8"), str(path))


def _decode(text: str, source: str) -> Any:
    try:
        return records.decode(text)
    except ValueError as error:
        raise ManifestError(f"{source}: not JSON: {error}") from None


def _rows(document: object, source: str) -> Mapping[str, Mapping[str, Any]]:
    """The rows of a document by key, themselves not checked yet."""
    version = document.get("schema_version", SCHEMA_VERSION) if isinstance(document, dict) else SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        raise ManifestError(
            f"{source}: schema_version: is {version!r}, this release reads {SCHEMA_VERSION}. "
            "Upgrade fixefficientnet, or write the manifest in that version."
        )
    return _read(Manifest, document, "", source).variants


def _read(cls: type[T], value: object, where: str, source: str) -> T:
    try:
        return records.read(cls, value, where, ManifestError)
    except ManifestError as error:
        raise ManifestError(f"{source}: {error}") from None


def _merge(low: Any, high: Any) -> Any:
    """Lays JSON over other JSON: objects merge, everything else is replaced."""
    if isinstance(low, dict) and isinstance(high, dict):
        return low | {key: _merge(low.get(key), value) for key, value in high.items()}
    return high


def _variants(rows: Mapping[str, Mapping[str, Any]], cls: type[Row], source: str) -> dict[str, Variant]:
    variants = {}
    for key, row in rows.items():
        variants[key] = Variant(key=key, **records.values(_read(cls, row, f"variants.{key}", source)))
    names: dict[str, str] = {}
    for key, variant in variants.items():
        if (other := names.setdefault(variant.timm_name, key)) != key:
            raise ManifestError(f"{source}: {key}: its timm name {variant.timm_name} is that of the row {other}")
    return variants
