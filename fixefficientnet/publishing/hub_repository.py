"""A model repository on the Hub: what it has, one commit, its tag."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from fixefficientnet import hub
from fixefficientnet._internal import compat
from fixefficientnet._internal.waiting import in_time
from fixefficientnet._version import __version__
from fixefficientnet.errors import FixEfficientNetError, PublishError
from fixefficientnet.hub import HubFile
from fixefficientnet.publishing import index

_PART = 100_000_000
"""Bytes that are uploaded at least in the time that is waited for an answer."""
_SHA256 = 64
"""Digits of a sha256."""
_FIRST_FILE = ".gitattributes"
"""The file that the Hub puts into a new repository."""


@dataclass(frozen=True)
class Contents:
    """What a repository has.

    Attributes:
        head: Its last commit, 40 hex digits; None where there is no repository.
        hashes: Of each file: sha256 of a large one, git's SHA-1 of another.
        index: Content of its models.json; None where there is no such file.
        tags: Commit of each tag, by name.
    """

    head: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    index: bytes | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    def has(self, name: str, file: Path) -> bool:
        """Whether a file is there under a name, with this very content."""
        known = self.hashes.get(name, "")
        return known == (hub.sha256_of(file) if len(known) == _SHA256 else git_hash(file.read_bytes()))


@dataclass(frozen=True)
class HubRepository:
    """A model repository on the Hub, written with the token of huggingface_hub (`hf auth login`, HF_TOKEN).

    Attributes:
        name: ORGANISATION/NAME.
        private: Whether a new repository is private; False: as the organisation has it by default.
    """

    name: str
    private: bool = False

    def contents(self) -> Contents:
        """Asks the Hub what the repository has; a PublishError says that it does not answer, or refuses."""
        api = self._api()
        with self._explained("Nothing was published"):
            try:
                info = in_time(lambda: api.model_info(self.name, files_metadata=True))
                tags = {ref.name: ref.target_commit for ref in in_time(lambda: api.list_repo_refs(self.name)).tags}
            except RepositoryNotFoundError:
                return Contents()
        hashes = {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id or "" for one in info.siblings or ()}
        models = None
        if index.FILENAME in hashes and info.sha:
            models = hub.read(HubFile(self.name, index.FILENAME, info.sha))
        return Contents(info.sha, hashes, models, tags)

    def commit(self, files: Mapping[str, bytes | Path], message: str, parent: str | None) -> str:
        """Adds or replaces files, given by their content or path, in one commit; makes the repository if need be.

        The parent is the last commit as `contents` saw it; None where there was no repository. Gives the new commit.

        Raises:
            PublishError: The Hub refuses, or breaks off; says whether anything was published.
        """
        api = self._api()
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        with self._explained("Nothing was published"):
            if parent is None:
                in_time(lambda: api.create_repo(self.name, private=self.private or None, exist_ok=True))
                info = in_time(lambda: api.model_info(self.name))
                if {sibling.rfilename for sibling in info.siblings or ()} - {_FIRST_FILE}:
                    raise PublishError(
                        f"Nothing was published: somebody else made {self.name} meanwhile. Give the same command again."
                    )
                parent = info.sha  # the Hub's own first commit
            size = sum(operation.upload_info.size for operation in operations)
            in_time(lambda: api.preupload_lfs_files(self.name, operations, free_memory=False), parts=1 + size // _PART)
        with self._explained("Nothing was published", "Whether the commit is published is not known, its tag is not"):
            made = in_time(
                lambda: api.create_commit(self.name, operations, commit_message=message, parent_commit=parent)
            )
        return str(made.oid)

    def tag(self, name: str, revision: str) -> None:
        """Tags a commit, 40 hex digits, which stays where a PublishError says that the Hub refuses, or breaks off."""
        done = f"The commit {revision} is published"
        with self._explained(f"{done}, its tag {name} is not", f"{done}, whether its tag {name} is, is not known"):
            in_time(lambda: self._api().create_tag(self.name, tag=name, revision=revision))

    def _api(self) -> HfApi:
        return HfApi(library_name="fixefficientnet", library_version=__version__)

    @contextlib.contextmanager
    def _explained(self, state: str, unknown: str | None = None) -> Iterator[None]:
        """Turns huggingface_hub's errors into one message, which says what is published and what is not.

        That is the state where the Hub refuses; where it breaks off, and may have done what it was asked for, `unknown`
        is said instead, if given.
        """
        try:
            yield
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            what = f"{constants.ENDPOINT} answered with the status {status}"
            if status in (401, 403, 404):
                organisation = self.name.partition("/")[0]
                advice = (
                    f"Your token may not write to {self.name}: log in with one that may (`hf auth login`, or "
                    f"HF_TOKEN), as a member of {organisation}."
                )
            elif status in (409, 412):
                advice = "Somebody else wrote there meanwhile: give the same command again."
            else:
                advice = "Give the same command again."
                state = unknown or state
            raise PublishError(f"{state}: {what} ({_reason(error)}). {advice}") from error
        except (compat.network_error(), OSError, ValueError, RuntimeError) as error:
            if isinstance(error, FixEfficientNetError):
                raise
            if isinstance(error, (compat.network_error(), TimeoutError)):
                state = unknown or state
            raise PublishError(
                f"{state}: {constants.ENDPOINT} was not reached to the end ({_reason(error)}). The same command, given "
                "again, completes it."
            ) from error


def ask(target: HubRepository, dry_run: bool) -> tuple[Contents, str | None]:
    """What a repository has; of a dry run without the Hub, nothing, with the reason, which else is raised."""
    try:
        return target.contents(), None
    except PublishError as error:
        if not dry_run:
            raise
        return Contents(), str(error)


def _reason(error: Exception) -> str:
    """The server's own words, or the first line of the error."""
    said = getattr(error, "server_message", None) or next(iter(str(error).strip().splitlines()), type(error).__name__)
    return str(said).strip().rstrip(".")


def check_name(repository: str) -> None:
    """Refuses, by a PublishError, what is not ORGANISATION/NAME, and so cannot name a repository on the Hub."""
    try:
        if not repository.isascii() or not repository.isprintable():  # which huggingface_hub overlooked before 1.0
            raise HFValidationError(f"Letters are A to Z and a to z: {repository!r}.")
        validate_repo_id(repository)
    except HFValidationError as error:
        raise PublishError(f"The repository's name: {error}") from None
    if "/" not in repository:
        raise PublishError(f"The repository's name {repository!r} is not of the form ORGANISATION/NAME.")
