"""The manifest's rows of published weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fixefficientnet import manifest
from fixefficientnet._internal import records
from fixefficientnet._internal.files import write_atomically
from fixefficientnet._internal.waiting import locked
from fixefficientnet.errors import ManifestError, PublishError
from fixefficientnet.manifest import LocalWeights, Measured, Weights
from fixefficientnet.publishing.index import PublishedModel

FILENAME = "weights_manifest.json"
WIDTH = 110
"""Longest object or list that stands on one line."""
NEW: Mapping[str, Any] = {"schema_version": manifest.SCHEMA_VERSION, "variants": {}}
"""A manifest without rows."""


def on_hub(model: PublishedModel, repository: str, revision: str) -> Weights:
    """Where the weights of a model lie in a repository (ORGANISATION/NAME) on the Hub, at a commit (40 hex digits)."""
    return Weights(repository, model.file, revision, model.sha256, model.bytes, model.license, _measured(model))


def in_folder(model: PublishedModel) -> LocalWeights:
    """Where the weights of a model lie in the folder of the manifest."""
    return LocalWeights(Path(model.file), model.sha256, model.bytes, model.license, _measured(model))


def _measured(model: PublishedModel) -> Measured:
    tuned = model.tuned
    return Measured(model.dataset, tuned.images, round(tuned.top1, 3), round(tuned.top5, 3))


def updated(
    document: Mapping[str, Any],
    path: Path,
    models: Mapping[str, PublishedModel],
    weights: Mapping[str, Weights | LocalWeights],
) -> str:
    """The text of a manifest (a whole one, or rows to lay over one) with the rows of published models.

    Models, and where their weights lie, are by the variant's key.

    Raises:
        ManifestError: It is no manifest, or cannot take the rows.
    """
    folder, source = path.resolve().parent, str(path)
    usual = manifest.parse_overlay(document, folder=folder, source=source)
    rows = dict(document["variants"])
    for key, model in models.items():
        row = rows[key] = dict(rows.get(key, {}))
        given = records.to_json(weights[key]).items()
        row["weights"] = {name: value for name, value in given if value is not None}
        if key not in usual or model.test != usual[key].test:
            row["test"] = records.to_json(model.test)
        if model.paper is None:
            row["note"] = None  # which says that there are no FixRes weights
    together = {**document, "variants": rows}
    manifest.parse_overlay(together, folder=folder, source=source)
    return dumps(together) + "\n"


def read(path: Path) -> Mapping[str, Any]:
    """Reads a manifest's file; where there is none, gives one without rows. Another file is a ManifestError."""
    try:
        document = records.decode_file(path)
    except FileNotFoundError:
        return NEW
    except (OSError, ValueError) as error:
        raise ManifestError(
            f"{path} cannot be read as a manifest: {error}. Choose another file: --manifest."
        ) from error
    manifest.parse_overlay(document, folder=path.resolve().parent, source=str(path))
    assert isinstance(document, dict)
    return document


def rewrite(path: Path, text_of: Callable[[], str]) -> str:
    """Writes a manifest's file anew, one process after the other: each reads what the one before it wrote.

    The new text, which `text_of` makes of what it reads in the file, is returned.

    Raises:
        PublishError: The file cannot be written; all else is published.
        ManifestError: As `text_of` raises.
    """
    try:
        if path.is_file() and path.read_text(encoding="utf-8") == (text := text_of()):
            return text
        real = path.resolve() if path.is_symlink() else path
        real.parent.mkdir(parents=True, exist_ok=True)
        with locked(real.with_name(f".{real.name[:64]}.lock"), str(path)):
            text = text_of()
            write_atomically(real, text.encode())
            return text
    except OSError as error:
        raise PublishError(
            f"All is published, but {path} cannot be written: {error.strerror or error}. The same command, given "
            "again, writes it."
        ) from error


def dumps(value: Any, indent: str = "") -> str:
    """JSON as the packaged manifest is written: what is short and holds no objects stands on one line."""
    inner = list(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    line = json.dumps(value, ensure_ascii=False)
    short = len(indent) + len(line) <= WIDTH and not any(isinstance(one, dict | list) for one in inner)
    if not inner or short:
        return line
    deeper = indent + "  "
    if isinstance(value, dict):
        parts = [f"{deeper}{json.dumps(key)}: {dumps(one, deeper)}" for key, one in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + dumps(one, deeper) for one in value) + f"\n{indent}]"
