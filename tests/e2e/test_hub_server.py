"""Loading from a real Hub server on loopback: git repositories in, logits out.

Two backbones (randomly initialised) and their deltas stand in git repositories, as on the Hub; an overlay
manifest pins them by true revisions and hashes; fresh processes load them through each entry point.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT, lively, tuned_delta
from gate import Gate
from hub_server import commit, git, python, start_olah, stop
from tiny import free_port

import fixefficientnet
from fixefficientnet import delta

pytest.importorskip("olah")
pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is needed to make the repositories")

KEYS = ("b0", "b1_ns")
DELTAS = "org/fixeffnet"


@dataclass
class Server:
    """A running Hub server and what it holds."""

    root: Path
    port: int
    overlay: dict[str, Any]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def repository(self, name: str) -> Path:
        return self.root / "models" / name


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    rows = {}
    deltas = folder / "hub" / "models" / DELTAS
    deltas.mkdir(parents=True)
    git("init", "-q", cwd=deltas)
    for seed, key in enumerate(KEYS):
        backbone = fixefficientnet.info(key).backbone
        torch.manual_seed(seed)
        model = lively(timm.create_model(backbone.name.partition(".")[0]), seed)
        repository = folder / "hub" / "models" / backbone.repository
        repository.mkdir(parents=True)
        git("init", "-q", cwd=repository)
        safetensors.torch.save_file(model.state_dict(), repository / "model.safetensors")
        digest = hashlib.sha256((repository / "model.safetensors").read_bytes()).hexdigest()
        rows[key] = {"backbone": {"revision": commit(repository), "sha256": digest}}
        rows[key]["weights"] = {
            "repository": DELTAS,
            "filename": f"{key}.safetensors",
            "sha256": delta.save(tuned_delta(model, key), deltas / f"{key}.safetensors"),
        }
    revision = commit(deltas)
    for row in rows.values():
        row["weights"]["revision"] = revision
    port = free_port()
    process = start_olah(folder, port)
    yield Server(folder / "hub", port, {"schema_version": 1, "variants": rows})
    stop(process)


def environment(server: Server, home: Path, **more: str) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "FIXEFFICIENTNET_MANIFEST": json.dumps(server.overlay),
        **more,
    }


def logits_code(build: str, out: Path) -> str:
    return f"""
import torch, timm, fixefficientnet
torch.manual_seed(42)
x = torch.rand(2, 3, 96, 96)
torch.save({build}.eval()(x).detach(), {str(out)!r})
"""


def by_hand(server: Server, key: str) -> torch.Tensor:
    """timm and safetensors alone, from the repositories' files."""
    backbone = fixefficientnet.info(key).backbone
    model = timm.create_model(backbone.name.partition(".")[0]).eval()
    model.load_state_dict(safetensors.torch.load_file(server.repository(backbone.repository) / "model.safetensors"))
    tuned = safetensors.torch.load_file(server.repository(DELTAS) / f"{key}.safetensors")
    model.load_state_dict(tuned, strict=False)
    torch.manual_seed(42)
    return model(torch.rand(2, 3, 96, 96)).detach()


ENTRY_POINTS = {
    "python": "fixefficientnet.create({key!r}, pretrained=True)",
    "torch.hub": "torch.hub.load({root!r}, 'fixefficientnet_{key}', source='local')",
    "timm": "timm.create_model({timm_name!r}, pretrained=True)",
}


@pytest.fixture(scope="module")
def home(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF_HOME where both models have been loaded once."""
    home = tmp_path_factory.mktemp("home")
    python("import fixefficientnet as f; f.create('b0', True); f.create('b1_ns', True)", environment(server, home))
    return home


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_each_entry_point_gives_the_logits_of_timm_alone(server: Server, tmp_path: Path, entry_point: str, key: str):
    build = ENTRY_POINTS[entry_point].format(key=key, root=str(ROOT), timm_name=fixefficientnet.info(key).timm_name)
    python(logits_code(build, tmp_path / "logits.pt"), environment(server, tmp_path / "home"))
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(found, by_hand(server, key), rtol=1e-4, atol=1e-5)


def test_command_line_predicts_with_published_weights(server: Server, home: Path):
    done = subprocess.run(
        [sys.executable, "-m", "fixefficientnet", "predict", "--model", "b0", "--json", "examples/cat.jpg"],
        env=environment(server, home),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["weights"] == "fixres"


def test_hf_uri(server: Server, home: Path, tmp_path: Path):
    revision = server.overlay["variants"]["b0"]["weights"]["revision"]
    build = f"fixefficientnet.create('b0', 'hf://{DELTAS}/b0.safetensors@{revision}')"
    python(logits_code(build, tmp_path / "logits.pt"), environment(server, home))
    torch.testing.assert_close(
        torch.load(tmp_path / "logits.pt", weights_only=True), by_hand(server, "b0"), rtol=1e-4, atol=1e-5
    )


WRONG_PLACES = [
    ("hf://org/nothing/b0.safetensors@main", "no repository org/nothing"),
    (f"hf://{DELTAS}/nothing.safetensors@main", "nothing.safetensors"),
    (f"hf://{DELTAS}/b0.safetensors@{'0' * 40}", "0" * 40),
    (f"hf://{DELTAS}/b0.safetensors", "the revision.*is required"),
    (f"hf://{DELTAS}/../../b0.safetensors@main", "does not leave its folder"),
    (f"hf://{DELTAS}//etc/b0.safetensors@main", "does not leave its folder"),
]


def test_wrong_places_are_named(server: Server, home: Path):
    code = f"""
import re, fixefficientnet
for place, said in {WRONG_PLACES!r}:
    try:
        fixefficientnet.create("b0", place)
    except fixefficientnet.DownloadError as error:
        assert re.search(said, str(error)), error
    else:
        raise SystemExit(f"{{place}} is not refused")
"""
    python(code, environment(server, home))


def test_offline_with_a_cache_works_and_asks_nobody(server: Server, home: Path):
    env = environment(server, home, HF_HUB_OFFLINE="1")
    python("import fixefficientnet as f; f.create('b0', True)", env)


def test_server_gone_with_a_cache_works(server: Server, home: Path):
    env = environment(server, home, HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    python("import fixefficientnet as f; f.create('b0', True)", env)


@pytest.mark.parametrize("offline", ["", "1"])
def test_without_a_cache_the_error_says_what_to_bring_and_where(server: Server, tmp_path: Path, offline: str):
    env = environment(server, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{free_port()}", HF_HUB_OFFLINE=offline)
    done = python("import fixefficientnet as f; f.create('b0', True)", env, check=False)
    message = done.stderr.split("DownloadError: ")[-1]
    weights = server.overlay["variants"]["b0"]["weights"]
    assert f"hf download {DELTAS} b0.safetensors --revision {weights['revision']}" in message
    assert str(tmp_path / "hub" / "models--org--fixeffnet") in message
    assert ("HF_HUB_OFFLINE is set" if offline else "did not answer") in message


def test_what_the_offline_error_says_to_do_works(server: Server, home: Path, tmp_path: Path):
    """Folders copied from the cache of a machine with a connection serve one without."""
    for folder in (home / "hub").glob("models--*"):
        shutil.copytree(folder, tmp_path / "hub" / folder.name, symlinks=True)
    python("import fixefficientnet as f; f.create('b0', True)", environment(server, tmp_path, HF_HUB_OFFLINE="1"))


@pytest.mark.newest
@pytest.mark.parametrize("which", ["delta", "backbone"])
def test_damaged_cache_is_repaired(server: Server, home: Path, tmp_path: Path, which: str):
    hub = tmp_path / "hub"
    shutil.copytree(home / "hub", hub, symlinks=True)
    pattern = "models--org--fixeffnet/snapshots/*/b0*" if which == "delta" else "models--timm*b0*/snapshots/*/model*"
    (link,) = hub.glob(pattern)
    good = link.read_bytes()
    blob = link.resolve()
    blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    env = environment(server, tmp_path)
    offline = python("import fixefficientnet as f; f.create('b0', True)", env | {"HF_HUB_OFFLINE": "1"}, check=False)
    assert "was damaged and is deleted" in offline.stderr
    assert not link.exists()
    python("import fixefficientnet as f; f.create('b0', True)", env)
    assert link.read_bytes() == good


@pytest.mark.parametrize("which", ["weights", "backbone"])
@pytest.mark.newest
def test_wrong_hash_names_both_and_leaves_nothing(server: Server, tmp_path: Path, which: str):
    overlay = json.loads(json.dumps(server.overlay))
    correct = overlay["variants"]["b0"][which]["sha256"]
    overlay["variants"]["b0"][which]["sha256"] = "0" * 64
    env = environment(server, tmp_path, FIXEFFICIENTNET_MANIFEST=json.dumps(overlay))
    done = python("import fixefficientnet as f; f.create('b0', True)", env, check=False)
    assert "ChecksumError" in done.stderr
    assert correct in done.stderr
    assert "0" * 64 in done.stderr
    repository = "org--fixeffnet" if which == "weights" else "timm--tf_efficientnet_b0.ap_in1k"
    files = list((tmp_path / "hub" / f"models--{repository}").rglob("*.safetensors"))
    assert files == []


def test_hash_of_a_backbone_is_computed_once(server: Server, home: Path):
    code = """
import fixefficientnet as f
from fixefficientnet import hub
hashed = []
original = hub.sha256_of
hub.sha256_of = lambda path: hashed.append(path) or original(path)
f.create("b0", True)
assert not hashed, hashed
"""
    python(code, environment(server, home))


def test_hub_tools_still_read_the_cache(server: Server, home: Path):
    code = """
from huggingface_hub import scan_cache_dir
found = scan_cache_dir()
assert not found.warnings, found.warnings
print(len(found.repos))
"""
    assert python(code, environment(server, home)).stdout == "3\n"


@pytest.mark.newest
def test_delta_of_another_backbone_revision_is_refused(server: Server, tmp_path: Path):
    """The backbone's repository moves on after the delta was made, and the row follows its branch."""
    overlay = json.loads(json.dumps(server.overlay))
    repository = server.repository(fixefficientnet.info("b1_ns").backbone.repository)
    git("checkout", "-qb", "next", cwd=repository)
    torch.manual_seed(77)
    safetensors.torch.save_file(
        lively(timm.create_model("tf_efficientnet_b1")).state_dict(), repository / "model.safetensors"
    )
    overlay["variants"]["b1_ns"]["backbone"] = {"revision": commit(repository), "sha256": None}
    git("checkout", "-q", "main", cwd=repository)
    env = environment(server, tmp_path, FIXEFFICIENTNET_MANIFEST=json.dumps(overlay))
    done = python("import fixefficientnet as f; f.create('b1_ns', True)", env, check=False)
    assert "DeltaMismatchError" in done.stderr
    assert "another backbone" in done.stderr


@pytest.mark.newest
def test_server_gone_in_the_middle_then_back(server: Server, tmp_path: Path):
    """A connection that breaks off leaves no half file behind, and the next try completes."""
    gate = Gate(server.port, stop_after=3_000_000)
    try:
        env = environment(server, tmp_path, HF_ENDPOINT=gate.endpoint)
        done = python("import fixefficientnet as f; f.create('b0', 'backbone')", env, check=False)
        assert "DownloadError" in done.stderr, done.stderr
        assert not list((tmp_path / "hub").rglob("*.safetensors"))
        gate.stop_after = None
        python("import fixefficientnet as f; f.create('b0', 'backbone')", env)
    finally:
        gate.close()


@pytest.mark.newest
def test_damaged_note_of_a_hash_is_not_believed(server: Server, home: Path, tmp_path: Path):
    shutil.copytree(home / "hub", tmp_path / "hub", symlinks=True)
    notes = list((tmp_path / "hub").glob("models--timm*b0*/.fixefficientnet/*"))
    assert notes
    for content in (b"", b"\xff\xfe", b"0" * 64):
        for note in notes:
            note.write_bytes(content)
        python("import fixefficientnet as f; f.create('b0', True)", environment(server, tmp_path, HF_HUB_OFFLINE="1"))


@pytest.mark.newest
@pytest.mark.parametrize("cache", ["empty", "damaged"])
def test_concurrent_processes(server: Server, home: Path, tmp_path: Path, cache: str):
    if cache == "damaged":
        shutil.copytree(home / "hub", tmp_path / "hub", symlinks=True)
        for file in (tmp_path / "hub").glob("models--*/snapshots/*/*.safetensors"):
            file.resolve().write_bytes(b"damaged")
    env = environment(server, tmp_path, OMP_NUM_THREADS="1")
    code = "import fixefficientnet as f; print(f.create('b0', True).classifier.weight.sum().item())"
    with ThreadPoolExecutor(4) as threads:
        done = [threads.submit(python, code, env) for _ in range(4)]
    assert len({one.result().stdout for one in done}) == 1
