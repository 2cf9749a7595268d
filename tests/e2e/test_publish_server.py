"""From runs to logits: published to a folder, committed with git, served by a real Hub server, loaded elsewhere."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import tiny
import torch
from hub_server import commit, git, python, start_olah, stop
from safetensors.torch import load_file
from tiny import free_port
from torchvision.transforms.functional import normalize

import fixefficientnet

pytest.importorskip("olah")
pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is needed to make the repositories")

REPOSITORY = "org/name"


@dataclass(frozen=True)
class Served:
    """A Hub server with what was published: b0, then another run of it in its place.

    Attributes:
        endpoint: Address of the server.
        repository: The published folder, a git repository.
        commits: Commit of each publication, by the run's name.
        files: Name of the delta's file, by the run's name.
    """

    endpoint: str
    repository: Path
    commits: dict[str, str]
    files: dict[str, str]

    def environment(self, home: Path) -> dict[str, str]:
        # one thread: other tests run beside
        return os.environ | {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}

    def uri(self, run: str, revision: str | None = None) -> str:
        return f"hf://{REPOSITORY}/{self.files[run]}@{revision or self.commits[run]}"


@pytest.fixture(scope="module")
def served(finished_runs: Path, hub_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    backbone = fixefficientnet.info("b0").backbone
    original = folder / "hub" / "models" / backbone.repository
    original.mkdir(parents=True)
    git("init", "-q", cwd=original)
    (file,) = hub_cache.glob(f"models--{backbone.repository.replace('/', '--')}/snapshots/*/{backbone.filename}")
    shutil.copy(file, original)
    commit(original)
    repository = folder / "hub" / "models" / REPOSITORY
    repository.mkdir(parents=True)
    git("init", "-q", cwd=repository)
    commits, files = {}, {}
    for run, version in (("b0", "v1.0"), ("other", "v2.0")):
        arguments = ["publish", str(finished_runs / run), "--repo", REPOSITORY, "--to", str(repository), "--replace"]
        tiny.run(arguments, folder / "said.txt", command=tiny.FIXEFFICIENTNET, HF_HUB_CACHE=str(hub_cache))
        commits[run] = commit(repository)
        git("tag", version, cwd=repository)
        files[run] = json.loads((repository / "models.json").read_text())["models"]["b0"]["file"]
    port = free_port()
    process = start_olah(folder, port)
    yield Served(f"http://127.0.0.1:{port}", repository, commits, files)
    stop(process)


@dataclass(frozen=True)
class Expected:
    """A run's probe: images, preprocessed as its recipe says, and its logits."""

    inputs: torch.Tensor
    logits: torch.Tensor


def expected(run: Path, hub_cache: Path) -> Expected:
    """The probe of a run; its logits are checked with timm, torchvision and safetensors alone."""
    probe, recipe = load_file(run / "probe.safetensors"), json.loads((run / "recipe.json").read_text())["recipe"]
    inputs = normalize(probe["images"].permute(0, 3, 1, 2).float() / 255, recipe["mean"], recipe["std"])
    model = timm.create_model("tf_efficientnet_b0").eval()
    (file,) = hub_cache.glob("models--timm--tf_efficientnet_b0.ap_in1k/snapshots/*/model.safetensors")
    model.load_state_dict(load_file(file) | load_file(run / "delta.safetensors"))
    with torch.inference_mode():
        found = model(inputs)
    torch.testing.assert_close(found, probe["logits"], rtol=1e-4, atol=1e-5)
    return Expected(inputs, probe["logits"])


def asking(builds: dict[str, str], inputs: Path, out: Path) -> str:
    """Code that saves the logits of models, each by the expression that builds it."""
    together = ", ".join(f"{name!r}: {build}" for name, build in builds.items())
    return f"""
import torch, fixefficientnet
x = torch.load({str(inputs)!r}, weights_only=True)
models = {{{together}}}
with torch.inference_mode():
    torch.save({{name: [model(x), model.preprocess.size] for name, model in models.items()}}, {str(out)!r})
"""


def test_fresh_process_gets_the_runs_own_logits(served: Served, finished_runs: Path, hub_cache: Path, tmp_path: Path):
    """By commit, by tag and by the card's own line; also of weights that were replaced since."""
    runs = {name: expected(finished_runs / name, hub_cache) for name in ("b0", "other")}
    assert not torch.allclose(runs["b0"].logits, runs["other"].logits, rtol=1e-2)
    torch.save(runs["b0"].inputs, tmp_path / "inputs.pt")  # both runs were of the same images
    (uri,) = set(re.findall(r'weights = "(hf://\S+)"', (served.repository / "README.md").read_text()))
    assert uri == served.uri("other", "v2.0")
    uris = {"commit": served.uri("other"), "card": uri}
    uris |= {"replaced": served.uri("b0"), "v1.0": served.uri("b0", "v1.0")}
    builds = {name: f"fixefficientnet.create('b0', pretrained={uri!r})" for name, uri in uris.items()}
    python(asking(builds, tmp_path / "inputs.pt", tmp_path / "out.pt"), served.environment(tmp_path / "home"))
    for name, (logits, size) in torch.load(tmp_path / "out.pt", weights_only=True).items():
        run = runs["other" if name in ("commit", "card") else "b0"]
        torch.testing.assert_close(logits, run.logits, rtol=1e-4, atol=1e-5)
        assert size == 48


def test_folders_manifest_loads_without_a_server(served: Served, finished_runs: Path, hub_cache: Path, tmp_path: Path):
    run = expected(finished_runs / "other", hub_cache)
    torch.save(run.inputs, tmp_path / "inputs.pt")
    code = asking({"row": "fixefficientnet.create('b0', pretrained=True)"}, tmp_path / "inputs.pt", tmp_path / "out.pt")
    manifest = str(served.repository / "weights_manifest.json")
    offline = {"HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1", "FIXEFFICIENTNET_MANIFEST": manifest}
    python(code, os.environ | offline | {"OMP_NUM_THREADS": "1"})
    logits, size = torch.load(tmp_path / "out.pt", weights_only=True)["row"]
    torch.testing.assert_close(logits, run.logits, rtol=1e-4, atol=1e-5)
    assert size == 48


def test_committed_folder_clones(served: Served, tmp_path: Path):
    git("clone", "-q", "-b", "v1.0", str(served.repository), "copy", cwd=tmp_path)
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {".git", "README.md", "models.json", "weights_manifest.json", served.files["b0"]}
