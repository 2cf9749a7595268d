"""`fixefficientnet evaluate`: what it prints and writes, and what it says of what cannot be."""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import plain
import pytest
import scipy.stats
import timm
import tiny
import torch
from conftest import Network
from packaging.version import Version
from safetensors.torch import load_file, save_file
from test_page import Read, assert_stands_alone

import fixefficientnet
from fixefficientnet.errors import EvaluationError
from fixefficientnet.evaluation.statistics import wilson

CLASSES = ("apple", "brick", "cloud", "dune", "elm", "fox", "goat")
TIMM_COLUMNS = "model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation"


@dataclass(frozen=True)
class Ground:
    """Images, two networks' runs, and what a plain loop makes of the one with the other."""

    data: Path
    one: Path
    two: Path
    paths: list[Path]
    labels: list[int]
    logits: dict[Path, torch.Tensor]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    paths, labels = [], []
    for label, name in enumerate(CLASSES):
        for index in range(4 + label % 3):
            paths.append(tiny.mottle(folder / "data" / "val" / name / f"{index}.png", label, index))
            labels.append(label)
    models = {
        folder / "one": plain.network(len(CLASSES), paths, labels),
        folder / "two": plain.network(len(CLASSES), paths[::-1], labels[::-1]),
    }
    for run, model in models.items():
        plain.save_run(run, model, CLASSES)
    logits = {run: plain.logits(model, paths) for run, model in models.items()}
    one, two = models
    return Ground(folder / "data", one, two, paths, labels, logits)


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Runs the command in this process; what it said on stdout and stderr."""

    def run(*arguments: object, status: int = 0, columns: int = 200) -> tuple[str, str]:
        where = ("-j", 0, "--device", "cpu", "--output", tmp_path / "evaluations")
        return tiny.cli("evaluate", *where, *arguments, status=status, columns=columns)

    return run


@pytest.fixture
def refused(evaluate: Callable[..., tuple[str, str]]) -> Callable[..., str]:
    """Runs a command that must fail; its one message."""

    def run(*arguments: object) -> str:
        out, err = evaluate(*arguments, status=1)
        assert out == ""
        assert re.fullmatch(r"(.*images/s.*\n)*Error: .+\n", err), err
        return err[err.index("Error: ") :]

    return run


def top(ground: Ground, run: Path, best: int = 1) -> float:
    correct = plain.correct(ground.logits[run], ground.labels, best)
    return 100 * correct.count("1") / len(correct)


# --- what comes out -------------------------------------------------------------------------------------------------


def test_figures_for_people(ground: Ground, evaluate):
    out, err = evaluate(ground.one, ground.two, "--data", ground.data)
    figures = re.findall(r"(one|two) +48 +([\d.]+) +([\d.]+)-([\d.]+) +([\d.]+) +([\d.]+)-([\d.]+) +([\d.]+)", out)
    assert [row[0] for row in figures] == ["one", "two"]
    for name, *found in figures:
        run = getattr(ground, name)
        loss = torch.nn.functional.cross_entropy(ground.logits[run], torch.tensor(ground.labels)).item()
        expected = []
        for best in (1, 5):
            correct = plain.correct(ground.logits[run], ground.labels, best)
            expected += [top(ground, run, best), *wilson(correct.count("1"), len(correct))]
        assert [*map(float, found)] == pytest.approx([*expected, loss], abs=0.051)
    (said,) = re.findall(r"^\d+ images of .*", out, re.M)  # once, as it is the same of both
    assert said == f"{len(ground.paths)} images of {ground.data / 'val'}; crop_pct 0.875, bicubic"
    assert re.search(rf"one at 48: {len(ground.paths)}/{len(ground.paths)}, [\d.]+ images/s", err)


def test_the_table_fits_80_columns(ground: Ground, evaluate):
    out, _ = evaluate(ground.one, ground.two, "--data", ground.data, "--compare", ground.one, ground.two, columns=80)
    lines = out[: out.index("images of")].splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if " 48 " in line]
    assert [len(row) for row in rows] == [9, 9]  # each on one line
    for row, path in zip(rows, (ground.one, ground.two), strict=True):
        assert row[0].startswith("…") and str(path).endswith(row[0][1:])


def test_json(ground: Ground, evaluate):
    found = json.loads(evaluate(ground.one, ground.two, "--data", ground.data, "--json")[0])
    assert set(found) == {"results", "comparison", "unreadable", "unturned", "left_out"}
    assert (found["comparison"], found["unreadable"], found["unturned"]) == (None, [], [])
    assert [row["model"] for row in found["results"]] == [str(ground.one), str(ground.two)]
    for row, run in zip(found["results"], (ground.one, ground.two), strict=True):
        assert row["top1"] == pytest.approx(top(ground, run))
        assert row["top5"] == pytest.approx(top(ground, run, 5))
        assert (row["top1_low"], row["top1_high"]) == pytest.approx(
            wilson(round(top(ground, run) * len(ground.paths) / 100), len(ground.paths))
        )
        assert row["parameters"] == sum(tensor.numel() for tensor in parameters(run))
        assert (row["images"], row["unreadable"], row["size"], row["crop_pct"]) == (len(ground.paths), 0, 48, 0.875)
        assert (row["timm_name"], row["interpolation"], row["tuned"]) == (
            "test_efficientnet.r160_in1k",
            "bicubic",
            True,
        )
        assert 0 < row["calibration_error"] < 1
        assert row["images_per_second"] == pytest.approx(len(ground.paths) / row["seconds"])


def parameters(run: Path) -> list[torch.Tensor]:
    tensors = load_file(run / "model.safetensors")
    return [tensor for name, tensor in tensors.items() if not re.search("running_|num_batches", name)]


def test_csv_has_what_json_has(ground: Ground, evaluate):
    arguments = (ground.one, ground.two, "--data", ground.data)
    rows = json.loads(evaluate(*arguments, "--json")[0])["results"]
    found = [*csv.DictReader(io.StringIO(evaluate(*arguments, "--csv", "--resume")[0]))]
    assert found == [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]


def test_the_results_file_is_one_of_timms(ground: Ground, evaluate, tmp_path: Path):
    out = tmp_path / "deep" / "results.csv"
    worse, better = sorted((ground.one, ground.two), key=lambda run: top(ground, run))
    assert top(ground, worse) < top(ground, better)
    evaluate(worse, better, "--data", ground.data, "--results-file", out)
    header, *lines = out.read_text().splitlines()
    assert header == TIMM_COLUMNS
    for line, run in zip(lines, (better, worse), strict=True):  # the best first, as timm has it
        name, size, top1, top1_err, top5, top5_err, count, crop_pct, interpolation = line.split(",")
        assert (size, crop_pct, interpolation) == ("48", "0.875", "bicubic")
        assert name == str(run)  # not timm's name: these are not timm's weights
        assert float(top1) == pytest.approx(top(ground, run), abs=1e-4)
        assert float(top5) == pytest.approx(top(ground, run, 5), abs=1e-4)
        assert float(top1) + float(top1_err) == pytest.approx(100)
        assert float(top5) + float(top5_err) == pytest.approx(100)
        assert float(count) == round(sum(tensor.numel() for tensor in parameters(run)) / 1e6, 2)


def test_the_table_per_class(ground: Ground, evaluate, tmp_path: Path):
    evaluate(ground.one, ground.two, "--data", ground.data, "--per-class", tmp_path / "classes.csv")
    rows = [*csv.DictReader((tmp_path / "classes.csv").open())]
    assert [(row["model"], row["class"], row["name"]) for row in rows] == [
        (str(run), str(number), name) for run in (ground.one, ground.two) for number, name in enumerate(CLASSES)
    ]
    for row in rows:
        label = int(row["class"])
        predicted = ground.logits[Path(row["model"])].argmax(1).tolist()
        of_class = [predicted for predicted, truth in zip(predicted, ground.labels, strict=True) if truth == label]
        wrong = [CLASSES[predicted] for predicted in of_class if predicted != label]
        assert int(row["images"]) == len(of_class)
        assert float(row["top1"]) == pytest.approx(100 * of_class.count(label) / len(of_class))
        assert int(row["times"]) == wrong.count(row["taken_for"]) == max(map(wrong.count, wrong), default=0)


def test_the_table_per_class_says_what_wordnet_ids_mean(ground: Ground, evaluate, tmp_path: Path):
    ids = {
        "n01440764": "tench, Tinca tinca",
        "n02124075": "Egyptian cat",
        "n15075141": "toilet tissue, toilet paper, bathroom tissue",
    }
    paths = [tiny.mottle(tmp_path / "data" / name / "0.png", number) for number, name in enumerate(ids)]
    run = plain.save_run(tmp_path / "run", plain.network(3, [*paths, paths[0]], [0, 1, 2, 1]), [*ids])
    evaluate(run, "--data", tmp_path / "data", "--per-class", tmp_path / "classes.csv")
    rows = [*csv.DictReader((tmp_path / "classes.csv").open())]
    assert {row["name"]: row["description"] for row in rows} == ids


def test_the_table_per_class_of_wordnet_ids_that_are_none_of_imagenets(evaluate, tmp_path: Path):
    ids = ("n01440764", "n09999999", "n15075141")
    paths = [tiny.mottle(tmp_path / "data" / name / "0.png", number) for number, name in enumerate(ids)]
    run = plain.save_run(tmp_path / "run", plain.network(3, [*paths, paths[0]], [0, 1, 2, 1]), ids)
    evaluate(run, "--data", tmp_path / "data", "--per-class", tmp_path / "classes.csv")
    rows = [*csv.DictReader((tmp_path / "classes.csv").open())]
    assert [row["name"] for row in rows] == [*ids]


def test_the_table_per_class_of_models_that_name_the_same_folders_differently(evaluate, tmp_path: Path):
    names = ("0", "1", "2")
    paths = [tiny.mottle(tmp_path / "data" / name / "0.png", number) for number, name in enumerate(names)]
    own = plain.save_run(tmp_path / "run", plain.network(3, [*paths, paths[0]], [0, 1, 2, 1]), names)
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "imagenets.safetensors")
    imagenets = f"timm/test_efficientnet:{tmp_path / 'imagenets.safetensors'}"
    evaluate(own, imagenets, "--data", tmp_path / "data", "--size", 48, "--per-class", tmp_path / "classes.csv")
    rows = [*csv.DictReader((tmp_path / "classes.csv").open())]
    assert [row["name"] for row in rows] == [*names, "n01440764", "n01443537", "n01484850"]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_row_per_image(ground: Ground, evaluate, tmp_path: Path, ending: str):
    data, out = tmp_path / "data", tmp_path / "deep" / f"images.{ending}"
    copied(ground, data, {2: b"no image"})
    evaluate(ground.one, ground.two, "--data", data, "--predictions", out)
    text = out.read_text()
    rows = [*csv.DictReader(io.StringIO(text))] if ending == "csv" else [*map(json.loads, text.splitlines())]
    images = [path.relative_to(ground.data / "val") for path in ground.paths]
    assert [(row["model"], row["image"]) for row in rows] == [
        (str(run), str(image)) for run in (ground.one, ground.two) for image in images
    ]
    for number, row in enumerate(rows):
        index = number % len(images)
        if index == 2:
            assert (
                row.pop("left_out")
                == "The image of 8 bytes is not an image, or of a kind that is not read: convert it to PNG."
            )
            assert not any(row[key] for key in row.keys() - {"model", "image"})
            continue
        logits = ground.logits[Path(row["model"])][index]
        best = [CLASSES[label] for label in logits.argsort(descending=True)[:5]]
        assert [row["prediction"], *(row[f"prediction{place}"] for place in range(2, 6))] == best
        assert row["truth"] == images[index].parent.name
        assert int(row["correct"]) == (best[0] == row["truth"])
        assert float(row["confidence"]) == pytest.approx(logits.softmax(0).max().item(), rel=1e-4)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ground.labels[index]))
        assert float(row["loss"]) == pytest.approx(loss.item(), rel=1e-4)
        assert not row["left_out"]


def test_a_row_per_image_of_real_labels(evaluate, tmp_path: Path):
    known = {1: "", 2: "n09193705|n04228054"}  # of timm's copy
    for number in known:
        path = tmp_path / "data" / "n01440764" / f"ILSVRC2012_val_{number:08d}.JPEG"
        tiny.mottle(path.with_suffix(".png"), number).rename(path)
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "model.safetensors")
    run, out = f"timm/test_efficientnet:{tmp_path / 'model.safetensors'}", tmp_path / "images.csv"
    evaluate(run, "--data", tmp_path / "data", "--size", 48, "--real-labels", "--predictions", out)
    for row, truth in zip(csv.DictReader(out.open()), known.values(), strict=True):
        assert (row["truth"], row["left_out"]) == (truth, "" if truth else "no ReaL label")


def test_names_that_are_no_utf_8_and_hold_what_a_table_is_made_of(evaluate, tmp_path: Path):
    names = ("a,b", 'c"d', "e\nf")
    paths = [tiny.mottle(tmp_path / "data" / name / "0.png", number) for number, name in enumerate(names)]
    paths[0] = paths[0].rename(os.fsdecode(os.fsencode(paths[0].parent) + b"/caf\xe9.png"))
    run = plain.save_run(tmp_path / "run", plain.network(3, [*paths, paths[0]], [0, 1, 2, 1]), names)
    out = tmp_path / "images.csv"
    evaluate(run, "--data", tmp_path / "data", "--predictions", out)
    rows = [*csv.DictReader(io.StringIO(out.read_text(), newline=""))]
    assert [row["truth"] for row in rows] == [*names]
    assert rows[0]["image"] == "a,b/caf\\udce9.png"


@pytest.mark.parametrize("swapped", [False, True])
def test_a_comparison_is_that_of_scipy(ground: Ground, evaluate, swapped: bool):
    first, second = (ground.two, ground.one) if swapped else (ground.one, ground.two)
    pairs = list(zip(*(plain.correct(ground.logits[run], ground.labels) for run in (first, second)), strict=True))
    counts = {pair: pairs.count(pair) for pair in (("1", "1"), ("1", "0"), ("0", "1"), ("0", "0"))}
    only_first, only_second = counts["1", "0"], counts["0", "1"]
    assert only_first != only_second
    p = scipy.stats.binomtest(only_first, only_first + only_second).pvalue

    arguments = ("--compare", first, second, "--data", ground.data)
    found = json.loads(evaluate(*arguments, "--json")[0])
    assert [row["model"] for row in found["results"]] == [str(first), str(second)]
    pair = found["comparison"]
    assert (pair["first"], pair["second"], pair["images"]) == (str(first), str(second), len(pairs))
    assert [pair[f"{who}_correct"] for who in ("both", "only_first", "only_second", "neither")] == [*counts.values()]
    assert pair["difference"] == pytest.approx(top(ground, second) - top(ground, first))
    assert pair["difference_low"] < pair["difference"] < pair["difference_high"]
    assert pair["p"] == pytest.approx(p)

    out, _ = evaluate(*arguments, "--resume")
    assert f"{second} against {first}: {pair['difference']:+.2f} points top-1 (95%: " in out
    assert f"p = {p:.2g}" in out
    assert f"correct in the first alone: {only_first}, in the second alone: {only_second}, of {len(pairs)} image" in out


def test_a_page_to_look_at(ground: Ground, evaluate, tmp_path: Path):
    data, out = tmp_path / "data", tmp_path / "deep" / "page.html"
    copied(ground, data, {2: b"no image"})
    evaluate("--compare", ground.one, ground.two, "--data", data, "--html", out)
    found = Read(out.read_bytes())
    assert_stands_alone(found)
    kept = [index for index in range(len(ground.paths)) if index != 2]
    digits = {run: plain.correct(ground.logits[run], ground.labels) for run in (ground.one, ground.two)}
    for row, (run, correct) in zip(found.table("model"), digits.items(), strict=True):
        share = 100 * sum(correct[index] == "1" for index in kept) / len(kept)
        assert row[:3] == [str(run), "48", f"{share:.2f}"]
        assert ("h2", f"{run} at 48 pixels") in found.headings
        wrong = sum(correct[index] == "0" for index in kept)
        assert ("h3", f"Misclassified images: {wrong}") in found.headings
    gained = sum((digits[ground.one][index], digits[ground.two][index]) == ("0", "1") for index in kept)
    assert f"Correct only now: {gained} image" in found.text
    assert f"{ground.two} against {ground.one}, on the same images: " in found.text
    assert "apple/2.png: The image of 8 bytes" in found.text


def test_a_model_compared_with_itself(ground: Ground, evaluate):
    pair = json.loads(evaluate("--compare", ground.one, ground.one, "--data", ground.data, "--json")[0])["comparison"]
    assert (pair["difference"], pair["p"], pair["only_first_correct"]) == (0, 1, 0)


def test_the_same_from_python(ground: Ground, evaluate):
    found = fixefficientnet.evaluate(str(ground.one), ground.data, batch_size=7, workers=0, device="cpu", size=40)
    row = json.loads(evaluate(ground.one, "--data", ground.data, "-b", 7, "--size", 40, "--json")[0])["results"][0]
    assert asdict(found.summary()).items() <= row.items()
    assert row["size"] == 40


def test_loading_processes_change_nothing(ground: Ground, evaluate):
    arguments = (ground.one, "--data", ground.data, "--json", "-b", 4)
    one, two = (json.loads(evaluate(*arguments, "-j", workers)[0])["results"][0] for workers in (0, 2))
    for row in (one, two):
        del row["seconds"], row["images_per_second"]
    plain.assert_nearly(one, two)


def test_resuming_with_other_cores_takes_over_what_is_there(ground: Ground, tmp_path: Path):
    before = torch.get_num_threads()
    kept = []
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            fixefficientnet.evaluate(str(ground.one), ground.data, device="cpu", folder=tmp_path, resume=True)
            kept.append({path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()})
    finally:
        torch.set_num_threads(before)
    assert kept[0] and kept[1] == kept[0]


def test_half_precision_is_nearly_the_same(ground: Ground, tmp_path: Path):
    command = ["evaluate", str(ground.one), "--data", str(ground.data), "-j", "0", "--device", "cpu", "--csv"]
    command += ["--output", str(tmp_path / "out"), "--mixed-precision"]
    rows: list[dict[str, Any]] = []
    for precision in ("no", "bf16"):
        text = tiny.run([*command, precision], tmp_path / "said", command=tiny.FIXEFFICIENTNET)
        rows += csv.DictReader(io.StringIO(text[text.index("model,") : text.rindex("\n") + 1]))
    assert float(rows[0]["loss"]) == pytest.approx(float(rows[1]["loss"]), rel=0.1)
    assert rows[0]["loss"] != rows[1]["loss"]
    assert len([*(tmp_path / "out").iterdir()]) == 2  # one is no continuation of the other


def test_fast_preprocessing_is_said_and_nearly_the_same(ground: Ground, tmp_path: Path):
    command = ["evaluate", str(ground.one), "--data", str(ground.data), "-o", str(tmp_path / "out")]
    found = []
    for more in ([], ["--fast-preprocessing"]):
        out, _ = tiny.cli(*command, "--json", *more)
        found.append(json.loads(out)["results"][0])
    exact, fast = found
    assert (exact["preprocessing"], fast["preprocessing"]) == ("exact", "fast")
    assert fast["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert fast["loss"] != exact["loss"]
    assert len([*(tmp_path / "out").iterdir()]) == 2
    assert "fast preprocessing" in " ".join(tiny.cli(*command, "--fast-preprocessing")[0].split())


def test_fast_preprocessing_refuses_what_it_cannot_do(ground: Ground):
    model = timm.create_model(
        "test_efficientnet", num_classes=len(CLASSES), pretrained_cfg_overlay={"crop_mode": "border"}
    )
    with pytest.raises(EvaluationError, match="crop mode border"):
        fixefficientnet.evaluate(model, ground.data, device="cpu", fast_preprocessing=True)


def test_another_precision_in_the_same_process(ground: Ground):
    found = [
        fixefficientnet.evaluate(str(ground.one), ground.data, workers=0, device="cpu", mixed_precision=precision)
        for precision in ("no", "bf16")
    ]
    assert found[0].loss == pytest.approx(found[1].loss, rel=0.1)


# --- images that cannot be read -------------------------------------------------------------------------------------


def copied(ground: Ground, to: Path, broken: dict[int, bytes]) -> list[str]:
    """Copies the images, some of them broken; names of the broken ones."""
    for index, path in enumerate(ground.paths):
        target = to / path.relative_to(ground.data)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(broken.get(index, path.read_bytes()))
    return [str(ground.paths[index].relative_to(ground.data / "val")) for index in sorted(broken)]


def test_broken_images_are_named_and_in_no_denominator(ground: Ground, evaluate, tmp_path: Path):
    whole = ground.paths[6].read_bytes()
    names = copied(ground, tmp_path / "data", {0: b"", 6: whole[:60], 7: b"<html>", 30: b"\x89PNG\r\n"})
    arguments = (ground.one, "--data", tmp_path / "data")
    kept = [index for index in range(len(ground.paths)) if index not in (0, 6, 7, 30)]
    digits = plain.correct(ground.logits[ground.one], ground.labels)
    out, err = evaluate(*arguments, "--json")
    found = json.loads(out)
    (row,) = found["results"]
    assert (row["images"], row["unreadable"]) == (len(kept), 4)
    assert row["top1"] == pytest.approx(100 * sum(digits[index] == "1" for index in kept) / len(kept))
    assert f"4 of {len(ground.paths)} images could not be read and do not count:" in err
    (unreadable,) = found["unreadable"]
    assert unreadable["model"] == str(ground.one)
    for name, reason in zip(names, unreadable["images"], strict=True):
        assert name in reason
        assert reason in err
    out, _ = evaluate(*arguments, "--resume")
    assert f"{len(kept)} images of {tmp_path / 'data' / 'val'} (4 more could not be read)" in out


def test_twenty_of_many_broken_images_are_named(ground: Ground, evaluate, tmp_path: Path):
    names = copied(ground, tmp_path / "data", dict.fromkeys(range(23), b""))
    _, err = evaluate(ground.one, "--data", tmp_path / "data")
    assert [name in err for name in names] == [True] * 20 + [False] * 3
    assert err.endswith("and 3 more\n")


def test_where_all_images_are_broken_there_is_nothing_to_say(ground: Ground, refused, tmp_path: Path):
    copied(ground, tmp_path / "data", dict.fromkeys(range(len(ground.paths)), b"no image"))
    message = refused(ground.one, "--data", tmp_path / "data")
    assert f"None of the {len(ground.paths)} images of {tmp_path / 'data' / 'val'} could be read: " in message
    assert "apple/0.png" in message


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_data_that_are_not_there(ground: Ground, refused, tmp_path: Path):
    assert "There is no folder nowhere" in refused(ground.one, "--data", "nowhere")
    assert "It has: no folder at all" in refused(ground.one, "--data", tmp_path)
    (tmp_path / "val").mkdir()
    assert "holds no images" in refused(ground.one, "--data", tmp_path)
    (tmp_path / "val" / "apple").mkdir()
    (tmp_path / "val" / "apple" / "notes.txt").write_text("no image")
    assert "holds no images" in refused(ground.one, "--data", tmp_path)
    assert "test/" in refused(ground.one, "--data", ground.data, "--split", "test")


def test_no_data_and_no_model_are_usage_errors(ground: Ground, evaluate):
    for arguments, said in (([ground.one], "--data is missing"), (["--data", ground.data], "Name a model")):
        out, err = evaluate(*arguments, status=2)
        assert out == ""
        assert said in err
    for option, status in (
        (["--size", 0], 2),
        (["-b", 0], 2),
        (["-j", -1], 2),
        (["-b", "1.5"], 2),
        (["--json", "--csv"], 2),
        (["--predictions", "images.parquet"], 2),
        (["--crop-pct", "0"], 2),
        (["--crop-pct", "1.5"], 2),
        (["--crop-pct", "nan"], 2),
        (["--compare", ground.one], 2),
        (["--nonsense"], 2),
        (["--device", "tpu"], 2),
        (["--mixed-precision", "fp8"], 2),
    ):
        _, err = evaluate(ground.one, "--data", ground.data, *option, status=status)
        assert err.count("Error") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mixed-precision", "fp16"], "fp16 is for CUDA"),
        (["--real-labels"], "ReaL labels are of ImageNet's 1000 classes"),
        (["b99"], "No variant is named 'b99'"),
        (["b4_ns"], "no published FixRes weights"),
        (["timm/resnet51"], "has no model 'resnet51'"),
        (["nowhere/model.safetensors"], "there is no such file"),
        (["--compare", "b98", "b99"], "No variant is named 'b98'"),
    ],
)
def test_bad_arguments_are_one_message(ground: Ground, evaluate, arguments: list[str], said: str):
    out, err = evaluate(ground.one, "--data", ground.data, *arguments, status=1)
    assert said in err
    assert err.count("Error") == 1
    assert out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(ground: Ground, refused):
    assert "there is no CUDA device" in refused(ground.one, "--data", ground.data, "--device", "cuda")


def test_classes_that_the_model_has_not(ground: Ground, refused, tmp_path: Path):
    tiny.mottle(tmp_path / "data" / "apple" / "0.png", 0)
    tiny.mottle(tmp_path / "data" / "kiwi" / "0.png", 1)
    assert f"{tmp_path / 'data'} has classes that {ground.one} lacks: kiwi." in refused(
        ground.one, "--data", tmp_path / "data"
    )


def test_a_model_of_another_number_of_classes(ground: Ground, refused, tmp_path: Path):
    for num_classes in (3, 1000):
        path = tmp_path / f"{num_classes}.safetensors"
        save_file(timm.create_model("test_efficientnet", num_classes=num_classes).state_dict(), path)
        message = refused(f"timm/test_efficientnet:{path}", "--data", ground.data, "--size", 32)
        assert f"has {len(CLASSES)} classes, the model has {num_classes}." in message
        assert "--stage base" in message


def without_names(ground: Ground, folder: Path, labels: list[int]) -> tuple[str, ...]:
    """The first images as a dataset that does not name its classes."""
    datasets.disable_progress_bars()
    rows = {"image": [str(path) for path in ground.paths[: len(labels)]], "label": labels}
    folder.mkdir()
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "validation.parquet")
    return "--data", f"hfds/{folder}", "--data-root", str(folder.with_name("cache"))


TIMM_WANTS_NAMES = Version(timm.__version__) < Version("1.0.31")


@pytest.mark.skipif(not TIMM_WANTS_NAMES, reason="this timm reads labels without names")
def test_classes_without_names_need_a_newer_timm(ground: Ground, refused, tmp_path: Path):
    message = refused(ground.one, *without_names(ground, tmp_path / "data", [0, 1, 2, 6]))
    assert f"timm reads since 1.0.31; {timm.__version__} is installed" in message


@pytest.mark.skipif(TIMM_WANTS_NAMES, reason="timm before 1.0.31 wants names")
def test_classes_without_names_are_numbered_as_the_models(ground: Ground, evaluate, tmp_path: Path):
    where = without_names(ground, tmp_path / "data", [0, 1, 2, 6])
    row = json.loads(evaluate(ground.one, *where, "--per-class", tmp_path / "classes.csv", "--json")[0])["results"][0]
    predicted = ground.logits[ground.one][:4].argmax(1).tolist()
    assert row["top1"] == 25 * sum(predicted == label for predicted, label in zip(predicted, [0, 1, 2, 6], strict=True))
    rows = [*csv.DictReader((tmp_path / "classes.csv").open())]
    assert [(row["class"], row["name"]) for row in rows] == [("0", ""), ("1", ""), ("2", ""), ("6", "")]
    assert [row["taken_for"] or row["class"] for row in rows] == [str(predicted) for predicted in predicted]


@pytest.mark.skipif(TIMM_WANTS_NAMES, reason="timm before 1.0.31 wants names")
def test_labels_out_of_range(ground: Ground, refused, tmp_path: Path):
    message = refused(ground.one, *without_names(ground, tmp_path / "data", [0, 1, 2, 6, 7]))
    assert f"{ground.paths[4]} has the label 7, but the model's classes are 0 to 6" in message


@pytest.mark.skipif(TIMM_WANTS_NAMES, reason="timm before 1.0.31 wants names")
def test_an_error_in_another_process_is_said_by_it_alone(ground: Ground, refused, tmp_path: Path):
    where = without_names(ground, tmp_path / "data", [0, 1, 2, 7])
    refused(ground.one, *where)  # which leaves the dataset in its cache: two processes would both put it there
    command = ["evaluate", str(ground.one), *where, "-b", "2", "-j", "0", "--device", "cpu"]
    command += ["--output", str(tmp_path / "out")]
    processes = tiny.start_two(command, tmp_path / "said", command=tiny.FIXEFFICIENTNET)
    for process in processes:
        process.join(120)
    said = [(tmp_path / f"said.{rank}").read_text() for rank in range(2)]
    assert [process.exitcode for process in processes] == [1, 1], said
    assert "Error" not in said[0]
    assert re.fullmatch(r"Error \(process 1\): .* has the label 7, .*\n", said[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_model(ground: Ground, refused, tmp_path: Path, value: float):
    tensors = load_file(ground.one / "model.safetensors")
    model: Network = timm.create_model("test_efficientnet", num_classes=len(CLASSES))
    model.load_state_dict(tensors)
    model.classifier.weight.data[3, 5] = value
    run = plain.save_run(tmp_path / "run", model, CLASSES)
    assert "logits are NaN or infinite for apple/0.png" in refused(run, "--data", ground.data)


def test_a_table_per_class_of_real_labels(evaluate, tmp_path: Path):
    # which has two
    path = tmp_path / "data" / "n01440764" / "ILSVRC2012_val_00000002.JPEG"
    tiny.mottle(path.with_suffix(".png"), 0).rename(path)
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "model.safetensors")
    run = f"timm/test_efficientnet:{tmp_path / 'model.safetensors'}"
    more = ("--per-class", tmp_path / "classes.csv", "--real-labels")
    out, err = evaluate(run, "--data", tmp_path / "data", *more, status=2)
    assert "one label per image, which ReaL labels are not" in " ".join(err.split())
    assert out == ""
    assert not (tmp_path / "classes.csv").exists()


@pytest.mark.parametrize("option", ["--results-file", "--per-class"])
def test_files_that_cannot_be_written(ground: Ground, refused, tmp_path: Path, option: str):
    # tests may run as root, whom permissions do not stop
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder.csv", tmp_path / "file" / "x.csv"):
        message = refused(ground.one, "--data", ground.data, option, path)
        assert f"{path} cannot be written: " in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.csv"]  # before anything is evaluated


def test_finished_batches_that_cannot_be_kept(ground: Ground, refused, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert str(path) in refused(ground.one, "--data", ground.data, "--output", path)


class Missing:
    """A finder that makes a package look as if it were not installed."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("package", ["accelerate", "torchmetrics"])
def test_without_its_extra_it_says_what_to_install(
    ground: Ground, refused, package: str, monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(package), *sys.meta_path])
    message = refused(ground.one, "--data", ground.data)
    assert f"This needs {package}: pip install 'fixefficientnet[evaluate]'" in message
