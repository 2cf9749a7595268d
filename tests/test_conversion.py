"""A whole checkpoint to a delta and back, by the command line; plain timm, in a process of its own, loads it."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import TIMM_HAS_LOCAL_DIR, put_folder_in_cache, tuned_delta
from safetensors.torch import load_file, save_file
from tiny import cli

import fixefficientnet
from fixefficientnet import delta


@pytest.fixture(autouse=True)
def _the_hubs_cache(monkeypatch: pytest.MonkeyPatch, hub_cache: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache))


@pytest.fixture(scope="module")
def tuned(hub_cache: Path):
    """b0 as FixRes would leave it, and its whole state dict."""
    model = fixefficientnet.create("b0", "backbone", cache_dir=hub_cache)
    made = tuned_delta(model, "b0")
    return made, {name: tensor.clone() for name, tensor in model.state_dict().items()} | dict(made.tensors)


def write(tensors: dict[str, torch.Tensor], path: Path, wrapped: bool = False) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        named = {f"module.{name}": tensor for name, tensor in tensors.items()}
        torch.save({"model": named, "epoch": 3} if wrapped else tensors, path)
    return path


def convert(checkpoint: Path, *more: object, status: int = 0) -> tuple[str, str]:
    return cli("convert", checkpoint, "--variant", "b0", *more, status=status)


@pytest.mark.parametrize(("name", "wrapped"), [("a.safetensors", False), ("a.pth", False), ("a.pth", True)])
def test_a_whole_checkpoint_becomes_its_delta(tuned, tmp_path: Path, images, name: str, wrapped: bool):
    made, whole = tuned
    out, _ = convert(write(whole, tmp_path / name, wrapped), "-o", tmp_path / "delta.safetensors", "--license", "mit")
    found = delta.load(tmp_path / "delta.safetensors")
    assert found.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(tensor, made.tensors[key]) for key, tensor in found.tensors.items())
    assert (found.variant, found.fingerprint, found.license) == ("b0", made.fingerprint, "mit")
    assert "0 differ" in out
    reference = timm.create_model("tf_efficientnet_b0").eval()
    reference.load_state_dict(whole)
    model = fixefficientnet.create("b0", tmp_path / "delta.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(model(images), reference(images))


def test_what_differs_outside_the_head_is_named(tuned, tmp_path: Path):
    _, whole = tuned
    changed = whole | {"conv_stem.weight": whole["conv_stem.weight"] + 1e-3, "bn1.bias": whole["bn1.bias"] - 0.5}
    path = write(changed, tmp_path / "a.pth")
    _, err = convert(path, "-o", tmp_path / "out.safetensors", status=1)
    assert "2 tensors outside bn2 and classifier" in err
    assert "bn1.bias: by up to 0.5" in err and "conv_stem.weight: by up to 0.001" in err
    assert "--full" in err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pth"]
    out, _ = convert(path, "-o", tmp_path / "out.safetensors", "--full")
    assert "bn1.bias: by up to 0.5" in out
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, changed[name]) for name, tensor in found.items())
    timm.create_model("tf_efficientnet_b0", checkpoint_path=str(tmp_path / "out.safetensors"))


def test_differences_within_the_tolerance_are_none(tuned, tmp_path: Path):
    _, whole = tuned
    path = write(whole | {"bn1.bias": whole["bn1.bias"] + 5e-7}, tmp_path / "a.pth")
    assert "0 differ" in convert(path, "-o", tmp_path / "out.safetensors")[0]


def test_differences_above_the_tolerance_count(tuned, tmp_path: Path):
    _, whole = tuned
    path = write(whole | {"bn1.bias": whole["bn1.bias"] + 3e-6}, tmp_path / "a.pth")
    assert "bn1.bias: by up to 3" in convert(path, "-o", tmp_path / "out.safetensors", status=1)[1]


@pytest.mark.parametrize("name", ["bn1.bias", "bn2.bias"])
def test_nan_is_refused_also_with_full(tuned, tmp_path: Path, name: str):
    _, whole = tuned
    path = write(whole | {name: whole[name] * torch.nan}, tmp_path / "a.pth")
    for more in ((), ("--full",)):
        _, err = convert(path, "-o", tmp_path / "out.safetensors", *more, status=1)
        assert f"has NaN or Inf in {name}" in err
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_is_still_of_its_backbone(tuned, tmp_path: Path, dtype: torch.dtype):
    made, whole = tuned
    half = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in whole.items()}
    assert "0 differ" in convert(write(half, tmp_path / "a.pth"), "-o", tmp_path / "out.safetensors")[0]
    found = delta.load(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, made.tensors[key].to(dtype).float()) for key, tensor in found.tensors.items())
    assert found.fingerprint == made.fingerprint


@pytest.mark.parametrize("keys", [("state_dict_ema", "state_dict"), ("model_ema", "model")])
def test_averaged_weights_go_first_as_in_timm(tuned, tmp_path: Path, keys: tuple[str, str]):
    made, whole = tuned
    torch.save({keys[1]: whole | {"bn2.bias": whole["bn2.bias"] + 1}, keys[0]: whole}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", "-o", tmp_path / "out.safetensors")
    assert torch.equal(delta.load(tmp_path / "out.safetensors").tensors["bn2.bias"], made.tensors["bn2.bias"])


def test_what_is_no_checkpoint_of_the_variant_is_told_as_what_it_is(tuned, tmp_path: Path, b0_delta: Path):
    _, whole = tuned
    fewer = {key: tensor[:51] if key.startswith("classifier.") else tensor for key, tensor in whole.items()}
    other = timm.create_model("tf_efficientnet_b0").state_dict()
    for file, said in (
        (write(fewer, tmp_path / "fewer.pth"), "has 51 classes, b0 has 1000"),
        (write(whole | {"extra": torch.zeros(1)}, tmp_path / "extra.pth"), "extra missing, too many"),
        (write(other, tmp_path / "other.pth"), "Is it another variant's"),
        (b0_delta, "is a delta already"),
        (tmp_path, "it is a folder"),
    ):
        assert said in convert(file, "-o", tmp_path / "out.safetensors", status=1)[1]
    assert not (tmp_path / "out.safetensors").exists()


def test_an_untuned_checkpoint_is_told_of(tmp_path: Path):
    cli("merge", "b0", "--delta", "backbone", "-o", tmp_path / "a.pth")
    assert "nothing was tuned" in convert(tmp_path / "a.pth", "-o", tmp_path / "out.safetensors")[0]


def test_the_preprocessing_goes_along(tuned, tmp_path: Path):
    convert(write(tuned[1], tmp_path / "a.pth"), "-o", tmp_path / "d.safetensors", "--size", 256, "--crop-pct", 0.9)
    model = fixefficientnet.create("b0", tmp_path / "d.safetensors")
    assert (model.preprocess.size, model.preprocess.crop_pct) == (256, 0.9)
    assert delta.load(tmp_path / "d.safetensors").recipe["converted_from"] == "a.pth"
    cli("merge", "b0", "--delta", tmp_path / "d.safetensors", "-o", tmp_path / "folder")
    put_folder_in_cache(tmp_path / "hub", "me/merged", tmp_path / "folder")
    plain = timm.create_model("hf-hub:me/merged", pretrained=True, cache_dir=tmp_path / "hub")
    config = timm.data.resolve_model_data_config(plain)
    assert (tuple(config["input_size"]), config["crop_pct"]) == ((3, 256, 256), 0.9)
    _, err = convert(tmp_path / "a.pth", "-o", tmp_path / "e.safetensors", "--crop-pct", 2, status=1)
    assert "crop_pct: must be a number in (0, 1], is 2.0" in err


def test_a_full_disk_is_one_error_and_leaves_nothing(tuned, tmp_path: Path, b0_delta: Path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = write(tuned[1], tmp_path / "a.pth")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # files of a megabyte are full
    try:
        said = [convert(path, "-o", tmp_path / "out.safetensors", status=1)[1]]
        for name in ("out.safetensors", "out.pth", "folder"):
            said.append(cli("merge", "b0", "--delta", b0_delta, "-o", tmp_path / name, status=1)[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    for text in said:
        *remarks, line = text.splitlines()
        assert line.startswith("Error: ") and str(tmp_path) in line
        assert all("is not pinned" in remark for remark in remarks)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_another_architecture_is_refused(tuned, tmp_path: Path):
    path = write(timm.create_model("test_efficientnet").state_dict(), tmp_path / "a.safetensors")
    _, err = convert(path, "-o", tmp_path / "out.safetensors", status=1)
    assert "is no checkpoint of tf_efficientnet_b0" in err
    assert not (tmp_path / "out.safetensors").exists()


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tuned, tmp_path: Path):
    torch.save({"model": tuned[1], "args": Evil(tmp_path / "owned")}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    for name in ("a.pth", "b.pth"):
        _, err = convert(tmp_path / name, "-o", tmp_path / "out.safetensors", status=1)
        assert "other pickled objects are never loaded" in err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pth", "b.pth"]


def test_bad_files_are_one_error(tuned, tmp_path: Path):
    (tmp_path / "text.pth").write_text("no checkpoint")
    write(tuned[1], tmp_path / "whole.safetensors")
    half = (tmp_path / "whole.safetensors").read_bytes()[:100_000]
    (tmp_path / "half.safetensors").write_bytes(half)
    torch.save({"model": {"a": 3}}, tmp_path / "number.pth")
    for name in ("text.pth", "half.safetensors", "number.pth", "nowhere.pth", "."):
        assert "Error:" in convert(tmp_path / name, "-o", tmp_path / "out.safetensors", status=1)[1]
    assert not (tmp_path / "out.safetensors").exists()


def test_a_target_that_is_there_is_kept(tuned, tmp_path: Path, b0_delta: Path):
    path = write(tuned[1], tmp_path / "a.pth")
    for name in ("out.pth", "out.safetensors"):
        (tmp_path / name).write_text("precious")
    _, err = convert(path, "-o", tmp_path / "out.safetensors", status=1)
    assert "is there already" in err and "--overwrite" in err
    assert (tmp_path / "out.safetensors").read_text() == "precious"
    for name in ("out.pth", "out"):
        assert "the ending of such a file is" in convert(path, "-o", tmp_path / name, status=1)[1]
    assert "the ending of such a file is" in cli("merge", "b0", "-o", tmp_path / "model.pt", status=1)[1]
    assert "--overwrite" in cli("merge", "b0", "--delta", b0_delta, "-o", tmp_path / "out.pth", status=1)[1]
    assert "--overwrite" in cli("merge", "b0", "--delta", b0_delta, "-o", tmp_path, status=1)[1]
    assert (tmp_path / "out.pth").read_text() == "precious"
    cli("merge", "b0", "--delta", b0_delta, "-o", tmp_path / "out.pth", "--overwrite")
    assert torch.load(tmp_path / "out.pth", weights_only=True)


def test_a_target_that_cannot_be_written(tuned, tmp_path: Path, b0_delta: Path):
    (tmp_path / "file").touch()
    for name in ("a.safetensors", "a.pth", "folder"):
        _, err = cli("merge", "b0", "--delta", b0_delta, "-o", tmp_path / "file" / name, status=1)
        assert "Error:" in err and "file" in err


PLAIN = """
import sys, timm, torch
images, output, *models = sys.argv[1:]
found = []
for name, checkpoint in zip(models[::2], models[1::2]):
    model = timm.create_model(name, pretrained=":" in name, checkpoint_path=checkpoint)
    found.append((model.eval()(torch.load(images)), timm.data.resolve_model_data_config(model)))
assert "fixefficientnet" not in sys.modules
torch.save(found, output)
"""


def test_plain_timm_loads_what_was_merged(tmp_path: Path, b0_delta: Path, images):
    for name in ("model.safetensors", "model.pth", "folder"):
        out, _ = cli("merge", "b0", "--delta", b0_delta, "-o", tmp_path / name)
        assert "timm.create_model(" in out
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    # the tuned weights are one's own, and of the repository of the original FixRes they have nothing
    assert config["pretrained_cfg"]["origin_url"] == "https://huggingface.co/timm/tf_efficientnet_b0.ap_in1k"
    put_folder_in_cache(tmp_path / "hub", "me/merged", tmp_path / "folder")  # after its upload and download
    models = [["tf_efficientnet_b0", str(tmp_path / name)] for name in ("model.safetensors", "model.pth")]
    models += [["hf-hub:me/merged", ""]]
    models += [[f"local-dir:{tmp_path / 'folder'}", ""]] if TIMM_HAS_LOCAL_DIR else []
    torch.save(images, tmp_path / "images")
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "images"), str(tmp_path / "found")]
    command += [text for model in models for text in model]
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | offline)
    ours = fixefficientnet.create("b0", b0_delta)
    test = ours.preprocess
    for (name, _), (logits, config) in zip(models, torch.load(tmp_path / "found", weights_only=True), strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(logits, ours(images))
        if ":" in name:
            assert (tuple(config["input_size"]), config["crop_pct"]) == ((3, test.size, test.size), test.crop_pct)
            assert (tuple(config["mean"]), tuple(config["std"])) == (test.mean, test.std)
            assert config["interpolation"] == test.interpolation


def test_there_and_back_is_the_same_delta(tmp_path: Path, b0_delta: Path):
    cli("merge", "b0", "--delta", b0_delta, "-o", tmp_path / "whole.safetensors")
    convert(tmp_path / "whole.safetensors", "-o", tmp_path / "delta.safetensors")
    before, after = delta.load(b0_delta), delta.load(tmp_path / "delta.safetensors")
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())
    assert before.fingerprint == after.fingerprint
