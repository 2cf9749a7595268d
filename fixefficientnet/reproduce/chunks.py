"""A training step's forward pass whose memory hardly grows with the batch: the frozen part sees a few images at a time.

The head sees the whole batch, as the norm's statistics are those of the batch.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from fixefficientnet.preprocessing import Preprocess
from fixefficientnet.reproduce.network import Network


class StepNetwork(nn.Module):
    """The network as a training step runs it.

    Where the head norm's output is what the network's `forward_features` returns, as in EfficientNets, the frozen part
    before it runs in chunks without gradients. Elsewhere (ResNets add a shortcut behind the norm), and in the base
    stage, the whole network sees the whole batch.

    Wrappers, such as DDP and Accelerate's autocast, go around this module, and leave the network itself as it is.
    """

    def __init__(self, network: Network):
        """Takes a network in eval mode."""
        super().__init__()
        self.model, recipe = network.model, network.recipe
        self._normalise = Preprocess.of(recipe.test).normalise
        self._chunk = recipe.forward_batch
        in_chunks = recipe.stage == "fixres" and _ends_features(network, recipe.work_size)
        self._norm = network.norm if in_chunks else None

    @property
    def in_chunks(self) -> bool:
        """Whether the frozen part runs in chunks."""
        return self._norm is not None

    def forward(self, pixels: Tensor) -> Tensor:
        """Gives the logits, [n, classes], of a batch of images, uint8 [n, 3, S, S]."""
        if self.in_chunks:
            return self.head(self.entering_norm(pixels))
        logits: Tensor = self.model(self._normalise(pixels))
        return logits

    def head(self, entering: Tensor) -> Tensor:
        """The logits of what the norm is given; where the frozen part runs in chunks."""
        assert self._norm
        logits: Tensor = cast(Any, self.model).forward_head(self._norm(entering))
        return logits

    @torch.no_grad()
    def entering_norm(self, pixels: Tensor) -> Tensor:
        """What the norm is given for a batch, [n, channels, h, w], or [n, positions, channels]."""
        assert self._norm
        whole: Tensor | None = None
        for start in range(0, len(pixels), self._chunk):
            part = self._normalise(pixels[start : start + self._chunk])
            with _passing_through(self._norm):
                entering = cast(Any, self.model).forward_features(part)
            if whole is None:
                layout = torch.channels_last if entering.dim() == 4 else torch.contiguous_format
                shape = len(pixels), *entering.shape[1:]
                whole = torch.empty(shape, dtype=entering.dtype, device=entering.device, memory_format=layout)
            whole[start : start + len(part)] = entering
        assert whole is not None
        return whole


@contextlib.contextmanager
def _passing_through(norm: nn.Module) -> Iterator[None]:
    """Within, a norm gives what it is given, and counts nothing."""
    forward, own = norm.forward, "forward" in vars(norm)
    norm.forward = lambda inputs: inputs
    try:
        yield
    finally:
        if own:
            norm.forward = forward
        else:
            del norm.forward


@torch.no_grad()
def _ends_features(network: Network, size: int) -> bool:
    """Whether the head of a network is given what its norm gives, and that alone."""
    norm, model = network.norm, cast(Any, network.model)
    if norm is None or not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        return False
    given: list[Any] = []
    some = next(model.parameters())
    image = torch.zeros(1, 3, size, size, dtype=some.dtype, device=some.device)
    hook = norm.register_forward_hook(lambda module, inputs, output: given.append(output))
    try:
        features = model.forward_features(image)
    finally:
        hook.remove()
    return len(given) == 1 and given[0] is features
