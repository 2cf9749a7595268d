"""The benchmarks: they run, say what they left out, mix no machines; the docs' tables are of the committed figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from benchmarks import tables

SPEED = ROOT / "docs" / "results" / "speed.json"


def benchmarks(*arguments: object, status: int = 0, module: str = "benchmarks") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == status, done.stderr
    return done


def test_the_docs_show_the_committed_figures():
    page = (ROOT / "docs" / "speed.md").read_text()
    found = json.loads(SPEED.read_text())
    assert {row["benchmark"] for row in found["rows"]} <= set(tables.TABLES)
    again = "run `python -m benchmarks.tables docs/results/speed.json docs/speed.md`"
    assert tables.rendered(found, page) == page, again


@pytest.mark.slow
def test_benchmarks_fill_one_file_of_one_machine(tmp_path: Path):
    path = tmp_path / "deep" / "speed.json"
    shared = ("--json", path, "--threads", 1, "--rounds", 1)
    said = benchmarks("cost", "accuracy", "--variants", "lite0", *shared).stderr
    assert "accuracy is left out: it needs --pictures" in said
    (cost,) = json.loads(path.read_text())["rows"]
    assert (cost["base_size"], cost["fix_size"]) == (224, 256)
    assert cost["fix_gmacs"] == pytest.approx(cost["base_gmacs"] * (256 / 224) ** 2, rel=0.02)
    assert cost["fix_seconds"] > 0 and cost["fix_megabytes"] > 18.7  # its weights alone

    benchmarks("load", "preprocess", "--variants", "lite0", "--pictures", ROOT / "examples", *shared)
    found = json.loads(path.read_text())
    assert [row["benchmark"] for row in found["rows"]][:3] == ["cost", "load", "load"]
    ours = [row for row in found["rows"] if row["benchmark"] == "preprocess" and row["way"] == "fixefficientnet"]
    assert len(ours) == 3
    assert all(row["largest_difference"] < 1e-3 for row in ours)
    assert "| lite0 | 224 to 256 |" in benchmarks(path, module="benchmarks.tables").stdout

    found["machine"]["cpu"] = "another"
    path.write_text(json.dumps(found))
    assert "another machine" in benchmarks("cost", "--variants", "lite0", *shared, status=1).stderr
    assert json.loads(path.read_text()) == found


def test_what_is_not_there_is_named():
    assert "No variant is named 'b99'" in benchmarks("cost", "--variants", "b99", status=1).stderr
    said = benchmarks("accuracy", "--pictures", "nowhere", status=1).stderr
    assert said.strip() == "--pictures: there is no nowhere."


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpus_benchmark_says_so():
    assert "no CUDA device" in benchmarks(module="benchmarks.cuda", status=1).stderr
