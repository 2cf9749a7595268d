"""The small part of what `python -m benchmarks.cuda --check` does, on a CUDA device."""

from pathlib import Path

import pytest
import tiny
import torch

from benchmarks.check import chunks, runs, stop
from benchmarks.check.setting import Setting

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.newest,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
ROUNDING = {"no": 5e-3, "bf16": 5e-2}
"""TF32 and bfloat16 keep ten and seven bits of each factor."""


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    data = tiny.make_data(tmp_path / "data")
    return Setting("cuda", str(tmp_path), tiny=True, data=str(data))


def test_a_step_in_chunks_is_that_of_the_whole_batch(setting: Setting):
    for row in chunks.rows(setting):
        apart = max(row[name] for name in ("logits", "gradients", "statistics"))
        assert apart < ROUNDING[row["precision"]], row


def test_runs_in_each_precision_can_be_published(setting: Setting):
    rows = list(runs.rows(setting))
    places = {("cpu", "no"), *(("cuda", precision) for precision in setting.precisions)}
    assert {(row["device"], row["precision"]) for row in rows} == places
    assert all(row.get("publishable") for row in rows), rows


def test_a_stopped_run_goes_on_to_the_same_bytes(setting: Setting):
    rows = list(stop.rows(setting))
    assert all(row.get("same bytes") and row["same scaler"] for row in rows), rows
    (half,) = (row for row in rows if row["precision"] == "fp16")
    assert half["scaler"] != "{}"
