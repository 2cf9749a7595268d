"""Class numbers: folders in the model's numbering, logits restricted to some of them, ReaL labels."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import plain
import pytest
import tiny
import torch
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import nn
from torch.nn import functional as F

import fixefficientnet
from fixefficientnet.classes import real_labels
from fixefficientnet.data.dataset import ImageDataset, open_dataset
from fixefficientnet.errors import DataError, EvaluationError

pytestmark = pytest.mark.newest

WORDNET_IDS = [*map(ImageNetInfo("imagenet-1k").index_to_label_name, range(1000))]
FEW = {"n01440764": 0, "n02124075": 285, "n03000684": 491, "n07920052": 967, "n15075141": 999}


def make_folder(folder: Path, names: Iterable[str]) -> Path:
    """An image per class, each like no other."""
    for number, name in enumerate(names):
        tiny.mottle(folder / name / "0.png", number)
    return folder


def labels(images: ImageDataset) -> dict[str, int]:
    """The class index of each folder's image."""
    return {Path(images.image_name(index)).parent.name: images[index][1] for index in range(len(images))}


# --- folders --------------------------------------------------------------------------------------------------


def test_folders_of_numbers_are_numbered_by_these(tmp_path: Path):
    names = ["999", "10", "2", "0", "100", "31"]
    make_folder(tmp_path / "plain", names)
    make_folder(tmp_path / "with_zeros", [f"{int(name):03d}" for name in names])
    for folder in ("plain", "with_zeros"):
        images = open_dataset(str(tmp_path / folder), None, num_classes=1000, numbered=True)
        assert {int(name): label for name, label in labels(images).items()} == {int(name): int(name) for name in names}
        assert images.classes == tuple(WORDNET_IDS)


def test_folders_of_numbers_are_no_imagenet_unless_it_is_said(tmp_path: Path):
    make_folder(tmp_path, [str(number) for number in range(10)])
    with pytest.raises(DataError, match="has 10 classes, the model has 1000"):
        open_dataset(str(tmp_path), None, num_classes=1000)


def test_a_number_that_is_no_class_of_imagenets_is_refused(tmp_path: Path):
    make_folder(tmp_path, ["0", "1000"])
    with pytest.raises(DataError, match="has 2 classes, the model has 1000"):
        open_dataset(str(tmp_path), None, num_classes=1000, numbered=True)


def test_folders_of_numbers_are_no_imagenet_for_another_model(tmp_path: Path):
    make_folder(tmp_path, ["7", "10", "2"])
    for num_classes in (None, 3):
        images = open_dataset(str(tmp_path), None, num_classes=num_classes)
        assert labels(images) == {"2": 0, "7": 1, "10": 2}
        assert images.classes == ("2", "7", "10")


def test_unknown_wordnet_ids_are_named(tmp_path: Path):
    make_folder(tmp_path, [*FEW, "n00000001"])
    with pytest.raises(DataError, match=r"none of ImageNet-1k's: n00000001\."):
        open_dataset(str(tmp_path), None, num_classes=1000)


def test_a_folder_of_classes_is_a_whole_data_set(tmp_path: Path):
    make_folder(tmp_path, reversed(FEW))
    (tmp_path / ".cache").mkdir()
    images = open_dataset(str(tmp_path), None, num_classes=1000)
    assert labels(images) == FEW
    assert images.name == str(tmp_path)
    with pytest.raises(DataError, match="has no folder other/"):
        open_dataset(str(tmp_path), "other", num_classes=1000)


def test_a_folder_of_splits_is_not_taken_for_one_of_classes(tmp_path: Path):
    for split in ("train", "training", "test"):
        make_folder(tmp_path / split / split, FEW)
        with pytest.raises(DataError, match=rf"has no folder val/.* It has: {split}\."):
            open_dataset(str(tmp_path / split), None, num_classes=1000)
    make_folder(tmp_path / "test" / "val", list(FEW)[1:3])
    assert labels(open_dataset(str(tmp_path / "test"), None, num_classes=1000)) == dict(list(FEW.items())[1:3])


# --- a model of one's own classes ---------------------------------------------------------------------------------


def test_a_models_own_classes_are_found_by_name(tmp_path: Path):
    classes = ("cloud", "apple", "dune", "brick")  # not as folders sort
    make_folder(tmp_path / "data", ("apple", "brick", "cloud"))
    images = [tmp_path / "data" / name / "0.png" for name in ("apple", "brick", "cloud")]
    model = plain.network(4, [*images, images[0]], [1, 3, 0, 2])
    plain.save_run(tmp_path / "run", model, classes)
    found = fixefficientnet.evaluate(str(tmp_path / "run"), tmp_path / "data", workers=0, device="cpu")
    assert [prediction.labels for prediction in plain.evaluated(found)] == [(1,), (3,), (0,)]
    assert found.correct == plain.correct(plain.logits(model, images), [1, 3, 0])
    make_folder(tmp_path / "data", ("apple", "pear", "plum"))
    with pytest.raises(DataError, match=r"data has classes that .*run lacks: pear, plum\."):
        fixefficientnet.evaluate(str(tmp_path / "run"), tmp_path / "data", workers=0, device="cpu")


def test_a_models_own_classes_may_have_wordnet_ids(tmp_path: Path):
    classes = ["n07920052", "n01440764", "n09999999"]
    make_folder(tmp_path / "data", sorted(classes))
    images = [tmp_path / "data" / name / "0.png" for name in classes]
    plain.save_run(tmp_path / "run", plain.network(3, [*images, images[1]], [0, 1, 2, 2]), classes)
    found = fixefficientnet.evaluate(str(tmp_path / "run"), tmp_path / "data", workers=0, device="cpu")
    assert [prediction.labels for prediction in plain.evaluated(found)] == [
        (1,),
        (0,),
        (2,),
    ]  # by name of the folders
    out, _ = tiny.cli(
        "evaluate",
        tmp_path / "run",
        "--data",
        tmp_path / "data",
        "-j",
        0,
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
    )
    assert "restricted" not in out


# --- some of ImageNet's classes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Path]:
    """A network of 1000 classes, its run's folder, and images of 200 of them."""
    folder = tmp_path_factory.mktemp("imagenet")
    chosen = WORDNET_IDS[3::5]
    make_folder(folder / "data", chosen)
    images = [folder / "data" / name / "0.png" for name in chosen]
    model = plain.network(1000, images, list(range(3, 1000, 5)))
    return model, plain.save_run(folder / "run", model, WORDNET_IDS), folder / "data"


def measured(out: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    """What the command says as JSON, and to people."""
    command = ("evaluate", *arguments, "-j", 0, "--device", "cpu", "--output", out)
    return json.loads(tiny.cli(*command, "--json")[0])["results"][0], tiny.cli(*command, "--resume", columns=200)[0]


def assert_figures(row: dict[str, Any], logits: torch.Tensor, targets: list[int]) -> None:
    assert row["images"] == len(targets)
    for name, best in (("top1", 1), ("top5", 5)):
        assert row[name] == pytest.approx(100 * plain.correct(logits, targets, best).count("1") / len(targets))
    assert row["loss"] == pytest.approx(F.cross_entropy(logits, torch.tensor(targets)).item(), rel=1e-5)


def test_data_of_just_200_classes_restrict_the_logits(imagenet, tmp_path: Path):
    model, run, data = imagenet
    chosen = list(range(3, 1000, 5))
    logits = plain.logits(model, [data / WORDNET_IDS[index] / "0.png" for index in chosen])
    row, said = measured(tmp_path, run, "--data", data)
    assert row["restricted_to_classes"] == 200
    assert "logits restricted to the 200 classes of the dataset" in said
    assert_figures(row, logits[:, chosen], list(range(200)))
    restricted = row["top1"]
    row, said = measured(tmp_path, run, "--data", data, "--no-restrict-classes")
    assert row["restricted_to_classes"] is None
    assert "restricted" not in said
    assert_figures(row, logits, chosen)
    assert 0 < row["top1"] < restricted < 100


@pytest.mark.parametrize("count", [7, 199, 201])
def test_data_of_another_number_of_classes_restrict_them_only_if_asked(imagenet, tmp_path: Path, count: int):
    model, run, _ = imagenet
    chosen = sorted((number * 7) % 1000 for number in range(count))
    make_folder(tmp_path / "data", (WORDNET_IDS[index] for index in chosen))
    logits = plain.logits(model, [tmp_path / "data" / WORDNET_IDS[index] / "0.png" for index in chosen])
    row, said = measured(tmp_path / "out", run, "--data", tmp_path / "data")
    assert row["restricted_to_classes"] is None
    assert "restricted" not in said
    assert_figures(row, logits, chosen)
    row, said = measured(tmp_path / "out", run, "--data", tmp_path / "data", "--restrict-classes")
    assert row["restricted_to_classes"] == count
    assert f"restricted to the {count} classes" in said
    assert_figures(row, logits[:, chosen], list(range(count)))


def test_200_numbered_folders_restrict_them_too(imagenet, tmp_path: Path):
    model, run, _ = imagenet
    chosen = list(range(1, 600, 3))
    make_folder(tmp_path / "data", map(str, chosen))
    row, _ = measured(tmp_path / "out", run, "--data", tmp_path / "data")
    assert row["restricted_to_classes"] == 200
    logits = plain.logits(model, [tmp_path / "data" / str(index) / "0.png" for index in chosen])
    assert_figures(row, logits[:, chosen], list(range(200)))


def test_all_of_a_models_classes_are_no_restriction(tmp_path: Path):
    make_folder(tmp_path / "data", tiny.CLASSES)
    images = [tmp_path / "data" / name / "0.png" for name in tiny.CLASSES]
    run = plain.save_run(tmp_path / "run", plain.network(3, [*images, images[0]], [0, 1, 2, 1]), tiny.CLASSES)
    row, said = measured(tmp_path / "out", run, "--data", tmp_path / "data", "--restrict-classes")
    assert row["restricted_to_classes"] is None
    assert "restricted" not in said


def test_classes_that_have_no_names_cannot_be_restricted_to(imagenet):
    model, _, data = imagenet
    from fixefficientnet.evaluation.evaluate import evaluate_model, processes
    from fixefficientnet.evaluation.settings import Settings
    from fixefficientnet.models import from_module

    source = open_dataset(str(data), None).source
    nameless = ImageDataset(source, (), {}, "hfds/nameless (validation)")
    settings = Settings("hfds/nameless", restrict_classes=True, workers=0)
    with pytest.raises(EvaluationError, match=r"hfds/nameless .*names no classes"):
        evaluate_model(from_module(model), settings, processes.accelerator("cpu", "no"), dataset=nameless)


# --- ReaL ---------------------------------------------------------------------------------------------------------


def validation_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


EVERY = [validation_name(number) for number in range(1, 50_001)]


def test_real_labels_are_found_by_file_name():
    known = RealLabelsImagenet(EVERY).real_labels
    chosen = [EVERY[index] for index in (49_999, 3, 0, 77)]
    assert real_labels([f"n01440764/{name}" for name in chosen]) == [known[name] for name in chosen]
    for other in ("n01440764/0.png", "ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_val_00000001.jpg.png"):
        with pytest.raises(DataError, match=f"there are none of {other}"):
            real_labels([EVERY[0], other])


def test_real_accuracy_is_timms(tmp_path: Path, imagenet):
    known = RealLabelsImagenet(EVERY).real_labels
    by_count = {count: [name for name in EVERY if len(known[name]) == count] for count in range(4)}
    chosen = [name for count, most in ((0, 6), (1, 40), (2, 20), (3, 10)) for name in by_count[count][:most]]
    paths = []
    for number, name in enumerate(chosen):
        original = known[name][0] if known[name] and number % 3 else (37 * number) % 1000
        # PNG in content: what an image is, its bytes say
        path = tmp_path / "data" / WORDNET_IDS[original] / name
        tiny.mottle(path.with_suffix(".png"), number).rename(path)
        paths.append(path)
    model = plain.network(1000, paths, [known[name][-1] if known[name] else 0 for name in chosen])
    run = plain.save_run(tmp_path / "run", model, WORDNET_IDS)

    images = open_dataset(str(tmp_path / "data"), None, num_classes=1000)
    order = [Path(images.image_name(index)).name for index in range(len(images))]
    assert sorted(order) == sorted(chosen)
    logits = plain.logits(model, [Path(images.name) / images.image_name(index) for index in range(len(images))])
    timms = RealLabelsImagenet([*order, *sorted(set(EVERY) - set(order))])
    timms.add_result(logits)

    row, said = measured(tmp_path / "out", run, "--data", tmp_path / "data", "--real-labels")
    assert row["top1"] == pytest.approx(timms.get_accuracy(1))
    assert row["top5"] == pytest.approx(timms.get_accuracy(5))
    assert 0 < row["top1"] < row["top5"] < 100
    assert (row["images"], row["unreadable"], row["real_labels"]) == (70, 0, True)
    assert "ReaL labels (images without any, which do not count: 6)" in said
    # the same images by their own labels
    usual, said = measured(tmp_path / "out", run, "--data", tmp_path / "data")
    targets = [images[index][1] for index in range(len(images))]
    assert_figures(usual, logits, targets)
    assert "ReaL" not in said


def test_real_labels_of_other_images_are_refused(imagenet, tmp_path: Path):
    _, run, data = imagenet
    with pytest.raises(DataError, match=r"there are none of n\d+/0\.png, .* and 196 more"):
        fixefficientnet.evaluate(str(run), data, real_labels=True, workers=0, device="cpu")
