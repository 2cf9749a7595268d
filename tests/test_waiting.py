"""Waits for others, each of which ends; that real ones do, the campaign's trials show."""

import threading
from itertools import count
from pathlib import Path

import pytest
from huggingface_hub.utils import WeakFileLock

from fixefficientnet._internal import files, waiting
from fixefficientnet.errors import OptionError


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(waiting.VARIABLE, "0.3")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e300", "ten"])
def test_what_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv(waiting.VARIABLE, value)
    with pytest.raises(OptionError, match=f"{waiting.VARIABLE}={value}: it is a number of seconds above 0"):
        waiting.longest()


def test_without_the_variable_it_is_half_an_hour(monkeypatch: pytest.MonkeyPatch):
    for value in ("", None):
        monkeypatch.delenv(waiting.VARIABLE) if value is None else monkeypatch.setenv(waiting.VARIABLE, value)
        assert waiting.longest() == 1800


def test_a_lock_that_is_held_is_waited_for_and_its_holder_named(tmp_path: Path):
    lock = tmp_path / ".lock"
    with (
        WeakFileLock(lock),
        pytest.raises(TimeoutError, match=r"^The thing is in use by .*process.* 0\.3 s \(FIXEFF"),
        waiting.locked(lock, "The thing"),
    ):
        pass
    with waiting.locked(lock, "The thing"):  # nothing is left of the wait
        pass


def test_an_error_of_what_is_done_under_a_lock_is_its_own(tmp_path: Path):
    with pytest.raises(TimeoutError, match=r"^mine$"), waiting.locked(tmp_path / ".lock", "The thing"):
        raise TimeoutError("mine")


def test_a_file_system_without_locks_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(waiting.VARIABLE, "1000")
    monkeypatch.setattr(waiting, "why_no_lock", lambda path: "No locks available")
    lock = tmp_path / ".lock"
    with WeakFileLock(lock), pytest.raises(OSError, match="No locks available"), waiting.locked(lock, "The thing"):
        pass


def test_work_gives_its_result_or_its_error_and_leaves_no_thread():
    before = threading.active_count()
    assert waiting.in_time(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        waiting.in_time(lambda: 1 // 0)
    assert threading.active_count() == before


def test_work_is_given_up_when_nothing_moves():
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"nothing moved any more, which was waited for 0\.3 s"):
        waiting.in_time(never.wait)
    never.set()


def test_what_moves_is_waited_for():
    done, numbers = threading.Event(), count()
    threading.Timer(1, done.set).start()
    assert waiting.in_time(done.wait, lambda: next(numbers))
    done.clear()
    threading.Timer(1, done.set).start()
    assert waiting.in_time(done.wait, parts=10)


def test_files_and_folders_are_read_and_devices_are_not(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        files.check_file(path)
    with pytest.raises(OSError, match="a pipe, a socket or a device"):
        files.check_file("/dev/null")
