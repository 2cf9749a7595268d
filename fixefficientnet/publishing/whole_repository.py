"""A whole model to a repository of its own, which timm and transformers load: on the Hub, or as plain files."""

import contextlib
import filecmp
import os
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from fixefficientnet._internal.files import beside
from fixefficientnet.errors import PublishError
from fixefficientnet.models import LoadedModel
from fixefficientnet.options import PublishOptions
from fixefficientnet.publishing import card, folder, whole
from fixefficientnet.publishing.hub_repository import Contents, HubRepository, ask
from fixefficientnet.reproduce.report import Report


@dataclass(frozen=True)
class WholeResult:
    """What was published of a whole model, or would be.

    Attributes:
        loaded: The model.
        report: The report of the run that made it.
        repository: ORGANISATION/NAME.
        folder: The folder that was written instead of the repository; None for the Hub.
        files: Size of each file that was written, in bytes, by name; empty: all was there.
        card: The model card.
        revision: The commit on the Hub; None for a folder and a dry run.
        written: Whether anything was written; False for a dry run.
        unreachable: Why the Hub did not say what the repository has; dry run only, shown as if it had nothing.
    """

    loaded: LoadedModel
    report: Report
    repository: str
    folder: Path | None
    files: Mapping[str, int]
    card: str
    revision: str | None = None
    written: bool = True
    unreachable: str | None = None


def publish_model(loaded: LoadedModel, report: Report, repository: str, options: PublishOptions) -> WholeResult:
    """Writes a whole model to a repository of its own, ORGANISATION/NAME: on the Hub, that is one commit.

    Raises:
        PublishError: The repository has another model, or the files cannot be written.
    """
    to, spdx, dry_run = options.to, options.license, options.dry_run
    target = HubRepository(repository, options.private)
    where = f"{to} ({repository})" if to else repository
    # beside a folder that gets the files, unless it must not be touched
    writes = None if dry_run else to
    place: AbstractContextManager[Path | str] = beside(writes) if writes else tempfile.TemporaryDirectory()
    try:
        with place as temporary, contextlib.ExitStack() as stack:
            files = whole.write_files(loaded, Path(temporary), repository, spdx, report)
            if writes:  # what is there is looked at when nobody else writes any more
                stack.enter_context(folder.writing(writes))
            contents, unreachable = (Contents(), None) if to else ask(target, dry_run)
            sizes = {name: file.stat().st_size for name, file in files.items()}
            if to:
                there = {name for name in files if os.path.lexists(to / name)}
                changed = {name: file for name, file in files.items() if not _same(to / name, file)}
            else:
                there = contents.hashes.keys() & files.keys()
                changed = {name: file for name, file in files.items() if not contents.has(name, file)}
            other = sorted(there & changed.keys())  # what a publication that was killed left is no other model's
            if other and whole.MODEL in changed and not options.replace:
                raise PublishError(
                    f"{where} has {', '.join(other)} of another model. Nothing was published there: choose another "
                    "repository or folder, or replace them with --replace."
                )
            revision = contents.head
            if to and whole.MODEL in changed:
                changed = dict(files)
            if changed and not dry_run and to:
                whole.move(changed, to)
            elif changed and not dry_run:
                revision = target.commit(changed, f"Add {loaded.architecture}", contents.head)
    except OSError as error:
        raise PublishError(
            f"{error.filename or where} cannot be written: {error.strerror or error}. The same command, given again, "
            "completes it."
        ) from error
    written = {name: sizes[name] for name in changed}
    text = card.render_model(repository, loaded, spdx, report).decode()
    return WholeResult(loaded, report, repository, to, written, text, revision, not dry_run, unreachable)


def _same(path: Path, file: Path) -> bool:
    return path.is_file() and filecmp.cmp(path, file, shallow=False)
