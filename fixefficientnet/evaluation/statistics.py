"""How sure a share, and a difference of two, can be."""

import math
from dataclasses import dataclass

from fixefficientnet.errors import DataError

_Z = 1.959963984540054  # the normal distribution's 97.5% point


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a share (Wilson's score interval), in per cent."""
    share, z2 = successes / trials, _Z**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # at the ends it is exact, which rounding must not spoil
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return 100 * low, 100 * high


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same images: how many of them both, either alone and neither classify correctly."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def images(self) -> int:
        """How many both models evaluated."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Top-1 of the second less that of the first, in points."""
        return 100 * (self.only_second - self.only_first) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of `difference`, in points: Newcombe's hybrid score interval for paired shares.

        R. G. Newcombe, Improved confidence intervals for the difference between binomial proportions based on
        paired data, Statistics in Medicine 17 (1998), method 10: the Wilson intervals of both shares, joined with
        the correlation of the two.
        """
        n, first, second = self.images, self.both + self.only_first, self.both + self.only_second
        cross: float = self.both * self.neither - self.only_first * self.only_second
        if cross > 0:
            cross = max(cross - n / 2, 0)  # Newcombe's continuity correction
        variances = first * (n - first) * second * (n - second)
        phi = cross / math.sqrt(variances) if variances else 0.0
        low_1, high_1 = (abs(bound - 100 * first / n) for bound in wilson(first, n))
        low_2, high_2 = (abs(bound - 100 * second / n) for bound in wilson(second, n))
        down = math.sqrt(max(0.0, low_2**2 - 2 * phi * low_2 * high_1 + high_1**2))
        up = math.sqrt(max(0.0, high_2**2 - 2 * phi * high_2 * low_1 + low_1**2))
        return self.difference - down, self.difference + up

    @property
    def p(self) -> float:
        """McNemar's exact test.

        The two-sided probability of a difference at least as large if neither model were better.
        """
        trials = self.only_first + self.only_second
        count = tail = 1  # of choices of k of the trials: for k = 0, and summed up
        for k in range(min(self.only_first, self.only_second)):
            count = count * (trials - k) // (k + 1)
            tail += count
        return min(1.0, 2 * tail / (1 << trials))

    def words(self) -> tuple[str, str, str]:
        """The difference, how sure it is, and what it comes from."""
        low, high = self.interval
        return (
            f"{self.difference:+.2f} points",
            f"top-1 (95%: {low:+.2f} to {high:+.2f}), p = {self.p:.2g}",
            f"correct in the first alone: {self.only_first:,}, in the second alone: {self.only_second:,}, "
            f"of {self.images:,} images (McNemar's exact test)",
        )


def compare(first: str, second: str) -> Comparison:
    """Compares `Evaluation.correct` of two evaluations; images that one of them did not evaluate do not count.

    Raises:
        DataError: They are not of the same number of images, or have none in common.
    """
    if len(first) != len(second):
        raise DataError(f"Evaluations of {len(first)} and of {len(second)} images cannot be paired.")
    pairs = list(zip(first, second, strict=True))
    counts = (pairs.count(pair) for pair in (("1", "1"), ("1", "0"), ("0", "1"), ("0", "0")))
    found = Comparison(*counts)
    if not found.images:
        raise DataError("There is no image that both evaluations evaluated.")
    return found
