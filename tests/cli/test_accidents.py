"""Ctrl-C, a home and an output that nobody may write to: one sentence, the right status, nothing half-written."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from scan_files import write_noise

import medct
from medct.cli import commands, scan_commands
from medct.common.errors import FAILED, INTERRUPTED, OK
from medct.inference import studies as reading
from medct.pipeline_medct import ZeroShotCTClassificationPipeline

PACKAGE = Path(medct.__file__).parent


@pytest.fixture
def scans(tmp_path):
    """A folder of three scans."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for index in range(3):
        write_noise(folder / f"{index}.nii.gz", index)
    return folder


@pytest.fixture
def run(ended):
    """`run("predict", ...)`: exit status and stderr."""
    return lambda *arguments: ended(*arguments)[::2]


@pytest.fixture
def ctrl_c():
    """As in a terminal: a process that was started in the background ignores it from the beginning."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_second(act):
    """The function, with a Ctrl-C to this process during its second call, wherever that is."""
    calls, run = [], os.getpid()

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            os.kill(run, signal.SIGINT)
        return act(*args, **kwargs)

    return interrupted


@pytest.mark.parametrize(
    ("owner", "name", "workers"),
    [
        (reading, "read_volume", 0),
        (reading, "read_volume", 1),
        (ZeroShotCTClassificationPipeline, "_forward", 1),
        (scan_commands, "prediction_rows", 1),
    ],
    ids=["reading", "reading ahead", "the model", "between scans"],
)
def test_predict_resumes_after_ctrl_c(ctrl_c, run, scans, converted, tmp_path, monkeypatch, owner, name, workers):
    options = ["--model", converted, "--cpu", "--num_workers", workers]
    assert run("predict", scans, "--output", tmp_path / "whole.csv", *options)[0] == OK
    whole = (tmp_path / "whole.csv").read_bytes()
    output = tmp_path / "out" / "scores.csv"
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupt_second(getattr(owner, name)))
        status, err = run("predict", scans, "--output", output, *options)
    assert status == INTERRUPTED
    assert (
        err.splitlines()[-1] == "stopped; `predict --output`, `embed` and `prepare` continue from here when run again."
    )
    assert "Traceback" not in err
    left = output.read_bytes()
    assert whole.startswith(left) and left.endswith(b"\n") and len(left) < len(whole)
    names = {"scores.csv", "scores.csv.failed.csv", "scores.csv.settings.json"}
    assert {path.name for path in output.parent.iterdir()} == names
    status, err = run("predict", scans, "--output", output, *options)
    assert status == OK
    if left.count(b"\n") > 1:  # a header and a row
        assert "of 3 studies are already in" in err
    assert output.read_bytes() == whole
    assert {path.name for path in output.parent.iterdir()} == names - {"scores.csv.failed.csv"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "{scans}", "--output", "{file}/scores.csv"],
        ["predict", "{scans}", "--output", "{file}/new/scores.csv"],
        ["embed", "{scans}", "--output", "{file}/index.parquet"],
        ["overview", "phantoms", "--limit", "2", "--sheet", "{file}/sheet.png"],
        ["prepare", "phantoms", "{file}/shards", "--limit", "2", "--splits", "valid"],
    ],
    ids=lambda arguments: " ".join(arguments[:1]),
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(run, scans, tmp_path, monkeypatch, arguments):
    """Below a file nobody may make a folder, whatever their rights."""
    monkeypatch.setattr(commands, "load_model", lambda *_, **__: pytest.fail("nothing is loaded for it"))
    file = tmp_path / "file"
    file.write_text("of others", encoding="utf-8")
    status, err = run(*(argument.format(scans=scans, file=file) for argument in arguments))
    assert status == FAILED
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: {file}")
    assert file.read_text(encoding="utf-8") == "of others"


@pytest.mark.slow
def test_predict_needs_no_home(scans, tmp_path):
    """For a model in a folder, neither a cache nor a folder of settings is written."""
    (tmp_path / "file").touch()
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "medct").symlink_to(PACKAGE)
    nowhere = str(tmp_path / "file" / "home")
    homes = dict.fromkeys(("HOME", "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), nowhere)
    model = shutil.copytree(PACKAGE / "phantom_base", tmp_path / "model")
    command = [sys.executable, "-m", "medct.cli", "predict", scans / "0.nii.gz", "--model", model, "--cpu"]
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | homes | {"PYTHONPATH": str(tmp_path / "path")},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == OK, done.stderr
    assert "Lung nodule" in done.stdout
    assert "Traceback" not in done.stderr
