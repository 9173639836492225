"""Bars are for people: shown in a terminal, lines now and then in a file, and neither where that is asked for."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest

from medct.cli import main
from medct.common import progress

# As the command imports it: all of the package takes seconds.
CODE = """
import sys
sys.argv[0] = "medct"
from medct.common import progress
progress.be_quiet(sys.argv[1] == "quiet")
progress.LINE_SECONDS = float(sys.argv[2]) if sys.argv[2:] else progress.LINE_SECONDS
for _ in progress.tqdm(range(3), "work"):
    pass
progress.remark("a remark")
progress.tqdm.write("a result", file=sys.stdout)
"""


def shown(arguments: list[str]) -> str:
    """What a process writes to the terminal that it has."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # else it is no character wide
    process = subprocess.Popen(arguments, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    while True:
        try:
            text += (block := os.read(ours, 4096))
        except OSError:  # Linux says so that the other end is closed
            break
        if not block:
            break
    os.close(ours)
    assert process.wait() == 0
    return text.decode()


@pytest.mark.parametrize("quiet", ["quiet", "aloud"])
def test_a_terminal_shows_bars_unless_told_not_to(quiet):
    text = shown([sys.executable, "-c", CODE, quiet])
    assert ("work: 100%" in text) == ("a remark" in text) == (quiet == "aloud")
    assert "a result" in text


@pytest.mark.parametrize(
    ("how", "lines"),
    [
        (["aloud"], []),  # it is done before a line is due
        (["aloud", "0"], ["work: 0/3 [00:00<?, ?it/s]", *(f"work: {step}/3 [00:00<" for step in (1, 2, 3, 3))]),
        (["quiet", "0"], None),
    ],
    ids=str,
)
def test_a_file_holds_lines_now_and_then(how, lines):
    run = subprocess.run([sys.executable, "-c", CODE, *how], capture_output=True, encoding="utf-8", check=True)
    assert run.stdout == "a result\n"
    expected = [] if lines is None else [*lines, "a remark"]
    assert [line[: len(start)] for line, start in zip(run.stderr.splitlines(), expected, strict=True)] == expected
    assert "\r" not in run.stderr


def test_a_quiet_command_shows_its_result_alone(nifti, converted, tmp_path, capfd):
    array = np.random.default_rng(0).integers(-1000, 1000, (9, 12, 5)).astype(np.int16)
    scans = [str(nifti(array, name="a.nii.gz")), str(tmp_path / "bad.nii.gz")]
    (tmp_path / "bad.nii.gz").write_bytes(b"nothing")
    predict = ["predict", *scans, "--cpu", "--model", str(converted), "--output", str(tmp_path / "scores.csv")]
    try:
        assert main([*predict, "--quiet"]) == 1
        first = capfd.readouterr().err
        assert main([*predict, "--quiet"]) == 1
        again = capfd.readouterr().err
    finally:
        progress.be_quiet(False)
    assert first == again  # neither a bar nor that one study was there already
    assert first.startswith("failed: ") and "1 of 2 studies could not be read" in first


def test_a_bar_within_another_writes_lines_alone(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    for _ in progress.tqdm(range(2), "outer"):
        for _ in progress.tqdm(range(2), "inner"):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith(("outer: ", "inner: ")) for line in lines)
