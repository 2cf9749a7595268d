"""Wall time of whole processes: imports, the command line, a first prediction, a whole evaluation.

    python -m benchmarks start --images FOLDER

The commands take turns; the median of the rounds counts. Beside `predict` and `evaluate` run scripts that do the same
with timm, from the same file of weights: one classifies the same image, one measures top-1 on the same folder with one
loading process. The export of `--engine onnx` is kept from a run before the clock starts; on CUDA it is left out.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine

NAME = "start"

EXAMPLE = Path(__file__).parent.parent / "examples" / "cat.jpg"
BARE = "the bare interpreter"
ONNX = "the same evaluation with --engine onnx"
TIMM_PREDICTS = """
import json, sys, timm, torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
device = "cuda" if torch.cuda.is_available() else "cpu"
model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=sys.argv[2]).eval().to(device)
transform = create_transform(**resolve_data_config({"input_size": (3, 256, 256), "crop_pct": 1.0}, model=model))
with torch.inference_mode():
    best = model(transform(Image.open(sys.argv[1]).convert("RGB"))[None].to(device)).softmax(1).topk(5)
info = ImageNetInfo()
for probability, index in zip(best.values[0].tolist(), best.indices[0].tolist()):
    print(f"{probability:.1%} {info.index_to_description(index)}")
"""


TIMM_EVALUATES = """
import sys, timm, torch
from timm.data import ImageNetInfo, create_dataset, create_loader, resolve_data_config
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=sys.argv[2]).eval().to(device)
dataset = create_dataset("", root=sys.argv[1])
names = ImageNetInfo().label_names()
classes = torch.tensor([names.index(name) for name in dataset.reader.class_to_idx])
config = resolve_data_config({"input_size": (3, 256, 256), "crop_pct": 1.0}, model=model)
loader = create_loader(dataset, batch_size=2, num_workers=1, device=device, **config)
correct = 0
with torch.inference_mode():
    for inputs, targets in loader:
        correct += (model(inputs.to(device)).argmax(1).cpu() == classes[targets.cpu()]).sum().item()
print(f"{correct} of {len(dataset)}")
"""


def commands(weights: Path, images: Path, temporary: Path, device: str) -> dict[str, list[str]]:
    every = machine.images_in(images)
    count, folder = len(every), every[0].parent.parent
    evaluate = ["evaluate", "lite0", "--data", str(images), "-o", str(temporary / "evaluations")]
    ours = [sys.executable, "-m", "fixefficientnet"]
    made = {
        BARE: [sys.executable, "-c", ""],
        "import fixefficientnet": [sys.executable, "-c", "import fixefficientnet"],
        "import timm": [sys.executable, "-c", "import timm"],
        "fixefficientnet --help": [*ours, "--help"],
        "fixefficientnet list": [*ours, "list"],
        "fixefficientnet predict cat.jpg": [*ours, "predict", str(EXAMPLE)],
        "the same prediction with timm": [sys.executable, "-c", TIMM_PREDICTS, str(EXAMPLE), str(weights)],
        f"fixefficientnet evaluate, {count} images": [*ours, *evaluate],
        ONNX: [*ours, *evaluate, "--engine", "onnx"],
        "the same evaluation with timm": [sys.executable, "-c", TIMM_EVALUATES, str(folder), str(weights)],
    }
    if device == "cuda":
        del made[ONNX]
    return made


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """Measures wall times; one row per command."""
    import tempfile

    import safetensors.torch

    import fixefficientnet

    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) / "lite0.safetensors"
        state = fixefficientnet.create("lite0", "backbone").state_dict()
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
        every = commands(weights, options.images.resolve(), Path(temporary), options.device)
        env = {**os.environ, "HF_ASSETS_CACHE": f"{temporary}/assets"}

        def take(name: str) -> dict[str, Any]:
            start = time.perf_counter()
            done = subprocess.run(every[name], capture_output=True, text=True, check=True, env=env)
            seconds = time.perf_counter() - start
            assert str(EXAMPLE) not in every[name] or "Egyptian cat" in done.stdout, done.stdout
            return {"seconds": seconds}

        for name in every:
            take(name)  # compiles bytecode, fills the page cache, exports
        found = machine.in_turns(every, options.rounds, take, "start:")
    seconds = {name: machine.median(findings, "seconds") for name, findings in found.items()}
    return [
        {"benchmark": NAME, "command": name, "seconds": value, "beyond_bare": value - seconds[BARE]}
        for name, value in seconds.items()
    ]
