"""`fixefficientnet paper`: the paper's tables, typed from it anew, and what may stand beside them."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from tiny import cli

import fixefficientnet
from fixefficientnet._internal import records
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.evaluation.predictions import ImagePrediction, Predictions
from fixefficientnet.evaluation.tables import from_csv
from fixefficientnet.reproduce import recipe as recipes
from fixefficientnet.reproduce.report import PairedTest, PaperFigures, Report

pytestmark = pytest.mark.newest

TABLE_1 = [*(f"b{number}_ns" for number in range(8)), "l2"]
TABLE_2 = [f"b{number}" for number in range(9)]
# typed from the paper: variant, base top-1, top-5, at; Fix top-1, top-5, at
TYPED = """
b4_ns 85.3 97.5 380 85.9 97.7 472
b8    85.5 97.3 672 85.7 97.6 800
l2    88.4 98.7 800 88.5 98.7 600
"""
Figures = tuple[int, float, float]
"""Size, top-1, top-5."""


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The command looks for runs/ where one is."""
    monkeypatch.chdir(tmp_path)


def published(monkeypatch: pytest.MonkeyPatch, key: str, top1: float, top5: float, **measured: Any) -> None:
    """Publishes weights of a variant, with what was measured with them, by an overlay."""
    weights = {"repository": "me/mine", "filename": "d.safetensors", "revision": "c" * 40, "sha256": "d" * 64}
    on = {"dataset": "imagenet-1k/validation", "images": 50_000} | measured
    row = {"weights": weights | {"measured": on | {"top1": top1, "top5": top5}}}
    monkeypatch.setenv("FIXEFFICIENTNET_MANIFEST", json.dumps({"schema_version": 1, "variants": {key: row}}))


def write(folder: Path, report: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(report if isinstance(report, str) else json.dumps(report))
    return folder


def report(key: str, tuned: Figures, base: Figures | None = None, *, images: int = 50_000) -> dict[str, Any]:
    """A report as a run writes it, typed here."""

    def summary(figures: Figures) -> dict[str, Any]:
        size, top1, top5 = figures
        ends = {"top1_low": top1, "top1_high": top1, "top5_low": top5, "top5_high": top5}
        counts = {"size": size, "crop_pct": 1.0, "images": images, "unreadable": 0, "unturned": 0}
        return counts | {"top1": top1, "top5": top5, "loss": 1.0} | ends

    variant = fixefficientnet.info(key)
    recipe = records.to_json(recipes.resolve(recipes.subject_of_variant(variant), {}))
    measured = ({"base": summary(base)} if base else {}) | {"tuned": summary(tuned)}
    paper = {"table": 1, "base_top1": 80, "fix_top1": 81, "fix_top5": 95, "comparable": images == 50_000}
    found = {"variant": key, "backbone": variant.backbone.name, "recipe": recipe, "train_data": "train"}
    found |= {"validation_data": "val", "train_images": 100, "classes": [], "processes": 1, "forwards": 100}
    found |= {"unreadable": [], "unturned": [], "measured": measured, "paired": {}}
    return found | {"paper": paper if variant.paper else None}


def evaluated(size: int, top1: float, top5: float, images: int = 50_000) -> Evaluation:
    """An evaluation with these accuracies."""
    kinds = [ImagePrediction((0,), predicted, 0.5, 1.0) for predicted in ((0, 1), (1, 0), (1, 2))]
    first, five = round(images * top1 / 100), round(images * top5 / 100)
    counts = (first, five - first, images - five)
    every = (kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count))
    return Evaluation(size, 1.0, Predictions(every))


def rows(*arguments: str | Path) -> list[dict[str, Any]]:
    return json.loads(cli("paper", *arguments, "--json")[0])


def row_of(key: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    (row,) = (row for row in found if row["variant"] == key)
    return row


def markdown_tables(text: str) -> list[list[list[str]]]:
    """The cells of each table's rows, without its header."""
    tables: list[list[list[str]]] = []
    for line in text.splitlines():
        if re.fullmatch(r"\|(?:\s*-+:?\s*\|)+", line):
            tables.append([])
        elif line.startswith("|") and not line.startswith("| variant"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return tables


def test_the_rows_are_the_papers():
    found = rows()
    assert [row["variant"] for row in found if row["table"] == 1] == TABLE_1
    assert [row["variant"] for row in found if row["table"] == 2] == TABLE_2
    assert len(found) == 18
    manifest = json.loads((ROOT / "weights_manifest.json").read_text())["variants"]
    for row in found:
        variant = manifest[row["variant"]]
        paper = variant["paper"]
        assert row["table"] == paper["table"]
        assert (row["train_size"], row["parameters"]) == (variant["train_size"], variant["parameters"])
        for which in ("base", "fix"):
            expected = (paper[which]["test_size"], paper[which]["top1"], paper[which]["top5"])
            assert (row[f"{which}_size"], row[f"{which}_top1"], row[f"{which}_top5"]) == expected
            assert row[f"{which}_measured_top1"] is row[f"{which}_difference"] is None  # nothing is published
    for line in TYPED.strip().splitlines():
        key, *figures = line.split()
        row = row_of(key, found)
        named = ("base_top1", "base_top5", "base_size", "fix_top1", "fix_top5", "fix_size")
        assert [row[name] for name in named] == [float(figure) for figure in figures]


def test_people_see_both_tables_whole():
    out, err = cli("paper")
    first, second = out.split("Table 2")
    assert "Table 1" in first
    assert "…" not in out
    for keys, text in ((TABLE_1, first), (TABLE_2, second)):
        assert [line.split()[0] for line in text.splitlines() if re.match(r" ?(b\d|l2)", line)] == keys
    assert re.search(r"^ ?b4_ns +85\.3/97\.5 +380 +85\.9/97\.7 +472 +- +- +- +-", first, re.M)
    assert re.search(r"^ ?l2 +88\.4/98\.7 +800 +88\.5/98\.7 +600 ", first, re.M)
    assert re.search(r"^ ?b8 +85\.5/97\.3 +672 +85\.7/97\.6 +800 ", second, re.M)
    assert err == ""


@pytest.mark.parametrize(
    ("top1", "difference", "within"),
    [(86.05, 0.15, True), (85.75, -0.15, True), (86.1, 0.2, False), (85.7, -0.2, False), (85.9, 0, True)],
)
def test_a_comparable_run_stands_beside_the_paper(tmp_path: Path, top1: float, difference: float, within: bool):
    folder = write(tmp_path / "b4", report("b4_ns", (472, top1, 97.5), (380, 85.32, 97.4)))
    row = row_of("b4_ns", rows(folder))
    assert (row["fix_measured_top1"], row["fix_measured_top5"]) == (top1, 97.5)
    assert row["fix_difference"] == pytest.approx(difference, abs=1e-9)
    assert row["fix_within_noise"] is within
    assert (row["base_measured_top1"], row["base_measured_top5"]) == (85.32, 97.4)
    assert row["base_difference"] == pytest.approx(0.02)
    assert row["base_within_noise"] is True
    assert str(folder) in row["source"]
    out, err = cli("paper", folder, columns=100)
    said = f"{top1:.2f}/97.50 +472 +{re.escape(f'{difference:+.2f}')} +{'within' if within else 'outside'}"
    assert re.search(f"^ ?b4_ns .* {said}", out, re.M)
    assert re.search(r"^ ?b4_ns .* 85.32/97.40 +380 +\+0.02 +within", out, re.M)
    assert err == ""


@pytest.mark.parametrize("top1", [85.95, 80.0])
def test_the_tables_fit_80_columns_whole(tmp_path: Path, top1: float):
    folder = write(tmp_path / "b4", report("b4_ns", (472, top1, 97.5), (380, top1, 97.4)))
    out, _ = cli("paper", folder)
    tables = out[: out.index("top-1/top-5 in per cent")]  # the footnote is wrapped by the terminal
    assert max(map(len, tables.splitlines())) <= 80
    assert "…" not in tables


def test_a_report_as_a_run_builds_it(tmp_path: Path):
    """The command reads what `reproduce` writes, and both call the same difference noise."""
    variant = fixefficientnet.info("b4")
    recipe = recipes.resolve(recipes.subject_of_variant(variant), {})

    def built(evaluations: dict[str, Evaluation]) -> Report:
        measured = {name: evaluation.summary() for name, evaluation in evaluations.items()}
        paper = PaperFigures.beside(variant, recipe, measured, 1000)
        paired, told = PairedTest.all_of(evaluations), (variant.key, variant.backbone.name, recipe, "train", "val")
        return Report(*told, 100, (), 1, 100, (), (), measured, paired, paper)

    for number, (top1, within) in enumerate([(84.15, True), (84.2, False)]):
        found = {
            "base": evaluated(380, 83.3, 96.4),
            "base_at_test": evaluated(512, 83, 96),
            "tuned": evaluated(512, top1, 97),
        }
        made = built(found)
        assert made.paper is not None
        assert made.paper.within_noise is within
        made.dump(tmp_path / str(number))
        assert Report.load(tmp_path / str(number)) == made
        row = row_of("b4", rows(tmp_path / str(number)))
        assert (row["fix_measured_top1"], row["fix_within_noise"]) == (pytest.approx(top1), within)
        assert row["fix_difference"] == pytest.approx(made.paper.difference)
        assert (row["base_measured_top1"], row["base_difference"]) == (pytest.approx(83.3), pytest.approx(0))
    built({name: evaluated(one.size, 80, 90, images=40) for name, one in found.items()}).dump(tmp_path / "few")
    assert row_of("b4", rows(tmp_path / "few"))["fix_measured_top1"] is None


def test_a_base_measured_at_another_size_than_the_papers_has_no_difference(tmp_path: Path):
    # the paper tests the base of l2 at 800, a run at the train size
    row = row_of("l2", rows(write(tmp_path / "l2", report("l2", (600, 88.4, 98.6), (475, 88.0, 98.5)))))
    assert row["fix_difference"] == pytest.approx(-0.1)
    assert row["base_difference"] is row["base_measured_top1"] is row["base_within_noise"] is None
    assert (row["base_size"], row["base_top1"]) == (800, 88.4)


@pytest.mark.parametrize(
    ("key", "options", "said"),
    [("b2", {"images": 1234}, r"b2 at 420, top-1 81\.25 of 1,234 images"), ("lite0", {}, "lite0 at 420")],
    ids=["other images", "not in the paper"],
)
def test_what_is_not_comparable_is_named_and_stays_out(tmp_path: Path, key: str, options: dict[str, int], said: str):
    folder = write(tmp_path / "other", report(key, (420, 81.25, 95.5), (260, 80.5, 95.0), **options))
    assert rows(folder) == rows()
    out, err = cli("paper", folder)
    assert out == cli("paper")[0]
    assert re.search(f"{said}.*not comparable", err)
    assert str(folder) in err
    assert len(err.splitlines()) == 1


def test_runs_are_found_in_their_folder_and_by_default_in_runs(tmp_path: Path):
    write(tmp_path / "runs" / "one", report("b0", (320, 79.2, 94.5)))
    write(tmp_path / "runs" / "two", report("b0", (320, 79.4, 94.7)))
    base = report("b1", (240, 79.0, 94.0))
    base["measured"] = {"trained": base["measured"]["tuned"]}  # a base stage
    write(tmp_path / "runs" / "base", base)
    (tmp_path / "runs" / "unfinished").mkdir()
    found = rows("runs")
    assert len(found) == 19
    assert [row["fix_measured_top1"] for row in found if row["variant"] == "b0"] == [79.2, 79.4]
    assert row_of("b1", found)["source"] is None
    assert rows() == found
    assert rows("runs/one", Path("runs", "two", "report.json")) == found


def test_published_figures_stand_beside_the_papers(monkeypatch: pytest.MonkeyPatch):
    published(monkeypatch, "b0", 79.25, 94.5)
    row = row_of("b0", rows())
    assert (row["source"], row["fix_measured_top1"], row["fix_measured_top5"]) == ("published", 79.25, 94.5)
    assert row["fix_difference"] == pytest.approx(-0.05)
    assert row["fix_within_noise"] is True
    assert row["base_measured_top1"] is None


def test_figures_published_of_other_images_are_not_comparable(monkeypatch: pytest.MonkeyPatch):
    published(monkeypatch, "b0", 66.5, 87.5, dataset="imagenet-v2", images=10_000)
    assert row_of("b0", rows())["source"] is None
    assert re.search(r"published: b0 at 320, top-1 66\.50 of 10,000 images: not comparable", cli("paper")[1])


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_any_report_is_one_error(tmp_path: Path, there: bool):
    if there:
        (tmp_path / "empty").mkdir()
    out, err = cli("paper", "empty", status=1)
    assert out == ""
    assert "empty holds no report.json" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"variant": "b4", "measured": {"tun',
        "[]",
        "null",
        "{}",
        '{"variant": "b4", "measured": null}',
        '{"variant": "b4", "measured": {"tuned": null}}',
        '{"variant": "b4", "measured": {"tuned": {"size": 512, "images": 9, "top1": 84.0}}}',
        '{"variant": "b4", "measured": {"tuned": {"size": 512, "images": 9, "top1": "good", "top5": 97.0}}}',
        '{"measured": {"tuned": {"size": 512, "images": 9, "top1": 84.0, "top5": 97.0}}}',
    ],
)
def test_a_broken_report_is_one_error_that_names_it(tmp_path: Path, text: str):
    write(tmp_path / "good", report("b0", (320, 79.2, 94.5)))
    write(tmp_path / "broken", text)
    out, err = cli("paper", "good", "broken", status=1)
    assert out == ""
    assert str(Path("broken", "report.json")) in err
    assert len(err.splitlines()) == 1


def test_markdown_csv_and_json_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    published(monkeypatch, "b0", 79.25, 94.5)
    write(tmp_path / "b4", report("b4_ns", (472, 86.2, 97.5), (380, 85.32, 97.4)))
    write(tmp_path / "l2", report("l2", (600, 88.4, 98.6), (475, 88.0, 98.5)))
    write(tmp_path / "other", report("b2", (420, 81.25, 95.5), images=10))
    folders = [tmp_path / name for name in ("b4", "l2", "other")]
    (from_json, *said), (as_csv, err), (markdown, more) = (
        cli("paper", *folders, option) for option in ("--json", "--csv", "--markdown")
    )
    assert said == [err] == [more]
    found = json.loads(from_json)
    as_text = [{key: "" if value is None else str(value) for key, value in row.items()} for row in found]
    assert list(csv.DictReader(io.StringIO(as_csv))) == as_text
    assert from_csv(as_csv) == found
    tables = markdown_tables(markdown)
    assert len(tables) == 2
    for number, table in enumerate(tables, 1):
        expected = []
        for row in (row for row in found if row["table"] == number):
            texts = {which: f"{row[f'{which}_top1']:.1f}/{row[f'{which}_top5']:.1f}" for which in ("base", "fix")}
            paper = [row["variant"], texts["base"], str(row["base_size"]), texts["fix"], str(row["fix_size"])]
            for which in ("fix", "base"):
                if (top1 := row[f"{which}_measured_top1"]) is not None:
                    top5, size = row[f"{which}_measured_top5"], row[f"{which}_size"]
                    noise = "within" if row[f"{which}_within_noise"] else "outside"
                    expected.append(
                        [*paper, f"{top1:.2f}/{top5:.2f}", str(size), f"{row[f'{which}_difference']:+.2f}", noise]
                    )
                elif which == "fix":
                    expected.append([*paper, "-", "-", "-", "-"])
        assert table == expected
    assert [len(table) for table in tables] == [10, 9]  # b4_ns has its base measured too
