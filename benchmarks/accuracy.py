"""Top-1 of each faster engine, precision and preprocessing, against PyTorch in float32.

    python -m benchmarks accuracy --images FOLDER

Lite0, Lite1 and Lite2 at their test sizes: their real weights are on PyPI.
"""

import argparse
from typing import Any

from benchmarks import machine

NAME = "accuracy"
METHODS: dict[str, dict[str, Any]] = {
    "eager": {},
    "onnx": {"engine": "onnx"},
    "openvino": {"engine": "openvino"},
    "eager in bf16": {"mixed_precision": "bf16"},
    "openvino in bf16": {"engine": "openvino", "mixed_precision": "bf16"},
    "fast preprocessing": {"fast_preprocessing": True},
    "openvino in bf16, fast preprocessing": {
        "engine": "openvino",
        "mixed_precision": "bf16",
        "fast_preprocessing": True,
    },
}
"""Arguments of `fixefficientnet.evaluate` for each method."""
ON_CUDA = {
    **{name: settings for name, settings in METHODS.items() if "openvino" not in name and name != "onnx"},
    "eager in fp16": {"mixed_precision": "fp16"},
    "compile": {"engine": "compile"},
}


def child(given: dict[str, Any]) -> dict[str, Any]:
    import fixefficientnet

    found = fixefficientnet.evaluate(**given)
    return {"correct": found.correct, "images": found.images}


def _runs(method: str) -> bool:
    return "openvino in bf16" not in method or machine.has_bf16()


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """Measures top-1; one row per variant and method."""
    made = []
    for variant in ("lite0", "lite1", "lite2"):
        on_cpu = {name: settings for name, settings in METHODS.items() if _runs(name)}
        methods = ON_CUDA if options.device == "cuda" else on_cpu
        given = {"model": f"{variant}:backbone", "data": str(options.images), "device": options.device}
        found = machine.in_turns(
            methods,
            1,
            lambda method: machine.fresh(NAME, {**given, **methods[method]}),  # noqa: B023
            f"accuracy of {variant}:",
        )
        exact = found["eager"][0]["correct"]
        for method, (taken,) in found.items():
            pairs = list(zip(exact, taken["correct"], strict=True))
            row = {"benchmark": NAME, "variant": variant, "method": method, "images": taken["images"]}
            row |= {
                "rounds": 1,
                "correct": taken["correct"].count("1"),
                "won": pairs.count(("0", "1")),
                "lost": pairs.count(("1", "0")),
            }
            made.append(row)
    return made
