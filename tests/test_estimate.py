"""The hours of a plan: rates from gpus.toml, against the measurements that they come from."""

import math
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import tiny
from conftest import ROOT, tiny_variants

from fixefficientnet import manifest
from fixefficientnet.cli import reproduce
from fixefficientnet.evaluation import cost
from fixefficientnet.reproduce import estimate, plan
from fixefficientnet.reproduce import recipe as recipes

pytestmark = pytest.mark.newest

RATES = estimate.rates()
H100 = {"b0": (320, 8258), "b2": (420, 2621), "b4": (512, 1124), "b5": (576, 821), "b7": (632, 397), "l2": (600, 124)}
"""Images/s of whole steps in bfloat16, by network and size: docs/finetuning.md, On a GPU."""
RTX_4090 = (
    ("b0", 224, 8541.64, 6.75),
    ("b3", 300, 2360.52, 23.83),
    ("b4", 380, 989.8, 49.49),
    ("b5", 456, 517.6, 98.86),
    ("b6", 528, 302.7, 167.39),
    ("b7", 600, 181.61, 289.94),
    ("b8", 672, 119.33, 442.89),
    ("l2", 475, 82.12, 609.89),
)
"""The same in timm's table, forward passes alone; and the millions of activations that it counts."""


@pytest.mark.parametrize(("network", "size", "rate", "millions"), RTX_4090[:3])
def test_activations_are_timms(network: str, size: int, rate: float, millions: float):
    (found,) = cost.activations(f"tf_efficientnet_{network}", [size]).values()
    assert found / 1e6 == pytest.approx(millions, rel=2e-3)


def assert_one_figure_tells(gpu: str, found: list[float], within: float) -> None:
    """A GPU's figure is the geometric mean of those measured, in 10^9 activations/s; none is far from it."""
    rate = RATES.gpus[gpu].activations
    assert rate == round(math.exp(sum(map(math.log, found)) / len(found)))
    assert max(found) / rate < within and rate / min(found) < within


def test_one_figure_tells_a_gpus_rates():
    counts = {network: cost.activations(f"tf_efficientnet_{network}", [size]) for network, (size, _) in H100.items()}
    assert_one_figure_tells("h100", [counts[key][size] * rate / 1e9 for key, (size, rate) in H100.items()], 1.22)
    assert_one_figure_tells("4090", [rate * millions / 1e3 for _, _, rate, millions in RTX_4090], 1.11)


def test_scaled_rates_are_by_memory_bandwidth():
    a100, h100, a10g = (RATES.gpus[name] for name in ("a100", "h100", "a10g"))
    assert a100.activations == round(h100.activations * a100.bandwidth / h100.bandwidth)
    rtx_3090 = (4521.51 * 10.88 + 3496.2 * 13.83) / 2 / 1e3
    assert a10g.activations == round(rtx_3090 * a10g.bandwidth / 936)


@pytest.mark.parametrize(("size", "milliseconds"), [(320, 8.2), (472, 12.11), (600, 18.2)])
def test_loading_rates_are_those_measured(size: int, milliseconds: float):
    assert 1e3 / RATES.loading.rate(size) == pytest.approx(milliseconds, rel=0.07)


def test_hours_are_those_of_what_is_slower():
    subject = recipes.subject_of_backbone("test_efficientnet.r160_in1k")
    small = {"epochs": 2, "batch_size": 100, "train_size": 64, "test_size": 96, "forward_batch": 100}
    planned = plan.plan(recipes.resolve(subject, small | {"mixed_precision": "bf16"}), images=(100_000, 5000))
    found = {workers: estimate.estimate(planned, "h100", workers) for workers in (2, 10**6)}
    gpu = RATES.gpus["h100"]
    activations = cost.activations("test_efficientnet", [64, 96])
    assert found[2].computed == pytest.approx(gpu.activations * 1e9 / activations[96])
    assert (found[2].limit, found[10**6].limit) == ("loading", "GPU")
    loading = 2 * 100_000 / RATES.loading.rate(96) + 3 * 5000 / RATES.loading.rate(96) + 5000 / RATES.loading.rate(64)
    assert found[2].hours == pytest.approx(loading / 2 / 3600)
    # evaluations are in float32: untuned at both sizes, between the epochs, tuned
    computing = 2 * 100_000 * activations[96] + (3 * 5000 * activations[96] + 5000 * activations[64]) / gpu.float32
    assert found[10**6].hours == pytest.approx(computing / gpu.activations / 1e9 / 3600)
    assert found[2].fits

    views = {"method": "cached", "views": 2, "statistics_images": 1000, "mixed_precision": "no"}
    cached = plan.plan(recipes.resolve(subject, small | views), images=(100_000, 5000), val_interval=0)
    slow, fast = (estimate.estimate(cached, "h100", workers) for workers in (1, 10**6))
    measured = (2 * 5000 * activations[96] + 5000 * activations[64]) / gpu.float32
    forwards = (1000 + 2 * 100_000) * activations[96] / gpu.float32
    assert fast.hours == pytest.approx((forwards + measured) / gpu.activations / 1e9 / 3600)
    loads = (101_000 + 2 * 5000) / RATES.loading.rate(96) + 5000 / RATES.loading.rate(64)
    assert slow.hours == pytest.approx(loads / 3600)  # an image is read once for all of its views


def test_every_gpu_can_be_chosen():
    hint = get_type_hints(reproduce.Estimate)["gpu"]
    assert set(get_args(get_args(hint)[0])) == set(RATES.gpus)


def test_plan_with_a_gpu_tells_hours_of_both_methods_in_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(manifest.OVERLAY_VARIABLE, tiny_variants(tmp_path, b0={}, b1={}))
    small = ["--plan", "--gpu", "a10g", "--batch-size", "8", "--epochs", "9000"]
    text, _ = tiny.cli("reproduce", "b0", "b1", *small, "-j", "1000000")
    assert max(map(len, text.splitlines())) <= 80
    header, *rows = [line.split() for line in text.splitlines() if line.strip() and "─" not in line][:4]
    assert " ".join(header) == "variant size computed/s loaded/s online, h cached, h memory"
    assert [row[:2] for row in rows[:2]] == [["b0", "48"], ["b1", "48"]] and rows[0][5] == rows[0][7] == "GPU"
    assert float(rows[0][4]) > 1 and float(rows[2][0]) == pytest.approx(2 * float(rows[0][4]), abs=0.11)
    assert "not measured: device-hours of one A10G, 24 GB, with 1000000 loading processes" in " ".join(text.split())
    text, _ = tiny.cli("reproduce", "b0", *small, "--method", "cached")
    assert "classifier.weight" in text and "cached, h" in text and "online, h" not in text
    text, _ = tiny.cli("reproduce", "b0", *small, "--tune", "bn", "-j", "0")  # which needs the online method
    assert "Not cached: " in text and "online, h" in text and "cached, h" not in text
    assert "with no loading processes on 1 core," in " ".join(text.split())
    assert "--gpu goes with --plan" in tiny.cli("reproduce", "b0", "--gpu", "4090", status=2)[1]


def test_docs_have_these_hours(monkeypatch: pytest.MonkeyPatch):
    """Of two variants: all 18 take a minute. The sums are those of the rows, but for rounding."""
    monkeypatch.setattr(plan, "_peak_memory", lambda *given: 0)  # slow, and not in the table
    page = (ROOT / "docs" / "finetuning.md").read_text()
    lines = page[page.index("## What it takes") :].splitlines()
    rows = {cells[0]: cells[1:] for line in lines if len(cells := line.strip("| ").split(" | ")) == 6}
    paper = [key for key, variant in manifest.load().items() if variant.paper]
    assert set(paper) < set(rows)
    sums = re.findall(r"[\d.]+(?= \|)", next(line for line in lines if "**all 18**" in line))
    for key in ("b0", "b4"):
        subject = recipes.subject_of_variant(manifest.find(key))
        resolved = [
            recipes.resolve(subject, {"method": one, "mixed_precision": "bf16"}) for one in ("online", "cached")
        ]
        online, cached = (estimate.estimate(plan.plan(recipe), "h100") for recipe in resolved)
        rates = [f"{online.computed:,.0f}", f"{online.loaded:,.0f}"]
        assert rows[key] == [str(online.plan.recipe.work_size), *rates, str(online), str(cached)]
    for column, total in zip((3, 4), sums, strict=True):
        assert float(total) == pytest.approx(sum(float(rows[key][column].split()[0]) for key in paper), abs=0.9)
