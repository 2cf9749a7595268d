"""What a run takes besides its recipe: each field is a flag of the command line. Imports no torch."""

from dataclasses import dataclass

from fixefficientnet._internal.records import Count, Fraction, NotNegative, Positive
from fixefficientnet.options import Checked


@dataclass(frozen=True)
class Data:
    """The images of a run.

    Attributes:
        data: A folder with train/ and val/, one folder per class in each, or with the classes' folders alone, of which
            a fifth of the images validates; or hfds/NAME, torch/NAME, wds/NAME.
        labels: File that tells the classes of the validation images, where these lie in one folder.
        exclude: Images to leave out: a glob pattern, or a text file of paths; may be repeated.
        data_root: Folder that a named dataset lies or is cached in, such as wds/ shards.
        train_split: Split to train on.
        val_split: Split to measure on.
    """

    data: str
    labels: str | None = None
    exclude: tuple[str, ...] = ()
    data_root: str | None = None
    train_split: str = "train"
    val_split: str = "validation"


@dataclass(frozen=True)
class Options(Checked):
    """What does not decide the result of a run.

    Attributes:
        workers: Loading processes per device. Default: the usable cores, shared among the processes.
        compile: Compile the frozen part with torch.compile.
        auto_batch: Halve the batch when memory runs out.
        overwrite: Delete what an earlier run left in the folder.
        no_check_base: Tune a variant also where its untuned network is not as accurate as timm publishes it.
        max_unreadable: Tolerated share of images that cannot be read.
        val_interval: Epochs between two validations while training; 0: none. The base stage validates after each epoch.
        checkpoint_steps: Steps between two checkpoints.
        checkpoint_minutes: Longest time between two checkpoints, in minutes.
    """

    workers: Count | None = None
    compile: bool = False
    auto_batch: bool = False
    overwrite: bool = False
    no_check_base: bool = False
    max_unreadable: Fraction = 0.01
    val_interval: Count = 1
    checkpoint_steps: Positive = 1000
    checkpoint_minutes: NotNegative = 10.0
