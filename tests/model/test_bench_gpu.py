"""The benchmark of a card runs, at sizes for a CPU, and prints every table."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_every_table_is_printed(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_gpu")
    monkeypatch.setattr(bench.subprocess, "check_output", lambda *_, **__: "Loading 0.5 1.5\n")
    monkeypatch.setattr(bench, "whole_studies", lambda *_: print("whole studies"))
    bench.main(["--tiny", "--repeats", "1", "--device", "cpu"])
    printed = capsys.readouterr().out
    tables = [line for line in printed.splitlines() if line.startswith("| ---")]
    assert len(tables) == 3
    rows = {line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| ")}
    assert {"| bf16 weights", "| fp32, plain", "| batch 8"} <= rows
    assert "| fp32 | 0.000 % | 0.0e+00 | 0.0e+00 |" in printed  # the CPU against itself
    assert "0.50 s; first score 1.50 s" in printed
    assert printed.endswith("whole studies\n")


def test_operations_are_those_of_the_published_sizes(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_gpu")
    assert bench.operations(bench.MedCTConfig()) == pytest.approx(792e9, rel=0.01)
