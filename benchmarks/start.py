"""What a user waits for before anything happens: imports, the command line, the first prediction.

    python -m benchmarks start

Wall time of whole processes in turns, the median of the rounds. The peer of
`predict` is a script that classifies the same picture with timm, from the same file of weights.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine

NAME = "start"

EXAMPLE = Path(__file__).parent.parent / "examples" / "cat.jpg"
BARE = "the bare interpreter"
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


def commands(weights: Path) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "fixefficientnet"]
    return {
        BARE: [sys.executable, "-c", ""],
        "import fixefficientnet": [sys.executable, "-c", "import fixefficientnet"],
        "import timm": [sys.executable, "-c", "import timm"],
        "fixefficientnet --help": [*ours, "--help"],
        "fixefficientnet list": [*ours, "list"],
        "fixefficientnet predict cat.jpg": [*ours, "predict", str(EXAMPLE)],
        "the same with timm": [sys.executable, "-c", TIMM_PREDICTS, str(EXAMPLE), str(weights)],
    }


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """One per command."""
    import tempfile

    import safetensors.torch

    import fixefficientnet

    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) / "lite0.safetensors"
        state = fixefficientnet.create("lite0", "backbone").state_dict()
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
        every = commands(weights)

        def take(name: str) -> dict[str, Any]:
            start = time.perf_counter()
            done = subprocess.run(every[name], capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - start
            assert str(EXAMPLE) not in every[name] or "Egyptian cat" in done.stdout, done.stdout
            return {"seconds": seconds}

        for name in every:
            take(name)  # compiles bytecode, fills the page cache
        rounds = max(options.rounds, 5)
        found = machine.in_turns(every, rounds, take, "start:")
    seconds = {name: machine.median(findings, "seconds") for name, findings in found.items()}
    return [
        {"benchmark": NAME, "way": name, "rounds": rounds, "seconds": value, "beyond_bare": value - seconds[BARE]}
        for name, value in seconds.items()
    ]
