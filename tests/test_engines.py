"""--engine: other runtimes compute what PyTorch computes, from a file that is exported once."""

import copy
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import ROOT
from plain import bfloat16_error, correct, logits, network, save_run, stack
from tiny import cli, make_data

import fixefficientnet
from fixefficientnet.errors import ExportError, OptionError
from fixefficientnet.models import load
from fixefficientnet.runtimes import engines, exporting, formats

CLASSES = ("apple", "brick", "cloud")
ENGINES = ["onnx", "openvino", pytest.param("compile", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("assets")


@pytest.fixture(autouse=True)
def _exported_once(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests share the exported files, but for those that ask where these are kept."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(assets))


@pytest.fixture
def kept(tmp_path: Path, _exported_once: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where exported files are kept: nothing is there yet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), train=1, val=7)


def images(data: Path) -> tuple[list[Path], list[int]]:
    paths = sorted((data / "val").glob("*/*.jpg"))
    return paths, [CLASSES.index(path.parent.name) for path in paths]


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    return save_run(data / "run", network(3, *images(data)), CLASSES)


def evaluate(model: object, data: Path, out: Path, *more: object) -> dict[str, Any]:
    said, _ = cli("evaluate", model, "--data", data, "-j", 0, "-b", 4, "-o", out, "--json", *more)
    return json.loads(said)["results"][0]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_evaluation_is_the_same(run: Path, data: Path, tmp_path: Path, engine: str):
    eager, other = (evaluate(run, data, tmp_path, "--engine", name) for name in ("eager", engine))
    assert (other["top1"], other["top5"], other["images"]) == (eager["top1"], eager["top5"], 21)
    assert other["loss"] == pytest.approx(eager["loss"], rel=1e-3)
    assert other["loss"] != eager["loss"]  # batches of the one are not taken for the other's


HALF = [
    "eager",
    pytest.param("openvino", marks=pytest.mark.skipif(not formats.openvino_has("bf16"), reason="no bf16")),
]
EXAMPLES = {"cat": "n02124075", "coffee": "n07920052", "hopper": "n02817516", "rocket": "n04008634"}
"""Classes of ImageNet that the examples may be of."""


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples as a dataset."""
    folder = tmp_path_factory.mktemp("examples")
    for name, wordnet_id in EXAMPLES.items():
        (folder / wordnet_id).mkdir()
        (folder / wordnet_id / f"{name}.jpg").write_bytes((ROOT / "examples" / f"{name}.jpg").read_bytes())
    return folder


@pytest.fixture(scope="module")
def lite0() -> tuple[torch.Tensor, float]:
    """Its logits of the examples in float32, and how far they may be off in bfloat16."""
    model = fixefficientnet.create("lite0", "backbone")
    found = logits(model, [ROOT / "examples" / f"{name}.jpg" for name in EXAMPLES], model.preprocess)
    return found, bfloat16_error(model, found)


@pytest.mark.parametrize("engine", HALF)
def test_an_evaluation_in_half_precision_is_nearly_the_same(
    examples: Path, lite0: tuple[torch.Tensor, float], engine: str
):
    found = fixefficientnet.evaluate(
        "lite0", examples, device="cpu", engine=engine, mixed_precision="bf16", workers=0, batch_size=4
    )
    expected, error = lite0
    by_folder = [list(EXAMPLES).index(name) for name, _ in sorted(EXAMPLES.items(), key=lambda item: item[1])]
    differences = []
    for prediction, row in zip(found.predictions, expected[by_folder], strict=True):
        assert prediction is not None
        likeliest = row.topk(2)
        if likeliest.values[0] - likeliest.values[1] > 2 * error:
            assert prediction.top5[0] == likeliest.indices[0]
        loss = (row.logsumexp(0) - row[prediction.labels[0]]).item()
        assert prediction.loss == pytest.approx(loss, abs=2 * error)
        differences.append(abs(prediction.loss - loss))
    assert max(differences) > 1e-4  # else it was float32


def test_engine_and_precision_are_told(examples: Path, tmp_path: Path):
    row = evaluate("lite0", examples, tmp_path, "--mixed-precision", "bf16")
    assert (row["precision"], row["engine"]) == ("bf16", "eager")


def test_a_processor_without_half_precision_is_told_of(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(formats, "openvino_has", lambda precision: False)
    with pytest.raises(ExportError, match="cannot compute in bf16"):
        fixefficientnet.evaluate(str(run), data, device="cpu", engine="openvino", mixed_precision="bf16")


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_predictions_are_the_same(engine: str):
    images = [str(path) for path in sorted((ROOT / "examples").glob("*.jpg"))][:2]
    found = []
    for name in ("eager", engine):
        out, _ = cli("predict", *images, "--model", "lite0", "--json", "--engine", name)
        found.append(json.loads(out)["predictions"])
    for eager, other in zip(*found, strict=True):
        assert [label["index"] for label in eager["labels"]] == [label["index"] for label in other["labels"]]
        for one, two in zip(eager["labels"], other["labels"], strict=True):
            assert two["probability"] == pytest.approx(one["probability"], rel=1e-3)


@pytest.mark.parametrize("engine", HALF)
def test_predictions_in_half_precision_are_nearly_the_same(lite0: tuple[torch.Tensor, float], engine: str):
    paths = [ROOT / "examples" / f"{name}.jpg" for name in EXAMPLES]
    options = ["--json", "--engine", engine, "--mixed-precision", "bf16"]
    found = json.loads(cli("predict", *paths, "--model", "lite0", *options)[0])["predictions"]
    expected, error = lite0
    for one, row in zip(found, expected.log_softmax(1), strict=True):
        for label in one["labels"]:
            difference = math.log(label["probability"]) - row[label["index"]].item()
            assert abs(difference) < 2 * error and difference != 0


@pytest.mark.newest
def test_a_model_is_exported_once_per_content_and_size(
    run: Path, data: Path, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
):
    def there() -> set[Path]:
        return set(kept.rglob("*.onnx"))

    _, err = cli("evaluate", run, "--data", data, "-j", 0, "--engine", "onnx", "-o", tmp_path / "1")
    assert "exporting for onnx" in err
    first = there()
    assert len(first) == 1
    copy = tmp_path / "elsewhere" / "copied.safetensors"
    copy.parent.mkdir()
    copy.write_bytes((run / "model.safetensors").read_bytes())
    with monkeypatch.context() as patched:
        patched.setattr(exporting, "export", None)  # would fail if it were called
        _, err = cli("evaluate", copy, "--data", data, "-j", 0, "--engine", "onnx", "-o", tmp_path / "2")
    assert "exporting" not in err and there() == first
    evaluate(run, data, tmp_path / "3", "--engine", "onnx", "--size", 64)
    assert len(there()) == 2
    # the same name, other weights
    other = timm.create_model("test_efficientnet", num_classes=3)
    save_run(copy.parent, other, CLASSES)
    copy.unlink()
    found = evaluate(copy.parent, data, tmp_path / "4", "--engine", "onnx")
    assert len(there()) == 3
    paths, labels = images(data)
    assert found["top1"] == pytest.approx(100 * correct(logits(other.eval(), paths), labels).count("1") / 21)


@pytest.mark.newest
def test_prediction_and_evaluation_use_one_file(tmp_path: Path, kept: Path):
    image = ROOT / "examples" / "cat.jpg"
    folder = tmp_path / "data" / "n02124075"
    folder.mkdir(parents=True)
    (folder / "cat.jpg").write_bytes(image.read_bytes())
    found = evaluate("lite0", folder.parent, tmp_path / "out", "--engine", "onnx")
    assert (found["top1"], found["engine"]) == (100, "onnx")
    assert "exporting" not in cli("predict", image, "--engine", "onnx")[1]
    assert len([*kept.rglob("*.onnx")]) == 1


@pytest.mark.newest
def test_what_another_exporter_left_is_not_used(
    run: Path, data: Path, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
):
    for number in (1, 2):
        monkeypatch.setattr("fixefficientnet.runtimes.engines.EXPORTER", number)
        evaluate(run, data, tmp_path / str(number), "--engine", "onnx")
        assert len([*kept.rglob("*.onnx")]) == number


def test_compiling_sees_one_shape_and_gives_each_image_its_own(monkeypatch: pytest.MonkeyPatch):
    shown = []

    def fake(forward, **options):
        def compiled(images):
            shown.append((images.shape, images.is_contiguous(memory_format=torch.channels_last)))
            return forward(images)

        return compiled

    monkeypatch.setattr("torch.compile", fake)
    loaded = load("lite0:backbone")
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = loaded.network(images)
        with engines.running(loaded, loaded.at(64), "compile"):
            found = torch.cat([loaded.network(part) for part in (images[:2], images[2:4], images[4:])])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert shown == [((2, 3, 64, 64), True)] * 3


@pytest.mark.slow
def test_what_was_compiled_for_one_model_is_not_used_for_another(run: Path, data: Path, tmp_path: Path):
    paths, labels = images(data)
    other = save_run(tmp_path / "other", network(3, paths, labels[::-1]), CLASSES)
    for number, model in enumerate((run, other, run)):
        found = [evaluate(model, data, tmp_path / f"{number}{name}", "--engine", name) for name in ("eager", "compile")]
        assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-3)


@pytest.mark.newest
def test_a_damaged_kept_file_is_made_anew(run: Path, data: Path, tmp_path: Path, kept: Path):
    first = evaluate(run, data, tmp_path / "1", "--engine", "onnx")
    (path,) = kept.rglob("*.onnx")
    sound = path.read_bytes()
    path.write_bytes(sound[:1000])
    left = path.with_name(".model-64.onnx.killed.partial")
    left.write_bytes(sound)
    again = evaluate(run, data, tmp_path / "2", "--engine", "onnx")
    assert again["loss"] == first["loss"]
    assert len(path.read_bytes()) == len(sound)
    assert not left.exists()  # what an exporter left that was killed


@pytest.mark.newest
def test_the_model_itself_stays_as_it_was(data: Path):
    paths, labels = images(data)
    model = network(3, paths, labels)
    model.pretrained_cfg.update(input_size=(3, 48, 48), crop_pct=0.875)
    before = model(stack(paths[:2]))
    found = fixefficientnet.evaluate(model, data, engine="onnx", device="cpu", workers=0)
    assert found.correct == correct(logits(model.eval(), paths), labels)
    assert "forward" not in vars(model) and model.training is False
    model.train()
    fixefficientnet.evaluate(model, data, engine="onnx", device="cpu", workers=0, size=32)  # which is not kept yet
    assert model.training and model.bn2.training
    with pytest.raises(ExportError, match="in float32"):
        fixefficientnet.evaluate(copy.deepcopy(model).bfloat16(), data, engine="onnx", device="cpu", workers=0)
    model.eval()
    torch.testing.assert_close(model(stack(paths[:2])), before)


def test_what_an_engine_cannot_is_one_error(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Path
):
    arguments = ["evaluate", run, "--data", data, "-o", tmp_path / "out"]
    refused = cli(*arguments, "--engine", "tensorrt", status=2)[1]
    assert all(name in refused for name in ("tensorrt", "eager", "compile", "onnx", "openvino"))
    assert "in float32" in cli(*arguments, "--engine", "onnx", "--mixed-precision", "bf16", status=1)[1]
    refused = cli("predict", ROOT / "examples", "--engine", "tpu", status=2)[1]
    assert all(name in refused for name in ("tpu", "eager", "compile", "onnx", "openvino"))
    said = cli("predict", ROOT / "examples", "--engine", "onnx", "--mixed-precision", "bf16", status=1)[1]
    assert "in float32" in said
    refused = cli("predict", ROOT / "examples", "--mixed-precision", "fp8", status=2)[1]
    assert all(name in refused for name in ("fp8", "no", "bf16", "fp16"))
    assert (
        "on a CPU, there is bf16"
        in cli("predict", ROOT / "examples", "--mixed-precision", "fp16", "--device", "cpu", status=1)[1]
    )
    with pytest.raises(OptionError, match="leave --engine onnx out"):  # no layer of PyTorch's would be watched
        fixefficientnet.evaluate(run, data, engine="onnx", activations=True)
    with pytest.raises(ExportError, match="on the CPU"):
        fixefficientnet.runtimes.engines.check("openvino", "cuda")
    find = importlib.util.find_spec
    for module, engine, extra in (("onnxruntime", "onnx", "onnx"), ("openvino", "openvino", "openvino")):
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *more, m=module: None if name == m else find(name, *more)
        )
        _, err = cli(*arguments, "--engine", engine, status=1)
        assert f"pip install 'fixefficientnet[{extra}]'" in err
    assert not [*kept.rglob("*.onnx")]


@pytest.mark.newest
def test_a_cache_that_cannot_be_written_is_done_without(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", "/proc/nowhere")  # read-only for root, too
    paths, _ = images(data)
    said: list[str] = []
    for _ in range(2):
        found = fixefficientnet.predict(paths[:3], str(run), engine="onnx", on_message=said.append)
        assert len(found) == 3
    assert [text.startswith("/proc/nowhere cannot be written") for text in said] == [True, False]
    assert "HF_ASSETS_CACHE, or HF_HOME, names another place" in said[0]
