"""Finished batches on disk: killed evaluations that go on, and several processes that share one."""

import json
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import plain
import pytest
import timm
import tiny
import torch
from plain import TEST, predict_dataset
from torch import nn

import fixefficientnet
from fixefficientnet.data.dataset import open_dataset
from fixefficientnet.errors import EvaluationError
from fixefficientnet.evaluation.journal import Finished, FinishedBatch, Journal, load
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.evaluation.predictions import ImagePrediction, Predictions

pytestmark = pytest.mark.newest

IMAGES = 30
BATCH = 4

ONE = FinishedBatch(
    {3: ImagePrediction((1,), (1, 0, 2), 0.1 + 0.2, 1 / 3), 0: ImagePrediction((0, 7), (2,), 1.0, 1e-30)}, {}, {3}, 0.5
)
TWO = FinishedBatch({}, {1: 'no "image"\n'}, set(), 0.25)
THREE = FinishedBatch({2: ImagePrediction((2,), (2, 1), 0.9, 2.0)}, {4: "damaged"}, {2}, 2.0)


# --- files ------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_again_also_of_several_processes(tmp_path: Path):
    path = tmp_path / "deep" / "er" / "name.of-it"
    assert Journal(path).read() == Finished()
    Journal(path, 0).write(ONE)
    Journal(path, 0).write(TWO)
    Journal(path, 12).write(THREE)
    found = Journal(path, 1).read()
    predictions = Predictions([ONE.predictions[0], None, THREE.predictions[2], ONE.predictions[3]])
    assert found.predictions == predictions
    assert [*found.predictions] == [ONE.predictions[0], None, THREE.predictions[2], ONE.predictions[3]]
    assert found.unreadable == TWO.unreadable | THREE.unreadable
    assert found.unturned == {2, 3}
    assert found.seconds == 2.0  # that of the process which took longest
    with pytest.raises(EvaluationError, match="unfinished"):
        load(path)
    Journal(path, 0).note({"size": 48, "crop_pct": 0.5, "images": 5})
    assert found.notes == {}
    found.notes = {"size": 48, "crop_pct": 0.5, "images": 5}
    assert Journal(path).read() == found
    whole = load(path)
    assert whole == Evaluation(48, 0.5, Predictions([*predictions, None]), {1: 'no "image"\n', 4: "damaged"}, (2, 3))
    assert (whole.correct, whole.seconds) == ("0-11-", 2.0)


def test_only_its_own_files_are_a_journals(tmp_path: Path):
    names = ("base", "base_at_test", "base.0", "bas")
    for number, name in enumerate(names):
        Journal(tmp_path / name, number).write(THREE)
    (tmp_path / "base.x.jsonl").write_text("{}")
    (tmp_path / "base.0.json").write_text("{}")
    found = {name: [file.name for file in Journal(tmp_path / name).files()] for name in names}
    assert found == {name: [f"{name}.{number}.jsonl"] for number, name in enumerate(names)}
    Journal(tmp_path / "base").clear()
    assert not Journal(tmp_path / "base").files()
    assert all(Journal(tmp_path / name).files() for name in names[1:])


def test_a_line_that_is_torn_anywhere_is_as_if_it_had_not_been_written(tmp_path: Path):
    journal = Journal(tmp_path / "name")
    journal.write(ONE)
    before = journal.read()
    (file,) = journal.files()
    start = file.stat().st_size
    journal.write(THREE)
    whole = file.read_bytes()
    both = journal.read()
    for end in range(start, len(whole)):
        file.write_bytes(whole[:end])
        assert journal.read() == before
        journal.write(THREE)
        assert journal.read().predictions == both.predictions
        assert journal.read().unreadable == both.unreadable


def test_lines_that_are_none_of_a_journals_are_passed_over(tmp_path: Path):
    journal = Journal(tmp_path / "name")
    (tmp_path / "name.0.jsonl").write_bytes(b"\n\n17\n[1]\nnull\n\xff\xfe\n{")
    journal.write(ONE)
    assert journal.read() == Finished(Predictions([ONE.predictions[0], None, None, ONE.predictions[3]]), {}, {3}, 0.5)


# --- going on -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Path]:
    """A network, its run's folder, and images."""
    folder = tmp_path_factory.mktemp("ground")
    labels = [index % 3 for index in range(IMAGES)]
    paths = [
        tiny.mottle(folder / "data" / tiny.CLASSES[label] / f"{index}.png", index) for index, label in enumerate(labels)
    ]
    model = plain.network(3, paths, labels)
    return model, plain.save_run(folder / "run", model, tiny.CLASSES), folder / "data"


def copy(data: Path, to: Path) -> list[Path]:
    """Copies the images; the new files in the dataset's order."""
    images = open_dataset(str(data), None)
    paths = [to / images.image_name(index) for index in range(len(images))]
    for index, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((data / images.image_name(index)).read_bytes())
    return paths


def indices(file: Path) -> list[int]:
    """Images in one file of a journal, as often as they are there."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [int(index) for line in lines if "indices" in line for index in [*line["indices"], *line["unreadable"]]]


def lines(folder: Path) -> int:
    """The number of lines in all journals of a folder."""
    return sum(len(file.read_bytes().splitlines()) for file in folder.glob("*.jsonl"))


def test_finished_batches_are_not_evaluated_again(ground, tmp_path: Path):
    model, _, data = ground
    images = open_dataset(str(data), None)
    journal = Journal(tmp_path / "name")
    whole = predict_dataset(model, images, TEST, batch_size=BATCH, shard=6, journal=journal)
    assert load(tmp_path / "name") == whole == predict_dataset(model, images, TEST, batch_size=BATCH, shard=6)
    (file,) = journal.files()
    lines = file.read_text().splitlines()
    assert len(lines) == 10 + 1  # shards of 6 are batches of 4 and of 2
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    try:
        for kept, expected in ((11, []), (10, []), (9, [2]), (2, [4, 2] * 4), (0, [4, 2] * 5)):
            seen.clear()
            file.write_text("\n".join(lines[:kept]))
            assert predict_dataset(model, images, TEST, batch_size=BATCH, shard=6, journal=journal) == whole
            assert seen == expected
            assert sorted(indices(file)) == list(range(IMAGES))
    finally:
        hook.remove()


def wait_for(reached: Callable[[], bool], process: BaseProcess) -> None:
    until = time.monotonic() + 120
    while not reached() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.005)
    assert reached()


def command(run: Path, data: Path, out: Path, *more: str) -> list[str]:
    options = ["--data", str(data), "--output", str(out), "-b", str(BATCH), "-j", "0", "--device", "cpu", "--json"]
    return ["evaluate", str(run), *options, *more]


def finish(arguments: list[str], said: Path) -> dict[str, Any]:
    """Runs the command to its end; what it says, but for the time that it took."""
    text = tiny.run(arguments, said, command=tiny.FIXEFFICIENTNET)
    row = json.loads(text[text.index("{") : text.rindex("}") + 1])["results"][0]
    assert row.pop("seconds") > 0
    assert row.pop("images_per_second") > 0
    return row


def test_a_killed_evaluation_goes_on_to_the_same_figures(ground, tmp_path: Path):
    _, run, data = ground
    paths = copy(data, tmp_path / "data")
    expected = finish(command(run, tmp_path / "data", tmp_path / "undisturbed"), tmp_path / "said")
    arguments = command(run, tmp_path / "data", tmp_path / "out")
    stalled = {"STALLED": str(paths[3 * BATCH + 1])}
    process = tiny.start(arguments, tmp_path / "said", command=tiny.FIXEFFICIENTNET, **stalled)
    wait_for(lambda: lines(tmp_path / "out") == 3, process)
    process.kill()
    process.join()

    (file,) = (tmp_path / "out").iterdir()
    assert indices(file) == list(range(3 * BATCH))
    before = file.read_bytes()
    file.write_bytes(before[:-20])  # as if it had been killed while it wrote
    paths[2].write_bytes(b"no image")  # which is done: nobody looks at it again
    assert finish([*arguments, "--resume"], tmp_path / "said") == expected
    assert [path.name for path in (tmp_path / "out").iterdir()] == [file.name]
    assert file.read_bytes().startswith(before[:-20])
    (undisturbed,) = (tmp_path / "undisturbed").iterdir()
    assert undisturbed.name == file.name
    name = file.name.removesuffix(".0.jsonl")
    assert load(tmp_path / "out" / name) == load(tmp_path / "undisturbed" / name)

    # without --resume, anew
    row = finish(arguments, tmp_path / "said")
    assert (row["images"], row["unreadable"]) == (IMAGES - 1, 1)
    assert sorted(indices(file)) == list(range(IMAGES))


def test_another_evaluation_does_not_go_on_from_it(ground, tmp_path: Path):
    _, run, data = ground
    arguments = command(run, data, tmp_path / "out", "--resume")[1:]

    def files(*more: str) -> int:
        tiny.cli("evaluate", *arguments, *more)
        return len([*(tmp_path / "out").iterdir()])

    assert (files(), files()) == (1, 1)
    assert files("--size", "40") == 2
    assert files("--crop-pct", "1") == 3
    assert files("-b", "5") == 4
    paths = copy(data, tmp_path / "data")
    assert files("--data", str(tmp_path / "data")) == 5  # which may be other ones of the same names
    paths[0].rename(paths[0].with_name("x.png"))
    assert files("--data", str(tmp_path / "data")) == 6


def test_what_two_killed_processes_did_one_goes_on_from(ground, tmp_path: Path):
    _, run, data = ground
    paths = copy(data, tmp_path / "data")
    expected = finish(command(run, tmp_path / "data", tmp_path / "undisturbed"), tmp_path / "said")
    arguments = command(run, tmp_path / "data", tmp_path / "out")
    stalled = {"STALLED": str(paths[3 * BATCH])}  # the second process's second batch
    processes = tiny.start_two(arguments, tmp_path / "said", command=tiny.FIXEFFICIENTNET, **stalled)
    wait_for(lambda: lines(tmp_path / "out") == 4 + 1, processes[1])
    for process in processes:
        process.kill()
        process.join()
    first, second = sorted((tmp_path / "out").iterdir())
    assert [batch // BATCH for batch in indices(first)[::BATCH]] == [0, 2, 4, 6]
    assert indices(second) == list(range(BATCH, 2 * BATCH))
    assert finish([*arguments, "--resume"], tmp_path / "said") == expected
    assert sorted(indices(first) + indices(second)) == list(range(IMAGES))


def test_two_processes_evaluate_each_image_once_and_find_the_same(ground, tmp_path: Path):
    _, run, _ = ground
    for index in range(1013):
        path = tmp_path / "data" / tiny.CLASSES[index % 3] / f"{index}.png"
        tiny.mottle(path, index)
    (tmp_path / "data" / "brick" / "100.png").write_bytes(b"no image")
    small = ["--size", "24", "-b", "16"]
    arguments = [command(run, tmp_path / "data", tmp_path / str(world), *small) for world in (1, 2)]
    one = finish(arguments[0], tmp_path / "said")
    processes = tiny.start_two(arguments[1], tmp_path / "two", command=tiny.FIXEFFICIENTNET)
    for process in processes:
        process.join(240)
    said = [(tmp_path / f"two.{rank}").read_text() for rank in range(2)]
    assert [process.exitcode for process in processes] == [0, 0], said
    two = json.loads(said[0][said[0].index("{") : said[0].rindex("}") + 1])["results"][0]
    assert {key: two[key] for key in one} == one
    assert (one["images"], one["unreadable"]) == (1012, 1)
    assert "brick/100.png" in said[0]
    assert said[1] == ""

    first, second = sorted((tmp_path / "2").iterdir())
    assert sorted(indices(first) + indices(second)) == list(range(1013))
    assert abs(len(indices(first)) - len(indices(second))) <= 16
    (alone,) = (tmp_path / "1").iterdir()
    evaluations = [load(file.parent / file.name.removesuffix(".0.jsonl")) for file in (alone, first)]
    assert evaluations[0] == evaluations[1]
    assert evaluations[0].correct.count("-") == 1


def test_a_fixed_image_counts_when_the_evaluation_goes_on(tmp_path: Path):
    paths = [tiny.mottle(tmp_path / "data" / name / "0.png", number) for number, name in enumerate(tiny.CLASSES)]
    run = plain.save_run(tmp_path / "run", plain.network(3, [*paths, paths[0]], [0, 1, 2, 1]), tiny.CLASSES)
    good = paths[1].read_bytes()
    paths[1].write_bytes(b"no image")
    more = {"workers": 0, "device": "cpu", "folder": tmp_path / "kept", "resume": True}
    broken = fixefficientnet.evaluate(str(run), tmp_path / "data", **more)
    assert (broken.images, len(broken.unreadable)) == (2, 1)
    paths[1].write_bytes(good)
    fixed = fixefficientnet.evaluate(str(run), tmp_path / "data", **more)
    assert (fixed.images, len(fixed.unreadable)) == (3, 0)


def test_equal_weights_in_another_network_are_another_evaluation(tmp_path: Path):
    data = tiny.make_data(tmp_path / "data", train=0, val=4)
    found = []
    for padding in ("", "same"):
        torch.manual_seed(5)
        model = timm.create_model("test_efficientnet", num_classes=3, pad_type=padding).eval()
        found.append(fixefficientnet.evaluate(model, data, size=47, workers=0, folder=tmp_path / "kept", resume=True))
    assert found[0].loss != found[1].loss
