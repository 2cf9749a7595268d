"""Exported files, run by their own runtimes as their users run them, against eager."""

import copy
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import Network
from plain import correct, network, save_run, stack
from safetensors.torch import load_file, save_file
from tiny import cli, make_data

from fixefficientnet.data.dataset import open_dataset
from fixefficientnet.models import load
from fixefficientnet.runtimes import exporting
from fixefficientnet.runtimes.formats import SUFFIXES
from fixefficientnet.runtimes.int8 import Calibration

PAD_SAME = "tf_efficientnet_lite0"  # whose padding depends on the size, as in all variants of the zoo


def opinionated(architecture: str, folder: Path) -> str:
    """A network with random weights of more than one opinion, by the name to open it with."""
    torch.manual_seed(0)
    network: Network = timm.create_model(architecture, num_classes=7).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    network.classifier.weight.data.normal_()
    file = folder / "weights"
    save_file(network.state_dict(), file)
    return f"timm/{architecture}:{file}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return opinionated("test_efficientnet", tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module", params=["test_efficientnet", pytest.param(PAD_SAME, marks=pytest.mark.slow)])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Without and with padding that depends on the size."""
    return opinionated(request.param, tmp_path_factory.mktemp("export"))


def run(path: Path, images: np.ndarray) -> np.ndarray:
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        (given,) = session.get_inputs()
        return session.run(None, {given.name: images})[0]
    if path.suffix == ".xml":
        import openvino

        return openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0]
    loaded = torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(str(path))
    with torch.inference_mode():
        return loaded(torch.from_numpy(images)).numpy()


def metadata(path: Path) -> dict[str, Any]:
    extra = {"fixefficientnet": ""}
    if path.suffix == ".onnx":
        import onnx

        extra = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    elif path.suffix == ".xml":
        import openvino

        info = openvino.Core().read_model(path).get_rt_info(["fixefficientnet"])
        extra = {"fixefficientnet": info.astype(str) if hasattr(info, "astype") else str(info.value)}
    elif path.suffix == ".pt2":
        torch.export.load(path, extra_files=extra)
    else:
        torch.jit.load(str(path), _extra_files=extra)
    text = extra["fixefficientnet"]
    return json.loads(text.decode() if isinstance(text, bytes) else text)


FORMS = [(kind, more) for kind in SUFFIXES for more in ((), ("--half",), ("--dynamic-size",))]
# torch.export reasons for minutes about the padding of a free size
FORMS.remove(("torch-export", ("--dynamic-size",)))


@pytest.mark.parametrize(("kind", "more"), FORMS, ids=lambda value: value if isinstance(value, str) else "".join(value))
def test_a_file_gives_eagers_logits(either: str, tmp_path: Path, kind: str, more: tuple[str, ...]):
    path = tmp_path / f"model{SUFFIXES[kind]}"
    out, _ = cli("export", either, "-o", path, "--size", 64, *more)
    assert "same top-1 prediction for 100% of" in out
    eager = load(either)
    tolerance = 3e-2 if more == ("--half",) else 1e-4
    generator = torch.Generator().manual_seed(1)
    for batch, size in [(1, (64, 64)), (3, (64, 64)), *([(2, (97, 81))] if more == ("--dynamic-size",) else [])]:
        images = torch.randn(batch, 3, *size, generator=generator)
        with torch.inference_mode():
            expected = eager.network(images).numpy()
        found = run(path, images.numpy())
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    test = eager.at(64)
    described = metadata(path)
    assert (described["size"], described["crop_pct"]) == (64, test.crop_pct)
    assert (tuple(described["mean"]), tuple(described["std"])) == (test.mean, test.std)
    assert (described["interpolation"], described["crop_mode"]) == (test.interpolation, "center")
    labels = f"{path.name}.labels.txt"
    assert (tmp_path / labels).read_text().split() == [str(number) for number in range(7)]
    files = {path.name, labels} | ({"model.bin"} if kind == "openvino" else set())
    assert {file.name for file in tmp_path.iterdir()} == files


@pytest.mark.parametrize("kind", SUFFIXES)
def test_half_the_bytes(model: str, tmp_path: Path, kind: str):
    sizes = []
    for name, more in (("full", ()), ("half", ("--half",))):
        path = tmp_path / f"{name}{SUFFIXES[kind]}"
        cli("export", model, "-o", path, "--size", 64, *more)
        weights = path.with_suffix(".bin") if kind == "openvino" else path
        sizes.append(weights.stat().st_size)
    parameters = sum(parameter.numel() for parameter in load(model).network.parameters())
    assert sizes[0] - sizes[1] > 1.8 * parameters  # two bytes less for each, but for what names and graph take


@pytest.mark.parametrize("kind", SUFFIXES)
def test_a_file_of_another_network_is_not_kept(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    honest = exporting._WRITERS[kind]

    def wrong(network: Network, *more: Any) -> None:
        other = copy.deepcopy(network)
        other.classifier.bias.data[0] += 0.05 * other.classifier.weight.abs().max()
        honest(other, *more)

    monkeypatch.setitem(exporting._WRITERS, kind, wrong)  # no exporter at hand is wrong by itself
    _, err = cli("export", model, "-o", tmp_path / f"model{SUFFIXES[kind]}", "--size", 64, status=1)
    assert "disagrees with eager" in err and "was not written" in err
    assert not [*tmp_path.iterdir()]


def test_a_network_that_gives_nan_is_not_exported(model: str, tmp_path: Path):
    tensors = load_file(model.partition(":")[2])
    save_file(tensors | {"classifier.bias": tensors["classifier.bias"] * torch.nan}, tmp_path / "nan.safetensors")
    name = f"{model.partition(':')[0]}:{tmp_path / 'nan.safetensors'}"
    assert "gives NaN" in cli("export", name, "-o", tmp_path / "a.pt", "--size", 64, status=1)[1]
    assert [file.name for file in tmp_path.iterdir()] == ["nan.safetensors"]


def test_labels_are_imagenets_or_the_runs_own(tmp_path: Path):
    cli("export", "lite0:backbone", "-o", tmp_path / "lite0.pt", "--size", 64)
    labels = (tmp_path / "lite0.pt.labels.txt").read_text().splitlines()
    assert len(labels) == 1000 and labels[285].startswith("Egyptian cat")
    network = timm.create_model("test_efficientnet", num_classes=3).eval()
    save_run(tmp_path / "run", network, ("apple", "brick", "cloud"))
    cli("export", tmp_path / "run", "-o", tmp_path / "run.pt")
    assert (tmp_path / "run.pt.labels.txt").read_text().splitlines() == ["apple", "brick", "cloud"]
    assert metadata(tmp_path / "run.pt")["size"] == 48  # as the run tells


def test_the_tag_decides_the_preprocessing_of_a_file_of_ones_own(tmp_path: Path):
    file = tmp_path / "b0.safetensors"
    save_file(timm.create_model("tf_efficientnet_b0").state_dict(), file)
    assert load(f"timm/tf_efficientnet_b0.ap_in1k:{file}").test.mean == (0.5, 0.5, 0.5)
    assert load(f"timm/tf_efficientnet_b0.ns_jft_in1k:{file}").test.mean == (0.485, 0.456, 0.406)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A network that classifies a part of some images correctly, and these."""
    folder = make_data(tmp_path_factory.mktemp("seeing"), train=1, val=12)
    paths = sorted((folder / "val").glob("*/*.jpg"))
    labels = [("apple", "brick", "cloud").index(path.parent.name) for path in paths]
    return str(save_run(folder / "run", network(3, paths, labels), ("apple", "brick", "cloud"))), folder


@pytest.mark.parametrize("name", ["a.onnx", "a.xml"])
def test_in_8_bits_with_accuracy_before_and_after(seeing: tuple[str, Path], tmp_path: Path, name: str):
    run_, data = seeing
    arguments = ["export", run_, "--int8", "--data", data, "--images", 100]
    out, _ = cli(*arguments, "-o", tmp_path / name, "--max-drop", 100)
    paths = sorted((data / "val").glob("*/*.jpg"))
    labels = [("apple", "brick", "cloud").index(path.parent.name) for path in paths]
    images = stack(paths)
    with torch.inference_mode():
        eager = load(run_).network(images)
    found = torch.from_numpy(run(tmp_path / name, images.numpy()))
    before, after = (correct(logits, labels).count("1") / 0.36 for logits in (eager, found))
    assert f"{before:.2f} before, {after:.2f} after" in out
    assert (found - eager).abs().max() / eager.abs().max() > 1e-4  # it is another network, if a close one
    assert metadata(tmp_path / name)["size"] == 48
    weights = (tmp_path / name).with_suffix(".bin" if name.endswith(".xml") else ".onnx")
    if name.endswith(".onnx"):
        import onnx

        kinds = {tensor.data_type for tensor in onnx.load(str(weights)).graph.initializer}
        assert onnx.TensorProto.INT8 in kinds
    else:
        assert 'element_type="i8"' in (tmp_path / name).read_text()
    _, err = cli(*arguments, "-o", tmp_path / f"b{Path(name).suffix}", "--max-drop", -100, status=1)
    assert "points less" in err and "was not written" in err
    assert not [*tmp_path.glob("*b.*")]


def test_images_to_calibrate_with_are_spread_evenly_and_readable(seeing: tuple[str, Path], tmp_path: Path):
    run_, data = seeing
    loaded = load(run_)
    images = open_dataset(str(data), None)
    chosen = Calibration(images, loaded.transform(loaded.test), 3)
    found = torch.cat([inputs for inputs, _ in chosen.batches()])
    expected = torch.stack([loaded.transform(loaded.test)(images[index][0]) for index in (0, 17, 35)])
    assert torch.equal(found, expected)
    for name in ("apple", "brick", "cloud"):
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / "a.jpg").write_text("no image")
    for name in ("a.onnx", "a.xml"):
        _, err = cli("export", run_, "--int8", "--data", tmp_path / "bad", "-o", tmp_path / name, status=1)
        assert err.startswith("Error: None of the images")
    assert (
        "number of points"
        in cli("export", run_, "--int8", "--data", data, "-o", tmp_path / "a.onnx", "--max-drop", "nan", status=2)[1]
    )
    assert [file.name for file in tmp_path.iterdir()] == ["bad"]


def test_8_bits_want_images_and_a_format_that_has_them(seeing: tuple[str, Path], tmp_path: Path):
    run_, data = seeing
    assert "--data" in cli("export", run_, "--int8", "-o", tmp_path / "a.onnx", status=2)[1]
    assert "--int8" in cli("export", run_, "--data", data, "-o", tmp_path / "a.onnx", status=2)[1]
    for more in (["-o", tmp_path / "a.pt"], ["-o", tmp_path / "a.onnx", "--half"]):
        assert "8-bit integers are for" in cli("export", run_, "--int8", "--data", data, *more, status=1)[1]
    assert not [*tmp_path.iterdir()]


def test_bad_requests_are_one_error(model: str, tmp_path: Path):
    (tmp_path / "there.onnx").write_text("precious")
    assert "is there already" in cli("export", model, "-o", tmp_path / "there.onnx", status=1)[1]
    assert (tmp_path / "there.onnx").read_text() == "precious"
    assert ".onnx (onnx)" in cli("export", model, "-o", tmp_path / "model.tflite", status=1)[1]
    assert "onnx is .onnx" in cli("export", model, "-o", tmp_path / "a.pt", "--format", "onnx", status=1)[1]
    assert '"tflite"' in cli("export", model, "-o", tmp_path / "a.pt", "--format", "tflite", status=2)[1]
    (tmp_path / "a.bin").write_text("precious")
    (tmp_path / "a.pt.labels.txt").write_text("precious")
    for name, there in (("a.xml", "a.bin"), ("a.pt", "a.pt.labels.txt")):
        assert f"{there} is there already" in cli("export", model, "-o", tmp_path / name, status=1)[1]
        assert (tmp_path / there).read_text() == "precious"
    (tmp_path / "folder.onnx").mkdir()
    os.mkfifo(tmp_path / "fifo.onnx")
    (tmp_path / "link.onnx").symlink_to("nowhere")
    for name in ("folder.onnx", "fifo.onnx", "link.onnx"):
        assert "is no file" in cli("export", model, "-o", tmp_path / name, "--overwrite", status=1)[1]
    assert (tmp_path / "link.onnx").is_symlink()
    assert "No variant is named" in cli("export", "b44", "-o", tmp_path / "model.onnx", status=1)[1].replace("\n", " ")


@pytest.mark.parametrize(
    ("module", "extra", "name"),
    [("onnx", "onnx", "a.onnx"), ("onnxruntime", "onnx", "a.onnx"), ("openvino", "openvino", "a.xml")],
)
def test_a_missing_runtime_names_the_command(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str, name: str
):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == module else find(name, *more))
    _, err = cli("export", model, "-o", tmp_path / name, "--size", 64, status=1)
    assert f"pip install 'fixefficientnet[{extra}]'" in err
    assert not [*tmp_path.iterdir()]
