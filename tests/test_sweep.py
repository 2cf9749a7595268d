"""`fixefficientnet sweep`: accuracy, cost and pooled activations over test sizes, and how it goes on."""

import csv
import io
import json
import math
import statistics
import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import plain
import pytest
import safetensors.torch
import timm
import tiny
import torch
from accelerate import Accelerator
from conftest import Network, lively, put_in_cache
from PIL import Image
from test_page import Read, assert_stands_alone
from tiny import cli
from torch import Tensor, nn
from torchvision import transforms

import fixefficientnet
from fixefficientnet import delta
from fixefficientnet.errors import EvaluationError
from fixefficientnet.evaluation import activations
from fixefficientnet.evaluation.evaluate import evaluate_model
from fixefficientnet.evaluation.settings import Settings
from fixefficientnet.evaluation.sweep import best_size, sizes_of
from fixefficientnet.evaluation.tables import as_csv, from_csv
from fixefficientnet.models import from_module

NETWORK = "test_efficientnet.r160_in1k"
CROP_PCT, MEAN, STD = 0.95, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of this network, in timm
IMAGENET_CLASSES = ("n01440764", "n01443537", "n01484850")
FIGURES = {"sweep.png", "sweep.svg"}
BATCH = 4


class Ground(NamedTuple):
    data: Path
    images: list[Path]
    name: str
    """The model's name on the command line."""
    model: nn.Module


def stack(images: list[Path], size: int) -> Tensor:
    """What the network sees of them at a test size, by torchvision."""
    transform = transforms.Compose(
        [
            transforms.Resize(int(size / CROP_PCT), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in images])


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """18 images of 3 classes, and a network that finds some of each."""
    folder = tmp_path_factory.mktemp("sweep")
    images = sorted((tiny.make_data(folder / "data", train=0, val=6) / "val").rglob("*.jpg"))
    torch.manual_seed(5)
    model: Network = lively(timm.create_model("test_efficientnet", num_classes=3), seed=5)
    with torch.inference_mode():
        model.bn2.bias[:50] = -20  # SiLU gives next to nothing there: what a network without ReLU has for zeros
        features = model.forward_head(model.forward_features(stack(images, 48)), pre_logits=True)
        model.classifier.weight.normal_()
        model.classifier.bias.copy_(-model.classifier.weight @ features.mean(0))
    file = folder / "network.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    return Ground(folder / "data", images, f"timm/test_efficientnet:{file}", model)


def sweep(
    ground: Ground, output: Path, sizes: str, *options: str, models: tuple[str, ...] = (), **settings: Any
) -> str:
    """Runs the command on the ground's images; what it said on stdout."""
    names = models or (ground.name,)
    usual = ("--data", ground.data, "--device", "cpu", "--workers", 0, "--batch-size", BATCH)
    return cli("sweep", *names, *usual, f"--sizes={sizes}", "--output", output, *options, **settings)[0]


def rows_of(output: Path) -> list[dict[str, Any]]:
    return from_csv((output / "sweep.csv").read_text())


def batches(output: Path) -> dict[str, list[str]]:
    """The finished batches in each journal, line by line."""
    return {
        path.name: [line for line in path.read_text().splitlines() if "indices" in line]
        for path in (output / "finished").iterdir()
    }


def of_size(found: dict[str, list[str]], size: int) -> list[str]:
    (lines,) = (lines for name, lines in found.items() if f"-{size}-" in name)
    return lines


def counted_gmacs(model: nn.Module, size: int) -> float:
    """Multiply-adds of all convolutions and linear layers, by the shapes that a real forward pass sees."""
    macs = 0

    def count(module: nn.Conv2d | nn.Linear, given: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal macs
        macs += result.numel() * module.weight[0].numel()  # input channels of a group x kernel height x width

    hooks = [each.register_forward_hook(count) for each in model.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    with torch.inference_mode():
        model(torch.rand(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return macs / 1e9


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("128:352:32", [128, 160, 192, 224, 256, 288, 320, 352]),
        ("128:350:32", [128, 160, 192, 224, 256, 288, 320]),
        ("224", [224]),
        ("224:224:1", [224]),
        ("320,224,256,320", [224, 256, 320]),
        ("64:128:32,100,96", [64, 96, 100, 128]),
        ("224, 256", [224, 256]),
    ],
)
def test_sizes(text: str, sizes: list[int]):
    assert sizes_of(text) == sizes


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", "big", "224,", ":", "128:352:", "128:352:32:1", "224.5"),
        *("0", "-32", "224,-1", "0:64:32", "128:352:0", "128:352:-32"),
        *("352:128:32", "352:128:-32", "224,352:128:32"),
    ],
)
def test_what_is_no_size_is_one_error(ground: Ground, tmp_path: Path, text: str):
    with pytest.raises(EvaluationError, match="--sizes"):
        sizes_of(text)
    # said by the command before it opens or writes anything
    out, err = cli("sweep", "timm/no_such", "--data", "x", f"--sizes={text}", "--output", tmp_path / "x", status=1)
    assert out == ""
    assert "--sizes" in err
    assert repr(text) in err
    assert len(err.splitlines()) == 1
    assert not [*tmp_path.iterdir()]


def test_the_best_size_is_the_smallest_of_several():
    rows = [{"size": size, "top1": top1} for size, top1 in ((320, 70.0), (288, 71.5), (224, 71.5), (160, 60.0))]
    assert best_size(rows) == 224


def test_the_rows_are_what_evaluate_finds_and_what_a_forward_pass_costs(ground: Ground, tmp_path: Path):
    said = sweep(ground, tmp_path, "32:64:16", "--csv")
    text = (tmp_path / "sweep.csv").read_text()
    assert said == text
    rows = from_csv(text)
    assert as_csv(rows) == text
    assert [row["size"] for row in rows] == [32, 48, 64]
    assert len({row["top1"] for row in rows}) > 1
    for row in rows:
        found = fixefficientnet.evaluate(ground.name, ground.data, size=row["size"], workers=0, device="cpu")
        assert row["top1"] == found.top1
        summary = asdict(found.summary())
        assert {key: row[key] for key in summary} == summary | {
            "loss": pytest.approx(found.loss, rel=1e-5)  # batches of another size round differently
        }
        with torch.inference_mode():
            predicted = ground.model(stack(ground.images, row["size"])).argmax(1).tolist()
        labels = [tiny.CLASSES.index(path.parent.name) for path in ground.images]
        correct = sum(predicted == label for predicted, label in zip(predicted, labels, strict=True))
        assert row["top1"] == pytest.approx(100 * correct / len(labels))
        assert row["gmacs"] == pytest.approx(counted_gmacs(ground.model, row["size"]), rel=1e-9)
        assert row["images_per_second"] == pytest.approx(row["images"] / row["seconds"])
        assert (row["model"], row["network"], row["tuned"]) == (ground.name, "test_efficientnet", False)
        assert (row["train_size"], row["test_size"], row["paper_size"]) == (160, 160, None)
        assert row["parameters"] == sum(parameter.numel() for parameter in ground.model.parameters())
    assert json.loads(sweep(ground, tmp_path, "32:64:16", "--json")) == rows
    (plain, *_) = csv.DictReader(io.StringIO(text))
    assert not any(key.startswith("pooled") for key in plain)


def test_what_it_writes_opens_and_what_it_says_names_it(ground: Ground, tmp_path: Path):
    said = sweep(ground, tmp_path / "deep" / "er", "32,64", "--crop-pct", "1")
    assert {path.name for path in (tmp_path / "deep" / "er").iterdir()} == {
        "sweep.csv",
        "report.html",
        "finished",
    } | FIGURES
    page = Read((tmp_path / "deep" / "er" / "report.html").read_bytes())
    assert_stands_alone(page)
    assert [row[1:3] for row in page.table("model")] == [
        [str(row["size"]), f"{row['top1']:.2f}"] for row in rows_of(tmp_path / "deep" / "er")
    ]
    assert [tag for tag, _ in page.tags].count("circle") == 2
    with Image.open(tmp_path / "deep" / "er" / "sweep.png") as image:
        image.load()
    assert ET.parse(tmp_path / "deep" / "er" / "sweep.svg").getroot().tag.endswith("svg")
    for row in rows_of(tmp_path / "deep" / "er"):
        assert row["crop_pct"] == 1
        assert f" {row['size']} " in said
        assert f" {row['top1']:.2f} " in said
    assert said.count("best") == 1
    table, _, below = said.partition("\n…")  # the name, too long for the table, stands whole below
    assert max(map(len, table.splitlines())) <= 80
    assert below.partition("\n")[0].endswith(f": {ground.name}")
    assert "18 images of" in said
    assert "crop_pct 1, bicubic" in said


@pytest.mark.newest
def test_finished_sizes_are_not_done_again_unless_asked(ground: Ground, tmp_path: Path):
    sweep(ground, tmp_path, "32,48")
    two, before = rows_of(tmp_path), batches(tmp_path)
    assert [sum(map(len, (json.loads(line)["indices"] for line in lines))) for lines in before.values()] == [18, 18]
    sweep(ground, tmp_path, "32:64:16")
    three = rows_of(tmp_path)
    assert three[:2] == two  # the seconds too
    assert {name: lines for name, lines in batches(tmp_path).items() if name in before} == before
    assert [row["size"] for row in three] == [32, 48, 64]
    sweep(ground, tmp_path, "48", "--overwrite")
    (again,), after = rows_of(tmp_path), batches(tmp_path)
    assert of_size(after, 48) != of_size(before, 48)
    assert of_size(after, 32) == of_size(before, 32)
    assert {**again, "seconds": 0, "images_per_second": 0} == {**two[1], "seconds": 0, "images_per_second": 0}


@pytest.mark.newest
def test_where_all_is_finished_nothing_grows(ground: Ground, tmp_path: Path):
    """However often it is asked again."""
    sweep(ground, tmp_path, "32,48")
    before = {path.name: path.read_bytes() for path in (tmp_path / "finished").iterdir()}
    sweep(ground, tmp_path, "32,48")
    assert {path.name: path.read_bytes() for path in (tmp_path / "finished").iterdir()} == before


@pytest.mark.newest
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_size_is_finished(ground: Ground, tmp_path: Path, torn: bool):
    sweep(ground, tmp_path, "32,48")
    whole, before = rows_of(tmp_path), batches(tmp_path)
    (file,) = (tmp_path / "finished").glob("*-48-*")
    kept, rest = of_size(before, 48)[:2], of_size(before, 48)[2:]
    # as a process leaves it that is killed between two batches, or while it writes one
    file.write_text("\n".join([*kept, rest[0][:40]] if torn else kept))
    (tmp_path / "sweep.csv").unlink()
    sweep(ground, tmp_path, "32,48")
    found = rows_of(tmp_path)
    assert found[0] == whole[0]
    assert {**found[1], "seconds": 0, "images_per_second": 0} == {**whole[1], "seconds": 0, "images_per_second": 0}
    assert of_size(batches(tmp_path), 32) == of_size(before, 32)
    lines = [line for line in of_size(batches(tmp_path), 48) if line != rest[0][:40]]
    assert lines[:2] == kept
    assert sorted(index for line in lines for index in json.loads(line)["indices"]) == [*range(18)]  # each once


@pytest.mark.newest
def test_other_weights_and_other_images_are_not_taken_for_these(ground: Ground, tmp_path: Path):
    """The same names, another content: nothing finished is taken over."""
    file = tmp_path / "network.safetensors"
    name = f"timm/test_efficientnet:{file}"
    state = ground.model.state_dict()
    losses = []
    for bias in (0.0, 50.0):
        safetensors.torch.save_file(state | {"classifier.bias": torch.tensor([bias, 0.0, 0.0])}, file)
        sweep(ground, tmp_path / "out", "32", models=(name,))
        losses.append(rows_of(tmp_path / "out")[0]["loss"])
    assert losses[1] > losses[0] + 10  # all are apples now
    other = ground._replace(data=tiny.make_data(tmp_path / "data", train=0, val=2))
    sweep(other, tmp_path / "out", "32", models=(name,))
    assert rows_of(tmp_path / "out")[0]["images"] == 6


def plain_statistics(ground: Ground, size: int) -> dict[str, float]:
    """The same figures by definition, of one image after the other, in double precision."""
    model: Network = timm.create_model("test_efficientnet", num_classes=3)
    model.load_state_dict(ground.model.state_dict())
    model = model.double().eval()
    pooled = []
    with torch.inference_mode():
        for path in ground.images:
            pooled.append(model.forward_head(model.forward_features(stack([path], size).double()), pre_logits=True)[0])
    values = torch.stack(pooled).tolist()
    every = [value for row in values for value in row]
    channels = [*zip(*values, strict=True)]
    found = {
        "near_zero": sum(abs(value) < activations.NEAR_ZERO for value in every) / len(every),
        "mean": statistics.fmean(every),
    }
    for name, of_channels in (
        ("mean", [statistics.fmean(channel) for channel in channels]),
        ("spread", [statistics.pstdev(channel) for channel in channels]),
    ):
        quartiles = statistics.quantiles(of_channels, n=4, method="inclusive")
        found |= {f"{name}_{key}": value for key, value in zip(("q25", "median", "q75"), quartiles, strict=True)}
    return found


def test_statistics_are_those_of_a_plain_loop(ground: Ground, tmp_path: Path):
    sweep(ground, tmp_path, "32,64", "--statistics")
    for row in rows_of(tmp_path):
        expected = plain_statistics(ground, row["size"])
        assert 0.15 < expected["near_zero"] < 0.95
        # one value of 18 x 256 may fall on the other side in single precision
        assert row["pooled_near_zero"] == pytest.approx(expected.pop("near_zero"), abs=1.5 / (18 * 256))
        found = {key: row[f"pooled_{key}"] for key in expected}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
    for name in ("statistics.png", "sweep.png"):
        with Image.open(tmp_path / name) as image:
            image.load()
    assert ET.parse(tmp_path / "statistics.svg").getroot().tag.endswith("svg")


@pytest.mark.newest
def test_statistics_that_are_asked_later_are_taken_once(ground: Ground, tmp_path: Path):
    sweep(ground, tmp_path, "32,48")
    without, before = rows_of(tmp_path), batches(tmp_path)
    sweep(ground, tmp_path, "32,48", "--statistics")
    found, after = rows_of(tmp_path), batches(tmp_path)
    for old, new in zip(without, found, strict=True):
        assert new["pooled_near_zero"] > 0
        assert of_size(after, old["size"]) != of_size(before, old["size"])
        timeless = {key: value for key, value in old.items() if key not in ("seconds", "images_per_second")}
        plain.assert_nearly({key: new[key] for key in timeless}, timeless)
    sweep(ground, tmp_path, "32:64:16", "--statistics")
    assert rows_of(tmp_path)[:2] == found
    assert {name: lines for name, lines in batches(tmp_path).items() if name in after} == after


@pytest.mark.newest
@pytest.mark.parametrize("sizes", ["32,48", "48,64"])
def test_a_sweep_without_statistics_after_one_with_them(ground: Ground, tmp_path: Path, sizes: str):
    """What is known of one size alone is no column of the table, and no reason to fail."""
    sweep(ground, tmp_path, "48", "--statistics")
    sweep(ground, tmp_path, sizes)
    assert ",".join(str(row["size"]) for row in rows_of(tmp_path)) == sizes
    assert not any(key.startswith("pooled") for row in rows_of(tmp_path) for key in row)


@pytest.mark.newest
def test_images_of_the_same_names_elsewhere_are_not_taken_for_these(ground: Ground, tmp_path: Path):
    """The folders of ImageNet-C have the same names in each, of other images."""
    other = ground._replace(data=tmp_path / "other")
    for number, path in enumerate(ground.images):
        tiny.draw(other.data / path.relative_to(ground.data), number % 3, 5000 + number)
    sweep(other, tmp_path / "alone", "32")
    for place in (ground, other):
        sweep(place, tmp_path / "both", "32")
    assert rows_of(tmp_path / "both")[0]["loss"] == rows_of(tmp_path / "alone")[0]["loss"]


@pytest.fixture
def imagenet(ground: Ground, tmp_path: Path) -> Ground:
    """Images for networks of 1000 classes."""
    return ground._replace(data=tiny.make_data(tmp_path / "imagenet", IMAGENET_CLASSES, train=0, val=2))


def test_a_tuned_network_of_timms_is_measured_untuned_too(
    imagenet: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.manual_seed(2)
    model: Network = lively(timm.create_model("test_efficientnet"), seed=2)
    put_in_cache(tmp_path / "hub", f"timm/{NETWORK}", "model.safetensors", model.state_dict())
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.classifier.bias += torch.rand(1000, generator=torch.Generator().manual_seed(3))
        model.bn2.running_mean += 0.1
    recipe = {"train_size": 128, "test_size": 48, "crop_pct": 1.0}
    tuned = delta.extract(model, base=base, variant=NETWORK, backbone=NETWORK, recipe=recipe)
    file = tmp_path / "delta.safetensors"
    delta.save(tuned, file)

    sweep(imagenet, tmp_path / "out", "32,48", models=(str(file),))
    rows = rows_of(tmp_path / "out")
    names = (f"timm/{NETWORK}", str(file))
    assert [(row["model"], row["size"]) for row in rows] == [(name, size) for name in names for size in (32, 48)]
    assert [row["tuned"] for row in rows] == [False, False, True, True]
    assert [row["train_size"] for row in rows] == [160, 160, 128, 128]
    assert [row["test_size"] for row in rows] == [160, 160, 48, 48]
    assert [row["crop_pct"] for row in rows] == [1, 1, 1, 1]  # else they would differ by more than FixRes
    assert {row["paper_size"] for row in rows} == {None}
    assert {row["network"] for row in rows} == {"test_efficientnet"}
    for row in rows:
        where = {"size": row["size"], "crop_pct": 1.0, "workers": 0, "device": "cpu"}
        found = fixefficientnet.evaluate(row["model"], imagenet.data, **where)
        assert (row["top1"], row["loss"]) == (found.top1, pytest.approx(found.loss, rel=1e-5))
    assert rows[0]["loss"] != pytest.approx(rows[2]["loss"], rel=1e-4)


def test_a_size_that_a_network_does_not_take_is_one_error(
    imagenet: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    state = timm.create_model("test_vit").state_dict()
    put_in_cache(tmp_path / "hub", "timm/test_vit.r160_in1k", "model.safetensors", state)
    place = ("--data", imagenet.data, "--device", "cpu", "--workers", 0, "--output", tmp_path / "out")
    _, err = cli("sweep", "timm/test_vit.r160_in1k", *place, "--sizes", "150", status=1)  # of patches of 16 pixels
    remark, line = err.splitlines()
    assert "is not pinned" in remark and "150" in line


@pytest.mark.parametrize("form", ["{}", "b0:{}"])
def test_a_tuned_variant_is_measured_untuned_too(
    imagenet: Ground, hub_cache: Path, b0_delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache))
    name = form.format(b0_delta)
    said = sweep(imagenet, tmp_path / "out", "32,224", models=(name, "b0:backbone"))  # and not twice
    rows = rows_of(tmp_path / "out")
    assert [row["model"] for row in rows] == ["b0:backbone"] * 2 + [name] * 2
    assert [row["tuned"] for row in rows] == [False, False, True, True]
    for row in rows:
        assert (row["train_size"], row["test_size"], row["paper_size"]) == (224, 320, 320)
        assert row["network"] == "tf_efficientnet_b0"
    model = timm.create_model("tf_efficientnet_b0").eval()
    for size in (32, 224):
        expected = pytest.approx(counted_gmacs(model, size), rel=1e-9)
        assert [row["gmacs"] for row in rows if row["size"] == size] == [expected, expected]
    assert rows[0]["loss"] != pytest.approx(rows[2]["loss"], rel=1e-4)
    assert said.count("train") == 2  # once for each model, at 224
    found = fixefficientnet.evaluate(name, imagenet.data, size=32, workers=0, device="cpu")
    assert rows[2]["loss"] == pytest.approx(found.loss, rel=1e-5)


def test_where_nothing_can_be_written_is_one_error(ground: Ground, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    place = ("--data", ground.data, "--device", "cpu", "--workers", 0, "--output", tmp_path / "file")
    out, err = cli("sweep", ground.name, *place, "--sizes", "32", status=1)
    assert out == ""
    assert "file" in err
    assert "Traceback" not in err


def test_each_size_is_warmed_up_before_its_time_counts(ground: Ground, tmp_path: Path):
    """As many forward passes as batches and one: an evaluation alone has no such pass."""
    passes: list[tuple[int, ...]] = []
    stem: Any = ground.model.conv_stem
    with stem.register_forward_pre_hook(lambda _, given: passes.append(tuple(given[0].shape))):
        found = [
            evaluate_model(
                from_module(ground.model),
                Settings(str(ground.data), size=32, batch_size=BATCH, workers=0, warm_up=warm_up, activations=True),
                Accelerator(cpu=True),
            )
            for warm_up in (False, True)
        ]
    batches = math.ceil(len(ground.images) / BATCH)
    assert len(passes) == 2 * batches + 1
    assert passes[batches] == (BATCH, 3, 32, 32)
    assert found[0].evaluation == found[1].evaluation
    assert found[0].activations == found[1].activations
