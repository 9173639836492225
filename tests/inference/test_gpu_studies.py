"""The benchmark of whole studies runs at a tiny size, without a GPU."""

import importlib.util
from pathlib import Path

import torch

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks/gpu_studies.py"


def test_whole_studies_at_a_tiny_size():
    spec = importlib.util.spec_from_file_location("gpu_studies", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    vision = {"image_size": [20, 40, 40], "patch_size": [10, 20, 20]}
    shapes = set()
    rows = benchmark.whole_studies(
        "cpu", [1, 2], (48, 40, 30), vision, use=lambda volume: shapes.add(volume.shape), studies_per_process=2
    )
    assert shapes == {torch.Size((1, 1, 20, 40, 40))}
    assert [(row["source"], row["processes"]) for row in rows] == [
        (source, count) for count in (1, 2) for source in (".nii.gz", "prepared, zstd", "prepared, lz4")
    ]
    assert all(row["studies_per_second"] > 0 and row["share_of_floor"] > 0 for row in rows)
    assert benchmark.table(rows).count("\n| prepared, ") == 4
    assert benchmark.processes_up_to(16) == [1, 2, 4, 8, 16] and benchmark.processes_up_to(6) == [1, 2, 4, 6]
