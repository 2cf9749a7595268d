"""Where a repository is written: on the Hub, or as a git repository on disk. One commit, then its tag."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from fixefficientnet import hub
from fixefficientnet._internal import compat
from fixefficientnet._version import __version__
from fixefficientnet.errors import FixEfficientNetError, PublishError
from fixefficientnet.hub import HubFile

INDEX = "models.json"
BRANCH = "main"
_NO_COMMIT = "0" * 40
_FIRST_FILE = ".gitattributes"
"""What the Hub puts into a repository that it makes."""
_NOBODY = ("-c", "user.name=fixefficientnet", "-c", "user.email=fixefficientnet@localhost")


@dataclass(frozen=True)
class Present:
    """What a repository holds now.

    Attributes:
        head: Its last commit; None: there is none.
        names: Of its files.
        index: The bytes of its models.json; None: it has none.
        tags: Commit by tag.
    """

    head: str | None = None
    names: frozenset[str] = frozenset()
    index: bytes | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


class Place(Protocol):
    """Somewhere to publish to."""

    def present(self) -> Present:
        """What is there."""

    def commit(self, files: Mapping[str, bytes], message: str, parent: str | None) -> str:
        """Adds or replaces files in one commit; all or none.

        Returns:
            Its hash, 40 hex digits.

        Raises:
            PublishError: Nothing was published.
        """

    def tag(self, name: str, revision: str) -> None:
        """Names a commit."""


@dataclass(frozen=True)
class OnHub:
    """A model repository on the Hub; who may write there is huggingface_hub's business (`hf auth login`, HF_TOKEN).

    Attributes:
        repository: organisation/name.
        private: Whether it is made private, if it is made.
    """

    repository: str
    private: bool = False

    def present(self) -> Present:
        """What is there."""
        api = self._api()
        with self._saying("Nothing was published"):
            try:
                info = api.model_info(self.repository)
                tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(self.repository).tags}
            except RepositoryNotFoundError:
                return Present()
        names = frozenset(sibling.rfilename for sibling in info.siblings or ())
        index = None
        if INDEX in names and info.sha:
            index = hub.read(HubFile(self.repository, INDEX, info.sha))
        return Present(info.sha, names, index, tags)

    def commit(self, files: Mapping[str, bytes], message: str, parent: str | None) -> str:
        """Adds or replaces files in one commit; all or none."""
        api = self._api()
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        with self._saying("Nothing was published"):
            if parent is None:
                # not private: as the organisation has it where it is not told
                api.create_repo(self.repository, private=self.private or None, exist_ok=True)
                info = api.model_info(self.repository)
                if {sibling.rfilename for sibling in info.siblings or ()} - {_FIRST_FILE}:
                    raise PublishError(
                        f"Nothing was published: somebody else made {self.repository} meanwhile. Give the same "
                        "command again."
                    )
                parent = info.sha  # the Hub's own first commit
            api.preupload_lfs_files(self.repository, operations, free_memory=False)
        with self._saying("Nothing was published", "Whether the commit is published is not known, its tag is not"):
            made = api.create_commit(self.repository, operations, commit_message=message, parent_commit=parent)
        return str(made.oid)

    def tag(self, name: str, revision: str) -> None:
        """Names a commit."""
        done = f"The commit {revision} is published"
        with self._saying(f"{done}, its tag {name} is not", f"{done}, whether its tag {name} is, is not known"):
            self._api().create_tag(self.repository, tag=name, revision=revision)

    def _api(self) -> HfApi:
        return HfApi(library_name="fixefficientnet", library_version=__version__)

    @contextlib.contextmanager
    def _saying(self, state: str, unknown: str | None = None) -> Iterator[None]:
        """Turns huggingface_hub's errors into one message, which says what is published and what is not.

        Args:
            state: That, where the Hub refuses.
            unknown: The same where it breaks off or goes away, and may have done what it was asked for; else `state`.
        """
        try:
            yield
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            what = f"{constants.ENDPOINT} answered with the status {status}"
            if status in (401, 403, 404):
                organisation = self.repository.partition("/")[0]
                advice = (
                    f"Your token may not write to {self.repository}: log in with one that may (`hf auth login`, or "
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
            if isinstance(error, compat.network_error()):
                state = unknown or state
            raise PublishError(
                f"{state}: {constants.ENDPOINT} was not reached to the end ({_reason(error)}). The same command, given "
                "again, completes it."
            ) from error


def _reason(error: Exception) -> str:
    """The server's own words, or the first line."""
    said = getattr(error, "server_message", None) or next(iter(str(error).strip().splitlines()), type(error).__name__)
    return str(said).strip().rstrip(".")


@dataclass(frozen=True)
class InFolder:
    """A git repository on disk.

    Attributes:
        folder: Its working tree; made if need be.
    """

    folder: Path

    def present(self) -> Present:
        """What is there."""
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return Present()
        if not (self.folder / ".git").exists():
            raise PublishError(f"{self.folder} is there, and is no git repository. Choose another folder.")
        head = self._try("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        if head is None:
            return Present()
        names = frozenset(filter(None, self._git("ls-tree", "-r", "-z", "--name-only", head).split("\0")))
        index = self._git("show", f"{head}:{INDEX}").encode(errors="surrogateescape") if INDEX in names else None
        lines = self._git("for-each-ref", "refs/tags", "--format=%(refname:strip=2) %(objectname) %(*objectname)")
        tags = {name: (peeled or [commit])[0] for name, commit, *peeled in map(str.split, lines.splitlines())}
        return Present(head, names, index, tags)

    def commit(self, files: Mapping[str, bytes], message: str, parent: str | None) -> str:
        """Adds or replaces files in one commit; all or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / ".git").exists():
            self._git("init", "--quiet", "--initial-branch", BRANCH)
        branch = self._try("symbolic-ref", "--quiet", "HEAD")
        if branch is None:
            raise PublishError(f"{self.folder} is on no branch. Nothing was published: check one out first.")
        with tempfile.TemporaryDirectory() as temporary:  # an index of our own: the user's staged changes stay his
            index = {"GIT_INDEX_FILE": str(Path(temporary) / "index")}
            if parent:
                self._git("read-tree", parent, more=index)
            for name, data in files.items():
                blob = self._git("hash-object", "-w", "--stdin", given=data)
                self._git("update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", more=index)
            tree = self._git("write-tree", more=index)
        self._spare_uncommitted(files)
        named = () if self._try("config", "user.email") else _NOBODY
        made = self._git(*named, "commit-tree", tree, "-m", message, *(("-p", parent) if parent else ()))
        try:
            self._git("update-ref", branch, made, parent or _NO_COMMIT)
        except PublishError as error:
            raise PublishError(f"{error} If somebody else committed meanwhile, give the same command again.") from error
        try:
            self._git("checkout", "--quiet", made, "--", *files)
        except PublishError:
            self._git("update-ref", *((branch, parent) if parent else ("-d", branch)), made)
            raise
        return made

    def _spare_uncommitted(self, files: Mapping[str, bytes]) -> None:
        """Refuses to write over what the user has there and no commit has."""
        states = self._git("status", "--porcelain", "-z", "--no-renames", "--ignored", "-uall", "--", *files)
        for name in sorted(state[3:] for state in states.split("\0") if state):
            path = self.folder / name
            if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == files.get(name)):
                raise PublishError(
                    f"{path} is of yours, or changed by you, and in no commit. Nothing was published: commit it, or "
                    "move it away."
                )

    def tag(self, name: str, revision: str) -> None:
        """Names a commit."""
        self._git("update-ref", f"refs/tags/{name}", revision, _NO_COMMIT)

    def _try(self, *arguments: str) -> str | None:
        """What git says; None where it answers with 1: there is none."""
        done = self._run(arguments)
        return None if done.returncode == 1 else self._said(done)

    def _git(self, *arguments: str, given: bytes | None = None, more: Mapping[str, str] | None = None) -> str:
        return self._said(self._run(arguments, given, more))

    def _run(
        self, arguments: Sequence[str], given: bytes | None = None, more: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs git here and nowhere else: not where the environment points, nor in a repository further up."""
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("GIT_") or key.startswith(("GIT_AUTHOR_", "GIT_COMMITTER_", "GIT_CONFIG"))
        }
        environment |= {"GIT_CEILING_DIRECTORIES": str(self.folder.resolve().parent), **(more or {})}
        try:
            return subprocess.run(
                ["git", *arguments], cwd=self.folder, env=environment, input=given or b"", capture_output=True
            )
        except FileNotFoundError as error:
            raise PublishError("--to needs git, which is not installed (or not on the PATH).") from error

    def _said(self, done: subprocess.CompletedProcess[bytes]) -> str:
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip() or f"status {done.returncode}"
            raise PublishError(f"{self.folder}: git failed: {said}. Nothing was published.")
        return done.stdout.decode(errors="surrogateescape").rstrip("\n")


def check_name(repository: str) -> None:
    """Refuses what is no name of a repository on the Hub.

    Raises:
        PublishError: It is not organisation/name.
    """
    try:
        if not repository.isascii() or not repository.isprintable():  # which huggingface_hub overlooked before 1.0
            raise HFValidationError(f"Letters are A to Z and a to z: {repository!r}.")
        validate_repo_id(repository)
    except HFValidationError as error:
        raise PublishError(f"--repo: {error}") from None
    if "/" not in repository:
        raise PublishError(f"--repo {repository!r} is not of the form ORGANISATION/NAME.")
