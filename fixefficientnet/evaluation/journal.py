"""Finished batches of an evaluation on disk, so that one that was killed continues.

One JSON line per batch, appended when it is done; each process of a run has its own file. A line that a killed
process left half written, or that was changed since (its own checksum tells), is passed over, and its batch evaluated
again.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fixefficientnet._internal import records
from fixefficientnet._internal.files import append
from fixefficientnet.errors import EvaluationError
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.evaluation.predictions import ImagePrediction, Predictions

_CHECKSUM = "crc32"
"""Key of a line's checksum, over the line without it."""


@dataclass
class FinishedBatch:
    """A batch of images that is done.

    Attributes:
        predictions: Predictions by image index.
        unreadable: Reasons by image index.
        unturned: Indices of the images that have an EXIF orientation and were not turned.
        seconds: Time that the batch took.
    """

    predictions: dict[int, ImagePrediction] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)
    unturned: set[int] = field(default_factory=set)
    seconds: float = 0.0


@dataclass
class Finished:
    """All images that are done: what their batches have, and values that belong to the whole evaluation.

    The seconds are those of all batches; of several processes, of the slowest.
    """

    predictions: Predictions = field(default_factory=Predictions)
    unreadable: dict[int, str] = field(default_factory=dict)
    unturned: set[int] = field(default_factory=set)
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    def take(self, batch: FinishedBatch) -> None:
        """Takes in what this process finished next."""
        self.predictions.put(batch.predictions)
        self.unreadable |= batch.unreadable
        self.unturned |= batch.unturned
        self.seconds += batch.seconds

    def add(self, other: "Finished") -> None:
        """Takes in what another process finished at the same time."""
        self.predictions.add(other.predictions)
        self.unreadable |= other.unreadable
        self.unturned |= other.unturned
        self.seconds = max(self.seconds, other.seconds)
        self.notes |= other.notes

    def evaluation(self, size: int, crop_pct: float, images: int) -> Evaluation:
        """The whole; all images must be in."""
        self.predictions.extend_to(images)
        unreadable, unturned = dict(sorted(self.unreadable.items())), tuple(sorted(self.unturned))
        return Evaluation(size, crop_pct, self.predictions, unreadable, unturned, self.seconds)


class Journal:
    """The files of one evaluation, by their path without the ending: `path.0.jsonl` is the first process's."""

    def __init__(self, path: Path, rank: int = 0):
        self.path, self._rank = path, rank

    def files(self) -> list[Path]:
        """Those that are there."""
        prefix = f"{self.path.name}."
        names = self.path.parent.glob("*.jsonl") if self.path.parent.is_dir() else ()
        return sorted(name for name in names if name.stem.startswith(prefix) and name.stem[len(prefix) :].isdigit())

    def clear(self) -> None:
        """Forgets what is there."""
        for file in self.files():
            file.unlink(missing_ok=True)

    def read(self) -> Finished:
        """All finished batches and notes, of any number of processes."""
        found = Finished()
        for file in self.files():
            part = Finished()
            for line in _lines(file):
                if "indices" in line:
                    predictions = dict(zip(line["indices"], map(_prediction, line["predictions"]), strict=True))
                    unreadable = {int(index): reason for index, reason in line["unreadable"].items()}
                    unturned = set(line.get("unturned", ()))
                    part.take(FinishedBatch(predictions, unreadable, unturned, line["seconds"]))
                else:
                    part.notes |= line
            found.add(part)
        found.unreadable = {index: why for index, why in found.unreadable.items() if not found.predictions.has(index)}
        return found

    def write(self, batch: FinishedBatch) -> None:
        """Appends one finished batch."""
        rows = [[*prediction] for prediction in batch.predictions.values()]
        line = {"indices": [*batch.predictions], "predictions": rows}
        line |= {"unreadable": batch.unreadable, "unturned": sorted(batch.unturned), "seconds": batch.seconds}
        self._append(line)

    def note(self, values: Mapping[str, Any]) -> None:
        """Appends JSON values that belong to the whole; keys other than a batch's."""
        self._append(values)

    def _append(self, values: Mapping[str, Any]) -> None:
        file = self.path.with_name(f"{self.path.name}.{self._rank}.jsonl")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # where a killed process left half a line, this one must not become its other half
            begun = file.exists() and file.stat().st_size > 0
            append(file, b"\n" * begun + _line(values))
        except OSError as error:
            raise EvaluationError(
                f"{file} cannot be written: {error.strerror}. Once that is fixed, continue from the batches before."
            ) from error


def load(path: Path) -> Evaluation:
    """A finished evaluation, from its journal.

    Raises:
        EvaluationError: It is not there, or was not finished.
    """
    found = Journal(path).read()
    notes = found.notes
    if not {"size", "crop_pct", "images"} <= notes.keys():
        raise EvaluationError(f"{path}.*.jsonl is no evaluation, or an unfinished one.")
    evaluation = found.evaluation(notes["size"], notes["crop_pct"], notes["images"])
    if (lacking := len(evaluation.predictions) - evaluation.images - len(evaluation.unreadable)) > 0:
        raise EvaluationError(
            f"{path}.*.jsonl is damaged: it lacks {lacking:,} images. The command that made it, given again, evaluates "
            "them."
        )
    return evaluation


def _line(values: Mapping[str, Any]) -> bytes:
    text = json.dumps(values)
    return json.dumps({**values, _CHECKSUM: zlib.crc32(text.encode())}).encode()


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_bytes().splitlines():
        if len(line) > records.LARGEST:  # no batch is so large
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # torn
            continue
        if isinstance(values, dict):
            checksum = values.pop(_CHECKSUM, None)
            if checksum == zlib.crc32(json.dumps(values).encode()):
                yield values


def _prediction(row: list[Any]) -> ImagePrediction:
    labels, predicted, confidence, loss = row
    return ImagePrediction(tuple(labels), tuple(predicted), confidence, loss)
