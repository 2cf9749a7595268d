"""What keeps the page to itself: which paths and files a request may name, and that a browser asks nobody else."""

import json
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fixefficientnet.options import LOOPBACK

_PATHS = re.compile(
    r"/|/(assets|static)/.*|/(config|theme\.css|favicon\.ico)"
    r"|/gradio_api/(file=.*|upload|upload_progress|queue/(join|data)|heartbeat/\w+|startup-events)"
)
"""What the page itself asks for; Gradio answers much else: proxies, streams, downloads."""
_LONGEST = 2**20
"""Most bytes of a request that is no upload: the names of some thousand photos."""
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Starlette's middleware around Gradio's application.

    Args:
        app: The application.
        files: The folder of the uploaded files and of the images on the page: a request can name no other file.
        host: The address that the server listens on. On loopback, a page that lies elsewhere is not answered, whatever
            name it gave this machine in its own domain.
    """

    def __init__(self, app: ASGIApp, files: Path, host: str):
        self._app, self._files, self._local = app, files, host in LOOPBACK

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send) if scope["type"] == "lifespan" else None

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        if self._local and not _is_local(Headers(scope=scope)):
            return await PlainTextResponse("This page is for its own machine.", 403)(scope, receive, with_headers)
        path = scope["path"]
        if not _PATHS.fullmatch(path):
            return await PlainTextResponse("Not here.", 404)(scope, receive, with_headers)
        if "file=" in path and not self._has(path.partition("file=")[2]):
            return await PlainTextResponse("Not here.", 403)(scope, receive, with_headers)
        if scope["method"] == "POST" and not path.startswith("/gradio_api/upload"):
            body = await _whole(receive)
            if body is None or not all(map(self._has, _files_in(body))):
                return await PlainTextResponse("Such a request is not answered.", 400)(scope, receive, with_headers)
            receive = _again(body, receive)
        return await self._app(scope, receive, with_headers)

    def _has(self, file: object) -> bool:
        """Whether a file lies in the folder."""
        try:
            return (
                isinstance(file, str) and Path(file).is_absolute() and Path(file).resolve().is_relative_to(self._files)
            )
        except (OSError, ValueError):  # a null byte, a name that is too long
            return False


def _is_local(headers: Headers) -> bool:
    """Whether a request is of a page of this machine, and names it so."""
    addresses = [f"http://{headers.get('host', '')}", *headers.getlist("origin")]
    try:
        return all(urlsplit(address).hostname in LOOPBACK for address in addresses)
    except ValueError:  # no address
        return False


async def _whole(receive: Receive) -> bytes | None:
    """The body of a request; None where it is too long."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > _LONGEST or message["type"] == "http.disconnect":
            return None
    return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read already, and then what follows it."""
    left = [body]

    async def repeated() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": left.pop()} if left else await receive()

    return repeated


def _files_in(body: bytes) -> Iterator[object]:
    """The files that a request's JSON names: Gradio would read them, or download them, for whoever asks."""
    try:
        waiting: list[Any] = [json.loads(body)] if body else []
    except (ValueError, RecursionError):
        yield None  # which is no file of ours
        return
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("path") is not None:
                yield value["path"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
