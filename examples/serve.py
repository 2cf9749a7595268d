"""Serves an exported ONNX file over HTTP: an image's bytes in, its most probable labels out.

    fixefficientnet export lite0 -o lite0.onnx --normalize --softmax
    python examples/serve.py lite0.onnx 8000
    curl --data-binary @examples/cat.jpg http://127.0.0.1:8000/predict

What waits while batches are computed is the next batch: docs/serving.md.
"""

import asyncio
import contextlib
import io
import json
import os
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from PIL import Image, UnidentifiedImageError
from starlette.requests import ClientDisconnect

from fixefficientnet.preprocessing import Preprocess, open_image

BATCH, TOP = 4, 5
BYTES, Image.MAX_IMAGE_PIXELS = 10 * 2**20, 40_000_000  # of one upload, and of one image
FORMATS = ("JPEG", "PNG", "WEBP")  # no others: Pillow runs Ghostscript on an EPS file
CONNECTIONS = 256  # at a time; further ones get 503


class Batches:
    """Computes what waits, a batch per core at a time."""

    def __init__(self, session: Any):
        self.session = session
        self.waiting: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue()

    async def probabilities(self, pixels: Any) -> Any:
        """Probabilities of one image's pixels, uint8 [3, S, S]: float32 [classes]."""
        found = asyncio.get_running_loop().create_future()
        await self.waiting.put((pixels, found))
        return await found

    async def compute(self) -> None:
        """Takes all that waits, computes it in a thread, and takes what came meanwhile."""
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < BATCH and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            inputs = {"pixel_values": np.stack([pixels for pixels, _ in batch])}
            try:
                (results,) = await asyncio.to_thread(self.session.run, None, inputs)
            except Exception as error:
                results = [error] * len(batch)
            for (_, found), result in zip(batch, results, strict=True):
                if not found.done():  # its client may be gone
                    found.set_exception(result) if isinstance(result, Exception) else found.set_result(result)


def pixels_of(data: bytes, preprocess: Preprocess) -> Any:
    """Decodes an image as `fixefficientnet predict` does: uint8 [3, S, S]."""
    try:
        image = open_image(Image.open(io.BytesIO(data), formats=FORMATS), upright=True, srgb=True)
        return preprocess.pixels(image).numpy()
    except UnidentifiedImageError:
        raise HTTPException(400, f"This is no image in the formats {', '.join(FORMATS)}.") from None
    except Exception as error:  # decoders raise a dozen kinds on damaged files
        raise HTTPException(400, f"This image cannot be used: {error}") from error


def app_of(path: Path) -> FastAPI:
    """The application for a file that `export --normalize --softmax` wrote, with its labels beside it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1  # a batch per core is faster than all cores on one
    session = onnxruntime.InferenceSession(path, settings)
    described = json.loads(session.get_modelmeta().custom_metadata_map["fixefficientnet"])
    if (described["input"], described["output"], described["crop_mode"]) != ("uint8", "probabilities", "center"):
        sys.exit(f"{path}: export it with --normalize --softmax, of a model whose images are cropped at the centre.")
    labels = path.with_name(f"{path.name}.labels.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    preprocess = Preprocess(*(described[key] for key in ("size", "crop_pct", "interpolation", "mean", "std")))
    batches, decoders = Batches(session), ThreadPoolExecutor(cores)

    @contextlib.asynccontextmanager
    async def computing(_: FastAPI) -> AsyncIterator[None]:
        tasks = asyncio.gather(*(batches.compute() for _ in range(cores)))
        yield
        tasks.cancel()

    app = FastAPI(lifespan=computing, docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/predict")
    async def predict(request: Request) -> list[dict[str, Any]]:
        data = bytearray()
        try:
            async for part in request.stream():
                data += part
                if len(data) > BYTES:
                    raise HTTPException(413, f"An image has at most {BYTES / 2**20:g} MiB.")
        except ClientDisconnect:
            raise HTTPException(400, "The upload broke off.") from None
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(decoders, pixels_of, bytes(data), preprocess)
        probabilities = await batches.probabilities(pixels)
        best = np.argsort(-probabilities)[:TOP]
        return [{"label": labels[index], "probability": float(probabilities[index])} for index in best]

    return app


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(f"{sys.argv[1]}.labels.txt").exists() or not Path(sys.argv[1]).exists():
        sys.exit(f"Usage: python {sys.argv[0]} FILE.onnx PORT, with FILE.onnx.labels.txt beside the file")
    uvicorn.run(app_of(Path(sys.argv[1])), port=int(sys.argv[2]), limit_concurrency=CONNECTIONS, log_level="warning")
