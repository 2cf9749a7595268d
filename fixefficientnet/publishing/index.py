"""models.json: what a published repository tells of its models; the model card and the manifest's rows are made of it.

A version is vX.Y: Y counts publications that add models, X those that replace weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from fixefficientnet import manifest
from fixefficientnet._internal import records
from fixefficientnet._internal.records import Positive, Rule
from fixefficientnet.errors import PublishError
from fixefficientnet.evaluation.outcome import Summary
from fixefficientnet.manifest import PaperRow, Sha256, TestTime
from fixefficientnet.reproduce.recipe import Recipe
from fixefficientnet.reproduce.report import Gain, PairedTest

FILENAME = "models.json"
FIRST = "v1.0"
Version = Annotated[str, Rule("a version such as v1.0", pattern=r"v\d+\.\d+")]


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """One model of a published repository.

    Attributes:
        file: Name of the delta's file in the repository.
        sha256: sha256 of the file.
        bytes: Size of the file, in bytes.
        license: License of the weights; SPDX identifier, lower case.
        backbone: timm's name of the backbone.
        backbone_repository: Repository of the backbone on the Hub.
        parameters: Number of parameters of the whole network.
        test: Test-time preprocessing that the model was tuned for.
        dataset: Name of the images that it was measured on.
        measured: Figures of each evaluation, by a name in `report.TITLES`.
        paired: The tuned network against the untuned one, by a name in `report.UNTUNED`.
        paper: The paper's figures; None where it has none.
        comparable: Whether the model was measured on what the paper's figures are of.
        train_images: Number of training images.
        processes: Number of processes that trained it.
        recipe: Recipe of the fine-tuning.
        libraries: Version of each library that made it, by name.
        version: Version of the repository that brought these weights.
    """

    file: Annotated[str, Rule("the name of a .safetensors file", pattern=r"[\w-]+\.safetensors")]
    sha256: Sha256
    bytes: Positive
    license: str
    backbone: str
    backbone_repository: str
    parameters: Positive
    test: TestTime
    dataset: str
    measured: Mapping[str, Summary]
    paired: Mapping[str, PairedTest]
    paper: PaperRow | None
    comparable: bool
    train_images: Positive
    processes: Positive
    recipe: Recipe
    libraries: Mapping[str, str]
    version: Version

    @property
    def tuned(self) -> Summary:
        """Figures of the tuned network."""
        return self.measured["tuned"]

    @property
    def gain(self) -> Gain | None:
        """What FixRes brought."""
        return Gain.of(self.measured, self.paired)

    def same_as(self, other: "PublishedModel") -> bool:
        """Whether another record tells the same of a model, whatever version brought it."""
        return self == replace(other, version=self.version)


@dataclass(frozen=True, slots=True)
class Index:
    """All models of a repository.

    Attributes:
        version: Version of the repository.
        models: Each model by the variant's key, in the manifest's order.
    """

    version: Version
    models: Mapping[str, PublishedModel]

    @classmethod
    def load(cls, data: bytes, source: str) -> "Index":
        """Reads models.json; of another file, a PublishError names the source and the field at fault."""
        try:
            index = records.read_sealed(cls, records.decode(data), source, PublishError)
            if incomplete := [key for key, model in index.models.items() if "tuned" not in model.measured]:
                raise PublishError(f"{source}.models.{incomplete[0]}.measured: lacks the key tuned")
        except ValueError as error:
            raise PublishError(
                f"{source} is damaged, or of another release of fixefficientnet ({error}). Nothing was published."
            ) from error
        return index

    def dump(self) -> bytes:
        """The content of models.json."""
        return records.dumps_sealed(self)

    @classmethod
    def following(cls, index: "Index | None", models: Mapping[str, PublishedModel], *, replaced: bool) -> "Index":
        """The next version of a repository, or a first one (None): with more models, or others in the place of some.

        The new models, by the variant's key, get that version; it is a major one if weights are replaced.
        """
        version = FIRST
        if index is not None:
            major, minor = map(int, index.version.removeprefix("v").split("."))
            version = f"v{major + 1}.0" if replaced else f"v{major}.{minor + 1}"
        together = dict(index.models) if index else {}
        together |= {key: replace(model, version=version) for key, model in models.items()}
        order = {key: number for number, key in enumerate(manifest.load())}
        keys = sorted(together, key=lambda key: (order.get(key, len(order)), key))
        return cls(version, {key: together[key] for key in keys})
