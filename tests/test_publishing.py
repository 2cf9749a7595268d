"""Publishing finished runs as plain files in a folder: what is in it, what is refused, what loads from it."""

import getpass
import hashlib
import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from conftest import Network, assert_row_tells_the_run
from huggingface_hub import ModelCard, ModelCardData, constants

import fixefficientnet
from fixefficientnet import delta, manifest
from fixefficientnet._internal import sealed
from fixefficientnet.errors import PublishError
from fixefficientnet.evaluation.journal import Journal
from fixefficientnet.publishing import folder
from fixefficientnet.publishing.index import Index
from fixefficientnet.reproduce.report import Report

pytestmark = pytest.mark.newest  # with other releases, tests of a Hub and of a server publish

MANIFEST = "weights_manifest.json"
MADE = {"README.md", "models.json", MANIFEST}


def models(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "models.json").read_text())["models"]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder and below."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a JSON file in place."""
    values = json.loads(file.read_text())
    change(values)
    values.pop("sha256", None)  # as whoever forges it would
    file.write_text(json.dumps(values))


def write_journal(file: Path, lines: list[dict[str, Any]]) -> None:
    """Writes lines with checksums that are right."""
    rank = int(file.name.split(".")[-2])
    file.unlink()
    for line in lines:
        Journal(file.with_name(file.name.removesuffix(f".{rank}.jsonl")), rank).note(
            {key: value for key, value in line.items() if key != "crc32"}
        )


@dataclass
class Desk:
    """A folder to publish to, not there yet, and finished runs."""

    folder: Path
    runs: Path

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    def publish(self, *runs: str | Path, more: tuple[object, ...] = (), status: int = 0, repo: str = "org/name") -> str:
        """Publishes finished runs by name, or other folders; what was said, on stderr if it was refused."""
        folders = [self.runs / run for run in runs]  # an absolute path stays what it is
        out, err = tiny.cli("publish", *folders, "--repo", repo, "--to", self.repository, *more, status=status)
        assert "Traceback" not in out + err
        return err if status else out

    def refuse(self, *runs: str | Path, more: tuple[object, ...] = ()) -> str:
        """The same for what is refused: nothing has changed by it."""
        before = snapshot(self.folder)
        said = self.publish(*runs, more=more, status=1)
        assert snapshot(self.folder) == before
        return said

    def copy(self, name: str = "b0") -> Path:
        """A finished run to tamper with."""
        unneeded = shutil.ignore_patterns("checkpoint", "tensorboard", "curve.png")
        return shutil.copytree(self.runs / name, self.folder / "copies" / name, ignore=unneeded)

    def delta(self, run: str) -> bytes:
        return (self.runs / run / "delta.safetensors").read_bytes()

    def name(self, key: str, run: str | None = None) -> str:
        """Name of the published delta of a run."""
        return f"{key}-{hashlib.sha256(self.delta(run or key)).hexdigest()[:8]}.safetensors"

    def names(self) -> set[str]:
        return {path.name for path in self.repository.iterdir()}

    def rows(self) -> dict[str, Any]:
        return json.loads((self.repository / MANIFEST).read_text())["variants"]

    def card(self) -> str:
        return (self.repository / "README.md").read_text()


@pytest.fixture
def desk(tmp_path: Path, hub_cache: Path, finished_runs: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    return Desk(tmp_path, finished_runs)


def weights_of(desk: Desk, monkeypatch: pytest.MonkeyPatch, key: str = "b0") -> torch.Tensor:
    """A tuned tensor of the model that the folder's manifest loads."""
    monkeypatch.setenv(manifest.OVERLAY_VARIABLE, str(desk.repository / MANIFEST))
    model: Network = fixefficientnet.create(key, pretrained=True)
    return model.classifier.weight.detach()


def tuned(desk: Desk, run: str) -> torch.Tensor:
    return safetensors.torch.load(desk.delta(run))["classifier.weight"]


# --- what is published ----------------------------------------------------------------------------------------


def test_first_publication_is_plain_files_that_load(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    said = desk.publish("b0")
    assert desk.names() == MADE | {desk.name("b0")}
    assert (desk.repository / desk.name("b0")).read_bytes() == desk.delta("b0")
    assert "v1.0: add b0" in said and f"FIXEFFICIENTNET_MANIFEST={desk.repository / MANIFEST}" in said
    assert torch.equal(weights_of(desk, monkeypatch), tuned(desk, "b0"))
    assert fixefficientnet.info("b0").test.size == 48


def test_models_json_tells_what_the_run_measured(desk: Desk):
    desk.publish("b0", "b0_ns")
    assert list(models(desk.repository)) == ["b0", "b0_ns"]
    for key, entry in models(desk.repository).items():
        data, found = (desk.repository / entry["file"]).read_bytes(), report(desk.runs / key)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() == found["delta_sha256"]
        assert entry["bytes"] == len(data)
        assert entry["version"] == "v1.0"
        for name in ("measured", "recipe", "train_images", "processes", "paired"):
            assert entry[name] == found[name], name
        assert entry["backbone"] == manifest.find(key).backbone.name


def test_card_has_the_metadata_that_the_hub_reads(desk: Desk):
    desk.publish("b0", "b0_ns")
    card = ModelCard(desk.card()).data
    assert isinstance(card, ModelCardData) and card.eval_results is not None
    assert card.license == "apache-2.0"
    assert card.library_name == "fixefficientnet"
    assert card.pipeline_tag == "image-classification"
    assert card.base_model == ["timm/tf_efficientnet_b0.ap_in1k", "timm/tf_efficientnet_b0.ns_jft_in1k"]
    results = {result.metric_name: result for result in card.eval_results}
    assert len(results) == 4
    for key in ("b0", "b0_ns"):
        tuned = report(desk.runs / key)["measured"]["tuned"]
        for metric, figure in (("top-1", "top1"), ("top-5", "top5")):
            result = results[f"{metric} of {key} at 48 pixels"]
            assert result.metric_value == pytest.approx(tuned[figure] / 100, abs=1e-5)
            assert result.metric_type == "accuracy"
            # images that are made here are nobody's ImageNet
            assert (result.dataset_type, result.dataset_name) == ("other", "data/val")
    assert card.datasets is None


def test_publishing_warns_where_fixres_did_not_help(desk: Desk):
    said = desk.publish("b0")
    gain = Report.load(desk.runs / "b0").gain
    assert gain is not None and gain.warning is not None  # random backbones, three images
    assert f"Warning: {gain.warning}" in " ".join(said.split())
    assert f"**{gain.warning}**" in desk.card()


def test_card_has_measured_figures_beside_the_papers(desk: Desk):
    desk.publish("b0", "b0_ns")
    text = desk.card()
    for key in ("b0", "b0_ns"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{key}` |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        measured, paper = report(desk.runs / key)["measured"], manifest.find(key).paper
        assert cells[2] == "data/val, 6 images"
        assert cells[3].startswith(f"{measured['base']['top1']:.2f} / {measured['base']['top5']:.2f} at 32, ")
        assert " at 48, " in cells[4]
        assert cells[5] == f"**{measured['tuned']['top1']:.2f} / {measured['tuned']['top5']:.2f} at 48, 1**"
        assert cells[6] == f"{measured['tuned']['top1_low']:.2f} to {measured['tuned']['top1_high']:.2f}"
        assert paper is not None
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
    assert f"hf://org/name/{desk.name('b0')}@v1.0" in text


def test_neither_images_nor_this_machine_are_published(desk: Desk):
    desk.publish("b0", "b0_ns")
    published = [path.read_bytes() for path in desk.repository.iterdir()]
    assert len(published) == 5
    images = (desk.runs / "b0" / "probe.safetensors").read_bytes()
    tensors = safetensors.torch.load(images)
    telling = [tensors["images"][0].numpy().tobytes(), images[8:200]]
    telling += [str(folder).encode() for folder in (desk.folder, desk.runs, desk.runs.parent, Path.home())]
    user = re.compile(rb"(?<![\w.-])" + re.escape(getpass.getuser().encode()) + rb"(?![\w.-])")
    for data in published:
        assert not [what for what in telling if what in data]
        text = data if b"\0" not in data else data[: 8 + int.from_bytes(data[:8], "little")]  # not the tensors
        assert not user.search(text)


@pytest.mark.parametrize(
    ("place", "name"),
    [("/home/alice/val", "val"), ("/Users/alice/pets/val", "pets/val"), ("/srv/pets/val", "pets/val"), ("/val", "val")],
)
def test_data_set_is_named_without_its_owner(desk: Desk, place: str, name: str):
    run = desk.copy()
    rewrite(run / "report.json", lambda values: values.update(validation_data=place))
    desk.publish(run)
    assert models(desk.repository)["b0"]["dataset"] == name
    assert "alice" not in desk.card() + (desk.repository / "models.json").read_text()
    assert desk.rows()["b0"]["weights"]["measured"]["dataset"] == name


# --- the folder's manifest ------------------------------------------------------------------------------------


def test_rows_name_the_folders_own_files(desk: Desk):
    desk.publish("b0", "b0_ns")
    assert list(desk.rows()) == ["b0", "b0_ns"]
    for key, row in desk.rows().items():
        assert_row_tells_the_run(row, {"path": desk.name(key)}, desk.delta(key), desk.runs / key)


def test_manifest_loads_also_where_the_folder_is_moved(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    desk.publish("b0", "b0_ns")
    moved = Desk(desk.folder / "elsewhere", desk.runs)
    moved.folder.mkdir()
    desk.repository.rename(moved.repository)
    for key in ("b0", "b0_ns"):
        assert torch.equal(weights_of(moved, monkeypatch, key), tuned(desk, key))


# --- again, more, other weights -------------------------------------------------------------------------------


def test_same_runs_again_change_nothing(desk: Desk):
    desk.publish("b0", "b0_ns")
    before, written = snapshot(desk.repository), [path.stat().st_mtime_ns for path in sorted(desk.repository.iterdir())]
    assert "v1.0: all was there already" in desk.publish("b0", "b0_ns")
    assert "v1.0: all was there already" in desk.publish("b0_ns")
    assert snapshot(desk.repository) == before
    assert [path.stat().st_mtime_ns for path in sorted(desk.repository.iterdir())] == written


def test_second_variant_is_added_as_the_next_version(desk: Desk):
    desk.publish("b0_ns")
    assert "v1.1: add b0" in desk.publish("b0")
    assert {key: entry["version"] for key, entry in models(desk.repository).items()} == {"b0": "v1.1", "b0_ns": "v1.0"}
    assert "| `b0` |" in desk.card() and "| `b0_ns` |" in desk.card()
    assert list(desk.rows()) == list(models(desk.repository)) == ["b0", "b0_ns"]  # the manifest's order
    assert desk.names() == MADE | {desk.name("b0"), desk.name("b0_ns")}


def test_other_weights_are_refused_unless_they_shall_replace(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    desk.publish("b0")
    said = desk.refuse("other")
    assert "--replace" in said and hashlib.sha256(desk.delta("b0")).hexdigest() in said
    assert "Nothing was published" in said
    assert "v2.0: replace b0" in desk.publish("other", more=("--replace",))
    assert desk.names() == MADE | {desk.name("b0", "other")}
    assert not torch.equal(tuned(desk, "b0"), tuned(desk, "other"))
    assert torch.equal(weights_of(desk, monkeypatch), tuned(desk, "other"))
    assert models(desk.repository)["b0"]["version"] == "v2.0"
    assert "all was there already" in desk.publish("other", more=("--replace",))
    assert "--replace" in desk.refuse("b0")  # nor back again by mistake


@pytest.mark.parametrize("what", ["deleted", "damaged"])
def test_what_is_missing_or_damaged_is_written_again(desk: Desk, what: str):
    desk.publish("b0")
    before = snapshot(desk.repository)
    for path in desk.repository.iterdir():
        if path.name != "models.json":
            path.unlink() if what == "deleted" else path.write_bytes(path.read_bytes()[:-1])
    assert "v1.0: write again what was missing" in desk.publish("b0")
    assert snapshot(desk.repository) == before


class Killed(BaseException):
    """Stands for a process that ends here."""


@pytest.mark.parametrize("done", range(5))
def test_publication_that_is_killed_leaves_a_folder_that_loads(desk: Desk, monkeypatch: pytest.MonkeyPatch, done: int):
    """Delta, manifest and card are renamed, the old delta is removed, models.json is renamed: so much of it by then."""
    desk.publish("b0")
    calls = []

    def rename(self: Path, target: Path, rename: Callable[[Path, Path], Path] = Path.replace) -> Path:
        calls.append(target.name)
        if len(calls) > done:
            raise Killed
        return rename(self, target)

    def unlink(self: Path, missing_ok: bool = False, unlink: Callable[..., None] = Path.unlink) -> None:
        if not calls or len(calls) > done:  # a killed process cleans nothing up
            raise Killed
        calls.append(self.name)
        if len(calls) > done:
            raise Killed
        unlink(self, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", rename)
        patched.setattr(Path, "unlink", unlink)
        with pytest.raises(Killed):
            desk.publish("other", more=("--replace",))
    new = desk.name("b0", "other")
    assert calls == [new, MANIFEST, "README.md", desk.name("b0"), "models.json"][: done + 1]
    run = "other" if done >= 2 else "b0"  # once the manifest is the new one
    assert torch.equal(weights_of(desk, monkeypatch), tuned(desk, run))
    monkeypatch.delenv(manifest.OVERLAY_VARIABLE)
    assert Index.load((desk.repository / "models.json").read_bytes(), "models.json").version == "v1.0"
    desk.publish("other", more=("--replace",))
    assert desk.names() == MADE | {new}
    assert torch.equal(weights_of(desk, monkeypatch), tuned(desk, "other"))


def test_first_publication_that_is_killed_is_completed(desk: Desk):
    desk.publish("b0")
    complete = snapshot(desk.repository)
    (desk.repository / "models.json").unlink()
    desk.publish("b0")
    assert snapshot(desk.repository) == complete


# --- runs that are refused ------------------------------------------------------------------------------------


def trained_on_what_it_measured(run: Path) -> None:
    rewrite(run / "recipe.json", lambda values: values.update(train_images=values["validation_images"]))


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
    write_journal(journal, lines)


def better_journal(run: Path) -> None:
    journal = run / "evaluations" / "tuned.0.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for labels, predicted, *_ in lines[0]["predictions"]:
        predicted[0] = labels[0]
    write_journal(journal, lines)


def better_report(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values["measured"]["tuned"].update(top1=99.9))


def better_interval(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values["measured"]["tuned"].update(top5_low=99.9))


def better_test(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values["paired"]["base"].update(p=1e-9))


def worse_base(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values["measured"]["base"].update(top5=-1.0))


def report_without_rows(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values.update(measured=[]))


def report_of_numbers(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values["measured"].update(tuned=5))


def report_without_data(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values.pop("validation_data"))


def report_of_words(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values.update(measured="tuned"))


def report_of_other_evaluations(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values["measured"].update({"../../tuned": values["measured"]["tuned"]}))


def report_without_the_tuned_network(run: Path) -> None:
    rewrite(run / "report.json", lambda values: values["measured"].pop("tuned"))


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
    (run / "probe.safetensors").write_bytes(sealed.dumps(tensors, {}))  # as whoever forges it would


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
        (no_recipe, "recipe.json: there is no such file"),
        (trained_on_what_it_measured, "the very images that it was trained on"),
        (no_delta, "lacks delta.safetensors"),
        (no_probe, "lacks probe.safetensors"),
        (no_journal, "is no evaluation, or an unfinished one"),
        (nothing_evaluated, "damaged"),
        (journal_of_other_shape, "damaged"),
        (better_journal, "the batches in evaluations/ give top1 100.0 for 'tuned'"),
        (better_report, "report.json says 99.9"),
        (better_interval, "report.json says 99.9"),
        (better_test, "other paired tests"),
        (worse_base, "measured.base.top5: must be a number from 0 to 100, is -1.0"),
        (report_without_rows, "report.json.measured: must be an object"),
        (report_of_numbers, "report.json.measured.tuned: must be an object"),
        (report_without_data, "lacks the key validation_data"),
        (report_of_words, "report.json.measured: must be an object"),
        (report_of_other_evaluations, "report.json is damaged"),
        (report_without_the_tuned_network, "report.json is damaged"),
        (torn_report, "report.json cannot be read as the report of a run"),
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
    assert "The repository's name" in desk.publish("nothing", repo=name, status=1)
    assert not desk.repository.exists()


@pytest.mark.parametrize("more", [("--private",), ("--manifest", "rows.json")])
def test_options_of_the_hub_are_refused(desk: Desk, more: tuple[str, ...]):
    assert f"{more[0]} is for the Hub" in desk.refuse("b0", more=more)


def test_file_in_place_of_the_folder_is_refused(desk: Desk):
    desk.repository.write_text("mine")
    assert "is no folder" in desk.refuse("b0")


def test_a_folder_that_somebody_else_wrote_to_meanwhile_is_not_written_over(tmp_path: Path):
    published = tmp_path / "published"
    folder.write(published, {"models.json": b"theirs"}, before=None)
    with pytest.raises(PublishError, match=r"somebody else wrote to .* meanwhile\. Give the same"):
        folder.write(published, {"card": b"mine", "models.json": b"mine"}, before=None)
    assert snapshot(published) == {"models.json": b"theirs"}
    folder.write(published, {"models.json": b"both"}, before=b"theirs")
    assert snapshot(published) == {"models.json": b"both"}


def test_other_files_stay(desk: Desk):
    (desk.repository / "figures").mkdir(parents=True)
    (desk.repository / "figures" / ".a.partial").write_text("mine")
    (desk.repository / "LICENSE").write_text("free")
    desk.publish("b0")
    desk.publish("other", more=("--replace",))
    assert desk.names() == MADE | {desk.name("b0", "other"), "figures", "LICENSE"}
    assert (desk.repository / "LICENSE").read_text() == "free"
    assert (desk.repository / "figures" / ".a.partial").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
@pytest.mark.parametrize("name", ["README.md", MANIFEST, "delta"])
def test_files_that_publish_did_not_write_are_refused_and_kept(desk: Desk, name: str, kind: str):
    path = desk.repository / (desk.name("b0") if name == "delta" else name)
    desk.repository.mkdir()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(desk.folder / "nowhere")
    else:
        path.write_bytes(b"mine")
    said = desk.refuse("b0")
    if (name, kind) == ("delta", "link"):
        assert "leads out of the manifest's folder" in said
        return
    assert f"{path.name}, which `publish` did not write" in said and "Nothing was published" in said
    assert os.path.lexists(path)
    if kind != "folder":
        desk.publish("b0", more=("--replace",))
        assert desk.names() == MADE | {desk.name("b0")}
        assert not path.is_symlink() and not (desk.folder / "nowhere").exists()


def test_weights_of_others_are_refused_also_beside_published_ones(desk: Desk):
    desk.publish("b0")
    (desk.repository / desk.name("b0_ns")).write_bytes(b"mine")
    assert f"{desk.name('b0_ns')}, which `publish` did not write" in desk.refuse("b0_ns")


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
    desk.repository.mkdir()
    (desk.repository / "models.json").write_bytes(content)
    said = desk.refuse("b0")
    assert "models.json" in said and "Nothing was published" in said


@pytest.mark.parametrize(
    ("field", "value"),
    [("file", "../b0.safetensors"), ("file", "/b0.safetensors"), ("sha256", "5"), ("measured", {}), ("bytes", -1)],
)
def test_models_json_with_other_values_is_refused(desk: Desk, field: str, value: object):
    desk.publish("b0")
    rewrite(desk.repository / "models.json", lambda values: values["models"]["b0"].update({field: value}))
    said = desk.refuse("other", more=("--replace",))
    assert f"models.b0.{field}" in said and "Nothing was published" in said


def test_full_disk_leaves_nothing_and_the_next_try_completes(desk: Desk):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # a delta has five times as much
    try:
        said = desk.publish("b0", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in said and "same command" in said
    assert desk.names() == set()
    desk.publish("b0")
    assert desk.names() == MADE | {desk.name("b0")}


# --- a dry run ------------------------------------------------------------------------------------------------


def test_dry_run_shows_everything_and_writes_nothing(desk: Desk):
    said = desk.publish("b0", "b0_ns", more=("--dry-run",))
    assert snapshot(desk.folder) == {}
    for name in (*MADE, desk.name("b0"), desk.name("b0_ns")):
        assert f"  {name}  " in said
    assert "v1.0: add b0, b0_ns" in said
    card = said.partition("README.md:\n")[2]
    rows = json.loads(said[said.index('{\n  "schema_version"') : said.rindex("}") + 1])["variants"]
    assert said.startswith("Dry run: nothing is published, nothing is written.\n")
    # what it showed is what is then written
    desk.publish("b0", "b0_ns")
    assert desk.card() in card
    assert desk.rows() == rows


def test_dry_run_of_more_writes_nothing_either(desk: Desk):
    desk.publish("b0")
    before = snapshot(desk.folder)
    said = desk.publish("b0_ns", more=("--dry-run",))
    assert "v1.1: add b0_ns" in said and "| `b0` |" in said
    assert "v1.0: all was there already" in desk.publish("b0", more=("--dry-run",))
    assert snapshot(desk.folder) == before


def test_dry_run_refuses_what_is_refused(desk: Desk):
    desk.publish("b0")
    assert "--replace" in desk.refuse("other", more=("--dry-run",))
