"""The base stage: its learning rates and moving average are timm's, it keeps the best epoch, and stops without gain."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import tiny
import torch
from conftest import Network
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from fixefficientnet._internal import records
from fixefficientnet.data.dataset import open_dataset
from fixefficientnet.models import Description
from fixefficientnet.preprocessing import Preprocess, TrainingTransform
from fixefficientnet.reproduce import network
from fixefficientnet.reproduce import recipe as recipes
from fixefficientnet.reproduce.checkpoints import Checkpoints
from fixefficientnet.reproduce.log import Log
from fixefficientnet.reproduce.report import Report

BATCH, EPOCHS = 6, 3
PLACE = [*tiny.NETWORK, "--stage", "base", "--train-size", "32", "--batch-size", str(BATCH), "-j", "0"]
FALLING = ["--schedule", "step", "--base-lr", "0.05", "--lr-decay-epochs", "3", "--lr-decay", "1000"]
"""A learning rate that is far too high from the fourth epoch on."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_data(tmp_path_factory.mktemp("base"), train=8, val=6)


@pytest.fixture(scope="module")
def weights(data: Path) -> Path:
    """Random weights of a network, as a training script saves them."""
    torch.manual_seed(3)
    model: Network = timm.create_model("test_efficientnet", num_classes=3)
    safetensors.torch.save_file(model.state_dict(), data / "weights.safetensors")
    return data / "weights.safetensors"


def train(data: Path, weights: Path, folder: Path, *more: object, status: int = 0) -> str:
    """Runs the base stage in this process; what it said."""
    place = ["--data", data, "--checkpoint", weights, "--output", folder.parent, "--experiment", folder.name]
    return "".join(tiny.cli("reproduce", *PLACE, "--epochs", EPOCHS, *place, *more, status=status, columns=300))


def tensors(file: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(file)


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_the_learning_rate_is_timms(schedule: str):
    steps, chosen = 5, {"stage": "base", "epochs": 9, "schedule": schedule, "warmup_epochs": 2, "lr_decay_epochs": 3}
    recipe = recipes.resolve(recipes.subject_of_backbone(tiny.NETWORK[1]), chosen)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.full_learning_rate)
    warmup: dict[str, Any] = {"warmup_t": 2 * steps, "warmup_prefix": False, "t_in_epochs": False}
    timms = (
        CosineLRScheduler(optimizer, t_initial=9 * steps, **warmup)
        if schedule == "cosine"
        else StepLRScheduler(optimizer, decay_t=3 * steps, decay_rate=0.1, **warmup)
    )
    for update in range(9 * steps):
        timms.step_update(update)
        assert recipe.learning_rate(update / steps) == pytest.approx(optimizer.param_groups[0]["lr"]), update


def plain_average(data: Path, weights: Path, decay: float) -> list[dict[str, torch.Tensor]]:
    """timm's moving average after each epoch of a plain loop with the base stage's defaults."""
    recipe = recipes.resolve(
        recipes.subject_of_backbone(tiny.NETWORK[1]),
        {"stage": "base", "weights": "sha256:", "train_size": 32, "batch_size": BATCH, "epochs": EPOCHS},
    )
    model: Network = timm.create_model("test_efficientnet", num_classes=3)
    model.load_state_dict(tensors(weights))
    model = model.to(memory_format=torch.channels_last)
    average = ModelEmaV3(model, decay=decay, use_warmup=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    images = open_dataset(str(data), "train")
    transform = TrainingTransform(Preprocess.of(recipe.base), 0, 0.5)
    model.train()
    found, steps = [], len(images) // BATCH
    for update in range(EPOCHS * steps):
        epoch, step = divmod(update, steps)
        chosen = np.random.default_rng([0, epoch]).permutation(len(images))[step * BATCH :][:BATCH].tolist()
        rate = 8 * recipe.base_lr * BATCH / 512
        optimizer.param_groups[0]["lr"] = rate / 2 * (1 + math.cos(math.pi * update / (EPOCHS * steps)))
        inputs = torch.stack([transform(images[index][0], epoch, index) for index in chosen])
        inputs = (inputs / 255 - torch.tensor(recipe.mean)[:, None, None]) / torch.tensor(recipe.std)[:, None, None]
        targets = torch.tensor([images[index][1] for index in chosen])
        logits = model(inputs.to(memory_format=torch.channels_last))
        loss = nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model, step=update + 1)
        if step + 1 == steps:
            found.append({name: tensor.clone() for name, tensor in average.module.state_dict().items()})
    return found


def test_the_moving_average_is_timms(data: Path, weights: Path, tmp_path: Path):
    train(data, weights, tmp_path / "run", "--model-ema-decay", "0.6")  # reached after three updates
    selection = Report.load(tmp_path / "run").selection
    assert selection is not None
    averages = plain_average(data, weights, 0.6)
    last = tmp_path / "run" / "last.safetensors"
    for file, epoch in ((last.with_name("model.safetensors"), selection.epoch), (last, EPOCHS)):
        for name, tensor in tensors(file).items() if file.exists() else ():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(tensor, averages[epoch - 1][name], rtol=1e-3, atol=1e-5, msg=name)
    assert last.exists() == (selection.epoch < EPOCHS)


def test_the_best_epoch_is_kept_and_training_stops_without_gain(data: Path, weights: Path, tmp_path: Path):
    train(data, weights, tmp_path / "short", *FALLING, "--epochs", "3")
    said = train(data, weights, tmp_path / "run", *FALLING, "--epochs", "9", "--patience", "2")
    short, run = tmp_path / "short", tmp_path / "run"
    best, found = Report.load(short).selection, Report.load(run)
    chosen = found.selection
    assert best and chosen and chosen.last_top1 is not None
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    validated = [line["val_top1"] for line in lines if "val_top1" in line]
    assert validated[-1] == chosen.last_top1 < chosen.top1 == max(validated)
    assert (chosen.epoch, chosen.epochs) == (validated.index(max(validated)) + 1, chosen.epoch + 2)
    assert (chosen.epoch, chosen.top1) == (best.epoch, best.top1)
    assert (found.measured["trained"].top1, found.forwards) == (chosen.top1, chosen.epochs * 24)
    assert str(chosen) in said
    assert f"No gain since epoch {chosen.epoch}: stopped after epoch {chosen.epochs}." in said
    for text in ((run / "report.md").read_text(), (run / "report.html").read_text()):
        assert f"Epoch {chosen.epoch} of {chosen.epochs} is the best" in text and "slightly optimistic" in text
    assert (run / "model.safetensors").read_bytes() == (short / "model.safetensors").read_bytes()
    last = run / "last.safetensors"
    latest, kept = Description.load(last), Description.load(run / "model.safetensors")
    assert latest and kept and latest.sha256 != kept.sha256  # of other weights
    assert {**records.values(latest), "sha256": None} == {**records.values(kept), "sha256": None}
    out = ["--output", tmp_path / "out", "--json", "--data", data]
    model = f"timm/{tiny.NETWORK[1]}:{last}"
    (row,) = json.loads(tiny.cli("evaluate", model, *out)[0])["results"]
    assert row["top1"] == pytest.approx(chosen.last_top1)


class Killed(BaseException):
    """What a run is ended with."""


def kill(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run be killed after so many things that it keeps: checkpoints, and accuracies in the log."""
    kept = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **values: Any) -> Any:
            nonlocal kept
            result = function(*args, **values)
            kept += function.__name__ == "save" or "val_top1" in values
            if kept == after:
                raise Killed
            return result

        return call

    monkeypatch.setattr(Checkpoints, "save", counted(Checkpoints.save))
    monkeypatch.setattr(Log, "write", counted(Log.write))


@pytest.mark.parametrize(("precision", "kills"), [("no", (1, 2, 3, 4, 5)), ("bf16", (7,))])
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, kills: tuple[int, ...]
):
    more = ["--mixed-precision", precision, "--model-ema-decay", "0.9", "--warmup-epochs", "1", "--patience", "2"]
    more += ["--checkpoint-steps", "1"]
    load = network.load

    def with_dropout(*args: Any, **values: Any) -> Network:
        model: Network = load(*args, **values)
        model.drop_rate = 0.3
        return model

    monkeypatch.setattr(network, "load", with_dropout)
    train(data, weights, tmp_path / "whole", *more)
    for after in kills:
        with monkeypatch.context() as patch:
            kill(after, patch)
            with pytest.raises(Killed):
                train(data, weights, tmp_path / "run", *more)
    train(data, weights, tmp_path / "run", *more)
    for name in ("model.safetensors", "last.safetensors", "report.json", "log.jsonl", "report.html"):
        whole, run = tmp_path / "whole" / name, tmp_path / "run" / name
        assert whole.exists() == run.exists(), name
        assert not whole.exists() or whole.read_bytes() == run.read_bytes(), name


def test_two_processes_keep_the_same_best_and_go_on_with_it(data: Path, weights: Path, tmp_path: Path):
    command = [*PLACE, "--epochs", "2", "--data", str(data), "--checkpoint", str(weights), "--output", str(tmp_path)]
    command += ["--experiment", "run", "--model-ema-decay", "0.9"]
    kept = []
    for attempt in ("first", "again"):
        processes = tiny.start_two(command, tmp_path / attempt)
        for process in processes:
            process.join(120)
        said = [Path(f"{tmp_path / attempt}.{rank}").read_text() for rank in range(2)]
        assert [process.exitcode for process in processes] == [0, 0], said
        model, report = (tmp_path / "run" / name for name in ("model.safetensors", "report.json"))
        kept.append((model.read_bytes(), report.read_bytes()))
        model.unlink()  # so that the run is not finished: it validates its last state anew, and takes the best
    assert kept[0] == kept[1]
    assert Report.load(tmp_path / "run").processes == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--val-interval", "2"], "The base stage keeps the best epoch"),
        (["--stage", "fixres", "--patience", "1"], "Of the base stage alone: patience."),
        (["--warmup-epochs", str(EPOCHS)], "warmup_epochs is 3: it must be below epochs, 3 here"),
        (["--model-ema-decay", "1"], "model_ema_decay: must be a number of at least 0 and below 1"),
    ],
)
def test_what_does_not_go_together_is_refused(data: Path, weights: Path, tmp_path: Path, more: list[str], said: str):
    assert said in train(data, weights, tmp_path / "run", *more, status=2)
    assert not (tmp_path / "run").exists()
