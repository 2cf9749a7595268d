"""Tests of the figures: what is drawn and written, and that the docs' figures are of the committed data."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from tiny import cli

from benchmarks import base_stage, finetune_runs, power, scale
from benchmarks import figures as drawings
from fixefficientnet.errors import EvaluationError
from fixefficientnet.evaluation import figures
from fixefficientnet.evaluation.statistics import wilson
from fixefficientnet.evaluation.tables import as_csv, from_csv

pytestmark = pytest.mark.newest

DOCS = ROOT / "docs"
DRAW = "run `python -m benchmarks.figures` and commit what it draws"


def description(path: Path) -> str:
    """Returns the description in a written figure."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            assert isinstance(image, PngImageFile)
            return str(image.text["Description"])
    (element,) = ET.parse(path).iter("{http://purl.org/dc/elements/1.1/}description")
    return element.text or ""


def sweep_rows(network: str = "net") -> list[dict[str, Any]]:
    """Two models over three sizes, as a sweep gives them; the untuned one is best at two sizes alike."""
    rows = []
    for tuned, accuracies in ((False, (60.0, 64.0, 64.0)), (True, (58.0, 66.0, 67.0))):
        for size, top1 in zip((128, 160, 192), accuracies, strict=True):
            row: dict[str, Any] = {"network": network, "model": "runs/net" if tuned else "timm/net"}
            row |= {"tuned": tuned, "size": size}
            row |= {"top1": top1, "top1_low": top1 - 2, "top1_high": top1 + 3, "gmacs": size**2 / 1e5}
            row |= {"images_per_second": 1e4 / size, "train_size": 128, "test_size": 192, "paper_size": None}
            row |= {"pooled_near_zero": size / 1000, "pooled_mean": 0.5}
            for place, key in enumerate(("q25", "median", "q75")):
                row |= {f"pooled_mean_{key}": 0.4 + place / 10, f"pooled_spread_{key}": 0.1 + place / 10 + size / 1e4}
            rows.append(row)
    return rows


def points(axis: Any, *, marker: str | None = None) -> set[tuple[float, float]]:
    """The points of all lines that an axis shows; or of those with this marker."""
    lines = [line for line in axis.lines if marker in (None, line.get_marker())]
    return {(float(x), float(y)) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}


def test_the_command_writes_figure_1(tmp_path: Path):
    for name in ("figure.png", "deep/er/figure.svg"):
        out, err = cli("figure", "accuracy-params", "--output", tmp_path / name)
        assert out.strip() == str(tmp_path / name)
        assert err == ""
        assert description(tmp_path / name) == figures.fingerprint(figures.accuracy_params_data())
    with Image.open(tmp_path / "figure.png") as image:
        image.load()
        assert min(image.size) > 400
        colors = image.convert("RGB").getcolors(1 << 24)
        assert colors is not None and len(colors) > 50
    assert ET.parse(tmp_path / "deep" / "er" / "figure.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_command_has_a_usual_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    cli("figure", "accuracy-params")
    assert [path.name for path in tmp_path.iterdir()] == ["accuracy-params.png"]


def test_figure_1_shows_all_18_variants_and_36_accuracies():
    variants = json.loads((ROOT / "weights_manifest.json").read_text())["variants"]
    (axis,) = figures.accuracy_params(figures.accuracy_params_data()).axes
    for which in ("base", "fix"):
        expected = {(row["parameters"] / 1e6, row["paper"][which]["top1"]) for row in variants.values() if row["paper"]}
        assert len(expected) == 18
        assert expected <= points(axis)
    assert sum(np.size(line.get_xdata()) for line in axis.lines) == 36
    assert sorted(text.get_text() for text in axis.texts) == sorted([*(f"B{n}" for n in range(8))] * 2 + ["B8", "L2"])
    legend = axis.get_legend()
    assert legend is not None and len(legend.get_texts()) == 4


def test_another_name_is_a_usage_error(tmp_path: Path):
    _, err = cli("figure", "figure-1", "-o", tmp_path / "x.png", status=2)
    assert "figure-1" in err
    assert "accuracy-params" in err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["x.jpg", "x.pdf", "x", "x.png.txt", "deep/x.gif"])
def test_another_ending_is_one_error_and_leaves_nothing(tmp_path: Path, name: str):
    out, err = cli("figure", "accuracy-params", "-o", tmp_path / name, status=1)
    assert out == ""
    assert str(tmp_path / name) in err
    assert ".png or a .svg" in err
    assert len(err.splitlines()) == 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["file/x.png", "folder.svg"])
def test_where_nothing_can_be_written_is_one_error(tmp_path: Path, name: str):
    # tests may run as root, whom permissions do not stop
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder.svg").mkdir()
    before = sorted(tmp_path.rglob("*"))
    out, err = cli("figure", "accuracy-params", "-o", tmp_path / name, status=1)
    assert out == ""
    assert f"{tmp_path / name} cannot be written" in err
    assert len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", figures.FORMATS)
@pytest.mark.parametrize("draw", [figures.sweep, figures.activations, figures.accuracy_params])
def test_the_same_data_give_the_same_bytes(tmp_path: Path, draw: Any, kind: str):
    rows = figures.accuracy_params_data() if draw is figures.accuracy_params else sweep_rows()
    one, other = tmp_path / f"one.{kind}", tmp_path / f"other.{kind}"
    for path in (one, other):
        figures.save(draw(rows), path, rows)
    assert one.read_bytes() == other.read_bytes()
    assert description(one) == figures.fingerprint(rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == [one.name, other.name]  # and nothing half-written


def test_other_data_have_another_fingerprint(tmp_path: Path):
    rows = sweep_rows()
    other = [dict(row, top1=row["top1"] + 1e-9) for row in rows]
    assert figures.fingerprint(rows) != figures.fingerprint(other)
    assert figures.fingerprint(rows) == figures.fingerprint([dict(reversed(row.items())) for row in rows])
    assert figures.fingerprint(rows) == figures.fingerprint(from_csv(as_csv(rows)))  # as the docs' are drawn


def test_what_was_there_stays_where_the_new_one_fails(tmp_path: Path):
    figure = figures.sweep(sweep_rows())
    path = tmp_path / "sweep.png"
    figures.save(figure, path, 1)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        figures.save(figure, path, object())  # is no JSON
    with pytest.raises(EvaluationError):
        figures.save(figure, path.with_suffix(".bmp"), 2)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


def test_a_sweep_is_drawn_point_by_point():
    rows = sweep_rows()
    accuracy, gmacs, rate = figures.sweep(rows).axes
    assert {(row["size"], row["top1"]) for row in rows} <= points(accuracy)
    assert points(accuracy, marker="*") == {(160, 64.0), (192, 67.0)}  # of two best sizes, the cheaper
    assert {(row["size"], row["gmacs"]) for row in rows} <= points(gmacs)
    assert {(row["size"], row["images_per_second"]) for row in rows} <= points(rate)
    legend = accuracy.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {"timm/net", "runs/net"}
    labels = " ".join(text.get_text() for text in accuracy.texts)
    assert "train size 128" in labels
    assert "test size 192" in labels


@pytest.mark.parametrize("correct", [0, 1])
def test_a_model_that_is_never_or_always_correct_can_be_drawn(correct: int):
    """An interval's end is never on the wrong side of the accuracy, which matplotlib refuses."""
    rows = sweep_rows()[:3]
    for images in range(1, 200):
        low, high = wilson(correct * images, images)
        assert low <= 100 * correct <= high, f"of {images} images"
        rows[0] |= {"top1": 100.0 * correct, "top1_low": low, "top1_high": high}
    figures.sweep(rows)


def test_activations_are_drawn_point_by_point():
    rows = sweep_rows()
    near_zero, mean, spread = figures.activations(rows).axes
    assert {(row["size"], 100 * row["pooled_near_zero"]) for row in rows} <= points(near_zero)
    assert {(row["size"], row["pooled_mean_median"]) for row in rows} <= points(mean)
    assert {(row["size"], row["pooled_spread_median"]) for row in rows} <= points(spread)
    (low, _), (high, _) = spread.collections[0].get_datalim(spread.transData).get_points()
    assert (low, high) == (128, 192)


@pytest.fixture(scope="module")
def docs_figures():
    """Rows and drawing of each of the docs' figures."""
    try:
        return drawings.every()
    except FileNotFoundError as error:
        pytest.fail(f"{error.filename} is missing: measure it as the docs say, then {DRAW}", pytrace=False)


@pytest.mark.parametrize("name", ["accuracy-params.png", *drawings.RESULTS])
def test_the_docs_figures_are_of_the_committed_data_and_drawing(name: str, tmp_path: Path, docs_figures: Any):
    rows, draw = docs_figures[name]
    path = DOCS / name
    assert path.is_file(), f"docs/{name} is missing: {DRAW}"
    with Image.open(path) as image:
        assert isinstance(image, PngImageFile)
        said, pixels = dict(image.text), np.asarray(image)
    assert said.get("Description") == figures.fingerprint(rows), f"docs/{name} shows other data: {DRAW}"
    if f"version{matplotlib.__version__}," not in said["Software"]:  # another release draws other pixels
        return
    figures.save(draw(rows), tmp_path / name, rows)
    with Image.open(tmp_path / name) as image:
        same = np.array_equal(np.asarray(image), pixels)
    assert same, f"docs/{name} is drawn differently today: {DRAW}"


def test_the_docs_table_of_fine_tuning_runs_is_of_the_committed_data():
    table = finetune_runs.table(from_csv((DOCS / "results" / "finetuning.csv").read_text()))
    assert f"\n{table}\n" in (DOCS / "finetuning.md").read_text(), (
        f"the table in docs/finetuning.md is stale; {DRAW}, and put this into the page:\n{table}"
    )


def test_the_docs_table_of_needed_images_is_of_the_committed_data():
    table = power.table(from_csv((DOCS / "results" / "finetuning.csv").read_text()), 865)
    assert f"\n{table}\n" in (DOCS / "finetuning.md").read_text(), f"docs/finetuning.md is stale; put this in:\n{table}"


def test_the_table_of_base_networks_shows_the_committed_figures():
    table = base_stage.table(from_csv((DOCS / "results" / "base_stage.csv").read_text()))
    assert f"\n{table}\n" in (DOCS / "finetuning.md").read_text(), f"docs/finetuning.md is stale; put this in:\n{table}"
    timed = base_stage.timed_table(from_csv((DOCS / "results" / "base_stage_timed.csv").read_text()))
    assert f"\n{timed}\n" in (DOCS / "finetuning.md").read_text(), f"docs/finetuning.md is stale; put this in:\n{timed}"


def test_the_table_of_large_data_sets_shows_the_committed_figures():
    table = scale.table(from_csv((DOCS / "results" / "scale.csv").read_text()))
    assert f"\n{table}\n" in (DOCS / "speed.md").read_text(), f"docs/speed.md is stale; {DRAW}, put this in:\n{table}"
