"""A training step of the online method, on random weights and images."""

from collections.abc import Callable

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import fixefficientnet
from benchmarks.check.setting import TINY_NETWORK, Setting, under_autocast
from fixefficientnet.preprocessing import Preprocess
from fixefficientnet.reproduce import network
from fixefficientnet.reproduce import recipe as recipes
from fixefficientnet.reproduce.chunks import StepNetwork
from fixefficientnet.reproduce.recipe import Recipe

TINY = {"test_size": 64, "train_size": 32, "batch_size": 6, "forward_batch": 4}


def recipe_of(setting: Setting, key: str, precision: str) -> Recipe:
    """The online recipe of a variant, or a tiny one."""
    if setting.tiny:
        subject, small = recipes.subject_of_backbone(TINY_NETWORK), TINY
    else:
        subject, small = recipes.subject_of_variant(fixefficientnet.info(key)), {}
    # so that gradients pass the norm as well
    return recipes.resolve(subject, {"mixed_precision": precision, "tune": "all", **small})


class OnlineStep:
    """A network in training for a recipe, and a batch."""

    def __init__(self, setting: Setting, recipe: Recipe):
        self.recipe, self._device = recipe, setting.device
        torch.manual_seed(0)
        with torch.device(setting.device):
            model = timm.create_model(recipe.backbone.partition(".")[0])
            shape = recipe.batch_size, 3, recipe.test_size, recipe.test_size
            self.images = torch.randint(256, shape, dtype=torch.uint8)
            self.targets = torch.randint(1000, (recipe.batch_size,))
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.network = network.prepare(model.to(memory_format=torch.channels_last), recipe)
        self.in_chunks = StepNetwork(self.network)
        self.network.train()

    def whole(self, images: Tensor) -> Tensor:
        """Logits of a batch that goes through the network as one."""
        logits: Tensor = self.network.model(Preprocess.of(self.recipe.test).normalise(images))
        return logits

    def __call__(
        self, forward: Callable[[Tensor], Tensor], images: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Does a step, of the first `images` only if that is given; its logits, and its gradients by name."""
        with under_autocast(self._device, self.recipe.mixed_precision):
            logits = forward(self.images[:images]).float()
        loss = F.cross_entropy(logits, self.targets[:images])
        trained = self.network.trained
        gradients = torch.autograd.grad(loss, list(trained.values()))
        return logits.detach(), dict(zip(trained, gradients, strict=True))
