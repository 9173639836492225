"""What has been printed is written out, or it is said that it could not be."""

import sys
from pathlib import Path

import pytest

from medct.common.output import flush_output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_few_lines_that_did_not_fit_are_told(monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        print("shorter than the buffer")
        with pytest.raises(OSError, match="No space left on device: 'standard output'"):
            flush_output()
        flush_output()  # what is left of it is dropped
