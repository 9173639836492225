"""What is launched on a card, counted without one: Triton is not to interpret here, so in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_launches.py"


def test_launches_are_counted_and_kernels_compile():
    """Also that nothing waits for the card or for main memory: tensors without data have nothing to wait for."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--batch", "1", "--compile", "90"]
    run = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    launches = {name: int(number) for name, number in re.findall(r"^\| (\w+) \| (\d+) \|", run.stdout, re.MULTILINE)}
    assert launches["mix"] == launches["attention"] == launches["gated_product"] == 8
    ours, plain = (int(each) for each in re.findall(r"^\| all.*?\) \| (\d+) \|", run.stdout, re.MULTILINE))
    assert ours < 110 < 3 * ours < plain
    compiled = re.findall(r"^sm_90 (\w+)_kernel: REG:\d+ STACK:(\d+)$", run.stdout, re.MULTILINE)
    assert {name for name, _ in compiled} >= {"_mix", "_attention", "_gated_product", "_norm", "_prepare", "_top_two"}
    assert {spilled for _, spilled in compiled} == {"0"}
