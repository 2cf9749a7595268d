"""Throughput in images/s of the server of docs/serving.md, beside `predict` with ONNX Runtime.

    python -m benchmarks serve --images FOLDER

All classify the same photos with Lite0 at 256 pixels, on the same cores, in turns; the fastest round counts.
Each starts warm, after its export. Clients run on the same cores as the server, each with one request at a time, on a
connection that it keeps.
"""

import argparse
import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import machine

NAME = "serve"

IMAGES = 200
PREDICT = "fixefficientnet predict, onnx"
CLIENTS = (1, 8, 50)
SERVER = Path(__file__).parent.parent / "examples" / "serve.py"


def child(given: dict[str, Any]) -> dict[str, Any]:
    clients: int = given["clients"]
    paths = [Path(path) for path in given["paths"]]
    return _served(Path(given["file"]), paths, clients) if clients else _predicted(paths)


def _predicted(paths: list[Path]) -> dict[str, Any]:
    from fixefficientnet.models import load
    from fixefficientnet.options import PredictionOptions
    from fixefficientnet.prediction import iter_predictions

    loaded, options = load("lite0"), PredictionOptions(engine="onnx")
    list(iter_predictions([str(path) for path in paths[:8]], loaded, options))
    predictions = iter_predictions([str(path) for path in paths], loaded, options)
    start = time.perf_counter()
    labels = [prediction.labels[0].name for prediction in predictions]
    return {"seconds": time.perf_counter() - start, "labels": labels}


def _served(file: Path, paths: list[Path], clients: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(SERVER), str(file), str(port)], env=os.environ)
    try:
        while not _open(port):
            if process.poll() is not None:
                raise subprocess.CalledProcessError(process.returncode, str(SERVER))
            time.sleep(0.1)
        data = [path.read_bytes() for path in paths]
        shares = [range(first, len(data), clients) for first in range(clients)]
        with ThreadPoolExecutor(clients) as threads:
            list(threads.map(lambda _: _ask(port, data[:2], range(2)), range(2)))
            start = time.perf_counter()
            answers = list(threads.map(lambda share: _ask(port, data, share), shares))
            seconds = time.perf_counter() - start
    finally:
        process.terminate()
        process.wait()
    by_image = dict(itertools.chain.from_iterable(answers))
    return {"seconds": seconds, "labels": [by_image[index] for index in range(len(data))]}


def _open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _ask(port: int, data: list[bytes], share: range) -> list[tuple[int, str]]:
    """Sends images one by one; each one's index and most probable label."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    found = []
    for index in share:
        connection.request("POST", "/predict", data[index])
        answer = connection.getresponse()
        found.append((index, json.loads(answer.read())[0]["label"]))
    connection.close()
    return found


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """Measures throughput; one row per number of clients, and one of `predict`."""
    from fixefficientnet.models import load
    from fixefficientnet.options import ExportOptions
    from fixefficientnet.runtimes import exporting

    every = machine.images_in(options.images.resolve())
    paths = [str(path) for path in every[:: max(1, len(every) // IMAGES)][:IMAGES]]
    methods = {PREDICT: 0, **{f"served, {count} client{'s' * (count > 1)}": count for count in CLIENTS}}
    with tempfile.TemporaryDirectory(prefix="fixefficientnet-serve-") as folder:
        file = Path(folder) / "lite0.onnx"
        exporting.export(load("lite0"), file, ExportOptions(normalize=True, softmax=True))
        given = {"file": str(file), "paths": paths}
        env = {"HF_ASSETS_CACHE": f"{folder}/assets"}
        found = machine.in_turns(
            methods,
            options.rounds,
            lambda method: machine.fresh(NAME, {**given, "clients": methods[method]}, env),
            "serve:",
        )
    rates = {method: len(paths) / min(one["seconds"] for one in findings) for method, findings in found.items()}
    expected = found[PREDICT][0]["labels"]
    return [
        {
            "benchmark": NAME,
            "method": method,
            "images": len(paths),
            "images_per_second": rates[method],
            "times_predict": rates[method] / rates[PREDICT],
            "same_predictions": sum(map(str.__eq__, findings[0]["labels"], expected)),
            "spread": machine.spread(findings, "seconds"),
        }
        for method, findings in found.items()
    ]
