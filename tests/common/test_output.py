"""What has been printed is written out, or it is said that it could not be."""

import json
import sys
from pathlib import Path

import pytest

from medct.common.output import flush_output, visible
from medct.common.progress import remark
from medct.inference.bulk import JsonLines


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_few_lines_that_did_not_fit_are_told(monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        print("shorter than the buffer")
        with pytest.raises(OSError, match="No space left on device: 'standard output'"):
            flush_output()
        flush_output()  # what is left of it is dropped


OBEYED = "\x1b]0;title\x07 \x9b31m\nline\r\u2028 \u202egpj.nii \x7f"


def test_a_terminal_shows_names_and_does_not_obey_them(capsys):
    remark(f"{OBEYED} Gefäß 肺.nii")
    said = capsys.readouterr().err
    assert said.endswith(" Gefäß 肺.nii\n") and not set(OBEYED) - set("]0;title 31mlnegpj.") & set(said[:-1])
    assert json.loads(f'"{visible(OBEYED)}"') == OBEYED
    line = JsonLines().line({"study": OBEYED})
    assert json.loads(line) == {"study": OBEYED} and visible(line[:-1]) == line[:-1]
