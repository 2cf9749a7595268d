"""The server of docs/serving.md, started as that page says, under good and broken images at once."""

import http.client
import io
import json
import re
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, python_path
from PIL import Image
from plain import network, save_run
from tiny import CLASSES, cli, free_port, make_data

import fixefficientnet

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

pytestmark = pytest.mark.newest

LARGEST = 10 * 2**20


class Server:
    def __init__(self, run: Path, file: Path, port: int):
        self.run, self.file, self.port = run, file, port
        self.paths = sorted(file.parent.glob("val/*/*.jpg"))

    def post(self, data: bytes, path: str = "/predict", method: str = "POST") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, data)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = make_data(tmp_path_factory.mktemp("serving"), train=1, val=6)
    paths = sorted((folder / "val").glob("*/*.jpg"))
    labels = [CLASSES.index(path.parent.name) for path in paths]
    run = save_run(folder / "run", network(3, paths, labels), CLASSES)
    page = (ROOT / "docs" / "serving.md").read_text()
    export, start = re.findall(r"^(?:fixefficientnet|python) .*(?:onnx|8000)$", page, re.M)[:2]
    cli(*export.replace("lite0.onnx", str(folder / "a.onnx")).replace("lite0", str(run)).split()[1:])
    port = free_port()
    command = start.replace("lite0.onnx", str(folder / "a.onnx")).replace("8000", str(port)).split()
    process = subprocess.Popen(
        [sys.executable, *command[1:]], cwd=ROOT, env={"PYTHONPATH": python_path(ROOT), "OMP_NUM_THREADS": "1"}
    )
    try:
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.05)
        yield Server(run, folder / "a.onnx", port)
        assert process.poll() is None  # it lives
    finally:
        process.terminate()
        process.wait(30)


def encoded(width: int, height: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("1" if kind == "PNG" else "RGB", (width, height)).save(file, kind)
    return file.getvalue()


def test_fifty_requests_at_once_good_and_broken(server: Server):
    broken = {
        b"": "no image",
        b"this is text": "no image",
        server.paths[0].read_bytes()[:600]: "cannot be used",
        encoded(20_000, 3_000, "PNG"): "60,000,000|20000 x 3000",
        encoded(9, 9, "GIF"): "no image",  # which other decoders would read
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n": "no image",
    }
    good = [path.read_bytes() for path in server.paths]
    requests = list(broken.items()) * 3
    requests += [(data, "") for data in good * 2][: 50 - len(requests)]
    requests = requests[::2] + requests[1::2]
    assert len(requests) == 50
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda request: server.post(request[0]), requests))
    expected = {
        path.read_bytes(): {label.name: label.probability for label in found.labels}
        for path, found in zip(server.paths, fixefficientnet.predict(server.paths, str(server.run)), strict=True)
    }
    for (data, said), (status, text) in zip(requests, answers, strict=True):
        if said:
            assert status == 400, text
            (message,) = json.loads(text).values()
            assert re.search(said, message) and "/" not in message and "0x" not in message
        else:
            assert status == 200, text
            probabilities = {label["label"]: label["probability"] for label in json.loads(text)}
            assert probabilities == pytest.approx(expected[data], abs=1e-4)
            assert list(probabilities) == list(expected[data])


def test_an_upload_has_a_limit_and_nothing_else_is_there(server: Server):
    try:
        status, text = server.post(b"\xff" * (LARGEST + 2**20))
        assert status == 413 and "10 MiB" in text
    except (BrokenPipeError, ConnectionResetError):
        pass  # it answered, and hung up before all was sent
    for path in ("/", "/docs", "/openapi.json", "/../pyproject.toml", "/predict/../../etc/passwd", "//etc/passwd"):
        assert server.post(b"", path, "GET")[0] in (404, 405)
    assert server.post(b"", "/predict", "GET")[0] == 405
    assert server.post(server.paths[0].read_bytes())[0] == 200


def test_a_file_that_takes_no_raw_images_is_refused(server: Server, tmp_path: Path):
    import onnx

    model = onnx.load(str(server.file))
    (entry,) = model.metadata_props
    entry.value = json.dumps(json.loads(entry.value) | {"input": "float32"})
    onnx.save(model, str(tmp_path / "a.onnx"))
    with pytest.raises(SystemExit, match="export it with --normalize --softmax"):
        runpy.run_path(str(ROOT / "examples" / "serve.py"))["app_of"](tmp_path / "a.onnx")
