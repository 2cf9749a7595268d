"""What needs no server; the rest is in e2e/test_hub_server.py."""

import hashlib
import os
import time
from pathlib import Path

import huggingface_hub.utils
import pytest
import torch
from conftest import COMMIT, put_in_cache

from fixefficientnet import hub
from fixefficientnet.errors import ChecksumError, DownloadError


@pytest.mark.parametrize("load", [hub.read, hub.fetch])
def test_wrong_copy_in_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load):
    snapshot = tmp_path / "models--o--r" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "d.safetensors").write_bytes(b"wrong")

    def refuse(*_: object, **__: object) -> None:  # the tests may run as root, whom no permission stops
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(huggingface_hub.utils, "WeakFileLock", refuse)
    with pytest.raises(ChecksumError, match=f"{'0' * 64}.*cannot be replaced"):
        load(hub.HubFile("o/r", "d.safetensors", COMMIT, "0" * 64), tmp_path)
    assert (snapshot / "d.safetensors").read_bytes() == b"wrong"


@pytest.mark.parametrize("load", [hub.read, hub.fetch])
def test_copy_that_cannot_be_read(tmp_path: Path, load):
    place = tmp_path / "models--o--r" / "snapshots" / COMMIT / "d.safetensors"
    place.mkdir(parents=True)
    with pytest.raises(
        DownloadError, match=rf"cached copy of hf://o/r/d.safetensors@.* cannot be read: .*{place.name}"
    ):
        load(hub.HubFile("o/r", "d.safetensors", COMMIT, "0" * 64), tmp_path)
    assert place.is_dir()


def test_weights_that_are_not_pinned_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    put_in_cache(tmp_path, "o/r", "model.safetensors", {"a": torch.ones(1)})
    snapshot = tmp_path / "models--o--r" / "snapshots" / COMMIT
    (snapshot / "config.json").write_text("{}")
    caplog.set_level("INFO")
    hub.fetch(hub.HubFile("o/r", "config.json", "main"), tmp_path)
    pinned = hub.sha256_of(snapshot / "model.safetensors")
    hub.fetch(hub.HubFile("o/r", "model.safetensors", "main", pinned), tmp_path)
    assert not caplog.messages
    hub.fetch(hub.HubFile("o/r", "model.safetensors", "main"), tmp_path)
    assert caplog.messages == ["hf://o/r/model.safetensors@main is not pinned: whoever owns it may change it."]


@pytest.mark.parametrize("load", [hub.read, hub.fetch])
@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize(
    "told",
    [
        hashlib.sha256(b"right").hexdigest(),
        "19981f7e045c3a2c35d15e977b6f56f1923bb400",  # printf right | git hash-object --stdin
        hashlib.sha1(b"right").hexdigest(),  # as mirrors tell it
    ],
)
def test_what_nothing_pins_is_held_against_the_hash_that_the_hub_told(tmp_path: Path, load, told: str, sound: bool):
    """Its content in the cache has that hash for its name."""
    folder = tmp_path / "models--o--r"
    blob = folder / "blobs" / told
    link = folder / "snapshots" / COMMIT / "d.safetensors"
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    blob.write_bytes(b"right" if sound else b"wrong")
    link.symlink_to(os.path.relpath(blob, link.parent))
    if sound:
        assert load(hub.HubFile("o/r", "d.safetensors", COMMIT), tmp_path) in (b"right", link)
        return
    with pytest.raises(DownloadError, match=rf"was damaged and is deleted .*expected is {blob.name}"):
        load(hub.HubFile("o/r", "d.safetensors", COMMIT), tmp_path)
    assert not blob.exists() and not link.is_symlink()


@pytest.mark.parametrize("load", [hub.read, hub.fetch])
def test_a_copy_that_another_process_replaces_meanwhile_is_held_against_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load
):
    """Between the removal of a damaged copy and the arrival of the right one, there is no link to tell its hash."""
    folder = tmp_path / "models--o--r"
    right = hashlib.sha256(b"right").hexdigest()
    link = folder / "snapshots" / COMMIT / "d.safetensors"
    for path in (link, folder / "blobs" / right):
        path.parent.mkdir(parents=True)
    calls = []

    def download(*_: object, **__: object) -> str:
        calls.append(1)
        if len(calls) == 2:  # the other process has finished
            (folder / "blobs" / right).write_bytes(b"right")
            link.symlink_to(f"../../blobs/{right}")
        return str(link)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    found = load(hub.HubFile("o/r", "d.safetensors", COMMIT), tmp_path)
    assert (found if isinstance(found, bytes) else found.read_bytes()) == b"right"
    assert len(calls) == 2


def test_what_killed_downloads_left_goes_when_it_is_surely_theirs(tmp_path: Path):
    folder = tmp_path / "models--o--r"
    for name in ("blobs", f"snapshots/{COMMIT}"):
        (folder / name).mkdir(parents=True)
    (folder / "blobs" / "abc").write_bytes(b"whole")
    (folder / "snapshots" / COMMIT / "d.safetensors").symlink_to("../../blobs/abc")
    for name, age in (("abc.1.incomplete", 4000), ("abc.2.incomplete", 60), ("abcd.3.incomplete", 4000)):
        (folder / "blobs" / name).touch()
        os.utime(folder / "blobs" / name, (time.time() - age,) * 2)
    hub.fetch(hub.HubFile("o/r", "d.safetensors", COMMIT), tmp_path)
    left = {path.name for path in (folder / "blobs").iterdir()}
    assert left == {"abc", "abc.2.incomplete", "abcd.3.incomplete"}


def test_closed_endpoint_says_so(tmp_path: Path):
    with pytest.raises(DownloadError, match=r"127.0.0.1:9 did not answer"):
        hub.read(hub.HubFile("o/r", "d.safetensors", COMMIT), tmp_path)


@pytest.mark.parametrize("uri", ["hf://o/r/f@", "hf://o/f@main", "hf:/o/r/f@main", "hf://o/r/a\\..\\b@main", "f@main"])
def test_other_uris_are_refused(uri: str):
    with pytest.raises(DownloadError, match="is not of the form hf://"):
        hub.parse_uri(uri)


def test_uri():
    found = hub.parse_uri("hf://org/fixeffnet/deltas/b4.safetensors@v1.0")
    assert found == hub.HubFile("org/fixeffnet", "deltas/b4.safetensors", "v1.0")
