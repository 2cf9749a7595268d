"""The small part of what `python -m benchmarks.cuda --check` does, on a CUDA device."""

from pathlib import Path

import pytest
import tiny
import torch

from benchmarks.check import chunks, limits, runs, stop
from benchmarks.check.setting import Setting

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.newest,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    data = tiny.make_data(tmp_path / "data")
    return Setting("cuda", str(tmp_path), tiny=True, data=str(data))


def test_a_step_in_chunks_is_that_of_the_whole_batch(setting: Setting):
    rows = [limits.checked("chunks", row) for row in chunks.rows(setting)]
    assert len(rows) == 2 and not any("failed" in row for row in rows), rows


def test_runs_in_each_precision_can_be_published(setting: Setting):
    rows = [limits.checked("runs", row) for row in runs.rows(setting)]
    places = {("cpu", "no"), *(("cuda", precision) for precision in setting.precisions)}
    assert {(row["device"], row["precision"]) for row in rows} == places
    assert all(row.get("publishable") and "failed" not in row for row in rows), rows


def test_a_stopped_run_goes_on_to_the_same_bytes(setting: Setting):
    rows = list(stop.rows(setting))
    assert all(row.get("same bytes") and row["same scaler"] for row in rows), rows
    (half,) = (row for row in rows if row["precision"] == "fp16")
    assert half["scaler"] != "{}"
