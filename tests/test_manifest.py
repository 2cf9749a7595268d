import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import timm
import torch
from conftest import ROOT, python_path
from packaging.version import Version

import fixefficientnet
from fixefficientnet import manifest
from fixefficientnet.errors import ManifestError, UnknownVariantError

pytestmark = pytest.mark.newest

# The paper's Tables 1 and 2 (arXiv 2003.08237), typed from it anew:
# key, millions of parameters, train size, base test size, top-1, top-5, Fix test size, top-1, top-5
PAPER = """
b0_ns 5.3 224 224 78.8 94.5 320 80.2 95.4
b1_ns 7.8 240 240 81.5 95.8 384 82.6 96.5
b2_ns 9.2 260 260 82.4 96.3 420 83.6 96.9
b3_ns 12 300 300 84.1 96.9 472 85.0 97.4
b4_ns 19 380 380 85.3 97.5 472 85.9 97.7
b5_ns 30 456 456 86.1 97.8 576 86.4 97.9
b6_ns 43 528 528 86.4 97.9 680 86.7 98.0
b7_ns 66 600 600 86.9 98.1 632 87.1 98.2
l2 480 475 800 88.4 98.7 600 88.5 98.7
b0 5.3 224 224 77.6 93.3 320 79.3 94.6
b1 7.8 240 240 79.6 94.3 384 81.3 95.7
b2 9.2 260 260 80.5 95.0 420 82.0 96.0
b3 12 300 300 81.9 95.6 472 83.0 96.4
b4 19 380 380 83.3 96.4 512 84.0 97.0
b5 30 456 456 84.3 97.0 576 84.7 97.2
b6 43 528 528 84.8 97.1 576 84.9 97.3
b7 66 600 600 85.2 97.2 632 85.3 97.4
b8 87.4 672 672 85.5 97.3 800 85.7 97.6
"""


def rows() -> dict[str, Any]:
    return json.loads((ROOT / "weights_manifest.json").read_text())


def overlay(monkeypatch: pytest.MonkeyPatch, **variants: dict[str, Any]) -> None:
    monkeypatch.setenv("FIXEFFICIENTNET_MANIFEST", json.dumps({"schema_version": 1, "variants": variants}))


SCHEMA = ROOT / "weights_manifest.schema.json"
WRITE_SCHEMA = (
    'python -c "import json; from fixefficientnet import manifest; print(json.dumps(manifest.schema(), indent=2))" '
    "> weights_manifest.schema.json"
)
WEIGHTS = {
    "repository": "org/fixeffnet",
    "filename": "b0.safetensors",
    "revision": "a" * 40,
    "sha256": "b" * 64,
    "bytes": 5_140_000,
    "license": "apache-2.0",
    "measured": {"dataset": "imagenet-1k/validation", "images": 50_000, "top1": 79.3, "top5": 94.6},
}


def satisfies_schema(document: dict[str, Any]) -> bool:
    return jsonschema.Draft202012Validator(manifest.schema()).is_valid(document)


def test_schema_file_is_the_readers():
    assert json.loads(SCHEMA.read_text()) == manifest.schema(), f"the schema is stale; write it: {WRITE_SCHEMA}"


def test_schemas_command_writes_it(tmp_path: Path):
    assert str(SCHEMA.name) in WRITE_SCHEMA
    env = os.environ | {"PYTHONPATH": python_path(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(WRITE_SCHEMA, shell=True, cwd=tmp_path, env=env, check=True)
    assert (tmp_path / SCHEMA.name).read_bytes() == SCHEMA.read_bytes()


def test_manifest_satisfies_its_schema():
    jsonschema.Draft202012Validator.check_schema(manifest.schema())
    assert satisfies_schema(rows())


def test_schema_accepts_a_published_row_and_refuses_an_unpinned_one():
    document = rows()
    document["variants"]["b0"]["weights"] = dict(WEIGHTS)
    assert satisfies_schema(document)
    weights = manifest.parse(document)["b0"].weights
    assert isinstance(weights, manifest.Weights) and weights.measured is not None
    assert weights.measured.top1 == 79.3
    document["variants"]["b0"]["weights"]["revision"] = "main"
    assert not satisfies_schema(document)


def test_figures_are_the_papers():
    expected = {}
    for line in PAPER.split("\n")[1:-1]:
        key, *figures = line.split()
        expected[key] = [float(figure) for figure in figures]
    found = {
        v.key: [
            v.paper.parameters_millions,
            v.train_size,
            *(v.paper.base.test_size, v.paper.base.top1, v.paper.base.top5),
            *(v.paper.fix.test_size, v.paper.fix.top1, v.paper.fix.top5),
        ]
        for v in manifest.load().values()
        if v.paper
    }
    assert found == expected
    assert {v.paper and v.paper.table for v in manifest.load().values() if v.family == "noisy_student"} == {1}
    assert {v.paper and v.paper.table for v in manifest.load().values() if v.family == "advprop"} == {2}


@pytest.mark.parametrize("key", manifest.load())
def test_row_agrees_with_timm(key: str):
    variant = fixefficientnet.info(key)
    cfg = timm.get_pretrained_cfg(variant.backbone.name)
    assert cfg is not None
    assert cfg.hf_hub_id == variant.backbone.repository
    if cfg.license or Version(timm.__version__) >= Version("1.0.31"):  # older releases of timm do not tell
        assert cfg.license == variant.backbone.license
    assert cfg.mean == variant.test.mean
    assert cfg.std == variant.test.std
    assert cfg.interpolation == variant.test.interpolation
    assert cfg.input_size[-1] == variant.train_size
    with torch.device("meta"):
        model = timm.create_model(variant.backbone.name)
    assert sum(p.numel() for p in model.parameters()) == variant.parameters
    if variant.paper:
        assert variant.parameters / 1e6 == pytest.approx(variant.paper.parameters_millions, abs=0.5)
        assert variant.test.size == variant.paper.fix.test_size
        assert variant.test.crop_pct == 1.0


def test_there_are_18_models_of_the_paper_and_others_say_that_they_are_none():
    variants = manifest.load().values()
    assert sum(v.paper is not None for v in variants) == 18
    ours = [v for v in variants if v.paper is None]
    assert {"lite0", "lite1", "lite2"} <= {v.key for v in ours}
    assert all(v.backbone_only and "not from the paper" in (v.note or "").lower() for v in ours)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("b4", "b4"),
        ("b4_ap", "b4"),
        ("B4-NS", "b4_ns"),
        ("l2_ns", "l2"),
        ("fixefficientnet_b4_ns", "b4_ns"),
        ("fixefficientnet_b4_ap", "b4"),
        ("FixEfficientNet-B4", "b4"),
        ("FixEfficientNet-L2", "l2"),
        ("fixefficientnet_b4.ns_jft_in1k", "b4_ns"),
        ("fixefficientnet_l2.ns_jft_in1k_475", "l2"),
        ("tf_efficientnet_b8.ap_in1k", "b8"),
        ("fixefficientnet_lite0.in1k", "lite0"),
    ],
)
def test_aliases(name: str, key: str):
    assert fixefficientnet.info(name).key == key


def test_no_name_means_two_variants():
    names = [alias for v in manifest.load().values() for alias in v.aliases()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("name", "close"), [("b4_nss", "b4_ns"), ("efficientnet_b3", "b3"), ("b9", "b8")])
def test_unknown_name_gets_the_closest(name: str, close: str):
    with pytest.raises(UnknownVariantError, match=rf"{name}.*\b{close}\b"):
        fixefficientnet.info(name)


def test_list_models_filters():
    assert fixefficientnet.list_models()[:2] == ["b0", "b1"]
    assert fixefficientnet.list_models("*_ns") == [f"b{i}_ns" for i in range(8)]
    assert fixefficientnet.list_models(pretrained=True) == []


def bad(**change: object) -> dict[str, Any]:
    """A document whose row b0 has the keys at these paths (dots as double underscores) replaced."""
    document = rows()
    for path, value in change.items():
        *parents, last = path.split("__")
        place = document["variants"]["b0"]
        for parent in parents:
            place = place[parent]
        if value is KeyError:
            del place[last]
        else:
            place[last] = value
    return document


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"title": KeyError}, "b0: lacks the key title"),
        ({"title": " "}, "b0.title: must be a non-empty string"),
        ({"colour": "red"}, "b0: has the unknown key colour; the known ones are title, family"),
        ({"key": "b1"}, "b0: has the unknown key key"),
        ({"family": "imagenet21k"}, "b0.family: must be one of"),
        ({"parameters": "5M"}, "b0.parameters: must be a whole number"),
        ({"parameters": True}, "b0.parameters"),
        ({"train_size": 0}, "b0.train_size"),
        ({"test": None}, "b0.test: must be an object, is null"),
        ({"test__size": 320.5}, "b0.test.size"),
        ({"test__size": 65536}, "b0.test.size"),
        ({"test__crop_pct": 1.5}, "b0.test.crop_pct"),
        ({"test__crop_pct": 10**400}, "b0.test.crop_pct"),
        ({"test__interpolation": "nearest"}, "b0.test.interpolation"),
        ({"test__mean": [0.5, 0.5]}, "b0.test.mean: must be a list of three"),
        ({"test__std": [0.5, 0.5, 0]}, r"b0.test.std\[2\]"),
        ({"paper__table": 3}, "b0.paper.table"),
        ({"paper__fix__top1": 179.3}, "b0.paper.fix.top1"),
        ({"backbone__name": "../b0"}, "b0.backbone.name"),
        ({"backbone__repository": "timm"}, "b0.backbone.repository"),
        ({"backbone__repository": "timm/.."}, "b0.backbone.repository"),
        ({"backbone__filename": "../../model.safetensors"}, "b0.backbone.filename"),
        ({"backbone__filename": "a/../model.safetensors"}, "b0.backbone.filename"),
        ({"backbone__filename": "/etc/model.safetensors"}, "b0.backbone.filename"),
        ({"backbone__filename": "c:model.safetensors"}, "b0.backbone.filename"),
        ({"backbone__filename": "..\\model.safetensors"}, "b0.backbone.filename"),
        ({"backbone__filename": "pytorch_model.bin"}, "b0.backbone.filename: must be a .safetensors"),
        ({"backbone__sha256": "abc"}, "b0.backbone.sha256: must be 64"),
        ({"backbone__sha256": "a" * 64 + "b"}, "b0.backbone.sha256: must be 64"),
        ({"backbone__package": {"name": "p", "filename": "..", "sha256": "a" * 64}}, "b0.backbone.package.filename"),
        ({"weights": {"repository": "o/r"}}, "b0.weights: lacks the key bytes, filename, license, measured, revision"),
        ({"weights": WEIGHTS | {"revision": "main"}}, "b0.weights.revision: must be 40"),
        ({"weights": WEIGHTS | {"filename": "b0.pth"}}, "b0.weights.filename: must be a .safetensors"),
        ({"weights": WEIGHTS | {"bytes": None}}, "b0.weights.bytes: must be a whole number above 0, is null"),
        ({"weights": {"path": "x.safetensors", "sha256": "a" * 64}}, "b0.weights: has the unknown key path; the known"),
    ],
)
def test_malformed_row_is_named(change: dict[str, Any], said: str):
    document = bad(**change)
    with pytest.raises(ManifestError, match=said):
        manifest.parse(document)
    assert not satisfies_schema(document)


def test_number_that_json_has_not_is_refused():
    with pytest.raises(ManifestError, match=r"b0.test.crop_pct: must be a number in \(0, 1\], is nan"):
        manifest.parse(bad(test__crop_pct=float("nan")))


@pytest.mark.parametrize("key", ["B0", "b0__ns", "_b0", "b0-ns", "b0\n", ""])
def test_malformed_key_is_named(key: str):
    document = {"schema_version": 1, "variants": {key: rows()["variants"]["b0"]}}
    with pytest.raises(ManifestError, match="variants: each key: must be"):
        manifest.parse(document)
    assert not satisfies_schema(document) or key.endswith("\n")  # Python's own $ lets a last line break through


def test_unpinned_weights_are_refused(tmp_path: Path):
    weights = {"repository": "o/r", "filename": "b0.safetensors", "revision": "main", "sha256": "a" * 64}
    document = {"schema_version": 1, "variants": {"b0": {"weights": weights}}}
    with pytest.raises(ManifestError, match=r"mine: variants.b0.weights.revision: must be 40"):
        manifest.parse_overlay(document, folder=tmp_path, source="mine")


def test_another_schema_version_is_refused():
    with pytest.raises(ManifestError, match="schema_version: is 2"):
        manifest.parse(rows() | {"schema_version": 2})


def test_overlay_as_json_publishes_a_row(monkeypatch: pytest.MonkeyPatch):
    weights = {"repository": "me/mine", "filename": "w/b4.safetensors", "revision": "c" * 40, "sha256": "d" * 64}
    overlay(monkeypatch, b4={"weights": weights})
    found = fixefficientnet.info("b4")
    assert isinstance(found.weights, manifest.Weights) and found.paper is not None
    assert found.weights.repository == "me/mine"
    assert found.paper.fix.top1 == 84.0
    assert fixefficientnet.list_models(pretrained=True) == ["b4"]
    monkeypatch.delenv("FIXEFFICIENTNET_MANIFEST")
    assert fixefficientnet.info("b4").weights is None


def test_overlay_as_file_takes_weights_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    document = {
        "schema_version": 1,
        "variants": {"b2": {"weights": {"path": "./runs/d.safetensors", "sha256": "a" * 64}}},
    }
    (tmp_path / "mine.json").write_text(json.dumps(document))
    monkeypatch.setenv("FIXEFFICIENTNET_MANIFEST", str(tmp_path / "mine.json"))
    weights = fixefficientnet.info("b2").weights
    assert isinstance(weights, manifest.LocalWeights)
    assert weights.path == tmp_path / "runs" / "d.safetensors"


def test_overlay_adds_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch):
    row = rows()["variants"]["b0"] | {"title": "Ours", "paper": None}
    overlay(monkeypatch, b0_ours=row, mine_ns=row | {"family": "noisy_student"})
    assert fixefficientnet.info("fixefficientnet_b0_ours").title == "Ours"
    assert fixefficientnet.info("fixefficientnet_mine").key == "mine_ns"
    for name in ("b0", "tf_efficientnet_b0.ap_in1k", "fixefficientnet_b0"):  # the packaged row keeps its names
        assert fixefficientnet.info(name).key == "b0"
    code = "import fixefficientnet, timm; print(*timm.list_models('fixefficientnet_*', include_tags=True))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"fixefficientnet_b0_ours.ap_in1k", "fixefficientnet_mine.ap_in1k", "fixefficientnet_b0.ap_in1k"} < {*names}


def test_two_rows_with_one_timm_name_are_refused(monkeypatch: pytest.MonkeyPatch):
    overlay(monkeypatch, b0_ns={"backbone": {"name": "tf_efficientnet_b0.ap_in1k"}})
    with pytest.raises(ManifestError, match=r"b0_ns: its timm name fixefficientnet_b0.ap_in1k is that of the row b0"):
        fixefficientnet.list_models()


def test_overlay_file_is_read_again_when_it_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    mine = tmp_path / "mine.json"
    monkeypatch.setenv("FIXEFFICIENTNET_MANIFEST", str(mine))
    for title in ("one", "three"):
        mine.write_text(json.dumps({"schema_version": 1, "variants": {"b0": {"title": title}}}))
        assert fixefficientnet.info("b0").title == title


def test_overlay_as_json_is_relative_to_where_one_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    overlay(monkeypatch, b0={"weights": {"path": "d.safetensors", "sha256": "a" * 64}})
    for folder in (tmp_path, tmp_path.parent):
        monkeypatch.chdir(folder)
        weights = fixefficientnet.info("b0").weights
        assert isinstance(weights, manifest.LocalWeights)
        assert weights.path == folder / "d.safetensors"


@pytest.mark.parametrize(
    "path", ["../d.safetensors", "/d.safetensors", "a/../../d.safetensors", "./../d.safetensors", "link/d.safetensors"]
)
def test_overlay_path_does_not_leave_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path)
    (inside / "mine.json").write_text(
        json.dumps({"schema_version": 1, "variants": {"b2": {"weights": {"path": path, "sha256": "a" * 64}}}})
    )
    monkeypatch.setenv("FIXEFFICIENTNET_MANIFEST", str(inside / "mine.json"))
    with pytest.raises(ManifestError, match=r"b2.weights.path.*(leave|leads out)"):
        fixefficientnet.info("b2")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("/nowhere/mine.json", "/nowhere/mine.json"),
        ("{not json", "not JSON"),
        ('{"a":' + "[" * 100_000, "not JSON"),
        ('{"schema_version": 1}', "lacks the key variants"),
        ('{"schema_version": 1, "variants": {"b0": 3}}', "b0: must be an object, is 3"),
        ('{"schema_version": 1, "variants": {"b0": {"weights": {"path": "d.safetensors"}}}}', "b0.weights.*sha256"),
        ('{"schema_version": 1, "variants": {"mine": {"title": "x"}}}', "mine: lacks the key"),
        ('{"schema_version": 1, "variants": {"My Row": {}}}', "My Row"),
    ],
)
def test_bad_overlay_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, value: str, said: str):
    monkeypatch.setenv("FIXEFFICIENTNET_MANIFEST", value)
    with pytest.raises(ManifestError, match=said):
        fixefficientnet.list_models()


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import fixefficientnet as f; f.list_models(); f.info('l2')"],
        ["-m", "fixefficientnet", "list"],
        ["-m", "fixefficientnet", "info", "b0"],
        ["-m", "fixefficientnet", "--help"],
        ["-m", "fixefficientnet", "predict", "--help"],
    ],
    ids=" ".join,
)
def test_looking_imports_neither_torch_nor_timm(command: list[str]):
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fixefficientnet.manifest" in imported
    assert not imported & {"torch", "timm", "torchvision", "huggingface_hub", "PIL", "numpy"}
