"""publish(): finished runs to a repository of deltas and the manifest's rows, or to one of a whole model."""

import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from fixefficientnet.errors import PublishError
from fixefficientnet.models import DELTA, load
from fixefficientnet.options import PublishOptions
from fixefficientnet.publishing import card, checks, folder, index, manifest_rows
from fixefficientnet.publishing.checks import CheckedRun
from fixefficientnet.publishing.hub_repository import Contents, HubRepository, ask, check_name
from fixefficientnet.publishing.index import Index, PublishedModel
from fixefficientnet.publishing.whole_repository import WholeResult, publish_model
from fixefficientnet.reproduce.recipe import Recipe, differences

_MANIFEST = Path(manifest_rows.FILENAME)
NO_COMMIT = "0" * 40
"""Stands for the commit in the rows of a dry run."""


@dataclass(frozen=True)
class Plan:
    """The difference between what a repository has and what it will have.

    Attributes:
        index: All models that the repository will have.
        added: Keys of the variants that it did not have.
        replaced: Keys of the variants whose weights change.
        described: Keys of the variants whose weights stay and whose description changes.
        listed: Names of the files that an earlier publication wrote.
        obsolete: Names of the files whose place others take.
    """

    index: Index
    added: tuple[str, ...]
    replaced: tuple[str, ...]
    described: tuple[str, ...]
    listed: frozenset[str]
    obsolete: frozenset[str]

    @property
    def changed(self) -> tuple[str, ...]:
        """Keys of all variants that change."""
        return self.added + self.replaced + self.described

    @property
    def message(self) -> str:
        """The version and what it changes; the message of the commit."""
        groups = {"add": self.added, "replace": self.replaced, "describe anew": self.described}
        said = [f"{what} {', '.join(keys)}" for what, keys in groups.items() if keys]
        return f"{self.index.version}: {'; '.join(said)}"


@dataclass(frozen=True)
class PublishResult:
    """What was published, or would be.

    Attributes:
        runs: The checked runs.
        where: Repository on the Hub; for a folder, the folder and the name that it is to be served under.
        message: The version and what it changed.
        files: Content of each file that was written, by name; empty: all was there.
        manifest_file: The manifest's file that has the rows.
        manifest: Text of the manifest's file; of a dry run on the Hub, with zeros for the commit.
        models: What the repository tells of each run, by the variant's key.
        revisions: Commit of each run's weights on the Hub, by the variant's key; empty for a folder and a dry run.
        written: Whether anything was written; False for a dry run.
        unreachable: Why the Hub did not say what the repository has; dry run only, shown as if it had nothing.
    """

    runs: Sequence[CheckedRun]
    where: str
    message: str
    files: Mapping[str, bytes]
    manifest_file: Path
    manifest: str
    models: Mapping[str, PublishedModel] = field(default_factory=dict)
    revisions: Mapping[str, str] = field(default_factory=dict)
    written: bool = True
    unreachable: str | None = None


@dataclass(frozen=True)
class Publication:
    """What a call of `publish` did, or would do.

    Attributes:
        deltas: The deltas of runs of variants; None where a network of one's own was published.
        models: The whole models, each in a repository of its own.
    """

    deltas: PublishResult | None
    models: Sequence[WholeResult]


def publish(runs: Sequence[Path], repository: str, options: PublishOptions | None = None) -> Publication:
    """Checks finished runs and publishes them.

    Runs of variants go together into one repository of deltas, with a model card and models.json: on the Hub one commit
    and its tag; then a manifest's file gets the rows. A run of another network, or of classes of one's own, becomes a
    repository as timm keeps its models. What is there already stays as it is, so the same call completes one that
    failed.

    The repository is ORGANISATION/NAME on the Hub; with a folder (`to`), the cards name the weights as in it.

    Raises:
        PublishError: A run cannot be published, or not there; the message says what is published by then.
        ManifestError: The manifest's file cannot take the rows; found before anything is published.
        FixEfficientNetError: A run's file is damaged, or its backbone cannot be loaded.
    """
    options = options or PublishOptions()
    check_name(repository)
    if options.to is not None and (options.private or options.manifest is not None):
        option = "--private" if options.private else "--manifest"
        raise PublishError(f"{option} is for the Hub. A folder (--to) has its own {manifest_rows.FILENAME}.")
    own = [run for run in runs if not checks.has_delta_to_publish(run)]
    if own:
        if len(runs) > 1:
            raise PublishError(
                f"{own[0]} is a run of a network of your own, which gets its own repository: publish it alone."
            )
        loaded, report = checks.check_model(own[0])
        return Publication(None, [publish_model(loaded, report, repository, options)])
    checked = checks.check_all(runs)
    if options.to is None:
        deltas = _to_hub(checked, repository, options)
    else:
        deltas = _to_folder(checked, repository, options.to, options)
    return Publication(deltas, [_publish_whole(each, repository, options) for each in checked if options.whole])


def _publish_whole(run: CheckedRun, repository: str, options: PublishOptions) -> WholeResult:
    """Publishes the whole model of a variant's run beside the repository of its delta."""
    name = run.variant.timm_name
    loaded = load(f"{run.variant.key}:{run.folder / DELTA}")
    options = replace(options, to=options.to and options.to / name)
    return publish_model(loaded, run.report, f"{repository.partition('/')[0]}/{name}", options)


def plan(models: Mapping[str, PublishedModel], before: Index | None, where: str, *, replace: bool = False) -> Plan:
    """Compares models to publish, by the variant's key, with what a repository has (None: nothing).

    Raises:
        PublishError: The repository has other weights of a variant, which are not to be replaced.
    """
    there = dict(before.models) if before else {}
    added = tuple(key for key in models if key not in there)
    replaced = tuple(key for key in models if key in there and models[key].sha256 != there[key].sha256)
    same = {key for key in models if key in there and models[key].same_as(there[key])}
    described = tuple(key for key in models if key not in {*added, *replaced, *same})
    if replaced and not replace:
        assert before is not None
        said = "\n".join(f"  {key}: sha256 {there[key].sha256}" for key in replaced)
        raise PublishError(
            f"{where} has other weights ({before.version}):\n{said}\nNothing was published. --replace puts these runs' "
            "in their place, as the next version."
        )
    changed = {key: models[key] for key in added + replaced + described}
    after = before if before and not changed else Index.following(before, changed, replaced=bool(replaced))
    assert after is not None
    files = frozenset(model.file for model in there.values())
    obsolete = files - {model.file for model in after.models.values()}
    made = {index.FILENAME, card.FILENAME, manifest_rows.FILENAME} if before else set()
    return Plan(after, added, replaced, described, files | made, obsolete)


def _refuse_foreign(where: str, names: Set[str], replace: bool) -> None:
    """Refuses to replace files that no publication wrote."""
    if names and not replace:
        raise PublishError(
            f"{where} has {', '.join(sorted(names))}, which `publish` did not write. Nothing was published: choose "
            "another repository or folder, or replace them with --replace."
        )


def _said(planned: Plan, files: Mapping[str, bytes]) -> str:
    if planned.changed:
        return planned.message
    return f"{planned.index.version}: {'write again what was missing' if files else 'all was there already'}"


def _to_folder(runs: Sequence[CheckedRun], repository: str, target: Path, options: PublishOptions) -> PublishResult:
    content = folder.read_index(target)
    before = None if content is None else Index.load(content, str(target / index.FILENAME))
    # other weights get another name: a publication that is killed leaves both, and each manifest finds its own
    models = {run.variant.key: run.as_model(f"{run.variant.key}-{run.sha256[:8]}.safetensors") for run in runs}
    planned = plan(models, before, str(target), replace=options.replace)
    after, manifest_file = planned.index, target / manifest_rows.FILENAME
    weights = {key: manifest_rows.in_folder(model) for key, model in after.models.items()}
    text = manifest_rows.updated(manifest_rows.NEW, manifest_file, after.models, weights)
    files = {after.models[run.variant.key].file: run.data for run in runs}
    files |= {manifest_rows.FILENAME: text.encode(), card.FILENAME: card.render(repository, after)}
    files |= {index.FILENAME: after.dump()}
    files = {name: data for name, data in files.items() if not folder.has(target / name, data)}
    there = {name for name in files if os.path.lexists(target / name)}
    _refuse_foreign(str(target), there - planned.listed, options.replace)
    written = not options.dry_run
    if written:
        folder.write(target, files, planned.obsolete, before=content)
    where, models = f"{target} ({repository})", {key: after.models[key] for key in models}
    return PublishResult(runs, where, _said(planned, files), files, manifest_file, text, models, written=written)


def _to_hub(runs: Sequence[CheckedRun], repository: str, options: PublishOptions) -> PublishResult:
    target, manifest_file = HubRepository(repository, options.private), options.manifest or _MANIFEST
    contents, unreachable = ask(target, options.dry_run)
    before = None if contents.index is None else Index.load(contents.index, f"{index.FILENAME} of {repository}")
    models = {run.variant.key: run.as_model(f"{run.variant.key}.safetensors") for run in runs}
    planned = plan(models, before, repository, replace=options.replace)
    after, written = planned.index, not options.dry_run
    files: dict[str, bytes] = {}
    if planned.changed:
        if after.version in contents.tags:
            raise PublishError(
                f"{repository} has a tag {after.version} already, which `publish` did not make. Nothing was "
                "published: remove it first."
            )
        changed = (run for run in runs if run.variant.key in planned.changed)
        files = {after.models[run.variant.key].file: run.data for run in changed}
        files |= {index.FILENAME: after.dump(), card.FILENAME: card.render(repository, after)}
        _refuse_foreign(repository, contents.hashes.keys() & (files.keys() - planned.listed), options.replace)
    models = {key: after.models[key] for key in models}
    # with zeros first: a manifest that cannot take the rows is found before anything is published
    text = _hub_rows(manifest_file, models, repository, dict.fromkeys(models, NO_COMMIT))
    revisions: dict[str, str] = {}
    if written:
        revision = _commit(target, after.version, files, planned.message, contents)
        revisions, text = _load_from(target, models, contents, revision, manifest_file)
    said = _said(planned, files)
    return PublishResult(
        runs, repository, said, files, manifest_file, text, models, revisions, written=written, unreachable=unreachable
    )


def published(
    recipes: Mapping[str, Recipe], repository: str, options: PublishOptions
) -> tuple[dict[str, PublishedModel], dict[str, list[str]]]:
    """What a repository on the Hub has of variants; completes its last tag and the manifest's rows of these.

    These are the variants that it has by these recipes, and those that it has by others, with the differences; all are
    by the variant's key.

    Raises:
        PublishError: The Hub does not answer, or refuses.
        ManifestError: The manifest's file cannot take the rows.
    """
    check_name(repository)
    target, file = HubRepository(repository, options.private), options.manifest or _MANIFEST
    manifest_rows.read(file)
    contents = target.contents()
    if contents.index is None:
        return {}, {}
    there = Index.load(contents.index, f"{index.FILENAME} of {repository}")
    models = {key: there.models[key] for key in recipes if key in there.models}
    differing = {}
    for key, model in models.items():
        asked = recipes[key]
        if asked.upright is None:  # which follows from the images
            asked = replace(asked, upright=model.recipe.upright)
        differing[key] = differences(model.recipe, asked)
    same = {key: model for key, model in models.items() if not differing[key]}
    if same:
        revision = _commit(target, there.version, {}, "", contents)
        _load_from(target, same, contents, revision, file)
    return same, {key: found for key, found in differing.items() if found}


def _load_from(
    target: HubRepository, models: Mapping[str, PublishedModel], contents: Contents, newest: str, manifest_file: Path
) -> tuple[dict[str, str], str]:
    """Writes the manifest's rows that load models from a repository, which had these contents, on the Hub.

    Given is also the commit of its newest version. Gives the commit of each model, by the variant's key, and the text
    of the manifest's file.
    """
    revisions = {key: contents.tags.get(model.version, newest) for key, model in models.items()}
    text = manifest_rows.rewrite(manifest_file, lambda: _hub_rows(manifest_file, models, target.name, revisions))
    return revisions, text


def _commit(target: HubRepository, version: str, files: Mapping[str, bytes], message: str, contents: Contents) -> str:
    """Makes the commit and its tag, as far as they are missing; returns the commit."""
    tagged = contents.tags.get(version)
    if files:
        revision = target.commit(files, message, contents.head)
    else:
        assert contents.head is not None
        revision = tagged or contents.head
    if not tagged:
        try:
            target.tag(version, revision)
        except (KeyboardInterrupt, SystemExit) as error:
            raise PublishError(
                f"Stopped: the commit {revision} is published, its tag {version} may not be. The same command "
                "completes it."
            ) from error
    return revision


def _hub_rows(path: Path, models: Mapping[str, PublishedModel], repository: str, revisions: Mapping[str, str]) -> str:
    """The text of a manifest's file with rows that load models from the Hub."""
    weights = {key: manifest_rows.on_hub(model, repository, revisions[key]) for key, model in models.items()}
    return manifest_rows.updated(manifest_rows.read(path), path, models, weights)
