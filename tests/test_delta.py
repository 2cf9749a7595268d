import dataclasses
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from conftest import Network, lively, tuned_delta

import fixefficientnet
from fixefficientnet import delta, manifest, zoo
from fixefficientnet._internal import meta_device
from fixefficientnet.errors import (
    ChecksumError,
    DeltaFormatError,
    DeltaMismatchError,
    UnsupportedModelError,
)

FAMILIES = """
resnet50 resnet18 resnet50d resnext50_32x4d seresnet50 wide_resnet50_2 res2net50_26w_4s skresnet18 resnetv2_50
tf_efficientnet_b0 tf_efficientnet_lite0 efficientnetv2_rw_s mobilenetv3_large_100 mobilenetv2_100 regnety_008
densenet121 vgg16_bn inception_v3 legacy_xception xception41 pnasnet5large dpn68 dla34 hrnet_w18 cspresnet50
darknet53 ghostnet_100 tresnet_m vovnet39a rexnet_100 hgnetv2_b0 convmixer_768_32 test_efficientnet
""".split()


@pytest.mark.parametrize("name", FAMILIES)
def test_head_is_what_runs_last_before_the_pooling(name: str):
    """Against the order in which a forward pass really calls the modules."""
    called = []
    model: Network = meta_device.without_weights(name).eval()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda module, i, o, path=path: called.append((path, module)))
    with torch.device("meta"):
        model(torch.empty(1, *model.pretrained_cfg["input_size"]))
    pooling = max(i for i, (path, _) in enumerate(called) if path.endswith(("global_pool", "pooling")))
    norms = [path for path, module in called[:pooling] if isinstance(module, torch.nn.BatchNorm2d)]
    classifier = [path for path, module in called if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)][-1]
    head = delta.find_head(model)
    assert head.norm == norms[-1]
    assert head.classifier == classifier == model.pretrained_cfg["classifier"]


def test_head_leaves_shortcuts_out():
    model = meta_device.without_weights("resnet10t")  # one block per stage, its shortcut registered last
    assert delta.find_head(model).norm == "layer4.0.bn2"


@pytest.mark.parametrize("key", manifest.load())
def test_head_of_every_variant_is_the_zoos(key: str):
    assert delta.find_head(fixefficientnet.create(key, device="meta")) == zoo.HEAD


@pytest.mark.parametrize("name", ["repvit_m0_9", "efficientvit_m0"])
def test_head_norm_is_never_one_after_the_pooling(name: str):
    """These pool without a module of that name, and have batch norms over pooled features or tokens."""
    model = meta_device.without_weights(name)
    try:
        norm = model.get_submodule(delta.find_head(model).norm or "")
    except UnsupportedModelError:
        return
    assert isinstance(norm, torch.nn.BatchNorm2d)


OTHER_NORMS = {
    "convnext_atto": "head.norm",
    "vit_tiny_patch16_224": "norm",
    "vit_base_patch16_rpn_224": "fc_norm",
    "deit3_small_patch16_224": "norm",
    "beit_base_patch16_224": "fc_norm",
    "eva02_tiny_patch14_336": "fc_norm",
    "swin_tiny_patch4_window7_224": "norm",
    "swinv2_cr_tiny_224": "stages.3.blocks.1.norm3",
    "maxvit_pico_rw_256": "norm",
    "mixer_s32_224": "norm",
    "pvt_v2_b0": "stages.3.norm",
    "gcvit_xxtiny": "stages.3.norm",
    "caformer_s18": "head.fc.norm",
    "poolformer_s12": "head.norm",
    "xcit_nano_12_p16_224": "norm",
    "test_efficientnet_gn": "bn2",
    "test_efficientnet_evos": "bn2",
}


@pytest.mark.parametrize(("name", "expected"), OTHER_NORMS.items())
def test_all_that_reaches_the_classifier_passes_the_last_norm(name: str, expected: str):
    """Against gradients of a forward pass: none get past the norm's output; and no other norm comes after it."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model: Network = meta_device.without_weights(name).eval().requires_grad_(False)
    head = delta.find_head(model)
    assert head.norm == expected
    assert head.classifier == model.pretrained_cfg["classifier"]
    called, reached = [], []
    for path, module in model.named_modules():
        if "Norm" in type(module).__name__ and hasattr(module, "weight"):
            module.register_forward_hook(lambda module, i, o, path=path: called.append(path))
    model.get_submodule(head.norm).register_forward_hook(lambda module, i, o: o.detach())
    model.get_submodule(head.classifier).register_forward_pre_hook(lambda module, i: reached.append(i[0]))
    with torch.device("meta"):
        model(torch.empty(1, *model.pretrained_cfg["input_size"], requires_grad=True))
    assert called[-1] == head.norm
    assert [features.requires_grad for features in reached] == [False]


@pytest.mark.parametrize("name", ["vgg11", "nf_resnet26"])
def test_a_network_without_norm_has_a_classifier_alone(name: str):
    model: Network = meta_device.without_weights(name)
    head = delta.find_head(model)
    assert (head.norm, head.classifier) == (None, model.pretrained_cfg["classifier"])
    assert set(head.select(model.state_dict())) == {f"{head.classifier}.weight", f"{head.classifier}.bias"}


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_networks_of_two_classifiers_are_refused(name: str):
    with pytest.raises(UnsupportedModelError, match="has 2 classifiers, whose logits it joins"):
        delta.find_head(meta_device.without_weights(name))


def test_model_without_classifier_is_refused():
    with pytest.raises(UnsupportedModelError, match="no classifier"):
        delta.find_head(meta_device.without_weights("resnet18", num_classes=0))


def test_a_classifiers_name_that_is_none_is_passed_over():
    """As a repository's config.json may tell it."""
    model: Network = meta_device.without_weights("test_efficientnet")
    model.pretrained_cfg = dict(model.pretrained_cfg, classifier=5)
    assert delta.find_classifier(model) == "classifier"


def tiny(name: str = "test_efficientnet") -> Network:
    torch.manual_seed(0)
    return lively(timm.create_model(name, num_classes=7))


@pytest.fixture
def tuned() -> delta.Delta:
    model = tiny()
    base = {k: t.clone() for k, t in model.state_dict().items()}
    for tensor in delta.find_head(model).select(model.state_dict()).values():
        tensor.mul_(1.25)
    return delta.extract(model, base=base, variant="tiny", backbone="test_efficientnet", recipe={"lr": 0.1, "a": [1]})


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "resnet18", "test_convnext", "test_vit"])
def test_extract_save_load_apply_gives_the_tuned_model(name: str, tmp_path: Path):
    model = tiny(name)
    base = {k: t.clone() for k, t in model.state_dict().items()}
    for tensor in delta.find_head(model).select(model.state_dict()).values():
        tensor.mul_(1.25)
    x = torch.rand(2, 3, 64, 64)
    expected = model(x)
    delta.save(delta.extract(model, base=base, variant="v", backbone=name), tmp_path / "d.safetensors")
    fresh = tiny(name)
    assert not torch.equal(fresh(x), expected)
    delta.apply(fresh, delta.load(tmp_path / "d.safetensors"))
    assert torch.equal(fresh(x), expected)


def test_file_holds_the_head_and_its_story(tuned: delta.Delta, tmp_path: Path):
    sha256 = delta.save(tuned, tmp_path / "d.safetensors")
    assert sha256 == hashlib.sha256((tmp_path / "d.safetensors").read_bytes()).hexdigest()
    with safetensors.safe_open(tmp_path / "d.safetensors", "pt") as file:
        assert set(file.keys()) == {
            *(f"bn2.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")),
            *("classifier.weight", "classifier.bias"),
        }
        metadata = file.metadata()
    assert list(metadata) == ["fixefficientnet-delta"]
    told = json.loads(metadata["fixefficientnet-delta"])
    assert list(told) == sorted(told)
    assert told["format_version"] == 2
    assert told["recipe"] == {"lr": 0.1, "a": [1]}
    assert set(told["libraries"]) == {"torch", "timm", "safetensors"}
    loaded = delta.load(tmp_path / "d.safetensors", sha256=sha256)
    assert dataclasses.replace(loaded, tensors={}) == dataclasses.replace(tuned, tensors={})
    assert list(tmp_path.iterdir()) == [tmp_path / "d.safetensors"]


def test_bytes_are_the_same_in_every_process(tmp_path: Path):
    code = """
import sys, timm, torch
from fixefficientnet import delta
torch.manual_seed(0)
model = timm.create_model("test_efficientnet", num_classes=7)
recipe = {key: 1 for key in sys.argv[1:]}
base = {k: t.clone() for k, t in model.state_dict().items()}
print(delta.save(delta.extract(model, base=base, variant="v", backbone="b", recipe=recipe), "d"))
"""
    seen = {
        subprocess.run(
            [sys.executable, "-c", code, *keys],
            cwd=tmp_path,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for keys, seed in ((("x", "y", "z"), "0"), (("z", "y", "x"), "1"))
    }
    assert len(seen) == 1


def test_failed_write_leaves_the_old_file_and_no_other(
    tuned: delta.Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "d.safetensors"
    target.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        delta.save(tuned, target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_wrong_sha256_names_both(tuned: delta.Delta, tmp_path: Path):
    found = delta.save(tuned, tmp_path / "d.safetensors")
    with pytest.raises(ChecksumError, match=f"{found}.*{'0' * 64}"):
        delta.load(tmp_path / "d.safetensors", sha256="0" * 64)


def test_another_backbone_is_refused_and_left_alone(tuned: delta.Delta):
    other = tiny()
    other.bn2.running_mean[3] += 1e-6
    before = {k: t.clone() for k, t in other.state_dict().items()}
    with pytest.raises(DeltaMismatchError, match=r"another backbone.*Use the original weights of test_efficientnet"):
        delta.apply(other, tuned)
    assert all(torch.equal(t, before[k]) for k, t in other.state_dict().items())


def test_applied_twice_is_refused(tuned: delta.Delta):
    model = tiny()
    delta.apply(model, tuned)
    with pytest.raises(DeltaMismatchError, match="another backbone"):
        delta.apply(model, tuned)


def changed(tuned: delta.Delta, **tensors: torch.Tensor | None) -> delta.Delta:
    merged = dict(tuned.tensors) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return dataclasses.replace(tuned, tensors={k: t for k, t in merged.items() if t is not None})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bn2__running_var": None}, "lacks bn2.running_var"),
        ({"bn1__weight": torch.ones(3)}, "has bn1.weight, which"),
        ({"classifier__weight": torch.ones(8, 256)}, r"classifier.weight has the shape \[8, 256\]"),
    ],
)
def test_other_tensors_are_refused(tuned: delta.Delta, change: dict[str, Any], said: str):
    with pytest.raises(DeltaMismatchError, match=said):
        delta.apply(tiny(), changed(tuned, **change))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.full((7,), float("nan")), "classifier.bias has NaN or Inf"),
        (torch.full((7,), float("inf")), "classifier.bias has NaN or Inf"),
        (torch.zeros(7, dtype=torch.float16), "classifier.bias is float16, must be float32"),
        (torch.zeros(7, dtype=torch.int64), "classifier.bias is int64"),
    ],
)
def test_unusable_values_are_refused(tuned: delta.Delta, tmp_path: Path, value: torch.Tensor, said: str):
    (tmp_path / "d").write_bytes(delta.dumps(changed(tuned, classifier__bias=value)))
    with pytest.raises(DeltaFormatError, match=said):
        delta.load(tmp_path / "d")


def test_nan_is_not_extracted():
    model = tiny()
    base = {k: t.clone() for k, t in model.state_dict().items()}
    model.classifier.bias.data[0] = float("nan")
    with pytest.raises(DeltaFormatError, match="NaN"):
        delta.extract(model, base=base, variant="v", backbone="b")


def test_base_that_changed_along_is_refused():
    model = tiny()
    with pytest.raises(DeltaMismatchError, match="clone the state dict before tuning"):
        delta.extract(model, base=model.state_dict(), variant="v", backbone="b")


def test_negative_variance_is_refused(tuned: delta.Delta, tmp_path: Path):
    variance = tuned.tensors["bn2.running_var"].clone()
    variance[0] = -1
    (tmp_path / "d").write_bytes(delta.dumps(changed(tuned, bn2__running_var=variance)))
    with pytest.raises(DeltaFormatError, match=r"bn2.running_var has a negative variance"):
        delta.load(tmp_path / "d")


@pytest.mark.parametrize("change", [{"license": None}, {"measured": {"top1": float("nan")}}, {"recipe": {"f": print}}])
def test_what_could_not_be_read_again_is_not_written(tuned: delta.Delta, tmp_path: Path, change: dict[str, Any]):
    with pytest.raises(DeltaFormatError, match=next(iter(change))):
        delta.save(dataclasses.replace(tuned, **change), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_save_makes_the_folder(tuned: delta.Delta, tmp_path: Path):
    delta.save(tuned, tmp_path / "runs" / "tiny" / "delta.safetensors")
    assert delta.load(tmp_path / "runs" / "tiny" / "delta.safetensors").variant == "tiny"


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and its tensors' bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def with_metadata(tuned: delta.Delta, **change: object) -> bytes:
    """A delta file whose own metadata was changed; None takes a key away."""
    header, body = parts(delta.dumps(tuned))
    told = json.loads(header["__metadata__"]["fixefficientnet-delta"]) | change
    told = {key: value for key, value in told.items() if value is not None}
    return joined(header | {"__metadata__": {"fixefficientnet-delta": json.dumps(told)}}, body)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 3}, r"version 3, this release reads 2.*Upgrade"),
        ({"format_version": 1}, r"version 1, this release reads 2.*Make the delta again"),
        ({"format_version": "2"}, r"metadata.format_version: must be one of 2, is '2'"),
        ({"fingerprint": None}, "metadata: lacks the key fingerprint"),
        ({"fingerprint": "abc"}, "metadata.fingerprint: must be 64"),
        ({"recipe": [1]}, "metadata.recipe: must be an object"),
        ({"libraries": {"torch": 2}}, "metadata.libraries.torch: must be a non-empty string"),
        ({"colour": "red"}, "metadata: has the unknown key colour"),
        ({"license": "mit"}, "was damaged or changed after it was written"),
        ({"recipe": {"lr": 0.2}}, "was damaged or changed after it was written"),
        ({"measured": {"top1": float("nan")}}, "is not JSON: NaN is no JSON"),
    ],
)
def test_other_metadata_is_refused(tuned: delta.Delta, tmp_path: Path, change: dict[str, Any], said: str):
    (tmp_path / "d").write_bytes(with_metadata(tuned, **change))
    assert delta.is_delta(tmp_path / "d")
    with pytest.raises(DeltaFormatError, match=said):
        delta.load(tmp_path / "d")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "9" * 5000, "[1]", "null"])
def test_metadata_that_is_no_json_object_is_refused(tuned: delta.Delta, tmp_path: Path, text: str):
    header, body = parts(delta.dumps(tuned))
    (tmp_path / "d").write_bytes(joined(header | {"__metadata__": {"fixefficientnet-delta": text}}, body))
    with pytest.raises(DeltaFormatError, match=r"is not JSON|metadata: must be an object"):
        delta.load(tmp_path / "d")


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_other_safetensors_files_are_no_deltas(tuned: delta.Delta, tmp_path: Path, metadata: dict[str, Any]):
    safetensors.torch.save_file(dict(tuned.tensors), tmp_path / "d", metadata)
    assert not delta.is_delta(tmp_path / "d")
    with pytest.raises(DeltaFormatError, match="not a FixRes delta"):
        delta.load(tmp_path / "d")


def test_a_delta_of_version_1_is_known_and_refused(tuned: delta.Delta, tmp_path: Path):
    metadata = {"format": "fixefficientnet-delta", "format_version": "1", "variant": "tiny", "recipe": "{}"}
    safetensors.torch.save_file(dict(tuned.tensors), tmp_path / "d", metadata)
    assert delta.is_delta(tmp_path / "d")
    with pytest.raises(DeltaFormatError, match=r"version 1, this release reads 2\. Make the delta again"):
        delta.load(tmp_path / "d")


def test_keys_that_json_turns_into_text_can_be_read_again(tuned: delta.Delta):
    data = delta.dumps(dataclasses.replace(tuned, recipe={"steps": {10: "b", 9: "a"}, "sizes": (32, 48)}))
    found = delta.loads(data, source="d").recipe
    assert found == {"steps": {"10": "b", "9": "a"}, "sizes": [32, 48]}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file that differs from the delta `data` by one accident."""
    header, body = parts(data)
    kind = rng.choice(["bit", "bit in header", "bit in body", "cut", "block", "swap", "metadata", "append"])
    start = {"bit in header": (8, len(data) - len(body)), "bit in body": (len(data) - len(body), len(data))}
    if kind.startswith("bit"):
        place = rng.randrange(*start.get(kind, (0, len(data))))
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == "cut":
        return data[: rng.randrange(len(data))]
    if kind == "append":
        return data + rng.randbytes(rng.randrange(1, 9))
    if kind == "block":
        place, length = rng.randrange(len(data)), rng.randrange(1, 65)
        return data[:place] + bytes(len(data[place : place + length])) + data[place + length :]
    if kind == "swap":  # two tensors change their names
        same = [name for name in header if name.startswith("bn2.")]
        one, other = rng.sample(same, 2)
        return joined(header | {one: header[other], other: header[one]}, body)
    told = header["__metadata__"]["fixefficientnet-delta"]
    place = rng.randrange(len(told))
    told = told[:place] + chr(rng.randrange(32, 127)) + told[place + 1 :]
    return joined(header | {"__metadata__": {"fixefficientnet-delta": told}}, body)


def test_no_changed_file_loads_as_another_delta(tuned: delta.Delta):
    """Without a pinned hash: none of 2,000 changed files loads with other tensors or other metadata."""
    data, rng, loaded = delta.dumps(tuned), random.Random(0), 0
    for number in range(2000):
        changed_data = mutated(data, rng)
        try:
            found = delta.loads(changed_data, source=str(number))
        except DeltaFormatError:
            continue
        loaded += 1  # what has no meaning changed, such as a blank
        assert dataclasses.replace(found, tensors={}) == dataclasses.replace(tuned, tensors={})
        assert found.tensors.keys() == tuned.tensors.keys()
        assert all(t.numpy().tobytes() == tuned.tensors[k].numpy().tobytes() for k, t in found.tensors.items())
    assert loaded < 200


def test_damaged_bytes_never_pass(tuned: delta.Delta, tmp_path: Path):
    data = delta.dumps(tuned)
    path = tmp_path / "d"
    lengths = {0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1}
    damaged = [data[:length] for length in lengths]
    damaged += [b"\xff" * 8 + data[8:], data[:8] + b"[" + data[9:], data + b"\0", b"{}" * 50]
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(DeltaFormatError, match=str(path)):
            delta.load(path)
    with pytest.raises(DeltaFormatError, match="cannot be read"):
        delta.load(tmp_path / "missing")


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": None},
        {"__metadata__": {}, "a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}},
        {"__metadata__": {}, "a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
        {"__metadata__": {}, "a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}},
        [],
    ],
    ids=str,
)
def test_odd_headers_never_pass(tmp_path: Path, header: object):
    text = json.dumps(header).encode()
    (tmp_path / "d").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(DeltaFormatError):
        delta.load(tmp_path / "d")


def test_full_checkpoint_is_no_delta(tmp_path: Path):
    safetensors.torch.save_file(tiny().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(DeltaFormatError, match="full checkpoint"):
        delta.load(tmp_path / "model.safetensors")


def test_delta_for_the_zoo_says_which(hub_cache: Path):
    model = fixefficientnet.create("b0", "backbone", cache_dir=hub_cache)
    assert tuned_delta(model, "b0").backbone == "tf_efficientnet_b0.ap_in1k"
