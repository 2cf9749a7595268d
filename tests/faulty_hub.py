"""A Hub on loopback that fails as networks, stores and proxies fail.

Its endpoint's path says how: `/KIND=VALUE/FILE/ATTEMPT` fails so for one file, and `/-/-/ATTEMPT` does not fail. So
processes share one server, and each asks it for faults of its own.
"""

import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from hub_standin import Answering

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = b"<!DOCTYPE html><title>Log in to the network</title><form>name and password</form>"
PIECE = 4096


@dataclass
class Told:
    """What the server saw of one attempt.

    Attributes:
        requests: How many there were for each file, by "METHOD name".
        leaked: Whether a token was shown to the other host, or to this one elsewhere than in its header.
    """

    requests: Counter[str] = field(default_factory=Counter)
    leaked: bool = False


class FaultyHub:
    """The server, at work as long as it is used as a context; a second one, of another host, is the store.

    Attributes:
        files: Content by ORGANISATION/NAME/FILE.
        etags: What the server says of a file's content.
        token: What nobody but this host is to see.
        told: What it saw, by attempt.
    """

    def __init__(self, files: dict[str, bytes], etags: dict[str, str], token: str):
        self.files, self.etags, self.token, self.told = files, etags, token, dict[str, Told]()
        self.lock = threading.Lock()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, store)) for store in (False, True)]
        for server in self._servers:
            server.daemon_threads = True

    def __enter__(self) -> "FaultyHub":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def store(self) -> str:
        """The same files under another host's name."""
        return f"http://localhost:{self._servers[1].server_port}"

    def endpoint(self, attempt: str, fault: str = "-", file: str = "-") -> str:
        """The address of a Hub.

        Args:
            attempt: Name of who asks.
            fault: KIND or KIND=VALUE; "-" for none.
            file: Which file it is for, ORGANISATION.NAME.FILE as a regular expression.
        """
        return f"{self.address}/{fault}/{file}/{attempt}"


def _handler(hub: FaultyHub, is_store: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(Answering):
        def _serve(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith("/told/"):
                told = hub.told.get(path.removeprefix("/told/"), Told())
                return self._send(200, json.dumps({"requests": told.requests, "leaked": told.leaked}).encode(), {})
            match = re.fullmatch(r"/([^/]+)/([^/]+)/([^/]+)/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path)
            if not match:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            fault, which, attempt, repository, _, filename = match.groups()
            name = f"{repository}/{filename}"
            with hub.lock:
                told = hub.told.setdefault(attempt, Told())
                told.requests[f"{self.command} {name}"] += 1
                shown = [text for key, text in self.headers.items() if is_store or key.lower() != "authorization"]
                told.leaked |= any(hub.token in text for text in (self.path, *shown))
                times = told.requests[f"{self.command} {name}"]
            if name not in hub.files:
                code = "EntryNotFound" if any(one.startswith(f"{repository}/") for one in hub.files) else "RepoNotFound"
                return self._send(404, b"{}", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
            kind, _, value = fault.partition("=") if re.search(which, name) else ("-", "", "")
            self._answer(name, kind, value, times)

        def _answer(self, name: str, kind: str, value: str, times: int) -> None:
            data, head = hub.files[name], self.command == "HEAD"
            length = len(data)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hub.etags[name]}"'}
            if kind == "status" or (kind == "getstatus" and not head):
                status, _, wait = value.partition("~")
                said = {"Retry-After": wait} if wait else {}
                return self._send(int(status), b"{}", {"X-Error-Message": "as the trial wants it"} | said)
            if kind == "once" and times == 1:
                return self._send(int(value), b"{}", {})
            if kind == "page":
                return self._send(200, PAGE, {"Content-Type": "text/html"})
            if kind == "getpage" and not head:
                return self._send(200, PAGE, {"Content-Type": "text/html"})
            if kind == "fullpage" and not head:
                return self._send(200, (PAGE * length)[:length], {"Content-Type": "text/html"})
            if kind == "silent" or (kind == "getsilent" and not head):
                time.sleep(float(value))
                self.close_connection = True
                return
            if kind == "etag":
                headers["ETag"] = f'"{value}"'
            if kind == "noetag":
                del headers["ETag"]
            if kind == "headlength" and head:
                length = int(value)
            if kind == "changes" and not head:  # another file than was announced
                data = data[:-1] + bytes([data[-1] ^ 1])
            if kind == "longer" and not head:
                data = data + b"\0" * 100
                length = len(data)
            if kind == "redirect" and not is_store:
                headers |= {"Location": hub.store + self.path, "X-Linked-Size": str(length)}
                headers["X-Linked-ETag"] = headers["ETag"]
                return self._send(302, b"", headers)
            if kind == "loop":
                return self._send(302, b"", headers | {"Location": self.path})
            start = 0
            if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                start = int(asked[1])
                headers["Content-Range"] = f"bytes {start}-{length - 1}/{length}"
            self.send_response(206 if start else 200)
            for key, text in headers.items():
                self.send_header(key, text)
            self.send_header("Content-Length", str(int(value) if kind == "length" and not head else length - start))
            self.end_headers()
            if head:
                return
            self._body(data[start:], kind, value, times)

        def _body(self, data: bytes, kind: str, value: str, times: int) -> None:
            if kind == "cut" or (kind == "cutonce" and times == 1):
                self.wfile.write(data[: len(data) * int(value) // 10])
                self.close_connection = True
                return
            if kind == "trickle":
                for at in range(len(data)):
                    self.wfile.write(data[at : at + 1])
                    self.wfile.flush()
                    time.sleep(float(value))
                return
            for at in range(0, len(data), PIECE):
                self.wfile.write(data[at : at + PIECE])
                if kind == "slow":
                    self.wfile.flush()
                    time.sleep(float(value))

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # who asked has gone
                self.close_connection = True

        do_GET = do_HEAD = _serve  # noqa: N815

    return Handler
