"""The models that a page offers: those that the command line names, and what of the zoo lies on this machine."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fixefficientnet import hub, manifest
from fixefficientnet._internal.text import inert
from fixefficientnet.demo import photo
from fixefficientnet.demo.photo import Look, Sizes
from fixefficientnet.errors import OptionError
from fixefficientnet.evaluation.sweep import with_untuned
from fixefficientnet.models import LoadedModel, load
from fixefficientnet.preprocessing import ImageSource
from fixefficientnet.reproduce import report
from fixefficientnet.runtimes import engines

_KEPT = 3
"""Number of the zoo's models that stay loaded beside those of the command line."""


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a curve over test sizes.

    Attributes:
        size: Test size, in pixels.
        label: Name of the most probable class.
        probability: Its probability, in per cent.
        milliseconds: The least time of a forward pass so far.
    """

    size: int
    label: str
    probability: float
    milliseconds: float


class Offer:
    """The models of a page, opened by name; any other name is refused, whatever it names.

    Args:
        named: Models as `load` takes them. One that FixRes tuned brings the same one untuned, where that is known.

    Raises:
        FixEfficientNetError: As `load` raises.
    """

    def __init__(self, named: Sequence[str]):
        self._device = engines.device_for("eager", None)
        self._named = {inert(one.name): self._placed(one) for one in with_untuned(named)}
        zoo = [name for name in _zoo() if name not in self._named]
        self.names = (*self._named, *zoo)
        """All names, those of the command line first."""
        self._load = functools.lru_cache(maxsize=_KEPT)(lambda name: self._placed(load(name)))
        self._fastest: dict[tuple[str, int], float] = {}
        first, *others = dict.fromkeys(map(inert, named))
        untuned = self._named[first].untuned
        before = untuned if untuned in self._named else first
        self.sides = (first, others[0]) if others else (before, first)
        """The names of the two models that stand side by side at first."""
        pages = {inert(name): _report(name) for name in named}
        self.reports = {name: page for name, page in pages.items() if page or self._named[name].own_classes}
        """The page of each run of the command line, also None where it has classes of its own alone."""

    def __getitem__(self, name: object) -> LoadedModel:
        """Opens a model.

        Raises:
            OptionError: The name is none of `names`.
        """
        if name not in self.names:
            raise OptionError("There is no such model here: choose one of the list.")
        return self._named.get(str(name)) or self._load(str(name))

    def sizes_at_first(self) -> tuple[int, int]:
        """The two test sizes at first; of one network, or of it before and after FixRes: train size and test size."""
        left, right = map(self.__getitem__, self.sides)
        other = left is not right and right.untuned != left.name
        return left.test.size if other else left.train_size or left.test.size, right.test.size

    def look(self, name: object, image: ImageSource, size: int) -> Look:
        """As `photo.look`; its milliseconds are the least so far of this model and size, as what else runs adds some.

        Raises:
            OptionError: The name is none of `names`.
            FixEfficientNetError: As `photo.look` raises.
        """
        loaded = self[name]
        found = photo.look(loaded, image, size)
        key = loaded.name, size
        self._fastest[key] = min(found.milliseconds, self._fastest.get(key, found.milliseconds))
        return replace(found, milliseconds=self._fastest[key])

    def curve(self, name: object, image: ImageSource) -> list[Point]:
        """What a model makes of a photo at each size of its curve.

        Raises:
            FixEfficientNetError: As `look` raises.
        """
        found = ((size, self.look(name, image, size)) for size in Sizes.of(self[name]).curve)
        return [
            Point(size, one.labels[0].name, 100 * one.labels[0].probability, one.milliseconds) for size, one in found
        ]

    def about(self, name: object) -> str:
        """What a model is, in one line."""
        loaded = self[name]
        title = loaded.variant.title if loaded.variant else f"{loaded.num_classes} classes"
        tuned = f"tuned by FixRes for {loaded.test.size} pixels" if loaded.tuned else "not tuned by FixRes"
        trained = f", trained at {loaded.train_size} pixels" if loaded.train_size else ""
        return f"{title}{trained}, {tuned}"

    def compared(self, left: object, right: object) -> str:
        """What stands side by side, and plainly where no FixRes weights are."""
        one, other = self[left], self[right]
        if one is not other:
            return "Two models, each at its own size." if other.untuned != one.name else "Before FixRes, and after it."
        name, same = (
            inert(one.name),
            "both sides are the same network. Give each another size, or choose another model.",
        )
        if one.tuned:
            return f"{name} before FixRes is another run (name both on the command line): {same}"
        if one.variant is None:
            return f"FixRes has not tuned {name}: {same}"
        none = "has no FixRes weights" if one.variant.backbone_only else "is shown without FixRes weights"
        return f"{one.variant.key} {none}: {same}"

    def _placed(self, loaded: LoadedModel) -> LoadedModel:
        loaded.network.to(self._device)
        return loaded


def _zoo() -> Iterator[str]:
    """The names of the zoo's models that need no network."""
    for variant in manifest.load().values():
        if hub.is_here(variant.backbone):
            yield variant.key if variant.backbone_only else f"{variant.key}:backbone"


def _report(name: str) -> str | None:
    page = Path(name).expanduser() / report.PAGE
    return page.read_text(encoding="utf-8") if page.is_file() else None
