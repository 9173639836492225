"""The paper's experiment in miniature: a random checkpoint and a look-alike of CT-RATE, so its figures mean nothing."""

import json
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from ct_rate_like import ct_rate_files, write_files

import medct
from medct.common.errors import STOPPED, StoppedError
from medct.training import reproduce_paper
from medct.training.settings import check


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


def test_one_command_converts_trains_and_compares(arguments, tmp_path, capsys, monkeypatch):
    reproduce_paper.main(arguments)
    shown = capsys.readouterr().out
    table = (tmp_path / "run/beside_the_paper.md").read_text(encoding="utf-8")
    assert table in shown
    results = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))
    scans, patients = (results["comparison"][name] for name in ("scans", "patients"))
    assert table.startswith(f"Held out: {scans} scans of {patients} patients. In brackets: 95 % intervals")
    auroc = next(line for line in table.splitlines() if line.startswith("| AUROC"))
    assert f"| {100 * results['comparison']['adapted']['auroc']['value']:.1f}" in auroc
    assert "| 61.3 | 68.9 | +7.6 | 73.1 |" in auroc
    assert "| 67.2 | 73.6 | +6.4 |" in table
    assert "| 32.1 | 36.9 | +4.8 |" in table
    assert (tmp_path / "run-base/model.safetensors").is_file()
    recipes = [
        json.loads((tmp_path / name / "train_config.json").read_text(encoding="utf-8"))
        for name in ("run", "run-vision")
    ]
    assert [each["recipe"] for each in recipes] == ["paper", "vision"]
    assert [each["strength"] for each in recipes] == ["1", "auto"]
    assert [line.split(" | ")[0] for line in table.splitlines()[-3:]] == ["| paper", "| vision", "| vision, replay"]
    assert "| vision, replay | not run: pass --replay SOURCE |" in table
    assert not (tmp_path / "run-vision-replay").exists()
    monkeypatch.setattr(reproduce_paper, "Trainer", lambda _: pytest.fail("a finished row is run again"))
    reproduce_paper.main([*arguments, "--resume", "True"])
    assert table in capsys.readouterr().out
    monkeypatch.setattr(medct, "__version__", "tomorrow's")
    with pytest.raises(SystemExit):
        reproduce_paper.main([*arguments, "--resume", "True"])
    assert "run was started with MedCT " in capsys.readouterr().err


def test_a_row_that_is_stopped_says_how_the_experiment_is_resumed(arguments, tmp_path, capsys, monkeypatch):
    """Not how it would go on with the row's own folder, where another experiment would begin."""
    stop = SimpleNamespace(run=Mock(side_effect=StoppedError("stopped. Resume run-vision.")))
    monkeypatch.setattr(reproduce_paper, "converted", lambda settings: tmp_path)
    monkeypatch.setattr(reproduce_paper, "Trainer", lambda settings: stop)
    with pytest.raises(SystemExit, match=str(STOPPED)):
        reproduce_paper.main(arguments)
    said = "stopped in row 'paper'. The same command with --output_dir {} --resume continues it.\n"
    assert capsys.readouterr().err == said.format(tmp_path / "run")


@pytest.mark.slow
def test_another_hospital_is_shown_with_replay(arguments, tmp_path):
    """Resumed after the first row: that is not run again."""
    flags = [*arguments, "--replay", "phantoms:A", "--keep", "phantoms:A", "--resume", "True"]
    flags += ["--phantom_tune_patients", "8", "--phantom_eval_patients", "8", "--max_steps", "1"]
    reproduce_paper.main(flags)
    first = (tmp_path / "run/results.json").read_text(encoding="utf-8")
    reproduce_paper.main(flags)
    assert (tmp_path / "run/results.json").read_text(encoding="utf-8") == first
    with pytest.raises(SystemExit):
        reproduce_paper.main([*flags, "--seed", "1"])
    table = (tmp_path / "run/beside_the_paper.md").read_text(encoding="utf-8")
    row = table.splitlines()[-1]
    assert row.startswith("| vision, replay |")
    results = json.loads((tmp_path / "run-vision-replay/results.json").read_text(encoding="utf-8"))
    assert "SYNTHETIC phantoms of site A in between" in results["data"]
    assert f"{100 * results['kept']['difference']['auroc']['value']:+.1f}" in row


def test_the_cpu_may_be_asked_for_at_the_launch(monkeypatch, tmp_path):
    (tmp_path / "run-base").mkdir()
    settings = reproduce_paper.PaperSettings(checkpoint="x.pt", output_dir=str(tmp_path / "run"))
    asked = []
    start = lambda cpu: asked.append(cpu) or SimpleNamespace(main_process_first=nullcontext)  # noqa: E731
    monkeypatch.setattr(reproduce_paper, "PartialState", start)
    monkeypatch.setattr(reproduce_paper, "start_launch", lambda start, **options: start(**options), raising=False)
    for flag in ("no", "yes"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", flag)
        reproduce_paper.converted(settings)
    assert asked == [False, True]


def test_what_is_missing_is_named_in_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce_paper.main(["--output_dir", "run"])
    assert capsys.readouterr().err.splitlines() == ["error: Pass --checkpoint CT-CLIP_v2.pt and --output_dir FOLDER."]
    with pytest.raises(SystemExit, match="2"):  # one fold alone would stand beside the paper
        reproduce_paper.main(["--output_dir", "run", "--checkpoint", "x.pt", "--folds", "5"])
    assert "Leave it out." in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):  # the base would be another one
        reproduce_paper.main(["--output_dir", "run", "--checkpoint", "x.pt", "--model", "org/base"])
    assert "Leave out --model" in capsys.readouterr().err


def test_only_what_is_compared_with_the_paper_is_pushed():
    """All rows would go to the same repository, one over the other."""
    pushing = {"push_to_hub": True, "hub_model_id": "org/site-b", "hub_base": "org/base", "hub_private": True}
    settings = reproduce_paper.PaperSettings(output_dir="run", replay="phantoms:A", **pushing)
    rows = list(reproduce_paper.rows_of(settings).values())
    assert [each.push_to_hub for each in rows] == [True, False, False]
    for each in rows:
        check(each)
