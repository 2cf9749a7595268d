"""Everything this package raises on bad input: one base class, one class per kind of error.

Each message says what is wrong, where, and what to do next; the command line prints it as it is.
"""

import os
import re
import signal

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY|_PAT\b", re.IGNORECASE)
"""What the names of variables have in them whose values nobody may see."""


def redacted(text: str) -> str:
    """A text without secrets: passwords in addresses, tokens of the Hub, values of variables such as HF_TOKEN."""
    text = re.sub(r"(?<=://)[^\s/]+@|(?<=:/)[^\s/:@]+:[^\s/]+@", "...@", text)  # as a path, it has one slash
    text = re.sub(
        r"(?<=[?&])([\w-]*(?:token|signature|key|secret)[\w-]*)=[^\s&#'\"]+", r"\1=...", text, flags=re.IGNORECASE
    )
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_...", text)
    secrets = [value for name, value in os.environ.items() if _SECRET.search(name) and len(value) > 7]
    for value in sorted(secrets, key=len, reverse=True):  # one may begin with another
        text = text.replace(value, "...")
    return text


class FixEfficientNetError(Exception):
    """Base of all errors of this package; no message of theirs has a secret in it."""

    def __str__(self) -> str:
        return redacted(super().__str__())


class OutdatedPackageError(FixEfficientNetError, ImportError):
    """An installed package is too old; names what was found, what is needed, and pip's command."""


class OptionError(FixEfficientNetError, ValueError):
    """An option has a value that it cannot have; names the option and what it takes."""


class ManifestError(FixEfficientNetError, ValueError):
    """The manifest, or an overlay on it, is malformed; names the row and the key."""


class UnknownVariantError(FixEfficientNetError, LookupError):
    """No variant has this name; names the closest ones."""


class WeightsNotPublishedError(FixEfficientNetError, LookupError):
    """The variant has no published FixRes weights; names what works instead."""


class DownloadError(FixEfficientNetError, OSError):
    """A file could not be had from the Hub or from a package; names the file and where it belongs."""


class ChecksumError(FixEfficientNetError, ValueError):
    """A file's hash is not the pinned one, or not the one that the Hub tells; names both."""


class MissingFileError(FixEfficientNetError, FileNotFoundError):
    """A file that the user named is not there."""


class CheckpointError(FixEfficientNetError, ValueError):
    """A checkpoint file cannot be read as the weights of this model."""


class DeltaError(FixEfficientNetError, ValueError):
    """Base of what can be wrong with a FixRes delta."""


class DeltaFormatError(DeltaError):
    """The file is no sound delta: truncated, malformed, changed, of another version, or with unusable values."""


class DeltaMismatchError(DeltaError):
    """A sound delta, but not for this model: another variant, another backbone, other tensors or shapes."""


class PublishError(FixEfficientNetError, ValueError):
    """A run cannot be published, or not there; says whether anything was."""


class UnsupportedModelError(FixEfficientNetError, ValueError):
    """FixRes cannot tune this model so: no classifier, or several; no norm of that kind; a size that it cannot take."""


class ImageError(FixEfficientNetError, ValueError):
    """An image cannot be opened or is too large; names it."""


class DataError(FixEfficientNetError, ValueError):
    """A dataset cannot be used: not there, no classes, other classes than the model's, unreadable images."""


class EvaluationError(FixEfficientNetError, RuntimeError):
    """A model cannot be evaluated: NaN, a size that it does not take, weights that cannot be had."""


class NotFiniteError(EvaluationError):
    """A model's logits are NaN or infinite."""


class ExportError(FixEfficientNetError, RuntimeError):
    """A model cannot be exported, or the exported file disagrees with it."""


class RecipeError(FixEfficientNetError, ValueError):
    """A fine-tuning recipe has an unknown key, or a value that cannot be."""


class RunError(FixEfficientNetError, RuntimeError):
    """A fine-tuning run cannot start, continue or finish; what was done is kept."""


class Interrupted(Exception):  # noqa: N818 - no error: the same call continues
    """A fine-tuning run was asked to stop by a signal (`number`), and has saved what it had."""

    def __init__(self, number: int):
        super().__init__(f"Stopped by {signal.Signals(number).name}.")
        self.number = number
