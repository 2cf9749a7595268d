"""The demo's server, asked over HTTP, also for what it must not give."""

import concurrent.futures
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import plain
import pytest
import timm
import tiny
import torch
from conftest import ROOT, lively, python_path
from huggingface_hub import metadata_load
from packaging.requirements import Requirement
from packaging.version import Version

import fixefficientnet
from fixefficientnet._internal import requirements
from fixefficientnet.demo import server

pytest.importorskip("gradio")
pytestmark = [pytest.mark.demo, pytest.mark.newest]

HOSTILE = ("<img src=x onerror=alert(1)>", "a\u202eb", "crane")
"""Names of classes that a page must not take for its own."""


def hostile_run(folder: Path, seed: int = 0) -> Path:
    """A run of own classes, with its page."""
    torch.manual_seed(seed)
    network = lively(timm.create_model("test_efficientnet", num_classes=3), seed)
    plain.save_run(folder, network, HOSTILE)
    (folder / "report.html").write_text("<h1>Mistakes</h1><script>document.write('scripted')</script>")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tiny.mottle(tmp_path / "image.png", 5)


@contextlib.contextmanager
def serving(names: list[str]) -> Iterator[str]:
    """Serves the demo for a while, and leaves the environment as it was."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", *server.SETTINGS):
            patch.setenv(name, "")
        with server.serving(names, port=tiny.free_port()) as address:
            yield address


@pytest.fixture(scope="module")
def page(run: Path) -> Iterator["Page"]:
    with serving([str(run), "lite0"]) as address:
        yield Page(address.rstrip("/"))


class Page:
    """The page, as a browser asks for it."""

    def __init__(self, address: str):
        self.address = address
        self.config: dict[str, Any] = self.get("/config").json()

    @property
    def files(self) -> Path:
        """The folder of the uploaded files."""
        return Path(os.environ["GRADIO_TEMP_DIR"])

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.address}{path}", timeout=60)

    def upload(self, name: str, content: bytes) -> httpx.Response:
        return httpx.post(f"{self.address}/gradio_api/upload", files={"files": (name, content)}, timeout=60)

    def photos(self, name: str, content: bytes) -> list[dict[str, Any]]:
        """The value of the gallery after an upload."""
        (path,) = self.upload(name, content).json()
        return [{"image": {"path": path, "meta": {"_type": "gradio.FileData"}}, "caption": None}]

    def ask(self, function: str, data: list[Any]) -> dict[str, Any]:
        """What an event gives: `success`, `output`."""
        session = uuid.uuid4().hex[:12]
        (number,) = [one["id"] for one in self.config["dependencies"] if one["api_name"] == function]
        body = {"data": data, "fn_index": number, "session_hash": session, "event_data": None, "trigger_id": None}
        joined = httpx.post(f"{self.address}/gradio_api/queue/join", json=body, timeout=60)
        if joined.status_code != 200:
            return {"success": False, "status": joined.status_code}
        with httpx.stream(
            "GET", f"{self.address}/gradio_api/queue/data", params={"session_hash": session}, timeout=120
        ) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    return dict(message)
        raise AssertionError("the server ended the answer")

    def show(self, photos: Any, model: Any, size: Any = 48, other_size: int = 96) -> dict[str, Any]:
        """What is shown of a photo: of a model, and of lite0."""
        return self.ask("show", [photos, None, model, size, "lite0", other_size])


def text(answer: dict[str, Any]) -> str:
    return json.dumps(answer, ensure_ascii=False)


def test_a_photo_is_classified(page: Page, run: Path, image: Path):
    found = page.show(page.photos("ä b.png", image.read_bytes()), str(run))
    assert found["success"]
    said, _, labels, crop, below, *_ = found["output"]["data"]
    assert said["visible"] is False
    expected = fixefficientnet.predict(image, str(run))[0].labels
    shown = {one["label"]: one["confidence"] for one in labels["confidences"]}
    assert list(shown.values()) == pytest.approx([one.probability for one in expected])
    assert "a\\u202eb" in shown  # which would turn what follows it
    assert page.get("/gradio_api/file=" + crop["value"]["path"]).headers["content-type"] == "image/jpeg"
    assert "48 x 48 pixels" in below
    assert "<img" not in text(found).replace(HOSTILE[0] + '"', "")  # but as a plain label


def test_lite0_sees_a_cat(page: Page, run: Path):
    found = page.show(page.photos("cat.jpg", (ROOT / "examples" / "cat.jpg").read_bytes()), str(run), other_size=256)
    assert found["output"]["data"][7]["label"] == "Egyptian cat"


def png_of(side: int) -> bytes:
    """A few bytes that say that they are an image of `side` x `side` pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0" * 64), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"no image",
            "image.png: The image of 8 bytes is not an image, or of a kind that is not read: convert it to PNG.",
        ),
        (png_of(60_000), "pixels"),
        (png_of(100), "cannot be read"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
            "is not an image, or of a kind",
        ),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "is not an image"),
    ],
)
def test_what_is_no_image_is_one_sentence(page: Page, run: Path, content: bytes, said: str):
    found = page.show(page.photos("image.png", content), str(run))
    status, results, *_ = found["output"]["data"]
    assert said in status["value"] and status["visible"] is True and results["visible"] is False
    assert str(page.files) not in text(found["output"])


def test_a_long_file_is_refused(page: Page):
    before = {*page.files.rglob("*.png")}
    assert page.upload("image.png", bytes(21 * 2**20)).status_code == 413
    assert {*page.files.rglob("*.png")} == before


@pytest.mark.parametrize("name", ["../../../etc/cron.d/x.png", "..", "/etc/passwd", "a\0b.png", "a" * 300 + ".png"])
def test_an_upload_stays_in_its_folder(page: Page, name: str):
    answer = page.upload(name, b"content")
    for path in answer.json() if answer.status_code == 200 else ():
        assert Path(path).resolve().is_relative_to(page.files) and Path(path).read_bytes() == b"content"


SECRETS = ["/etc/passwd", str(ROOT / "pyproject.toml"), "pyproject.toml", "/proc/self/environ"]


@pytest.mark.parametrize("path", SECRETS)
def test_no_file_of_the_machine_is_given(page: Page, run: Path, path: str):
    inside = f"{page.files}/../../../../../../.."
    tried = [path, f"{inside}{path}", path.replace("/", "%2f"), path.replace("/", "%252f"), f"{path}%00.png"]
    for one in [*tried, f"file://{path}", f"//{path}", f"{page.files}/%2e%2e/%2e%2e/%2e%2e{path}"]:
        for route in ("/gradio_api/file=", "/file=", "/static/", "/assets/"):
            with socket.create_connection(("127.0.0.1", int(page.address.rpartition(":")[2]))) as raw:
                raw.sendall(f"GET {route}{one} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n".encode())  # as it is, unlike httpx
                status = raw.makefile("rb").readline().split()[1]
            assert status in (b"400", b"403", b"404"), (route, one)
    for one in tried:
        photos = [{"image": {"path": one, "meta": {"_type": "gradio.FileData"}}, "caption": None}]
        assert page.show(photos, str(run)) == {"success": False, "status": 400}


def test_the_server_fetches_nothing_for_a_visitor(page: Page, run: Path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.2)
        url = f"http://127.0.0.1:{other.getsockname()[1]}/x.png"
        for path in (url, "http://example.com/x.png", "https://example.com/x.png"):
            photos = [{"image": {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}, "caption": None}]
            assert page.show(photos, str(run)) == {"success": False, "status": 400}
            for route in ("file=", "proxy="):
                assert page.get(f"/gradio_api/{route}{path}").status_code in (403, 404)
        with pytest.raises(TimeoutError):
            other.accept()


def test_a_visitor_opens_no_other_model(page: Page, run: Path, image: Path):
    photos = page.photos("image.png", image.read_bytes())
    for name in ("/etc/passwd", "timm/resnet18", "lite0:/etc/passwd"):
        assert not page.show(photos, name)["success"]
    for size in (100_000, -1, "a", None):
        assert not page.show(photos, str(run), size)["success"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/gradio_api/runs"),
        ("POST", "/gradio_api/run/show"),
        ("POST", "/gradio_api/call/show"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/login"),
    ],
)
def test_gradios_other_services_are_not_there(page: Page, method: str, path: str):
    assert httpx.request(method, f"{page.address}{path}", json={}).status_code == 404


def test_long_requests_and_none_are_refused(page: Page):
    join = f"{page.address}/gradio_api/queue/join"
    for body in (b'"' + b"a" * 2**20 + b'"', b"[" * 200_000, b"[" * 100_000, b"{", json.dumps({"path": 1}).encode()):
        assert httpx.post(join, content=body, timeout=60).status_code == 400


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "[["}]
)
def test_pages_elsewhere_are_not_answered(page: Page, headers: dict[str, str]):
    assert httpx.get(f"{page.address}/config", headers=headers).status_code == 403
    upload = httpx.post(f"{page.address}/gradio_api/upload", files={"files": ("a.png", b"a")}, headers=headers)
    assert upload.status_code == 403 and "access-control-allow-origin" not in upload.headers
    assert httpx.get(f"{page.address}/config", headers={"Origin": page.address}).status_code == 200


def test_the_page_asks_nobody_else(page: Page):
    assert page.config["analytics_enabled"] is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    answer = page.get("/")
    assert answer.headers["content-security-policy"].startswith("default-src 'self' data: blob:;")
    assert "fonts.googleapis" not in answer.text + page.get("/theme.css").text


def test_twenty_people_at_once_are_all_answered(page: Page, run: Path, image: Path):
    photos = page.photos("image.png", image.read_bytes())
    with concurrent.futures.ThreadPoolExecutor(20) as people:
        answers = list(people.map(lambda _: page.show(photos, str(run)), range(20)))
    assert all(answer["success"] for answer in answers)
    first, *others = (answer["output"]["data"][2] for answer in answers)
    assert all(other == first for other in others)


def test_a_run_shows_its_classes_and_its_page(page: Page, run: Path):
    tabs = [one["props"]["label"] for one in page.config["components"] if one["type"] == "tabitem"]
    assert tabs == ["Your photos", "Mistakes of mine"]
    classes = next(one for one in page.config["components"] if 'class="classes"' in str(one["props"].get("value")))
    assert "&lt;img src=x onerror=alert(1)&gt;" in classes["props"]["value"]
    (frame,) = page.ask("lambda", [])["output"]["data"]
    assert frame.startswith('<iframe sandbox title="Report" srcdoc="&lt;h1&gt;')


def test_a_busy_port_is_one_error():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        _, err = tiny.cli("demo", "--port", port, status=1, columns=200)
        assert err.startswith(f"Error: 127.0.0.1:{port} cannot be listened on; ") and err.count("\n") == 1


def test_no_port_number_is_one_error():
    _, err = tiny.cli("demo", "--port", 99999, status=1, columns=200)
    assert err.startswith("Error: 127.0.0.1:99999 cannot be listened on; ") and err.count("\n") == 1


@pytest.mark.slow
def test_the_space_is_the_demo(tmp_path: Path):
    """Its app.py, run as Spaces run it, but on loopback."""
    space, port = ROOT / "examples" / "space", tiny.free_port()
    settings = metadata_load(space / "README.md")
    assert settings is not None
    assert Version(settings["sdk_version"]) >= Version(requirements.floors()["gradio"])
    (wanted,) = map(Requirement, (space / "requirements.txt").read_text().splitlines())
    assert wanted.name == "fixefficientnet" and wanted.extras == {"bundled", "demo"}
    where = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": python_path(ROOT)}
    command = [sys.executable, space / settings["app_file"]]
    with subprocess.Popen(command, env=os.environ | where, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"http://127.0.0.1:{port}/\n"
            page = Page(f"http://127.0.0.1:{port}")
            photos = page.photos("cat.jpg", (ROOT / "examples" / "cat.jpg").read_bytes())
            found = page.show(photos, "lite0", 224, other_size=256)
            assert [found["output"]["data"][place]["label"] for place in (2, 7)] == ["Egyptian cat"] * 2
        finally:
            process.kill()
    assert not list(tmp_path.iterdir())
