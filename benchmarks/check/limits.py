"""What is acceptable of the rows of a check, and why; a row beyond it has failed.

Whatever a row answers with no has failed as well. A part without limits only has to run: its rates are to be read.
"""

from typing import NamedTuple

from benchmarks.machine import Row


class Limit(NamedTuple):
    """What is acceptable of some columns.

    Attributes:
        columns: Their names.
        why: Why no more, or why yes.
        most: The largest acceptable value; None: the columns say yes or no, and yes is acceptable.
        precision: The precision that it is for; None: any.
    """

    columns: tuple[str, ...]
    why: str
    most: float | None = None
    precision: str | None = None


_APART = ("logits", "gradients", "statistics")

LIMITS: dict[str, tuple[Limit, ...]] = {
    "chunks": (
        Limit(
            _APART,
            "TF32 keeps ten bits of a fraction; emulated on a CPU, it moved B0, B2 and B4 by 0.002 of the largest "
            "value, and a wrong convolution would by about as much as they are",
            5e-3,
            "no",
        ),
        Limit(_APART, "bfloat16 keeps seven bits, and moved them by 0.024", 5e-2, "bf16"),
    ),
    "runs": (
        Limit(
            ("publishable",), "publishing refuses a run whose logits the CPU does not give again within TF32's rounding"
        ),
        Limit(("like the CPU's",), "the CPU's top-1 lies within the 95% interval of the row's own"),
    ),
    "stop": (
        Limit(
            ("same bytes", "same scaler"),
            "a run that goes on takes the same steps in the same order, and in fp16 its scaler is part of them",
        ),
    ),
    "step": (
        Limit(
            ("times --plan",),
            "what a plan says to fit has to run; a quarter is room for cuDNN's workspace, which no plan counts",
            1.25,
        ),
    ),
    "compile": (
        Limit(("of one part",), "torch keeps eight compiled forms of a function, and then leaves it uncompiled", 6),
    ),
    "export": (Limit(("logits",), "TF32 keeps ten bits of a fraction, and publishing accepts as much", 1e-2),),
}


def checked(part: str, row: Row) -> Row:
    """A row of a part, which says under "failed" what of it is not acceptable."""
    wrong = [f"{name}: no" for name, value in row.items() if value is False]
    for limit in LIMITS.get(part, ()):
        if limit.most is None or limit.precision not in (None, row.get("precision")):
            continue
        beyond = [name for name in limit.columns if name in row and not row[name] <= limit.most]  # NaN is beyond
        wrong += [f"{name}: {row[name]:.3g}, at most {limit.most:g}" for name in beyond]
    said = [row["failed"]] if "failed" in row else []
    return {**row, "failed": "; ".join([*said, *wrong])} if wrong else row


def stated(part: str) -> str:
    """What is acceptable of a part's rows, in lines for people."""
    lines = []
    for limit in LIMITS.get(part, ()):
        asked = "yes" if limit.most is None else f"at most {limit.most:g}"
        of = f" ({limit.precision})" if limit.precision else ""
        lines.append(f"- Acceptable: {', '.join(limit.columns)}{of}: {asked}; {limit.why}.")
    return "\n".join(lines) or "- Acceptable: any rates; it has to run."
