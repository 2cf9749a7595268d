"""What a check runs on, and a case of it, whose failure is a row as well."""

import contextlib
import gc
import math
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.machine import Row

TINY_NETWORK = "test_efficientnet.r160_in1k"


@dataclass(frozen=True)
class Setting:
    """What a check runs on.

    Attributes:
        device: "cuda" or "cpu".
        folder: Folder that the check's own runs and files go to.
        tiny: Whether networks and images are tiny, as of a dry run: figures of speed mean nothing then.
        data: Folder with train/ and val/, one folder per class in each; None for parts without images.
        checkpoint: File of a network trained on these, for FixRes to tune; None: the check trains one.
    """

    device: str
    folder: str
    tiny: bool = False
    data: str | None = None
    checkpoint: str | None = None

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions of the frozen part that the device has."""
        return ("no", "bf16", "fp16") if self.device == "cuda" else ("no", "bf16")

    @property
    def workers(self) -> int:
        """Loading processes."""
        return 0 if self.tiny else min(16, len(os.sched_getaffinity(0)))


def case(names: Row, measure: Callable[[], Row]) -> Row:
    """Measures one case; a failure is a row too, and the next case goes on."""
    import torch

    try:
        return {**names, **measure()}
    except Exception as error:
        traceback.print_exc()
        return {**names, "failed": said(error)}
    finally:
        gc.collect()
        with contextlib.suppress(Exception):  # after an error on the device, this raises it again
            torch.cuda.empty_cache()


def said(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def relative(found: Any, expected: Any) -> float:
    """Largest difference of a tensor from another, relative to the largest value of that; infinite if no number."""
    apart = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    return apart if math.isfinite(apart) else math.inf  # of which, unlike NaN, a maximum tells


def under_autocast(device: str, precision: str) -> Any:
    """Autocast for a precision, as Accelerate has it; float32 for "no"."""
    import torch

    return torch.autocast(device, torch.float16 if precision == "fp16" else torch.bfloat16, precision != "no")
