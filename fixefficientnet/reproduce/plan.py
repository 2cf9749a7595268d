"""What a run would take, without running it: on torch's meta device, which computes shapes only."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from fixefficientnet._internal import compat
from fixefficientnet.data.dataset import open_dataset
from fixefficientnet.evaluation import cost
from fixefficientnet.reproduce import cached, network, online
from fixefficientnet.reproduce.chunks import StepNetwork
from fixefficientnet.reproduce.options import Data
from fixefficientnet.reproduce.recipe import Recipe

IMAGENET_IMAGES = (1_281_167, 50_000)
"""Training and validation images of ImageNet-2012."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The cost of a recipe.

    Attributes:
        recipe: The recipe.
        head: The norm and the classifier that were found, for people.
        images: Number of images to train on, and to measure on.
        moving: Number of values of each tensor that changes, by state-dict name; running statistics too.
        gradients: Number of values that gradients train.
        parameters: Number of parameters of the whole network.
        gmacs: Billions of multiply-adds of one image's forward pass, at the size that the stage works at.
        forwards: Number of images that go through the backbone to tune it.
        loads: Number of images that are read for that; fewer where an image has several views.
        passes: What such an image costs, in forward passes: 3 where the whole network learns.
        measured: Size of each evaluation of all images to measure on.
        total_gmacs: Billions of multiply-adds of the whole run: forward passes, backward passes of the base stage,
            evaluations.
        memory: Most bytes of tensors that live on a device at a time, in the recipe's precision; the allocator and
            the convolutions' workspaces come on top.
        feature_bytes: Size of the feature file (cached), in bytes.
    """

    recipe: Recipe
    head: str
    images: tuple[int, int]
    moving: dict[str, int]
    gradients: int
    parameters: int
    gmacs: float
    forwards: int
    loads: int
    passes: int
    measured: tuple[int, ...]
    total_gmacs: float
    memory: int
    feature_bytes: int

    @property
    def evaluations(self) -> int:
        """Number of images that go through the backbone to be measured."""
        return len(self.measured) * self.images[1]


def plan_runs(recipes: Sequence[Recipe], data: Data | None, devices: int = 1, val_interval: int = 1) -> list[Plan]:
    """Plans of several runs on the same images (None: ImageNet's numbers); the rest is as for `plan`.

    Raises:
        DataError: The images cannot be used.
    """
    images, num_classes = IMAGENET_IMAGES, 1000
    if data is not None:
        train, validation = (
            open_dataset(data.data, split, root=data.data_root, labels=labels, exclude=data.exclude)
            for split, labels in ((data.train_split, None), (data.val_split, data.labels))
        )
        images = len(train), len(validation)
        num_classes = 1000 if train.imagenet else len(train.classes) or 1000
    counts: dict[str, Any] = {"images": images, "num_classes": num_classes}
    return [plan(recipe, **counts, devices=devices, val_interval=val_interval) for recipe in recipes]


def plan(
    recipe: Recipe,
    *,
    images: tuple[int, int] = IMAGENET_IMAGES,
    num_classes: int = 1000,
    devices: int = 1,
    val_interval: int = 1,
) -> Plan:
    """Counts what a recipe takes, on so many images to train on and to measure on, by devices that share each batch.

    `val_interval` is the number of epochs between two validations; 0: none; the base stage validates after each.

    Raises:
        UnsupportedModelError: The network has no head that the recipe can tune, or cannot take one of its sizes.
        RecipeError: The batch cannot be shared out, or leaves a batch norm one value per channel.
    """
    train, validation = images
    work_size = recipe.work_size
    net = network.without_weights(recipe, num_classes)
    gmacs = cost.gmacs(recipe.backbone.partition(".")[0], {recipe.train_size, work_size}, num_classes)
    epoch_images = 1
    if recipe.method == "online":
        steps, size = online.steps_of_epoch(recipe, train, devices)
        epoch_images = size // devices
        forwards = loads = recipe.epochs * steps * size
        if epoch_images == 1:
            network.check_single_image(net)
    else:
        forwards = cached.forwards(net, train, recipe.views)
        loads = cached.forwards(net, train, 1)
    base = recipe.stage == "base"
    measured = [recipe.train_size] if base else [recipe.train_size, recipe.test_size, recipe.test_size]
    between = (recipe.epochs - 1) // val_interval if val_interval else 0
    if base:  # which keeps the best of all epochs
        between = recipe.epochs
    if recipe.method == "cached":  # on features of one pass
        between = min(between, 1) if recipe.trains_classifier else 0
    measured += [work_size] * between
    # a backward pass of the whole network costs about two forward passes: once for inputs, once for weights
    passes = 3 if base and recipe.tune == "all" else 1
    channels: int = net.classifier.weight.shape[1]  # type: ignore[assignment, index]
    stores = recipe.method == "cached" and recipe.trains_classifier
    return Plan(
        recipe=recipe,
        head=net.described,
        images=images,
        moving={name: tensor.numel() for name, tensor in net.moving.items()},
        gradients=sum(parameter.numel() for parameter in net.trained.values()),
        parameters=sum(parameter.numel() for parameter in net.model.parameters()),
        gmacs=gmacs[work_size],
        forwards=forwards,
        loads=loads,
        passes=passes,
        measured=tuple(measured),
        total_gmacs=forwards * passes * gmacs[work_size] + sum(validation * gmacs[size] for size in measured),
        memory=_peak_memory(net, epoch_images),
        feature_bytes=(cached.feature_bytes(recipe, train, channels) + 4 * channels * validation * between) * stores,
    )


def as_table(plans: Sequence[Plan]) -> list[list[str]]:
    """Header and one row per plan, for a terminal 80 columns wide."""
    header = ["variant", "method", "size", "epochs", "trained", "GMACs", "forwards", "memory", "EMACs"]
    rows = [
        [
            plan.recipe.variant,
            plan.recipe.method,
            str(plan.recipe.work_size),
            str(plan.recipe.epochs),
            _short(sum(plan.moving.values())),
            f"{plan.gmacs:.1f}",
            _short(plan.forwards),
            f"{plan.memory / 1e9:.1f} GB",
            f"{plan.total_gmacs / 1e9:.3f}",
        ]
        for plan in plans
    ]
    return [header, *rows]


def describe(plan: Plan) -> dict[str, str]:
    """One plan in full: label → text."""
    recipe = plan.recipe
    warmup = f", {recipe.warmup_epochs} of them of warm-up" if recipe.warmup_epochs else ""
    average = f", moving average with decay {recipe.model_ema_decay:g}" if recipe.model_ema_decay else ""
    decay = (
        "to 0 along half a cosine"
        if recipe.schedule == "cosine"
        else f"x {recipe.lr_decay:g} every {recipe.lr_decay_epochs} epochs"
    )
    moving = list(plan.moving.items())
    tensors = ", ".join(f"{name} ({count:,})" for name, count in moving[:8])
    if len(moving) > 8:
        tensors += f" and {len(moving) - 8} more"
    precision = "float32" if recipe.mixed_precision == "no" else recipe.mixed_precision
    described = {
        "variant": f"{recipe.variant} ({recipe.backbone})",
        "stage": f"{recipe.stage}, {recipe.method}, tune {recipe.tune}",
        "sizes": f"trained at {recipe.train_size}, tested at {recipe.test_size}, crop_pct {recipe.crop_pct:g}",
        "schedule": f"{recipe.epochs} epochs{warmup}, batch {recipe.batch_size}, learning rate "
        f"{recipe.full_learning_rate:g} "
        f"(8 x {recipe.base_lr:g} x {recipe.batch_size} / 512), {decay}",
        "optimizer": f"SGD, momentum {recipe.momentum:g}, weight decay {recipe.weight_decay:g}, "
        f"label smoothing {recipe.label_smoothing:g}{average}",
        "head": plan.head,
        "moves": tensors,
        "values": f"{sum(plan.moving.values()):,} change, {plan.gradients:,} of them by gradients; the network has "
        f"{plan.parameters:,} parameters",
        "forward": f"{plan.gmacs:.3f} GMACs per image at {recipe.work_size} pixels",
        "images": f"{plan.forwards:,} forward passes to tune, {plan.evaluations:,} to measure",
        "memory": f"about {plan.memory / 1e9:.2f} GB of tensors per device in {precision}, workspaces not counted",
    }
    if plan.feature_bytes:
        described["features"] = f"{plan.feature_bytes / 1e9:.2f} GB on disk"
    described["work"] = f"{plan.total_gmacs:,.0f} GMACs (10^9 multiply-adds) in all"
    return described


def _short(number: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f}{name}"
    return f"{number:.0f}"


class _LiveBytes:
    """Counts the bytes of all tensors it is shown that are alive, and their most; not those of a network's own."""

    def __init__(self, model: nn.Module) -> None:
        self.peak = 0
        self._alive: MutableMapping[Any, int] = WeakIdKeyDictionary()
        self._own: MutableMapping[Any, bool] = WeakIdKeyDictionary()
        for tensor in model.state_dict().values():
            self._own[tensor.untyped_storage()] = True

    def __call__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._own:
            self._alive[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self._alive.values()))


def _peak_memory(net: network.Network, step_images: int) -> int:
    """The tensors of the network itself, its average, its gradients and momentum, and its largest forward or step.

    Evaluations are in float32, with as many images at once, whatever the recipe's precision.
    """
    recipe = net.recipe
    fixed: int = sum(tensor.nbytes for tensor in net.model.state_dict().values())
    fixed *= 2 if recipe.model_ema_decay else 1
    fixed += 2 * sum(parameter.nbytes for parameter in net.trained.values())
    peaks = [_forward_peak(net, recipe.forward_batch)]
    if recipe.stage == "fixres" and recipe.mixed_precision != "no":
        _in_half_precision(net)
    if recipe.method == "cached":
        peaks.append(_forward_peak(net, recipe.forward_batch * recipe.views))
    else:
        peaks.append(_step_peak(net, step_images))
    return fixed + max(peaks)


def _forward_peak(net: network.Network, images: int) -> int:
    """Most bytes of a forward pass's own tensors."""
    live, size = _LiveBytes(net.model), net.recipe.work_size
    dtype = next(net.model.parameters()).dtype
    with compat.showing_results(live), torch.no_grad():
        net.model(torch.empty(images, 3, size, size, dtype=dtype, device="meta"))
    return live.peak


def _step_peak(net: network.Network, images: int) -> int:
    """Most bytes of a training step's own tensors."""
    step_network, chunk, size = StepNetwork(net), net.recipe.forward_batch, net.recipe.work_size
    net.train()
    live = _LiveBytes(net.model)
    with compat.showing_results(live), torch.set_grad_enabled(bool(net.trained)):
        pixels = torch.empty(images, 3, size, size, dtype=torch.uint8, device="meta")
        if step_network.in_chunks:
            one = step_network.entering_norm(pixels[:1])
            # all chunks take the same: two stand for them, beside the room for what the others give
            rest = one.new_empty((max(0, images - 2 * chunk), *one.shape[1:]))
            step_network.entering_norm(pixels[: 2 * chunk])
            del rest
            logits = step_network.head(one.new_empty((images, *one.shape[1:])))
        else:
            logits = step_network(pixels)
        if net.trained:
            loss = F.cross_entropy(logits, torch.zeros(images, dtype=torch.long, device="meta"))
            torch.autograd.grad(loss, list(net.trained.values()))
    net.model.eval()
    return live.peak


def _in_half_precision(net: network.Network) -> None:
    """Makes activations as large as autocast does, which the meta device lacks; the head stays in float32."""
    net.model.bfloat16()
    for module in filter(None, (net.norm, net.classifier)):
        module.float()
    for module in net.model.modules():
        if (weight := vars(module)["_parameters"].get("weight")) is not None:
            module.register_forward_pre_hook(lambda module, inputs, dtype=weight.dtype: (inputs[0].to(dtype),))
