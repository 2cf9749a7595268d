"""Accuracy against a plain loop, and its figures against torchmetrics'."""

import json
import threading
from dataclasses import asdict
from pathlib import Path

import plain
import pytest
import scipy.stats
import timm
import tiny
import torch
from conftest import Network
from plain import TEST, evaluated, predict_dataset
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from fixefficientnet.classes import Subset
from fixefficientnet.data.dataset import ImageDataset, open_dataset
from fixefficientnet.errors import DataError, EvaluationError
from fixefficientnet.evaluation.journal import Finished, FinishedBatch
from fixefficientnet.evaluation.outcome import Evaluation
from fixefficientnet.evaluation.predictions import ImagePrediction, Predictions


@pytest.fixture(scope="module", params=[3, 7, 20])
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A network, its images, their labels, and the logits that a plain loop gets."""
    folder = tmp_path_factory.mktemp("evaluation")
    classes = tuple(f"class{number}" for number in range(request.param))
    for label, name in enumerate(classes):
        for index in range(3 + label % 4):
            tiny.mottle(folder / "val" / name / f"{index}.png", label, index)
    images = open_dataset(str(folder), "validation", num_classes=request.param)
    paths = [folder / "val" / images.image_name(index) for index in range(len(images))]
    labels = [classes.index(path.parent.name) for path in paths]
    model = plain.network(request.param, paths, labels)
    return model, images, labels, plain.logits(model, paths)


def broken_copy(images: ImageDataset, folder: Path, broken: set[int]) -> ImageDataset:
    """The same images, but some of them unreadable."""
    for index in range(len(images)):
        path = folder / "val" / images.image_name(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            b"no image" if index in broken else (Path(images.name) / images.image_name(index)).read_bytes()
        )
    return open_dataset(str(folder), "validation")


def assert_figures(found: Evaluation, logits: torch.Tensor, labels: list[int]) -> None:
    """Holds the figures of an evaluation against torchmetrics' and torch's, of the plain loop's logits."""
    classes, targets = logits.shape[1], torch.tensor(labels)
    assert found.images == len(labels)
    for best, top in ((1, found.top1), (5, found.top5)):
        accuracy = MulticlassAccuracy(classes, top_k=min(best, classes), average="micro")
        assert top == pytest.approx(100 * accuracy(logits, targets).item(), abs=1e-4)
    calibration = MulticlassCalibrationError(classes, n_bins=15, norm="l1")
    assert found.calibration_error == pytest.approx(calibration(logits.softmax(1), targets).item(), abs=1e-4)
    assert found.loss == pytest.approx(F.cross_entropy(logits.double(), targets).item(), rel=1e-5)


# --- one image after the other --------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "shard"), [(32, 256), (1, 256), (5, 8), (8, 5), (64, 1)])
def test_figures_are_a_plain_loops_whatever_the_batches_and_shards(ground, batch_size: int, shard: int):
    model, images, labels, logits = ground
    found = predict_dataset(model, images, TEST, batch_size=batch_size, shard=shard)
    assert found.correct == plain.correct(logits, labels)
    assert found.correct5 == plain.correct(logits, labels, best=5)
    assert_figures(found, logits, labels)
    assert (found.size, found.crop_pct, found.unreadable) == (48, 0.875, {})
    if logits.shape[1] < 5:
        assert found.top5 == 100
    else:
        assert found.top1 < found.top5 < 100


def test_each_prediction_has_the_best_classes_with_their_probability_and_loss(ground):
    model, images, labels, logits = ground
    found = predict_dataset(model, images, TEST, batch_size=4)
    losses = F.cross_entropy(logits, torch.tensor(labels), reduction="none").tolist()
    for prediction, label, row, loss in zip(evaluated(found), labels, logits, losses, strict=True):
        assert prediction.labels == (label,)
        assert list(prediction.top5) == row.argsort(descending=True)[:5].tolist()
        assert prediction.confidence == pytest.approx(row.softmax(0).max().item(), abs=1e-4)
        assert prediction.loss == pytest.approx(loss, abs=1e-4)


def test_loading_processes_change_nothing(ground):
    model, images, _, _ = ground
    assert predict_dataset(model, images, TEST, batch_size=5, workers=2) == predict_dataset(
        model, images, TEST, batch_size=5
    )


@pytest.mark.parametrize("batch_size", [1, 4])
def test_several_concurrent_batches_are_evaluated_alike(ground, tmp_path: Path, batch_size: int):
    model, whole, *_ = ground
    model.train()
    images = broken_copy(whole, tmp_path, {2})
    one, several = (
        predict_dataset(model, images, TEST, batch_size=batch_size, shard=batch_size, threads=threads)
        for threads in (1, 3)
    )
    assert (several.correct, several.correct5, several.unreadable) == (one.correct, one.correct5, one.unreadable)
    assert several.loss == pytest.approx(one.loss, rel=1e-5)
    assert list(several.unreadable) == [2]
    assert all(module.training for module in model.modules())
    model.eval()


def test_an_error_leaves_no_thread_and_the_model_as_it_was(ground):
    class Full:
        def read(self) -> Finished:
            return Finished()

        def write(self, found: FinishedBatch) -> None:
            raise OSError("full")

    model, images, *_ = ground
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(OSError, match="full") as caught:
        predict_dataset(model, images, TEST, batch_size=1, shard=1, threads=2, journal=Full())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch")], caught
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model.eval()


def test_the_network_is_left_as_it_was(ground):
    model, images, _, _ = ground
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predict_dataset(model, images, TEST)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_network_in_train_mode_is_measured_as_in_eval_mode(ground):
    model, images, _, _ = ground
    expected = predict_dataset(model, images, TEST)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    try:
        assert predict_dataset(model, images, TEST) == expected
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- restricted to some classes -----------------------------------------------------------------------------------


def test_restricted_logits_are_a_plain_loops_with_the_columns_of_the_subset(ground, tmp_path: Path):
    _, images, labels, _ = ground
    paths = [Path(images.name) / images.image_name(index) for index in range(len(images))]
    number = {label: 40 - 2 * label for label in labels}  # of the model, in another order, with gaps
    model = plain.network(41, paths, [number[label] for label in labels])
    mapped = ImageDataset(images.source, (), number, images.name)
    subset = Subset.of(number.values())
    chosen = sorted(set(number.values()))
    assert subset.classes == tuple(chosen)
    logits = plain.logits(model, paths)[:, chosen]
    targets = [chosen.index(number[label]) for label in labels]
    found = predict_dataset(model, mapped, TEST, batch_size=4, subset=subset)
    assert found.correct == plain.correct(logits, targets)
    assert found.correct5 == plain.correct(logits, targets, best=5)
    assert_figures(found, logits, targets)
    assert {predicted for prediction in evaluated(found) for predicted in prediction.top5} <= set(chosen)
    assert [prediction.labels[0] for prediction in evaluated(found)] == [number[label] for label in labels]
    assert found.top1 > predict_dataset(model, mapped, TEST, batch_size=4).top1


# --- what cannot be measured ----------------------------------------------------------------------------------------


def test_unreadable_images_are_left_out_and_named(ground, tmp_path: Path):
    model, images, labels, logits = ground
    broken = {0, 5, 8, 9, 10, 11, len(images) - 1}
    copy = broken_copy(images, tmp_path, broken)
    found = predict_dataset(model, copy, TEST, batch_size=3, shard=4)
    for correct, best in ((found.correct, 1), (found.correct5, 5)):
        all_correct = plain.correct(logits, labels, best)
        assert correct == "".join("-" if index in broken else digit for index, digit in enumerate(all_correct))
    kept = [index for index in range(len(labels)) if index not in broken]
    assert_figures(found, logits[kept], [labels[index] for index in kept])
    assert (found.summary().images, found.summary().unreadable) == (len(kept), len(broken))
    assert set(found.unreadable) == broken
    assert all(copy.image_name(index) in reason for index, reason in found.unreadable.items())


def test_where_no_image_can_be_read_there_is_nothing_to_say(ground, tmp_path: Path):
    model, images, _, _ = ground
    copy = broken_copy(images, tmp_path, set(range(len(images))))
    with pytest.raises(DataError, match=f"None of the {len(images)} images of .*val could be read"):
        predict_dataset(model, copy, TEST)


def test_labels_that_the_model_has_not_are_refused(ground):
    _, images, labels, _ = ground
    model = timm.create_model("test_efficientnet", num_classes=max(labels)).eval()
    first = labels.index(max(labels))
    with pytest.raises(
        DataError, match=rf"{images.image_name(first)} has the label {max(labels)}, .* 0 to {max(labels) - 1}"
    ):
        predict_dataset(model, images, TEST)
    below = ImageDataset(images.source, (), {0: -1}, images.name)
    with pytest.raises(DataError, match="has the label -1"):
        predict_dataset(model, below, TEST)


def test_a_label_outside_of_the_subset_is_refused(ground):
    model, images, labels, _ = ground
    with pytest.raises(DataError, match=f"has the label {max(labels)}, .* restricted to {max(labels)}"):
        predict_dataset(model, images, TEST, subset=Subset.of(range(max(labels))))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_are_refused(ground, value: float):
    _, images, labels, _ = ground
    model: Network = timm.create_model("test_efficientnet", num_classes=max(labels) + 1).eval()
    model.classifier.bias.data[1] = value
    with pytest.raises(EvaluationError, match=f"NaN or infinite for {images.image_name(0)}"):
        predict_dataset(model, images, TEST)


def test_a_size_that_the_model_does_not_take_is_refused(ground):
    _, images, labels, _ = ground
    model = timm.create_model("test_vit", num_classes=max(labels) + 1, dynamic_img_size=False).eval()
    with pytest.raises(EvaluationError, match=r"fails on images of 48 pixels: .*160"):
        predict_dataset(model, images, TEST)


class Sum(nn.Module):
    """A network of one class."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs * self.weight).sum((1, 2, 3))[:, None]


def test_a_model_of_one_class_is_always_correct(tmp_path: Path):
    for index in range(3):
        tiny.mottle(tmp_path / "val" / "alone" / f"{index}.png", index)
    found = predict_dataset(Sum(), open_dataset(str(tmp_path), None), TEST)
    assert (found.top1, found.top5, found.loss, found.calibration_error) == (100, 100, 0, 0)


# --- figures ------------------------------------------------------------------------------------------------------


def evaluation(*rows: tuple[int, tuple[int, ...]] | None, loss: float = 0.5) -> Evaluation:
    """An evaluation of images given as (label, predictions) each, or as None if unreadable."""
    predictions = (row and ImagePrediction((row[0],), row[1], 0.6, loss) for row in rows)
    unreadable = {index: f"image {index} is damaged" for index, row in enumerate(rows) if row is None}
    return Evaluation(48, 0.875, Predictions(predictions), unreadable, seconds=2.0)


MIXED = evaluation(
    (1, (1, 0, 2)), (2, (2, 1, 0)), (0, (1, 0, 2)), (7, (7, 1, 2)), None, (7, (1, 2, 3)), None, (1, (1, 2))
)


def test_predictions_come_back_as_they_were_put_in_as_pythons_own_numbers():
    given = [ImagePrediction((1, 2), (3, 1), 0.1, 0.2), None, ImagePrediction((4,), (4, 3, 2, 1, 0), 1.0, 0.0)]
    assert [*Predictions(given)] == given
    assert json.loads(json.dumps([*Predictions(given)])) == json.loads(json.dumps(given))


def test_the_digits_say_what_is_correct_and_what_was_not_evaluated():
    assert (MIXED.correct, MIXED.correct5) == ("1101-0-1", "1111-0-1")


def test_the_summary_has_the_intervals_of_the_evaluated_images():
    found = asdict(MIXED.summary())
    assert json.loads(json.dumps(found)) == found
    assert (found["images"], found["unreadable"], found["loss"]) == (6, 2, 0.5)
    for top, count in (("top1", 4), ("top5", 5)):
        interval = scipy.stats.binomtest(count, 6).proportion_ci(method="wilson")
        assert found[top] == pytest.approx(100 * count / 6)
        assert found[f"{top}_low"] == pytest.approx(100 * interval.low)
        assert found[f"{top}_high"] == pytest.approx(100 * interval.high)


def test_images_per_second_are_of_all_that_were_loaded():
    assert MIXED.rate == 4
    assert Evaluation(48, 1.0, MIXED.predictions).rate is None


def test_other_labels_do_not_change_how_fast_it_was():
    assert MIXED.relabelled([[1]] * 3 + [[]] * 5).rate == MIXED.rate


def test_the_time_that_it_took_is_no_part_of_the_result():
    assert Evaluation(48, 1.0, MIXED.predictions, seconds=1.0) == Evaluation(48, 1.0, MIXED.predictions, seconds=2.0)
    assert Evaluation(48, 1.0, MIXED.predictions) != Evaluation(48, 1.0, MIXED.predictions[:-1])


def test_other_labels_for_the_same_predictions():
    found = MIXED.relabelled([[0, 1], [], [2, 1], [5], [1], [9, 2], [], []])
    assert found.correct == "1-10-0--"
    assert found.correct5 == "1-10-1--"
    assert (found.images, found.unreadable, found.loss) == (4, MIXED.unreadable, 0.5)
    with pytest.raises(EvaluationError, match="None of the evaluated images"):
        MIXED.relabelled([[]] * 4 + [[1]] + [[]] * 3)


def test_the_table_per_class_is_counted_by_hand():
    assert [list(row.values()) for row in MIXED.per_class()] == [
        [0, 1, 0, *interval(0, 1), 100, 0, 1, 1],
        [1, 2, 100, *interval(2, 2), 100, 2, None, 0],
        [2, 1, 100, *interval(1, 1), 100, 0, None, 0],
        [7, 2, 50, *interval(1, 2), 50, 0, 1, 1],
    ]
    names = "class images top1 top1_low top1_high top5 false_positives taken_for times"
    assert list(MIXED.per_class()[0]) == names.split()


def interval(successes: int, trials: int) -> list[object]:
    found = scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")
    return [pytest.approx(100 * found.low, abs=1e-9), pytest.approx(100 * found.high, abs=1e-9)]


def test_the_table_per_class_is_that_of_the_logits(ground):
    model, images, labels, logits = ground
    predicted = logits.argmax(1).tolist()
    rows = predict_dataset(model, images, TEST).per_class()
    assert [row["class"] for row in rows] == sorted(set(labels))
    assert sum(row["images"] for row in rows) == len(labels)
    for row in rows:
        of_class = [index for index, label in enumerate(labels) if label == row["class"]]
        wrong = [predicted[index] for index in of_class if predicted[index] != row["class"]]
        assert row["images"] == len(of_class)
        assert row["top1"] == pytest.approx(100 * (1 - len(wrong) / len(of_class)))
        five = plain.correct(logits, labels, best=5)
        assert row["top5"] == pytest.approx(100 * sum(five[index] == "1" for index in of_class) / len(of_class))
        others = [predicted for predicted, label in zip(predicted, labels, strict=True) if label != row["class"]]
        assert row["false_positives"] == others.count(row["class"])
        assert row["times"] == max(map(wrong.count, wrong), default=0)
        if wrong:
            assert wrong.count(row["taken_for"]) == row["times"]


def test_there_is_no_table_per_class_of_labels_that_are_several():
    with pytest.raises(EvaluationError, match="one label per image"):
        MIXED.relabelled([[1, 2]] * 8).per_class()
