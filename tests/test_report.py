"""What a run's report says of FixRes: compared with the best untuned figure, and a warning where it did not help."""

import json
from pathlib import Path

import pytest
import tiny

from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.evaluation.predictions import ImagePrediction, Predictions
from fixefficientnet.reproduce import recipe as recipes
from fixefficientnet.reproduce.report import Gain, PairedTest, Report, as_markdown

pytestmark = pytest.mark.newest


def evaluation(size: int, correct: str) -> Evaluation:
    """An evaluation with the images marked 1 classified correctly."""
    return Evaluation(size, 1.0, Predictions(ImagePrediction((1,), (int(digit), 2), 0.9, 1.0) for digit in correct))


def report(**correct: str) -> Report:
    """A report of evaluations at 128 (base) and 192 pixels, with the images marked 1 classified correctly."""
    found = {name: evaluation(128 if name == "base" else 192, digits) for name, digits in correct.items()}
    measured = {name: one.summary() for name, one in found.items()}
    recipe = recipes.resolve(recipes.subject_of_backbone("test_resnet"), {})
    told = "test_resnet", "test_resnet", recipe, "train", "val", 100, ("a", "b"), 1, 100, (), ()
    return Report(*told, measured, PairedTest.all_of(found), None)


GOOD, BAD, MIDDLE = "1" * 90 + "0" * 10, "1" * 50 + "0" * 50, "1" * 70 + "0" * 30


@pytest.mark.parametrize(
    ("base", "at_test", "tuned", "best", "warning"),
    [
        (MIDDLE, BAD, GOOD, 128, None),
        (BAD, MIDDLE, GOOD, 192, None),
        # better than untuned at the test size, and yet of no use
        (GOOD, BAD, MIDDLE, 128, "FixRes made it worse: top-1 90.00 untuned at 128 pixels, 70.00 after FixRes."),
        (MIDDLE, BAD, MIDDLE, 128, "FixRes did not help: top-1 70.00 untuned at 128 pixels, 70.00 after FixRes."),
        ("1" * 72 + "0" * 28, BAD, MIDDLE, 128, "FixRes did not help: top-1 72.00 untuned"),
        (MIDDLE, BAD, "1" * 72 + "0" * 28, 128, "No gain is shown: top-1 70.00 untuned at 128 pixels, 72.00"),
        (MIDDLE, MIDDLE, GOOD, 128, None),
    ],
)
def test_the_tuned_network_is_held_against_the_best_untuned_one(
    base: str, at_test: str, tuned: str, best: int, warning: str | None
):
    found = report(base=base, base_at_test=at_test, tuned=tuned)
    gain = found.gain
    assert gain is not None
    assert gain.untuned.size == best
    against = base if best == 128 else at_test
    assert gain.test.difference == pytest.approx(tuned.count("1") - against.count("1"))
    assert gain.test.only_fixres_correct == sum(a + b == "01" for a, b in zip(against, tuned, strict=True))
    text = as_markdown(found)
    first, second = (line for line in text.splitlines() if line.startswith("- against "))
    assert f"({best}, the best untuned)" in first
    assert f"{gain.test.difference:+.2f} points" in first
    assert "the best untuned" not in second
    assert (gain.warning or "").startswith(warning or "")
    assert bool(gain.warning) == bool(warning)
    assert (f"**{gain.warning}**" in text) == bool(warning)


def test_a_base_stage_has_no_gain():
    assert Gain.of(report(trained=GOOD).measured, {}) is None


def test_terminal_and_report_warn_where_fixres_did_not_help(tmp_path: Path):
    data = tiny.make_data(tmp_path / "data", train=6, val=4)
    place = ["--data", data, "--output", tmp_path, "-j", 0, "--train-size", 32, "--batch-size", 6]
    tiny.cli("reproduce", *tiny.NETWORK, *place, "--experiment", "base", "--stage", "base", "--no-pretrained")
    # a learning rate of 0 changes nothing: the tuned network is the untuned one
    more = ["--checkpoint", tmp_path / "base" / "model.safetensors", "--method", "cached", "--tune", "classifier"]
    said, _ = tiny.cli("reproduce", *tiny.NETWORK, *place, *more, "--test-size", 48, "--base-lr", 0, "--epochs", 1)
    folder = tmp_path / tiny.NETWORK[1]
    found = Report.load(folder)
    assert found.gain is not None and found.gain.warning is not None
    assert json.loads((folder / "report.json").read_text())["paired"].keys() == {"base", "base_at_test"}
    assert "against the best untuned of this run (" in said
    assert f"Warning: {found.gain.warning}" in " ".join(said.split())
    assert found.gain.warning in (folder / "report.md").read_text()
