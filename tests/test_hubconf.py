import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from fixefficientnet import manifest


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkout where torch.hub keeps those of GitHub, so that nothing is asked of the network."""
    home = tmp_path_factory.mktemp("torch")
    target = home / "hub" / "org_fixeffnet_main"
    shutil.copytree(ROOT / "fixefficientnet", target / "fixefficientnet")
    for name in ("hubconf.py", "weights_manifest.json", "recipes.toml", "pyproject.toml"):
        shutil.copy(ROOT / name, target)
    return target


def run(checkout: Path, code: str) -> str:
    """In a fresh process that sees the dependencies, but no installed fixefficientnet."""
    hide = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "fixefficientnet" and not any(p.endswith("org_fixeffnet_main") for p in sys.path):
            raise ModuleNotFoundError(name)
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path = [p for p in sys.path if p not in ("", {str(ROOT)!r})]
sys.meta_path.insert(0, Hide())
import torch
REPO = "org/fixeffnet:main"
OPTIONS = dict(skip_validation=True, trust_repo=True)
"""
    env = os.environ | {"TORCH_HOME": str(checkout.parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", hide + code], cwd="/", env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_list_has_one_entrypoint_per_variant_and_nothing_else(checkout: Path):
    names = json.loads(run(checkout, "import json; print(json.dumps(torch.hub.list(REPO, verbose=False, **OPTIONS)))"))
    assert sorted(names) == sorted(v.hub_name for v in manifest.load().values())


def test_help_tells_the_papers_figures(checkout: Path):
    text = run(checkout, "print(torch.hub.help(REPO, 'fixefficientnet_b4_ns', **OPTIONS))")
    for part in ("85.9 at 472", "85.3 at 380", "not published yet", "pretrained:", "[3, 472, 472]"):
        assert part in text
    assert "Not from the paper" in run(checkout, "print(torch.hub.help(REPO, 'fixefficientnet_lite0', **OPTIONS))")


def test_load_from_a_checkout_that_is_not_installed(checkout: Path):
    code = f"""
import io, contextlib
model = torch.hub.load({str(checkout)!r}, "fixefficientnet_lite0", source="local", pretrained="backbone")
image = model.preprocess({str(ROOT / "examples" / "cat.jpg")!r})
print(model.variant.key, model(image[None]).argmax().item())
import fixefficientnet; print(fixefficientnet.__file__)
model = torch.hub.load(REPO, "fixefficientnet_b0_ns", pretrained=False, num_classes=4, **OPTIONS)
print(model.classifier.out_features, model.training)
try:
    torch.hub.load(REPO, "fixefficientnet_b0_ns", **OPTIONS)
except LookupError as error:
    print(type(error).__name__)
"""
    lines = run(checkout, code).splitlines()
    lines = [line for line in lines if not line.startswith("Using cache")]
    assert lines == [
        "lite0 285",  # Egyptian cat
        str(checkout / "fixefficientnet" / "__init__.py"),
        "4 False",
        "WeightsNotPublishedError",
    ]


def test_dependencies_are_the_five_core_packages(checkout: Path):
    code = f"import sys; sys.path.insert(0, {str(checkout)!r}); import hubconf; print(*sorted(hubconf.dependencies))"
    assert run(checkout, code).split() == ["huggingface_hub", "safetensors", "timm", "torch", "torchvision"]


def test_core_needs_no_command_line_packages(checkout: Path):
    code = f"""
sys.path.insert(0, {str(checkout)!r})
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cyclopts", "rich"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import hubconf
print(hubconf.fixefficientnet_b0(pretrained=False, device="meta").variant.key)
"""
    assert run(checkout, code) == "b0\n"
