"""A model's mode while it only looks at images."""

import contextlib
import threading
from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import nn

_LOCK = threading.Lock()
_LOOKING: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""How many look at images with a model now."""
_TRAINING: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()
"""Its modules that were in train mode when the first of them began."""


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, all of a model is in eval mode; afterwards each module is as it was.

    timm's door leaves models in train mode, where a batch norm would even learn from the images it is shown. Of
    several that look at once (threads, generators), the last to end restores the mode.
    """
    with _LOCK:
        if not _LOOKING.get(model):
            _TRAINING[model] = [module for module in model.modules() if module.training]
        _LOOKING[model] = _LOOKING.get(model, 0) + 1
        for module in model.modules():
            module.training = False
    try:
        yield
    finally:
        with _LOCK:
            _LOOKING[model] -= 1
            if not _LOOKING[model]:
                for module in _TRAINING.pop(model):
                    module.training = True
