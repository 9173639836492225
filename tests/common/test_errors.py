"""A command ends with one line, and an exit status that says how it ended."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medct import MedCTError, VolumeError
from medct.common.errors import BROKEN_PIPE, FAILED, INTERRUPTED, STOPPED, StoppedError, one_line_errors
from medct.errors_medct import first_line, said_of

FULL_DISK = Path("/dev/full")
LOST = "error: lost the other processes of this launch"
CHECK = "Check the file and, if it is remote, the connection."


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (MedCTError("x.csv: no such file. Check the path."), FAILED, "error: x.csv: no such file. Check the path."),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out"), FAILED, "error: out: No space left on device."),
        (OSError("the Hub cannot be reached"), FAILED, "error: the Hub cannot be reached"),
        (torch.OutOfMemoryError("CUDA"), FAILED, "error: the accelerator's memory is full. Lower --batch_size, or"),
        (torch.distributed.DistStoreError("1/2 clients joined"), FAILED, f"{LOST} (1/2 clients joined). See which of"),
        (
            RuntimeError("[/x/gloo/pair.cc:5] Connection closed"),
            FAILED,
            f"{LOST}. See which of",
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), FAILED, "error: the accelerator's memory is"),
        (RuntimeError("[..] DefaultCPUAllocator: not enough memory"), FAILED, "error: this machine's memory is full."),
        (MemoryError("Unable to allocate 2 GiB"), FAILED, "error: this machine's memory is full. Lower --batch_size"),
        (StoppedError("stopped after step 3."), STOPPED, "stopped after step 3."),
        (
            KeyboardInterrupt(),
            INTERRUPTED,
            "stopped; `predict --output`, `embed` and `prepare` continue from here when run again.",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_that_a_user_can_fix_are_printed_as_they_are(error, status, line, capsys, monkeypatch):
    monkeypatch.delenv("MEDCT_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    assert stop.value.code == status
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (VolumeError("a.nii", "it is one slice", "Pass all"), "a.nii: it is one slice. Pass all."),
        (type("MedCTError", (Exception,), {})("of another copy"), "of another copy"),
        (
            OSError(errno.EIO, "no disk", "DOE^JANE"),
            f"reading failed (OSError: no disk in test_errors.py, line N). {CHECK}",
        ),
        (ConnectionError("DOE^JANE"), f"reading failed (ConnectionError in test_errors.py, line N). {CHECK}"),
        (ValueError("DOE^JANE"), "reading failed (ValueError in test_errors.py, line N). Report this."),
    ],
    ids=str,
)
def test_only_what_we_say_or_the_system_is_told_of_a_scan(error, said):
    """Other errors may quote a header."""
    with pytest.raises(type(error)) as caught:
        raise error
    assert re.sub(r"line \d+", "line N", said_of(caught.value)) == said


def test_a_bug_also_names_where_it_came_from(capsys, monkeypatch):
    monkeypatch.delenv("MEDCT_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise ValueError("wrong\nsecond line")
    assert stop.value.code == FAILED
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ValueError: wrong (test_errors.py, line ")
    assert "MEDCT_DEBUG=1" in said


def test_the_traceback_is_shown_on_request(capsys, monkeypatch):
    monkeypatch.setenv("MEDCT_DEBUG", "1")
    with pytest.raises(SystemExit), one_line_errors():
        raise ValueError("wrong")
    said = capsys.readouterr().err
    assert "Traceback" in said and 'raise ValueError("wrong")' in said


def test_a_closed_pipe_is_not_an_error(capfd):
    number = sys.stdout.fileno()  # pytest's own file, or 1
    kept = os.dup(number)
    try:
        with pytest.raises(SystemExit) as stop, one_line_errors():
            raise BrokenPipeError
        print("what nobody reads any more", flush=True)
    finally:
        os.dup2(kept, number)
    assert stop.value.code == BROKEN_PIPE
    assert capfd.readouterr() == ("", "")


def test_the_first_line_of_an_error_without_a_message_is_its_class():
    assert first_line(ValueError("\na\nb")) == "a"
    assert first_line(KeyError()) == "KeyError"


def test_the_statuses_are_those_that_scripts_know():
    assert (FAILED, STOPPED, INTERRUPTED, BROKEN_PIPE) == (2, 75, 130, 141)


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        ("return None", 0, ""),
        ("return 1", 1, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('not so')", 1, "not so\n"),
        ("raise MedCTError('a fault.')", 2, "error: a fault.\n"),
    ],
)
def test_a_process_ends_with_its_status_after_all_that_is_to_be_done_at_the_end(ending, status, said, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    code = f"""
import atexit, sys, weakref
sys.argv[0] = "medct"  # so that the package imports only what is asked for
from medct.common.errors import MedCTError, run_process

class Kept:
    pass

def main():
    print("printed")
    atexit.register(print, "closed")
    weakref.finalize(kept, print, "finalised")
    {ending}

kept = Kept()
run_process(main)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert (run.returncode, sorted(run.stdout.split())) == (status, ["closed", "finalised", "printed"])
    assert run.stderr[-len(said) :] == said if said else run.stderr == ""


def test_what_a_command_imported_is_not_taken_apart():
    """A module's last reference goes when Python takes it apart."""
    code = """
import os, sys
sys.argv[0] = "medct"
from medct.common.errors import run_process

class Kept:
    def __del__(self, write=os.write):
        write(1, b"taken apart")

kept = Kept()
run_process(lambda: None)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert run.stdout + run.stderr == ""


@pytest.mark.skipif(not FULL_DISK.exists(), reason="needs a full disk")
def test_what_a_process_has_printed_is_written_before_it_ends(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    code = """
import sys
sys.argv[0] = "medct"
from medct.common.errors import run_process
run_process(lambda: print("printed"))
"""
    with FULL_DISK.open("w") as full:
        run = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, encoding="utf-8")
    assert (run.returncode, run.stderr) == (FAILED, "error: standard output: No space left on device.\n")


@pytest.mark.skipif(os.name == "nt", reason="processes end there without a signal")
@pytest.mark.parametrize(("in_callback", "ignores_ctrl_c"), [(False, False), (True, False), (True, True)])
def test_a_process_that_is_terminated_ends_as_by_ctrl_c(in_callback, ignores_ctrl_c):
    """With a handler, which the first process of a container needs to hear the signal at all.

    Python drops what is raised in a callback of a weak reference; jobs in the background ignore Ctrl-C.
    """
    code = f"""
import os, signal, sys, time, weakref
sys.argv[0] = "medct"
if {ignores_ctrl_c}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
from medct.common.errors import run_process

class Kept:
    pass

def main():
    def terminate(_=None):
        os.kill(os.getpid(), signal.SIGTERM)

    kept = Kept()
    reference = weakref.ref(kept, terminate)
    try:
        if {in_callback}:
            del kept
        else:
            terminate()
        time.sleep(10)
    finally:
        print("cleared away")


run_process(main)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert (run.returncode, run.stdout) == (INTERRUPTED, "cleared away\n")
    assert run.stderr.startswith("stopped; ") and run.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="no shell that closes streams")
def test_a_process_without_output_works_and_no_file_takes_its_place(tmp_path):
    code = """
import sys
output = sys.argv[1]
sys.argv[0] = "medct"
from medct.common.errors import run_process


def main():
    with open(output, "w") as file:
        print(file.fileno(), file=file)
    print("printed", flush=True)
    print("said", file=sys.stderr, flush=True)
    return 1


run_process(main)
"""
    path = tmp_path / "file"
    command = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, "-c", code, str(path)]
    assert subprocess.run(command, check=False).returncode == 1
    assert int(path.read_text(encoding="utf-8")) > 2
