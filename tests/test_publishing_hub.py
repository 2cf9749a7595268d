"""Publishing to a Hub: one in memory on this machine, which refuses and breaks off as it is told."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hub_standin
import jsonschema
import pytest
import tiny
from conftest import ROOT, assert_row_tells_the_run, python_path
from hub_standin import DROP, DROP_AFTER, TOKEN, Hub, Repository
from huggingface_hub import constants

from fixefficientnet import manifest

try:
    from huggingface_hub import close_session
except ImportError:  # before 1.0
    from huggingface_hub.utils import reset_sessions as close_session  # type: ignore[no-redef]

NAME = "org/name"
FILES = {".gitattributes", "README.md", "models.json", "b0.safetensors"}
PACKAGED = ROOT / "weights_manifest.json"
CREATE, LFS, COMMIT, TAG = "/api/repos/create", "/lfs/", "/commit/", "/tag/"


def own_cache(folder: Path, hub_cache: Path) -> Path:
    """A Hub cache that has the backbones of another, and gets nothing that others see."""
    folder.mkdir(parents=True)
    for repository in hub_cache.glob("models--*"):
        (folder / repository.name).symlink_to(repository)
    return folder


@dataclass
class Desk:
    """A Hub, and who publishes there."""

    hub: Hub
    folder: Path
    runs: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "rows.json"

    @property
    def repository(self) -> Repository:
        return self.hub.repositories[NAME]

    def publish(self, *runs: str, more: tuple[object, ...] = (), status: int = 0, repo: str = NAME) -> str:
        """What was said, on stderr if it was refused."""
        folders = [self.runs / run for run in runs]
        out, err = tiny.cli("publish", *folders, "--repo", repo, "--manifest", self.manifest, *more, status=status)
        assert "Traceback" not in out + err
        assert TOKEN not in out + err
        return err if status else out

    def delta(self, name: str) -> bytes:
        return (self.runs / name / "delta.safetensors").read_bytes()

    def published(self) -> list[str]:
        """Messages of the commits but the Hub's own first one."""
        repository = self.hub.repositories.get(NAME)
        return list(repository.messages.values())[1:] if repository else []

    def rows(self) -> dict[str, Any]:
        return json.loads(self.manifest.read_text())["variants"]


@pytest.fixture
def desk(tmp_path: Path, hub_cache: Path, finished_runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    with Hub() as hub:
        close_session()  # another test's may be offline
        for where, name, value in tiny.hub_settings(hub.endpoint):
            monkeypatch.setattr(where, name, value, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(own_cache(tmp_path / "hub", hub_cache)))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield Desk(hub, tmp_path, finished_runs)
        close_session()  # no connection to this server is used again


def test_first_publication_makes_repository_commit_and_tag(desk: Desk):
    said = desk.publish("b0")
    assert desk.hub.created == [{"name": "name", "organization": "org"}]
    assert desk.published() == ["v1.0: add b0"]
    head = desk.repository.head
    files = desk.repository.commits[head]
    assert set(files) == FILES
    assert files["b0.safetensors"] == desk.delta("b0")
    assert desk.repository.tags == {"v1.0": head}
    assert head in said
    weights = desk.rows()["b0"]["weights"]
    assert weights["revision"] == head
    assert weights["sha256"] == hashlib.sha256(files["b0.safetensors"]).hexdigest()
    assert weights["bytes"] == len(files["b0.safetensors"])
    entry = json.loads(files["models.json"])["models"]["b0"]
    assert entry["sha256"] == weights["sha256"]
    assert "| `b0` |" in files["README.md"].decode()
    assert desk.hub.calls("POST", COMMIT) == 1
    assert all(known for method, _, known in desk.hub.requests if method == "POST")
    overlay = manifest.parse_overlay(json.loads(desk.manifest.read_text()), folder=desk.folder, source="rows")
    published = overlay["b0"].weights
    assert isinstance(published, manifest.Weights) and published.repository == NAME


def test_whole_command_in_its_own_process_keeps_no_token(desk: Desk, hub_cache: Path, tmp_path: Path):
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    own_cache(home / "hub", hub_cache)
    cwd.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": desk.hub.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": python_path(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "fixefficientnet", "publish", str(desk.runs / "b0"), "--repo", NAME, "--private"]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert desk.published() == ["v1.0: add b0"]
    assert desk.repository.private
    row = json.loads((cwd / "weights_manifest.json").read_text())["variants"]["b0"]
    assert row["weights"]["revision"] == desk.repository.tags["v1.0"]
    assert TOKEN not in done.stdout + done.stderr
    written = [path for folder in (home, cwd) for path in folder.rglob("*") if path.is_file()]  # links not followed
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert not [name for name, data in desk.repository.commits[desk.repository.head].items() if TOKEN.encode() in data]


@pytest.mark.parametrize(("more", "visibility"), [((), None), (("--private",), "private")])
def test_private_is_asked_for_and_nothing_else_is(desk: Desk, more: tuple[str, ...], visibility: str | None):
    """An organisation may have its repositories private unless told otherwise: so nothing is told."""
    desk.publish("b0", more=more)
    (asked,) = desk.hub.created
    told = "private" if asked.get("private") else None  # before huggingface_hub 1.0
    assert asked.get("visibility", told) == visibility
    desk.publish("b0", more=more)  # a private one is read again
    assert desk.published() == ["v1.0: add b0"]


def test_same_runs_again_write_nothing(desk: Desk):
    desk.publish("b0")
    text, head = desk.manifest.read_text(), desk.repository.head
    written = len([made for made in desk.hub.requests if made[0] in ("POST", "PUT")])
    assert "v1.0: all was there already" in desk.publish("b0")
    assert len([made for made in desk.hub.requests if made[0] in ("POST", "PUT")]) == written
    assert (desk.manifest.read_text(), desk.repository.head) == (text, head)


def test_second_variant_is_added_on_top_under_the_next_tag(desk: Desk):
    desk.publish("b0")
    first = desk.repository.head
    desk.publish("b0_ns")
    second = desk.repository.head
    assert desk.repository.parents[second] == first
    assert desk.repository.tags == {"v1.0": first, "v1.1": second}
    assert desk.repository.commits[second]["b0.safetensors"] == desk.delta("b0")
    assert desk.repository.commits[second]["b0_ns.safetensors"] == desk.delta("b0_ns")
    assert desk.hub.calls("PUT", LFS) == 2  # each delta once
    desk.publish("b0", "b0_ns")
    assert {key: row["weights"]["revision"] for key, row in desk.rows().items()} == {"b0": first, "b0_ns": second}


@pytest.mark.newest
def test_other_weights_replace_only_if_asked_and_stay_at_their_tag(desk: Desk):
    desk.publish("b0")
    assert "--replace" in desk.publish("other", status=1)
    assert desk.published() == ["v1.0: add b0"]
    desk.publish("other", more=("--replace",))
    tags = desk.repository.tags
    assert desk.repository.commits[tags["v2.0"]]["b0.safetensors"] == desk.delta("other")
    assert desk.repository.commits[tags["v1.0"]]["b0.safetensors"] == desk.delta("b0")


@pytest.mark.newest
def test_dry_run_asks_and_writes_nothing(desk: Desk):
    said = desk.publish("b0", more=("--dry-run",))
    assert "v1.0: add b0" in said
    assert said.startswith("Dry run: nothing is published, nothing is written.\n")
    desk.publish("b0")
    assert "v1.1: add b0_ns" in desk.publish("b0_ns", more=("--dry-run",))
    writing = [made for made in desk.hub.requests if made[0] in ("POST", "PUT")]
    assert len([path for _, path, _ in writing if CREATE in path]) == 1
    assert desk.published() == ["v1.0: add b0"]
    assert list(desk.rows()) == ["b0"]


@pytest.mark.newest
def test_foreign_card_is_refused(desk: Desk):
    desk.hub.make(NAME).add({"README.md": b"# theirs"}, "mine")
    assert "README.md, which `publish` did not write" in desk.publish("b0", status=1)
    assert desk.published() == ["mine"]
    assert not desk.manifest.exists()


@pytest.mark.newest
def test_weights_of_others_are_refused_also_beside_published_ones(desk: Desk):
    desk.publish("b0")
    desk.repository.add({"b0_ns.safetensors": b"theirs"}, "theirs")
    assert "b0_ns.safetensors, which `publish` did not write" in desk.publish("b0_ns", status=1)
    assert desk.published() == ["v1.0: add b0", "theirs"]


def test_tag_of_others_is_not_moved(desk: Desk):
    repository = desk.hub.make(NAME)
    repository.tags["v1.0"] = first = repository.head
    assert "has a tag v1.0 already" in desk.publish("b0", status=1)
    assert (desk.published(), repository.tags) == ([], {"v1.0": first})


def test_repository_that_was_made_empty_gets_the_first_commit(desk: Desk):
    first = desk.hub.make(NAME).head
    desk.publish("b0")
    assert desk.repository.parents[desk.repository.head] == first
    assert desk.published() == ["v1.0: add b0"]


@pytest.mark.newest
def test_damaged_models_json_is_refused(desk: Desk):
    desk.hub.make(NAME).add({"models.json": b"\xff{"}, "mine")
    assert "models.json of org/name is damaged" in desk.publish("b0", status=1)
    assert desk.published() == ["mine"]


# --- the manifest's rows --------------------------------------------------------------------------------------


def test_rows_pin_commit_and_bytes(desk: Desk):
    desk.publish("b0", "b0_ns")
    assert list(desk.rows()) == ["b0", "b0_ns"]
    for key, row in desk.rows().items():
        where = {"repository": NAME, "filename": f"{key}.safetensors", "revision": desk.repository.head}
        assert_row_tells_the_run(row, where, desk.delta(key), desk.runs / key)
    overlay = manifest.parse_overlay(json.loads(desk.manifest.read_text()), folder=desk.folder, source="rows")
    assert overlay["b0"].test.size == 48


def row_texts(text: str) -> tuple[str, dict[str, str]]:
    """A manifest's text, cut into what comes before the rows and the rows."""
    head, *rows = re.split(r'^(?=    "[a-z0-9_]+": \{)', text, flags=re.M)
    return head, {row.split('"')[1]: row for row in rows}


@pytest.mark.newest
def test_whole_manifest_gets_the_rows_and_is_otherwise_the_same_text(desk: Desk):
    shutil.copy(PACKAGED, desk.manifest)
    desk.publish("b0", "b0_ns")
    text = desk.manifest.read_text()
    jsonschema.validate(json.loads(text), json.loads((ROOT / "weights_manifest.schema.json").read_text()))
    manifest.parse(json.loads(text))
    head, found = row_texts(text)
    first, before = row_texts(PACKAGED.read_text())
    assert head == first
    assert list(found) == list(before)
    assert {key for key in found if found[key] != before[key]} == {"b0", "b0_ns"}
    changed, row = json.loads(text)["variants"]["b0"], json.loads(PACKAGED.read_text())["variants"]["b0"]
    assert {key for key in row if changed[key] != row[key]} == {"weights", "test"}


@pytest.mark.newest
def test_rows_of_others_stay(desk: Desk):
    weights = {"repository": "they/theirs", "filename": "b1.safetensors", "revision": "a" * 40, "sha256": "b" * 64}
    theirs = {"b1": {"weights": weights}, "b0": {"title": "Mine"}}
    desk.manifest.write_text(json.dumps({"schema_version": 1, "variants": theirs}))
    desk.publish("b0")
    assert list(desk.rows()) == ["b1", "b0"]
    assert desk.rows()["b1"] == theirs["b1"]
    assert desk.rows()["b0"]["title"] == "Mine"
    assert desk.rows()["b0"]["weights"]["filename"] == "b0.safetensors"


@pytest.mark.newest
def test_row_takes_the_test_size_of_the_run_whatever_it_had(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    """The row says 96 pixels of an earlier run; this one was tuned for what the overlay in use says, 48."""
    monkeypatch.setenv(manifest.OVERLAY_VARIABLE, '{"schema_version": 1, "variants": {"b0": {"test": {"size": 48}}}}')
    test = {"size": 96, "crop_pct": 1.0, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    desk.manifest.write_text(json.dumps({"schema_version": 1, "variants": {"b0": {"test": test}}}))
    desk.publish("b0")
    assert desk.rows()["b0"]["test"] == test | {"size": 48}


@pytest.mark.newest
@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema_version": 2, "variants": {}}',
        b'{"schema_version": 1, "variants": {"b0": {"weights": 5}}}',
        b'{"schema_version": 1, "variants": {"b0": null}}',
    ],
    ids=["torn", "list", "bytes", "deep", "version", "weights", "null"],
)
def test_malformed_manifest_is_refused_before_anything_is_published(desk: Desk, content: bytes):
    desk.manifest.write_bytes(content)
    assert str(desk.manifest) in desk.publish("b0", status=1)
    assert desk.hub.repositories == {}
    assert desk.manifest.read_bytes() == content


@pytest.mark.newest
def test_folder_in_place_of_the_manifest_is_refused_before_anything_is_published(desk: Desk):
    desk.manifest.mkdir()
    assert "--manifest" in desk.publish("b0", status=1)
    assert desk.hub.repositories == {}


@pytest.mark.newest
def test_manifest_that_cannot_be_written_leaves_the_rest_and_the_same_command_completes_it(desk: Desk):
    link = desk.folder / "link"
    link.symlink_to(desk.folder / "nowhere")  # nothing to read there, and no folder to write in, even for root
    said = desk.publish("b0", more=("--manifest", link / "rows.json"), status=1)
    assert "All is published, but" in said
    assert str(link / "rows.json") in said
    assert desk.published() == ["v1.0: add b0"]
    assert desk.repository.tags == {"v1.0": desk.repository.head}
    (desk.folder / "nowhere").mkdir()
    desk.publish("b0", more=("--manifest", link / "rows.json"))
    assert desk.published() == ["v1.0: add b0"]
    rows = json.loads((link / "rows.json").read_text())["variants"]
    assert rows["b0"]["weights"]["revision"] == desk.repository.head


# --- who may not ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("where", [CREATE, COMMIT])
def test_token_that_may_not_write_is_told_so(desk: Desk, status: int, where: str):
    desk.hub.trouble("POST", where, status)
    said = desk.publish("b0", status=1)
    assert said.count("Nothing was published") == 1
    assert "may not write to org/name" in said and "member of org" in said and str(status) in said
    assert desk.published() == []
    assert not desk.manifest.exists()
    desk.publish("b0")
    assert desk.published() == ["v1.0: add b0"]


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_without_a_token_nothing_is_published(desk: Desk, monkeypatch: pytest.MonkeyPatch, token: str | None):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    said = desk.publish("b0", status=1)
    assert "Nothing was published" in said and "hf auth login" in said
    assert token is None or token not in said
    assert NAME not in desk.hub.repositories


def test_token_that_cannot_be_sent_is_not_shown(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    """HTTP's library names the header that it cannot send, and what is in it."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret\x01secret")
    said = desk.publish("b0", status=1)
    assert "secret" not in said
    assert "Nothing was published" in said


@pytest.mark.newest
def test_organisation_of_others_is_refused(desk: Desk):
    said = desk.publish("b0", repo="others/name", status=1)
    assert "member of others" in said and "Nothing was published" in said
    assert desk.hub.repositories == {}


@pytest.mark.newest
def test_organisation_that_is_not_there_is_refused(desk: Desk):
    desk.hub.trouble("POST", CREATE, 404)
    said = desk.publish("b0", status=1)
    assert "404" in said and "member of org" in said
    assert desk.hub.repositories == {}


# --- what goes wrong in the middle ----------------------------------------------------------------------------


def test_commit_that_somebody_made_meanwhile_is_not_written_over(desk: Desk):
    desk.publish("b0")
    repository = desk.repository
    desk.hub.trouble("POST", COMMIT, lambda: repository.add({"LICENSE": b"theirs"}, "meanwhile"))
    said = desk.publish("b0_ns", status=1)
    assert "Somebody else wrote there meanwhile" in said and "Nothing was published" in said
    assert desk.published() == ["v1.0: add b0", "meanwhile"]
    assert list(desk.rows()) == ["b0"]
    desk.publish("b0_ns")
    assert desk.published() == ["v1.0: add b0", "meanwhile", "v1.1: add b0_ns"]
    assert desk.repository.commits[desk.repository.head]["LICENSE"] == b"theirs"


def test_repository_that_somebody_made_meanwhile_is_not_written_over(desk: Desk):
    """The repository was not there when publish looked, and has a card of its own when publish writes."""
    desk.hub.trouble("POST", CREATE, lambda: desk.hub.make(NAME).add({"README.md": b"# theirs"}, "theirs"))
    said = desk.publish("b0", status=1)
    assert "Nothing was published" in said and "meanwhile" in said
    assert desk.published() == ["theirs"]
    assert not desk.manifest.exists()
    assert "did not write" in desk.publish("b0", status=1)


@pytest.mark.parametrize("what", [507, DROP, DROP_AFTER])
def test_upload_that_fails_publishes_nothing_and_the_next_try_completes(desk: Desk, what: int | str):
    desk.hub.trouble("PUT", LFS, what, always=True)
    said = desk.publish("b0", status=1)
    assert "Nothing was published" in said
    assert desk.hub.calls("POST", COMMIT) == 0
    assert not desk.manifest.exists()
    desk.hub.clear()
    desk.publish("b0")
    assert desk.published() == ["v1.0: add b0"]
    assert desk.repository.tags == {"v1.0": desk.repository.head}
    assert desk.rows()["b0"]["weights"]["revision"] == desk.repository.head


def test_upload_that_breaks_off_once_is_tried_again(desk: Desk):
    desk.hub.trouble("PUT", LFS, DROP)
    desk.publish("b0")
    assert desk.hub.calls("PUT", LFS) == 2
    assert desk.repository.commits[desk.repository.head]["b0.safetensors"] == desk.delta("b0")


@pytest.mark.parametrize("what", [500, DROP])
def test_commit_that_fails_publishes_nothing_and_the_next_try_completes(desk: Desk, what: int | str):
    desk.hub.trouble("POST", COMMIT, what)
    said = desk.publish("b0", status=1)
    assert "same command" in said and "its tag is not" in said
    assert desk.published() == []
    assert not desk.manifest.exists()
    desk.publish("b0")
    assert desk.published() == ["v1.0: add b0"]
    assert desk.repository.tags == {"v1.0": desk.repository.head}
    assert desk.hub.calls("PUT", LFS) == 1  # the delta was there already


def test_commit_whose_answer_is_lost_is_not_denied_and_not_made_twice(desk: Desk):
    desk.hub.trouble("POST", COMMIT, DROP_AFTER)
    said = desk.publish("b0", status=1)
    assert "Nothing was published" not in said
    assert "is not known" in said and "same command" in said
    assert desk.published() == ["v1.0: add b0"]
    assert desk.repository.tags == {}
    desk.publish("b0")
    assert desk.published() == ["v1.0: add b0"]
    assert desk.repository.tags == {"v1.0": desk.repository.head}
    assert desk.rows()["b0"]["weights"]["revision"] == desk.repository.head


@pytest.mark.parametrize("what", [403, 500, DROP])
def test_tag_that_fails_is_all_that_the_next_try_makes(desk: Desk, what: int | str):
    desk.hub.trouble("POST", TAG, what)
    said = desk.publish("b0", status=1)
    head = desk.repository.head
    assert f"The commit {head} is published" in said and "tag v1.0 is" in said and "not" in said
    assert desk.published() == ["v1.0: add b0"]
    assert desk.repository.tags == {}
    assert not desk.manifest.exists()
    desk.publish("b0")
    assert desk.hub.calls("POST", COMMIT) == 1
    assert desk.repository.tags == {"v1.0": head}
    assert desk.rows()["b0"]["weights"]["revision"] == head


def test_tag_whose_answer_is_lost_is_found(desk: Desk):
    desk.hub.trouble("POST", TAG, DROP_AFTER)
    said = desk.publish("b0", status=1)
    assert "whether its tag v1.0 is, is not known" in said
    desk.publish("b0")
    assert desk.hub.calls("POST", TAG) == 1
    assert desk.rows()["b0"]["weights"]["revision"] == desk.repository.tags["v1.0"]


@pytest.mark.parametrize("what", [501, DROP])
def test_hub_that_does_not_say_what_it_has_is_not_written_to(desk: Desk, what: int | str):
    desk.publish("b0")
    desk.hub.trouble("GET", "/refs", what)
    assert "Nothing was published" in desk.publish("b0_ns", status=1)
    assert desk.published() == ["v1.0: add b0"]


def test_hub_that_is_not_there(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = desk.publish("b0", status=1)
    assert "http://127.0.0.1:9 was not reached" in said and "Nothing was published" in said


@pytest.mark.newest
def test_standin_refuses_what_a_hub_refuses(desk: Desk):
    """The tests above rely on this."""
    repository = desk.hub.make(NAME)
    body = b'{"key": "header", "value": {"summary": "late", "parentCommit": "' + b"0" * 40 + b'"}}'
    with pytest.raises(hub_standin.RefusedError) as refused:
        desk.hub.answer("POST", f"/api/models/{NAME}/commit/main", body, True)
    assert refused.value.status == 412
    with pytest.raises(hub_standin.RefusedError) as refused:
        desk.hub.answer("POST", f"/api/models/{NAME}/commit/main", body, False)
    assert refused.value.status == 401
    assert len(repository.commits) == 1


# --- whole models -------------------------------------------------------------------------------------------------


def own_run(folder: Path, *seed: int) -> Path:
    """What a base stage on classes of one's own leaves, as far as it is published."""
    data = tiny.make_data(folder.with_name("data"), train=4, val=2)
    small = ["--train-size", "32", "--epochs", "1", "--batch-size", "4", "-j", "0", "--data", str(data)]
    small += ["--output", str(folder.parent), "--experiment", folder.name, "--seed", *map(str, seed)]
    tiny.run([*tiny.NETWORK, "--stage", "base", "--no-pretrained", *small], folder.with_name("said.txt"))
    return folder


def test_a_network_of_ones_own_gets_one_commit_of_its_own(desk: Desk, tmp_path: Path):
    first, second = own_run(tmp_path / "first", 1), own_run(tmp_path / "second", 2)
    said = desk.publish(str(first))
    assert desk.published() == ["Add test_efficientnet"]
    files = desk.repository.commits[desk.repository.head]
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert json.loads(files["config.json"])["label_names"] == list(tiny.CLASSES)
    assert desk.repository.head in said and f"timm.create_model('hf-hub:{NAME}', pretrained=True)" in said
    assert "all was there already" in desk.publish(str(first))
    assert len(desk.published()) == 1
    assert "of another model. Nothing was published" in desk.publish(str(second), status=1)
    assert len(desk.published()) == 1
    desk.publish(str(second), more=("--replace",))
    assert len(desk.published()) == 2
    assert desk.repository.commits[desk.repository.head]["model.safetensors"] != files["model.safetensors"]


@pytest.mark.newest
def test_whole_variants_get_repositories_beside_the_deltas(desk: Desk):
    said = desk.publish("b0", more=("--whole",))
    whole = "org/fixefficientnet_b0.ap_in1k"
    assert set(desk.hub.repositories) == {NAME, whole}
    assert f"timm.create_model('hf-hub:{whole}', pretrained=True)" in said
    desk.publish("b0", more=("--whole",))
    assert [len(repository.commits) for repository in desk.hub.repositories.values()] == [2, 2]
