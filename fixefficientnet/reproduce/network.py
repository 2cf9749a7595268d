"""The network of a run: where its weights come from, at which size, what is frozen, what changes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fixefficientnet import delta, models, zoo
from fixefficientnet._internal import input_size, meta_device
from fixefficientnet.delta import Head
from fixefficientnet.errors import RecipeError, RunError, UnsupportedModelError
from fixefficientnet.reproduce.recipe import Recipe, Subject


@dataclass(frozen=True)
class Network:
    """A network prepared for a recipe: the rest of it is frozen.

    Attributes:
        recipe: The recipe that it is prepared for, or another one for the same parts of it.
        model: The whole network.
        head: Names of the classifier and of the last norm before it.
        norm: The last norm before the classifier; None where there is none.
        classifier: The final linear layer.
        trained: Parameters that gradients change, by state-dict name.
        statistics: State-dict names of the running statistics that change.
    """

    recipe: Recipe
    model: nn.Module
    head: Head
    norm: nn.Module | None
    classifier: nn.Module
    trained: dict[str, nn.Parameter]
    statistics: tuple[str, ...]

    @property
    def moving(self) -> dict[str, Tensor]:
        """All tensors that the run changes, by state-dict name; looked up each time, as wrappers replace buffers."""
        buffers = {name: self.model.get_buffer(name) for name in self.statistics}
        return dict(sorted({**self.trained, **buffers}.items()))

    @property
    def described(self) -> str:
        """The head that was found, for people."""
        classifier = f"{self.head.classifier} ({type(self.classifier).__name__})"
        if self.norm is None:
            return f"{classifier} alone, as there is no norm"
        keeps = "" if _keeps_statistics(self.norm) else ", no statistics"
        return f"{self.head.norm} ({type(self.norm).__name__}{keeps}) and {classifier}"

    def train(self) -> None:
        """Puts what moves in train mode; what is frozen stays in eval mode."""
        self.model.eval()
        if self.recipe.stage == "base" and self.recipe.tune == "all":
            self.model.train()
        elif self.norm and self.statistics:
            self.norm.train()


@dataclass
class Best:
    """The weights of the highest validation accuracy so far; of equals, the earliest.

    Attributes:
        epoch: Number of epochs that were finished then; 0: nothing was validated yet.
        top1: That accuracy, in per cent.
        tensors: The weights, by state-dict name, on the CPU.
        latest: The last accuracy that was offered; None: there was none, as the logits were not finite.
    """

    epoch: int = 0
    top1: float = -1.0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    latest: float | None = None

    def offer(self, epoch: int, top1: float | None, tensors: Mapping[str, Tensor]) -> None:
        """Takes weights over if they are better than all before."""
        self.latest = top1
        if top1 is not None and top1 > self.top1:
            self.epoch, self.top1, self.tensors = epoch, top1, copied(tensors)

    @torch.no_grad()
    def put_into(self, network: Network) -> None:
        """Gives a network the best weights, if there are any."""
        for name, tensor in network.moving.items() if self.tensors else ():
            tensor.copy_(self.tensors[name])


@dataclass(frozen=True)
class TrainingState:
    """All that a step of training changes.

    Attributes:
        network: The network; its `moving` tensors change.
        optimizer: The optimizer; None where no gradient flows.
        scaler: The gradient scaler of fp16; None elsewhere.
        average: The moving average of the network; None where none is kept.
        best: The best weights so far; None where validation does not decide which are kept.
    """

    network: Network
    optimizer: torch.optim.SGD | None
    scaler: Any = None
    average: ModelEmaV3 | None = None
    best: Best | None = None

    @property
    def averaged(self) -> dict[str, Tensor]:
        """The tensors of the average that the run changes, by state-dict name; none without one."""
        tensors = self.average.module.state_dict() if self.average else {}
        return {name: tensors[name] for name in self.network.moving} if tensors else {}

    @property
    def validated(self) -> nn.Module:
        """The network whose accuracy counts: the average, where one is kept."""
        return self.average.module if self.average else self.network.model

    @property
    def result(self) -> dict[str, Tensor]:
        """The tensors of the validated network that the run changes, by state-dict name."""
        return self.averaged or self.network.moving


def load(subject: Subject, weights: str | Path, *, num_classes: int, seed: int, size: int) -> nn.Module:
    """Builds the network with weights ("pretrained", "random" or a checkpoint file), at the size that these are for.

    A classifier that comes with no weights for these classes starts at zero, so that training begins with equal
    probabilities; a checkpoint file decides their number itself. The size, in pixels, is that of random weights, and of
    a checkpoint that does not tell its own.

    Raises:
        MissingFileError: There is no such checkpoint.
        CheckpointError: It is no checkpoint of this network.
        RunError: timm's weights could not be had.
    """
    torch.manual_seed(seed)
    architecture = subject.backbone.partition(".")[0]
    if isinstance(weights, Path):
        described = models.Description.load(weights)
        return models.from_checkpoint(architecture, weights, described.size if described else size)
    if weights == "random":
        kwargs = input_size.arguments(architecture, size)
        model = timm.create_model(architecture, pretrained=False, num_classes=num_classes, **kwargs)
        return zoo.zero_classifier(model)
    if subject.variant:
        return zoo.create(subject.variant.key, "backbone", num_classes=num_classes)
    try:
        models.bring_timms(subject.backbone)
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
        UnsupportedModelError: The network has no classifier, or several, or nothing of what the recipe tunes.
    """
    if getattr(model, "training", False):
        model.eval()
    head = delta.find_head(model)
    modules = dict(model.named_modules())
    norm, classifier = modules[head.norm] if head.norm else None, modules[head.classifier]
    model.requires_grad_(False)
    names: list[str] = []
    if recipe.stage == "base" and recipe.tune == "all":
        names = [name for name, _ in model.named_parameters()]
        statistics = [name for name, _ in model.named_buffers() if name.endswith((".running_mean", ".running_var"))]
    else:
        if recipe.trains_classifier:
            names += [f"{head.classifier}.{name}" for name, _ in classifier.named_parameters()]
        if norm and recipe.method == "online" and recipe.tune in ("all", "bn") and recipe.stage == "fixres":
            names += [f"{head.norm}.{name}" for name, _ in norm.named_parameters()]
        moves = recipe.stage == "fixres" and recipe.moves_statistics and norm and _keeps_statistics(norm)
        statistics = [f"{head.norm}.{name}" for name in ("running_mean", "running_var") if moves]
    if not names and not statistics:
        lacks = f"its norm, {head.norm}, keeps no statistics" if norm else "it has no norm"
        raise UnsupportedModelError(
            f"{recipe.backbone}: {lacks}, so tune {recipe.tune} has nothing to change. Take --tune classifier."
        )
    if recipe.sync_bn and not (norm and _keeps_statistics(norm)):
        raise RecipeError(f"sync_bn synchronises a batch norm's statistics, and {recipe.backbone} keeps none.")
    parameters = dict(model.named_parameters())
    trained = {name: parameters[name] for name in sorted(names)}
    for parameter in trained.values():
        parameter.requires_grad_()
    if recipe.stage == "fixres" and recipe.mixed_precision != "no":
        for module in filter(None, (norm, classifier)):
            _in_float32(module)
    return Network(recipe, model, head, norm, classifier, trained, tuple(statistics))


def without_weights(recipe: Recipe, num_classes: int) -> Network:
    """The network of a recipe on the meta device, which has shapes and no values, for the size of its stage.

    Raises:
        UnsupportedModelError: It has no head that the recipe can tune, or cannot take the size.
    """
    architecture, size = recipe.backbone.partition(".")[0], recipe.work_size
    with input_size.explained(architecture, size):
        kwargs = input_size.arguments(architecture, size)
        model = meta_device.without_weights(architecture, num_classes=num_classes, **kwargs)
    with torch.device("meta"):
        found = prepare(model, replace(recipe, mixed_precision="no"))  # the meta device has no autocast
    return replace(found, recipe=recipe)


def check_single_image(network: Network) -> None:
    """Refuses, by a RecipeError, a step of one image that leaves a batch norm in train mode one value per channel."""
    recipe = network.recipe
    network.train()
    try:
        network.model(torch.empty(1, 3, recipe.work_size, recipe.work_size, device="meta"))
    except ValueError as error:  # torch's own words for it
        raise RecipeError(
            f"One image per step and process, at {recipe.work_size} pixels, leaves a batch norm of {recipe.backbone} "
            "one value per channel, which has no variance: take a larger --batch-size or size"
            + (", or --method cached." if recipe.stage == "fixres" else ".")
        ) from error
    network.model.eval()


def average_of(network: Network) -> ModelEmaV3 | None:
    """timm's moving average of the network, before it is wrapped; None where the recipe has none."""
    decay = network.recipe.model_ema_decay
    return ModelEmaV3(network.model, decay=decay, use_warmup=True) if decay else None


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors on the CPU, by name."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def optimizer_of(network: Network) -> torch.optim.SGD:
    """SGD over the trained parameters; the training loop sets its learning rate before each step."""
    momentum, decay = network.recipe.momentum, network.recipe.weight_decay
    return torch.optim.SGD(network.trained.values(), lr=0.0, momentum=momentum, weight_decay=decay)


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


def _keeps_statistics(norm: nn.Module) -> bool:
    """Whether a norm has running statistics, as batch norm does; layer norm and group norm have none."""
    return getattr(norm, "running_mean", None) is not None


def _in_float32(module: nn.Module) -> None:
    """Keeps a module out of autocast: the frozen part may run in half precision, what trains may not."""
    forward = cast("Callable[[Tensor], Any]", module.forward)

    def in_float32(inputs: Tensor) -> Any:
        with torch.autocast(inputs.device.type, enabled=False):
            return forward(inputs.float())

    module.forward = in_float32
