"""Files that are written whole or not at all, whoever is killed and whoever else writes."""

import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from fixefficientnet._internal import files
from fixefficientnet.errors import FixEfficientNetError, redacted

Writing = Callable[[Path], AbstractContextManager[Path]]


def _killed(writing: Writing, target: Path) -> None:
    with writing(target):
        os.kill(os.getpid(), signal.SIGKILL)


def kill_in(writing: Writing, target: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(writing, target))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("writing", [files.replacing, files.beside])
def test_what_killed_processes_were_writing_goes_with_the_next_write(tmp_path: Path, writing: Writing):
    for _ in range(3):
        kill_in(writing, tmp_path / "a[1].txt")
        assert len(list(tmp_path.iterdir())) == 1
    kill_in(writing, tmp_path / "b.txt")  # which is another target
    with writing(tmp_path / "a[1].txt"):
        pass
    assert sorted(path.name[:6] for path in tmp_path.iterdir()) == [
        ".b.txt",
        *["a[1].t"] * (writing is files.replacing),
    ]


@pytest.mark.parametrize("writing", [files.replacing, files.beside])
def test_what_others_are_writing_stays(tmp_path: Path, writing: Writing):
    with writing(tmp_path / "a") as first, writing(tmp_path / "a") as second:
        assert first.exists() and second.exists() and first != second


@pytest.mark.parametrize("writing", [files.replacing, files.beside])
def test_without_locks_nothing_is_taken_for_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writing: Writing):
    def no_lock(*_: Any) -> None:
        raise OSError(37, "No locks available")

    kill_in(writing, tmp_path / "a")
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(fcntl, "flock", no_lock)
    with writing(tmp_path / "a"):
        pass
    assert left.exists()


def test_the_longest_names_that_a_file_can_have(tmp_path: Path):
    for name in ("x" * 255, "\N{PILE OF POO}" * 63, os.fsdecode(b"\xff" * 255)):
        files.write_text(tmp_path / name, "whole")
        assert (tmp_path / name).read_text() == "whole"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_who_may_read_a_file_is_the_users_to_say(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "a", "whole")
        (tmp_path / "b").write_text("as any program does")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_link_to_itself_is_no_link_out(tmp_path: Path):
    (tmp_path / "features").symlink_to("other")
    (tmp_path / "other").symlink_to("features")
    files.check_links(tmp_path, ["features"])
    (tmp_path / "log.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(FixEfficientNetError, match="link out of its folder"):
        files.check_links(tmp_path, ["features", "log.jsonl"])


def test_secrets_are_redacted_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefgh-and-more")
    assert redacted("abcdefgh-and-more, abcdefgh") == "..., ..."
    assert redacted("https://user:p@ss@host/path") == "https://...@host/path"
