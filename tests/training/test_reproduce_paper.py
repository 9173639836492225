"""The paper's experiment in small: a random checkpoint and a look-alike of CT-RATE, so its figures mean nothing."""

import json

import pytest
from ct_rate_like import ct_rate_files, write_files

from medct.training import reproduce_paper


@pytest.fixture
def arguments(checkpoint, sizes_file, tokenizer_folder, tmp_path) -> list[str]:
    given = {
        "checkpoint": checkpoint,
        "sizes": sizes_file,
        "tokenizer": tokenizer_folder,
        "data": write_files(tmp_path / "ct_rate", ct_rate_files()),
        "output_dir": tmp_path / "run",
        "batch_size": 1,
        "accumulation_steps": 2,
        "num_workers": 0,
        "bootstrap_resamples": 20,
        "cpu": True,
    }
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_one_command_converts_estimates_trains_and_compares(arguments, tmp_path, capsys):
    reproduce_paper.main(arguments)
    shown = capsys.readouterr().out
    assert shown.index("Estimate: ") < shown.index("trainable parameters")
    table = (tmp_path / "run/beside_the_paper.md").read_text()
    assert table in shown
    results = json.loads((tmp_path / "run/results.json").read_text())
    auroc = next(line for line in table.splitlines() if line.startswith("| AUROC"))
    assert f"| {100 * results['comparison']['adapted']['auroc']['value']:.1f} (" in auroc
    assert "| 61.3 | 68.9 | +7.6 | 73.1 |" in auroc
    assert "| 67.2 | 73.6 | +6.4 |" in table
    assert "| 32.1 | 36.9 | +4.8 |" in table
    assert (tmp_path / "run-base/model.safetensors").is_file()


def test_the_estimate_alone_trains_nothing(arguments, tmp_path, capsys):
    reproduce_paper.main([*arguments, "--estimate", "True"])
    shown = capsys.readouterr().out
    assert "studies to learn from" in shown
    assert not (tmp_path / "run").exists()


def test_hours_are_those_of_the_slower_of_reading_and_computing():
    estimate = reproduce_paper.Estimate(
        reading_seconds=8.0, encoding_seconds=1.0, training_seconds=3.0, memory_bytes=1, disk_bytes=1,
        trained=3600, scored=7200, processes=2, workers=4,
    )  # fmt: skip
    assert estimate.hours == pytest.approx((3600 * 3 + 7200 * 2) / 2 / 3600)


def test_what_is_missing_is_said_in_one_line():
    with pytest.raises(SystemExit, match="Pass --checkpoint"):
        reproduce_paper.main(["--output_dir", "run"])
