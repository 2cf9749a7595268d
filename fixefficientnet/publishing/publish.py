"""publish(): runs to a repository of deltas, and to the manifest's rows that load from it.

`models.json` in the repository is its memory: the version, and what is told of each model. The model card is made from
it. A version vX.Y is the tag of a commit: Y counts additions, X commits that replaced weights.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixefficientnet import manifest
from fixefficientnet.errors import PublishError
from fixefficientnet.publishing import card, manifest_rows
from fixefficientnet.publishing.checks import Run
from fixefficientnet.publishing.repository import INDEX, Place, Present, check_name

CARD = "README.md"
FIRST = "v1.0"


@dataclass(frozen=True)
class Plan:
    """What publishing would do.

    Attributes:
        repository: organisation/name.
        version: The tag that the runs will be under.
        added: Variants that the repository did not have.
        replaced: Variants whose weights change.
        models: All that the repository will have; see `Run.entry`.
        files: What is committed, by name; empty: all is there.
    """

    repository: str
    version: str
    added: tuple[str, ...]
    replaced: tuple[str, ...]
    models: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, bytes]

    @property
    def message(self) -> str:
        """Of the commit."""
        said = [f"{what} {', '.join(keys)}" for what, keys in (("add", self.added), ("replace", self.replaced)) if keys]
        return f"{self.version}: {'; '.join(said) or 'tell more of what is there'}"


@dataclass(frozen=True)
class Published:
    """What publishing did.

    Attributes:
        plan: What was to be done.
        revisions: The commit at which each run's weights are, 40 hex digits, by variant.
        manifest: The manifest file's new text.
    """

    plan: Plan
    revisions: Mapping[str, str]
    manifest: str


def plan(runs: Sequence[Run], repository: str, present: Present, *, replace: bool = False) -> Plan:
    """Holds runs against what a repository has.

    Args:
        runs: Of different variants.
        repository: organisation/name.
        present: What it has.
        replace: Whether what is there under the same name may be replaced.

    Raises:
        PublishError: It has something else under the same name.
    """
    check_name(repository)
    version, models = _memory(repository, present)
    entries = {run.variant.key: json.loads(json.dumps({**run.entry(), "version": None})) for run in runs}
    changed = [key for key, entry in entries.items() if {**models.get(key, {}), "version": None} != entry]
    replaced = [key for key in changed if key in models and models[key].get("sha256") != entries[key]["sha256"]]
    if replaced and not replace:
        said = "\n".join(f"  {key}: sha256 {models[key].get('sha256')}" for key in replaced)
        raise PublishError(
            f"{repository} has other weights ({version}):\n{said}\nNothing was published. --replace puts these runs' "
            "in their place, under a new tag; the old ones stay at theirs."
        )
    names = {entries[key]["file"] for key in changed if key not in models}
    if present.index is None:
        names.add(CARD)
    if not replace and (foreign := sorted(names & present.names)):
        raise PublishError(
            f"{repository} has {', '.join(foreign)}, which `publish` did not write. Nothing was published: choose "
            "another repository, or replace them with --replace."
        )
    following = _next(version, bool(replaced))
    together = models | {key: {**entries[key], "version": following} for key in changed}
    order = {key: number for number, key in enumerate(manifest.load())}
    together = dict(sorted(together.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))
    if not changed:
        return Plan(repository, version or FIRST, (), (), together, {})
    if following in present.tags:
        raise PublishError(
            f"{repository} has a tag {following} already, which `publish` did not make. Nothing was published: remove "
            "it first."
        )
    files = {run.filename: run.data for run in runs if run.variant.key in changed}
    index = {"version": following, "models": together}
    files |= {INDEX: (json.dumps(index, indent=2) + "\n").encode()}
    try:
        files |= {CARD: card.render(repository, following, together).encode()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise PublishError(f"{INDEX} of {repository} is damaged ({error!r}). Nothing was published.") from error
    added = tuple(key for key in changed if key not in models)
    return Plan(repository, following, added, tuple(replaced), together, files)


def _memory(repository: str, present: Present) -> tuple[str | None, dict[str, dict[str, Any]]]:
    if present.index is None:
        return None, {}
    try:
        index = json.loads(present.index)
        version, models = index["version"], dict(index["models"])
        if not re.fullmatch(r"v\d+\.\d+", version) or not all(isinstance(entry, dict) for entry in models.values()):
            raise ValueError(version)
    except (ValueError, KeyError, TypeError) as error:
        raise PublishError(f"{INDEX} of {repository} cannot be read ({error!r}). Nothing was published.") from error
    return version, models


def _next(version: str | None, replaced: bool) -> str:
    if version is None:
        return FIRST
    major, minor = map(int, version.removeprefix("v").split("."))
    return f"v{major + 1}.0" if replaced else f"v{major}.{minor + 1}"


def publish(runs: Sequence[Run], chosen: Plan, place: Place, present: Present, manifest_file: Path) -> Published:
    """Does what was planned: a commit, its tag, the manifest's rows; what is done already stays as it is.

    Args:
        runs: Of the plan.
        chosen: What `plan` gave for `present`.
        place: Where to.
        present: What it has.
        manifest_file: Which gets the rows: a whole manifest, or rows to lay over one; made if need be.

    Raises:
        PublishError: Something failed; the message says what is published by then. The same call completes it.
        ManifestError: The manifest's file cannot take the rows; found before anything is published.
    """
    keys = [run.variant.key for run in runs]
    manifest_rows.updated(manifest_file, runs, chosen.repository, dict.fromkeys(keys, "0" * 40))
    tagged = present.tags.get(chosen.version)
    if chosen.files:
        revision = place.commit(chosen.files, chosen.message, present.head)
    else:
        assert present.head is not None
        revision = tagged or present.head
    if not tagged or chosen.files:
        try:
            place.tag(chosen.version, revision)
        except (KeyboardInterrupt, SystemExit) as error:
            raise PublishError(
                f"Stopped: the commit {revision} is published, its tag {chosen.version} may not be. The same command "
                "completes it."
            ) from error
    tags = {**present.tags, chosen.version: revision}
    revisions = {key: tags.get(str(chosen.models[key].get("version")), revision) for key in keys}
    text = manifest_rows.updated(manifest_file, runs, chosen.repository, revisions)
    manifest_rows.write(manifest_file, text)
    return Published(chosen, revisions, text)
