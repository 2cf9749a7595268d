"""Accuracy against a plain loop, and its statistics against scipy's."""

import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import scipy.stats
import timm
import tiny
import torch
from conftest import lively
from PIL import Image
from torch import nn
from torchvision import transforms

from fixefficientnet import manifest
from fixefficientnet.data import Batch, Pictures, open_pictures
from fixefficientnet.errors import DataError
from fixefficientnet.evaluation import Evaluation, evaluate, from_json, paired, wilson

TEST = manifest.TestTime(48, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
REFERENCE = transforms.Compose(
    [
        transforms.Resize(54, transforms.InterpolationMode.BICUBIC),  # int(48 / 0.875)
        transforms.CenterCrop(48),
        transforms.ToTensor(),
        transforms.Normalize(TEST.mean, TEST.std),
    ]
)


def network(classes: int, pictures: list[Path]) -> nn.Module:
    """A random network that does not find all pictures to be of one class."""
    torch.manual_seed(3)
    model = lively(timm.create_model("test_efficientnet", num_classes=classes), seed=3)
    with torch.inference_mode():
        features = model.forward_head(model.forward_features(stack(pictures)), pre_logits=True)
        model.classifier.weight.normal_()
        model.classifier.bias.copy_(-model.classifier.weight @ features.mean(0))
        assert len(set(model(stack(pictures)).argmax(1).tolist())) == classes
    return model


def stack(pictures: list[Path]) -> torch.Tensor:
    return torch.stack([REFERENCE(Image.open(path).convert("RGB")) for path in pictures])


def plain(model: nn.Module, path: Path, label: int) -> tuple[bool, bool, float]:
    """One picture at a time: is it right, is it among the best five, loss."""
    with torch.inference_mode():
        logits = model(stack([path]))[0].double().tolist()
    better = sum(logit > logits[label] for logit in logits)
    return better == 0, better < 5, math.log(sum(map(math.exp, logits))) - logits[label]


@pytest.fixture(scope="module", params=[3, 7])
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A network, its pictures, and what a plain loop makes of each."""
    folder = tmp_path_factory.mktemp("evaluation")
    classes = tuple(f"class{number}" for number in range(request.param))
    tiny.make_data(folder, classes, train=0, val=8)
    pictures = open_pictures(str(folder), "validation", num_classes=request.param)
    paths = [folder / "val" / pictures.name(index) for index in range(len(pictures))]
    model = network(request.param, paths)
    return model, pictures, [plain(model, path, classes.index(path.parent.name)) for path in paths]


def broken_copy(pictures: Pictures, folder: Path, broken: set[int]) -> Pictures:
    """The same pictures, but some of them unreadable."""
    for index in range(len(pictures)):
        path = folder / "val" / pictures.name(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            b"no picture" if index in broken else (Path(pictures.what) / pictures.name(index)).read_bytes()
        )
    return open_pictures(str(folder), "validation")


@pytest.mark.parametrize(("batch_size", "shard"), [(32, 256), (1, 256), (5, 8), (8, 5), (64, 1)])
def test_figures_are_a_plain_loops_whatever_the_batches_and_shards(ground, batch_size: int, shard: int):
    model, pictures, expected = ground
    found = evaluate(model, pictures, TEST, batch_size=batch_size, shard=shard)
    count = len(expected)
    assert found.right == "".join("01"[right] for right, _, _ in expected)
    assert found.right5 == "".join("01"[right5] for _, right5, _ in expected)
    assert found.pictures == len(found.right) == count
    assert found.top1 == pytest.approx(100 * sum(right for right, _, _ in expected) / count)
    assert found.top5 == pytest.approx(100 * sum(right5 for _, right5, _ in expected) / count)
    assert found.loss == pytest.approx(sum(loss for _, _, loss in expected) / count, abs=1e-6, rel=1e-6)
    assert (found.size, found.crop_pct) == (48, 0.875)
    if len(pictures.classes) < 5:
        assert found.top5 == 100
    else:
        assert found.top1 < found.top5 < 100


def test_loading_processes_change_nothing(ground):
    model, pictures, _ = ground
    assert evaluate(model, pictures, TEST, batch_size=5, workers=2) == evaluate(model, pictures, TEST, batch_size=5)


def test_the_network_is_left_as_it_was(ground):
    model, pictures, _ = ground
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, pictures, TEST)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_network_in_train_mode_is_measured_as_in_eval_mode(ground):
    model, pictures, _ = ground
    expected = evaluate(model, pictures, TEST)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    try:
        assert evaluate(model, pictures, TEST) == expected
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unreadable_pictures_are_left_out_and_named(ground, tmp_path: Path):
    model, pictures, expected = ground
    broken = {0, 5, 8, 9, 10, 11, len(pictures) - 1}
    copy = broken_copy(pictures, tmp_path, broken)
    batches: list[Batch] = []
    found = evaluate(model, copy, TEST, batch_size=3, shard=4, on_batch=batches.append)
    assert found.right == "".join("-" if i in broken else "01"[line[0]] for i, line in enumerate(expected))
    assert found.right5 == "".join("-" if i in broken else "01"[line[1]] for i, line in enumerate(expected))
    judged = [line for index, line in enumerate(expected) if index not in broken]
    assert found.pictures == len(judged)
    assert found.top1 == pytest.approx(100 * sum(right for right, _, _ in judged) / len(judged))
    assert found.top5 == pytest.approx(100 * sum(right5 for _, right5, _ in judged) / len(judged))
    assert found.loss == pytest.approx(sum(loss for _, _, loss in judged) / len(judged), abs=1e-6, rel=1e-6)
    assert (found.summary()["pictures"], found.summary()["unreadable"]) == (len(judged), len(broken))
    failures = dict(failure for batch in batches for failure in batch.unreadable)
    assert set(failures) == broken
    assert all(copy.name(index) in reason for index, reason in failures.items())


def test_where_no_picture_can_be_read_there_is_nothing_to_say(ground, tmp_path: Path):
    model, pictures, _ = ground
    copy = broken_copy(pictures, tmp_path, set(range(len(pictures))))
    with pytest.raises(DataError, match=f"None of the {len(pictures)} pictures of .*val could be read"):
        evaluate(model, copy, TEST)


def test_an_evaluation_survives_json(ground):
    model, pictures, _ = ground
    found = evaluate(model, pictures, TEST)
    assert from_json(json.loads(json.dumps(asdict(found)))) == found
    odd = Evaluation(48, 0.875, "01-", "11-", math.pi)
    assert from_json(json.loads(json.dumps(asdict(odd)))) == odd


def test_the_summary_has_the_interval_of_the_judged_pictures():
    found = Evaluation(48, 0.875, "1101-0-1", "1111-1-1", 0.5).summary()
    interval = scipy.stats.binomtest(4, 6).proportion_ci(method="wilson")
    assert json.loads(json.dumps(found)) == found
    assert (found["pictures"], found["unreadable"], found["loss"]) == (6, 2, 0.5)
    assert (found["top1"], found["top5"]) == (pytest.approx(100 * 4 / 6), 100)
    assert (found["top1_low"], found["top1_high"]) == (
        pytest.approx(100 * interval.low),
        pytest.approx(100 * interval.high),
    )


@pytest.mark.parametrize("trials", [1, 2, 3, 10, 33, 100, 999, 50_000])
def test_the_interval_is_wilsons(trials: int):
    generator = random.Random(trials)
    counts = {0, 1, trials // 2, trials - 1, trials} | {generator.randint(0, trials) for _ in range(20)}
    for successes in sorted(counts):
        expected = scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")
        low, high = wilson(successes, trials)
        assert low == pytest.approx(100 * expected.low, abs=1e-9), successes
        assert high == pytest.approx(100 * expected.high, abs=1e-9), successes
        assert 0 <= low <= 100 * successes / trials + 1e-9
        assert 100 * successes / trials - 1e-9 <= high <= 100


@pytest.mark.parametrize("length", [1, 2, 10, 40, 300, 3000])
def test_the_paired_probability_is_that_of_the_sign_test(length: int):
    generator = random.Random(length)
    for weights in ((1, 1, 0), (5, 1, 1), (1, 9, 3)):
        one, other = ("".join(generator.choices("01-", weights, k=length)) for _ in range(2))
        first = sum(a == "1" and b == "0" for a, b in zip(one, other, strict=True))
        second = sum(a == "0" and b == "1" for a, b in zip(one, other, strict=True))
        found = paired(one, other)
        assert found[:2] == (first, second)
        if first + second:
            expected = scipy.stats.binomtest(min(first, second), first + second, 0.5).pvalue
            assert found[2] == pytest.approx(expected, rel=1e-9)
        else:
            assert found[2] == 1
        assert paired(other, one) == (second, first, found[2])


def test_a_clear_difference_and_none_at_all():
    assert paired("1" * 5000, "0" * 5000) == (5000, 0, 0)
    assert paired("10-1", "10-1") == (0, 0, 1)
    assert paired("1" * 20 + "-0", "0" * 20 + "01")[2] == pytest.approx(2 * (1 + 21) / 2**21)


def test_evaluations_of_different_data_sets_cannot_be_paired():
    with pytest.raises(DataError, match="of 3 and of 4 pictures"):
        paired("101", "1010")
