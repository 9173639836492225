"""Training: the adapter that comes out, the base that stays, and what stops a run."""

import dataclasses
import json
import subprocess
import sys

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForFeatureExtraction, PeftModel
from safetensors.torch import load_file

from medct import CT_CLIP_LABELS, MedCTModel, MedCTProcessor
from medct import train as training
from medct.data_medct import Collator, phantom_source
from medct.train import (
    PHANTOM_BASE,
    TrainingError,
    TrainingSettings,
    append_texts,
    evaluate_zero_shot,
    make_loader,
    number_of_steps,
    prompt_loss,
    run,
    tokenize_prompts,
)


@pytest.fixture
def settings(converted, tmp_path) -> TrainingSettings:
    """A run of seconds on the small random model."""
    return TrainingSettings(
        model=str(converted),
        output_dir=str(tmp_path / "run"),
        rank=4,
        batch_size=8,
        phantom_train_patients=24,
        phantom_eval_patients=30,
        num_workers=0,
        cpu=True,
    )


@pytest.fixture
def ct_rate(tmp_path):
    """A folder in CT-RATE's layout with 8 + 6 scans."""
    root = tmp_path / "ct_rate"
    root.mkdir()
    for split, count in (("train", 8), ("valid", 6)):
        names = [f"{split}_{index}_a_1.nii.gz" for index in range(count)]
        labels = {name: [index % 2 for index in range(count)] for name in CT_CLIP_LABELS}
        pd.DataFrame({"VolumeName": names, **labels}).to_csv(root / f"{split}_predicted_labels.csv", index=False)
        texts = {"Findings_EN": "present", "Impressions_EN": "not present"}
        pd.DataFrame({"VolumeName": names, **texts}).to_csv(root / f"{split}_reports.csv", index=False)
        for index, name in enumerate(names):
            voxels = np.random.default_rng(index).integers(-1000, 1000, (6, 8, 5)).astype(np.int16)
            nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-2.0, -2, 3, 1])), root / name)
    return root


def scores_of(model, processor: MedCTProcessor, settings: TrainingSettings) -> dict[str, float]:
    source = phantom_source("B", range(settings.phantom_eval_patients), settings.seed)
    loader = make_loader(source, settings, Collator(processor, CT_CLIP_LABELS, with_text=False), shuffle=False)
    accelerator = Accelerator(cpu=True)
    prompts = tokenize_prompts(model.config, processor)
    return evaluate_zero_shot(model, accelerator.prepare(loader), prompts, accelerator, "score")


@pytest.mark.parametrize("objective", ["both", "contrastive", "prompts"])
def test_a_run_leaves_an_adapter_that_loads_with_equal_logits(
    settings, objective, converted, processor, batch, tmp_path
):
    results = run(dataclasses.replace(settings, objective=objective))
    folder = tmp_path / "run"
    weights = load_file(folder / "adapter_model.safetensors")
    for encoder in ("vision_model", "text_model"):
        updated = [tensor for name, tensor in weights.items() if encoder in name and "lora_B" in name]
        assert updated
        assert all(tensor.abs().max() > 0 for tensor in updated)

    base = MedCTModel.from_pretrained(converted).eval()
    with torch.no_grad():
        untouched = base(**batch).logits_per_image
        adapted = PeftModel.from_pretrained(base, folder).eval()(**batch).logits_per_image
        auto = AutoPeftModelForFeatureExtraction.from_pretrained(folder, trust_remote_code=True).eval()
        assert torch.equal(auto(**batch).logits_per_image, adapted)
    assert not torch.equal(adapted, untouched)
    assert scores_of(auto.base_model.model, processor, settings) == pytest.approx(results["adapted"], nan_ok=True)

    assert json.loads((folder / "results.json").read_text())["steps"] == results["steps"] == 3
    assert json.loads((folder / "train_config.json").read_text())["objective"] == objective
    assert "SYNTHETIC" in (folder / "README.md").read_text()
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"


def test_same_seed_same_numbers(settings, tmp_path):
    first = run(settings)
    second = run(dataclasses.replace(settings, output_dir=str(tmp_path / "again")))
    for results in (first, second):
        results.pop("seconds")
    assert json.dumps(first) == json.dumps(second)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("run", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    config = [(tmp_path / name / "adapter_config.json").read_text() for name in ("run", "again")]
    assert config[0] == config[1]


def test_loader_processes_change_no_study(settings, processor):
    source = phantom_source("A", range(12), 0)
    collator = Collator(processor, CT_CLIP_LABELS, with_text=False)

    def labels(num_workers: int) -> list[list[float]]:
        loader = make_loader(
            source, dataclasses.replace(settings, num_workers=num_workers, batch_size=2), collator, True
        )
        return sorted(row for batch in loader for row in batch["labels"].tolist())

    assert labels(0) == labels(2)


def test_gradient_checkpointing_trains_the_same_adapter(settings, tmp_path):
    run(settings)
    run(dataclasses.replace(settings, gradient_checkpointing=True, output_dir=str(tmp_path / "again")))
    plain, checkpointed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "again"))
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, atol=1e-5, rtol=1e-3)


def test_a_changed_base_stops_the_run_and_nothing_is_saved(settings, monkeypatch, tmp_path):
    def careless(model, *arguments):
        model.base_model.model.vision_model.quantizer.codebook[0, 0] += 1
        return model

    monkeypatch.setattr(training, "train", careless)
    with pytest.raises(TrainingError, match="base changed"):
        run(settings)
    assert not list(tmp_path.glob("*run*"))


def test_trains_on_a_folder_in_ct_rates_layout(settings, ct_rate):
    results = run(dataclasses.replace(settings, data=str(ct_rate), batch_size=4))
    assert results["steps"] == 2
    assert results["base"]["scans"] == 6
    assert "SYNTHETIC" not in results["measured_on"]


def test_all_reports_and_prompts_are_one_batch_of_texts():
    reports = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    prompts = {"input_ids": torch.ones(3, 2, dtype=torch.long), "attention_mask": torch.ones(3, 2, dtype=torch.long)}
    together = append_texts(reports, prompts, pad_id=9)
    assert together["input_ids"].shape == (5, 5)
    assert together["input_ids"][4].tolist() == [1, 1, 9, 9, 9]
    assert together["attention_mask"][4].tolist() == [1, 1, 0, 0, 0]


def test_prompt_loss_is_binary_cross_entropy_of_the_pairs():
    logits = torch.tensor([[2.0, 1.0, 0.0, 3.0]])
    expected = torch.nn.functional.binary_cross_entropy(torch.tensor([1.0, -3.0]).sigmoid(), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(prompt_loss(logits, torch.tensor([[1, 0]])), expected)


def test_number_of_steps(settings):
    source = phantom_source("A", range(50), 0)
    assert number_of_steps(source, dataclasses.replace(settings, epochs=3), processes=2) == 9
    assert number_of_steps(source, dataclasses.replace(settings, max_steps=2), processes=1) == 2
    with pytest.raises(TrainingError, match="50 training studies do not fill one batch of 64"):
        number_of_steps(source, dataclasses.replace(settings, batch_size=64), processes=1)


def launch(*arguments: object, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--quiet"]
    script = [str(training.__file__), *map(str, arguments)]
    return subprocess.run([*command, *script], capture_output=True, text=True, cwd=cwd, check=False)


def test_every_flag_is_explained(tmp_path):
    assert all(field.metadata.get("help") for field in dataclasses.fields(TrainingSettings))
    shown = launch("--help", cwd=tmp_path)
    assert shown.returncode == 0
    for field in dataclasses.fields(TrainingSettings):
        assert f"--{field.name}" in shown.stdout


def test_launched_run(converted, tmp_path):
    arguments = {
        "model": converted,
        "output_dir": "run",
        "phantom_train_patients": 8,
        "phantom_eval_patients": 20,
        "batch_size": 4,
    }
    run = launch(*(part for name, value in arguments.items() for part in (f"--{name}", value)), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "trainable parameters: " in run.stdout
    assert "| **mean** |" in run.stdout
    assert "train: 100%" in run.stderr
    assert (tmp_path / "run/adapter_model.safetensors").is_file()


def last_line_of_failure(run: subprocess.CompletedProcess) -> str:
    assert run.returncode == 1
    assert "Traceback" not in run.stderr, run.stderr
    return run.stderr.strip().splitlines()[-1]


def test_bad_input_ends_in_one_line(converted, ct_rate, tmp_path):
    missing = launch("--model", converted, "--data", "nowhere", "--output_dir", "run", cwd=tmp_path)
    assert last_line_of_failure(missing).startswith("error: nowhere: no such folder.")
    stranger = launch("--model", "nowhere", "--output_dir", "run", cwd=tmp_path)
    assert last_line_of_failure(stranger).startswith("error: nowhere: no model (")

    voxels = np.full((6, 8, 5), np.nan, np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), ct_rate / "valid_3_a_1.nii.gz")
    broken = launch("--model", converted, "--data", ct_rate, "--output_dir", "run", cwd=tmp_path)
    assert "valid_3_a_1.nii.gz: 240 of its 240 voxels are NaN" in last_line_of_failure(broken)
    assert not list(tmp_path.glob("*run*"))


def test_the_phantom_base_knows_site_a():
    """Fewer patients than the figures in README are measured on, so that the test takes seconds."""
    model, processor = MedCTModel.from_pretrained(PHANTOM_BASE), MedCTProcessor.from_pretrained(PHANTOM_BASE)
    source = phantom_source("A", range(100), 0)
    settings = TrainingSettings(num_workers=2)
    loader = make_loader(source, settings, Collator(processor, CT_CLIP_LABELS, with_text=False), shuffle=False)
    accelerator = Accelerator(cpu=True)
    prompts = tokenize_prompts(model.config, processor)
    assert evaluate_zero_shot(model, accelerator.prepare(loader), prompts, accelerator, "score")["auroc"] > 0.75


@pytest.mark.slow
def test_default_run_lifts_the_base_by_the_papers_difference(tmp_path):
    run = launch("--output_dir", "run", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["base"]["auroc"] > 0.60
    assert results["auroc_difference"] >= 0.076
