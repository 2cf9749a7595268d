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


def test_tables_show_what_there_is_and_say_what_is_not():
    shared = {"benchmark": "classify", "variant": "b0", "size": 320, "batch_size": 16, "pictures": 4}
    taken = {"date": "2026-01-02", "commit": "abc", "rounds": 2}
    rates = {"fixefficientnet": (30.0, 4), "fixefficientnet in bf16": (90.0, 3), "timm": (10.0, 4)}
    rows = [
        {**shared, **taken, "way": way, "pictures_per_second": rate, "times_timm": rate / 10, "same_guesses": same}
        for way, (rate, same) in rates.items()
    ]
    fewer = [{**rows[1], "batch_size": 2, "same_guesses": 2}, {**rows[2], "batch_size": 2}]
    facts = {"gpu": "a GPU", "cpu": "a CPU", "threads": 3, "python": "3.11", "versions": {"torch": "2"}}
    every = "".join(f"<!-- {name} -->\nstale\n{tables.END}\n" for name in ("machine", "summary", *tables.TABLES))
    page = tables.rendered({"machine": facts, "rows": rows + fewer}, every)
    assert "| fixefficientnet in bf16 | 90.0 (9.00) | 90.0 (9.00) |" in page
    assert "| fixefficientnet | 30.0 (3.00) | - |" in page
    assert "fixefficientnet in bf16: 2 of 4." in page  # the batch size with fewest
    assert "| folder to labels, b0 at 320, batches of 16, default engine | 30.0 pictures/s |" in page
    assert "Machine: a GPU; 3 cores (a CPU); Python 3.11, torch 2.\nTaken on 2026-01-02 from commit abc." in page
    assert page.count("Not measured.") == len(tables.TABLES) - 1
    assert "stale" not in page
    with pytest.raises(ValueError, match="cost"):
        tables.rendered({"machine": facts, "rows": rows}, every.replace("<!-- cost -->\nstale\n<!-- end -->", ""))


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
