"""The network of a run: where its weights come from, what is frozen, what changes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from fixefficientnet import delta, models, zoo
from fixefficientnet.delta import Head
from fixefficientnet.errors import RunError, UnsupportedModelError
from fixefficientnet.reproduce.recipe import Recipe, Subject


@dataclass(frozen=True)
class Network:
    """A network prepared for a recipe: the rest of it is frozen.

    Attributes:
        model: The whole network.
        head: Names of the classifier and of the last batch norm before pooling.
        norm: The last batch norm before pooling.
        classifier: The final linear layer.
        trained: Parameters that gradients change, by state-dict name.
        statistics: State-dict names of the running statistics that change.
    """

    model: nn.Module
    head: Head
    norm: nn.Module
    classifier: nn.Module
    trained: dict[str, nn.Parameter]
    statistics: tuple[str, ...]

    @property
    def moving(self) -> dict[str, Tensor]:
        """All tensors that the run changes, by state-dict name; looked up each time, as wrappers replace buffers."""
        buffers = {name: self.model.get_buffer(name) for name in self.statistics}
        return dict(sorted({**self.trained, **buffers}.items()))

    def train(self, recipe: Recipe) -> None:
        """Puts what moves in train mode; what is frozen stays in eval mode."""
        self.model.eval()
        if recipe.stage == "base" and recipe.tune == "all":
            self.model.train()
        elif recipe.stage == "fixres" and recipe.moves_statistics:
            self.norm.train()


@dataclass(frozen=True)
class TrainingState:
    """All that a step of training changes.

    Attributes:
        network: The network; its `moving` tensors change.
        optimizer: The optimizer; None where no gradient flows.
        scaler: The gradient scaler of fp16; None elsewhere.
    """

    network: Network
    optimizer: torch.optim.SGD | None
    scaler: Any = None


def load(subject: Subject, weights: str | Path, *, num_classes: int, seed: int) -> nn.Module:
    """Builds the network.

    Args:
        subject: The network to build.
        weights: "pretrained", "random", or a checkpoint file, as a training script saved it.
        num_classes: Number of classes; a classifier that comes with no weights for them starts at zero, so that
            training begins with equal probabilities. A checkpoint file decides the number itself.
        seed: Seed of what starts at random.

    Raises:
        MissingFileError: There is no such checkpoint.
        CheckpointError: It is no checkpoint of this network.
        RunError: timm's weights could not be had.
    """
    torch.manual_seed(seed)
    if isinstance(weights, Path):
        return models.from_checkpoint(_architecture(subject), weights)
    if weights == "random":
        return zoo.zero_classifier(timm.create_model(_architecture(subject), pretrained=False, num_classes=num_classes))
    if subject.variant:
        return zoo.create(subject.variant.key, "backbone", num_classes=num_classes)
    try:
        model = timm.create_model(subject.backbone, pretrained=True, num_classes=num_classes)
    except Exception as error:  # timm and huggingface_hub raise a dozen kinds
        raise RunError(
            f"The weights of {subject.backbone} could not be had: {error}\n"
            "Give a file of them with --checkpoint, or start the base stage from random ones with --no-pretrained."
        ) from error
    kept = cast("dict[str, Any]", model.pretrained_cfg)["num_classes"] == num_classes
    return model if kept else zoo.zero_classifier(model)


def prepare(model: nn.Module, recipe: Recipe) -> Network:
    """Freezes what the recipe does not change.

    Raises:
        UnsupportedModelError: The network has no classifier, or no batch norm before its pooling.
    """
    if getattr(model, "training", False):
        model.eval()
    head = delta.find_head(model)
    modules = dict(model.named_modules())
    norm, classifier = modules[head.norm], modules[head.classifier]
    model.requires_grad_(False)
    names: list[str] = []
    if recipe.stage == "base" and recipe.tune == "all":
        names = [name for name, _ in model.named_parameters()]
        statistics = [name for name, _ in model.named_buffers() if name.endswith((".running_mean", ".running_var"))]
    else:
        if recipe.trains_classifier:
            names += [f"{head.classifier}.{name}" for name, _ in classifier.named_parameters()]
        if recipe.method == "online" and recipe.tune in ("all", "bn") and recipe.stage == "fixres":
            names += [f"{head.norm}.{name}" for name, _ in norm.named_parameters()]
        moves = recipe.stage == "fixres" and recipe.moves_statistics
        statistics = [f"{head.norm}.{name}" for name in ("running_mean", "running_var") if moves]
    if statistics and norm.running_mean is None:
        raise UnsupportedModelError(f"{type(model).__name__}: its {head.norm} keeps no running statistics.")
    parameters = dict(model.named_parameters())
    trained = {name: parameters[name] for name in sorted(names)}
    for parameter in trained.values():
        parameter.requires_grad_()
    if recipe.stage == "fixres" and recipe.mixed_precision != "no":
        _in_float32(norm)
        _in_float32(classifier)
    return Network(model, head, norm, classifier, trained, tuple(statistics))


def optimizer_of(network: Network, recipe: Recipe) -> torch.optim.SGD:
    """SGD over the trained parameters; the training loop sets its learning rate before each step."""
    return torch.optim.SGD(network.trained.values(), lr=0.0, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def compile_frozen(network: Network) -> None:
    """Compiles what lies before the head, in the largest parts that hold nothing of it.

    The head is not compiled: hooks on it take features and statistics, and a compiled module does not see hooks that
    are registered later.
    """

    def go(module: nn.Module) -> None:
        if network.norm in (parts := set(module.modules())) or network.classifier in parts:
            for child in module.children():
                go(child)
        elif len(parts) > 1:
            module.compile()

    go(network.model)


def _architecture(subject: Subject) -> str:
    return subject.backbone.partition(".")[0]


def _in_float32(module: nn.Module) -> None:
    """Keeps a module out of autocast: the frozen part may run in half precision, what trains may not."""
    forward = cast("Callable[[Tensor], Any]", module.forward)

    def in_float32(inputs: Tensor) -> Any:
        with torch.autocast(inputs.device.type, enabled=False):
            return forward(inputs.float())

    module.forward = in_float32
