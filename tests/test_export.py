"""Exported files, run by their own runtimes as their users run them, against eager."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import cli

from fixefficientnet.evaluation.models import open_model
from fixefficientnet.runtimes import SUFFIXES

PAD_SAME = "tf_efficientnet_lite0"  # whose padding depends on the size, as in all variants of the zoo


@pytest.fixture(scope="module", params=["test_efficientnet", pytest.param(PAD_SAME, marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network with random weights of more than one opinion, by the name to open it with."""
    torch.manual_seed(0)
    network = timm.create_model(request.param, num_classes=7).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    network.classifier.weight.data.normal_()
    file = tmp_path_factory.mktemp("export") / "model.safetensors"
    save_file(network.state_dict(), file)
    return f"timm/{request.param}:{file}"


def run(path: Path, pictures: np.ndarray) -> np.ndarray:
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        (given,) = session.get_inputs()
        return session.run(None, {given.name: pictures})[0]
    if path.suffix == ".xml":
        import openvino

        return openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(pictures)[0]
    opened = torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(str(path))
    with torch.inference_mode():
        return opened(torch.from_numpy(pictures)).numpy()


def metadata(path: Path) -> dict[str, object]:
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
def test_a_file_gives_eagers_logits(model: str, tmp_path: Path, kind: str, more: tuple[str, ...]):
    path = tmp_path / f"model{SUFFIXES[kind]}"
    out, _ = cli("export", model, "-o", path, "--size", 64, *more)
    assert "same best guess for 100% of" in out
    eager = open_model(model)
    tolerance = 3e-2 if more == ("--half",) else 1e-4
    generator = torch.Generator().manual_seed(1)
    for batch, size in [(1, 64), (3, 64), *([(2, 97)] if more == ("--dynamic-size",) else [])]:
        pictures = torch.randn(batch, 3, size, size, generator=generator)
        with torch.inference_mode():
            expected = eager.model(pictures).numpy()
        found = run(path, pictures.numpy())
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    test = eager.at(64)
    described = metadata(path)
    assert (described["size"], described["crop_pct"]) == (64, test.crop_pct)
    assert (tuple(described["mean"]), tuple(described["std"])) == (test.mean, test.std)
    assert (tmp_path / "model.labels.txt").read_text().split() == [str(number) for number in range(7)]
    files = {path.name, "model.labels.txt"} | ({"model.bin"} if kind == "openvino" else set())
    assert {file.name for file in tmp_path.iterdir()} == files


def test_half_the_bytes(model: str, tmp_path: Path):
    for name, more in (("full.onnx", ()), ("half.onnx", ("--half",))):
        cli("export", model, "-o", tmp_path / name, "--size", 64, *more)
    assert (tmp_path / "half.onnx").stat().st_size < 0.75 * (tmp_path / "full.onnx").stat().st_size


def test_a_file_that_disagrees_is_not_kept(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # no exporter at hand is wrong, so an honest file is held against a tolerance that nothing meets
    monkeypatch.setattr("fixefficientnet.export.TOLERANCES", {False: -1.0})
    _, err = cli("export", model, "-o", tmp_path / "model.onnx", "--size", 64, status=1)
    assert "disagrees with eager" in err and "was not written" in err
    assert not [*tmp_path.iterdir()]


def test_bad_requests_are_one_error(model: str, tmp_path: Path):
    (tmp_path / "there.onnx").write_text("precious")
    assert "is there already" in cli("export", model, "-o", tmp_path / "there.onnx", status=1)[1]
    assert (tmp_path / "there.onnx").read_text() == "precious"
    assert "--format is one of" in cli("export", model, "-o", tmp_path / "model.tflite", status=2)[1]
    _, err = cli("export", model, "-o", tmp_path / "model.pt", "--format", "onnx", status=1)
    assert "ends in .onnx" in err
    assert "No variant is named" in cli("export", "b44", "-o", tmp_path / "model.onnx", status=1)[1].replace("\n", " ")


@pytest.mark.parametrize(("module", "extra", "name"), [("onnx", "onnx", "a.onnx"), ("openvino", "openvino", "a.xml")])
def test_a_missing_runtime_names_the_command(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str, name: str
):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    _, err = cli("export", model, "-o", tmp_path / name, "--size", 64, status=1)
    assert f"pip install 'fixefficientnet[{extra}]'" in err
    assert not [*tmp_path.iterdir()]
