import copy
import dataclasses
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from conftest import ROOT, Network
from PIL import Image, ImageOps

import fixefficientnet
from fixefficientnet import PredictionOptions, iter_predictions
from fixefficientnet.errors import (
    ExportError,
    FixEfficientNetError,
    ImageError,
    OptionError,
    UnsupportedModelError,
    WeightsNotPublishedError,
)
from fixefficientnet.prediction import PredictionKeywords
from fixefficientnet.preprocessing import FastPreprocess

if TYPE_CHECKING:
    from fixefficientnet.zoo import ZooModel

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def lite0() -> "ZooModel":
    return fixefficientnet.create("lite0", "backbone")


def test_examples_are_what_they_show(lite0: "ZooModel"):
    found = fixefficientnet.predict([EXAMPLES / "cat.jpg", EXAMPLES / "coffee.jpg", EXAMPLES / "hopper.jpg"], lite0)
    assert [p.labels[0].synset for p in found] == ["n02124075", "n07920052", "n03763968"]
    assert [p.labels[0].name for p in found] == ["Egyptian cat", "espresso", "military uniform"]
    assert [len(p.labels) for p in found] == [5, 5, 5]


def test_probabilities_are_the_softmax_whatever_the_batch(lite0: "ZooModel"):
    files = sorted(EXAMPLES.glob("*.jpg"))
    with torch.inference_mode():
        expected = [lite0(lite0.preprocess(file)[None]).softmax(1)[0] for file in files]
    for batch_size in (1, 3, 16):
        for found, p in zip(
            fixefficientnet.predict(files, lite0, topk=3, batch_size=batch_size), expected, strict=True
        ):
            values, indices = p.topk(3)
            assert [label.index for label in found.labels] == indices.tolist()
            assert [label.probability for label in found.labels] == pytest.approx(values.tolist(), rel=1e-4)


def test_one_image_by_path_bytes_or_image(lite0: "ZooModel"):
    path = EXAMPLES / "cat.jpg"
    expected = fixefficientnet.predict(str(path), lite0)[0].labels
    assert fixefficientnet.predict(path.read_bytes(), lite0)[0].labels == expected
    assert fixefficientnet.predict(Image.open(path), lite0)[0].labels == expected


def test_one_image_several_times(lite0: "ZooModel"):
    image = Image.open(EXAMPLES / "cat.jpg")
    found = fixefficientnet.predict([image] * 12, lite0, batch_size=1)
    assert {prediction.labels[0].name for prediction in found} == {"Egyptian cat"}
    truncated = Image.open(io.BytesIO((EXAMPLES / "cat.jpg").read_bytes()[:5000]))
    with pytest.raises(ImageError, match="truncated"):
        fixefficientnet.predict([image, truncated], lite0)


def test_an_image_is_used_before_the_next_is_drawn(lite0: "ZooModel"):
    names = ["cat.jpg", "coffee.jpg", "hopper.jpg"] * 2
    expected = [prediction.labels for prediction in fixefficientnet.predict([EXAMPLES / name for name in names], lite0)]

    def closed_after() -> Iterator[Image.Image]:
        for name in names:
            with Image.open(EXAMPLES / name) as image:
                yield image

    def drawn_into() -> Iterator[Image.Image]:
        frame = Image.new("RGB", (1, 1))
        for name in names:
            with Image.open(EXAMPLES / name) as image:
                frame.im = image.convert("RGB").im
                frame._size = image.size
            yield frame

    for given in (closed_after(), drawn_into()):
        for found, labels in zip(fixefficientnet.predict(given, lite0, batch_size=1), expected, strict=True):
            assert [label.index for label in found.labels] == [label.index for label in labels]


def test_images_above_the_limit_are_not_decoded(lite0: "ZooModel", monkeypatch: pytest.MonkeyPatch):
    image = Image.open(EXAMPLES / "cat.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(image, "load", None)  # would fail if it were called
    with pytest.raises(ImageError, match="limit"):
        fixefficientnet.predict(image, lite0)


def test_a_model_that_keeps_something_takes_one_batch_at_a_time(lite0: "ZooModel"):
    files = sorted(EXAMPLES.glob("*.jpg")) * 2
    expected = fixefficientnet.predict(files, lite0, threads=1, batch_size=1)
    model = copy.copy(lite0)
    plain = lite0.forward

    def keeping(images: torch.Tensor) -> torch.Tensor:
        model.kept = images
        plain(images[:, :, ::4, ::4])
        return plain(model.kept)

    model.forward = keeping
    found = fixefficientnet.predict(files, model, threads=1, batch_size=1)
    assert [one.labels[0] for one in found] == [one.labels[0] for one in expected]
    seen: list[torch.Tensor] = []
    classifier: Network = lite0.classifier
    hook = classifier.register_forward_hook(lambda module, given, result: seen.append(result.softmax(1).max()))
    fixefficientnet.predict(files, lite0, batch_size=1)
    hook.remove()
    assert [float(most) for most in seen] == pytest.approx([one.labels[0].probability for one in expected], rel=1e-4)


def test_several_concurrent_calls_leave_a_model_in_train_mode_as_it_was():
    model: Network = fixefficientnet.create("lite0", "backbone").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    files = sorted(EXAMPLES.glob("*.jpg")) * 2
    first, second = (iter_predictions(files, model, PredictionOptions(batch_size=1)) for _ in range(2))
    next(first), next(second)
    list(first)
    assert not model.training
    list(second)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_turned_image_is_set_upright(lite0: "ZooModel", tmp_path: Path):
    upright = Image.open(EXAMPLES / "hopper.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert ImageOps.exif_transpose(Image.open(path)).size == upright.size
    assert fixefficientnet.predict(path, lite0)[0].labels == fixefficientnet.predict(upright, lite0)[0].labels


def test_default_is_lite0_with_its_backbone_weights():
    assert fixefficientnet.predict(EXAMPLES / "cat.jpg")[0].labels[0].index == 285
    with pytest.raises(WeightsNotPublishedError):
        fixefficientnet.predict(EXAMPLES / "cat.jpg", "b0")


def test_other_classes_have_no_names(lite0: "ZooModel"):
    model = fixefficientnet.create("lite0", "backbone", num_classes=3)
    labels = fixefficientnet.predict(EXAMPLES / "cat.jpg", model)[0].labels
    assert len(labels) == 3
    assert all(label.synset is None and label.name == str(label.index) for label in labels)
    assert [label.probability for label in labels] == pytest.approx([1 / 3] * 3)  # from where training begins


def test_bad_image_raises_or_is_reported(lite0: "ZooModel", tmp_path: Path):
    (tmp_path / "bad.jpg").write_bytes(b"no")
    mixed = [tmp_path / "bad.jpg", EXAMPLES / "cat.jpg"]
    with pytest.raises(ImageError, match=r"bad.jpg"):
        fixefficientnet.predict(mixed, lite0)
    seen = []
    found = fixefficientnet.predict(mixed, lite0, on_error=lambda image, error: seen.append((image, str(error))))
    assert [p.image for p in found] == [EXAMPLES / "cat.jpg"]
    assert [image for image, _ in seen] == [tmp_path / "bad.jpg"]


def test_model_in_train_mode_predicts_the_same_and_stays_as_it_was(lite0: "ZooModel"):
    model: Network = fixefficientnet.create("lite0", "backbone").train()
    model.bn1.eval()  # as those do who freeze a norm
    before = model.bn2.running_mean.clone()
    assert fixefficientnet.predict(EXAMPLES / "cat.jpg", model) == fixefficientnet.predict(EXAMPLES / "cat.jpg", lite0)
    assert model.training
    assert model.bn2.training
    assert not model.bn1.training
    assert torch.equal(model.bn2.running_mean, before)


@pytest.mark.parametrize("options", [{"topk": 0}, {"batch_size": 0}, {"topk": -1}])
def test_impossible_numbers_are_refused(lite0: "ZooModel", options: dict[str, Any]):
    with pytest.raises(ValueError, match="must be a whole number above 0"):
        fixefficientnet.predict(EXAMPLES / "cat.jpg", lite0, **options)


@pytest.mark.parametrize("extra", [{"num_classes": 0}, {"features_only": True}])
def test_model_without_logits_is_refused(extra: dict[str, Any]):
    with pytest.raises(UnsupportedModelError, match="features, not logits"):
        fixefficientnet.predict(EXAMPLES / "cat.jpg", fixefficientnet.create("b0", **extra))


def test_open_file_is_refused(lite0: "ZooModel"):
    with (EXAMPLES / "cat.jpg").open("rb") as file, pytest.raises(TypeError, match="give its path"):
        fixefficientnet.predict(file, lite0)


def test_no_images_no_predictions(lite0: "ZooModel"):
    assert fixefficientnet.predict([], lite0) == []


def test_half_precision_model(lite0: "ZooModel"):
    model = fixefficientnet.create("lite0", "backbone", dtype=torch.bfloat16)
    assert fixefficientnet.predict(EXAMPLES / "coffee.jpg", model)[0].labels[0].name == "espresso"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"engine": "tpu"}, OptionError, "engine: must be one of eager, compile, onnx, openvino, is 'tpu'"),
        ({"mixed_precision": "fp8"}, OptionError, "mixed_precision: must be one of no, bf16, fp16"),
        ({"topk": "5"}, OptionError, "topk: must be a whole number above 0"),
        ({"threads": 0}, OptionError, "threads: must be a whole number above 0"),
        ({"mixed_precision": "fp16"}, FixEfficientNetError, "on a CPU, there is bf16"),
        ({"engine": "onnx", "mixed_precision": "bf16"}, ExportError, "in float32"),
        ({"engine": "onnx", "device": "meta"}, FixEfficientNetError, "The device 'meta' cannot be used here"),
        ({"device": "cuda:77"}, FixEfficientNetError, "cuda:77"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(
    lite0: "ZooModel", options: dict[str, Any], error: type[Exception], said: str
):
    with pytest.raises(error, match=said):
        fixefficientnet.predict([], lite0, **options)


def test_an_unknown_option_is_refused(lite0: "ZooModel"):
    with pytest.raises(TypeError, match="top_k"):
        fixefficientnet.predict([], lite0, top_k=3)  # type: ignore[call-arg]


def test_keywords_are_the_fields_of_the_options():
    fields = {field.name for field in dataclasses.fields(PredictionOptions)}
    assert PredictionKeywords.__annotations__.keys() == fields - {"device"}


@pytest.mark.slow  # tiny networks are predicted with each engine in test_engines.py
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_engines_see_what_eager_sees(
    lite0: "ZooModel", engine: Literal["onnx", "openvino"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path))
    files = sorted(EXAMPLES.glob("*.jpg"))
    said: list[str] = []
    found = fixefficientnet.predict(files, lite0, engine=engine, on_message=said.append)
    assert len(said) == 1 and f"exporting for {engine}" in said[0]
    for one, eager in zip(found, fixefficientnet.predict(files, lite0), strict=True):
        assert [label.index for label in one.labels] == [label.index for label in eager.labels]
        assert one.labels[0].probability == pytest.approx(eager.labels[0].probability, rel=1e-3)
    assert fixefficientnet.predict(files, lite0, engine=engine, on_message=said.append) and len(said) == 1
    assert "forward" not in vars(lite0)


def test_mixed_precision_and_fast_preprocessing_are_nearly_the_same(lite0: "ZooModel"):
    path = EXAMPLES / "cat.jpg"
    (exact,) = fixefficientnet.predict(path, lite0)[0].labels[:1]
    with torch.inference_mode():
        inputs = FastPreprocess.of(lite0.preprocess)(path)
        expected = lite0(inputs[None]).softmax(1).max().item()
    (fast,) = fixefficientnet.predict(path, lite0, fast_preprocessing=True)[0].labels[:1]
    assert fast.index == exact.index
    assert fast.probability == pytest.approx(expected, rel=1e-4) != exact.probability
    assert type(lite0.preprocess) is not FastPreprocess
    (half,) = fixefficientnet.predict(path, lite0, mixed_precision="bf16")[0].labels[:1]
    assert half.index == exact.index
    assert half.probability == pytest.approx(exact.probability, rel=0.1) and half.probability != exact.probability


def test_the_callers_own_code_is_not_under_autocast(lite0: "ZooModel"):
    found = iter_predictions([EXAMPLES / "cat.jpg"] * 2, lite0, PredictionOptions(mixed_precision="bf16"))
    next(found)
    assert not torch.is_autocast_enabled("cpu")
    assert len(list(found)) == 1


def test_errors_come_from_the_call_and_not_from_the_first_prediction(lite0: "ZooModel"):
    with pytest.raises(FixEfficientNetError, match="cannot be used here"):
        iter_predictions([], lite0, PredictionOptions(device="meta"))


def test_options_need_no_torch():
    code = "import sys, fixefficientnet.options; assert not {'torch', 'timm', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
