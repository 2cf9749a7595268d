"""Data as it is found: endings, hidden files, classes by words, files of labels, what is left out, names of bytes."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import plain
import pytest
import scipy.io
import timm
import tiny
import torch
from conftest import Network
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo, RealLabelsImagenet

import fixefficientnet
from fixefficientnet.classes import are_imagenets, numbering
from fixefficientnet.data.dataset import ImageDataset, open_dataset
from fixefficientnet.errors import DataError
from fixefficientnet.reproduce.report import Report

WORDNET_IDS = ImageNetInfo("imagenet-1k").label_names()
WORDS = [ImageNetInfo("imagenet-1k").index_to_description(index) for index in range(1000)]
ENDINGS = (".jpg", ".JPEG", ".Jpg", ".png", ".webp", ".bmp", ".tif", ".TIFF", ".gif", ".ppm")
LITTER = (".ipynb_checkpoints/0.jpg", "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/0.jpg", ".hidden/deep/0.png")
LITTER_FILES = ("Thumbs.db", ".DS_Store", "._0.jpg", "desktop.ini")


def litter(folder: Path) -> None:
    """What file managers, notebooks and network storage leave behind."""
    for name in (*LITTER, *LITTER_FILES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")


def labels(images: ImageDataset) -> dict[str, int]:
    """Class index by name of the image."""
    return {images.image_name(index): images[index][1] for index in range(len(images))}


@pytest.fixture(scope="module")
def nameless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of three classes that does not name them."""
    path = tmp_path_factory.mktemp("nameless") / "three.safetensors"
    save_file(timm.create_model("test_efficientnet", num_classes=3).state_dict(), path)
    return f"timm/test_efficientnet:{path}"


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    def run(*arguments: object, status: int = 0) -> tuple[str, str]:
        usual = ("--size", 32, "--device", "cpu", "--output", tmp_path / "evaluations")
        return tiny.cli("evaluate", *arguments, *usual, status=status, columns=200)

    return run


# --- files ----------------------------------------------------------------------------------------------------------


def test_all_images_are_used_and_nothing_that_is_none(nameless: str, tmp_path: Path, evaluate):
    for number, name in enumerate(tiny.CLASSES):
        for index, ending in enumerate(ENDINGS):
            tiny.mottle(tmp_path / "data" / name / f"{index}{ending}", number, index)
        litter(tmp_path / "data" / name)
    litter(tmp_path / "data")
    for name in ("apple/notes.txt", "cloud/film.mp4", "cloud/0.dng"):
        (tmp_path / "data" / name).write_bytes(b"no image")
    found = {split: open_dataset(str(tmp_path / "data"), split) for split in (None, "train", "validation")}
    expected = {f"{name}/{index}{ending}" for name in tiny.CLASSES for index, ending in enumerate(ENDINGS)}
    assert {*labels(found[None])} == expected
    assert {*labels(found["train"])} | {*labels(found["validation"])} == expected
    assert found[None].left_out == ("apple/notes.txt", "cloud/0.dng", "cloud/film.mp4")

    out, err = evaluate(nameless, "--data", tmp_path / "data")
    assert f"30 images of {tmp_path / 'data'}" in out
    assert f"3 left out of {tmp_path / 'data'} by the endings of their names:\n  apple/notes.txt\n" in err
    said = json.loads(evaluate(nameless, "--data", tmp_path / "data", "--json")[0])
    assert said["left_out"] == list(found[None].left_out)
    assert (said["results"][0]["images"], said["results"][0]["left_out"], said["results"][0]["excluded"]) == (
        30,
        3,
        None,
    )


def test_predict_takes_the_same_files(tmp_path: Path):
    for index, ending in enumerate(ENDINGS):
        tiny.mottle(tmp_path / "photos" / "2026" / f"{index}{ending}", index)
    litter(tmp_path / "photos")
    (tmp_path / "photos" / "2026" / "notes.txt").write_text("not an image")
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "photos")  # which ends nowhere
    found = json.loads(tiny.cli("predict", tmp_path / "photos", "--model", "lite0", "--json")[0])
    names = {Path(one["file"]).name for one in found["predictions"]}
    assert names == {f"{index}{ending}" for index, ending in enumerate(ENDINGS)}
    assert len(found["predictions"]) == len(ENDINGS) and not found["errors"]


def test_what_is_excluded_is_counted_and_another_evaluation(nameless: str, tmp_path: Path, evaluate):
    data = tiny.make_data(tmp_path / "data", train=0, val=5)
    (tmp_path / "bad.txt").write_text("apple/0.jpg\nval/cloud/3.jpg\n\nnowhere/7.jpg\n")
    for given, left in (
        ([], 15),
        (["4.jpg"], 12),
        (["brick/[01].jpg"], 13),
        (["*/0.jpg", "cloud/?.jpg"], 8),
        ([tmp_path / "bad.txt"], 13),
        ([tmp_path / "bad.txt", "val/brick/*"], 8),
        (["no-such-*.jpg"], 15),
    ):
        images = open_dataset(str(data), None, exclude=[*map(str, given)])
        assert (len(images), images.excluded) == (left, 15 - left if given else None)
        assert (images.fingerprint() == open_dataset(str(data), None).fingerprint()) == (left == 15)
    for exclude, counted in (
        ([], f"15 images of {data / 'val'};"),
        (["--exclude", "4.jpg", "--exclude", tmp_path / "bad.txt"], f"10 images of {data / 'val'} (5 excluded);"),
    ):
        assert counted in evaluate(nameless, "--data", data, "--resume", *exclude)[0]
    # a class less than the model has: its order is unknown
    assert "has 2 classes, the model has 3" in evaluate(nameless, "--data", data, "--exclude", "brick/*", status=1)[1]
    with pytest.raises(DataError, match=r"--exclude lost\.txt: there is no such file"):
        open_dataset(str(data), None, exclude=["lost.txt"])
    with pytest.raises(DataError, match="holds no images but excluded ones"):
        open_dataset(str(data), None, exclude=["*.jpg"])
    with pytest.raises(DataError, match="--exclude are for images in folders"):
        open_dataset("torch/mnist", None, root=str(tmp_path), exclude=["*.jpg"])


def test_exclusion_moves_no_image_from_one_split_to_the_other(tmp_path: Path):
    for label, name in enumerate(tiny.CLASSES):
        for index in range(12):
            tiny.mottle(tmp_path / name / f"{index}.png", label, index)
    splits = [{*labels(open_dataset(str(tmp_path), split))} for split in ("train", "validation")]
    fewer = [open_dataset(str(tmp_path), split, exclude=["1?.png"]) for split in ("train", "validation")]
    for all_of, some in zip(splits, fewer, strict=True):
        assert {*labels(some)} == {name for name in all_of if "/1" not in name or name.endswith("/1.png")}
    assert len({images.part_of for images in fewer}) == 1
    assert fewer[0].part_of == open_dataset(str(tmp_path), "train").part_of


# --- classes by words -----------------------------------------------------------------------------------------------


def test_imagenets_classes_are_found_by_its_names(tmp_path: Path, evaluate):
    names = {"tench": 0, "Great_White_Shark": 2, "robin, American robin, Turdus migratorius": 15, "n02124075": 285}
    names |= {"tank suit": 639, "Cardigan Welsh corgi": 264, "jack-o'-lantern": 607, "toilet tissue": 999}
    for number, name in enumerate(names):
        tiny.mottle(tmp_path / "data" / name / "0.png", number)
    images = open_dataset(str(tmp_path / "data"), None, num_classes=1000)
    assert {Path(name).parent.name: label for name, label in labels(images).items()} == names
    assert images.classes == tuple(WORDNET_IDS)
    out, _ = evaluate("lite0", "--data", tmp_path / "data")
    assert "class names taken as ImageNet's names" in out
    shutil.copytree(tmp_path / "data", tmp_path / "ids")
    for name, index in names.items():
        (tmp_path / "ids" / name).rename(tmp_path / "ids" / WORDNET_IDS[index])
    settings = {"size": 32, "workers": 0, "device": "cpu"}
    one, other = (fixefficientnet.evaluate("lite0", tmp_path / place, **settings) for place in ("data", "ids"))
    assert sorted(plain.evaluated(one)) == sorted(plain.evaluated(other))


def test_a_thousand_folders_of_words_are_never_taken_in_their_own_order(tmp_path: Path):
    """Each synset's first word, as people name such folders; of two synsets it is the same, so that two are missing."""
    first = {words.split(", ")[0]: index for index, words in enumerate(WORDS)}
    unclear = {"crane", "maillot"}  # each the first word of two
    for name in [*first][::37]:
        tiny.mottle(tmp_path / name.replace(" ", "_") / "0.png", 1)
    images = open_dataset(str(tmp_path), None, num_classes=1000)
    assert {Path(n).parent.name.replace("_", " "): i for n, i in labels(images).items()} == dict([*first.items()][::37])
    # all of them: missile is projectile's too, and the other folder has that
    names = sorted(first.keys() - unclear)
    found = numbering(tuple(names), 1000, "data")
    assert found.targets == {index: first[name] for index, name in enumerate(names)}
    assert first["missile"] == 657 and "missile" in WORDS[744]
    with pytest.raises(DataError) as error:
        numbering(tuple(sorted(first)), 1000, "data")
    for said in ("crane is n02012849 or n03126707.", "maillot is n03710637 or n03710721.", "WordNet ids"):
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("crane", "tench"), "crane is n02012849 or n03126707"),
        (("MAILLOT", "maillot,_tank_suit"), "data has 2 classes"),
        (("tench", "tench, Tinca tinca"), "tench and tench, Tinca tinca are one class, n01440764"),
        (("cat", "tench", "dog"), "ImageNet has no class cat, dog"),
        (("0", "tench 2"), "ImageNet has no class 0, tench 2"),
        (tuple(f"class {number}" for number in range(1000)), "ImageNet has no class class 0"),
    ],
)
def test_names_that_are_not_clearly_imagenets_are_refused(names: tuple[str, ...], said: str):
    if names[0] == "MAILLOT":  # the other folder has the other one
        assert numbering(names, 1000, "data").targets == {0: 638, 1: 639}
        return
    with pytest.raises(DataError, match=f"data has {len(names)} classes, the model has 1000") as error:
        numbering(names, 1000, "data")
    assert said in str(error.value)


def test_a_dataset_in_imagenets_own_order_may_have_a_few_other_names():
    names = [*WORDS]
    names[134], names[517] = "crane bird", "crane"
    assert numbering(tuple(names), 1000, "hfds/x").targets == {}
    assert (
        are_imagenets(names) and are_imagenets(WORDNET_IDS) and are_imagenets([word.split(", ")[0] for word in WORDS])
    )
    names[0], names[1] = names[1], names[0]
    assert not are_imagenets(names) and not are_imagenets(sorted(WORDS)) and not are_imagenets(["x"] * 1000)
    with pytest.raises(DataError, match="ImageNet has no class crane bird"):
        numbering(tuple(names), 1000, "hfds/x")


def test_classes_of_larger_imagenets_have_their_own_order(tmp_path: Path):
    order = ImageNetInfo("imagenet-12k").label_names()
    chosen = sorted(order[::3000])
    for number, name in enumerate(chosen):
        tiny.mottle(tmp_path / name / "0.png", number)
    images = open_dataset(str(tmp_path), None, num_classes=len(order))
    assert {Path(name).parent.name: label for name, label in labels(images).items()} == {
        name: order.index(name) for name in chosen
    }


def test_an_order_that_a_model_cannot_tell_is_said(nameless: str, tmp_path: Path, evaluate):
    data = tiny.make_data(tmp_path / "data", train=0, val=1)
    out, _ = evaluate(nameless, "--data", data)
    assert "classes taken in the dataset's order, as the model does not name its own" in out
    for name, number in zip(tiny.CLASSES, (2, 0), strict=False):
        (data / "val" / name).rename(data / "val" / str(number))
    shutil.rmtree(data / "val" / "cloud")
    out, _ = evaluate(nameless, "--data", data)
    assert "class names taken as the numbers of the model's classes" in out
    found = fixefficientnet.evaluate(nameless, data, size=32, device="cpu", workers=0)
    assert [prediction.labels for prediction in plain.evaluated(found)] == [(0,), (2,)]


# --- files of labels ------------------------------------------------------------------------------------------------

NAMES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 7)]
TRUTH = [3, 999, 0, 217, 3, 485]


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's validation images in one folder; some of them, and by their names."""
    folder = tmp_path_factory.mktemp("flat") / "images"
    for number, name in enumerate(NAMES):
        tiny.mottle((folder / name).with_suffix(".png"), number).rename(folder / name)
    litter(folder)
    return folder


def csv_of(rows: Sequence[tuple[str, object]], header: str = "", sign: str = ",") -> str:
    return "\n".join([*([header] if header else []), *(f"{name}{sign}{label}" for name, label in rows)]) + "\n"


def devkit(folder: Path) -> None:
    """A devkit's meta.mat: numbers of classes in another order than that of their WordNet ids, and inner nodes."""
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    ids = {index + 1: WORDNET_IDS[(index * 7 + 3) % 1000] for index in range(1000)} | {1001: "n00001740"}
    rows = [(number, name, "words", int(number > 1000)) for number, name in ids.items()]
    scipy.io.savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=kinds)[:, None]})
    number = {name: number for number, name in ids.items()}
    truth = [number[WORDNET_IDS[label]] for label in TRUTH]
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{one}\n" for one in truth))


IDS = [WORDNET_IDS[label] for label in TRUTH]
FORMS = {
    "plain.csv": csv_of([*zip(NAMES, IDS, strict=True)]),
    "header.csv": "\ufeff" + csv_of([*zip(NAMES, IDS, strict=True)], "file,label").replace("\n", "\r\n"),
    "shuffled.csv": csv_of([*zip(NAMES, IDS, strict=True)][::-1]),
    "more.csv": "class,split,filename\n" + "".join(f"{one},val,./{n}\n" for n, one in zip(NAMES, IDS, strict=True)),
    "tabs.tsv": csv_of([*zip(NAMES, (WORDS[label] for label in TRUTH), strict=True)], "image\tclass", "\t"),
    "semicolons.csv": csv_of([*zip(NAMES, TRUTH, strict=True)], sign=";"),
    "val.txt": csv_of([*zip(NAMES, TRUTH, strict=True)], sign=" "),  # as Caffe has it
    "folder.csv": csv_of([(f"images/{name}", one) for name, one in zip(NAMES, IDS, strict=True)]),
    "LOC_val_solution.csv": csv_of(
        [(name[:-5], f"{one} 1 2 30 40 {one} 5 6 70 80 ") for name, one in zip(NAMES, IDS, strict=True)],
        "ImageId,PredictionString",
    ),
    "synset_labels.txt": "".join(f"{one}\n" for one in IDS),
}


@pytest.mark.parametrize("form", [*FORMS, "ILSVRC2012_validation_ground_truth.txt"])
def test_labels_of_a_flat_folder(flat: Path, tmp_path: Path, form: str):
    if form in FORMS:
        (tmp_path / form).write_text(FORMS[form])
    else:
        devkit(tmp_path)
    images = open_dataset(str(flat), None, num_classes=1000, labels=str(tmp_path / form))
    assert labels(images) == dict(zip(NAMES, TRUTH, strict=True))
    assert images.classes == tuple(WORDNET_IDS)


def test_a_flat_folder_is_measured_as_one_with_folders_is(flat: Path, tmp_path: Path, evaluate):
    for name, one in zip(NAMES, IDS, strict=True):
        (tmp_path / "val" / one).mkdir(parents=True, exist_ok=True)
        shutil.copy(flat / name, tmp_path / "val" / one / name)
    (tmp_path / "labels.csv").write_text(FORMS["header.csv"])
    settings = {"size": 32, "device": "cpu", "workers": 0}
    one = fixefficientnet.evaluate("lite0", tmp_path, **settings)
    other = fixefficientnet.evaluate("lite0", flat, labels=tmp_path / "labels.csv", **settings)
    assert sorted(plain.evaluated(one)) == sorted(plain.evaluated(other))
    out, _ = evaluate("lite0", "--data", flat, "--labels", tmp_path / "labels.csv", "--real-labels")
    every = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50_001)]
    known = RealLabelsImagenet(every).real_labels
    assert f"{sum(bool(known[name]) for name in NAMES)} images of {flat}" in out
    assert "--labels FILE tells the classes" in evaluate("lite0", "--data", flat, status=1)[1]


WRONG = {
    "labels of files that are not there: other.jpg": csv_of([*zip(NAMES, IDS, strict=True), ("other.jpg", IDS[0])]),
    f"2 images without a label: {NAMES[4]}, {NAMES[5]}": csv_of([*zip(NAMES, IDS, strict=True)][:4]),
    f"1 images without a label: {NAMES[0]}": csv_of([(NAMES[0], ""), *zip(NAMES[1:], IDS[1:], strict=True)]),
    f"1 second labels: {NAMES[2]}": csv_of([*zip(NAMES, IDS, strict=True), (NAMES[2], IDS[0])]),
    "ImageNet has no class dune, pear": csv_of([*zip(NAMES, [*IDS[:4], "pear", "dune"], strict=True)]),
    "none of ImageNet-1k's: n00000001": csv_of([*zip(NAMES, [*IDS[:5], "n00000001"], strict=True)]),
    "row 2 is 'a.jpg,b,c'": f"{NAMES[0]},{IDS[0]}\na.jpg,b,c\n",
    "has no column named label": csv_of([*zip(NAMES, IDS, strict=True)], "file,x").replace("\n", ",1\n"),
    "holds no labels": "\n",
    "has a label of 5,000 letters": csv_of([(NAMES[0], "7" * 5000)]),
    "is no text file": "a\0b",
    "has numbers alone": "".join(f"{one}\n" for one in TRUTH),
    "44 labels of files that are not there: ILSVRC2012_val_00000007": f"{IDS[0]}\n" * 50,
}


@pytest.mark.parametrize("said", WRONG)
def test_labels_that_do_not_fit_are_refused(flat: Path, tmp_path: Path, said: str):
    (tmp_path / "labels.csv").write_text(WRONG[said])
    with pytest.raises(DataError) as error:
        open_dataset(str(flat), None, num_classes=1000, labels=str(tmp_path / "labels.csv"))
    assert said in str(error.value)


def test_a_devkit_that_cannot_be_read(flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    truth = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    devkit(tmp_path)

    def refused() -> str:
        with pytest.raises(DataError) as error:
            open_dataset(str(flat), None, num_classes=1000, labels=str(truth))
        return str(error.value)

    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "scipy.io", None)
        assert "pip install scipy" in refused()
    truth.write_text("0\n" * 6)
    assert "none of ILSVRC2012's: 0" in refused()
    (tmp_path / "meta.mat").write_bytes(b"no such thing")
    assert "meta.mat is no meta.mat" in refused()
    truth.unlink()
    assert "cannot be read: No such file" in refused()


def test_labels_are_of_own_classes_too_and_excluded_images_need_none(tmp_path: Path):
    for number, name in enumerate(("a/1.png", "a/2.png", "b.png")):
        tiny.mottle(tmp_path / "images" / name, number)
    images = [tmp_path / "images" / name for name in ("a/1.png", "b.png")]
    run = plain.save_run(tmp_path / "run", plain.network(3, [*images, images[0]], [2, 0, 1]), ("elm", "fox", "oak"))
    (tmp_path / "labels.csv").write_text("a/1.png,oak\nb.png,elm\n")
    common = {"labels": tmp_path / "labels.csv", "workers": 0, "device": "cpu"}
    found = fixefficientnet.evaluate(run, tmp_path / "images", exclude=("a/2.png",), **common)
    assert [prediction.labels for prediction in plain.evaluated(found)] == [(2,), (0,)]
    with pytest.raises(DataError, match=r"1 images without a label: a/2\.png"):
        fixefficientnet.evaluate(run, tmp_path / "images", **common)
    (tmp_path / "labels.csv").write_text("a/1.png,2\na/2.png,0\nb.png,0\n")
    with pytest.raises(DataError, match=r"has classes that .*run lacks: 0, 2"):
        fixefficientnet.evaluate(run, tmp_path / "images", **common)


# --- names of bytes -------------------------------------------------------------------------------------------------


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """Images of three classes, one of which, and one image of each, have bytes in their names that are no UTF-8."""
    if sys.platform != "linux":
        pytest.skip("other systems have no such names")
    for split in ("train", "val"):
        for label, name in enumerate((b"apple", b"brick", b"caf\xe9")):
            for index, stem in enumerate((b"1", b"2", b"caf\xe9")):
                path = Path(os.fsdecode(name), os.fsdecode(stem + b".png"))
                tiny.mottle(tmp_path / "data" / split / path, label, index)
    (tmp_path / "data" / "val" / "apple" / os.fsdecode(b"\xe9.txt")).write_text("left out")
    (tmp_path / "data" / "val" / "apple" / os.fsdecode(b"\xe9.png")).write_text("no image")
    return tmp_path / "data"


def test_names_of_bytes_are_evaluated_and_shown(nameless: str, strange: Path, tmp_path: Path):
    written = ("--per-class", tmp_path / "classes.csv", "--results-file", tmp_path / "results.csv")
    for form in ((), ("--json",), ("--csv",), written):
        arguments = ["--data", strange, "--size", 32, "--device", "cpu", "--output", tmp_path / "out", *form]
        out, err = tiny.cli("evaluate", nameless, *arguments)
        assert "apple/\\udce9.txt" in err and "apple/\\udce9.png: " in err
        if form == ("--json",):
            assert json.loads(out)["left_out"] == [os.fsdecode(b"apple/\xe9.txt")]
            assert json.loads(out)["results"][0]["images"] == 9
    out, _ = tiny.cli("predict", strange / "val" / "apple", "--model", "lite0", status=1)
    assert "/caf\\udce9.png" in out
    assert ",caf\\udce9," in (tmp_path / "classes.csv").read_text(encoding="utf-8")


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def test_a_run_on_data_as_they_are_found(strange: Path, tmp_path: Path):
    """Names of bytes, a flat validation folder with labels, exclusions; and the checkpoint's names decide the order."""
    names = ("brick", os.fsdecode(b"caf\xe9"), "apple")  # not as folders sort
    model: Network = timm.create_model("test_efficientnet", num_classes=3)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))  # to it all are brick
    checkpoint = plain.save_run(tmp_path / "base", model, names, stage="base") / "model.safetensors"
    flat, rows = tmp_path / "flat", []
    for path in (strange / "val").rglob("*.png"):
        if path.parent.name == "brick" or path.stem == "1":
            rows.append((f"{path.parent.name}-{path.name}", path.parent.name))
            flat.mkdir(exist_ok=True)
            shutil.copy(path, flat / rows[-1][0])
    shutil.rmtree(strange / "val")
    flat.rename(strange / "val")
    (tmp_path / "labels.csv").write_bytes(os.fsencode(csv_of(rows)))
    (strange / "train" / "apple" / "notes.txt").write_text("left out")
    place = ["--data", strange, "--labels", tmp_path / "labels.csv", "--exclude", "brick-1.png", "--exclude", "2.png"]
    small = ["--test-size", 32, "--epochs", 1, "--batch-size", 2, "-j", 0, "--output", tmp_path / "runs"]
    command = ["reproduce", *tiny.NETWORK, *place, *small, "--checkpoint", checkpoint, "--method", "cached"]
    out, _ = tiny.cli(*command, "--experiment", "run")
    report = Report.load(tmp_path / "runs" / "run")
    assert report.classes == names
    assert (report.train_images, report.measured["base"].images) == (6, 4)
    assert report.measured["base"].top1 == 50  # two of brick's, one of each other class
    assert (report.excluded, report.left_out) == (4, (f"{strange / 'train'}: apple/notes.txt",))
    for text in (out, (tmp_path / "runs" / "run" / "report.md").read_text(encoding="utf-8")):
        assert "notes.txt" in text and "excluded" in text
    _, err = tiny.cli(*command, "--experiment", "run", "--exclude", "apple/1.png", status=1)
    assert "other training images" in err


def test_an_order_that_a_checkpoint_cannot_tell_is_said_or_refused(tmp_path: Path):
    data = tiny.make_data(tmp_path / "data", train=2, val=1)
    small = ["--data", data, "--test-size", 32, "--epochs", 1, "--batch-size", 2, "-j", 0, "--output", tmp_path]
    model = timm.create_model("test_efficientnet", num_classes=3)
    save_file(model.state_dict(), tmp_path / "nameless.safetensors")
    out, _ = tiny.cli("reproduce", *tiny.NETWORK, *small, "--checkpoint", tmp_path / "nameless.safetensors")
    assert "classes taken in the dataset's order, as the model does not name its own" in out
    run = plain.save_run(tmp_path / "named", model, ("apple", "brick", "dune"), stage="base")
    _, err = tiny.cli("reproduce", *tiny.NETWORK, *small, "--checkpoint", run, "--experiment", "x", status=1)
    assert "has classes that" in err and "lacks: cloud" in err


# --- HEIC, AVIF -----------------------------------------------------------------------------------------------------


def test_heic_photos_are_opened_whatever_they_are_named(tmp_path: Path):
    heif = pytest.importorskip("pillow_heif")
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24], pixels[:, 32:, 0] = 200, 90
    sideways = Image.fromarray(np.rot90(pixels).copy())  # a quarter turn to the left, which orientation 6 turns back
    exif = Image.Exif()
    exif[0x0112] = 6
    heif.from_pillow(sideways).save(tmp_path / "photo.heic", quality=95, exif=exif.tobytes())
    shutil.copy(tmp_path / "photo.heic", tmp_path / "photo.jpg")
    for image in (tmp_path / "photo.heic", tmp_path / "photo.jpg", (tmp_path / "photo.heic").read_bytes()):
        for upright in (False, True):
            found = fixefficientnet.preprocessing.open_image(image, upright=upright)
            assert found.size == (64, 48) and found.mode == "RGB"
            assert np.abs(np.asarray(found).astype(int) - pixels).mean() < 4
    assert Image.registered_extensions().get(".heic") is None  # nothing of Pillow's is changed


@pytest.mark.parametrize(
    ("brand", "says"), [(b"heic", "pip install pillow-heif"), (b"mif1", "pip install pillow-heif")]
)
def test_what_reads_heic_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, brand, says):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "photo.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + b"\0" * 100)
    with pytest.raises(fixefficientnet.errors.ImageError, match=r"photo\.jpg is an HEIC.*pip install pillow-heif"):
        fixefficientnet.preprocessing.open_image(tmp_path / "photo.jpg")
    film = b"\0\0\0\x18ftypisom\0\0\0\0isommp41" + b"\0" * 100
    with pytest.raises(fixefficientnet.errors.ImageError, match="is not an image, or of a kind"):
        fixefficientnet.preprocessing.open_image(film)


def test_avif_is_read_or_what_is_missing_is_named(tmp_path: Path):
    if ".avif" in Image.registered_extensions():
        tiny.mottle(tmp_path / "a.avif", 1)
        assert fixefficientnet.preprocessing.open_image(tmp_path / "a.avif").size == (30, 36)
    else:
        content = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + b"\0" * 100
        with pytest.raises(fixefficientnet.errors.ImageError, match=r"AVIF image.* since 11\.3"):
            fixefficientnet.preprocessing.open_image(content)


def test_a_class_may_be_called_as_a_split(tmp_path: Path):
    for index, name in enumerate(("bus", "car", "train")):
        for number in range(6):
            tiny.draw(tmp_path / name / f"{number}.jpg", index, number)
    train, validation = (open_dataset(str(tmp_path), split) for split in ("train", "validation"))
    assert train.classes == validation.classes == ("bus", "car", "train")
    assert len(train) + len(validation) == 18
