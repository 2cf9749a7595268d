"""`reproduce --publish`: variant after variant to a Hub in memory, refused and killed in between."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import tiny_variants
from hub_standin import TOKEN, Hub, Repository
from huggingface_hub import constants
from test_publishing_hub import COMMIT, CREATE, NAME, TAG, close_session

import fixefficientnet
from fixefficientnet import manifest

pytestmark = pytest.mark.newest

KEYS = ("b0", "b1")


@dataclass
class Road:
    """Images, tiny backbones and a Hub."""

    hub: Hub
    folder: Path
    environment: dict[str, str]

    def command(self, *more: object) -> list[str]:
        place = ["--data", self.folder / "data", "--output", self.folder / "runs", "-j", "0"]
        recipe = ["--method", "cached", "--epochs", "2", "--batch-size", "4", "--base-lr", "0.1"]
        target = ["--publish", NAME, "--manifest", self.folder / "rows.json"]
        return [*KEYS, *map(str, [*place, *recipe, *target, *more])]

    def reproduce(self, *more: object, status: int = 0) -> tuple[str, str]:
        said = tiny.cli("reproduce", *self.command(*more), status=status)
        assert TOKEN not in "".join(said)
        return said

    @property
    def repository(self) -> Repository:
        return self.hub.repositories[NAME]

    def published(self) -> list[str]:
        return list(self.repository.messages.values())[1:]

    def rows(self) -> dict[str, Any]:
        return json.loads((self.folder / "rows.json").read_text())["variants"]

    def table(self) -> dict[str, list[str]]:
        lines = (self.folder / "runs" / "table.md").read_text().splitlines()
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:] if line.startswith("|")]
        return {key: others for key, *others in cells}


@pytest.fixture
def road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Road]:
    tiny.make_data(tmp_path / "data", ("n01440764", "n02124075", "n07920052"), train=4, val=2)
    rows = tiny_variants(tmp_path / "hub", **{key: {} for key in KEYS})
    with Hub() as hub:
        close_session()
        for where, name, value in tiny.hub_settings(hub.endpoint):
            monkeypatch.setattr(where, name, value, raising=False)
        cache = str(tmp_path / "hub")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv(manifest.OVERLAY_VARIABLE, rows)
        own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": cache, "HF_TOKEN": TOKEN}
        yield Road(hub, tmp_path, own | {manifest.OVERLAY_VARIABLE: rows})
        close_session()


def test_each_variant_is_published_as_it_finishes_and_not_run_again(road: Road):
    file, seen = road.folder / "runs" / "table.md", []
    look = lambda: seen.append([row[-1] for row in road.table().values()] if file.exists() else [])  # noqa: E731
    road.hub.trouble("POST", COMMIT, look, always=True)
    said, _ = road.reproduce()
    assert road.published() == ["v1.0: add b0", "v1.1: add b1"]
    assert seen == [[], ["v1.0", "-"]]
    table = road.table()
    assert list(table) == list(KEYS)
    assert [row[-1] for row in table.values()] == ["v1.0", "v1.1"]
    for key, row in table.items():
        found = json.loads((road.folder / "runs" / key / "report.json").read_text())["measured"]
        paper = fixefficientnet.info(key).paper
        assert paper is not None
        expected = [f"{found['base']['top1']:.2f}", "32", f"{found['base_at_test']['top1']:.2f}", "48"]
        assert row[:-3] == [*expected, f"{found['tuned']['top1']:.2f}", f"{paper.fix.top1:.1f}"]
        assert row[-3:-1] == ["-", "0.0"]  # other images than the paper's; seconds
    assert len([line for line in said.splitlines() if line.split()[:1] == ["variant"]]) == 2  # the table, as it grew
    before, head = (road.folder / "rows.json").read_text(), road.repository.head

    # elsewhere, without the runs: nothing is run, and the rows are made
    (road.folder / "runs").rename(road.folder / "elsewhere")
    (road.folder / "rows.json").unlink()
    said, _ = road.reproduce()
    assert said.count("is published already: org/name v1.") == 2
    assert [path.name for path in (road.folder / "runs").iterdir()] == ["table.md"]
    assert road.repository.head == head
    assert json.loads((road.folder / "rows.json").read_text()) == json.loads(before)
    assert [row[:-2] for row in road.table().values()] == [row[:-2] for row in table.values()]

    # another recipe is another result: it is neither run nor overwritten
    _, said = road.reproduce("--epochs", "3", status=1)
    assert "Not published: b0, b1" in said
    assert not (road.folder / "runs" / "b0").exists()
    assert road.repository.head == head


def test_a_refused_publication_ends_nothing_and_is_made_up_for(road: Road):
    road.hub.trouble("POST", COMMIT, 403)  # of b0
    road.hub.trouble("POST", TAG, 403)  # of b1, whose commit is made
    said, error = road.reproduce(status=1)
    assert "b0 is finished, and not published. Nothing was published: " in " ".join(said.split())
    assert "Not published: b0, b1;" in error
    assert (road.published(), road.repository.tags) == (["v1.0: add b1"], {})
    assert [row[-1] for row in road.table().values()] == ["-", "-"]
    said, _ = road.reproduce()
    assert "b0 is finished already" in said and "b1 is published already: org/name v1.0" in said
    assert road.published() == ["v1.0: add b1", "v1.1: add b0"]
    assert {key: row["weights"]["revision"] for key, row in road.rows().items()} == {
        "b0": road.repository.tags["v1.1"],
        "b1": road.repository.tags["v1.0"],
    }


def test_a_run_that_fails_ends_nothing_and_is_tried_again(road: Road):
    backbone = next((road.folder / "hub").glob("models--*b0*/snapshots/*/model.safetensors"))
    good = backbone.read_bytes()
    backbone.write_bytes(good[:100])
    said, error = road.reproduce(status=1)
    assert "b0 failed. " in said and "Failed: b0; the reasons are above" in error
    assert road.published() == ["v1.0: add b1"]
    backbone.write_bytes(good)
    road.reproduce()
    assert road.published() == ["v1.0: add b1", "v1.1: add b0"]


def test_the_table_has_what_is_published_whatever_lies_in_the_folder(road: Road):
    road.reproduce()
    before = road.table()
    report = road.folder / "runs" / "b0" / "report.json"
    document = json.loads(report.read_text())
    document["measured"]["tuned"]["top1"] = 1.0
    report.write_text(json.dumps(document))
    road.reproduce()
    assert road.table()["b0"] == [*before["b0"][:-2], "-", "v1.0"]  # the hours are those of another run


def test_killed_runs_are_completed_by_the_same_command(road: Road):
    said = road.folder / "said.txt"
    process = tiny.start(road.command(), said, **road.environment)
    road.hub.trouble("POST", CREATE, process.kill)  # b0 is finished, and not published
    process.join(120)
    assert process.exitcode == -9, said.read_text()
    road.hub.clear()
    assert (road.folder / "runs" / "b0" / "report.json").exists() and road.published() == []

    process = tiny.start(road.command(), said, **road.environment)
    while process.is_alive() and not (road.folder / "runs" / "b1" / "evaluations").exists():
        process.join(0.005)
    process.kill()  # in the middle of the second run
    process.join()
    assert process.exitcode == -9, said.read_text()
    assert "v1.0: add b0" in road.published()[-1]

    road.reproduce()
    assert "v1.1: add b1" in road.published()[-1]
    assert {key: row["weights"]["revision"] for key, row in road.rows().items()} == {
        "b0": road.repository.tags["v1.0"],
        "b1": road.repository.tags["v1.1"],
    }
    for key in KEYS:
        data = (road.folder / "runs" / key / "delta.safetensors").read_bytes()
        assert road.repository.commits[road.repository.head][f"{key}.safetensors"] == data


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["b0", "--private"], "go with --publish"),
        (["--backbone", "test_efficientnet", "--publish", NAME], "--publish takes variants"),
        (["b0", "--stage", "base", "--publish", NAME], "--publish takes variants"),
        (["b0", "--publish", "name"], "not of the form ORGANISATION/NAME"),
    ],
)
def test_what_cannot_be_published_is_said_before_anything_is_run(road: Road, arguments: list[str], said: str):
    more = ["--data", road.folder / "data", "--output", road.folder / "runs"]
    status = 1 if "name" in arguments else 2
    assert said in " ".join(tiny.cli("reproduce", *arguments, *more, status=status)[1].split())
    assert not (road.folder / "runs").exists()


def test_without_a_token_nothing_is_run(road: Road, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in road.reproduce(status=1)[1]
    assert not (road.folder / "runs" / "b0").exists()
