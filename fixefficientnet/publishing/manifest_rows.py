"""The manifest's rows of published weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fixefficientnet import manifest
from fixefficientnet._internal.files import write_atomically
from fixefficientnet.errors import ManifestError, PublishError
from fixefficientnet.publishing.checks import Run

WIDTH = 110
"""Longest object or list that stands on one line."""


def updated(path: Path, runs: Sequence[Run], repository: str, revisions: Mapping[str, str]) -> str:
    """The text of a manifest's file with the rows of published runs.

    Args:
        path: A whole manifest, or rows to lay over one; need not be there.
        runs: Which.
        repository: Where they are published.
        revisions: At which commit, by variant.

    Raises:
        ManifestError: The file cannot be read, or is no manifest.
    """
    document = _read(path)
    usual = manifest.parse_overlay(document, folder=path.resolve().parent, source=str(path))
    for run in runs:
        row = document["variants"].setdefault(run.variant.key, {})
        tuned = run.report["measured"]["tuned"]
        row["weights"] = {
            "repository": repository,
            "filename": run.filename,
            "revision": revisions[run.variant.key],
            "sha256": run.sha256,
            "bytes": len(run.data),
            "license": run.delta.license,
            "measured": {
                "dataset": run.dataset,
                "images": tuned["images"],
                "top1": round(tuned["top1"], 3),
                "top5": round(tuned["top5"], 3),
            },
        }
        if run.variant.key not in usual or run.test != usual[run.variant.key].test:
            row["test"] = json.loads(json.dumps(asdict(run.test)))
        if run.variant.paper is None:
            row["note"] = None  # which says that there are no FixRes weights
    manifest.parse_overlay(document, folder=path.resolve().parent, source=str(path))
    return dumps(document) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"schema_version": manifest.SCHEMA_VERSION, "variants": {}}
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"{path} cannot be read as a manifest: {error}. Choose another file: --manifest."
        ) from error
    manifest.parse_overlay(document, folder=path.resolve().parent, source=str(path))
    assert isinstance(document, dict)
    return document


def write(path: Path, text: str) -> None:
    """Writes a manifest's file.

    Raises:
        PublishError: It cannot be written; all else is published.
    """
    try:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomically(path.resolve() if path.is_symlink() else path, text.encode())
    except OSError as error:
        raise PublishError(
            f"All is published, but {path} cannot be written: {error.strerror}. The same command, given again, "
            "writes it."
        ) from error


def dumps(value: Any, indent: str = "") -> str:
    """JSON as the packaged manifest is written: what is short and has no objects within stands on one line."""
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
