"""FixEfficientNet: the models, their FixRes weights, their preprocessing.

    import fixefficientnet
    model = fixefficientnet.create("b4_ns", pretrained=True)
    logits = model(model.preprocess("cat.jpg")[None])

Nothing here imports torch before a model or a transform is asked for.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from fixefficientnet._version import __version__

if sys.version_info < (3, 11):  # noqa: UP036 - pip looks at this, torch.hub does not
    raise ImportError(f"fixefficientnet {__version__} needs Python 3.11 or newer; this is {sys.version.split()[0]}.")

from fixefficientnet._internal import requirements
from fixefficientnet.errors import (
    CheckpointError,
    ChecksumError,
    DataError,
    DeltaError,
    DeltaFormatError,
    DeltaMismatchError,
    DownloadError,
    EvaluationError,
    FixEfficientNetError,
    ImageError,
    ManifestError,
    MissingFileError,
    OptionError,
    OutdatedPackageError,
    RecipeError,
    RunError,
    UnknownVariantError,
    UnsupportedModelError,
    WeightsNotPublishedError,
)
from fixefficientnet.manifest import Variant, list_models
from fixefficientnet.manifest import find as info
from fixefficientnet.timm_models import register_with_timm

if TYPE_CHECKING:
    from fixefficientnet.embedding import embed
    from fixefficientnet.evaluation.evaluate import evaluate
    from fixefficientnet.models import load
    from fixefficientnet.options import PredictionOptions
    from fixefficientnet.prediction import iter_predictions, predict
    from fixefficientnet.preprocessing import preprocess
    from fixefficientnet.zoo import create

__all__ = [
    "CheckpointError",
    "ChecksumError",
    "DataError",
    "DeltaError",
    "DeltaFormatError",
    "DeltaMismatchError",
    "DownloadError",
    "EvaluationError",
    "FixEfficientNetError",
    "ImageError",
    "ManifestError",
    "MissingFileError",
    "OptionError",
    "OutdatedPackageError",
    "PredictionOptions",
    "RecipeError",
    "RunError",
    "UnknownVariantError",
    "UnsupportedModelError",
    "Variant",
    "WeightsNotPublishedError",
    "create",
    "embed",
    "evaluate",
    "info",
    "iter_predictions",
    "list_models",
    "load",
    "predict",
    "preprocess",
]

_LAZY = {
    "PredictionOptions": "options",
    "create": "zoo",
    "embed": "embedding",
    "evaluate": "evaluation.evaluate",
    "iter_predictions": "prediction",
    "load": "models",
    "predict": "prediction",
    "preprocess": "preprocessing",
}
"""Public names whose modules are imported when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        requirements.need(*requirements.MODELS)
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_timm()
