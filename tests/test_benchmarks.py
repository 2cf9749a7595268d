"""Tests of the benchmarks: they run, report what they leave out and mix no machines; the docs' tables are current."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT

from benchmarks import loading, power, runner, scale, tables
from benchmarks.check import autotune, chunks, command, forward, limits, runs, step
from benchmarks.check import loading as check_loading
from benchmarks.check.setting import Setting, case, relative
from fixefficientnet.evaluation.statistics import compare

pytestmark = pytest.mark.newest

SPEED = ROOT / "docs" / "results" / "speed.json"


def benchmarks(*arguments: object, status: int = 0, module: str = "benchmarks") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == status, done.stderr
    return done


def test_the_docs_show_the_committed_figures():
    page = (ROOT / "docs" / "speed.md").read_text()
    found = json.loads(SPEED.read_text())
    assert {row["benchmark"] for row in found["rows"]} <= set(tables.TABLES)
    again = "run `python -m benchmarks.tables docs/results/speed.json docs/speed.md`"
    assert tables.rendered(found, page) == page, again


@pytest.mark.parametrize(
    ("results", "name", "page"),
    [("loading", "loading", "speed"), ("deploying", "serve", "serving"), ("deploying", "export", "deploying")],
)
def test_the_docs_show_the_figures_of_other_machines(results: str, name: str, page: str):
    found = tables.read(ROOT / "docs" / "results" / f"{results}.json")
    assert tables.every_table(found)[name] in (ROOT / "docs" / f"{page}.md").read_text()


def test_tables_show_what_there_is(tmp_path: Path):
    shared = {"benchmark": "classify", "variant": "b0", "size": 320, "batch_size": 16, "images": 4}
    taken = {"date": "2026-01-02", "commit": "abc", "rounds": 2}
    methods = {
        "fixefficientnet": (30.0, 4, 0.0),
        "fixefficientnet in bf16": (90.0, 3, 0.0),
        "fixefficientnet, onnx": (60.0, 4, 12.0),
        "fixefficientnet, openvino": (20.0, 4, 9.0),
        "timm": (10.0, 4, 0.0),
        "timm, channels last": (12.0, 4, 0.0),
    }
    rows = [
        {
            **{**shared, **taken, "method": method, "images_per_second": rate, "times_timm": rate / 10},
            **{"same_predictions": same, "exporting_seconds": exporting, "spread": 0.1 if method == "timm" else 0.04},
        }
        for method, (rate, same, exporting) in methods.items()
    ]
    rows.append({**rows[1], "batch_size": 32, "same_predictions": 2})
    facts = {"gpu": "a GPU", "cpu": "a CPU", "threads": 3, "python": "3.11", "versions": {"torch": "2"}}
    found = {"machine": facts, "rows": rows}
    path, page_path = tmp_path / "figures.json", tmp_path / "page.md"
    path.write_text(json.dumps(found))
    page = benchmarks(path, module="benchmarks.tables").stdout
    assert "| fixefficientnet in bf16 | 90.0 (9.00) | 90.0 (9.00) | 2 of 4 |" in page  # the batch size with fewest
    assert "| fixefficientnet | 30.0 (3.00) | - | 4 of 4 |" in page
    assert "| fixefficientnet, onnx: images to break even | 720 |" in page  # 12 s / (1/30 - 1/60)
    assert "| fixefficientnet, openvino: images to break even | never |" in page
    assert "| folder to labels, b0 at 320, batches of 16, default engine | 30.0 images/s |" in page
    assert "| machine | a GPU; 3 cores (a CPU) |" in page
    assert "| versions | Python 3.11, torch 2 |" in page
    assert "| classify | 2026-01-02 | abc | 2 |" in page
    assert "took 4% longer than its fastest\n(the median of 7; at most 10%)." in page
    assert (
        "| the same, against timm's fastest options | 30.0 images/s | 12.0 images/s (timm, channels last) | 2.50 |"
        in page
    )
    assert "## cost" not in page

    places = {name: f"<!-- {name} -->\nstale\n{tables.END}\n" for name in ("machine", "summary", *tables.TABLES)}
    for text, reason in (
        ("".join(places.values()), "there are no figures of preprocess"),  # figures of others are not thrown away
        (places["summary"], "the page has no <!-- machine -->"),
    ):
        page_path.write_text(text)
        assert reason in benchmarks(path, page_path, module="benchmarks.tables", status=1).stderr
        assert page_path.read_text() == text


def test_the_price_of_the_gain_is_held_against_larger_base_models():
    def row(key: str, seconds: tuple[float, float], top1: tuple[float, float] | tuple[None, None]) -> dict[str, Any]:
        found: dict[str, Any] = {"variant": key, "family": "lite" if top1[0] is None else "ns"}
        for which, one, correct in zip(("base", "fix"), seconds, top1, strict=True):
            found |= {f"{which}_{name}": 1 for name in ("size", "gmacs", "megabytes")}
            found |= {f"{which}_seconds": one, f"{which}_top1": correct}
        return found

    shown = tables.cost([row("b0", (1, 2), (70, 73)), row("b1", (4, 5), (80, 81)), row("lite0", (1, 2), (None, None))])
    assert [line.split(" | ")[-2:] for line in shown.splitlines()[2:]] == [
        ["70 to 73", "75.0 |"],  # halfway in time from b0 to b1, as the figure's axis counts it
        ["80 to 81", "- |"],
        ["-", "- |"],
    ]


def test_variants_taken_again_stand_where_they_stood():
    earlier = [{"benchmark": "cost", "variant": key, "old": True} for key in ("b0", "b1", "b2_ns", "lite0")]
    earlier.insert(2, {"benchmark": "start", "command": "x"})
    rows = runner.merged(earlier, [{"benchmark": "cost", "variant": "b1"}], "cost", ["b1"])
    assert [row.get("variant") for row in rows] == [None, "b0", "b1", "b2_ns", "lite0"]
    assert "old" not in rows[2]
    assert runner.merged(earlier, [], "cost", None) == [{"benchmark": "start", "command": "x"}]


def test_what_is_no_figures_is_one_line(tmp_path: Path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("{}")
    for name, reason in (("a", "is no JSON"), ("b", "there are no figures"), ("c", "No such file")):
        path = tmp_path / f"{name}.json"
        said = benchmarks(path, module="benchmarks.tables", status=1).stderr
        assert reason in said and said.count("\n") == 1
        if path.exists():  # and is left as it is
            content = path.read_text()
            assert benchmarks("cost", "--json", path, status=1).stderr == said
            assert path.read_text() == content


@pytest.mark.slow
def test_benchmarks_fill_one_file_of_one_machine(tmp_path: Path):
    path = tmp_path / "deep" / "speed.json"
    shared = ("--json", path, "--threads", 1, "--rounds", 1)
    benchmarks("cost", "--variants", "lite0", *shared)
    (cost,) = json.loads(path.read_text())["rows"]
    assert (cost["base_size"], cost["fix_size"]) == (224, 256)
    assert cost["fix_gmacs"] == pytest.approx(cost["base_gmacs"] * (256 / 224) ** 2, rel=0.02)
    assert cost["fix_seconds"] > 0 and cost["fix_megabytes"] > 18.7  # its weights alone

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "n02123045").symlink_to(ROOT / "examples")
    benchmarks("load", "preprocess", "--variants", "lite0", "--images", tmp_path / "images", *shared)
    found = json.loads(path.read_text())
    assert [row["benchmark"] for row in found["rows"]][:3] == ["cost", "load", "load"]
    ours = [row for row in found["rows"] if row["benchmark"] == "preprocess" and row["method"] == "fixefficientnet"]
    assert len(ours) == 3
    assert all(row["largest_difference"] < 1e-3 for row in ours)
    assert "| lite0 | 224 to 256 |" in benchmarks(path, module="benchmarks.tables").stdout

    found["machine"]["cpu"] = "another"
    path.write_text(json.dumps(found))
    assert "another machine" in benchmarks("cost", "--variants", "lite0", *shared, status=1).stderr
    assert json.loads(path.read_text()) == found


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_loading_is_measured_beside_other_loaders(tmp_path: Path):
    tiny.make_data(tmp_path, train=4, val=1)
    given = {"folder": str(tmp_path / "train"), "size": 96, "batch": 4, "workers": [1], "rounds": 1, "device": "cpu"}
    rows = loading.rows_of(given | {"images": 8, "most": 12}, loading.child)
    assert [row["method"] for row in rows] == list(loading.METHODS)
    assert all(row["images_per_second"] > 0 and row["cpu_seconds"] > 0 for row in rows)
    ours, _, torchvision, _ = (row["in_flight"] for row in rows)
    assert 0 < ours < torchvision / 3
    inputs = [next(loader(8, 0)) for loader in loading.loaders(tmp_path / "train", 96, 4, "cpu").values()]
    assert {(tuple(one.shape), one.dtype) for one in inputs} == {
        ((4, 3, 96, 96), torch.float32),
        ((4, 3, 96, 96), torch.uint8),
    }
    # of the same images, however each was augmented
    means = [one.float().mean((1, 2, 3)) for index, one in enumerate(inputs) if index != 1]
    assert all(torch.allclose(one, means[0], atol=0.5) for one in means)


def test_what_is_not_there_is_named():
    assert "No variant is named 'b99'" in benchmarks("cost", "--variants", "b99", status=1).stderr
    said = benchmarks("accuracy", "--images", "nowhere", status=1).stderr
    assert said.strip() == "--images: there is no nowhere."
    said = benchmarks("cost", "finetune", status=1).stderr
    assert said.strip() == "finetune needs --train and --checkpoint."
    assert "at least 1, not 0" in benchmarks("cost", "--rounds", 0, status=2).stderr
    done = benchmarks("preprocess", "--images", ROOT / "tests", "--threads", 1, status=1)
    assert "no folders with images in them" in done.stderr and not done.stdout


def test_each_part_of_a_large_data_set_is_measured(tmp_path: Path):
    data = scale.layout(tmp_path, 12)
    assert scale.layout(tmp_path, 12) == data and len([*data.glob("train/*/*.JPEG")]) == 12
    found: list[Any] = []
    for part in ("evaluation", *scale.PARTS):
        tiny.forget_accelerate()
        row = scale.child({"part": part, "data": str(data), "work": str(tmp_path / "work")})
        assert row["seconds"] > 0 and row["memory"] >= 0
        found = scale.merged(found, {"images": 12, "part": part, **row})
    tiny.forget_accelerate()
    assert [row["part"] for row in found] == [*scale.PARTS]
    shown = scale.table([*found, {**found[0], "images": 99}])
    assert "| | 12 images | 99 images |" in shown.replace("|  |", "| |")
    assert shown.count("not run") == len(scale.PARTS) - 1
    assert len(scale.draw(found).axes) == 2


def test_help_names_what_there_is_and_does_nothing():
    said = benchmarks("--help").stdout
    assert all(f"\n  {name} " in said for name in tables.TABLES)
    assert max(map(len, said.splitlines())) <= 80
    for module in ("tables", "cuda", "figures", "scale"):
        assert f"usage: python -m benchmarks.{module}" in benchmarks("--help", module=f"benchmarks.{module}").stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpus_benchmark_says_so():
    assert "no CUDA device" in benchmarks(module="benchmarks.cuda", status=1).stderr


def test_the_gpus_check_runs_on_tiny_networks(tmp_path: Path):
    data = tiny.make_data(tmp_path / "data", train=4, val=2)
    setting = Setting("cpu", str(tmp_path), tiny=True, data=str(data))
    for row in chunks.rows(setting):
        assert max(row[name] for name in ("logits", "gradients", "statistics")) < 1e-4, row
        assert {name for limit in limits.LIMITS["chunks"] for name in limit.columns} <= row.keys()
    for row in step.rows(setting):
        assert row["images/s"] > 0 and row["GB, --plan"] > 0, row
    for part, columns in ((forward, {"contiguous", "4 times the batch"}), (autotune, {"contiguous", "channels last"})):
        for row in part.rows(setting):
            assert columns <= row.keys(), row
    assert not torch.backends.cudnn.benchmark
    for row in check_loading.rows(setting):
        assert all(row[method] > 0 for method in loading.METHODS), row
    rows = list(islice(runs.rows(setting), 2))
    assert [(row["method"], row["precision"]) for row in rows] == [("online", "no"), ("online", "bf16")]
    assert all(row["publishable"] for row in rows) and rows[1]["like the CPU's"] is True, rows


def test_a_part_of_the_check_that_fails_or_takes_too_long_is_a_row(tmp_path: Path):
    setting = Setting("cpu", str(tmp_path), tiny=True)
    (late,) = command.rows_of("chunks", setting, 0.1)
    assert late == {"failed": "not done after 0.1 s"}
    (failed,) = command.rows_of("nothing", setting, 60)
    assert failed == {"failed": "ModuleNotFoundError: No module named 'benchmarks.check.nothing'"}
    table = command.shown([{"case": "a|b", "rate": 12345.6, "same": True}, failed]).splitlines()
    assert table[2] == "| a\\|b | 12,346 | yes |  |"


def test_what_else_a_part_prints_is_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    python = tmp_path / "python"  # in place of the interpreter, with a part that a C library prints in
    python.write_text(
        f"""#!/bin/sh
exec '{sys.executable}' - "$@" <<'END'
import os, sys, types
os.write(1, b"before the part: \\xff\\n5\\n")
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.check import __main__ as child
def rows(setting):
    os.write(1, b"a C library\\n")
    print("Python", flush=True)
    yield {{"case": 1}}
    os.write(1, b"no end of line")
    yield {{"case": 2}}
sys.modules["benchmarks.check.noisy"] = types.SimpleNamespace(rows=rows)
sys.argv[1:] = sys.argv[3:]
child.main()
END
"""
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert list(command.rows_of("noisy", Setting("cpu", str(tmp_path)), 60)) == [{"case": 1}, {"case": 2}]
    assert capsys.readouterr().err.count("noisy printed, which is no row: ") == 2


def test_a_case_keeps_its_names_where_the_device_is_spoiled(monkeypatch: pytest.MonkeyPatch):
    def spoiled() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", spoiled)
    row = case({"variant": "b0", "precision": "bf16"}, spoiled)
    assert row.pop("failed").startswith("RuntimeError: CUDA error")
    assert row == {"variant": "b0", "precision": "bf16"}
    assert case({"variant": "b0"}, lambda: {"logits": 0.0}) == {"variant": "b0", "logits": 0.0}


def test_the_check_fails_where_a_row_is_not_acceptable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    apart = {"precision": "bf16", "logits": 0.01, "gradients": 0.01, "statistics": 0.01}
    assert limits.checked("chunks", apart) == apart
    for part, row, said in (
        ("chunks", {**apart, "gradients": 0.3}, "gradients: 0.3, at most 0.05"),
        ("chunks", {**apart, "precision": "no"}, "logits: 0.01, at most 0.005; gradients: "),
        ("chunks", {**apart, "logits": float("nan")}, "logits: nan, at most 0.05"),
        ("stop", {"same bytes": False, "same scaler": True}, "same bytes: no"),
        ("runs", {"publishable": False, "failed": "this and that"}, "this and that; publishable: no"),
        ("step", {"times --plan": 2.0}, "times --plan: 2, at most 1.25"),
        ("export", {"format": "onnx", "logits": 0.5}, "logits: 0.5, at most 0.01"),
    ):
        assert limits.checked(part, row)["failed"].startswith(said)
    assert relative(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")

    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(command.machine, "use", lambda *_: None)
    options = {"train": None, "checkpoint": None, "only": ["chunks"], "dry_run": True, "device": "cpu", "threads": 1}
    given = Namespace(**options, json=tmp_path / "check.json")
    for rows, status in (([apart], None), ([{**apart, "logits": 1.0}], "not acceptable"), ([], "not acceptable")):
        monkeypatch.setattr(command, "rows_of", lambda *_, rows=rows: iter(rows))
        with nullcontext() if status is None else pytest.raises(SystemExit, match=status):
            command.run(given)
        assert "- Acceptable: logits, gradients, statistics (bf16): at most 0.05; " in capsys.readouterr().out
        (row,) = json.loads(given.json.read_text())["rows"]
        assert ("failed" in row) == (status is not None)


def test_the_check_refuses_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command.machine, "use", lambda *_: pytest.fail("it began"))
    data = tiny.make_data(tmp_path / "data", train=1, val=1)
    tiny.draw(tmp_path / "half" / "train" / "apple" / "0.jpg", 0, 0)
    (tmp_path / "empty").mkdir()
    for given, said in (
        ({"train": tmp_path / "none"}, f"--train: there is no folder {tmp_path / 'none'}."),
        ({"train": tmp_path / "empty"}, f"--train: {tmp_path / 'empty' / 'train'} has no folders with images in them"),
        ({"train": tmp_path / "half"}, f"--train: {tmp_path / 'half' / 'val'} has no folders with images in them"),
        ({"train": data, "checkpoint": tmp_path / "none"}, f"--checkpoint: there is no file {tmp_path / 'none'}."),
        ({"train": data, "checkpoint": Path(__file__), "dry_run": True}, "--checkpoint is of a Lite0, and a dry run"),
    ):
        options = {"train": None, "checkpoint": None, "only": None, "dry_run": False} | given
        with pytest.raises(SystemExit, match=re.escape(said)):
            command.run(Namespace(**options))


def test_a_dry_run_takes_few_images_and_the_check_those_it_says(tmp_path: Path):
    data = tiny.make_data(tmp_path / "data", classes=("a", "b", "c", "d"), train=14, val=9)
    (data / "train" / "a" / "0.txt").write_text("no image")
    images = {split: command.machine.images_in(data / split) for split in command.IMAGES}
    for is_tiny, counts in ((True, {"train": 3 * 4, "val": 3 * 2}), (False, {"train": 4 * 12, "val": 4 * 8})):
        found = command._some_of(images, tmp_path / str(is_tiny), tiny=is_tiny)
        for split, count in counts.items():
            files = list(found.glob(f"{split}/*/*"))
            assert len(files) == count and all(file.suffix == ".jpg" for file in files)
    with pytest.raises(SystemExit, match="no class in common"):
        command._some_of({**images, "val": []}, tmp_path / "none", tiny=True)


def test_so_many_images_show_a_gain_as_often_as_was_asked():
    gain, differing = 0.04, 0.1
    images = power.images_needed(gain, differing)
    generator = np.random.default_rng(0)
    better, worse = (differing + gain) / 2, (differing - gain) / 2
    shown = 0
    for _ in range(400):
        drawn = generator.choice(3, images, p=[better, worse, 1 - differing])
        first = "".join("011"[which] for which in drawn)
        second = "".join("101"[which] for which in drawn)
        shown += compare(first, second).p < power.P
    assert shown / 400 == pytest.approx(power.POWER, abs=0.06)
    assert power.smallest_gain(images, differing) == pytest.approx(gain, rel=0.01)
