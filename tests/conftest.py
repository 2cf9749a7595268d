"""What all tests stand on: an empty Hub cache of their own, and no network."""

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

# Before huggingface_hub is imported: it reads these once. Port 9 (discard) is closed, so that nothing
# leaves the machine, and whatever is not in the cache fails immediately.
_HOME = Path(tempfile.mkdtemp(prefix="fixefficientnet-tests-"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ |= {
    "HF_HOME": str(_HOME / "hf"),
    "TORCH_HOME": str(_HOME / "torch"),
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # read when torch is imported: idle threads wait asleep, as tests run side by side and others want their cores
    "OMP_WAIT_POLICY": "PASSIVE",
}
for _name in ("FIXEFFICIENTNET_MANIFEST", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
    os.environ.pop(_name, None)

import pytest
import safetensors.torch
import timm
import tiny
import torch
from huggingface_hub.utils import _http
from packaging.version import Version
from torch import nn

import fixefficientnet
from fixefficientnet import delta, manifest
from fixefficientnet._internal import requirements

try:
    from timm.models import save_for_hf
except ImportError:  # older releases keep it to themselves
    from timm.models._hub import save_for_hf  # noqa: F401 - for the tests

torch.set_num_threads(1)  # the networks are tiny and tests run side by side: more threads would wait for each other

# it waits 23 seconds in all for a Hub that is not there
_http.time = SimpleNamespace(sleep=lambda seconds: None)  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
TIMM_HAS_LOCAL_DIR = Version(timm.__version__) >= Version("1.0.16")
"""Whether timm loads a folder by local-dir:FOLDER."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Network: TypeAlias = Any
"""A model whose layers a test reads: for a type checker, each attribute of an `nn.Module` is a tensor or a module."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --slow to run it"))


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Moves the batch norms off their initial values, so that a swapped or missing one shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.2), (module.running_var, 0.8), (module.weight, 0.8)):
                assert tensor is not None
                tensor.data.copy_(low + 0.4 * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def put_in_cache(cache: Path, repository: str, filename: str, tensors: dict[str, torch.Tensor]) -> Path:
    """Lays a file into a Hub cache as a finished download of the branch main."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    path = folder / "snapshots" / COMMIT / filename
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    safetensors.torch.save_file(tensors, path)
    return path


def put_folder_in_cache(cache: Path, repository: str, folder: Path) -> None:
    """Lays a folder of files into a Hub cache as a finished download of the branch main."""
    place = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)


def tiny_variants(cache: Path, **rows: dict[str, Any]) -> str:
    """An overlay that gives variants a tiny backbone each, of random weights, and trains at 32 pixels for 48.

    Args:
        cache: The Hub cache that gets the backbones.
        rows: What else the rows of these variants tell of their backbones, by key.
    """
    made = {}
    for seed, (key, backbone) in enumerate(rows.items()):
        torch.manual_seed(seed)
        model = lively(timm.create_model("test_efficientnet"), seed)
        put_in_cache(cache, f"tiny/{key}", "model.safetensors", model.state_dict())
        place = {"repository": f"tiny/{key}", "filename": "model.safetensors"}
        network = {"name": "test_efficientnet.r160_in1k", "top1": None, **place, **backbone}
        made[key] = {"backbone": network, "train_size": 32, "test": {"size": 48}}
    return json.dumps({"schema_version": manifest.SCHEMA_VERSION, "variants": made})


def tuned_delta(model: nn.Module, key: str, seed: int = 1) -> delta.Delta:
    """A delta as a run would leave it: the head of `model` moved a little."""
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for tensor in delta.find_head(model).select(model.state_dict()).values():
        tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=generator))
    found = delta.extract(
        model,
        base=base,
        variant=key,
        backbone=manifest.find(key).backbone.name,
        recipe={"seed": seed},
        measured={"top1": 1.0},
    )
    model.load_state_dict(base)
    return found


def python_path(folder: Path) -> str:
    """PYTHONPATH with a folder in front of what it has."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def assert_row_tells_the_run(row: dict[str, Any], where: dict[str, str], data: bytes, run: Path) -> None:
    """A manifest's row of published weights has the delta's hash and the run's own figures.

    Args:
        row: The row.
        where: What it says of the place of the weights.
        data: The delta's bytes.
        run: The run's folder.
    """
    tuned = json.loads((run / "report.json").read_text())["measured"]["tuned"]
    accuracy = {name: pytest.approx(tuned[name], abs=1e-3) for name in ("top1", "top5")}
    told = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "license": "apache-2.0"}
    assert row["weights"] == where | told | {"measured": {"dataset": "data/val", "images": 6, **accuracy}}
    assert row["test"]["size"] == 48  # not what the packaged row says


@pytest.fixture(autouse=True)
def _packages_are_looked_at_again() -> None:
    """What was found installed is remembered; tests take packages away."""
    requirements.need.cache_clear()


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hub cache that holds randomly initialised backbones of b0, b0_ns and lite1."""
    cache = tmp_path_factory.mktemp("hub")
    for seed, key in enumerate(("b0", "b0_ns", "lite1")):
        backbone = fixefficientnet.info(key).backbone
        torch.manual_seed(seed)
        model = lively(timm.create_model(backbone.name.partition(".")[0]), seed)
        put_in_cache(cache, backbone.repository, backbone.filename, model.state_dict())
    return cache


@pytest.fixture(scope="session")
def b0_delta(hub_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta file for b0, tuned from the backbone in `hub_cache`."""
    model = fixefficientnet.create("b0", "backbone", cache_dir=hub_cache)
    path = tmp_path_factory.mktemp("b0") / "delta.safetensors"
    delta.save(tuned_delta(model, "b0"), path)
    return path


@pytest.fixture(scope="session")
def finished_runs(hub_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs of the zoo: `b0` and `b0_ns`; `other`, of b0 with another seed. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    images = tiny.make_data(folder / "data", ("n01440764", "n02124075", "n07920052"), train=4, val=2)
    place = ["--data", str(images), "--output", str(folder), "--method", "cached", "-j", "0"]
    # enough epochs for some images to be correct: an accuracy of 0 is none that a manifest takes
    sizes = ["--train-size", "32", "--test-size", "48", "--epochs", "6", "--batch-size", "4"]
    for which in (["b0*"], ["b0", "--experiment", "other", "--seed", "1"]):
        tiny.run([*which, *place, *sizes], folder / "said.txt", HF_HUB_CACHE=str(hub_cache), OMP_NUM_THREADS="1")
    return folder


@pytest.fixture
def images() -> torch.Tensor:
    """Two random images at a size that keeps tests fast."""
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(7)) * 2 - 1
