"""A whole model as plain timm and transformers load it: one file, or a repository with its classes and preprocessing.

A repository has three files, as timm keeps its models on the Hub: config.json, model.safetensors and a card.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from timm.models import filter_pretrained_cfg
from torch import Tensor

from fixefficientnet._internal import records
from fixefficientnet._internal.files import beside, check_output, give_usual_rights, replacing
from fixefficientnet.errors import FixEfficientNetError, MissingFileError
from fixefficientnet.manifest import find, hub_url
from fixefficientnet.models import CONFIG, DELTA, DESCRIPTION, MODEL, Description, LoadedModel, load
from fixefficientnet.publishing import card
from fixefficientnet.reproduce.folder import RECIPE
from fixefficientnet.reproduce.report import Report

SUFFIXES = (".safetensors", ".pth")
"""Endings of a whole checkpoint."""
_OTHER_WEIGHTS = (".pt", ".bin", ".ckpt", ".tar")
"""Endings that no folder is meant to have, and that are not written."""
_OF_THE_SOURCE = ("license", "origin_url", "paper_name", "paper_ids", "tag", "label_names", "label_descriptions")
"""What a network's configuration tells of the weights that it was made for."""
_OF_THE_TEST = ("test_input_size", "test_crop_pct", "pool_size", "crop_mode")


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote.

    Attributes:
        loaded: The model.
        output: The file or folder that was written.
        folder: Whether it is a folder in the Hub's layout, with classes and preprocessing in its config.json.
    """

    loaded: LoadedModel
    output: Path
    folder: bool


def merge(
    model: str, output: Path, *, delta: str | None = None, license: str = "unknown", overwrite: bool = False
) -> MergeResult:
    """Makes one whole checkpoint of a model, named as `load` takes it, which plain timm loads.

    The output is `.safetensors` or `.pth`; another ending is that of a folder in the Hub's layout, which keeps its
    other files. Of a variant, the delta may be a path, the folder of a run, hf://… or "backbone"; None: the published
    weights, and "backbone" where the paper has none. The license (SPDX, lower case) is that of a network of one's own.

    Raises:
        UnknownVariantError: There is no such model, or `delta` is given for one that is no variant.
        FixEfficientNetError: The output has an ending that is not written, or is there; the weights cannot be loaded.
        OSError: The output cannot be written.
    """
    if output.suffix.lower() in (*SUFFIXES, *_OTHER_WEIGHTS):
        check_suffix(output, SUFFIXES)
    folder = output.suffix not in SUFFIXES
    check_output([output], overwrite, folder=folder)
    if (output / RECIPE).exists():
        raise FixEfficientNetError(f"{output} is the folder of a run, whose files stay. Choose another --output.")
    name = model
    if delta is not None:
        weights = Path(delta) / DELTA if Path(delta).is_dir() else delta
        name = f"{find(model).key}:{weights}"
    loaded = load(name)
    if folder:
        repository, report = f"ORGANISATION/{output.resolve().name}", report_of(model)
        with beside(output) as temporary:
            move(write_files(loaded, temporary, repository, license, report), output)
    else:
        save(loaded.network.state_dict(), output)
    return MergeResult(loaded, output, folder)


def report_of(name: str) -> Report | None:
    """The report of a run, if a model's name is that of its folder."""
    try:
        return Report.load(Path(name)) if Path(name).is_dir() else None
    except MissingFileError:
        return None


def check_suffix(output: Path, allowed: tuple[str, ...]) -> None:
    """Refuses a path with another ending than those allowed, by a FixEfficientNetError."""
    if output.suffix not in allowed:
        raise FixEfficientNetError(f"{output}: the ending of such a file is {' or '.join(allowed)}.")


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a whole state dict: `.safetensors`, or `.pth` for `torch.load`."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    written = io.BytesIO()  # both raise what they like where their own writing meets a full disk
    if path.suffix == ".safetensors":
        written.write(safetensors.torch.save(contiguous, metadata={"format": "pt"}))
    else:
        torch.save(contiguous, written)
    with replacing(path) as temporary:
        temporary.write_bytes(written.getbuffer())


def write_files(
    loaded: LoadedModel, folder: Path, repository: str, license: str, report: Report | None
) -> dict[str, Path]:
    """Writes a model as timm keeps it on the Hub, in an empty folder; in what timm reads is no trace of this package.

    Repository (ORGANISATION/NAME), license (of a network of one's own; SPDX, lower case; a variant has its backbone's)
    and the report of the run that made it are for the card. Gives the path of each file by its name, in the order to
    move them in: a folder without the last is no model's.
    """
    config = json.dumps(config_of(loaded), indent=2, ensure_ascii=False)
    files = {name: folder / name for name in (card.FILENAME, MODEL, CONFIG)}
    files[card.FILENAME].write_bytes(card.render_model(repository, loaded, license, report))
    save(loaded.network.state_dict(), files[MODEL])
    files[CONFIG].write_bytes(f"{config}\n".encode("utf-8", "replace"))
    return files


def move(files: Mapping[str, Path], folder: Path) -> None:
    """Moves files into a folder of the same file system, in their order; makes the folder if need be.

    Weights never lie beside another model's config.json: it goes first and comes last.
    """
    folder.mkdir(exist_ok=True)
    if MODEL in files:
        (folder / CONFIG).unlink(missing_ok=True)
    for name, file in files.items():
        give_usual_rights(file)
        file.replace(folder / name)


def config_of(loaded: LoadedModel) -> dict[str, Any]:
    """What timm's and transformers' loaders read of a model, in the layout of timm's config.json.

    What a run knows besides stands under a key of its own, which these do not read.
    """
    network, variant, test = cast(Any, loaded.network), loaded.variant, loaded.test
    described = filter_pretrained_cfg(network.pretrained_cfg, remove_source=True, remove_null=True)  # type: ignore[no-untyped-call]
    dropped = _OF_THE_TEST if variant else (*_OF_THE_SOURCE, *_OF_THE_TEST)
    described = {key: value for key, value in described.items() if key not in dropped}
    # all of it: some releases of timm complete what they are given, others take it as it is
    described |= {"architecture": loaded.architecture, "custom_load": False, "num_classes": loaded.num_classes}
    described |= {**test.timm_fields(), "crop_mode": loaded.crop_mode}
    if variant:
        described["tag"] = variant.backbone.tag
    if variant and (loaded.own_weights or not loaded.tuned):
        described["origin_url"] = hub_url(variant.backbone.repository)
    config = {"architecture": loaded.architecture, "num_classes": loaded.num_classes}
    config |= {"num_features": int(network.num_features), "pretrained_cfg": described}
    if loaded.own_classes:
        config["label_names"] = list(loaded.own_classes)
    if described_run := Description.of(loaded):
        config[DESCRIPTION] = records.to_json(described_run)
    return config
