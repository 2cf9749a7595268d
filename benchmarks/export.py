"""Exported files beside timmx's: size, largest difference from eager, images/s.

    python -m benchmarks export

Both export Lite0 at 256 pixels, with its real weights, and a ResNet-50 at 224 with random ones, by their own command
lines with a free number of images and float32 weights. Then each file is run by its own runtime in a fresh process, on
the same cores and images, in batches of one; the methods take turns. The fastest of a round's calls counts, and of the
rounds the median. timmx's TorchScript takes one image at a time, and it has no AOTInductor.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import machine

NAME = "export"

MODELS = {"lite0": ("tf_efficientnet_lite0", 256), "resnet50": ("resnet50", 224)}
FORMATS = ("onnx", "openvino", "torch-export", "torchscript", "executorch", "aotinductor")
OURS, TIMMX = "fixefficientnet", "timmx"
OF_TIMMX = {
    "onnx": ("--dynamic-batch", "--batch-size", "2"),
    "openvino": ("--dynamic-batch", "--batch-size", "2", "--no-fp16"),
    "torch-export": ("--dynamic-batch", "--batch-size", "2"),
    "torchscript": (),
    "executorch": ("--dynamic-batch", "--batch-size", "2"),
}
"""timmx's formats among these, and its options for a free number of images in float32."""
SECONDS = 5.0


def child(given: dict[str, Any]) -> dict[str, Any]:
    """Runs one file: the largest difference of its logits from eager's, and images/s in batches of one."""
    import safetensors.torch
    import torch

    from fixefficientnet.runtimes import formats

    torch.set_num_threads(given["threads"])
    stored = safetensors.torch.load_file(given["images"])
    images, eager = stored["images"], stored["logits"]
    options = formats.RuntimeOptions(cores=given["threads"])
    forward = _forward(Path(given["file"]), given["format"], options)
    with torch.inference_mode():
        found = torch.cat([torch.as_tensor(forward(image)) for image in images.tensor_split(len(images))])
        until = time.perf_counter() + SECONDS
        taken: list[float] = []
        while (start := time.perf_counter()) < until:
            forward(images[len(taken) % len(images)][None])
            taken.append(time.perf_counter() - start)
    return {"difference": float((found - eager).abs().max()), "seconds": min(taken)}


def _forward(file: Path, format: str, options: Any) -> Any:
    """The file's forward pass; the same runtime and settings for both packages, whatever they name the input."""
    from fixefficientnet.runtimes import formats

    if format == "onnx":
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.cores
        session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda image: session.run(None, {name: image.numpy()})[0]
    return formats.load(file, options, format=format)


def _commands(model: str, format: str, method: str, weights: Path, file: Path) -> list[str]:
    architecture, size = MODELS[model]
    if method == OURS:
        name = f"timm/{architecture}:{weights}"
        return ["fixefficientnet", "export", name, "-o", str(file), "--format", format, "--size", str(size)]
    given = ["--checkpoint", str(weights), "--input-size", "3", str(size), str(size), "--output", str(file)]
    return ["timmx", "export", format, architecture, *given, *OF_TIMMX[format]]


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """Exports with both packages, and runs each file; one row per model, format and package."""
    import safetensors.torch
    import timm
    import torch

    import fixefficientnet

    made = []
    with tempfile.TemporaryDirectory(prefix="fixefficientnet-export-") as temporary:
        for model, (architecture, size) in MODELS.items():
            folder = Path(temporary) / model
            folder.mkdir()
            torch.manual_seed(0)
            network: Any = timm.create_model(architecture) if model != "lite0" else fixefficientnet.create(model)
            safetensors.torch.save_file(network.state_dict(), folder / "weights.safetensors")
            images = torch.randn(8, 3, size, size)
            with torch.inference_mode():
                logits = network.eval()(images)
            safetensors.torch.save_file({"images": images, "logits": logits}, folder / "images")
            largest = float(logits.abs().max())
            made += [{**row, "largest_logit": largest} for row in _rows(options, folder, model)]
    return made


def _rows(options: argparse.Namespace, folder: Path, model: str) -> list[machine.Row]:
    exported: dict[str, dict[str, Any]] = {}
    for kind in FORMATS:
        for method in (OURS, TIMMX) if kind in OF_TIMMX else (OURS,):
            file = _file(folder, kind, method)
            file.parent.mkdir()
            command = _commands(model, kind, method, folder / "weights.safetensors", file)
            print(f"{NAME}: {model}, {kind}, {method}", file=sys.stderr, flush=True)
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - start
            size = sum(each.stat().st_size for each in file.parent.iterdir() if "labels" not in each.name)
            exported[f"{kind} {method}"] = {"format": kind, "exporting_seconds": seconds, "bytes": size}
    given = {"threads": options.threads, "images": str(folder / "images")}

    def take(key: str) -> dict[str, Any]:
        kind, method = key.split()
        return machine.fresh(NAME, {**given, "format": kind, "file": str(_file(folder, kind, method))})

    found = machine.in_turns(exported, options.rounds, take, f"{NAME}: {model},")
    return [
        {
            "benchmark": NAME,
            "model": f"{model} at {MODELS[model][1]}",
            "method": key.split()[1] if OURS in key else f"{TIMMX} {metadata.version(TIMMX)}",
            **exported[key],
            "difference": machine.median(findings, "difference"),
            "images_per_second": 1 / machine.median(findings, "seconds"),
            "spread": machine.spread(findings, "seconds"),
        }
        for key, findings in found.items()
    ]


def _file(folder: Path, format: str, method: str) -> Path:
    from fixefficientnet.runtimes import formats

    return folder / f"{method}-{format}" / f"model{formats.SUFFIXES[format]}"
