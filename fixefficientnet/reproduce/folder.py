"""The files of a run's folder, and what tells a run from every other one."""

from dataclasses import dataclass
from pathlib import Path

from fixefficientnet._internal import records
from fixefficientnet._internal.files import write_atomically
from fixefficientnet._internal.records import Positive
from fixefficientnet.errors import CheckpointError, MissingFileError
from fixefficientnet.models import DELTA, MODEL
from fixefficientnet.reproduce import hours, probe, report
from fixefficientnet.reproduce.recipe import Recipe, differences

RECIPE = "recipe.json"
CHECKPOINT = Path("checkpoint", "state.safetensors")
EVALUATIONS = "evaluations"
PROGRESS = ("checkpoint", EVALUATIONS, "features", "log.jsonl", report.FILENAME)
"""What a run leaves once it has done something."""
LAST = "last.safetensors"
"""The network after the last epoch of a base stage, where that is not the best one, which `MODEL` holds."""
OURS = (
    *PROGRESS,
    "curve.png",
    "tensorboard",
    DELTA,
    MODEL,
    LAST,
    hours.FILENAME,
    probe.FILENAME,
    RECIPE,
    report.TEXT,
    report.PAGE,
)
"""All that a run writes into its folder."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells a run from every other one; `recipe.json` in its folder.

    Attributes:
        recipe: The recipe.
        train_images: Fingerprint of the training split.
        validation_images: Fingerprint of the validation split.
        network: Fingerprint of the weights that the run starts from.
        processes: Number of processes that share each step's batch, as each one's norm sees its own part; None where
            their number changes nothing (cached).
    """

    recipe: Recipe
    train_images: str
    validation_images: str
    network: str
    processes: Positive | None = None

    @classmethod
    def load(cls, file: Path) -> "Identity":
        """Reads a run's recipe.json.

        Raises:
            MissingFileError: There is no such file.
            CheckpointError: The file is damaged, or of another release.
        """
        try:
            document = records.decode_file(file)
        except FileNotFoundError:
            raise MissingFileError(f"{file}: there is no such file.") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged ({error}). Delete it, or start anew with --overwrite.") from error
        return cls.of(document, file)

    @classmethod
    def of(cls, document: object, file: Path) -> "Identity":
        """Makes an identity of decoded JSON; see `load`."""
        try:
            return records.read_sealed(cls, document, str(file), CheckpointError)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. Delete the file, or start anew with --overwrite.") from None

    def dump(self, file: Path) -> None:
        """Writes recipe.json."""
        write_atomically(file, records.dumps_sealed(self))

    def differences(self, other: "Identity") -> list[str]:
        """Where two runs differ, for people."""
        found = differences(self.recipe, other.recipe)
        for field_, text in (("train_images", "training images"), ("validation_images", "validation images")):
            found += [f"other {text}"] * (getattr(self, field_) != getattr(other, field_))
        found += ["another network"] * (self.network != other.network)
        if self.processes != other.processes:
            found.append(
                f"processes: {self.processes} there, {other.processes} here; the batch norm of each sees its part of a "
                "batch, so that a run continues with as many as it began with"
            )
        return found
