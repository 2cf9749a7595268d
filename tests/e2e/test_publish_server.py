"""The whole circle: runs, published as a git repository, served by a real Hub server, loaded by fresh processes."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import tiny
import torch
from hub_server import commit, free_port, git, python, start_olah, stop
from safetensors.torch import load_file
from torchvision.transforms.functional import normalize

import fixefficientnet

pytest.importorskip("olah")
pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is needed to make the repositories")

REPOSITORY = "org/name"


@dataclass(frozen=True)
class Served:
    """A Hub server with what was published: b0, then another run of it in its place; and the rows of each time."""

    endpoint: str
    repository: Path
    rows: dict[str, Path]

    def environment(self, home: Path, run: str) -> dict[str, str]:
        return os.environ | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "FIXEFFICIENTNET_MANIFEST": str(self.rows[run]),
            "OMP_NUM_THREADS": "1",  # other tests run beside
        }


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
    rows = {}
    for run, more in (("b0", []), ("other", ["--replace"])):
        rows[run] = folder / f"{run}.json"
        arguments = [str(finished_runs / run), "--repo", REPOSITORY, "--to", str(repository), *more]
        arguments = ["publish", *arguments, "--manifest", str(rows[run])]
        tiny.run(arguments, folder / "said.txt", command=tiny.FIXEFFICIENTNET, HF_HUB_CACHE=str(hub_cache))
    port = free_port()
    process = start_olah(folder, port)
    yield Served(f"http://127.0.0.1:{port}", repository, rows)
    stop(process)


@dataclass(frozen=True)
class Expected:
    """A run's own images, shown as it says, and what it made of them."""

    inputs: torch.Tensor
    logits: torch.Tensor


def expected(run: Path, hub_cache: Path) -> Expected:
    """By timm, torchvision and safetensors alone; and the same as the run itself left."""
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
    """Also of weights that were replaced since: the row names the commit."""
    run = expected(finished_runs / "b0", hub_cache)
    torch.save(run.inputs, tmp_path / "inputs.pt")
    builds = {"python": "fixefficientnet.create('b0', pretrained=True)"}
    python(asking(builds, tmp_path / "inputs.pt", tmp_path / "out.pt"), served.environment(tmp_path / "home", run="b0"))
    logits, size = torch.load(tmp_path / "out.pt", weights_only=True)["python"]
    torch.testing.assert_close(logits, run.logits, rtol=1e-4, atol=1e-5)
    assert size == 48


def test_later_rows_tags_and_the_cards_own_line_load_what_they_say(
    served: Served, finished_runs: Path, hub_cache: Path, tmp_path: Path
):
    runs = {name: expected(finished_runs / name, hub_cache) for name in ("b0", "other")}
    assert not torch.allclose(runs["b0"].logits, runs["other"].logits, rtol=1e-2)
    torch.save(runs["b0"].inputs, tmp_path / "inputs.pt")
    card = (served.repository / "README.md").read_text()
    (uri,) = set(re.findall(r'weights = "(hf://\S+)"', card))
    builds = {
        "row": "fixefficientnet.create('b0', pretrained=True)",
        "card": f"fixefficientnet.create('b0', pretrained={uri!r})",
        "v1.0": f"fixefficientnet.create('b0', pretrained='hf://{REPOSITORY}/b0.safetensors@v1.0')",
    }
    code = asking(builds, tmp_path / "inputs.pt", tmp_path / "out.pt")
    python(code, served.environment(tmp_path / "home", run="other"))
    found = {name: logits for name, (logits, _) in torch.load(tmp_path / "out.pt", weights_only=True).items()}
    # both runs were of the same images
    torch.testing.assert_close(found["v1.0"], runs["b0"].logits, rtol=1e-4, atol=1e-5)
    assert uri == f"hf://{REPOSITORY}/b0.safetensors@v2.0"
    for name in ("row", "card"):
        torch.testing.assert_close(found[name], runs["other"].logits, rtol=1e-4, atol=1e-5)


def test_published_repository_is_a_git_repository_that_clones(served: Served, tmp_path: Path):
    done = subprocess.run(["git", "clone", "-q", "-b", "v1.0", served.repository, "copy"], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {".git", "README.md", "models.json"} | {
        "b0.safetensors"
    }
