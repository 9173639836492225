"""An output has one run at a time; a lock ends with its process, however that ends."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import filelock
import pytest

from medct.common.errors import FAILED, _end_of
from medct.common.lock import LockedError, only_run


def _hold(output, connection):
    with only_run(output):
        connection.send("held")
        connection.recv()
        (output.parent / "written").touch()


@pytest.fixture
def other_run(tmp_path):
    """Another process that holds `tmp_path / "out.csv"`."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_hold, args=(tmp_path / "out.csv", theirs))
    process.start()
    assert ours.recv() == "held"
    yield process, ours
    process.kill()
    process.join()


def test_a_second_run_is_refused_and_told_by_whom(tmp_path, other_run):
    process, connection = other_run
    with pytest.raises(LockedError) as caught, only_run(tmp_path / "out.csv"):
        pytest.fail("must not begin")
    status, line = _end_of(caught.value)
    assert status == FAILED
    assert line.startswith(f"error: {tmp_path / 'out.csv'} is being written by another run (process {process.pid} of ")
    assert line.endswith("). Wait for its end, or choose another output.")
    with only_run(tmp_path / "out"), only_run(tmp_path / "out.csv.failed.csv"):
        pass  # others are free
    connection.send("go on")
    process.join()
    assert (tmp_path / "written").exists()
    with only_run(tmp_path / "out.csv"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["written"]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_crash_leaves_no_lock(tmp_path, other_run, end):
    process, _ = other_run
    os.kill(process.pid, end)
    process.join()
    with only_run(tmp_path / "out.csv"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_run_may_lock_again_after_an_error(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), only_run(tmp_path / "new" / "out"):
            raise error
    with only_run(tmp_path / "new" / "out"), pytest.raises(LockedError), only_run(tmp_path / "new" / "out"):
        pytest.fail("the same process is no exception")


def test_leftovers_of_killed_runs_are_cleared_away(tmp_path):
    names = [".out.csv.partial-0a", ".out.csv.failed.csv.partial-0a", ".out.partial-0a", "out.csv"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".out.csv.partial-folder").mkdir()
    (tmp_path / ".out.csv.partial-folder" / "file").touch()
    with only_run(tmp_path / "out.csv"):
        assert {path.name for path in tmp_path.iterdir()} == {*names[1:], ".out.csv.lock"}


def test_other_processes_of_a_launch_rely_on_the_first(tmp_path, monkeypatch):
    with only_run(tmp_path / "out"):
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(LockedError), only_run(tmp_path / "out"):
            pytest.fail("a rank that another launch has left makes no launch")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with only_run(tmp_path / "out"):
            pass
        with pytest.raises(LockedError), only_run(tmp_path / "out", each_process=True):
            pytest.fail("this one has the output for itself")


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "_acquire", refuse)
    warned = pytest.warns(UserWarning, match=r"out: this file system has no locks\. Make sure that no second run")
    with warned, only_run(tmp_path / "out"):
        pass


def test_an_output_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught, only_run(tmp_path / "file" / "out.csv"):
        pytest.fail("must not begin")
    assert str(tmp_path / "file") in _end_of(caught.value)[1]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder in which nobody can make a file")
def test_where_no_file_can_be_made_there_is_no_other_run():
    with pytest.raises(OSError) as caught, only_run("/proc/x.json"):
        pytest.fail("must not begin")
    assert _end_of(caught.value)[1] == "error: /proc/x.json: no file can be made in /proc. Choose another output."


def test_a_clock_that_jumps_ends_no_lock(tmp_path, other_run, monkeypatch):
    path = tmp_path / ".out.csv.lock"
    for when in (0, time.time() + 1e8):
        os.utime(path, (when, when))
        monkeypatch.setattr(time, "time", lambda when=when: when)
        with pytest.raises(LockedError), only_run(tmp_path / "out.csv"):
            pytest.fail("it is held")


def test_a_pipe_or_a_device_is_no_output(tmp_path):
    os.mkfifo(tmp_path / "scores.csv")
    for output in (tmp_path / "scores.csv", "/dev/null"):
        with pytest.raises(OSError, match=r"is a pipe or a device\. Choose another output\."), only_run(output):
            pytest.fail("it is written to")
