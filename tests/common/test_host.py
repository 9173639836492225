"""Memory that is kept, measured by the pages that the system has to supply."""

import gc
import os
import platform
import subprocess
import sys
import warnings

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from launching import QUICKLY
from transformers.utils import logging

from medct.cli import main
from medct.common import host
from medct.common.errors import SOME_FAILED

PROGRAM = """
import resource, runpy, sys
import numpy as np

if sys.argv[2] == "keep":
    runpy.run_path(sys.argv[1])["keep_freed_memory"]()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_large_blocks_are_reused():
    command = [sys.executable, "-c", PROGRAM, host.__file__]
    faults = {
        mode: int(subprocess.check_output([*command, mode], env=os.environ | QUICKLY)) for mode in ("keep", "hand back")
    }
    assert faults["keep"] < 100
    # 64 MiB in pages of 4 KiB, or fewer and larger ones.
    assert faults["hand back"] > faults["keep"]


def test_peak_memory_is_in_bytes():
    """A process that has torch takes hundreds of MB, and no machine of a test 1 TB."""
    assert 2**26 < host.peak_memory_bytes(torch.device("cpu")) < 2**40


def test_an_apple_gpu_is_called_by_its_name_and_not_by_the_cores_beside_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M4 Pro")
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2**33)
    assert host.device_name(torch.device("mps")) == "Apple M4 Pro GPU"
    assert host.peak_memory_bytes(torch.device("mps")) == 2**33


def test_a_command_called_by_a_program_leaves_its_libraries_as_they_were(capsys):
    """A notebook, say, goes on with them; only a process of the command's own is set up for it alone."""

    def state():
        bars = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
        return logging.get_verbosity(), bars, warnings.filters.copy(), warnings.showwarning

    before, frozen = state(), gc.get_freeze_count()
    assert main(["predict", __file__, "--model", "phantom"]) == SOME_FAILED
    assert "already registered" not in capsys.readouterr().err
    assert state() == before
    assert gc.get_freeze_count() <= frozen  # some of what was frozen before may be gone
