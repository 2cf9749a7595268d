"""Publishing finished runs as a git repository on disk: what is in it, what is refused, what the manifest gets."""

import getpass
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jsonschema
import pytest
import safetensors.torch
import tiny
import torch
from conftest import ROOT
from huggingface_hub import ModelCard, constants

from fixefficientnet import delta, manifest
from fixefficientnet.errors import PublishError
from fixefficientnet.publishing.repository import InFolder

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git is needed for --to")

FILES = {"README.md", "models.json", "b0.safetensors"}
PACKAGED = ROOT / "weights_manifest.json"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Someone", "-c", "user.email=someone@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def shown(folder: Path, name: str, revision: str = "HEAD") -> bytes:
    return subprocess.run(["git", "show", f"{revision}:{name}"], cwd=folder, capture_output=True, check=True).stdout


def names_in(folder: Path, revision: str = "HEAD") -> set[str]:
    return set(git(folder, "ls-tree", "-r", "--name-only", revision).splitlines())


def models(folder: Path) -> dict:
    return json.loads(shown(folder, "models.json"))["models"]


def commits(folder: Path) -> list[str]:
    return git(folder, "rev-list", "--all").splitlines() if (folder / ".git").exists() else []


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder and below, but for git's own note of when it looked at which file."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != "index"
    }


def report(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def rewrite(file: Path, change: Callable[[dict], object]) -> None:
    """Changes a JSON file in place."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@dataclass
class Desk:
    """A place to publish at: a repository's folder and a manifest's file, neither there yet."""

    folder: Path
    runs: Path

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    @property
    def manifest(self) -> Path:
        return self.folder / "rows.json"

    def publish(self, *runs: str | Path, more: tuple[object, ...] = (), status: int = 0, repo: str = "org/name") -> str:
        """Publishes finished runs by name, or other folders; what was said, on stderr if it was refused."""
        folders = [self.runs / run for run in runs]  # an absolute path stays what it is
        place = ["--repo", repo, "--to", self.repository, "--manifest", self.manifest]
        out, err = tiny.cli("publish", *folders, *place, *more, status=status)
        assert "Traceback" not in out + err
        return err if status else out

    def refuse(self, *runs: str | Path, more: tuple[object, ...] = ()) -> str:
        """The same for what is refused: nothing has changed by it."""
        before = commits(self.repository), self.manifest.exists() and self.manifest.read_bytes()
        said = self.publish(*runs, more=more, status=1)
        assert (commits(self.repository), self.manifest.exists() and self.manifest.read_bytes()) == before
        return said

    def copy(self, name: str = "b0") -> Path:
        """A finished run to tamper with."""
        unneeded = shutil.ignore_patterns("checkpoint", "tensorboard", "curve.png")
        return shutil.copytree(self.runs / name, self.folder / "copies" / name, ignore=unneeded)

    def rows(self) -> dict:
        return json.loads(self.manifest.read_text())["variants"]

    def someones(self, **files: bytes) -> None:
        """Makes a repository with a commit of somebody's files."""
        self.repository.mkdir()
        git(self.repository, "init", "-q")
        for name, data in ({"LICENSE": b"free"} | files).items():
            (self.repository / name).write_bytes(data)
        git(self.repository, "add", "--all", "--force")
        git(self.repository, "commit", "-qm", "mine")


@pytest.fixture
def desk(tmp_path: Path, hub_cache: Path, finished_runs: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # whoever runs the tests has no say in them
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    return Desk(tmp_path, finished_runs)


# --- what is published ----------------------------------------------------------------------------------------


def test_first_publication_is_one_commit_and_its_tag(desk: Desk):
    said = desk.publish("b0")
    repository = desk.repository
    assert names_in(repository) == FILES
    assert {path.name for path in repository.iterdir()} == FILES | {".git"}
    (commit,) = commits(repository)
    assert git(repository, "tag", "--list", "--format=%(refname:strip=2) %(objecttype) %(objectname)") == (
        f"v1.0 commit {commit}"
    )
    assert git(repository, "symbolic-ref", "HEAD") == "refs/heads/main"
    assert git(repository, "status", "--porcelain") == ""
    assert git(repository, "log", "--format=%s") == "v1.0: add b0"
    assert git(repository, "fsck", "--strict") == ""
    assert commit in said
    assert shown(repository, "b0.safetensors") == (desk.runs / "b0" / "delta.safetensors").read_bytes()


def test_models_json_tells_what_the_run_measured(desk: Desk):
    desk.publish("b0", "b0_ns")
    assert list(models(desk.repository)) == ["b0", "b0_ns"]
    for key, entry in models(desk.repository).items():
        data, found = shown(desk.repository, f"{key}.safetensors"), report(desk.runs / key)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() == found["delta_sha256"]
        assert entry["bytes"] == len(data)
        assert entry["version"] == "v1.0"
        for name in ("measured", "recipe", "train_images", "processes", "fixres_against_base_at_test_size"):
            assert entry[name] == found[name], name
        assert entry["backbone"] == manifest.find(key).backbone.name


def test_card_has_the_metadata_that_the_hub_reads(desk: Desk):
    desk.publish("b0", "b0_ns")
    card = ModelCard(shown(desk.repository, "README.md").decode())
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "fixefficientnet"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.base_model == ["timm/tf_efficientnet_b0.ap_in1k", "timm/tf_efficientnet_b0.ns_jft_in1k"]
    results = {result.metric_name: result for result in card.data.eval_results}
    assert len(results) == 4
    for key in ("b0", "b0_ns"):
        tuned = report(desk.runs / key)["measured"]["tuned"]
        for metric, figure in (("top-1", "top1"), ("top-5", "top5")):
            result = results[f"{metric} of {key} at 48 pixels"]
            assert result.metric_value == pytest.approx(tuned[figure] / 100, abs=1e-5)
            assert result.metric_type == "accuracy"
            # images that are made here are nobody's ImageNet
            assert (result.dataset_type, result.dataset_name) == ("other", "data/val")
    assert card.data.datasets is None


def test_card_has_measured_figures_beside_the_papers(desk: Desk):
    desk.publish("b0", "b0_ns")
    text = shown(desk.repository, "README.md").decode()
    for key in ("b0", "b0_ns"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{key}` |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        measured, paper = report(desk.runs / key)["measured"], manifest.find(key).paper
        assert cells[2] == "data/val, 6 images"
        assert cells[3].startswith(f"{measured['base']['top1']:.2f} / {measured['base']['top5']:.2f} at 32, ")
        assert " at 48, " in cells[4]
        assert cells[5] == f"**{measured['tuned']['top1']:.2f} / {measured['tuned']['top5']:.2f} at 48, 1**"
        assert cells[6] == f"{measured['tuned']['top1_low']:.2f} to {measured['tuned']['top1_high']:.2f}"
        assert cells[7] == f"{paper.base.top1} / {paper.base.top5} at {paper.base.test_size}"
        assert cells[8] == f"{paper.fix.top1} / {paper.fix.top5} at {paper.fix.test_size}"
    assert "cannot be compared" in text
    recipes = [json.loads(found) for found in re.findall(r"```json\n(.*?)\n```", text, re.S)]
    assert recipes == [report(desk.runs / key)["recipe"] for key in ("b0", "b0_ns")]
    assert "@article{touvron2020fixefficientnet" in text
    assert "@inproceedings{touvron2019fixres" in text
    assert 'fixefficientnet.create("b0", pretrained=weights)' in text
    assert 'torch.hub.load("REPO", "fixefficientnet_b0", pretrained=weights)' in text
    assert f'timm.create_model("{manifest.find("b0").timm_name}", pretrained=weights)' in text
    assert "hf://org/name/b0.safetensors@v1.0" in text


def test_neither_images_nor_this_machine_are_published(desk: Desk):
    desk.publish("b0", "b0_ns")
    published = [shown(desk.repository, name) for name in names_in(desk.repository)]
    assert not [name for name in names_in(desk.repository) if "probe" in name]
    images = (desk.runs / "b0" / "probe.safetensors").read_bytes()
    tensors = safetensors.torch.load(images)
    telling = [tensors["images"][0].numpy().tobytes(), images[8:200]]
    telling += [str(folder).encode() for folder in (desk.folder, desk.runs, desk.runs.parent, Path.home())]
    user = re.compile(rb"(?<![\w.-])" + re.escape(getpass.getuser().encode()) + rb"(?![\w.-])")
    for data in [*published, desk.manifest.read_bytes(), git(desk.repository, "cat-file", "-p", "HEAD").encode()]:
        assert not [what for what in telling if what in data]
        text = data if b"\0" not in data else data[: 8 + int.from_bytes(data[:8], "little")]  # not the tensors
        assert not user.search(text)


@pytest.mark.parametrize(
    ("place", "name"),
    [("/home/alice/val", "val"), ("/Users/alice/pets/val", "pets/val"), ("/srv/pets/val", "pets/val"), ("/val", "val")],
)
def test_data_set_is_named_without_its_owner(desk: Desk, place: str, name: str):
    run = desk.copy()
    rewrite(run / "report.json", lambda values: values["data"].update(validation=place))
    desk.publish(run)
    assert models(desk.repository)["b0"]["dataset"] == name
    assert b"alice" not in shown(desk.repository, "README.md") + shown(desk.repository, "models.json")
    assert desk.rows()["b0"]["weights"]["measured"]["dataset"] == name


def test_commit_is_made_in_the_users_name_if_he_has_one(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    desk.publish("b0")
    assert git(desk.repository, "log", "--format=%an %ae") == "fixefficientnet fixefficientnet@localhost"
    config = desk.folder / "gitconfig"
    config.write_text("[user]\nname = Ada\nemail = ada@example.org\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    desk.publish("b0_ns")
    assert git(desk.repository, "log", "-1", "--format=%an %ae") == "Ada ada@example.org"


# --- the manifest's rows --------------------------------------------------------------------------------------


def test_rows_pin_commit_and_bytes(desk: Desk):
    desk.publish("b0", "b0_ns")
    assert list(desk.rows()) == ["b0", "b0_ns"]
    for key, row in desk.rows().items():
        data = (desk.runs / key / "delta.safetensors").read_bytes()
        tuned = report(desk.runs / key)["measured"]["tuned"]
        assert row["weights"] == {
            "repository": "org/name",
            "filename": f"{key}.safetensors",
            "revision": git(desk.repository, "rev-parse", "HEAD"),
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "license": "apache-2.0",
            "measured": {
                "dataset": "data/val",
                "images": 6,
                "top1": pytest.approx(tuned["top1"], abs=1e-3),
                "top5": pytest.approx(tuned["top5"], abs=1e-3),
            },
        }
        assert row["test"]["size"] == 48  # not what the packaged row says
    overlay = manifest.parse_overlay(json.loads(desk.manifest.read_text()), folder=desk.folder, source="rows")
    assert overlay["b0"].test.size == 48


def row_texts(text: str) -> tuple[str, dict[str, str]]:
    """A manifest's text, cut into what comes before the rows and the rows."""
    head, *rows = re.split(r'^(?=    "[a-z0-9_]+": \{)', text, flags=re.M)
    return head, {row.split('"')[1]: row for row in rows}


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


def test_rows_of_others_stay(desk: Desk):
    weights = {"repository": "they/theirs", "filename": "b1.safetensors", "revision": "a" * 40, "sha256": "b" * 64}
    theirs = {"b1": {"weights": weights}, "b0": {"title": "Mine"}}
    desk.manifest.write_text(json.dumps({"schema_version": 1, "variants": theirs}))
    desk.publish("b0")
    assert list(desk.rows()) == ["b1", "b0"]
    assert desk.rows()["b1"] == theirs["b1"]
    assert desk.rows()["b0"]["title"] == "Mine"
    assert desk.rows()["b0"]["weights"]["filename"] == "b0.safetensors"


def test_row_takes_the_test_size_of_the_run_whatever_it_had(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    """The row says 96 pixels of an earlier run; this one was tuned for what the overlay in use says, 48."""
    monkeypatch.setenv(manifest.OVERLAY_VARIABLE, '{"schema_version": 1, "variants": {"b0": {"test": {"size": 48}}}}')
    test = {"size": 96, "crop_pct": 1.0, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    desk.manifest.write_text(json.dumps({"schema_version": 1, "variants": {"b0": {"test": test}}}))
    desk.publish("b0")
    assert desk.rows()["b0"]["test"] == test | {"size": 48}


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
    assert str(desk.manifest) in desk.refuse("b0")
    assert not desk.repository.exists()


def test_folder_in_place_of_the_manifest_is_refused_before_anything_is_published(desk: Desk):
    desk.manifest.mkdir()
    assert "--manifest" in desk.publish("b0", status=1)
    assert not desk.repository.exists()


def test_manifest_that_cannot_be_written_leaves_the_rest_and_the_same_command_completes_it(desk: Desk):
    link = desk.folder / "link"
    link.symlink_to(desk.folder / "nowhere")  # nothing to read there, and no folder to write in, even for root
    said = desk.publish("b0", more=("--manifest", link / "rows.json"), status=1)
    assert "All is published, but" in said
    assert str(link / "rows.json") in said
    (commit,) = commits(desk.repository)
    assert git(desk.repository, "rev-parse", "v1.0") == commit
    (desk.folder / "nowhere").mkdir()
    desk.publish("b0", more=("--manifest", link / "rows.json"))
    assert commits(desk.repository) == [commit]
    rows = json.loads((link / "rows.json").read_text())["variants"]
    assert rows["b0"]["weights"]["revision"] == commit


# --- again, more, other weights -------------------------------------------------------------------------------


def test_same_runs_again_change_nothing(desk: Desk):
    desk.publish("b0", "b0_ns")
    before, written = snapshot(desk.repository), desk.manifest.stat().st_mtime_ns
    text = desk.manifest.read_text()
    assert "v1.0: all was there already" in desk.publish("b0", "b0_ns")
    assert "v1.0: all was there already" in desk.publish("b0_ns")
    assert snapshot(desk.repository) == before
    assert (desk.manifest.read_text(), desk.manifest.stat().st_mtime_ns) == (text, written)


def test_second_variant_is_added_under_the_next_tag(desk: Desk):
    desk.publish("b0")
    first = git(desk.repository, "rev-parse", "HEAD")
    desk.publish("b0_ns")
    second = git(desk.repository, "rev-parse", "HEAD")
    assert git(desk.repository, "rev-parse", "HEAD~1", "v1.0", "v1.1").split() == [first, first, second]
    assert git(desk.repository, "log", "-1", "--format=%s") == "v1.1: add b0_ns"
    changed = git(desk.repository, "diff", "--name-only", first, second).splitlines()
    assert set(changed) == {"README.md", "models.json", "b0_ns.safetensors"}
    assert {key: entry["version"] for key, entry in models(desk.repository).items()} == {"b0": "v1.0", "b0_ns": "v1.1"}
    text = shown(desk.repository, "README.md").decode()
    assert "| `b0` |" in text and "| `b0_ns` |" in text
    # both again: each row keeps the commit at which its weights came
    for _ in range(2):
        desk.publish("b0_ns", "b0")
        assert {key: row["weights"]["revision"] for key, row in desk.rows().items()} == {"b0": first, "b0_ns": second}
        desk.manifest.unlink()
    assert len(commits(desk.repository)) == 2


def test_other_weights_are_refused_unless_they_shall_replace(desk: Desk):
    desk.publish("b0")
    old = (desk.runs / "b0" / "delta.safetensors").read_bytes()
    said = desk.refuse("other")
    assert "--replace" in said and hashlib.sha256(old).hexdigest() in said
    assert "Nothing was published" in said
    desk.publish("other", more=("--replace",))
    new = (desk.runs / "other" / "delta.safetensors").read_bytes()
    assert new != old
    assert shown(desk.repository, "b0.safetensors") == shown(desk.repository, "b0.safetensors", "v2.0") == new
    assert shown(desk.repository, "b0.safetensors", "v1.0") == old
    assert git(desk.repository, "tag").split() == ["v1.0", "v2.0"]
    assert git(desk.repository, "log", "-1", "--format=%s") == "v2.0: replace b0"
    weights = desk.rows()["b0"]["weights"]
    assert weights["revision"] == git(desk.repository, "rev-parse", "v2.0")
    assert weights["sha256"] == hashlib.sha256(new).hexdigest()
    assert "all was there already" in desk.publish("other", more=("--replace",))
    assert "--replace" in desk.refuse("b0")  # nor back again by mistake


def test_tag_that_is_missing_is_all_that_is_made(desk: Desk):
    """As after a process that was killed between the commit and its tag."""
    desk.publish("b0")
    git(desk.repository, "tag", "-d", "v1.0")
    desk.manifest.unlink()
    desk.publish("b0")
    assert commits(desk.repository) == [git(desk.repository, "rev-parse", "v1.0")]
    assert desk.rows()["b0"]["weights"]["revision"] == commits(desk.repository)[0]


def test_somebody_elses_tag_is_not_moved(desk: Desk):
    desk.someones()
    git(desk.repository, "tag", "v1.0")
    assert "has a tag v1.0 already" in desk.refuse("b0")


# --- runs that are refused ------------------------------------------------------------------------------------


def trained_on_what_it_measured(run: Path) -> None:
    rewrite(run / "recipe.json", lambda values: values["images"].update(train=values["images"]["validation"]))


def no_report(run: Path) -> None:
    (run / "report.json").unlink()


def no_recipe(run: Path) -> None:
    (run / "recipe.json").unlink()


def no_delta(run: Path) -> None:
    (run / "delta.safetensors").unlink()


def no_probe(run: Path) -> None:
    (run / "probe.safetensors").unlink()


def no_journal(run: Path) -> None:
    shutil.rmtree(run / "evaluations")


def nothing_evaluated(run: Path) -> None:
    journal = run / "evaluations" / "tuned.0.jsonl"
    journal.write_text(journal.read_text().splitlines()[-1])  # the note of how many images there are


def journal_of_other_shape(run: Path) -> None:
    journal = run / "evaluations" / "tuned.0.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[0]["predictions"] = [row[:2] for row in lines[0]["predictions"]]
    journal.write_text("\n".join(map(json.dumps, lines)))


def better_journal(run: Path) -> None:
    journal = run / "evaluations" / "tuned.0.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for labels, predicted, *_ in lines[0]["predictions"]:
        predicted[0] = labels[0]
    journal.write_text("\n".join(map(json.dumps, lines)))


def better_report(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values["measured"]["tuned"].update(top1=99.9))


def better_interval(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values["measured"]["tuned"].update(top5_low=99.9))


def better_test(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values["fixres_against_base_at_test_size"].update(p=1e-9))


def worse_base(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values["measured"]["base"].update(top5=-1.0))


def report_without_rows(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values.update(measured=[]))


def report_of_numbers(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values["measured"].update(tuned=5))


def report_without_data(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values.update(data={}))


def report_of_words(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values.update(data="validation", measured="tuned"))


def torn_report(run: Path) -> None:
    (run / "report.json").write_text((run / "report.json").read_text()[:-20])


def flipped_byte(run: Path) -> None:
    data = bytearray((run / "delta.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "delta.safetensors").write_bytes(data)


def other_weights(run: Path) -> None:
    """A sound delta with the same recipe, and its hash in the report: only the logits tell."""
    tuned = delta.load(run / "delta.safetensors")
    tensors = {name: tensor * 1.1 for name, tensor in tuned.tensors.items()}
    sha256 = delta.save(replace(tuned, tensors=tensors), run / "delta.safetensors")
    rewrite(run / "report.json", lambda values: values.update(delta_sha256=sha256))


def other_recipe(run: Path) -> None:
    rewrite(run / "recipe.json", lambda values: values["recipe"].update(epochs=300))


def other_variant(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values.update(variant="b0_ns"))


def change_probe(run: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load((run / "probe.safetensors").read_bytes())
    change(tensors)
    safetensors.torch.save_file(tensors, run / "probe.safetensors")


def probe_of_other_logits(run: Path) -> None:
    change_probe(run, lambda tensors: tensors["logits"].mul_(1.5))


def probe_of_nan(run: Path) -> None:
    change_probe(run, lambda tensors: tensors["logits"].fill_(torch.nan))


def probe_of_infinity(run: Path) -> None:
    change_probe(run, lambda tensors: tensors["logits"].fill_(torch.inf))


def probe_of_zeros(run: Path) -> None:
    change_probe(run, lambda tensors: tensors["logits"].zero_())


def probe_of_less_classes(run: Path) -> None:
    change_probe(run, lambda tensors: tensors.update(logits=tensors["logits"][:, :10].contiguous()))


def torn_probe(run: Path) -> None:
    (run / "probe.safetensors").write_bytes((run / "probe.safetensors").read_bytes()[:-100])


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (no_report, "has no report.json"),
        (no_recipe, "has no recipe.json"),
        (trained_on_what_it_measured, "the very images that it was trained on"),
        (no_delta, "lacks delta.safetensors"),
        (no_probe, "lacks probe.safetensors"),
        (no_journal, "is no evaluation, or an unfinished one"),
        (nothing_evaluated, "damaged"),
        (journal_of_other_shape, "damaged"),
        (better_journal, "the batches in evaluations/ give top1 100.0 for 'tuned'"),
        (better_report, "report.json says 99.9"),
        (better_interval, "report.json says 99.9"),
        (better_test, "another fixres_against_base_at_test_size"),
        (worse_base, "report.json says -1.0"),
        (report_without_rows, "report.json is damaged"),
        (report_of_numbers, "report.json is damaged"),
        (report_without_data, "report.json is damaged"),
        (report_of_words, "report.json is damaged"),
        (torn_report, "report.json is damaged"),
        (flipped_byte, "changed after the run"),
        (other_weights, "do not give the logits that the run left"),
        (other_recipe, "different recipes"),
        (other_variant, "is the delta for b0, not for b0_ns"),
        (probe_of_other_logits, "do not give the logits that the run left"),
        (probe_of_nan, "do not give the logits that the run left"),
        (probe_of_infinity, "do not give the logits that the run left"),
        (probe_of_zeros, "do not give the logits that the run left"),
        (probe_of_less_classes, "do not give the logits that the run left"),
        (torn_probe, "cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_run_whose_promises_do_not_hold_is_refused(desk: Desk, tamper: Callable[[Path], None], said: str):
    run = desk.copy()
    tamper(run)
    assert said in desk.refuse(run)
    assert not desk.repository.exists()


def test_one_bad_run_keeps_the_good_one_back(desk: Desk):
    bad = desk.copy("b0_ns")
    flipped_byte(bad)
    assert str(bad) in desk.refuse("b0", bad)
    assert not desk.repository.exists()


def test_folder_that_is_no_run_is_refused(desk: Desk):
    assert "there is no such run" in desk.refuse("nothing")
    assert "there is no such run" in desk.refuse(Path(__file__))
    assert "has no report.json" in desk.refuse(desk.folder)


def test_two_runs_of_a_variant_are_refused(desk: Desk):
    said = desk.refuse("b0", "other")
    assert str(desk.runs / "b0") in said and str(desk.runs / "other") in said and "both runs of b0" in said


def test_backbone_of_another_day_is_refused(desk: Desk, hub_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """The backbone's repository moved on after the run: no one could load the delta."""
    cache = desk.folder / "hub"
    (repository,) = hub_cache.glob("models--timm--tf_efficientnet_b0.ap_in1k")
    shutil.copytree(repository, cache / repository.name)
    (file,) = cache.rglob("model.safetensors")
    tensors = safetensors.torch.load(file.read_bytes())
    safetensors.torch.save_file({name: tensor * 1.1 for name, tensor in tensors.items()}, file)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert "another backbone" in desk.refuse("b0")


@pytest.fixture(scope="module")
def strange_runs(hub_cache: Path, finished_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs that have no delta for the zoo: of another network, and from weights of one's own."""
    folder = tmp_path_factory.mktemp("strange")
    place = ["--data", str(finished_runs / "data"), "--output", str(folder), "-j", "0"]
    small = [*place, "--train-size", "32", "--test-size", "32", "--set", "epochs=1", "--set", "batch_size=12"]
    said, cache = folder / "said.txt", {"HF_HUB_CACHE": str(hub_cache)}
    tiny.run([*tiny.NETWORK, "--stage", "base", "--no-pretrained", "--experiment", "base", *small], said)
    whole = str(folder / "base" / "model.safetensors")
    tiny.run([*tiny.NETWORK, "--checkpoint", whole, "--experiment", "backbone", *small], said)
    (own,) = hub_cache.glob("models--timm--tf_efficientnet_b0.ap_in1k/snapshots/*/model.safetensors")
    tiny.run(["b0", "--checkpoint", str(own), "--experiment", "checkpoint", *small], said, **cache)
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [("base", "is no FixRes run"), ("backbone", "push_to_hf_hub"), ("checkpoint", "did not start from a variant's")],
)
def test_run_without_a_delta_for_the_zoo_is_refused(desk: Desk, strange_runs: Path, name: str, said: str):
    assert said in desk.refuse(strange_runs / name)
    assert not desk.repository.exists()


# --- places that are refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("name", "org/", "/name", "", "org/a--b", "org/a..b", "org/..", "../name", "org/na me", "org/näme", "org/a/b"),
        *("org/name.git", "-org/name", "org/" + "a" * 97, "org/name\n", "http://hub/org/name"),
    ],
)
def test_bad_repository_names_are_refused(desk: Desk, name: str):
    # before the runs are looked at: there is none
    assert "--repo" in desk.publish("nothing", repo=name, status=1)
    assert not desk.repository.exists()
    assert not desk.manifest.exists()


def test_folder_with_other_things_is_refused(desk: Desk):
    desk.repository.mkdir()
    (desk.repository / "thesis.tex").write_text("mine")
    assert "no git repository" in desk.refuse("b0")
    assert [path.name for path in desk.repository.iterdir()] == ["thesis.tex"]


def test_file_in_place_of_the_folder_is_refused(desk: Desk):
    desk.repository.write_text("mine")
    assert "no git repository" in desk.refuse("b0")
    assert desk.repository.read_text() == "mine"


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_folder_inside_another_repository_becomes_one_of_its_own(desk: Desk, there: bool):
    git(desk.folder, "init", "-q")
    git(desk.folder, "commit", "-q", "--allow-empty", "-m", "outer")
    before = git(desk.folder, "rev-parse", "HEAD")
    if there:
        desk.repository.mkdir()
    desk.publish("b0")
    assert git(desk.folder, "rev-list", "--all") == before
    assert git(desk.folder, "tag") == ""
    assert len(commits(desk.repository)) == 1


def test_folder_with_things_inside_another_repository_is_refused(desk: Desk):
    git(desk.folder, "init", "-q")
    git(desk.folder, "commit", "-q", "--allow-empty", "-m", "outer")
    desk.repository.mkdir()
    (desk.repository / "README.md").write_text("a folder of the outer repository")
    assert "no git repository" in desk.publish("b0", status=1)
    assert git(desk.folder, "log", "--format=%s") == "outer"
    assert (desk.repository / "README.md").read_text() == "a folder of the outer repository"


def test_environment_does_not_lead_git_elsewhere(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    other = desk.folder / "other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-q", "--allow-empty", "-m", "other")
    with monkeypatch.context() as patched:  # as in a git hook
        patched.setenv("GIT_DIR", str(other / ".git"))
        patched.setenv("GIT_WORK_TREE", str(other))
        patched.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
        desk.publish("b0")
    assert git(other, "log", "--all", "--format=%s") == "other"
    assert names_in(desk.repository) == FILES


def test_foreign_card_is_refused_and_kept(desk: Desk):
    desk.someones(**{"README.md": b"# My own"})
    said = desk.refuse("b0")
    assert "README.md" in said and "did not write" in said
    assert (desk.repository / "README.md").read_bytes() == shown(desk.repository, "README.md") == b"# My own"
    desk.publish("b0", more=("--replace",))
    assert shown(desk.repository, "README.md", "HEAD~1") == b"# My own"
    assert names_in(desk.repository) == FILES | {"LICENSE"}


def test_foreign_weights_are_refused_and_kept_also_beside_published_ones(desk: Desk):
    desk.publish("b0")
    (desk.repository / "b0_ns.safetensors").write_bytes(b"mine")
    git(desk.repository, "add", "-A")
    git(desk.repository, "commit", "-qm", "mine")
    assert "b0_ns.safetensors, which `publish` did not write" in desk.refuse("b0_ns")
    assert (desk.repository / "b0_ns.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["README.md", "b0.safetensors", "models.json"])
@pytest.mark.parametrize("how", ["untracked", "staged", "ignored"])
def test_what_is_in_no_commit_is_not_written_over(desk: Desk, name: str, how: str):
    desk.someones(**({".gitignore": b"*\n"} if how == "ignored" else {}))
    (desk.repository / name).write_bytes(b"mine")
    if how == "staged":
        git(desk.repository, "add", name)
    assert bool(git(desk.repository, "status", "--porcelain")) == (how != "ignored")
    said = desk.refuse("b0")
    assert name in said and "in no commit" in said and "Nothing was published" in said
    assert (desk.repository / name).read_bytes() == b"mine"
    (desk.repository / name).unlink()
    desk.publish("b0")
    assert names_in(desk.repository) == FILES | names_in(desk.repository, "HEAD~1")


def test_changed_card_is_not_written_over(desk: Desk):
    desk.publish("b0")
    with (desk.repository / "README.md").open("a") as card:
        card.write("by hand")
    assert "README.md" in desk.refuse("b0_ns")
    assert (desk.repository / "README.md").read_text().endswith("by hand")


def test_changes_to_other_files_survive(desk: Desk):
    desk.someones(notes=b"old", more=b"old")
    (desk.repository / "notes").write_bytes(b"changed")
    (desk.repository / "new").write_bytes(b"staged")
    git(desk.repository, "add", "new")
    git(desk.repository, "rm", "-q", "more")
    (desk.repository / "loose").write_bytes(b"untracked")
    before = set(git(desk.repository, "status", "--porcelain").splitlines())
    parent = git(desk.repository, "rev-parse", "HEAD")
    desk.publish("b0")
    assert set(git(desk.repository, "status", "--porcelain").splitlines()) == before
    assert git(desk.repository, "rev-parse", "HEAD~1") == parent
    assert names_in(desk.repository) == FILES | {"LICENSE", "notes", "more"}
    assert shown(desk.repository, "notes") == b"old"
    assert (desk.repository / "notes").read_bytes() == b"changed"
    assert (desk.repository / "new").read_bytes() == b"staged"


def test_other_branches_stay_and_the_one_checked_out_gets_the_commit(desk: Desk):
    desk.someones()
    git(desk.repository, "checkout", "-qb", "next")
    main = git(desk.repository, "rev-parse", "main")
    desk.publish("b0")
    assert git(desk.repository, "rev-parse", "main") == main
    assert git(desk.repository, "rev-parse", "next") == git(desk.repository, "rev-parse", "v1.0") != main


def test_detached_head_is_refused(desk: Desk):
    desk.someones()
    git(desk.repository, "checkout", "-q", "--detach")
    assert "on no branch" in desk.refuse("b0")


def test_commit_on_another_one_than_was_seen_is_refused(desk: Desk):
    """Somebody commits between the look at the repository and the commit."""
    desk.someones()
    seen = InFolder(desk.repository).present()
    git(desk.repository, "commit", "-q", "--allow-empty", "-m", "meanwhile")
    with pytest.raises(PublishError, match="Nothing was published"):
        InFolder(desk.repository).commit({"models.json": b"{}"}, "late", seen.head)
    assert git(desk.repository, "log", "--format=%s").splitlines() == ["meanwhile", "mine"]
    assert git(desk.repository, "status", "--porcelain") == ""
    desk.publish("b0")  # and is no obstacle for the next try


@pytest.mark.parametrize("there", [False, True], ids=["new", "repository"])
@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["", "dry"])
def test_without_git_nothing_is_published(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, there: bool, more: tuple[str, ...]
):
    if there:
        desk.someones()
    elif more:
        return  # nothing to look at, so nothing to look with
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(desk.folder))
        assert "needs git" in desk.publish("b0", more=more, status=1)
    assert not desk.manifest.exists()
    assert len(commits(desk.repository)) == there


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_what_git_itself_refuses_is_said_in_its_words(desk: Desk):
    desk.someones()
    os.chown(desk.repository, 12345, 12345)
    os.chown(desk.repository / ".git", 12345, 12345)
    assert "dubious ownership" in desk.publish("b0", status=1)
    assert not desk.manifest.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"version": "1", "models": {}}',
        b'{"version": "v1.0", "models": {"b1": 5}}',
        b'{"version": "v1.0", "models": {"b1": {}}}',
    ],
)
def test_damaged_models_json_is_refused(desk: Desk, content: bytes):
    desk.someones(**{"models.json": content})
    said = desk.refuse("b0")
    assert "models.json of org/name" in said and "Nothing was published" in said


def test_full_disk_leaves_no_commit_and_the_next_try_completes(desk: Desk):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # a delta has five times as much
    try:
        said = desk.publish("b0", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Nothing was published" in said
    assert commits(desk.repository) == []
    assert not desk.manifest.exists()
    desk.publish("b0")
    assert len(commits(desk.repository)) == 1
    assert git(desk.repository, "status", "--porcelain") == ""


def test_file_that_cannot_be_laid_out_leaves_no_commit(desk: Desk):
    desk.someones()
    (desk.repository / ".git" / "index.lock").touch()  # as another git at work leaves it
    said = desk.refuse("b0")
    assert "index.lock" in said and "Nothing was published" in said
    assert git(desk.repository, "tag") == ""
    (desk.repository / ".git" / "index.lock").unlink()
    desk.publish("b0")
    assert git(desk.repository, "status", "--porcelain") == ""


# --- a dry run ------------------------------------------------------------------------------------------------


def test_dry_run_shows_everything_and_writes_nothing(desk: Desk):
    before = snapshot(desk.folder)
    said = desk.publish("b0", "b0_ns", more=("--dry-run",))
    assert snapshot(desk.folder) == before == {}
    for name in ("README.md", "models.json", "b0.safetensors", "b0_ns.safetensors"):
        assert f"  {name}  " in said
    assert "v1.0: add b0, b0_ns" in said
    card = said.partition("README.md:\n")[2]
    assert ModelCard(card[: card.index("weights_manifest") if "weights_manifest" in card else None]).data.license
    rows = json.loads(said[said.index('{\n  "schema_version"') : said.rindex("}") + 1])["variants"]
    assert rows["b0"]["weights"]["sha256"] == report(desk.runs / "b0")["delta_sha256"]
    assert "Nothing was written" in said
    # what it showed is what is then written
    desk.publish("b0", "b0_ns")
    assert shown(desk.repository, "README.md").decode() in card
    assert desk.rows() == json.loads(json.dumps(rows).replace("0" * 40, commits(desk.repository)[0]))


def test_dry_run_of_more_writes_nothing_either(desk: Desk):
    desk.publish("b0")
    before = snapshot(desk.folder)
    said = desk.publish("b0_ns", more=("--dry-run",))
    assert "v1.1: add b0_ns" in said and "| `b0` |" in said
    assert "v1.0: all is there" in desk.publish("b0", more=("--dry-run",))
    assert snapshot(desk.folder) == before


def test_dry_run_refuses_what_is_refused(desk: Desk):
    desk.publish("b0")
    assert "--replace" in desk.publish("other", more=("--dry-run",), status=1)
