"""The hours that a plan takes on a known GPU: what it computes, and what its cores can load for it.

The rates are those of gpus.toml, which says where each comes from.
"""

import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fixefficientnet._internal import records
from fixefficientnet._internal.records import AboveZero, Share
from fixefficientnet.errors import RecipeError
from fixefficientnet.evaluation import cost
from fixefficientnet.reproduce.plan import Plan

WORKERS = 16
"""Loading processes per device, each with a core, where none are chosen."""
HEADER = ("variant", "size", "computed/s", "loaded/s", "online, h", "cached, h", "memory")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's row in gpus.toml.

    Attributes:
        title: Its name, for people.
        memory: Its memory, in GB.
        bandwidth: Bandwidth of its memory, in GB/s.
        activations: Activations that it computes, in 10^9 per second, in half precision.
        float32: Share of that rate in float32.
    """

    title: str
    memory: AboveZero
    bandwidth: AboveZero
    activations: AboveZero
    float32: Share


@dataclass(frozen=True, slots=True)
class Loading:
    """What one image costs a core that loads it.

    Attributes:
        milliseconds: Time that does not depend on the test size.
        nanoseconds_per_pixel: Time per pixel at the test size.
    """

    milliseconds: AboveZero
    nanoseconds_per_pixel: AboveZero

    def rate(self, size: int) -> float:
        """Images/s of one core."""
        return 1 / (self.milliseconds / 1e3 + self.nanoseconds_per_pixel / 1e9 * size**2)


@dataclass(frozen=True, slots=True)
class Rates:
    """The file gpus.toml: the GPUs by name, and what loading costs."""

    gpus: Mapping[str, Gpu]
    loading: Loading


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan takes on a GPU.

    Attributes:
        plan: The plan.
        gpu: The GPU.
        computed: Images/s that it computes forward at the size that the stage works at.
        loaded: Images/s that its loading processes bring at that size.
        hours: Device-hours in all: tuning and evaluations, each at the rate of what is slower.
        limit: What most of the tuning waits for.
    """

    plan: Plan
    gpu: Gpu
    computed: float
    loaded: float
    hours: float
    limit: Literal["GPU", "loading"]

    @property
    def fits(self) -> bool:
        """Whether the tensors fit the GPU's memory."""
        return self.plan.memory < self.gpu.memory * 1e9

    def __str__(self) -> str:
        """The hours, and what limits them."""
        return f"{self.hours:,.1f} {self.limit}"


@functools.cache
def rates() -> Rates:
    """Reads gpus.toml."""
    document = tomllib.loads(Path(__file__).with_name("gpus.toml").read_text(encoding="utf-8"))
    return records.read(Rates, document, "gpus.toml", RecipeError)


def estimate(plan: Plan, name: str, workers: int = WORKERS) -> Estimate:
    """The hours that a plan takes on a GPU of gpus.toml.

    Each of the loading processes per device has a core of its own; without them (0), the device waits for one core.
    """
    known, recipe, (_, validation) = rates(), plan.recipe, plan.images
    gpu, work_size = known.gpus[name], recipe.work_size
    activations = cost.activations(recipe.backbone.partition(".")[0], {work_size, *plan.measured})

    def computed(size: int, *, half: bool) -> float:
        return gpu.activations * (1.0 if half else gpu.float32) * 1e9 / activations[size]

    def loaded(size: int) -> float:
        return max(1, workers) * known.loading.rate(size)

    rate = computed(work_size, half=recipe.mixed_precision != "no")
    computing, loading = plan.forwards * plan.passes / rate, plan.loads / loaded(work_size)
    # evaluations are in float32, whatever the frozen part is in
    measuring = [validation / min(computed(size, half=False), loaded(size)) for size in plan.measured]
    seconds = max(computing, loading) + sum(measuring)
    limit: Literal["GPU", "loading"] = "GPU" if computing >= loading else "loading"
    return Estimate(plan, gpu, rate, loaded(work_size), seconds / 3600, limit)


def as_table(by_method: Mapping[str, Sequence[Estimate]]) -> list[list[str]]:
    """Header, one row per variant and the sum, for a terminal 80 columns wide.

    Each method ("online", "cached") has estimates of the same variants in the same order.
    """
    header = [title for title in HEADER if title.partition(",")[0] in by_method or ", h" not in title]
    rows = []
    for group in zip(*by_method.values(), strict=True):
        first, recipe = group[0], group[0].plan.recipe
        most = max(one.plan.memory for one in group)
        memory = f"{most / 1e9:.1f} GB" + ("" if all(one.fits for one in group) else " !")
        speeds = f"{first.computed:,.0f}", f"{first.loaded:,.0f}"
        rows.append([recipe.variant, str(recipe.work_size), *speeds, *map(str, group), memory])
    sums = [f"{sum(one.hours for one in estimates):,.1f} in all" for estimates in by_method.values()]
    return [header, *rows, ["", "", "", "", *sums, ""]]
