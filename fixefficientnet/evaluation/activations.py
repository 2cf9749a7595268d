"""How the pooled activations are distributed: the FixRes paper's own diagnosis of the train-test discrepancy.

At a larger test size than it was trained at, objects look larger to a network and its pooled activations average over
more positions: they become less sparse and less spread, and the classifier has never seen the like (FixRes paper,
section 3.2 and figure 3).
"""

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fixefficientnet import delta

NEAR_ZERO = 1e-3
"""Of smaller magnitude than this an activation counts as none; networks without ReLU have no exact zeros."""
_QUARTILES = {"q25": 0.25, "median": 0.5, "q75": 0.75}


class PooledActivations:
    """What comes into a model's classifier, which `delta.find_classifier` finds."""

    def __init__(self, model: nn.Module):
        self._classifier = model.get_submodule(delta.find_classifier(model))
        self._sums: Tensor | None = None  # float64 [3, channels]: values, squares, near zero
        self._images = 0

    def watched(self) -> RemovableHandle:
        """A context in which forward passes count."""
        return self._classifier.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pooled = inputs[0].detach().flatten(1).to("cpu", torch.float64)
        sums = torch.stack([pooled.sum(0), pooled.square().sum(0), (pooled.abs() < NEAR_ZERO).double().sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._images += len(pooled)

    def summary(self) -> dict[str, float]:
        """The figures over all processes' images, as JSON values.

        `near_zero`: share of near-zero activations, in [0, 1]; `mean`: of all; `mean_q25`, `mean_median`, `mean_q75`:
        quartiles over the channels of each one's mean; `spread_*`: of each one's standard deviation over the images.
        """
        from accelerate.utils import gather_object

        parts = gather_object([(self._sums, self._images)])
        sums = torch.stack([part for part, _ in parts if part is not None]).sum(0)
        values, squares, near_zero = sums / sum(images for _, images in parts)
        spread = (squares - values.square()).clamp(min=0).sqrt()
        found = {"near_zero": float(near_zero.mean()), "mean": float(values.mean())}
        for name, channels in (("mean", values), ("spread", spread)):
            found |= {f"{name}_{key}": float(channels.quantile(share)) for key, share in _QUARTILES.items()}
        return found
