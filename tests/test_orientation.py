"""One policy for EXIF orientation in fine-tuning and evaluation: sideways photos are as good as upright ones."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image

from fixefficientnet.reproduce.report import Report

TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""What makes of an upright image the one to which the orientation belongs."""


def stored_sideways(folder: Path, target: Path) -> Path:
    """The same images without loss, two out of three turned, with the EXIF orientation that turns them back."""
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        image, exif = Image.open(path).convert("RGB"), Image.Exif()
        orientation = (1, 6, 8, 1, 3, 6)[number % 6]
        exif[0x0112] = orientation
        file = target / path.relative_to(folder).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        (image.transpose(TURNS[orientation]) if orientation > 1 else image).save(file, exif=exif)
    return target


def as_png(folder: Path, target: Path) -> Path:
    for path in sorted(folder.rglob("*.jpg")):
        file = target / path.relative_to(folder).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(file)
    return target


@pytest.fixture(scope="module")
def upright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    return as_png(tiny.make_data(folder / "jpg", train=6, val=4), folder / "upright")


@pytest.fixture(scope="module")
def sideways(upright: Path) -> Path:
    return stored_sideways(upright.with_name("jpg"), upright.with_name("sideways"))


@pytest.fixture(scope="module")
def base(upright: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    reproduce(folder, upright, "base", "--stage", "base", "--no-pretrained")
    return folder / "base" / "model.safetensors"


def reproduce(output: Path, data: Path, experiment: str, *more: object) -> Report:
    place = ["--data", data, "--output", output, "--experiment", experiment]
    small = ["--train-size", 32, "--test-size", 48, "--epochs", 2, "--batch-size", 6, "--shard", 8, "-j", 0]
    tiny.cli("reproduce", *tiny.NETWORK, *place, *small, *more)
    return Report.load(output / experiment)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("method", ["online", "cached"])
def test_photos_of_own_classes_are_tuned_upright(
    upright: Path, sideways: Path, base: Path, tmp_path: Path, method: str
):
    more = ["--checkpoint", base, "--method", method]
    plain, turned = (reproduce(tmp_path, data, data.name, *more) for data in (upright, sideways))
    assert turned.recipe.upright is plain.recipe.upright is True
    assert turned.measured == plain.measured
    deltas = [tmp_path / name / "delta.safetensors" for name in ("upright", "sideways")]
    assert sha256(deltas[0]) == sha256(deltas[1])
    assert turned.unturned == ()

    as_stored = reproduce(tmp_path, sideways, "as-stored", *more, "--no-upright")
    assert as_stored.recipe.upright is False
    tagged = [file for file in sideways.rglob("*.png") if Image.open(file).getexif()[0x0112] > 1]
    assert set(as_stored.unturned) == {str(file) for file in tagged}
    text = (tmp_path / "as-stored" / "report.md").read_text()
    assert f"EXIF orientation: {len(tagged)}, not turned" in text
    assert str(sorted(tagged)[0]) in text


def test_a_stopped_run_remembers_what_it_did_not_turn(sideways: Path, base: Path, tmp_path: Path):
    more = ["--checkpoint", base, "--no-upright", "--checkpoint-steps", 1]
    whole = reproduce(tmp_path, sideways, "run", *more)
    (tmp_path / "run" / "report.json").unlink()
    assert reproduce(tmp_path, sideways, "run", *more).unturned == whole.unturned  # nothing is trained again


def test_evaluation_follows_the_run_and_names_what_it_does_not_turn(
    upright: Path, sideways: Path, base: Path, tmp_path: Path
):
    run = tmp_path / "run"
    reproduce(tmp_path, upright, "run", "--checkpoint", base, "--method", "cached")

    def evaluate(data: Path, *more: object) -> tuple[dict[str, Any], str]:
        out, err = tiny.cli("evaluate", run, "--data", data, "-o", tmp_path / "out", "--json", "-j", 0, *more)
        return json.loads(out), err

    plain, _ = evaluate(upright)
    turned, said = evaluate(sideways)
    figures = ("upright", "unturned", "top1", "loss")
    assert [turned["results"][0][key] for key in figures] == [plain["results"][0][key] for key in figures]
    assert turned["results"][0]["upright"] is True
    assert turned["unturned"] == []
    assert "EXIF" not in said

    stored, said = evaluate(sideways, "--no-upright")
    tagged = [file for file in (sideways / "val").rglob("*.png") if Image.open(file).getexif()[0x0112] > 1]
    assert stored["results"][0]["unturned"] == len(tagged)
    assert stored["results"][0]["loss"] != plain["results"][0]["loss"]
    assert {Path(name) for name in stored["unturned"][0]["images"]} == set(tagged)
    again, repeated = evaluate(sideways, "--no-upright", "--resume")
    assert again["unturned"] == stored["unturned"]
    for text in (said, repeated):
        assert f"{len(tagged)} images have an EXIF orientation that {run} ignored (--upright turns them):" in text


def test_imagenets_photos_are_evaluated_as_they_are_stored(tmp_path: Path):
    classes = ("n02124075", "n07920052")
    images = as_png(tiny.make_data(tmp_path / "jpg", classes, train=0, val=3), tmp_path / "upright")
    turned = stored_sideways(tmp_path / "jpg", tmp_path / "sideways")

    def losses(*more: object) -> list[float]:
        found = []
        for data in (images, turned):
            common = ["--data", data, "--size", 64, "--json", "-j", 0, "-o", tmp_path / "out"]
            (row,) = json.loads(tiny.cli("evaluate", "lite0", *common, *more)[0])["results"]
            assert row["upright"] is bool(more)
            found.append(row["loss"])
        return found

    one, other = losses()
    assert one != other
    one, other = losses("--upright")
    assert one == other
