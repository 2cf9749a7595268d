"""What each setup to be faster does to top-1: Lite0, 1 and 2, whose weights are at hand, at their test sizes.

python -m benchmarks accuracy --images FOLDER
"""

import argparse
from typing import Any

from benchmarks import machine

NAME = "accuracy"
WAYS: dict[str, dict[str, Any]] = {
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


ON_CUDA = {
    **{setup: how for setup, how in WAYS.items() if "openvino" not in setup and setup != "onnx"},
    "eager in fp16": {"mixed_precision": "fp16"},
    "compile": {"engine": "compile"},
}


def child(given: dict[str, Any]) -> dict[str, Any]:
    import fixefficientnet

    found = fixefficientnet.evaluate(**given)
    return {"correct": found.correct, "images": found.images}


def _runs(setup: str) -> bool:
    return "openvino in bf16" not in setup or machine.has_bf16()


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """One per variant and setup."""
    made = []
    for variant in ("lite0", "lite1", "lite2"):
        setups = ON_CUDA if options.device == "cuda" else {setup: how for setup, how in WAYS.items() if _runs(setup)}
        given = {"model": f"{variant}:backbone", "data": str(options.images), "device": options.device}
        found = machine.in_turns(
            setups,
            1,
            lambda setup: machine.fresh(NAME, {**given, **setups[setup]}),  # noqa: B023
            f"accuracy of {variant}:",
        )
        exact = found["eager"][0]["correct"]
        for setup, (taken,) in found.items():
            pairs = list(zip(exact, taken["correct"], strict=True))
            row = {"benchmark": NAME, "variant": variant, "setup": setup, "images": taken["images"]}
            row |= {
                "rounds": 1,
                "correct": taken["correct"].count("1"),
                "won": pairs.count(("0", "1")),
                "lost": pairs.count(("1", "0")),
            }
            made.append(row)
    return made
