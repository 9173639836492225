"""Training from the loopback Hub: a miniature CT-RATE and prepared shards, with faults, workers and processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ct_rate_like import BROKEN, ct_rate_files, volume_path
from huggingface_hub import HfFileSystem
from launching import launch_command

from medct import train as training
from medct.cli import main

REPO = "org/ct-rate-like"
ADDRESS = f"hf://datasets/{REPO}"


@pytest.fixture
def ct_rate(hub):
    hub.add_files("dataset", REPO, ct_rate_files())
    return hub


def volume_request(name: str) -> str:
    return rf"GET /datasets/{REPO}/resolve/\w+/{volume_path(name, 2)}"


def flags(model: Path, data: str, folder: Path) -> list[str]:
    """Two steps with two loader processes, and nothing chosen on the way."""
    values = {
        "model": model, "data": data, "output_dir": folder / "run", "max_steps": 2, "batch_size": 2, "num_workers": 2,
        "objective": "both", "rank": 4, "bootstrap_resamples": 20, "strength": 1, "eval_steps": 0, "cpu": True,
    }  # fmt: skip
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def start(hub, folder: Path, *command: object) -> subprocess.CompletedProcess:
    """A process of its own, whose Hub is the loopback one."""
    environment = hub.environment(folder / "home")
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=folder, check=False, env=environment)


def test_ct_rate_is_trained_on_from_the_hub_whatever_the_network_does(ct_rate, converted, tmp_path):
    """Nothing is downloaded first, and the two truncated volumes are the only ones that are missed."""
    ct_rate.fail("HEAD .*gitattributes", 503)
    ct_rate.fail("GET .*train_reports.csv", 500)
    ct_rate.cut_answer("GET .*train_predicted_labels.csv", after_bytes=100)
    ct_rate.fail(r"GET .*train_\d+_a_\d\.nii\.gz", 503, times=2)
    ct_rate.cut_answer(volume_request("valid_2_a_1"), after_bytes=50)
    run = start(ct_rate, tmp_path, training.__file__, *flags(converted, ADDRESS, tmp_path))
    assert run.returncode == 0, run.stderr
    assert len((tmp_path / "run/history.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    listed = [
        json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    names = [line["id"].removesuffix(".nii.gz") for line in listed]
    assert len(names) == len(set(names)) and "valid_3_a_1" in names and set(names) <= set(BROKEN)
    assert ct_rate.count(volume_request("valid_2_a_1")) == 3  # before and after training, and once more
    assert not any(fault.times for fault in ct_rate.faults)
    assert ct_rate.count(r"\w+ /api/datasets") == 0  # no listing
    assert not list((tmp_path / "home").rglob("*.nii.gz"))


@pytest.mark.slow
def test_prepared_shards_are_trained_on_from_the_hub(hub, converted, tmp_path, monkeypatch):
    hub.connect(monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    HfFileSystem.clear_instance_cache()
    main(
        [
            "prepare",
            "phantoms",
            str(tmp_path / "shards"),
            "--model",
            str(converted),
            "--limit",
            "8",
            "--push_to_hub",
            "org/shards",
        ]
    )
    for split in ("train", "valid"):
        hub.fail(f"GET .*{split}-00000", 503)
        hub.cut_answer(f"GET .*{split}-00000", after_bytes=1000)
    training.main(flags(converted, "hf://datasets/org/shards", tmp_path))
    assert "SYNTHETIC" in json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))["data"]
    assert not (tmp_path / "run/bad_samples.jsonl").exists()
    assert not any(fault.times for fault in hub.faults)


LIST_WHAT_COMES = """
import sys
from pathlib import Path
from accelerate import Accelerator
from medct import MedCTConfig, MedCTProcessor
from medct.data import StudyLoader, open_source
model, address, folder = sys.argv[1:]
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
processor = MedCTProcessor.from_pretrained(model)
config = MedCTConfig.from_pretrained(model)
source = open_source(address, "train", config, tune_share=0)
loader = StudyLoader(
    source, processor, config.label_names, batch_size=2, with_text=True, seed=3, num_workers=2,
    rank=accelerator.process_index, world_size=accelerator.num_processes,
)
for epoch in range(2):
    names = [name for batch in loader for name in batch["ids"]]
    Path(folder, f"{epoch}-{accelerator.process_index}").write_text("\\n".join(names))
accelerator.wait_for_everyone()
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_with_two_workers_each_see_every_study_once(ct_rate, converted, tmp_path):
    """Launched by accelerate, over the stream from the Hub, with faults, in each of two epochs."""
    ct_rate.fail(r"GET .*\.nii\.gz", 503, times=3)
    script = tmp_path / "list_what_comes.py"
    script.write_text(LIST_WHAT_COMES, encoding="utf-8")
    _, *command = launch_command(converted, ADDRESS, tmp_path, processes=2, script=script)
    run = start(ct_rate, tmp_path, *command)
    assert run.returncode == 0, run.stderr
    scans = {f"train_{patient}_a" for patient in (1, 3, 4, 7, 8, 10, 11, 12)} | {"train_10_b"}  # usable and sound
    for epoch in range(2):
        parts = [(tmp_path / f"{epoch}-{rank}").read_text(encoding="utf-8").split() for rank in range(2)]
        assert all(parts)
        assert sorted(name.rpartition("_")[0] for part in parts for name in part) == sorted(scans)
