"""Bytes: files from the Hugging Face Hub, pinned by revision and sha256, and files that packages ship.

Every Hub call goes through huggingface_hub, so HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, tokens, proxies
and progress bars work as its users know them. Imports no torch.
"""

import contextlib
import errno
import glob
import hashlib
import io
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fixefficientnet._internal.files import WRITING, write_atomically
from fixefficientnet._internal.waiting import by_whom, in_time, locked
from fixefficientnet._version import __version__
from fixefficientnet.errors import ChecksumError, DownloadError
from fixefficientnet.manifest import RELATIVE_FILE, Backbone

T = TypeVar("T")
PathLike = str | os.PathLike[str]
ReadAndHash = Callable[[Path, str, bool], tuple[T, str]]
"""Gives, of a path, the hash that it must have (empty: any) and whether to look afresh, a result and its hash."""
_SHA1 = 40
"""Digits of this hash."""
_SURELY_KILLED = 3600
"""Seconds after which a download that has written nothing more is none."""
_CLOCKS_STEP = 2
"""Seconds that the coarsest clock of a file system counts in."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file in a Hub repository (organisation/name), at a branch, tag or commit.

    Its bytes must have the sha256; None: that is not known.
    """

    repository: str
    filename: str
    revision: str
    sha256: str | None = None

    @classmethod
    def of(cls, place: str, filename: str) -> "HubFile":
        """A file in a repository as timm names one: `org/name`, or `org/name@revision`."""
        repository, _, revision = place.partition("@")
        return cls(repository, filename, revision or "main")

    def __str__(self) -> str:
        return f"hf://{self.repository}/{self.filename}@{self.revision}"


def parse_uri(uri: str) -> HubFile:
    """Reads `hf://org/repo/file.safetensors@revision`; what is not of that form is a DownloadError.

    The revision is required; only a commit hash makes sure that the same line means the same bytes tomorrow.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)/([^@]+)@([\w./-]+)", uri)
    if match and RELATIVE_FILE.accepts(match[2]):
        return HubFile(match[1], match[2], match[3])
    why = f"; the file must be {RELATIVE_FILE.text}" if match else ""
    raise DownloadError(
        f"{uri!r} is not of the form hf://organisation/repository/file.safetensors@revision{why}; "
        "the revision, best a commit hash, is required."
    )


def read(file: HubFile, cache_dir: PathLike | None = None) -> bytes:
    """Downloads a small file as `fetch` does, and gives the very bytes whose hash is checked, which is at each call."""

    def read_and_hash(path: Path, expected: str, _afresh: bool) -> tuple[bytes, str]:
        data = path.read_bytes()
        return data, _hash_like(expected, io.BytesIO(data), len(data))

    return _download_verified(file, cache_dir, read_and_hash)


def fetch(file: HubFile, cache_dir: PathLike | None = None) -> Path:
    """Downloads a large file to the cache; its hash, if given or told by the Hub, is checked.

    A sha256 is computed once and remembered. `cache_dir` is the Hub cache to use instead of the user's.

    Weights that are not pinned are named as such in the log, which the command line shows.

    Raises:
        DownloadError: The file is neither in the cache nor to be had from the Hub.
        ChecksumError: The file has another hash, also after one fresh download.
    """

    def read_and_hash(path: Path, expected: str, afresh: bool) -> tuple[Path, str]:
        if not expected:
            return path, ""
        if len(expected) != _SHA1 and not afresh:
            return path, _cached_sha256(path, _repository_folder(file, cache_dir))
        with path.open("rb") as opened:
            return path, _hash_like(expected, opened, path.stat().st_size)

    return _download_verified(file, cache_dir, read_and_hash)


def backbone_file(backbone: Backbone, cache_dir: PathLike | None = None) -> Path:
    """The backbone's original weights: from the package that ships them if installed, else from the Hub as by `fetch`.

    That is a `.safetensors` file with timm's tensor names, or the package's own `.pth`.
    """
    package = backbone.package
    if package:
        try:
            path = Path(str(metadata.distribution(package.name).locate_file(package.filename)))
        except metadata.PackageNotFoundError:
            pass
        else:
            return _verified_in_package(path, package.name, package.sha256)
    file = HubFile(backbone.repository, backbone.filename, backbone.revision, backbone.sha256)
    try:
        return fetch(file, cache_dir)
    except DownloadError as error:
        if not package:
            raise
        hint = f"Without the Hub, a package has these weights: pip install {package.name}"
        raise DownloadError(f"{error}\n{hint}") from error


def bring(file: HubFile) -> DownloadError | None:
    """Brings a file to the user's cache, where timm then finds it, as `fetch` does; None: it is there.

    Gives the reason if the Hub does not have it, in whose place timm may know another file, instead of raising it.
    """
    try:
        fetch(file)
    except DownloadError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return error
        raise
    return None


def is_here(backbone: Backbone) -> bool:
    """Whether `backbone_file` gives the weights without the network."""
    if backbone.package:
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.distribution(backbone.package.name)
            return True
    return isinstance(try_to_load_from_cache(backbone.repository, backbone.filename, revision=backbone.revision), str)


def sha256_of(path: PathLike) -> str:
    """The sha256 of a file, in hex, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified_in_package(path: Path, package: str, expected: str) -> Path:
    remedy = f"Install it again: pip install --force-reinstall --no-deps {package}"
    try:
        found = sha256_of(path)
    except OSError as error:
        raise DownloadError(f"{path} of the package {package} cannot be read: {error}. {remedy}") from error
    if found != expected:
        raise ChecksumError(f"{path} has the sha256 {found}, expected is {expected}. {remedy}")
    return path


def _download_verified(file: HubFile, cache_dir: PathLike | None, read_and_hash: ReadAndHash[T]) -> T:
    """Downloads a file, checks its hash, and names it in the log if nothing pins it."""
    result = _verified(file, cache_dir, read_and_hash)
    if not (file.sha256 or file.filename.endswith(".json") or re.fullmatch("[0-9a-f]{40}", file.revision)):
        _logger.info("%s is not pinned: whoever owns it may change it.", file)
    return result


def _verified(file: HubFile, cache_dir: PathLike | None, read_and_hash: ReadAndHash[T]) -> T:
    """Downloads a file, and checks its hash; a wrong copy is deleted and downloaded once more."""

    def checked(path: Path, afresh: bool) -> tuple[T, str, str]:
        try:
            expected = _expected_hash(file, path)
            return *read_and_hash(path, expected, afresh), expected
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DownloadError(f"The cached copy of {file} cannot be read: {error}.") from error

    with contextlib.suppress(FileNotFoundError):  # another process may be replacing the same bad copy
        path = _download(file, cache_dir)
        result, found, expected = checked(path, False)
        if expected in ("", found):
            return result
    try:
        return _replace_wrong_copy(file, cache_dir, checked)
    except TimeoutError as error:
        raise DownloadError(f"{error}. Try again when that has ended.") from error
    except FileNotFoundError as error:
        raise DownloadError(f"The cached copy of {file} went away while it was read. Try again.") from error
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise ChecksumError(
            f"The cached copy of {file} is not the one with the hash {file.sha256 or 'that the Hub tells'}, and cannot "
            f"be replaced: {error}"
        ) from error


def _replace_wrong_copy(
    file: HubFile, cache_dir: PathLike | None, checked: Callable[[Path, bool], tuple[T, str, str]]
) -> T:
    lock = _repository_folder(file, cache_dir) / ".fixefficientnet.lock"
    # processes that meet the same bad copy must not delete each other's fresh one
    with locked(lock, f"The cached copy of {file} is to be replaced, and"):
        path = _download(file, cache_dir)
        result, found, expected = checked(path, True)
        if expected in ("", found):
            return result
        _delete(path)
        try:
            path = _download(file, cache_dir)
        except DownloadError as error:
            raise DownloadError(
                f"The cached copy of {file} was damaged and is deleted "
                f"(its hash was {found}, expected is {expected}).\n{error}"
            ) from error
        result, second, expected = checked(path, True)
        if expected in ("", second):
            return result
        _delete(path)
    if file.sha256:
        where, why = "expected is", "the file was changed after the manifest was written"
        then = "then the manifest's row"
    else:
        where, why, then = f"{constants.ENDPOINT} tells of", "the file was changed just now", "then try again"
    raise ChecksumError(
        f"{file} has the hash {second}, {where} {expected}. It was downloaded anew and nothing of it is kept. "
        f"Either {why}, or a proxy or mirror alters it: check HF_ENDPOINT, {then}."
    )


def _expected_hash(file: HubFile, path: Path) -> str:
    """The hash that a file in the cache must have: the pinned one, or the one that the Hub told; empty: unknown.

    What the Hub tells names the content in the cache: the sha256 of a large file, git's hash of a small one. There may
    be no file (FileNotFoundError): another process may be replacing it.
    """
    if file.sha256:
        return file.sha256
    try:
        content = path.readlink()
    except FileNotFoundError:
        raise
    except OSError:  # where there are no symbolic links, it is not kept
        return ""
    told = content.parent.name == "blobs" and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", content.name)
    return content.name if told else ""


def _hash_like(expected: str, file: io.BufferedIOBase, size: int) -> str:
    """The hash of a file, of the kind that is expected: a sha256, or a sha1.

    A sha1 is git's, over the size too; or the plain one, as mirrors take it, where that is the expected one.
    """
    if len(expected) != _SHA1:
        return hashlib.file_digest(file, "sha256").hexdigest()
    of_git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    plain = hashlib.sha1(usedforsecurity=False)
    while piece := file.read(2**20):
        of_git.update(piece)
        plain.update(piece)
    return plain.hexdigest() if plain.hexdigest() == expected else of_git.hexdigest()


def _download(file: HubFile, cache_dir: PathLike | None, *, afresh: bool = False) -> Path:
    try:
        path = _download_in_time(file, cache_dir, afresh)
        _remove_incomplete(path)
        return path
    except LocalEntryNotFoundError as error:
        raise DownloadError(_offline_hint(file, cache_dir, error.__cause__)) from error
    except GatedRepoError as error:
        raise DownloadError(
            f"{file.repository} asks its users to accept its terms: do so on its page, then run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"{file} was not found: {constants.ENDPOINT} has no repository {file.repository} with it, "
            "or it is private. Check the names, or run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise DownloadError(f"{file.repository} has no revision {file.revision}.") from error
    except EntryNotFoundError as error:
        where = f"{file.repository} at the revision {file.revision}"
        raise DownloadError(f"{where} has no file {file.filename}.") from error
    except (HFValidationError, ValueError) as error:
        raise DownloadError(f"{file} is not a valid Hub name: {error}") from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        if not afresh and "force_download" in str(error):  # what was resumed does not fit, and would never
            return _download(file, cache_dir, afresh=True)
        if isinstance(error, OSError) and error.errno in WRITING:
            place = error.filename or _repository_folder(file, cache_dir)
            raise DownloadError(
                f"{file} could not be written to {place}: {error.strerror}.\nNothing of it is kept; try again."
            ) from error
        raise DownloadError(
            f"{file} could not be downloaded from {constants.ENDPOINT}: {error}\nNothing of it is kept; try again."
        ) from error


def _download_in_time(file: HubFile, cache_dir: PathLike | None, afresh: bool) -> Path:
    """Downloads a file; huggingface_hub alone would wait for a slow server, and for its own locks, without an end."""

    def download() -> str:
        return hf_hub_download(
            file.repository,
            file.filename,
            revision=file.revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            library_name="fixefficientnet",
            library_version=__version__,
            force_download=afresh,
        )

    folder = _repository_folder(file, cache_dir)
    try:
        return Path(in_time(download, lambda: _arriving(folder)))
    except TimeoutError as error:
        locks = (folder.parent / ".locks" / folder.name).glob("*.lock")
        holder = next(filter(None, map(by_whom, locks)), None)
        held = f" The cache's lock is held {holder}: it may have stopped." if holder else ""
        raise TimeoutError(f"{error}.{held}") from error


def _arriving(folder: Path) -> object:
    """What has come of a repository's files so far."""
    found = []
    for path in (folder / "blobs").glob("*.incomplete"):
        with contextlib.suppress(OSError):  # it has arrived
            found.append((path.name, path.stat().st_size))
    return found


def _offline_hint(file: HubFile, cache_dir: PathLike | None, cause: BaseException | None) -> str:
    folder = _repository_folder(file, cache_dir)
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    elif isinstance(cause, HfHubHTTPError) and cause.response is not None:
        why = f"{constants.ENDPOINT} answered with the status {cause.response.status_code}"
    elif isinstance(cause, FileMetadataError):
        why = f"{constants.ENDPOINT} does not answer as a Hub does (a proxy, or the page of a network to log in to?)"
    else:
        why = f"{constants.ENDPOINT} did not answer"
    return (
        f"{file} is not in the cache, and {why}.\n"
        "Bring it from a machine with a connection: there run\n"
        f"  hf download {file.repository} {file.filename} --revision {file.revision}\n"
        f"and copy the folder {folder.name} from its ~/.cache/huggingface/hub to\n"
        f"  {folder}"
    )


def _repository_folder(file: HubFile, cache_dir: PathLike | None) -> Path:
    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / f"models--{file.repository.replace('/', '--')}"


def _remove_incomplete(path: Path) -> None:
    """Removes what killed downloads of a cached file left; newer releases of huggingface_hub leave one file each."""
    blob = path.resolve()
    with contextlib.suppress(OSError):
        for left in blob.parent.glob(f"{glob.escape(blob.name)}.*incomplete"):
            if time.time() - left.stat().st_mtime > _SURELY_KILLED:
                left.unlink()


def _delete(path: Path) -> None:
    """Removes a cached file: the blob and the snapshot's link to it; nothing that a link names elsewhere."""
    blob, repository = path.resolve(), next(one for one in path.parents if one.name == "snapshots").parent
    if blob.is_relative_to(repository.resolve()):
        blob.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _cached_sha256(path: Path, folder: Path) -> str:
    """The file's sha256, computed once per content: a gigabyte is not hashed again at every load."""
    real = path.resolve()
    stat = real.stat()
    note = folder / ".fixefficientnet" / f"{real.name[:64]}-{stat.st_size}-{stat.st_mtime_ns}"
    with contextlib.suppress(OSError):
        # where a clock counts whole seconds, the file may have changed in the same one after it was hashed
        coarse = stat.st_mtime_ns % 1_000_000_000 == 0
        settled = note.stat().st_mtime - max(stat.st_mtime, stat.st_ctime) >= _CLOCKS_STEP
        if (settled or not coarse) and re.fullmatch(rb"[0-9a-f]{64}", remembered := note.read_bytes()):
            return remembered.decode()
    found = sha256_of(real)
    with contextlib.suppress(OSError):  # a read-only cache: hashed again next time
        note.parent.mkdir(exist_ok=True)
        write_atomically(note, found.encode())
    return found
