"""Every command of every page: the command line takes it, and it runs where that takes no GPU, no network, no hours."""

import argparse
import contextlib
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from unittest import mock

import campaign.command
import pytest
import timm
import tiny
import torch
from conftest import ROOT, lively, put_in_cache, tiny_variants, tuned_delta
from cyclopts import MissingArgumentError
from hub_standin import TOKEN, Hub
from huggingface_hub import constants

import fixefficientnet
from fixefficientnet._internal import requirements

pytestmark = pytest.mark.newest

Command = list[str]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ONLY_PARSED = {
    r"^python -m venv|^pip |^pytest|^pre-commit|^ruff |^mypy|^lint-imports|^shellcheck": ".ci/run does these",
    r"^hatchling |^twine ": "test_package.py",
    r"^sha256sum ": "of what the command before it writes",
    r"^torchrun |^accelerate ": "several processes: test_launchers.py starts them",
    r"^python -m benchmarks": "minutes to hours, and images that are not here: test_benchmarks.py",
    r"^python -m tests.campaign": "hours: test_campaign.py",
    r"caltech101-half|imagenet-sample": "images that are not here",
    r"reproduce \*_ns|--all --data": "many networks: test_series.py",
    r"--all --plan": "minutes, for the largest networks: test_estimate.py",
    r"^fixefficientnet demo": "serves until it is ended: test_demo_server.py",
    r"^python examples/serve.py|^curl ": "serves until it is ended: test_serving.py",
    r"\.pte$|aotinductor": "minutes, or packages that are not everywhere: test_export.py",
    r"--mixed-precision bf16": "not every processor has it: test_engines.py",
    r"photos|runs/flowers": "test_your_own_images.py runs these",
    r"^python -c": "needs the shell's variables: test_publishing.py",
}
"""What is not run, by a regular expression on the command, and why."""
BACKBONE = "b2:backbone"
NAMES = {
    "^/imagenet$": "IMAGES",
    "^PHOTOS$": "new-photos",
    "^b4$": BACKBONE,
    r"resnet50\.a1_in1k": "test_efficientnet.r160_in1k",
}
"""What stands for the pages' names (regular expressions) when a command runs."""
MORE = {
    "reproduce": ["--train-size", "32", "--epochs", "6", "--batch-size", "4", "-j", "0", "--overwrite"],
    "sweep": ["--sizes", "32,48", "-j", "0"],
    "evaluate": ["-j", "0"],
    "export": ["--max-drop", "100"],  # the images are noise
}
"""Options, given after a command's own, that keep it short."""
WITHOUT_OPTIONS = ("benchmarks.figures", "benchmarks.finetune_runs")
_SHELL = """
exec 3> commands
command_not_found_handle() { printf '%s\\0' "$@" >&3; printf '\\n' >&3; }
cd() { :; }
source() { :; }
"""
"""Has a shell write down each command, with its variables, loops and quotes resolved, in the place of running it."""


def commands(page: Path, folder: Path) -> list[Command]:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S)
    text = re.sub(r"\.venv/bin/|^\.ci/run.*$", "", "\n".join(blocks), flags=re.M)
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run(
        [bash, "-c", _SHELL + text], cwd=folder, env={"PATH": "/nowhere"}, capture_output=True, text=True
    )
    assert done.stderr == "", f"{page.name}: {done.stderr}"
    return [line.split("\0")[:-1] for line in (folder / "commands").read_text().splitlines()]


def as_installed(command: Command) -> Command:
    """A command by the name that pip gives it."""
    match command:
        case ["python", "-m", "fixefficientnet", *arguments]:
            return ["fixefficientnet", *arguments]
        case ["python", "-m", "fixefficientnet.reproduce", *arguments]:
            return ["fixefficientnet", "reproduce", *arguments]
    return command


@contextlib.contextmanager
def parsing_only() -> Iterator[None]:
    """Ends a program once its arguments are read, by argparse."""
    parse = argparse.ArgumentParser.parse_args

    def read(*given: object) -> None:
        parse(*given)  # type: ignore[call-overload]
        raise StopIteration

    with mock.patch.object(argparse.ArgumentParser, "parse_args", read), contextlib.suppress(StopIteration):
        yield
        raise AssertionError("no arguments were read")


def check(command: Command) -> None:
    """Has the program read its arguments.

    Raises:
        Exception: It does not take them.
    """
    from fixefficientnet.cli import app

    match as_installed(command):
        case ["fixefficientnet", *arguments]:
            app.parse_args(arguments, exit_on_error=False, print_error=False)
        case ["torchrun", *arguments]:
            from torch.distributed.run import get_args_parser

            launched = get_args_parser().parse_args(arguments)
            assert launched.module
            check(["python", "-m", launched.training_script, *launched.training_script_args])
        case ["accelerate", "launch", *arguments]:
            from accelerate.commands.launch import launch_command_parser

            launched = launch_command_parser().parse_args(arguments)
            assert launched.module
            check(["python", "-m", launched.training_script, *launched.training_script_args])
        case ["python", "-m", module, *arguments] if module.startswith("benchmarks"):
            found = importlib.import_module("benchmarks.__main__" if module == "benchmarks" else module)
            if module not in WITHOUT_OPTIONS:
                with mock.patch.object(sys, "argv", [module, *arguments]), parsing_only():
                    found.main()
        case ["python", "-m", "tests.campaign", *arguments]:
            with mock.patch.object(sys, "argv", ["campaign", *arguments]), parsing_only():
                campaign.command.main()
        case ["python", "-c", code]:
            compile(code, "-c", "exec")
        case ["pip", "install", *arguments]:
            for extra in re.findall(r"[\w]+", "".join(re.findall(r"\[(.*)\]", arguments[-1]))):
                assert extra in requirements.extras()
        case ["pytest", *files]:
            assert all((ROOT / file).exists() for file in files if file.endswith(".py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_command_line_takes_what_the_pages_say(page: Path, tmp_path: Path):
    for command in commands(page, tmp_path):
        try:
            check(command)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page.name}: {' '.join(command)}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_within_sentences_have_no_wrong_option(page: Path):
    for text in re.findall(
        r"`(fixefficientnet [^`]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    ):
        with contextlib.suppress(MissingArgumentError):  # most are named without what they need
            check(shlex.split(text))


def test_nothing_is_listed_in_vain(tmp_path: Path):
    said = [" ".join(command) for page in PAGES for command in commands(page, tmp_path)]
    for pattern in ONLY_PARSED:
        assert any(re.search(pattern, command) for command in said), pattern
    assert len(said) > 80


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with what the pages' commands name, and a manifest whose b2 and b4_ns are tiny networks in its hub/."""
    folder = tmp_path_factory.mktemp("prepared")
    cache = folder / "hub"
    overlay = tiny_variants(cache, b2={}, b4_ns={})
    torch.manual_seed(9)
    network = lively(timm.create_model("test_efficientnet"))
    put_in_cache(cache, "timm/test_efficientnet.r160_in1k", "model.safetensors", network.state_dict())
    tiny.make_data(folder / "IMAGES", ("n01440764", "n02124075", "n07920052"), train=4, val=2)
    tiny.make_data(folder / "OWN", train=4, val=2)
    shutil.copytree(folder / "OWN" / "val" / "apple", folder / "new-photos")
    labels = [
        f"{file.relative_to(folder / 'IMAGES' / 'val')},{file.parent.name}\n" for file in folder.glob("IMAGES/val/*/*")
    ]
    (folder / "labels.csv").write_text("".join(labels))
    sizes = ["--train-size", "32", "--epochs", "6", "--batch-size", "4", "-j", "0", "--output", folder / "runs"]
    own = [*tiny.NETWORK, "--stage", "base", "--data", folder / "OWN", "--experiment", "mine"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIXEFFICIENTNET_MANIFEST", overlay)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        tiny.cli("reproduce", "b2", "b4_ns", "--data", folder / "IMAGES", "--method", "cached", *sizes)
        tiny.cli("reproduce", *own, *sizes)
        model = fixefficientnet.create("b4_ns", "backbone", cache_dir=cache)
    head = tuned_delta(model, "b4_ns")
    torch.save(model.state_dict() | dict(head.tensors), folder / "fixeffnet_b4.pth")
    return folder, overlay


def shortened(command: Command) -> Command:
    """A command's arguments, with other names and more options, so that it ends in seconds."""
    _, name, *words = command
    for text, other in NAMES.items():
        words = [re.sub(text, other, word) for word in words]
    more = MORE.get(name, [])
    if name == "reproduce":
        more = [] if "--plan" in words else more + ([] if "base" in words else ["--test-size", "48"])
    elif name == "export" or "--engine" in words:  # exporting lite0 takes half a minute
        words = [BACKBONE if word == "lite0" else word for word in words]
        more = {"export": more if "--int8" in words else [], "predict": ["--model", BACKBONE]}.get(name, more)
    if "--backbone" in words or "runs/mine" in words:
        words = ["OWN" if word == "IMAGES" else word for word in words]
    if "--data" in words:
        words = ["IMAGES" if word == "FOLDER" else word for word in words]
    return [name, *words, *more]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_commands_run(
    page: Path, prepared: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, overlay = prepared
    listed = commands(page, tmp_path)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("hub"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FIXEFFICIENTNET_MANIFEST", overlay)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    with Hub(("me", "org")) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for command in listed:
            if any(re.search(one, " ".join(command)) for one in ONLY_PARSED):
                continue
            assert as_installed(command)[0] == "fixefficientnet", (
                f"{' '.join(command)}: say in ONLY_PARSED what runs it"
            )
            for flag, output in pairwise(command):
                if flag in ("-o", "--to"):  # where a command before wrote something else
                    shutil.rmtree(output) if Path(output).is_dir() else Path(output).unlink(missing_ok=True)
            tiny.cli(*shortened(as_installed(command)), columns=200)
