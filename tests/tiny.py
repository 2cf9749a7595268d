"""A small dataset for tests; and the commands, in this process and in others that start without importing anew."""

import contextlib
import importlib
import io
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import numpy as np
from huggingface_hub import constants, file_download
from PIL import Image

CLASSES = ("apple", "brick", "cloud")
NETWORK = ["--backbone", "test_efficientnet.r160_in1k"]
REPRODUCE, FIXEFFICIENTNET = "fixefficientnet.reproduce.__main__", "fixefficientnet.cli"
"""Modules of the two commands."""
PRELOADED = (
    "torch",
    "timm",
    "accelerate",
    "fixefficientnet.reproduce.run",
    "fixefficientnet.evaluation.evaluate",
    "fixefficientnet.cli",
    "torch.utils.tensorboard",
    "torchmetrics.classification",
    "fixefficientnet.evaluation.figures",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "scipy.stats",
)
"""What the commands import when they begin, or at their end."""


def draw(path: Path, label: int, seed: int) -> None:
    """An image whose colour tells its class, with noise on it."""
    generator = np.random.default_rng([label, seed])
    height, width = generator.integers(40, 90, 2)
    pixels = generator.integers(0, 160, (height, width, 3))
    pixels[..., label % 3] += 90
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)


def mottle(path: Path, *seed: int) -> Path:
    """A small image of coloured blocks, like no other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((30, 36), Image.Resampling.NEAREST).save(path)
    return path


def make_data(folder: Path, classes: tuple[str, ...] = CLASSES, train: int = 10, val: int = 6) -> Path:
    for label, name in enumerate(classes):
        for index in range(train):
            draw(folder / "train" / name / f"{index}.jpg", label, index)
        for index in range(val):
            draw(folder / "val" / name / f"{index}.jpg", label, 1000 + index)
    return folder


def forget_accelerate() -> None:
    """Removes what Accelerate keeps of a process, as if it were a new one."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


def cli(*arguments: object, status: int = 0, columns: int = 80) -> tuple[str, str]:
    """Runs `fixefficientnet` in this process; what it said on stdout and stderr."""
    from fixefficientnet.cli import main
    from fixefficientnet.cli.app import out as console

    forget_accelerate()
    console.width = columns  # the environment's COLUMNS decides it but once
    out, err, ended = io.TextIOWrapper(io.BytesIO(), "utf-8", newline=""), io.StringIO(), None  # strict, as a pipe is
    with (
        mock.patch.object(sys, "argv", ["fixefficientnet", *map(str, arguments)]),
        mock.patch.dict(os.environ, COLUMNS=str(columns), NO_COLOR="1"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exit_:
            ended = exit_.code or 0
        finally:
            forget_accelerate()  # the command would have ended its process
    assert ended == status, err.getvalue()
    out.flush()
    return out.buffer.getvalue().decode(), err.getvalue()


def hub_settings(endpoint: str) -> list[tuple[object, str, str]]:
    """What makes huggingface_hub ask another Hub than the one that the environment named when it was imported."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    template = endpoint + template[template.index("/{") :]
    found: list[tuple[object, str, str]] = [(constants, "ENDPOINT", endpoint)]
    # the second has been looked up already before huggingface_hub 1.0
    return found + [(where, "HUGGINGFACE_CO_URL_TEMPLATE", template) for where in (constants, file_download)]


def _command(module: str, arguments: list[str], environment: dict[str, str], said: str) -> None:
    os.environ.update(environment)
    if "HF_HUB_CACHE" in environment:  # huggingface_hub read it when it was imported, before this process began
        constants.HF_HUB_CACHE = environment["HF_HUB_CACHE"]
    if "HF_ENDPOINT" in environment:
        for where, name, value in hub_settings(environment["HF_ENDPOINT"]):
            setattr(where, name, value)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    multiprocessing.set_start_method("fork", force=True)  # else loading processes would import everything anew
    import torch

    stalled = environment.get("STALLED")  # a file that is waited for, for ever

    def wait(event: str, given: tuple[object, ...]) -> None:
        if stalled and event == "open" and given[0] == stalled:
            time.sleep(3600)

    sys.addaudithook(wait)
    torch.set_num_threads(int(environment.get("THREADS", "1")))
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()


def start(arguments: list[str], said: Path, *, command: str = REPRODUCE, **environment: str) -> BaseProcess:
    """Starts a command in a process that has the imports done; its output goes to the file `said`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=_command, args=(command, arguments, environment, str(said)))
    with mock.patch.dict(os.environ):  # the first one starts a server, which must keep nothing of one test
        for name in ("FIXEFFICIENTNET_MANIFEST", "HF_TOKEN"):
            os.environ.pop(name, None)
        process.start()
    return process


def run(
    arguments: list[str], said: Path, *, status: int | None = 0, command: str = REPRODUCE, **environment: str
) -> str:
    """Runs a command to its end; what it said since it started."""
    before = said.stat().st_size if said.exists() else 0
    process = start(arguments, said, command=command, **environment)
    process.join(240)
    text = said.read_text()[before:]
    assert process.exitcode is not None, f"still running: {text}"
    assert status is None or process.exitcode == status, f"status {process.exitcode}: {text}"
    return text


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_two(arguments: list[str], said: Path, *, command: str = REPRODUCE, **environment: str) -> list[BaseProcess]:
    """Starts a command as two processes of one run, as torchrun does; each says what it says in its own file."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [
        start(
            arguments,
            said.with_name(f"{said.name}.{rank}"),
            command=command,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **shared,
            **environment,
        )
        for rank in range(2)
    ]
