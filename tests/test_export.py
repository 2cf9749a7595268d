"""Exported files, run by their own runtimes as their users run them, against eager."""

import copy
import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, Network
from PIL import Image
from plain import correct, network, save_run, stack
from safetensors.torch import load_file, save_file
from tiny import cli, make_data

from fixefficientnet.data.dataset import open_dataset
from fixefficientnet.errors import ExportError
from fixefficientnet.models import load
from fixefficientnet.runtimes import exporting, formats
from fixefficientnet.runtimes.formats import SUFFIXES
from fixefficientnet.runtimes.int8 import Calibration

KINDS = ("onnx", "openvino", "torch-export", "torchscript")
"""Formats that are made within seconds."""
WITH_EXECUTORCH = (
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="no executorch"),
)
SLOW_KINDS = (
    pytest.param("executorch", marks=WITH_EXECUTORCH),
    pytest.param("aotinductor", marks=pytest.mark.slow),
)
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


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> str:
    return opinionated(PAD_SAME, tmp_path_factory.mktemp("export"))


def run(path: Path, images: np.ndarray, kind: str = "") -> np.ndarray:
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        (given,) = session.get_inputs()
        return session.run(None, {given.name: images})[0]
    if path.suffix == ".xml":
        import openvino

        return openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0]
    if path.suffix == ".pte":
        from executorch.runtime import Runtime

        return Runtime.get().load_program(path).load_method("forward").execute([torch.from_numpy(images)])[0].numpy()
    if kind == "aotinductor":
        return torch._inductor.aoti_load_package(str(path))(torch.from_numpy(images)).numpy()
    loaded = torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(str(path))
    with torch.inference_mode():
        return loaded(torch.from_numpy(images)).numpy()


def metadata(path: Path, kind: str = "") -> dict[str, Any]:
    extra = {"fixefficientnet": ""}
    if path.suffix == ".onnx":
        import onnx

        extra = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    elif path.suffix == ".xml":
        import openvino

        info = openvino.Core().read_model(path).get_rt_info(["fixefficientnet"])
        extra = {"fixefficientnet": info.astype(str) if hasattr(info, "astype") else str(info.value)}
    elif path.suffix == ".pte":
        from executorch.runtime import Runtime

        extra["fixefficientnet"] = Runtime.get().load_program(path).load_method("fixefficientnet").execute([])[0]
    elif kind == "aotinductor":
        extra = torch._inductor.aoti_load_package(str(path)).get_metadata()
    elif path.suffix == ".pt2":
        torch.export.load(path, extra_files=extra)
    else:
        torch.jit.load(str(path), _extra_files=extra)
    text = extra["fixefficientnet"]
    return json.loads(text.decode() if isinstance(text, bytes) else text)


FORMS: list[Any] = [(kind, more) for kind in KINDS for more in ((), ("--half",), ("--dynamic-size",))]
# torch.export reasons for minutes about the padding of a free size
FORMS.remove(("torch-export", ("--dynamic-size",)))
PADDED = [
    *(pytest.param(kind, (), marks=pytest.mark.slow) for kind in ("openvino", "torch-export", "torchscript")),
    *(pytest.param(kind, ("--dynamic-size",), marks=pytest.mark.slow) for kind in ("onnx", "openvino", "torchscript")),
    *(pytest.param(*kind.values, (), marks=kind.marks) for kind in SLOW_KINDS),
]


def _name(value: Any) -> str:
    return value if isinstance(value, str) else "".join(value)


@pytest.mark.parametrize(("kind", "more"), PADDED, ids=_name)
def test_a_file_gives_eagers_logits_where_padding_depends_on_the_size(
    padded: str, tmp_path: Path, kind: str, more: tuple[str, ...]
):
    test_a_file_gives_eagers_logits(padded, tmp_path, kind, more)


@pytest.mark.parametrize(("kind", "more"), FORMS, ids=_name)
def test_a_file_gives_eagers_logits(model: str, tmp_path: Path, kind: str, more: tuple[str, ...]):
    path = tmp_path / f"model{SUFFIXES[kind]}"
    out, _ = cli("export", model, "-o", path, "--format", kind, "--size", 64, *more)
    assert "same top-1 prediction for 100% of" in out
    eager = load(model)
    tolerance = 3e-2 if more == ("--half",) else 1e-4
    generator = torch.Generator().manual_seed(1)
    for batch, size in [(1, (64, 64)), (3, (64, 64)), *([(2, (97, 81))] if more == ("--dynamic-size",) else [])]:
        images = torch.randn(batch, 3, *size, generator=generator)
        with torch.inference_mode():
            expected = eager.network(images).numpy()
        found = run(path, images.numpy(), kind)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    test = eager.at(64)
    described = metadata(path, kind)
    assert (described["size"], described["crop_pct"]) == (64, test.crop_pct)
    assert (described["input"], described["output"]) == ("float32", "logits")
    assert (tuple(described["mean"]), tuple(described["std"])) == (test.mean, test.std)
    assert (described["interpolation"], described["crop_mode"]) == (test.interpolation, "center")
    labels = f"{path.name}.labels.txt"
    assert (tmp_path / labels).read_text().split() == [str(number) for number in range(7)]
    files = {path.name, labels} | ({"model.bin"} if kind == "openvino" else set())
    assert {file.name for file in tmp_path.iterdir()} == files


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("onnx", ("--opset", "17")),
        ("torchscript", ("--dynamic-size",)),
        pytest.param("onnx", (), marks=pytest.mark.slow),
        pytest.param("executorch", (), marks=WITH_EXECUTORCH),
        *(
            pytest.param(kind, ("--half",), marks=pytest.mark.slow)
            for kind in ("openvino", "torch-export", "aotinductor")
        ),
    ],
)
def test_a_raw_image_goes_in_and_probabilities_come_out(model: str, tmp_path: Path, kind: str, more: tuple[str, ...]):
    path = tmp_path / f"model{SUFFIXES[kind]}"
    out, _ = cli(
        *("export", model, "-o", path, "--format", kind, "--size", 64, "--normalize", "--softmax", *more), columns=200
    )
    assert "probabilities differ by up to" in out and "same top-1 prediction for 100% of" in out
    network: Network = timm.create_model("test_efficientnet", num_classes=7)
    network.load_state_dict(load_file(model.partition(":")[2]))
    config = timm.data.resolve_data_config(model=network)
    steps = timm.data.create_transform(**config | {"input_size": (3, 64, 64), "crop_pct": 1.0})
    paths = sorted((ROOT / "examples").glob("*.jpg"))[:2]
    crops = [Image.open(file).convert("RGB").resize((64, 64)) for file in paths]
    with torch.inference_mode():
        expected = network.eval()(torch.stack([steps(crop) for crop in crops])).softmax(1).numpy()
    found = run(path, np.stack([np.array(crop) for crop in crops]).transpose(0, 3, 1, 2).copy(), kind)
    assert np.abs(found - expected).max() <= (3e-2 if "--half" in more else 1e-5)
    described = metadata(path, kind)
    assert (described["input"], described["output"]) == ("uint8", "probabilities")
    forward = formats.load(path, format=kind)
    with torch.inference_mode():
        again = forward(torch.stack([torch.from_numpy(np.array(crop)).movedim(-1, 0) for crop in crops]))
    assert np.abs(again.numpy() - found).max() < 1e-6
    if kind == "onnx":
        import onnx

        graph = onnx.load(str(path))
        opset = {entry.domain: entry.version for entry in graph.opset_import}[""]
        assert opset == 17 if more == ("--opset", "17") else opset >= 18
        assert [value.name for value in (*graph.graph.input, *graph.graph.output)] == ["pixel_values", "probabilities"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.newest
def test_half_the_bytes(model: str, tmp_path: Path, kind: str):
    sizes = []
    for name, more in (("full", ()), ("half", ("--half",))):
        path = tmp_path / f"{name}{SUFFIXES[kind]}"
        cli("export", model, "-o", path, "--size", 64, *more)
        weights = path.with_suffix(".bin") if kind == "openvino" else path
        sizes.append(weights.stat().st_size)
    parameters = sum(parameter.numel() for parameter in load(model).network.parameters())
    assert sizes[0] - sizes[1] > 1.8 * parameters  # two bytes less for each, but for what names and graph take


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.newest
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
@pytest.mark.parametrize("raw", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_in_8_bits_with_accuracy_before_and_after(seeing: tuple[str, Path], tmp_path: Path, name: str, raw: bool):
    run_, data = seeing
    arguments = ["export", run_, "--int8", "--data", data, "--images", 100, *(["--normalize"] if raw else [])]
    out, _ = cli(*arguments, "-o", tmp_path / name, "--max-drop", 100)
    paths = sorted((data / "val").glob("*/*.jpg"))
    labels = [("apple", "brick", "cloud").index(path.parent.name) for path in paths]
    images = stack(paths)
    with torch.inference_mode():
        eager = load(run_).network(images)
    if raw:
        mean, std = (torch.tensor(getattr(load(run_).test, which))[:, None, None] for which in ("mean", "std"))
        given = ((images * std + mean) * 255).round().to(torch.uint8)
    else:
        given = images
    found = torch.from_numpy(run(tmp_path / name, given.numpy()))
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


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("a.pt", ["--opset", 17], "--opset is ONNX's"),
        ("a.onnx", ["--opset", 3], "the oldest is 13"),
        ("a.onnx", ["--opset", 99, "--dynamic-size"], "the newest is 20"),
        pytest.param("a.onnx", ["--opset", 99], "the exporter got no further than", marks=pytest.mark.slow),
        ("a.onnx", ["--delegate", "coreml"], "--delegate is ExecuTorch's"),
        ("a.pt", ["--format", "aotinductor"], "aotinductor is .pt2"),
        pytest.param("a.pte", ["--half"], "leave --dynamic-size and --half out", marks=WITH_EXECUTORCH),
        pytest.param("a.pte", ["--delegate", "coreml", "--normalize"], "no pixels of 8 bits", marks=WITH_EXECUTORCH),
    ],
)
def test_what_a_format_does_not_have_is_one_error(model: str, tmp_path: Path, name: str, more: list[Any], said: str):
    _, err = cli("export", model, "-o", tmp_path / name, "--size", 64, *more, status=1, columns=200)
    assert said in err and err.startswith("Error: ") and err.count("\n") == 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("half", [pytest.param(half, marks=WITH_EXECUTORCH) for half in ((), ("--half",))])
def test_a_file_for_core_ml_is_not_called_checked_elsewhere(model: str, tmp_path: Path, half: tuple[str, ...]):
    out, _ = cli("export", model, "-o", tmp_path / "a.pte", "--size", 64, "--delegate", "coreml", *half)
    assert b"CoreMLBackend" in (tmp_path / "a.pte").read_bytes()
    assert ("Not checked" in out) == (sys.platform != "darwin")


def test_native_code_is_loaded_only_where_it_was_asked_for(tmp_path: Path):
    path = tmp_path / "a.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in ("version", "byteorder", "data/aotinductor/model/a.wrapper.so"):
            archive.writestr(f"a/{name}", "6")
    with pytest.raises(ExportError, match="holds native code"):
        formats.load(path)
    with pytest.raises(ExportError, match="holds native code"):
        formats.load(path, format="torch-export")


@pytest.mark.slow
def test_without_a_compiler_there_is_no_native_code(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    name = tmp_path / "a.pt2"
    _, err = cli("export", model, "-o", name, "--format", "aotinductor", "--size", 64, status=1, columns=200)
    assert "install g++, or name one in the environment variable CXX" in err
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
    [
        ("onnx", "onnx", "a.onnx"),
        ("onnxruntime", "onnx", "a.onnx"),
        ("openvino", "openvino", "a.xml"),
        ("executorch", "executorch", "a.pte"),
    ],
)
def test_a_missing_runtime_names_the_command(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str, name: str
):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == module else find(name, *more))
    _, err = cli("export", model, "-o", tmp_path / name, "--size", 64, status=1)
    assert f"pip install 'fixefficientnet[{extra}]'" in err
    assert not [*tmp_path.iterdir()]
