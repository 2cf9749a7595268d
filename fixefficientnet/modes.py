"""A model's mode while it only looks at pictures."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, all of a model is in eval mode; afterwards each module is as it was.

    timm's door leaves models in train mode, where a batch norm would even learn from the pictures it is shown.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
