"""The plan's arithmetic, against passes that are counted as they run."""

import weakref

import pytest
import timm
import torch
from conftest import Network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fixefficientnet
from fixefficientnet.preprocessing import Preprocess
from fixefficientnet.reproduce import plan
from fixefficientnet.reproduce import recipe as recipes
from fixefficientnet.reproduce.recipe import Recipe

PAPER = [key for key, variant in fixefficientnet.manifest.load().items() if variant.paper]


def recipe_of(name: str, **choices: object) -> Recipe:
    if name in fixefficientnet.list_models():
        subject = recipes.subject_of_variant(fixefficientnet.info(name))
    else:
        subject = recipes.subject_of_backbone(name)
    return recipes.resolve(subject, choices)


def counted_macs(model: nn.Module, inputs: Tensor) -> int:
    """Multiply-adds of all convolutions and linear layers, from the shapes that a real forward pass sees."""
    total = 0

    def count(module: nn.Conv2d | nn.Linear, given: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal total
        per_output = module.weight[0].numel()  # input channels of a group x kernel height x width
        total += result.numel() * per_output

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", ["lite0", "test_efficientnet.r160_in1k", "resnet18.a1_in1k"])
def test_gmacs_are_those_of_a_real_forward_pass(name: str):
    for size in (64, 96):
        found = plan.plan(recipe_of(name, test_size=size, train_size=64, batch_size=2, forward_batch=2))
        model = timm.create_model(found.recipe.backbone.partition(".")[0]).eval()
        assert found.gmacs * 1e9 == pytest.approx(counted_macs(model, torch.rand(1, 3, size, size)), rel=1e-6)
        assert found.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("key", ["b0", "b4", "b7", "b8", "l2"])
def test_what_moves_is_the_head(key: str):
    # bytes of classifier and bn2 in float32, as published checkpoints of these networks have them
    megabytes = {"b0": 5.1, "b4": 7.2, "b7": 10.3, "b8": 11.3, "l2": 22.1}
    found = plan.plan(recipe_of(key, batch_size=8, forward_batch=1, tune="all"))
    assert set(found.moving) == {f"bn2.{name}" for name in ("weight", "bias", "running_mean", "running_var")} | {
        "classifier.weight",
        "classifier.bias",
    }
    assert sum(found.moving.values()) * 4 / 1e6 == pytest.approx(megabytes[key], abs=0.06)
    statistics = found.moving["bn2.running_mean"] + found.moving["bn2.running_var"]
    assert found.gradients == sum(found.moving.values()) - statistics


def test_images_and_work():
    images = (1000, 100)
    small = {"test_size": 64, "train_size": 32, "batch_size": 96, "forward_batch": 2}
    name = "test_efficientnet.r160_in1k"
    online = plan.plan(recipe_of(name, **small, epochs=3), images=images, num_classes=7)
    model: Network = timm.create_model("test_efficientnet", num_classes=7).eval()
    macs = {size: counted_macs(model, torch.rand(1, 3, size, size)) / 1e9 for size in (32, 64)}
    assert online.forwards == 3 * 10 * 96  # whole batches only
    assert online.evaluations == 500  # twice between epochs
    assert online.total_gmacs == pytest.approx(2880 * macs[64] + 100 * macs[32] + 400 * macs[64])
    assert online.measured == (32, 64, 64, 64, 64)
    assert online.feature_bytes == 0

    cached = plan.plan(recipe_of(name, **small, method="cached", views=3), images=images, num_classes=7)
    assert (cached.forwards, cached.loads) == (1000 + 3 * 1000, 2 * 1000)
    # float16; and one view of the validation images in float32
    assert cached.feature_bytes == 1000 * 3 * model.num_features * 2 + 100 * model.num_features * 4
    never = plan.plan(recipe_of(name, **small, method="cached"), images=images, num_classes=7, val_interval=0)
    assert (never.feature_bytes, never.evaluations) == (1000 * model.num_features * 2, 300)
    part = {"method": "cached", "statistics_images": 100, "tune": "bn-stats"}
    assert plan.plan(recipe_of(name, **small, **part), images=images, num_classes=7).forwards == 100

    base = plan.plan(recipe_of(name, **small, stage="base", epochs=2), images=images, num_classes=7)
    # backward: twice the forward; each epoch is validated, and the best one evaluated
    assert base.total_gmacs == pytest.approx((2 * 10 * 96 * 3 + 300) * macs[32])
    averaged = plan.plan(recipe_of(name, **small, stage="base", model_ema_decay=0.9), images=images, num_classes=7)
    assert averaged.memory - base.memory == sum(tensor.nbytes for tensor in model.state_dict().values())


class Peak(TorchDispatchMode):
    """Bytes of the tensors that real operations make, until they are freed."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [result] if isinstance(result, Tensor) else [t for t in result or () if isinstance(t, Tensor)]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if not hasattr(storage, "counted"):
                storage.counted = True  # type: ignore[attr-defined]
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def free(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize(
    ("stage", "tune", "part"), [("base", "all", 8), ("fixres", "all", 8), ("fixres", "fixres", 8), ("fixres", "all", 2)]
)
def test_memory_is_that_of_a_real_step(stage: str, tune: str, part: int):
    sizes = {"test_size": 96, "train_size": 96, "batch_size": 8, "forward_batch": part}
    found = plan.plan(recipe_of("test_efficientnet.r160_in1k", stage=stage, tune=tune, **sizes), images=(80, 8))
    model: Network = timm.create_model("test_efficientnet").eval()
    if stage == "base":
        model.train()
    else:
        model.requires_grad_(False)
        model.bn2.train()
        for module in (model.bn2, model.classifier) if tune == "all" else (model.classifier,):
            module.requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = nn.Sequential(model.conv_stem, model.bn1, model.blocks, model.conv_head)

    normalise = Preprocess.of(found.recipe.test).normalise

    def forward(images: Tensor) -> Tensor:
        if stage == "base":
            return model(normalise(images))
        with torch.no_grad():
            entering = torch.empty(8, model.conv_head.out_channels, 3, 3)
            for start in range(0, 8, part):
                chunk = normalise(images[start : start + part])
                entering[start : start + part] = frozen(chunk)
        return model.forward_head(model.bn2(entering))

    weights = [tensor.untyped_storage() for tensor in model.state_dict().values()]
    for storage in weights:  # which are counted on their own
        storage.counted = True
    with Peak() as peak:
        loss = nn.functional.cross_entropy(
            forward(torch.zeros(8, 3, 96, 96, dtype=torch.uint8)), torch.zeros(8, dtype=torch.long)
        )
        torch.autograd.grad(loss, trained)
    fixed = sum(tensor.nbytes for tensor in model.state_dict().values()) + 2 * sum(t.nbytes for t in trained)
    assert found.memory == pytest.approx(fixed + peak.peak, rel=0.05)


@pytest.mark.newest
@pytest.mark.parametrize("key", ["b8", "l2"])
def test_the_largest_variants_fit_24_gb(key: str):
    whole, half = (plan.plan(recipe_of(key, mixed_precision=precision)) for precision in ("no", "bf16"))
    assert whole.recipe.batch_size >= 256
    assert whole.memory < 20e9  # workspaces and the allocator come on top
    assert half.memory <= whole.memory


def test_what_is_measured_in_float32_counts_in_half_precision_too():
    recipes = [recipe_of("b2", method="cached", mixed_precision=precision) for precision in ("no", "bf16")]
    whole, half = (plan.plan(recipe).memory for recipe in recipes)
    assert half == whole  # the largest forward pass is that of an evaluation


def test_memory_hardly_grows_with_the_batch():
    small, large = (plan.plan(recipe_of("b2", batch_size=size)).memory for size in (32, 512))
    per_image = 3 * 420 * 420 * 4 + 3 * 1408 * 14 * 14 * 4  # the image; what enters and leaves the norm, activated
    assert large - small < 480 * per_image
