"""Intervals and tests against scipy's, against published figures, and against chance itself."""

import itertools
import math
import random

import numpy as np
import pytest
import scipy.stats

from fixefficientnet.errors import DataError
from fixefficientnet.evaluation.statistics import Comparison, compare, wilson


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


# --- pairs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 10, 40, 300, 3000])
def test_the_paired_probability_is_that_of_the_sign_test(length: int):
    generator = random.Random(length)
    for weights in ((1, 1, 0), (5, 1, 1), (1, 9, 3)):
        one, other = ("0" + "".join(generator.choices("01-", weights, k=length)) for _ in range(2))
        pairs = list(zip(one, other, strict=True))
        found = compare(one, other)
        assert found.only_first == sum(a == "1" and b == "0" for a, b in pairs)
        assert found.only_second == sum(a == "0" and b == "1" for a, b in pairs)
        assert found.both == sum(a == b == "1" for a, b in pairs)
        assert found.neither == sum(a == b == "0" for a, b in pairs)
        assert found.images == sum("-" not in pair for pair in pairs)
        discordant = found.only_first + found.only_second
        assert found.p == pytest.approx(
            scipy.stats.binomtest(found.only_first, discordant, 0.5).pvalue if discordant else 1, rel=1e-9
        )
        back = compare(other, one)
        assert (back.only_first, back.only_second, back.p) == (found.only_second, found.only_first, found.p)
        assert back.difference == -found.difference


def test_a_clear_difference_and_none_at_all():
    assert compare("1" * 5000, "0" * 5000).p == 0
    assert compare("1" * 5000, "0" * 5000).difference == -100
    assert compare("10-1", "10-1") == Comparison(both=2, only_first=0, only_second=0, neither=1)
    assert compare("10-1", "10-1").p == 1
    assert compare("1" * 20 + "-0", "0" * 20 + "01").p == pytest.approx(2 * (1 + 21) / 2**21)


def test_evaluations_of_different_data_sets_cannot_be_paired():
    with pytest.raises(DataError, match="of 3 and of 4 images"):
        compare("101", "1010")


def test_evaluations_without_a_image_in_common_cannot_be_paired():
    for one, other in (("1-", "-0"), ("--", "10"), ("", "")):
        with pytest.raises(DataError, match="no image that both"):
            compare(one, other)


# --- Newcombe's interval --------------------------------------------------------------------------------------


def method_10(e: int, f: int, g: int, h: int) -> tuple[float, float]:
    """Newcombe's formulas with his letters, the cells of the 2 x 2 table; for first less second."""
    n = e + f + g + h
    p1, p2 = (e + f) / n, (e + g) / n
    (l1, u1), (l2, u2) = (scipy.stats.binomtest(count, n).proportion_ci(method="wilson") for count in (e + f, e + g))
    a = (e + f) * (g + h) * (e + g) * (f + h)
    b = e * h - f * g
    c = b - n / 2 if b > n / 2 else 0 if b >= 0 else b
    phi = c / math.sqrt(a) if a else 0
    delta = math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    epsilon = math.sqrt((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2)
    return p1 - p2 - delta, p1 - p2 + epsilon


def test_the_papers_example():
    # Newcombe 1998, method 10
    found = Comparison(both=36, only_first=2, only_second=12, neither=0)
    assert found.difference == pytest.approx(20)
    assert found.interval == pytest.approx((5.69, 34.04), abs=0.005)


def test_the_interval_of_a_difference_is_newcombes():
    generator = random.Random(1)
    tables = [tuple(generator.randint(0, top) for _ in range(4)) for top in (3, 10, 100, 20_000) for _ in range(40)]
    for both, first, second, neither in tables:
        if both + first + second + neither:
            low, high = Comparison(both, first, second, neither).interval
            expected = method_10(both, second, first, neither)
            assert (low, high) == pytest.approx([100 * bound for bound in expected], abs=1e-9)


def test_all_small_tables():
    for counts in itertools.product(range(5), repeat=4):
        if not any(counts):
            continue
        found = Comparison(*counts)
        low, high = found.interval
        assert -100 - 1e-9 <= low <= found.difference + 1e-9
        assert found.difference - 1e-9 <= high <= 100 + 1e-9
        assert low < high  # so few images tell nothing for certain
        both, first, second, neither = counts
        assert Comparison(both, second, first, neither).interval == pytest.approx((-high, -low), abs=1e-9)
        assert 0 < found.p <= 1


@pytest.mark.parametrize(
    "table", [(0.70, 0.05, 0.12, 0.13), (0.40, 0.10, 0.10, 0.40), (0.93, 0.01, 0.05, 0.01)], ids=str
)
def test_it_covers_the_true_difference_as_often_as_it_says(table: tuple[float, float, float, float]):
    truth = 100 * (table[2] - table[1])
    draws = np.random.default_rng(0).multinomial(60, table, 2000).tolist()
    covered = sum(low <= truth <= high for low, high in (Comparison(*counts).interval for counts in draws))
    assert covered >= 0.93 * 2000
