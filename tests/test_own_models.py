"""Models of one's own classes by name: opened with their classes and preprocessing, and used to classify images."""

import csv
import errno
import io
import json
from pathlib import Path

import plain
import pytest
import timm
import tiny
import torch
from conftest import TIMM_HAS_LOCAL_DIR, Network, lively, put_folder_in_cache
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms

import fixefficientnet
from fixefficientnet import prediction
from fixefficientnet.errors import EvaluationError, MissingFileError, UnknownVariantError
from fixefficientnet.manifest import TestTime as Preprocessing

TEST = Preprocessing(48, 0.9, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


@pytest.fixture(scope="module")
def network() -> Network:
    return lively(timm.create_model("test_efficientnet", num_classes=3)).eval()


@pytest.fixture(scope="module")
def run(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, as fine-tuning leaves it."""
    return plain.save_run(tmp_path_factory.mktemp("run") / "mine", network, tiny.CLASSES, TEST)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tiny.make_data(tmp_path_factory.mktemp("images"), train=0, val=2)
    return sorted(folder.rglob("*.jpg"))


def expected(network: Network, image: Path) -> list[tuple[str, float]]:
    """Names and probabilities, the largest first, by torchvision's transform and a plain forward pass."""
    transform = transforms.Compose(
        [
            transforms.Resize(int(48 / 0.9), transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(48),
            transforms.ToTensor(),
            transforms.Normalize(TEST.mean, TEST.std),
        ]
    )
    with torch.inference_mode():
        probabilities = network(transform(Image.open(image).convert("RGB"))[None]).softmax(1)[0]
    return sorted(zip(tiny.CLASSES, probabilities.tolist(), strict=True), key=lambda pair: -pair[1])


def test_a_run_classifies_into_its_own_classes(network: Network, run: Path, images: list[Path]):
    loaded = fixefficientnet.load(str(run))
    assert loaded.labels == [(None, name) for name in tiny.CLASSES]
    for model in (str(run), str(run / "model.safetensors"), loaded):
        for image, found in zip(images, fixefficientnet.predict(images, model), strict=True):
            names, probabilities = zip(*expected(network, image), strict=True)
            assert tuple(label.name for label in found.labels) == names
            assert [label.probability for label in found.labels] == pytest.approx(list(probabilities), rel=1e-4)
            assert [label.synset for label in found.labels] == [None] * 3


def test_the_command_prints_them(network: Network, run: Path, images: list[Path]):
    out, _ = tiny.cli("predict", images[0], "--model", run, columns=200)
    assert out.startswith(f"{run}, 3 classes, test size 48\n")
    names = [line.split("%")[1].strip() for line in out.splitlines() if "%" in line]
    assert names == [name for name, _ in expected(network, images[0])]
    found = json.loads(tiny.cli("predict", images[0], "--model", run, "--json")[0])
    assert (found["model"], found["weights"]) == (str(run), "fixres")
    assert [label["name"] for label in found["predictions"][0]["labels"]] == names


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_as_timm_keeps_models(network: Network, images: list[Path], tmp_path: Path, named: bool):
    if not TIMM_HAS_LOCAL_DIR:
        pytest.skip("timm knows no local-dir: yet")
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "model.safetensors"
    )
    cfg = {"input_size": [3, 48, 48], "crop_pct": 0.9, "interpolation": "bilinear", "mean": TEST.mean, "std": TEST.std}
    config = {"architecture": "test_efficientnet", "num_classes": 3, "pretrained_cfg": cfg | {"num_classes": 3}}
    config |= {"label_names": tiny.CLASSES} if named else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in (str(tmp_path), f"local-dir:{tmp_path}"):
        loaded = fixefficientnet.load(name)
        assert loaded.test == TEST
        assert loaded.classes == (tiny.CLASSES if named else ())
        (found,) = fixefficientnet.predict(images[:1], loaded)
        names, probabilities = zip(*expected(network, images[0]), strict=True)
        if named:
            assert tuple(label.name for label in found.labels) == names
        assert [label.probability for label in found.labels] == pytest.approx(list(probabilities), rel=1e-4)


def test_what_cannot_be_opened_is_one_error(tmp_path: Path):
    with pytest.raises(MissingFileError, match="no folder of a model of timm's"):
        fixefficientnet.load(f"local-dir:{tmp_path}")
    with pytest.raises(MissingFileError, match="it is no finished run"):
        fixefficientnet.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EvaluationError, match="could not be loaded by timm"):
        fixefficientnet.load(str(tmp_path))
    with pytest.raises(UnknownVariantError, match="hf-hub:ORG/NAME"):
        fixefficientnet.predict("image.jpg", "nothing")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".md"])
def test_predictions_go_to_a_file(network: Network, run: Path, images: list[Path], tmp_path: Path, suffix: str):
    broken = [tmp_path / f"broken{number}.jpg" for number in range(4)]
    for path in broken:
        path.write_bytes(b"none")
    target, nothing = tmp_path / f"predictions{suffix}", tmp_path / "nothing" / "?.jpg"
    given = [broken[0], images[0], broken[1], broken[2], *images[1:], images[0], broken[3]]
    out, _ = tiny.cli("predict", nothing, *given, "--model", run, "-o", target, status=1, columns=300)
    images = [path for path in given if path not in broken]
    assert out == f"{target}: {len(images)} images, {run}, 3 classes, test size 48\n"
    text = target.read_text()
    if suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(text)))
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
    else:
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        rows = [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]
    assert [row["image"] for row in rows] == [str(image) for image in (*given, nothing)]
    assert "There are no images in" in rows[-1]["left_out"]
    for row in (rows[0], rows[2], rows[3], rows[-2]):
        assert f"{row['image']} cannot be read" in row["left_out"] or "is not an image" in row["left_out"]
        assert not row["prediction"]
    for row, image in zip([row for row in rows if row["prediction"]], images, strict=True):
        names, probabilities = zip(*expected(network, image), strict=True)
        assert (row["prediction"], row["prediction2"], row["prediction3"]) == names
        found = [float(row[name]) for name in ("confidence", "confidence2", "confidence3")]
        assert found == pytest.approx(list(probabilities), rel=1e-3, abs=1e-3)
    assert "give one of them" in tiny.cli("predict", images[0], "-o", target, "--json", status=2)[1]
    assert "ends in .csv" in tiny.cli("predict", images[0], "--model", run, "-o", tmp_path / "x.txt", status=2)[1]


@pytest.mark.parametrize(("where", "named"), [(["/elsewhere"], "/elsewhere"), ([], "Writing")])
def test_what_fails_while_a_file_is_written_is_not_its_fault(
    run: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: list[str], named: str
):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", *where)

    monkeypatch.setattr(prediction, "ranked", fail)
    _, said = tiny.cli("predict", images[0], "--model", run, "-o", tmp_path / "a.csv", status=1, columns=200)
    assert said.endswith(f"Error: {named}: No space left on device.\n")
    assert not list(tmp_path.glob("*a.csv*"))


def test_a_repository_on_the_hub(
    network: Network, run: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny.cli("merge", run, "-o", tmp_path / "merged")
    put_folder_in_cache(tmp_path / "hub", "me/flowers", tmp_path / "merged")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = fixefficientnet.load("hf-hub:me/flowers")
    assert (loaded.classes, loaded.test, loaded.name) == (tiny.CLASSES, TEST, "hf-hub:me/flowers")
    (found,) = fixefficientnet.predict(images[:1], "hf-hub:me/flowers")
    names, probabilities = zip(*expected(network, images[0]), strict=True)
    assert tuple(label.name for label in found.labels) == names
    assert [label.probability for label in found.labels] == pytest.approx(list(probabilities), rel=1e-4)


@pytest.mark.parametrize("where", ["top", "pretrained_cfg"])
@pytest.mark.parametrize("told", [{"hf_hub_filename": "weights.pth"}, {"custom_load": "hf"}])
def test_a_repository_that_names_other_weights_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, str], where: str
):
    """Older releases of timm would run the code in them."""
    tiny.cli("merge", run, "-o", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    (config if where == "top" else config["pretrained_cfg"]).update(told)
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config))
    put_folder_in_cache(tmp_path / "hub", "me/flowers", tmp_path / "merged")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(EvaluationError, match="names weights other than model"):
        fixefficientnet.load("hf-hub:me/flowers")
