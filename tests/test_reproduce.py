"""Fine-tuning end to end, on a tiny network and images that are made here."""

import errno
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import torch
from conftest import ROOT, Network
from filelock import FileLock
from safetensors.torch import load_file
from test_page import Read, assert_stands_alone
from torch import nn

import fixefficientnet
from fixefficientnet import delta
from fixefficientnet.data import dataset
from fixefficientnet.errors import RunError
from fixefficientnet.preprocessing import FineTuningTransform, Preprocess
from fixefficientnet.reproduce import cached, online
from fixefficientnet.reproduce import recipe as recipes
from fixefficientnet.reproduce.checkpoints import Checkpoints, Position
from fixefficientnet.reproduce.network import TrainingState, optimizer_of, prepare
from fixefficientnet.reproduce.report import Report

HEAD = {"bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var", "classifier.weight", "classifier.bias"}
SMALL = ["--epochs", "3", "--batch-size", "6", "--shard", "8", "--forward-batch", "4", "-j", "0"]
SIZES = ["--train-size", "32", "--test-size", "48"]


@dataclass(frozen=True)
class Ground:
    """Images, and a network trained on them from scratch."""

    folder: Path
    images: Path
    checkpoint: Path

    def fixres(self, *more: str, out: Path, experiment: str = "run") -> list[str]:
        network = [*tiny.NETWORK, "--checkpoint", str(self.checkpoint)]
        place = ["--data", str(self.images), "--output", str(out), "--experiment", experiment]
        return [*network, *place, *SIZES, *SMALL, *more]

    def model(self) -> Network:
        model = timm.create_model("test_efficientnet", num_classes=3)
        model.load_state_dict(load_file(self.checkpoint))
        return model.eval()


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    images = tiny.make_data(folder / "data")
    base = [*tiny.NETWORK, "--stage", "base", "--no-pretrained", "--data", str(images), "--output", str(folder)]
    tiny.run([*base, *SIZES, "--epochs", "4", "--batch-size", "6", "-j", "0"], folder / "said.txt")
    return Ground(folder, images, folder / "test_efficientnet.r160_in1k-base" / "model.safetensors")


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "delta.safetensors").read_bytes()).hexdigest()


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that differ, but for the counters of batches, which have no effect."""
    assert set(one) == set(other)
    return {
        name for name in one if not name.endswith("num_batches_tracked") and not torch.equal(one[name], other[name])
    }


def run_anew(arguments: list[str], *, status: int = 0, **environment: str) -> str:
    """In a process that imports everything itself, as some libraries read their environment then."""
    command = [sys.executable, "-m", "fixefficientnet.reproduce", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def validated(folder: Path) -> list[float]:
    """Top-1 on the validation images between epochs, as logged."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line["val_top1"] for line in lines if "val_top1" in line]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


# --- what a run does ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["online", "cached"])
def test_a_run_leaves_what_it_measured(ground: Ground, tmp_path: Path, method: str):
    said = tiny.run(ground.fixres("--method", method, out=tmp_path), tmp_path / "said.txt")
    folder = tmp_path / "run"
    assert "FixRes, at the test size (48): top-1" in said
    names = {
        "delta.safetensors",
        "model.safetensors",
        "probe.safetensors",
        "recipe.json",
        "report.json",
        "report.md",
        "report.html",
        "log.jsonl",
    }
    names |= {"curve.png", "hours.json", "checkpoint", "evaluations", "tensorboard", ".lock", ".owner"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())

    # the delta on the untuned network is the network that was measured
    model = ground.model()
    tuned = delta.load(folder / "delta.safetensors")
    delta.apply(model, tuned)
    whole = load_file(folder / "model.safetensors")
    assert differing(model.state_dict(), whole) == set()

    # measured again, by a plain loop
    found = report(folder)["measured"]
    images = dataset.open_dataset(str(ground.images), "validation")
    for name, size, network in (
        ("base", 32, ground.model()),
        ("base_at_test", 48, ground.model()),
        ("tuned", 48, model.eval()),
    ):
        cfg: Any = timm.get_pretrained_cfg(tiny.NETWORK[1])
        preprocess = Preprocess(size, 1.0, cfg.interpolation, cfg.mean, cfg.std)
        with torch.inference_mode():
            correct = [
                network(preprocess(images[i][0])[None]).argmax().item() == images[i][1] for i in range(len(images))
            ]
        assert found[name]["top1"] == pytest.approx(100 * sum(correct) / len(correct)), name
        assert found[name]["size"] == size
    assert f"{found['tuned']['top1']:.2f}" in (folder / "report.md").read_text()
    page = Read((folder / "report.html").read_bytes())
    assert_stands_alone(page)
    assert [row[1:3] for row in page.table("model")] == [
        [str(one["size"]), f"{one['top1']:.2f}"] for one in found.values()
    ]
    wrong = {images.image_name(i) for i, digit in enumerate(correct) if not digit}
    assert wrong <= set(page.images) and ("h3", f"Misclassified images: {len(wrong)}") in page.headings
    assert Report.load(folder).findings[0] in page.text

    recipe = json.loads((folder / "recipe.json").read_text())["recipe"]
    assert tuned.recipe == recipe
    assert tuned.measured["tuned"]["top1"] == found["tuned"]["top1"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == sorted(line["steps"] for line in lines)
    assert lines[-1]["steps"] == 3 * 5
    assert report(folder)["forwards"] == {"online": 3 * 30, "cached": (1 + 1) * 30}[method]


def plain_online(ground: Ground, processes: int = 1, *, tune: str = "fixres") -> dict[str, torch.Tensor]:
    """The method of the paper in the simplest form: the whole model forward, the norm in train mode.

    With several processes, each one's norm sees its part of the batch; gradients and statistics are averaged.
    """
    subject = recipes.subject_of_backbone(tiny.NETWORK[1])
    recipe = recipes.resolve(subject, {"test_size": 48, "weights": "sha256:", "epochs": 3, "batch_size": 6})
    model = ground.model()
    model.requires_grad_(False)
    trained = [*model.classifier.parameters(), *(model.bn2.parameters() if tune == "all" else ())]
    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.SGD(trained, lr=8 * 1e-3 * 6 / 512, momentum=0.9, weight_decay=1e-4)
    images = dataset.open_dataset(str(ground.images), "train")
    transform = FineTuningTransform(Preprocess.of(recipe.test), 0, 0.5, 0.05)
    model.bn2.train()
    for epoch in range(3):
        sequence = online.order(recipe, epoch, 30)
        for start in range(0, 30, 6):
            chosen = sequence[start : start + 6]
            inputs = torch.stack([transform(images[index][0], epoch, index) for index in chosen])
            inputs = (inputs / 255 - torch.tensor(recipe.mean)[:, None, None]) / torch.tensor(recipe.std)[:, None, None]
            targets = torch.tensor([images[index][1] for index in chosen])
            optimizer.zero_grad()
            before = [model.bn2.running_mean.clone(), model.bn2.running_var.clone()]
            after = [torch.zeros_like(tensor) for tensor in before]
            for part in range(processes):
                model.bn2.running_mean.copy_(before[0])
                model.bn2.running_var.copy_(before[1])
                logits = model(inputs[part::processes])
                loss = nn.functional.cross_entropy(logits, targets[part::processes], label_smoothing=0.1)
                (loss / processes).backward()
                after[0] += model.bn2.running_mean / processes
                after[1] += model.bn2.running_var / processes
            model.bn2.running_mean.copy_(after[0])
            model.bn2.running_var.copy_(after[1])
            optimizer.step()
    return model.state_dict()


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name in differing(found, expected):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("tune", ["fixres", "all"])
def test_online_is_the_papers_method_however_small_the_parts_of_a_batch(ground: Ground, tmp_path: Path, tune: str):
    expected = plain_online(ground, tune=tune)
    for part in (4, 32):  # of batches of 6
        more = ["--method", "online", "--tune", tune, "--forward-batch", str(part), "--experiment", str(part)]
        tiny.run(ground.fixres(*more, out=tmp_path), tmp_path / "said.txt")
        assert_close(load_file(tmp_path / str(part) / "model.safetensors"), expected)


def test_cached_statistics_and_features_are_exact(ground: Ground, tmp_path: Path):
    more = ["--method", "cached", "--keep-features", "--feature-dtype", "float32", "--val-interval", "0"]
    more += ["--views", "2"]
    tiny.run(ground.fixres(*more, out=tmp_path), tmp_path / "said.txt")
    model = ground.model()
    images = dataset.open_dataset(str(ground.images), "train")
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]
    preprocess = Preprocess(48, 1.0, recipe["interpolation"], tuple(recipe["mean"]), tuple(recipe["std"]))
    inputs = torch.stack([preprocess(images[index][0]) for index in range(30)])
    seen: list[torch.Tensor] = []
    model.bn2.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    pooled: list[torch.Tensor] = []
    model.classifier.register_forward_pre_hook(lambda module, given: pooled.append(given[0]))
    with torch.inference_mode():
        model(inputs)
        variance, mean = torch.var_mean(seen[0].double(), (0, 2, 3))
        model.bn2.running_mean.copy_(mean)
        model.bn2.running_var.copy_(variance)
        pooled.clear()
        model(inputs)
        model(inputs.flip(-1))
    tuned = delta.load(tmp_path / "run" / "delta.safetensors").tensors
    torch.testing.assert_close(tuned["bn2.running_mean"], mean.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tuned["bn2.running_var"], variance.float(), rtol=1e-5, atol=1e-6)
    (file,) = (tmp_path / "features").glob("features-*/features.bin")
    features = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32).view(30, 2, -1)
    torch.testing.assert_close(features, torch.stack(pooled, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "tune", "moves"),
    [
        ("online", "fixres", HEAD - {"bn2.weight", "bn2.bias"}),
        ("online", "all", HEAD),
        ("online", "classifier", {"classifier.weight", "classifier.bias"}),
        ("online", "bn-stats", {"bn2.running_mean", "bn2.running_var"}),
        ("online", "bn", {"bn2.running_mean", "bn2.running_var", "bn2.weight", "bn2.bias"}),
        ("cached", "fixres", HEAD - {"bn2.weight", "bn2.bias"}),
        ("cached", "classifier", {"classifier.weight", "classifier.bias"}),
        ("cached", "bn-stats", {"bn2.running_mean", "bn2.running_var"}),
    ],
)
def test_only_what_the_ablation_says_moves(ground: Ground, tmp_path: Path, method: str, tune: str, moves: set[str]):
    tiny.run(ground.fixres("--method", method, "--tune", tune, out=tmp_path), tmp_path / "said.txt")
    before, after = load_file(ground.checkpoint), load_file(tmp_path / "run" / "model.safetensors")
    assert differing(before, after) == moves


@pytest.mark.parametrize("method", ["online", "cached"])
@pytest.mark.newest
def test_what_a_run_in_half_precision_measures_is_float32(ground: Ground, tmp_path: Path, method: str):
    for precision in ("no", "bf16"):
        more = ["--method", method, "--mixed-precision", precision, "--epochs", "1"]
        run_anew(ground.fixres(*more, out=tmp_path, experiment=precision))
    run = tmp_path / "bf16"
    tuned = fixefficientnet.load(str(run))
    probe = load_file(run / "probe.safetensors")
    images = Preprocess.of(tuned.test).normalise(probe["images"].permute(0, 3, 1, 2))
    with torch.inference_mode():
        torch.testing.assert_close(probe["logits"], tuned.network(images), rtol=1e-4, atol=1e-4)
    again = fixefficientnet.evaluate(str(run), str(ground.images), device="cpu", workers=0)
    assert report(run)["measured"]["tuned"]["loss"] == pytest.approx(again.loss, rel=1e-5)
    assert report(run)["measured"]["base"] == report(tmp_path / "no")["measured"]["base"]
    assert sha(run) != sha(tmp_path / "no")  # the frozen part did run in bf16


def test_base_stage_moves_everything_and_classifier_alone_if_asked(ground: Ground, tmp_path: Path):
    more = ["--stage", "base", "--tune", "classifier", "--epochs", "1"]
    tiny.run(ground.fixres(*more, out=tmp_path), tmp_path / "said.txt")
    before, after = load_file(ground.checkpoint), load_file(tmp_path / "run" / "model.safetensors")
    assert differing(before, after) == {"classifier.weight", "classifier.bias"}
    assert report(ground.checkpoint.parent)["measured"]["trained"]["top1"] > 60


@pytest.mark.parametrize(
    "network",
    [
        ["lite0"],
        ["--backbone", "test_efficientnet.r160_in1k", "--no-pretrained"],
        ["--backbone", "test_resnet", "--no-pretrained", "--tune", "classifier"],
        ["--backbone", "test_byobnet", "--no-pretrained"],
    ],
    ids=lambda network: network[-1],
)
def test_training_of_new_classes_begins_with_equal_probabilities(ground: Ground, tmp_path: Path, network: list[str]):
    place = ["--data", str(ground.images), "--output", str(tmp_path), "--experiment", "base", "--stage", "base"]
    tiny.run([*network, *place, *SIZES, *SMALL, "--epochs", "1"], tmp_path / "said.txt")
    lines = map(json.loads, (tmp_path / "base" / "log.jsonl").read_text().splitlines())
    first, *others = [line["loss"] for line in lines if "loss" in line]
    assert first == pytest.approx(math.log(3), rel=1e-6)
    assert others[-1] != first


@pytest.mark.newest
@pytest.mark.parametrize("method", ["online", "cached"])
def test_accuracy_between_epochs_is_that_of_a_run_of_so_many(ground: Ground, tmp_path: Path, method: str):
    more = ["--method", method, "--schedule", "step", "--base-lr", "0.05"]  # the same however many epochs follow
    for epochs in ("1", "2", "3"):
        tiny.run(ground.fixres(*more, "--epochs", epochs, out=tmp_path, experiment=epochs), tmp_path / "said.txt")
    ends = [report(tmp_path / epochs)["measured"]["tuned"]["top1"] for epochs in ("1", "2")]
    assert validated(tmp_path / "3") == pytest.approx(ends)
    assert validated(tmp_path / "1") == []

    more += ["--epochs", "3", "--val-interval"]
    tiny.run(ground.fixres(*more, "2", out=tmp_path, experiment="every-2"), tmp_path / "said.txt")
    tiny.run(ground.fixres(*more, "0", out=tmp_path, experiment="never"), tmp_path / "said.txt")
    assert validated(tmp_path / "every-2") == validated(tmp_path / "3")[1:]
    assert validated(tmp_path / "never") == []
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("3", "every-2", "never")]
    assert differing(weights[0], weights[1]) == differing(weights[0], weights[2]) == set()


def test_a_variant_of_the_zoo_loads_its_delta(hub_cache: Path, tmp_path: Path):
    images = tiny.make_data(tmp_path / "data", ("n01440764", "n02124075", "n07920052"), train=4, val=2)
    place = ["--data", str(images), "--output", str(tmp_path)]
    sizes = ["--train-size", "32", "--test-size", "48", "--epochs", "1", "--batch-size", "4", "-j", "0"]
    run_anew(["b0*", *place, *sizes], HF_HUB_CACHE=str(hub_cache))
    assert report(tmp_path / "b0_ns")["variant"] == "b0_ns"
    folder = tmp_path / "b0"
    model = fixefficientnet.create("b0", folder / "delta.safetensors", cache_dir=hub_cache)
    base = fixefficientnet.create("b0", "backbone", cache_dir=hub_cache)
    assert differing(model.state_dict(), base.state_dict()) == HEAD - {"bn2.weight", "bn2.bias"}
    assert not (folder / "model.safetensors").exists()
    found = report(folder)
    assert found["paper"]["fix_top1"] == 79.3
    assert found["paper"]["comparable"] is False
    test = model.preprocess
    assert test == replace(base.preprocess, size=48)  # as it was tuned for, not as the variant usually is
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 48, 48)
    validation = dataset.open_dataset(str(images), "validation", num_classes=1000)
    assert [validation[index][1] for index in range(6)] == [0, 0, 285, 285, 967, 967]
    with torch.inference_mode():
        correct = [
            int(model(test(image)[None]).argmax()) == label for image, label in map(validation.__getitem__, range(6))
        ]
    assert found["measured"]["tuned"]["top1"] == pytest.approx(100 * sum(correct) / 6)


def test_resnet_has_its_last_norm_tuned(ground: Ground, tmp_path: Path):
    network = ["--backbone", "test_resnet", "--data", str(ground.images), "--output", str(tmp_path), *SIZES, *SMALL]
    tiny.run([*network, "--stage", "base", "--no-pretrained"], tmp_path / "said.txt")
    before = tmp_path / "test_resnet-base" / "model.safetensors"
    for method in ("online", "cached"):
        arguments = [*network, "--checkpoint", str(before), "--method", method, "--experiment", method]
        tiny.run(arguments, tmp_path / "said.txt")
        changed = differing(load_file(before), load_file(tmp_path / method / "model.safetensors"))
        norm = delta.find_head(timm.create_model("test_resnet")).norm
        assert {f"{norm}.running_mean", f"{norm}.running_var", "fc.weight", "fc.bias"} <= changed
        assert {name.rpartition(".")[0] for name in changed} == {norm, "fc"}


# --- the same bytes, whatever happens -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["online", "cached"])
def uninterrupted(request: pytest.FixtureRequest, ground: Ground, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp(request.param)
    arguments = ["--method", request.param, "--checkpoint-steps", "1"]
    started = time.monotonic()
    tiny.run(ground.fixres(*arguments, out=out), out / "said.txt")
    return arguments, out / "run", time.monotonic() - started


def kill_when(process: BaseProcess, reached: Callable[[], bool]) -> bool:
    """Ends a process by SIGKILL at a point of its work; whether it was still at work."""
    until = time.monotonic() + 60
    while process.is_alive() and not reached() and time.monotonic() < until:
        time.sleep(0.001)
    killed = process.is_alive()
    process.kill()
    process.join()
    return killed


def elapsed(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have passed since it was first asked."""
    start: list[float] = []

    def reached() -> bool:
        if not start:
            start.append(time.monotonic())
        return time.monotonic() - start[0] > seconds

    return reached


def wait_for(process: BaseProcess, file: Path) -> None:
    """Waits until a process has made a file, or has ended."""
    until = time.monotonic() + 60
    while process.is_alive() and not file.exists() and time.monotonic() < until:
        time.sleep(0.001)


def send(process: BaseProcess, number: int) -> None:
    """Sends a signal to a process."""
    assert process.pid is not None
    os.kill(process.pid, number)


def test_killed_runs_go_on_to_the_same_bytes(uninterrupted, ground: Ground, tmp_path: Path):
    arguments, done, seconds = uninterrupted
    command, folder = ground.fixres(*arguments, out=tmp_path), tmp_path / "run"
    points: list[Callable[[], bool]] = [
        lambda: (folder / "evaluations").exists(),
        lambda: len(list(folder.glob("features/*/*.safetensors"))) >= 2,
        lambda: len(list(folder.glob("features/*/*.safetensors"))) >= 6,
        lambda: (folder / "checkpoint" / "state.safetensors").exists(),
        lambda: (folder / "log.jsonl").exists() and (folder / "log.jsonl").read_text().count("\n") >= 7,
    ]
    generator = random.Random(str(arguments))
    for _ in range(3):
        points.append(elapsed(generator.uniform(0.2, seconds)))
    killed = sum(kill_when(tiny.start(command, tmp_path / "said.txt"), point) for point in points)
    assert killed >= 3
    said = tiny.run(command, tmp_path / "said.txt")
    assert sha(folder) == sha(done)
    assert (folder / "report.html").read_bytes() == (done / "report.html").read_bytes()
    assert not [path for path in folder.rglob(".*") if path.name not in (".lock", ".owner")], (
        "half-written files were left"
    )
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for key in ("loss", "val_top1"):
        steps = [line["steps"] for line in lines if key in line]
        assert steps == sorted(set(steps)), said
    assert validated(folder) == validated(done)
    assert len(validated(done)) == 2


@pytest.mark.newest
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_goes_on(uninterrupted, ground: Ground, tmp_path: Path, number: int):
    arguments, done, _ = uninterrupted
    arguments = arguments[:2]  # without --checkpoint-steps: nothing is saved but on the signal
    command = ground.fixres(*arguments, out=tmp_path)
    log = tmp_path / "run" / "log.jsonl"
    process = tiny.start(command, tmp_path / "said.txt")
    wait_for(process, log)
    send(process, number)
    process.join(60)
    assert process.exitcode in (0, 128 + number)  # 0: it was done by then
    if process.exitcode:
        assert f"Stopped by {signal.Signals(number).name}" in (tmp_path / "said.txt").read_text()
        assert (tmp_path / "run" / "checkpoint" / "state.safetensors").exists()
        tiny.run(command, tmp_path / "said.txt")
    assert sha(tmp_path / "run") == sha(done)


@pytest.mark.newest
def test_one_request_that_comes_twice_is_one(ground: Ground, tmp_path: Path):
    """As a terminal's Ctrl-C does, which a launcher passes on: with a save in each step, nothing must be torn."""
    command = ground.fixres("--method", "online", "--epochs", "40", out=tmp_path)
    process = tiny.start(command, tmp_path / "said.txt")
    log = tmp_path / "run" / "log.jsonl"
    wait_for(process, log)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        send(process, number)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGINT
    assert (tmp_path / "run" / "checkpoint" / "state.safetensors").exists()


@pytest.mark.newest
def test_the_third_request_ends_what_does_not_stop(tmp_path: Path):
    script = (
        "import os, signal, sys, time; from pathlib import Path; from accelerate import Accelerator\n"
        "from fixefficientnet.reproduce import session as s; from fixefficientnet.reproduce.log import Log\n"
        "s._SAME_REQUEST_SECONDS = 0.0\n"
        "place = Path(sys.argv[1])\n"
        "session = s.Session(Accelerator(cpu=True), place, Log(place, enabled=False, console=None))\n"
        "with session.stoppable():\n"
        "    for count in range(3):\n"
        "        time.sleep(0.01); os.kill(os.getpid(), signal.SIGINT); print('alive', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "alive\n" * 2
    assert "Ctrl-C once more ends the run" in done.stderr


@pytest.mark.newest
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EACCES])
def test_a_file_system_without_locks_is_named(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    def no_lock(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    with pytest.raises(RunError, match=f"cannot be locked: {os.strerror(number)}.*NFS.*--output"):
        in_process(ground, tmp_path, {"method": "cached"})


@pytest.mark.newest
def test_another_number_of_processes_is_refused_with_the_reason(ground: Ground, tmp_path: Path):
    online = ground.fixres("--method", "online", out=tmp_path)
    tiny.run(online, tmp_path / "said.txt")
    saved = tmp_path / "run" / "recipe.json"
    document = json.loads(saved.read_text())
    assert document["processes"] == 1
    del document["sha256"]  # as whoever changes it on purpose does
    saved.write_text(json.dumps({**document, "processes": 2}))
    assert "is finished already" in tiny.run(online, tmp_path / "said.txt")
    (tmp_path / "run" / "report.json").unlink()  # it is not finished, and was begun with two
    said = tiny.run(online, tmp_path / "said.txt", status=None)
    assert "processes: 2 there, 1 here; the batch norm of each sees its part" in " ".join(said.split())
    cached = ground.fixres("--method", "cached", out=tmp_path, experiment="cached")
    tiny.run(cached, tmp_path / "said.txt")
    assert json.loads((tmp_path / "cached" / "recipe.json").read_text())["processes"] is None


@pytest.mark.newest
def test_a_signal_to_the_whole_group_is_survived_by_the_loading_processes(
    uninterrupted, ground: Ground, tmp_path: Path
):
    arguments, done, _ = uninterrupted
    command = [
        sys.executable,
        "-m",
        "fixefficientnet.reproduce",
        *ground.fixres(*arguments[:2], out=tmp_path),
        "-j",
        "2",
    ]
    log, said = tmp_path / "run" / "log.jsonl", tmp_path / "said.txt"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for number, status in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL), (None, 0)):
        lines = log.read_text().count("\n") if log.exists() else 0
        with said.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        until = time.monotonic() + 60
        while number and time.monotonic() < until and process.poll() is None:
            if log.exists() and log.read_text().count("\n") > lines:
                os.killpg(process.pid, number) if number == signal.SIGTERM else process.kill()
                break
            time.sleep(0.001)
        assert process.wait(120) in (status, 0), said.read_text()
        # immediately, the folder is free: no loading process holds it any more
    assert sha(tmp_path / "run") == sha(done)


def test_a_state_saved_at_the_end_of_an_epoch_is_gone_on_from(ground: Ground, tmp_path: Path):
    command = ground.fixres("--method", "cached", "--batch-size", "512", out=tmp_path)  # one step per epoch
    command += ["--epochs", "400", "--base-lr", "1e-5"]
    tiny.run([*command, "--experiment", "whole"], tmp_path / "said.txt")
    log = tmp_path / "run" / "log.jsonl"
    process = tiny.start(command, tmp_path / "said.txt")
    wait_for(process, log)
    send(process, signal.SIGTERM)
    process.join(60)
    tiny.run(command, tmp_path / "said.txt")
    assert sha(tmp_path / "run") == sha(tmp_path / "whole")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["steps"] for row in rows if "loss" in row] == list(range(1, 401))
    assert [row["steps"] for row in rows if "val_top1" in row] == list(range(1, 400))


def test_workers_change_nothing(uninterrupted, ground: Ground, tmp_path: Path):
    arguments, done, _ = uninterrupted
    tiny.run([*ground.fixres(*arguments, out=tmp_path), "-j", "2"], tmp_path / "said.txt")
    assert sha(tmp_path / "run") == sha(done)


def test_two_processes(uninterrupted, ground: Ground, tmp_path: Path):
    arguments, done, _ = uninterrupted
    command, folder = ground.fixres(*arguments, out=tmp_path), tmp_path / "run"
    wait = random.Random(str(arguments)).uniform(0, 3)
    points: list[Callable[[], bool]] = [
        lambda: (folder / "evaluations").exists(),
        lambda: len(list(folder.glob("features/*/*.safetensors"))) >= 5,
        lambda: (folder / "checkpoint" / "state.safetensors").exists(),
        elapsed(wait),
    ]
    for point in points:
        killed = tiny.start_two(command, tmp_path / "killed")
        kill_when(killed[0], point)
        kill_when(killed[1], lambda: True)
    for attempt in ("run", "again"):
        processes = tiny.start_two([*command, "--experiment", attempt], tmp_path / attempt)
        for process in processes:
            process.join(120)
        said = [Path(f"{tmp_path / attempt}.{rank}").read_text() for rank in range(2)]
        assert [process.exitcode for process in processes] == [0, 0], said
        assert "top-1" in said[0] or "finished already" in said[0]
        assert said[1] == ""
    assert sha(folder) == sha(tmp_path / "again")  # interrupted or not
    if "cached" in arguments:
        assert sha(folder) == sha(done)  # as with one process
        return
    # online, each process's norm sees its own part of the batch, as in the paper's multi-GPU training
    assert_close(load_file(folder / "model.safetensors"), plain_online(ground, processes=2))


@pytest.mark.newest
def test_a_signal_to_one_process_stops_both(ground: Ground, tmp_path: Path):
    command = ground.fixres("--method", "online", "--epochs", "200", out=tmp_path)
    processes = tiny.start_two(command, tmp_path / "said")
    log = tmp_path / "run" / "log.jsonl"
    wait_for(processes[0], log)
    send(processes[1], signal.SIGTERM)
    for process in processes:
        process.join(60)
    said = [Path(f"{tmp_path / 'said'}.{rank}").read_text() for rank in range(2)]
    assert [process.exitcode for process in processes] == [128 + signal.SIGTERM] * 2, said
    assert "Stopped by SIGTERM" in said[0]
    assert said[1] == ""
    assert (tmp_path / "run" / "checkpoint" / "state.safetensors").exists()


@pytest.mark.newest
def test_an_error_in_another_process_is_said_by_it(ground: Ground, tmp_path: Path):
    images = tmp_path / "data"
    shutil.copytree(ground.images, images)
    for path in sorted((images / "train").glob("*/*"))[8:16]:  # the second of the shards, which is process 1's
        path.write_bytes(b"")
    command = ground.fixres("--method", "cached", "--data", str(images), out=tmp_path)
    processes = tiny.start_two(command, tmp_path / "said")
    processes[1].join(60)
    assert processes[1].exitcode == 1
    processes[0].kill()  # as a launcher does
    processes[0].join(60)
    text = (tmp_path / "said.1").read_text()
    assert text.startswith("Error (process 1): ")
    assert "images of" in text and "cannot be read so far" in text


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--standalone"],
        # multi_gpu means "with torchrun"; with --cpu, accelerate starts one process, or asks for MPI
        [
            "accelerate.commands.launch",
            "--multi_gpu",
            *"--num_processes 2 --num_machines 1 --mixed_precision no".split(),
        ],
    ],
    ids=["torchrun", "accelerate launch"],
)
@pytest.mark.slow
def test_launchers(ground: Ground, tmp_path: Path, launcher: list[str]):
    command = ground.fixres("--method", "cached", out=tmp_path)
    tiny.run([*command, "--experiment", "one"], tmp_path / "said.txt")
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "fixefficientnet.reproduce", *command],
        check=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert "2 processes on" in done.stdout
    assert sha(tmp_path / "run") == sha(tmp_path / "one")


# --- bad input ------------------------------------------------------------------------------------------------


def refused(ground: Ground, tmp_path: Path, *more: str) -> str:
    text = tiny.run(ground.fixres(*more, out=tmp_path), tmp_path / "said.txt", status=None)
    assert "Traceback" not in text and "Error" in text
    assert not (tmp_path / "run" / "delta.safetensors").exists()
    return text


@pytest.mark.newest
def test_another_recipe_in_the_same_folder_is_refused(ground: Ground, tmp_path: Path):
    command = ground.fixres("--method", "cached", out=tmp_path)
    tiny.run(command, tmp_path / "said.txt")
    before = sha(tmp_path / "run")
    assert "is finished already" in tiny.run(command, tmp_path / "said.txt")
    text = tiny.run([*command, "--base-lr", "0.5"], tmp_path / "said.txt", status=1)
    assert "base_lr: 0.01 there, 0.5 here" in text
    assert "--overwrite" in text
    assert sha(tmp_path / "run") == before
    (tmp_path / "other" / "checkpoint").mkdir(parents=True)
    state = "checkpoint/state.safetensors"
    shutil.copy(tmp_path / "run" / state, tmp_path / "other" / state)
    text = tiny.run([*command, "--experiment", "other", "--seed", "5"], tmp_path / "said.txt", status=1)
    assert "seed: 0 there, 5 here" in text
    (tmp_path / "run" / "mine.txt").write_text("not the run's")
    tiny.run([*command, "--base-lr", "0.5", "--overwrite"], tmp_path / "said.txt")
    assert sha(tmp_path / "run") != before
    assert (tmp_path / "run" / "mine.txt").exists()


@pytest.mark.newest
def test_options_are_looked_at_before_a_checkpoint(tmp_path: Path):
    command = ["b0", "--data", str(tmp_path), "--checkpoint", str(tmp_path / "nothing.pth"), "--workers", "-1"]
    assert "workers: must be" in tiny.cli("reproduce", *command, status=2)[1]


@pytest.mark.newest
def test_a_folder_in_use_is_refused(ground: Ground, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".owner").write_text("4711 x")
    with FileLock(tmp_path / "run" / ".lock"):
        assert "is in use by the process 4711" in refused(ground, tmp_path)


@pytest.mark.parametrize("method", ["online", "cached"])
def test_a_loss_that_explodes_stops_the_run(ground: Ground, tmp_path: Path, method: str):
    # lr x weight_decay is about 10^4: the weights grow by that at each step
    more = ["--method", method, "--base-lr", "1e9", "--weight-decay", "1e-4", "--checkpoint-steps", "1"]
    text = refused(ground, tmp_path, *more)
    assert "The loss is" in text
    assert "The last good checkpoint is kept" in text
    kept = load_file(tmp_path / "run" / "checkpoint" / "state.safetensors")
    model = ground.model()
    model.load_state_dict(
        {name.removeprefix("model."): kept[name] for name in kept if name[:6] == "model."}, strict=False
    )
    assert torch.isfinite(model(torch.rand(2, 3, 48, 48))).all()
    text = refused(ground, tmp_path, "--method", method, "--base-lr", "1e30", "--experiment", "other")
    assert "Nothing was saved before" in text


@pytest.mark.newest
def test_unreadable_images_are_named_and_tolerated_up_to_a_limit(ground: Ground, tmp_path: Path):
    images = tmp_path / "data"
    shutil.copytree(ground.images, images)
    for name in ("train/apple/3.jpg", "val/cloud/0.jpg"):
        (images / name).write_bytes(b"no image")
    for method in ("online", "cached"):
        more = ["--data", str(images), "--method", method, "--experiment", method]
        text = refused(ground, tmp_path, *more)
        assert "cannot be read so far" in text
        assert "cloud/0.jpg" in text
        tiny.run([*ground.fixres(*more, out=tmp_path), "--max-unreadable", "0.2"], tmp_path / "said.txt")
        found = report(tmp_path / method)
        assert found["measured"]["tuned"]["images"] == 17
        assert any("apple/3.jpg" in reason for reason in found["unreadable"])
        assert "apple/3.jpg" in (tmp_path / method / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cuda"], "there is no CUDA device"),
        (["--data", "nowhere"], "There is no folder nowhere"),
        (["--checkpoint", "nowhere.safetensors"], "there is no such file"),
        (["--checkpoint", __file__], "is no checkpoint, or a damaged one"),
        (["--mixed-precision", "fp16"], "fp16 is for CUDA devices"),
        (["--base-lrr", "1"], "--base-lrr"),
        (["--tune", "bn", "--method", "cached"], "use --method online"),
        (["--backbone", "resnet51"], "timm has no model 'resnet51'"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_bad_arguments(ground: Ground, tmp_path: Path, arguments: list[str], said: str):
    assert said in refused(ground, tmp_path, *arguments)


def test_a_checkpoint_of_another_network_is_refused(ground: Ground, tmp_path: Path):
    text = refused(ground, tmp_path, "--backbone", "test_resnet")
    assert "is no checkpoint of test_resnet" in text


@pytest.mark.newest
def test_classes_that_do_not_match(ground: Ground, tmp_path: Path, hub_cache: Path):
    arguments = ["b0", "--data", str(ground.images), "--output", str(tmp_path), "-j", "0"]
    text = run_anew(arguments, status=1, HF_HUB_CACHE=str(hub_cache))
    assert "has 3 classes, the model has 1000" in text
    assert "--stage base" in text


# --- memory and disk: what cannot be made to happen for real here ---------------------------------------------


def in_process(ground: Ground, out: Path, choices: dict[str, object], *, workers: int = 0, **more: Any) -> Report:
    from accelerate import Accelerator

    from fixefficientnet.reproduce.options import Data, Options
    from fixefficientnet.reproduce.run import Job, run

    subject = recipes.subject_of_backbone(tiny.NETWORK[1])
    given = {"train_size": 32, "test_size": 48, "weights": "sha256:0", "epochs": 1, "shard": 8}
    recipe, data = recipes.resolve(subject, given | choices), Data(str(ground.images))
    options = Options(workers=workers, **more)
    return run(Job(subject, recipe, data, out / "run", ground.checkpoint, options=options), Accelerator(cpu=True))


def test_too_little_disk_is_said_before_the_pass(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"The features take 0\.00 GB, .* has 0\.00 GB free") as error:
        in_process(ground, tmp_path, {"method": "cached"})
    assert "--method online" in str(error.value)


def test_classes_that_a_checkpoint_does_not_have(ground: Ground, tmp_path: Path):
    for classes in (("apple", "brick"), (*tiny.CLASSES, "dune")):
        images = tiny.make_data(tmp_path / str(len(classes)), classes, train=2, val=1)
        text = refused(ground, tmp_path, "--data", str(images))
        assert f"has {len(classes)} classes, the network of" in text


@pytest.mark.newest
def test_a_damaged_shard_is_computed_anew(ground: Ground, tmp_path: Path):
    command = ground.fixres("--method", "cached", "--keep-features", "--val-interval", "0", out=tmp_path)
    tiny.run([*command, "--experiment", "one"], tmp_path / "said.txt")
    shards = sorted((tmp_path / "features").glob("*/*.safetensors"))
    for path in shards[::3]:
        content = bytearray(path.read_bytes())
        content[-3] ^= 64
        path.write_bytes(content)
    (features,) = (tmp_path / "features").glob("*/features.bin")
    with features.open("r+b") as file:
        file.seek(2000)
        file.write(b"12345678")
    said = tiny.run([*command, "--experiment", "two"], tmp_path / "said.txt")
    assert "from before" not in said
    assert sha(tmp_path / "one") == sha(tmp_path / "two")
    assert "Features: 30/30, from before" in tiny.run([*command, "--experiment", "three"], tmp_path / "said.txt")


@pytest.mark.newest
def test_a_whole_shard_of_unreadable_images(ground: Ground, tmp_path: Path):
    images = tmp_path / "data"
    shutil.copytree(ground.images, images)
    for path in sorted((images / "train" / "apple").iterdir()):
        path.write_bytes(b"")
    more = ["--data", str(images), "--method", "cached", "--max-unreadable", "0.5"]
    tiny.run(ground.fixres(*more, out=tmp_path), tmp_path / "said.txt")
    assert len(report(tmp_path / "run")["unreadable"]) == 10


@pytest.mark.newest
def test_a_finished_run_whose_result_is_gone_is_done_again(ground: Ground, tmp_path: Path):
    command = ground.fixres("--method", "cached", out=tmp_path)
    tiny.run(command, tmp_path / "said.txt")
    before, page = sha(tmp_path / "run"), (tmp_path / "run" / "report.html").read_bytes()
    (tmp_path / "run" / "report.html").unlink()
    assert "finished already" in tiny.run(command, tmp_path / "said.txt")  # its page is drawn of what it measured
    assert (tmp_path / "run" / "report.html").read_bytes() == page
    (tmp_path / "run" / "delta.safetensors").unlink()
    assert "finished already" not in tiny.run(command, tmp_path / "said.txt")
    assert sha(tmp_path / "run") == before


@pytest.mark.newest
def test_a_killed_evaluation_goes_on_from_its_finished_batches(ground: Ground, tmp_path: Path):
    command, folder = ground.fixres("--method", "cached", out=tmp_path), tmp_path / "run"
    tiny.run(command, tmp_path / "said.txt")
    before = sha(folder), report(folder)
    journals = [folder / "evaluations" / f"{name}.0.jsonl" for name in ("base", "base_at_test", "tuned")]
    kept = []
    for done, journal in enumerate(journals):
        lines = journal.read_text().splitlines()
        assert [len(json.loads(line)["indices"]) for line in lines[:5]] == [4, 4, 4, 4, 2]
        kept.append("\n".join(lines[: done + 1]))
        journal.write_text(kept[-1] + "\n" + lines[done + 1][:-30])
    (folder / "delta.safetensors").unlink()
    said = tiny.run(command, tmp_path / "said.txt")
    assert "base, at its train size (32): 18/18" in said
    assert (sha(folder), report(folder)) == before
    for text, journal in zip(kept, journals, strict=True):
        assert journal.read_text().startswith(text + "\n")
        batches = [line for line in journal.read_text().splitlines() if '"indices"' in line and line.endswith("}")]
        assert sorted(index for line in batches for index in json.loads(line)["indices"]) == list(range(18))


@pytest.mark.newest
def test_a_base_stage_that_was_stopped_leaves_the_same_bytes_and_its_train_size(ground: Ground, tmp_path: Path):
    base = [
        *tiny.NETWORK,
        "--stage",
        "base",
        "--no-pretrained",
        "--data",
        str(ground.images),
        "--output",
        str(tmp_path),
    ]
    base += ["--train-size", "32", "--epochs", "4", "--batch-size", "7", "-j", "0"]
    assert "2 images, others each time, are left out" in tiny.run([*base, "--experiment", "one"], tmp_path / "said.txt")
    log = tmp_path / "two" / "log.jsonl"
    process = tiny.start([*base, "--experiment", "two"], tmp_path / "said.txt")
    wait_for(process, log)
    send(process, signal.SIGTERM)
    process.join(60)
    tiny.run([*base, "--experiment", "two"], tmp_path / "said.txt")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()

    more = [
        *tiny.NETWORK,
        "--checkpoint",
        str(one),
        "--data",
        str(ground.images),
        "--output",
        str(tmp_path),
        "-j",
        "0",
    ]
    tiny.run([*more, "--test-size", "48", "--method", "cached", "--experiment", "fix"], tmp_path / "said.txt")
    assert report(tmp_path / "fix")["measured"]["base"]["size"] == 32
    assert report(tmp_path / "fix")["classes"] == list(tiny.CLASSES)


@pytest.mark.newest
def test_features_of_a_run_that_was_killed_after_its_report_go(ground: Ground, tmp_path: Path):
    in_process(ground, tmp_path, {"method": "cached"})
    left = tmp_path / "run" / "features" / "features-0" / "features.bin"
    left.parent.mkdir(parents=True)
    left.touch()
    in_process(ground, tmp_path, {"method": "cached"})
    assert not (tmp_path / "run" / "features").exists()


@pytest.mark.newest
def test_a_folder_whose_name_is_not_utf_8_has_no_events(ground: Ground, tmp_path: Path):
    folder = tmp_path / os.fsdecode(b"no \xff utf-8")
    said = tiny.run(ground.fixres("--epochs", "1", out=folder), tmp_path / "said.txt")
    assert "TensorBoard writes into no folder whose name is not UTF-8" in said
    assert (folder / "run" / "log.jsonl").exists()


@pytest.mark.newest
def test_a_folder_that_cannot_be_written(ground: Ground, tmp_path: Path):
    (tmp_path / "file").write_text("")
    text = tiny.run(ground.fixres(out=tmp_path / "file"), tmp_path / "said.txt", status=1)
    assert "file" in text
    assert "Traceback" not in text


@pytest.mark.newest
def test_out_of_memory(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    convolve = nn.Conv2d.forward

    def small_memory(self: nn.Conv2d, inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return convolve(self, inputs)

    monkeypatch.setattr(nn.Conv2d, "forward", small_memory)
    with pytest.raises(RunError, match=r"Out of memory with batch_size 12.*--auto-batch"):
        in_process(ground, tmp_path, {"batch_size": 12, "forward_batch": 8})
    found = in_process(ground, tmp_path, {"batch_size": 12, "forward_batch": 8}, auto_batch=True)
    assert (found.recipe.batch_size, found.recipe.forward_batch) == (6, 4)
    again = in_process(ground, tmp_path, {"batch_size": 12, "forward_batch": 8}, auto_batch=True)
    assert again == found  # the same call finds what it did


@pytest.mark.parametrize("method", ["online", "cached"])
@pytest.mark.newest
def test_an_error_of_the_device_leaves_no_loading_process(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    """One that is left does not end on SIGTERM, and the process waits for it when it ends, for ever."""

    def fail(*given: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(*{"online": (online, "_step"), "cached": (cached, "_forward")}[method], fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):  # which is held, and all that it refers to
        in_process(ground, tmp_path, {"method": method}, workers=1)
    assert not multiprocessing.active_children()


@pytest.mark.newest
def test_only_the_process_that_writes_looks_at_the_clock(tmp_path: Path):
    due = [
        Checkpoints(tmp_path / "state", {}, 10, every_seconds=0, enabled=enabled).due(Position(0, 3, 3))
        for enabled in (True, False)
    ]
    assert due == [True, False]


# --- the plan -------------------------------------------------------------------------------------------------


@pytest.mark.newest
def test_plan_of_a_network_of_ones_own(ground: Ground, tmp_path: Path):
    network = [*tiny.NETWORK, "--plan", "--test-size", "48"]
    text, _ = tiny.cli("reproduce", *network, "--checkpoint", ground.checkpoint)
    assert "trained at 32, tested at 48" in text  # as the checkpoint tells
    assert "there is no such file" in tiny.cli("reproduce", *network, "--checkpoint", "nowhere.pth", status=1)[1]
    assert "--publish does not go with it" in tiny.cli("reproduce", "b0", "--plan", "--publish", "a/b", status=2)[1]


def test_plan_of_one():
    text, _ = tiny.cli("reproduce", "b2", "--plan", "--mixed-precision", "bf16")
    assert "classifier.weight" in text
    assert "420" in text


@pytest.mark.slow
def test_plan_of_all():
    text, _ = tiny.cli("reproduce", "--all", "--plan")
    assert all(re.search(rf"\b{key} ", text) for key in fixefficientnet.list_models() if not key.startswith("lite"))
    assert max(map(len, text.splitlines())) <= 80


# --- compiled ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("method", ["online", "cached"])
def test_compiled_is_nearly_the_same(ground: Ground, tmp_path: Path, method: str):
    for experiment, more in (("eager", []), ("compiled", ["--compile"])):
        command = ground.fixres("--method", method, *more, out=tmp_path, experiment=experiment)
        tiny.run(command, tmp_path / "said.txt")
    eager, compiled = (load_file(tmp_path / name / "model.safetensors") for name in ("eager", "compiled"))
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-3)


def test_a_folder_of_classes_and_the_folder_of_a_run_are_enough(tmp_path: Path):
    data = tiny.make_data(tmp_path / "data", train=10) / "train"
    place = [*tiny.NETWORK, "--data", str(data), "--output", str(tmp_path), *SIZES, *SMALL]
    said, _ = tiny.cli("reproduce", *place, "--stage", "base", "--no-pretrained", "--experiment", "base")
    assert "about 20% of each class's images validate" in " ".join(said.split())
    tiny.cli("reproduce", *place, "--checkpoint", tmp_path / "base", "--method", "cached", "--experiment", "tuned")
    base, tuned = (Report.load(tmp_path / name) for name in ("base", "tuned"))
    assert base.validation_data == tuned.validation_data == f"{data} (automatic validation split)"
    assert tuned.train_images + tuned.measured["tuned"].images == 30
    to = ["--output", tmp_path / "out", "--json", "--data"]
    shutil.copytree(data, tmp_path / "copy")
    for folder, more in ((data, []), (tmp_path / "copy", []), (data, ["--split", "validation"])):
        (row,) = json.loads(tiny.cli("evaluate", tmp_path / "tuned", *to, folder, *more)[0])["results"]
        assert (row["images"], row["top1"]) == (tuned.measured["tuned"].images, tuned.measured["tuned"].top1)
        assert "automatic validation split" in row["data"]
    (tmp_path / "copy" / "apple" / "0.jpg").unlink()  # another folder: all of it
    (row,) = json.loads(tiny.cli("evaluate", tmp_path / "tuned", *to, tmp_path / "copy")[0])["results"]
    assert row["images"] == 29
    (tmp_path / "base" / "model.safetensors").unlink()
    network = [*tiny.NETWORK, "--data", data, "--checkpoint", tmp_path / "base"]
    _, err = tiny.cli("reproduce", *network, status=1)
    assert "base has no model.safetensors" in err


@pytest.mark.newest
def test_features_of_both_splits_are_kept_apart(tmp_path: Path):
    """Their images have the same names and are as many; with one plain view, all else is the same too."""
    data = tiny.make_data(tmp_path / "data", train=6, val=6)
    place = ["--data", data, "--output", tmp_path, *SIZES, *SMALL, "--batch-size", "4"]
    tiny.cli("reproduce", *tiny.NETWORK, *place, "--stage", "base", "--no-pretrained", "--experiment", "base")
    cached = [*tiny.NETWORK, *place, "--checkpoint", tmp_path / "base", "--method", "cached"]
    cached += ["--hflip", "0"]
    tiny.cli("reproduce", *cached, "--views", "1", "--experiment", "alone")
    tiny.cli("reproduce", *cached, "--views", "2", "--keep-features", "--experiment", "before")
    more = ["--views", "1", "--keep-features", "--feature-dtype", "float32", "--experiment"]
    tiny.cli("reproduce", *cached, *more, "after")
    shutil.rmtree(tmp_path / "features")
    tiny.cli("reproduce", *cached, *more, "anew")
    assert sha(tmp_path / "after") == sha(tmp_path / "anew")


def test_a_state_saved_twice_leaves_the_last_good_one(tmp_path: Path):
    """As before a validation: the same state again must not take the place of the one before it."""
    recipe = recipes.resolve(recipes.subject_of_backbone("test_efficientnet"), {})
    network = prepare(timm.create_model("test_efficientnet", num_classes=3), recipe)
    state = TrainingState(network, optimizer_of(network))
    checkpoints = Checkpoints(tmp_path / "state.safetensors", {}, 1, 60)
    weight = network.model.get_parameter("classifier.weight")

    def save(value: float, position: Position) -> None:
        with torch.no_grad():
            weight.fill_(value)
        checkpoints.save(position, state)

    save(1.0, Position(0, 5, 5))
    checkpoints.confirm()
    save(2.0, Position(1, 0, 6))
    save(2.0, Position(1, 0, 6))
    error = checkpoints.give_up(math.inf, Position(1, 0, 6))
    assert "The last good checkpoint is kept" in str(error)
    assert checkpoints.restore(state) == Position(0, 5, 5)
    assert bool((weight == 1.0).all())
