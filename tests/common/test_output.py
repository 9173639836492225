"""What has been printed is written out, or it is said that it could not be."""

import io
import json
import sys
from pathlib import Path

import pytest

from medct import train
from medct.common.output import as_word, flush_output, visible
from medct.common.progress import remark
from medct.inference.bulk import JsonLines
from medct.training import reproduce_paper


def test_a_folder_in_a_command_can_be_copied_into_the_shell(monkeypatch):
    assert [as_word(Path(name)) for name in ("runs/b", "my runs/b")] == ["runs/b", "'my runs/b'"]
    monkeypatch.setattr(sys, "platform", "win32")
    assert [as_word(name) for name in (r"runs\b", r"my runs\b")] == [r"runs\b", r'"my runs\b"']


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


@pytest.mark.parametrize(("program", "run"), [(train, "run"), (reproduce_paper, "reproduce")], ids=["train", "paper"])
def test_programs_escape_what_the_output_has_no_letters_for(program, run, monkeypatch):
    """As Windows' encodings of files and pipes: hours of training must not end with the name of a folder."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(program, run, lambda settings: print("Saved: 研究"))
    program.main(["--output_dir", "run", "--checkpoint", "x.pt"] if program is reproduce_paper else [])
    output.flush()
    assert output.buffer.getvalue() == b"Saved: \\u7814\\u7a76\n"
