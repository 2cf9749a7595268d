"""A Hub in memory, on loopback: what huggingface_hub asks one for to make, write, tag and read a model repository.

It keeps what a Hub keeps (repositories, their commits and tags), checks who asks and which commit he saw last, and can
be told to refuse a request, or to break the connection.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_StandInStandInStandInStandInStand"
DROP, DROP_AFTER = "drop", "drop after"
"""Breaks the connection off: before anything is done, or after it is, in place of the answer."""
Trouble = int | str | Callable[[], object]


@dataclass
class Repository:
    """A model repository."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    head: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, files: dict[str, bytes], message: str) -> str:
        """Makes a commit on top of the last one."""
        together = self.commits.get(self.head, {}) | files
        tree = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in together.items())
        commit = hashlib.sha1(f"{self.head} {message} {tree}".encode()).hexdigest()
        self.commits[commit], self.messages[commit], self.parents[commit] = together, message, self.head
        self.head = commit
        return commit

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a hash names."""
        commit = self.head if revision == "main" else self.tags.get(revision, revision)
        return commit if commit in self.commits else None


class RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, said: str, code: str = "", **more: str):
        self.status, self.said, self.code, self.more = status, said, code, more


class Hub:
    """The server; at work as long as it is used as a context.

    Attributes:
        repositories: By name.
        objects: What was uploaded, by sha256.
        requests: All that were made, in order: method, path and whether with the token.
        created: What was asked for to make repositories.
    """

    def __init__(self, organisations: tuple[str, ...] = ("org",)):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, bool]] = []
        self.created: list[dict[str, Any]] = []
        self._organisations = organisations
        self._troubles: list[tuple[str, str, Trouble, bool]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def clear(self) -> None:
        """Forgets all trouble."""
        self._troubles.clear()

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def trouble(self, method: str, path: str, what: Trouble, *, always: bool = False) -> None:
        """What becomes of the next request for a path (a regular expression), or of all of them.

        Args:
            method: HTTP's.
            path: Which.
            what: A status that refuses it, DROP, DROP_AFTER, or something to do before it.
            always: Whether it is not the next one alone.
        """
        self._troubles.append((method, path, what, always))

    def calls(self, method: str, path: str) -> int:
        """How many requests there were for a path (a regular expression)."""
        return sum(made == method and bool(re.search(path, where)) for made, where, _ in self.requests)

    def make(self, name: str, private: bool = False) -> Repository:
        """A repository as a Hub makes it: with a first commit."""
        self.repositories[name] = made = Repository(private)
        made.add({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit")
        return made

    def take_trouble(self, method: str, path: str) -> Trouble | None:
        for one in self._troubles:
            if one[0] == method and re.search(one[1], path):
                if not one[3]:
                    self._troubles.remove(one)
                return one[2]
        return None

    def answer(self, method: str, path: str, body: bytes, known: bool) -> Any:
        """What a request gives: JSON values, or a commit and a file's bytes."""
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):  # signed, as a store's: no token needed
            if hashlib.sha256(body).hexdigest() != match[1]:
                raise RefusedError(400, "other bytes than announced")
            self.objects[match[1]] = body
            return {}
        if method in ("POST", "PUT") and not known:
            raise RefusedError(401, "Invalid username or password.")
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        for pattern, made in self._ROUTES:
            if match := re.fullmatch(pattern, path):
                repository = self.repositories.get(match[1])
                if repository is None or (repository.private and not known):
                    raise RefusedError(404 if known else 401, "Repository not found", "RepoNotFound")
                return made(self, repository, *match.groups(), *([body] if method == "POST" else []))
        raise RefusedError(404, f"no such page: {path}")

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.created.append(asked)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in self._organisations:
            raise RefusedError(403, f"You don't have the rights to create a model under the namespace {name}")
        if name in self.repositories:
            raise RefusedError(409, "You already created this model repo", url=f"{self.endpoint}/{name}")
        # the first before huggingface_hub 1.0
        self.make(name, private=asked.get("private", False) or asked.get("visibility") == "private")
        return {"url": f"{self.endpoint}/{name}", "name": name}

    def _info(self, repository: Repository, name: str, revision: str | None = None) -> dict[str, Any]:
        commit = repository.find(revision or "main")
        if commit is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        siblings = [_told(name, data) for name, data in repository.commits[commit].items()]
        return {"_id": "0", "id": name, "sha": commit, "siblings": siblings, "private": repository.private}

    def _refs(self, repository: Repository, name: str) -> dict[str, Any]:
        tags = [
            {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": commit} for tag, commit in repository.tags.items()
        ]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head}
        return {"branches": [main], "converts": [], "tags": tags}

    def _preupload(self, repository: Repository, name: str, body: bytes) -> dict[str, Any]:
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _batch(self, repository: Repository, name: str, body: bytes) -> dict[str, Any]:
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}"}}
            objects.append(wanted | ({} if wanted["oid"] in self.objects else {"actions": upload}))
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repository: Repository, name: str, body: bytes) -> dict[str, Any]:
        header: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                header = value
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise RefusedError(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.objects[value["oid"]]
        if header.get("parentCommit") not in (None, repository.head):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        commit = repository.add(files, header["summary"])
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.endpoint}/{name}/commit/{commit}"}

    def _tag(self, repository: Repository, name: str, revision: str, body: bytes) -> dict[str, Any]:
        tag, commit = json.loads(body)["tag"], repository.find(revision)
        if commit is None:
            raise RefusedError(404, "Revision not found", "RevisionNotFound")
        if tag in repository.tags:
            raise RefusedError(409, "Tag reference exists already")
        repository.tags[tag] = commit
        return {}

    def _resolve(self, repository: Repository, name: str, revision: str, file: str) -> tuple[str, bytes]:
        commit = repository.find(revision)
        if commit is None:
            raise RefusedError(404, "Revision not found", "RevisionNotFound")
        if file not in repository.commits[commit]:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        return commit, repository.commits[commit][file]

    _NAME = r"([\w.-]+/[\w.-]+)"
    _ROUTES: tuple[tuple[str, Callable[..., Any]], ...] = (
        (rf"/api/models/{_NAME}/refs", _refs),
        (rf"/api/models/{_NAME}/preupload/main", _preupload),
        (rf"/api/models/{_NAME}/commit/main", _commit),
        (rf"/api/models/{_NAME}/tag/([\w.-]+)", _tag),
        (rf"/api/models/{_NAME}/revision/([\w.-]+)", _info),
        (rf"/api/models/{_NAME}", _info),
        (rf"/{_NAME}\.git/info/lfs/objects/batch", _batch),
        (rf"/{_NAME}/resolve/([\w.-]+)/(.+)", _resolve),
    )


def _told(name: str, data: bytes) -> dict[str, Any]:
    """What a Hub tells of a file: git's hash, and the sha256 of a large one."""
    told: dict[str, Any] = {"rfilename": name, "size": len(data)}
    told["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if name.endswith(".safetensors"):
        told["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 132}
    return told


class Answering(BaseHTTPRequestHandler):
    """A server's side of a request."""

    protocol_version = "HTTP/1.1"

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()  # huggingface_hub uploads several files concurrently

    class Handler(Answering):
        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _drop(self) -> None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

        def _serve(self) -> None:
            path = unquote(self.path.partition("?")[0])
            with lock:
                trouble = hub.take_trouble(self.command, path)
            if trouble == DROP:  # in the middle of the request
                self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
                hub.requests.append((self.command, path, False))
                return self._drop()
            body = self._body()
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            hub.requests.append((self.command, path, known))
            try:
                if isinstance(trouble, int):
                    raise RefusedError(trouble, "trouble")
                if callable(trouble):
                    trouble()
                with lock:
                    answer = hub.answer(self.command, path, body, known)
            except RefusedError as refused:
                headers = {"X-Error-Code": refused.code} if refused.code else {}
                said = json.dumps({"error": refused.said} | refused.more).encode()
                return self._send(refused.status, said, headers | {"X-Error-Message": refused.said})
            if trouble == DROP_AFTER:
                return self._drop()
            if isinstance(answer, tuple):
                commit, data = answer
                return self._send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
            return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    return Handler
