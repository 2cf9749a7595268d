"""Images/s of the forward pass alone of all 18 variants at their test sizes, with random weights.

Variants of one network and size are one row. In batches of the recipe's `forward_batch`, as a run has them, and of four
times that.
"""

from collections.abc import Iterator

import timm
import torch

import fixefficientnet
from benchmarks import machine
from benchmarks.check.setting import TINY_NETWORK, Setting, case, under_autocast
from benchmarks.machine import Row
from fixefficientnet.reproduce import recipe as recipes
from fixefficientnet.reproduce.recipe import Recipe

LONG_ENOUGH = 0.3
"""Seconds of forward passes to measure."""
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def rows(setting: Setting) -> Iterator[Row]:
    for keys, recipe in networks(setting):
        for precision in ("no", "bf16"):
            names = {"variants": ", ".join(keys), "size": recipe.test_size, "batch": recipe.forward_batch}
            yield case(
                {**names, "precision": precision},
                lambda: rates(setting, recipe, precision, larger=True),  # noqa: B023
            )


def networks(setting: Setting) -> Iterator[tuple[list[str], Recipe]]:
    """The networks to measure: the variants that each serves, and a recipe; the fast ones first."""
    if setting.tiny:
        small = {"test_size": 64, "forward_batch": 2}
        yield ["tiny"], recipes.resolve(recipes.subject_of_backbone(TINY_NETWORK), small)
        return
    found: dict[tuple[str, int], list[str]] = {}
    for key, variant in fixefficientnet.manifest.load().items():
        if variant.paper:
            found.setdefault((variant.backbone.name.partition(".")[0], variant.test.size), []).append(key)
    for _, keys in sorted(found.items()):
        yield keys, recipes.resolve(recipes.subject_of_variant(fixefficientnet.info(keys[0])), {})


def rates(setting: Setting, recipe: Recipe, precision: str, *, larger: bool) -> Row:
    """Images/s in each layout; `larger`: in larger batches too, in the better layout of the two."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = timm.create_model(recipe.backbone.partition(".")[0]).eval()
    found = {name: _rate(setting, model, recipe, precision, name) for name in LAYOUTS}
    if larger:
        best = max(found, key=found.__getitem__)
        times = 4
        found[f"{times} times the batch"] = _rate(setting, model, recipe, precision, best, times)
    return found


@torch.inference_mode()
def _rate(
    setting: Setting, model: torch.nn.Module, recipe: Recipe, precision: str, layout: str, times: int = 1
) -> float:
    batch, size = times * recipe.forward_batch, recipe.test_size
    images = torch.rand(batch, 3, size, size, device=setting.device).contiguous(memory_format=LAYOUTS[layout])
    model.to(memory_format=LAYOUTS[layout])

    long_enough = 0.0 if setting.tiny else LONG_ENOUGH

    def seconds(passes: int) -> float:
        start = machine.settled(setting.device)
        for _ in range(passes):
            model(images)
        return machine.settled(setting.device) - start

    with under_autocast(setting.device, precision):
        seconds(2)  # loads the kernels
        passes = max(1, min(100, int(long_enough / seconds(1))))
        return passes * batch / seconds(passes)
