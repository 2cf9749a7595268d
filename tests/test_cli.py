import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import tiny
from conftest import ROOT

from fixefficientnet import manifest
from fixefficientnet._internal import requirements

EXAMPLES = ROOT / "examples"


def cli(*arguments: str | Path, stdin: bytes = b"", status: int = 0, cwd: Path = ROOT) -> tuple[str, str]:
    with contextlib.chdir(cwd), mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))):
        return tiny.cli(*arguments, status=status)


def test_list_fits_80_columns_and_has_every_variant():
    out, _ = cli("list")
    assert max(map(len, out.splitlines())) <= 80
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    rows = [row for row in rows if row and row[0] in manifest.load()]
    assert [row[0] for row in rows] == list(manifest.load())
    assert rows[4] == ["b4", "19.3M", "512", "83.3", "84.0", "not published yet"]
    assert rows[-1][-1] == "none (backbone only)"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
@pytest.mark.parametrize("command", ["fixefficientnet predict", "fixefficientnet.reproduce", "fixefficientnet list"])
def test_a_terminal_of_another_encoding_is_shown_what_it_can_show(encoding: str, command: str):
    module, *more = command.split()
    help_ = [] if more == ["list"] else ["--help"]
    done = subprocess.run(
        [sys.executable, "-m", module, *more, *help_],
        env=os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "80"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"b4_ns" in done.stdout or b"--device" in done.stdout


def test_list_as_json_and_filtered():
    rows = json.loads(cli("list", "*_ns", "--json")[0])
    assert [row["key"] for row in rows] == [f"b{i}_ns" for i in range(8)]
    assert rows[4]["paper"]["fix"]["top1"] == 85.9
    assert rows[4]["timm_name"] == "fixefficientnet_b4.ns_jft_in1k"
    assert rows[4]["published"] is False
    assert "nothing_*" in cli("list", "nothing_*", status=1)[1]


def test_info():
    out, _ = cli("info", "FixEfficientNet-B4-NS")
    assert max(map(len, out.splitlines())) <= 80
    for part in (
        "fixefficientnet_b4.ns_jft_in1k",
        "whoever owns the repository may change the file",
        "85.9",
        "472",
        "0.485",
        "not published yet",
        "19,341,616",
    ):
        assert part in out
    assert "Not from the paper" in cli("info", "lite1")[0]
    assert json.loads(cli("info", "l2", "--json")[0])["test"]["size"] == 600
    assert "Did you mean" in cli("info", "b44", status=1)[1]


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", cli("--version")[0])


def test_bash_completes_commands_and_options(tmp_path: Path):
    script = tmp_path / "completion"
    with mock.patch.object(Path, "home", return_value=tmp_path):  # the file that bash reads is there
        cli("--install-completion", "--shell", "bash", "--output", script)
    assert str(script) in (tmp_path / ".bashrc").read_text()

    def completed(*words: str) -> list[str]:
        code = f"""
        . {script}
        [[ $(complete -p fixefficientnet) =~ -F\\ ([^ ]+) ]]
        COMP_WORDS=(fixefficientnet {shlex.join(words)}) COMP_CWORD={len(words)}
        "${{BASH_REMATCH[1]}}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert completed("pre") == ["predict"]
    assert "--mixed-precision" in completed("reproduce", "--mix")
    assert {"onnx", "openvino"} <= set(completed("predict", "--engine", "o"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "events"), "Error: events: No space left on device.\n"),
        (BrokenPipeError(32, "Broken pipe"), "\nBrokenPipeError: [Errno 32] Broken pipe\n"),
        (ValueError("with abc-of-the-token"), "\nValueError: with ...\n"),
    ],
)
def test_what_ends_a_thread_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str):
    def fail() -> None:
        raise error

    def need(*_: str) -> None:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    importlib.import_module("fixefficientnet.cli")  # which asks for releases too
    monkeypatch.setenv("HF_TOKEN", "abc-of-the-token")
    monkeypatch.setattr(requirements, "need", need)
    before = threading.excepthook
    found = tiny.cli("predict", status=2)[1]
    assert said in f"\n{found}"
    assert ("Traceback" in found) == (not isinstance(error, OSError) or error.errno != 28)
    assert threading.excepthook == before


def test_predict_says_what_it_runs_and_sees():
    out, _ = cli("predict", EXAMPLES / "cat.jpg", "--topk", "2")
    lines = out.splitlines()
    assert "EfficientNet-Lite0" in lines[0]
    assert "backbone weights" in lines[0]
    assert "not tuned by FixRes" in lines[0]
    assert lines[2].endswith("cat.jpg")
    assert re.match(r"  +\d+\.\d%  Egyptian cat", lines[3])
    assert len(lines) == 5


def test_predict_folder_glob_stdin_and_json(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    shutil.copy(EXAMPLES / "cat.jpg", tmp_path / "deep" / "one.JPG")
    shutil.copy(EXAMPLES / "coffee.jpg", tmp_path / "two.jpg")
    (tmp_path / "t.txt").write_text("not an image: neither the folder nor the glob takes it")
    coffee = (EXAMPLES / "coffee.jpg").read_bytes()
    out, _ = cli("predict", ".", "t*", "-", "--json", "--batch-size", "2", stdin=coffee, cwd=tmp_path)
    found = json.loads(out)
    assert (found["model"], found["weights"]) == ("lite0", "backbone")
    assert [(p["file"], p["labels"][0]["name"]) for p in found["predictions"]] == [
        ("deep/one.JPG", "Egyptian cat"),
        ("two.jpg", "espresso"),
        ("two.jpg", "espresso"),
        ("-", "espresso"),
    ]
    assert found["predictions"][0]["labels"][0]["synset"] == "n02124075"


def test_predict_goes_on_after_bad_files_and_fails_in_the_end(tmp_path: Path):
    (tmp_path / "bad[1].jpg").write_bytes(b"no image")
    out, err = cli("predict", tmp_path / "bad[1].jpg", EXAMPLES / "cat.jpg", "missing.jpg", "no*.jpg", status=1)
    assert "Egyptian cat" in out
    for name in ("bad[1].jpg", "missing.jpg", "no*.jpg"):
        assert name in err
    assert "Traceback" not in err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "There are no images in" in cli("predict", empty, status=1)[1]
    assert "Nothing came on stdin" in cli("predict", "-", status=1)[1]
    assert "not an image" in cli("predict", "-", stdin=b"no image", status=1)[1]
    found = json.loads(cli("predict", "--json", EXAMPLES / "cat.jpg", "missing.jpg", "x" * 300, status=1)[0])
    assert len(found["predictions"]) == 1
    assert [e["file"] for e in found["errors"]] == ["missing.jpg", "x" * 300]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "b99"], "No variant is named 'b99'"),
        (["--model", "b4"], "no published FixRes weights yet"),
        (["--pretrained", "nowhere.safetensors"], "there is no such file"),
        (["--pretrained", "hf://a/b"], "is not of the form hf://"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--device", "meta"], "Use --device cpu"),
        (["--model", "b0", "--pretrained", "backbone"], "not in the cache"),
    ],
)
def test_predict_errors_are_one_message(arguments: list[str], said: str):
    out, err = cli("predict", EXAMPLES / "cat.jpg", *arguments, status=1)
    assert said in err
    assert "Traceback" not in err
    assert out == ""


def test_bad_option_is_a_usage_error():
    cli("predict", EXAMPLES / "cat.jpg", "--topk", "0", status=2)
    cli("predict", status=2)
