"""A model in eval mode for a while."""

import contextlib
import threading
from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import nn

_LOCK = threading.Lock()
_USERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Number of callers that hold a model in eval mode now."""
_TRAINING: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()
"""Its modules that were in train mode when the first of them began."""


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, all of a model is in eval mode; afterwards each module is as it was.

    timm.create_model leaves models in train mode, where a batch norm would even learn from the images it is shown. Of
    several concurrent callers (threads, generators), the last to end restores the mode.
    """
    with _LOCK:
        if not _USERS.get(model):
            _TRAINING[model] = [module for module in model.modules() if module.training]
        _USERS[model] = _USERS.get(model, 0) + 1
        for module in model.modules():
            module.training = False
    try:
        yield
    finally:
        with _LOCK:
            _USERS[model] -= 1
            if not _USERS[model]:
                for module in _TRAINING.pop(model):
                    module.training = True
