"""Checkpoints as training scripts leave them: which weights are taken, and that nothing in them runs."""

import argparse
import collections
import contextlib
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import tiny
import torch
from conftest import Network, lively
from safetensors.torch import save_file

from fixefficientnet import load
from fixefficientnet.errors import CheckpointError

NETWORK = "test_efficientnet"
State = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def network() -> Network:
    return lively(timm.create_model(NETWORK, num_classes=3)).eval()


@pytest.fixture(scope="module")
def other() -> State:
    return timm.create_model(NETWORK, num_classes=3).state_dict()


def prefixed(state: State, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


class Hyperparameters(dict[str, Any]):
    """As Lightning's AttributeDict: a class that the reader does not have."""


KINDS: dict[str, tuple[Callable[[State, State], object], str]] = {
    "timm's train.py": (
        lambda state, other: {
            "epoch": 3,
            "arch": NETWORK,
            "state_dict": dict(other),
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(2.0)}}, "param_groups": []},
            "args": argparse.Namespace(model=NETWORK, lr=0.1),
            "state_dict_ema": dict(state),
        },
        "state_dict_ema",
    ),
    "Lightning": (
        lambda state, other: {
            "state_dict": {**prefixed(state, "model."), "criterion.weight": torch.ones(3)},
            "hyper_parameters": Hyperparameters(lr=0.1, folder=Path("images"), best=np.float64(0.5), all=np.ones(2)),
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        },
        "state_dict, names without model.",
    ),
    "compiled in DDP": (lambda state, other: prefixed(state, "module._orig_mod."), "names without module."),
    "compiled in parts": (
        lambda state, other: {name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in state.items()},
        "",
    ),
    "torch's AveragedModel": (
        lambda state, other: {
            "model": dict(other),
            "model_ema": {"n_averaged": torch.tensor(7), **prefixed(state, "module.")},
        },
        "model_ema, names without module.",
    ),
    "of equals the first": (
        lambda state, other: {"state_dict": dict(state), "schema": dict(other)},
        "state_dict",
    ),
    "nested": (lambda state, other: {"trainer": {"nets": {"student": {"state_dict": dict(state)}}}}, "trainer.nets"),
    "with remarks": (lambda state, other: {**state, "epoch": 3, "best": "yes"}, ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_its_weights_are_found_and_named(network: Network, other: State, tmp_path: Path, kind: str):
    make, said = KINDS[kind]
    torch.save(make(network.state_dict(), other), tmp_path / "last.ckpt")
    found = load(f"timm/{NETWORK}:{tmp_path / 'last.ckpt'}").network.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())
    image = tiny.mottle(tmp_path / "image.png", 1)
    _, err = tiny.cli("predict", image, "--model", f"timm/{NETWORK}:{tmp_path / 'last.ckpt'}")
    assert f"took {said}" in err if said else "took" not in err


def test_checkpoints_are_read_in_threads(network: Network, tmp_path: Path):
    torch.save({"state_dict": network.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "train.pth")
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(load, [f"timm/{NETWORK}:{tmp_path / 'train.pth'}"] * 24))
    weight = network.state_dict()["classifier.weight"]
    assert all(torch.equal(one.network.state_dict()["classifier.weight"], weight) for one in models)


def test_a_safetensors_file_has_prefixes_too(network: Network, tmp_path: Path):
    save_file(prefixed(network.state_dict(), "model."), tmp_path / "net.safetensors")
    found = load(f"timm/{NETWORK}:{tmp_path / 'net.safetensors'}").network.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())


class Trap:
    """Writes a file when unpickled by Python."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


class Caller:
    """Calls what it is given."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_of_it_runs(network: Network, tmp_path: Path, legacy: bool):
    ran = tmp_path / "ran"
    traps: list[Any] = [
        Trap(ran),
        Caller(eval, f"open({str(ran)!r}, 'w')"),
        Caller(collections.defaultdict, ran.touch),
    ]
    for trap in traps:
        torch.save(
            {"state_dict": network.state_dict(), "args": trap},
            tmp_path / "last.pth",
            _use_new_zipfile_serialization=not legacy,
        )
        with contextlib.suppress(CheckpointError):  # of what torch does not read even without running it
            load(f"timm/{NETWORK}:{tmp_path / 'last.pth'}")
        assert not ran.exists()
    assert pickle.loads(pickle.dumps(traps[0])) is None  # the trap is one
    assert ran.exists()


def test_names_that_do_not_fit_are_told(network: Network, tmp_path: Path):
    torch.save({"a.b": torch.ones(2), "c.d": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"has no classifier\.weight.* The names in it begin with a, c\."):
        load(f"timm/{NETWORK}:{tmp_path / 'other.pth'}")
    for content in (network, {"model": network, "epoch": 2}):
        torch.save(content, tmp_path / "whole.pth")
        with pytest.raises(CheckpointError, match=r"holds no state dict .* Save model\.state_dict\(\)"):
            load(f"timm/{NETWORK}:{tmp_path / 'whole.pth'}")
