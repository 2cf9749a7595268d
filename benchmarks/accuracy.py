"""What each way to be faster does to top-1: Lite0, 1 and 2, whose weights are at hand, at their test sizes.

python -m benchmarks accuracy --pictures FOLDER
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
    **{way: how for way, how in WAYS.items() if "openvino" not in way and way != "onnx"},
    "eager in fp16": {"mixed_precision": "fp16"},
    "compile": {"engine": "compile"},
}


def child(given: dict[str, Any]) -> dict[str, Any]:
    import fixefficientnet

    found = fixefficientnet.evaluate(**given)
    return {"right": found.right, "pictures": found.pictures}


def _runs(way: str) -> bool:
    return "openvino in bf16" not in way or machine.has_bf16()


def rows(options: argparse.Namespace) -> list[machine.Row]:
    """One per variant and way."""
    made = []
    for variant in ("lite0", "lite1", "lite2"):
        ways = ON_CUDA if options.device == "cuda" else {way: how for way, how in WAYS.items() if _runs(way)}
        given = {"model": f"{variant}:backbone", "data": str(options.pictures), "device": options.device}
        found = machine.in_turns(
            ways,
            1,
            lambda way: machine.fresh(NAME, {**given, **ways[way]}),  # noqa: B023
            f"accuracy of {variant}:",
        )
        exact = found["eager"][0]["right"]
        for way, (taken,) in found.items():
            pairs = list(zip(exact, taken["right"], strict=True))
            row = {"benchmark": NAME, "variant": variant, "way": way, "pictures": taken["pictures"]}
            row |= {
                "rounds": 1,
                "right": taken["right"].count("1"),
                "won": pairs.count(("0", "1")),
                "lost": pairs.count(("1", "0")),
            }
            made.append(row)
    return made
