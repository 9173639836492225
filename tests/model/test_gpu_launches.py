"""What is launched on a card, counted without one: Triton is not to interpret here, so in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import QUICKLY

pytest.importorskip("triton", reason="Triton is not installed")
# What a program may take on cards of these compute capabilities: those with the least, and those that were measured.
SHARED_BYTES = {"86": 99 * 1024, "90": 227 * 1024}
NAMES = {"_mix", "_attention", "_gated_product", "_norm", "_prepare", "_top_two"}
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_launches.py"


def test_launches_are_counted_and_kernels_compile():
    """Also that nothing waits for the card or for main memory: tensors without data have nothing to wait for."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--batch", "1", "--compile", *SHARED_BYTES]
    run = subprocess.run(command, env=environment | QUICKLY, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    launches = {name: int(number) for name, number in re.findall(r"^\| (\w+) \| (\d+) \|", run.stdout, re.MULTILINE)}
    assert launches["mix"] == launches["attention"] == launches["gated_product"] == 8
    ours, plain = (int(each) for each in re.findall(r"^\| all.*?\) \| (\d+) \|", run.stdout, re.MULTILINE))
    assert ours < 110 < 3 * ours < plain
    compiled = re.findall(r"^sm_(\d+) (\w+)_kernel: REG:\d+ STACK:(\d+) SHARED:(\d+)$", run.stdout, re.MULTILINE)
    for capability, limit in SHARED_BYTES.items():
        made = [each[1:] for each in compiled if each[0] == capability]
        assert {name for name, *_ in made} >= NAMES
        assert max(int(spilled) for _, spilled, _ in made) <= 16, "hardly anything leaves the registers"
        assert max(int(shared) for *_, shared in made) <= limit
