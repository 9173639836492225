"""Training: the adapter that comes out, the base that stays as it is, stopping and resuming, and what ends a run."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from ct_rate_like import BROKEN, ct_rate_files, write_files
from launching import QUICKLY, launch_command
from peft import AutoPeftModelForFeatureExtraction, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from medct import CT_CLIP_LABELS, MedCTForImageClassification, MedCTModel, MedCTProcessor
from medct import train as training
from medct.cli import main
from medct.common.distributed import LaunchError
from medct.common.errors import FAILED, STOPPED, StoppedError
from medct.common.files import OtherSettingsError
from medct.common.lock import LockedError, only_run
from medct.data import DataError, StudyLoader, phantom_source
from medct.evaluation.metrics import zero_shot_scores
from medct.evaluation.predictions import Key, read_predictions
from medct.evaluation.scoring import ScoredStudies, prompts_for, score_studies
from medct.publishing.push import push_model
from medct.train import Trainer, number_of_steps, run
from medct.training.checkpoints import Checkpoints
from medct.training.launch import make_accelerator
from medct.training.lora import TARGETS, VARIANTS, add_lora
from medct.training.objectives import StepLoss
from medct.training.results import ADAPTED, BASE
from medct.training.settings import PHANTOM_BASE, TrainingError, TrainingSettings

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "calibration.png",
    "history.jsonl",
    "medct_adapter.json",
    "results.json",
    "results.studies.csv",
    "roc.png",
    "train_config.json",
}


@pytest.fixture
def settings(small_run) -> TrainingSettings:
    return dataclasses.replace(small_run, recipe="paper", learning_rate=3e-3)


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def scores_of(model: MedCTModel, processor: MedCTProcessor, patients: int, site: str = "B") -> ScoredStudies:
    source = phantom_source(site, range(patients), 0)
    loader = StudyLoader(source, processor, CT_CLIP_LABELS, batch_size=8, with_text=False)
    prompts = prompts_for(model, processor)
    return score_studies(model, loader, prompts, Accelerator(cpu=True), "score")


@pytest.mark.parametrize("objective", ["both", "contrastive", "prompts"])
def test_a_run_leaves_an_adapter_that_loads_with_equal_logits(
    settings, objective, converted, processor, batch, tmp_path
):
    results = run(dataclasses.replace(settings, objective=objective))
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == FILES
    assert not (tmp_path / "run.unfinished").exists()
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

    scored = scores_of(auto.base_model.model, processor, settings.phantom_eval_patients)
    written = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(results))
    aurocs = training.zero_shot_scores(scored.scores, scored.labels, CT_CLIP_LABELS)
    for name in ("auroc", "auroc/Lung nodule"):
        assert written["comparison"]["adapted"][name]["value"] == pytest.approx(aurocs[name], abs=1e-6)
    assert written["steps"] == len(losses(folder)) == 6
    assert written["synthetic"] is True
    assert written["thresholds"].keys() <= set(CT_CLIP_LABELS)
    assert json.loads((folder / "train_config.json").read_text(encoding="utf-8"))["objective"] == objective
    assert "SYNTHETIC" in (folder / "README.md").read_text(encoding="utf-8")
    assert json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["task_type"] == "FEATURE_EXTRACTION"


def test_what_was_reported_is_repeated_to_the_digit(settings, tmp_path, capsys):
    """From `results.json` alone, another command scores the same studies with both models again."""
    run(dataclasses.replace(settings, sensitivity=0.8, keep="phantoms:A", replay="phantoms:A", seed=3))
    folder = tmp_path / "run"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    points = results["comparison"]["operating_points"]
    assert list(points) == ["base", "adapted"] and list(points["adapted"]) == ["youden", "sensitivity 0.8"]
    described = json.loads((folder / "medct_adapter.json").read_text(encoding="utf-8"))
    assert described["operating_points"] == {"sensitivity 0.8": points["adapted"]["sensitivity 0.8"]["thresholds"]}
    assert described["thresholds"] == points["adapted"]["youden"]["thresholds"]
    capsys.readouterr()
    assert main(["evaluate", "--repeat", str(folder / "results.json"), "--cpu", "--num_workers", "0"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"repeated: \d{3,} figures are the same to the last digit, 0 are not\n", said), said
    # The scores of every study are there, too, and give the same figures.
    predictions = read_predictions(folder / "results.studies.csv")
    splits = {(key.model, key.split, len(each.ids)) for key, each in predictions.scored.items()}
    assert splits == {(model, *split) for model in ("base", "adapted") for split in (("tune", 12), ("valid", 20))}
    held_out = predictions.scored[Key("adapted", "phantoms", "valid")]
    found = zero_shot_scores(held_out.scores, held_out.labels, CT_CLIP_LABELS)
    assert found["auroc"] == results["comparison"]["adapted"]["auroc"]["value"]
    rows = (folder / "results.studies.csv").read_text(encoding="utf-8").splitlines()
    # Those of the new site, and as many replayed ones as stand between them in the only pass.
    for source, name, count in (("phantoms", "phantom_b_", 24), ("phantoms:A", "phantom_a_", 6)):
        assert sum(line.startswith(f",{source},train,{name}") for line in rows) == count


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"lora"}))
@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_each_variant_is_saved_for_the_unaltered_base(settings, variant, converted, batch, tmp_path):
    trainer = Trainer(dataclasses.replace(settings, adaptation=variant, max_steps=2))
    trainer.run()
    base = MedCTModel.from_pretrained(converted).eval()
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, tmp_path / "run").eval()(**batch).logits_per_image
        trained = trainer.base.eval()(**batch).logits_per_image
    torch.testing.assert_close(adapted, trained, atol=1e-4, rtol=0)


def test_a_trained_logit_scale_is_saved_with_the_adapter(settings, converted, tmp_path):
    run(dataclasses.replace(settings, train_logit_scale=True))
    loaded = PeftModel.from_pretrained(MedCTModel.from_pretrained(converted), tmp_path / "run")
    scale = loaded.base_model.model.logit_scale
    assert scale.modules_to_save["default"].weight != scale.original_module.weight


@pytest.mark.parametrize("targets", sorted(TARGETS))
def test_targets_say_whose_layers_are_trained(converted, targets):
    adapted = add_lora(MedCTModel.from_pretrained(converted), targets=targets)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("vision_model" in name for name in names) == (targets != "text")
    assert any("text_model" in name for name in names) == (targets not in ("vision", "vision-all"))
    assert any("visual_projection" in name for name in names) == (targets in ("both+projections", "all"))
    assert any("mlp.fc1" in name for name in names) == (targets in ("all", "vision-all"))
    assert any("intermediate.dense" in name for name in names) == (targets == "all")
    assert any("embeddings.projection" in name for name in names) == (targets == "vision-all")


def test_full_fine_tuning_saves_a_model(settings, converted, batch, tmp_path):
    whole = {"adaptation": "full", "targets": "all", "rank": None, "alpha": None, "learning_rate": 1e-4}
    trainer = Trainer(dataclasses.replace(settings, **whole))
    results = trainer.run()
    assert results["trainable_parameters"] == results["total_parameters"]
    model = MedCTModel.from_pretrained(tmp_path / "run").eval()
    MedCTProcessor.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits_per_image, trainer.base.eval()(**batch).logits_per_image)
    codebooks = [each.vision_model.quantizer.codebook for each in (model, MedCTModel.from_pretrained(converted))]
    assert torch.equal(*codebooks)


def test_a_classifier_learns_and_its_adapter_brings_the_head(settings, classifier_folder, batch, tmp_path):
    # One batch, seen again and again, so that its losses compare.
    one_batch = {
        "phantom_train_patients": settings.batch_size,
        "accumulation_steps": 1,
        "epochs": 30,
        "max_steps": None,
    }
    settings = dataclasses.replace(settings, model=str(classifier_folder), replay="none", strength="1", **one_batch)
    trainer = Trainer(settings)
    results = trainer.run()
    assert results["measured_on"].startswith("With its head")
    found = losses(tmp_path / "run")
    assert np.mean(found[-5:]) < np.mean(found[:5])  # its head drops features, so single losses scatter
    loaded = MedCTForImageClassification.from_pretrained(classifier_folder)
    before = loaded.eval()(batch["pixel_values"]).logits
    loaded.load_adapter(str(tmp_path / "run"))
    after = loaded.eval()(batch["pixel_values"]).logits
    assert torch.equal(after, trainer.base.eval()(batch["pixel_values"]).logits)
    assert not torch.allclose(after, before)
    head = "classifier.modules_to_save.default.weight"
    assert not torch.equal(loaded.get_parameter(head), loaded.classifier.original_module.weight)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "run").classifier is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [("objective", "both"), ("targets", "text"), ("train_logit_scale", True), ("adaptation", "pissa")],
)
def test_what_a_classifier_cannot_learn_is_refused(settings, classifier_folder, name, value):
    with pytest.raises(TrainingError, match=f"--{name} .* is a classifier"):
        Trainer(dataclasses.replace(settings, model=str(classifier_folder), **{name: value}))


@pytest.mark.slow  # runs that were stopped show it as well
def test_same_seed_same_numbers(settings, tmp_path):
    first = run(settings)
    second = run(dataclasses.replace(settings, output_dir=str(tmp_path / "again")))
    for results in (first, second):
        results.pop("seconds")
    assert json.dumps(first) == json.dumps(second)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "again")
    config = [(tmp_path / name / "adapter_config.json").read_text(encoding="utf-8") for name in ("run", "again")]
    assert config[0] == config[1]


def test_gradient_checkpointing_trains_the_same_adapter(settings, tmp_path):
    run(settings)
    run(dataclasses.replace(settings, gradient_checkpointing=True, output_dir=str(tmp_path / "again")))
    plain, checkpointed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "again"))
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_bfloat16_learns_what_float32_learns(settings, tmp_path):
    """On the trained base: with random weights more and more tokens take other codebook rows with each step."""
    model = MedCTModel.from_pretrained(PHANTOM_BASE)
    model.config.text_config.hidden_dropout_prob = model.config.text_config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(tmp_path / "base")
    MedCTProcessor.from_pretrained(PHANTOM_BASE).save_pretrained(tmp_path / "base")
    settings = dataclasses.replace(settings, model=str(tmp_path / "base"), accumulation_steps=2)
    run(settings)
    launched = launch(*flags(settings, output_dir=tmp_path / "bf16"), cwd=tmp_path, precision="bf16")
    assert launched.returncode == 0, launched.stderr
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "run"), abs=0.02)
    assert "NOTE: Scored in bf16" in launched.stdout
    assert losses(tmp_path / "bf16") != losses(tmp_path / "run")
    weights = load_file(tmp_path / "bf16/adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in weights} == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_encoder_trains_the_same_adapter(settings, tmp_path):
    run(settings)
    run(dataclasses.replace(settings, compile=True, output_dir=str(tmp_path / "again")))
    plain, compiled = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "again"))
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, atol=1e-4, rtol=1e-3)


def test_a_changed_base_stops_the_run_and_nothing_is_saved(settings, monkeypatch, tmp_path):
    def careless(self, model):
        self.base.vision_model.quantizer.codebook[0, 0] += 1

    monkeypatch.setattr(Trainer, "_train", careless)
    with pytest.raises(TrainingError, match="base changed"):
        run(settings)
    assert not (tmp_path / "run").exists()


def at_the_end_of_step(monkeypatch, step: int, action) -> None:
    """Do something at the end of a step, once."""
    whole_step = Trainer._step

    def interrupted(self, model, state, *inputs):
        figures = whole_step(self, model, state, *inputs)
        if state.step == step:
            monkeypatch.setattr(Trainer, "_step", whole_step)
            action()
        return figures

    monkeypatch.setattr(Trainer, "_step", interrupted)


class PowerCutError(BaseException):
    """Nothing handles it."""


def cut_power() -> None:
    raise PowerCutError


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "step, variant",
    [(1, "lora"), pytest.param(4, "pissa", marks=pytest.mark.slow), pytest.param(5, "lora", marks=pytest.mark.slow)],
)
def test_a_resumed_run_equals_one_that_never_stopped(settings, step, variant, monkeypatch, tmp_path):
    """Before the first checkpoint and in the second of two epochs, with dropout and with scores in between."""
    settings = dataclasses.replace(
        settings, adaptation=variant, epochs=2, phantom_train_patients=12, dropout=0.1, objective="both",
        checkpoint_steps=2, eval_steps=3,
    )  # fmt: skip
    run(settings)
    stopped = dataclasses.replace(settings, output_dir=str(tmp_path / "stopped"))
    at_the_end_of_step(monkeypatch, step, cut_power)
    with pytest.raises(PowerCutError):
        run(stopped)
    assert not (tmp_path / "stopped").exists()
    torch.rand(7)  # whatever the random state is by then
    run(dataclasses.replace(stopped, resume=True, num_workers=1))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "run")
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "run")
    results = [
        json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8")) for name in ("run", "stopped")
    ]
    assert results[0]["comparison"] == results[1]["comparison"]


def flags(settings: TrainingSettings, **changes) -> list[str]:
    values = dataclasses.asdict(dataclasses.replace(settings, **changes))
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


@pytest.fixture
def ctrl_c():
    """As in a terminal: a process that was started in the background ignores it from the beginning."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) == signal.default_int_handler


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_saves_and_has_an_exit_code_of_its_own(settings, name, ctrl_c, monkeypatch, tmp_path, capsys):
    run(settings)
    arguments = flags(settings, output_dir=tmp_path / "stopped here")
    at_the_end_of_step(monkeypatch, 3, terminate if name == "SIGTERM" else ctrl_c)
    with pytest.raises(SystemExit) as stop:
        training.main(arguments)
    assert stop.value.code == STOPPED
    *_, line = capsys.readouterr().err.splitlines()
    assert line.endswith(f"stopped by {name} after step 3 of 6. The same command with --output_dir "
                         f"'{tmp_path}/stopped here' --resume continues it.")  # fmt: skip
    assert [path.name for path in (tmp_path / "stopped here.unfinished/checkpoints").iterdir()] == ["step-00000003"]
    training.main([*arguments, "--resume", "True"])
    assert adapter_bytes(tmp_path / "stopped here") == adapter_bytes(tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_while_the_last_checkpoint_is_written_ends_the_run(settings, monkeypatch):
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda *each: save(*each) and terminate())
    with pytest.raises(StoppedError, match=r"stopped by SIGTERM after step 1 of 1\. .* --resume continues it"):
        run(dataclasses.replace(settings, max_steps=1, eval_steps=0))


def test_each_step_is_of_whole_batches_and_begins_without_gradients(settings, monkeypatch):
    """What is not trained has no dropout."""
    seen, backward = [], StepLoss.backward

    def watched(self, model, micro_batches, *more):
        has_gradients = any(parameter.grad is not None for parameter in model.parameters())
        sizes = [len(batch["pixel_values"]) for batch in micro_batches]
        seen.append((has_gradients, sizes, model.vision_model.training, model.text_model.training))
        return backward(self, model, micro_batches, *more)

    monkeypatch.setattr(StepLoss, "backward", watched)
    run(dataclasses.replace(settings, targets="vision", batch_size=5, phantom_train_patients=12, epochs=2))
    assert seen == [(False, [5], True, False)] * 4


def test_a_second_ctrl_c_is_not_put_off(settings, ctrl_c, monkeypatch, tmp_path, capsys):
    run(settings)
    arguments = flags(settings, output_dir=tmp_path / "stopped", checkpoint_steps=2)
    at_the_end_of_step(monkeypatch, 3, lambda: (ctrl_c(), ctrl_c(), pytest.fail("goes on")))
    with pytest.raises(SystemExit, match=str(STOPPED)):
        training.main(arguments)
    assert "stopped. The same command with" in capsys.readouterr().err.splitlines()[-1]
    training.main([*arguments, "--resume", "True"])
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "run")


@pytest.mark.parametrize("when", ["score_base", "_choose_strength"])
def test_ctrl_c_before_and_after_the_steps_is_told_in_a_line(settings, when, ctrl_c, monkeypatch, tmp_path, capsys):
    arguments = flags(settings, output_dir=tmp_path / "stopped")
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, when, lambda *_: ctrl_c())
        with pytest.raises(SystemExit, match=str(STOPPED)):
            training.main(arguments)
    assert "stopped. The same command with" in capsys.readouterr().err.splitlines()[-1]
    training.main([*arguments, "--resume", "True"])
    assert (tmp_path / "stopped/adapter_model.safetensors").is_file()


def test_a_run_in_the_background_ignores_the_ctrl_c_of_others(settings, monkeypatch, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        at_the_end_of_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        run(settings)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(losses(tmp_path / "run")) == 6


def test_an_output_that_another_run_writes_is_refused(settings, monkeypatch, tmp_path):
    """Whether that one is to be resumed or not, and also if it begins while this one loads the base."""
    settings = dataclasses.replace(settings, resume=True)
    for resume in (False, True):
        with only_run(tmp_path / "run"), pytest.raises(LockedError, match="is being written by another run"):
            run(dataclasses.replace(settings, resume=resume))
    with contextlib.ExitStack() as stack:
        trainer = Trainer(settings)
        monkeypatch.setattr(training, "Trainer", lambda _: trainer)
        stack.enter_context(only_run(tmp_path / "run"))
        with pytest.raises(LockedError, match="is being written by another run"):
            run(settings)


def test_a_run_needs_nothing_that_other_systems_lack(settings, monkeypatch, tmp_path):
    """As on macOS and Windows: no reserve of the system's own, no report of memory, no signals, no processes forked."""
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr("medct.common.host.resource", None)

    def refuse(*_):
        raise ValueError("signal only works in main thread of the main interpreter")

    monkeypatch.setattr(signal, "signal", refuse)
    run(settings)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def test_files_have_the_permissions_that_the_umask_says(settings, tmp_path):
    umask = os.umask(0)
    os.umask(umask)
    run(dataclasses.replace(settings, max_steps=1))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir()}
    assert modes == dict.fromkeys(FILES, 0o666 & ~umask)


@pytest.mark.parametrize(
    "place", ["medct.evaluation.scoring.refuse_what_is_no_number", "medct.train.StepLoss.backward"]
)
def test_an_error_that_is_kept_keeps_no_loader_processes(settings, place, monkeypatch):
    """As a notebook keeps the last, with its frames and all that they hold."""
    monkeypatch.setattr(place, lambda *_: cut_power())
    with pytest.raises(PowerCutError) as kept:
        run(dataclasses.replace(settings, num_workers=1))
    assert kept.tb and not multiprocessing.active_children()


def test_resume_starts_where_there_is_nothing_to_resume(settings, tmp_path):
    run(dataclasses.replace(settings, resume=True))
    assert len(losses(tmp_path / "run")) == 6


def test_a_run_is_not_resumed_by_accident_or_with_other_settings(settings, monkeypatch):
    at_the_end_of_step(monkeypatch, 3, terminate)
    with pytest.raises(StoppedError):
        run(settings)
    with pytest.raises(TrainingError, match="Pass --resume to continue"):
        run(settings)
    with pytest.raises(OtherSettingsError, match="rank 4, not 8"):
        run(dataclasses.replace(settings, resume=True, rank=8))


def test_what_a_run_left_before_its_first_checkpoint_is_not_taken_for_anothers(settings, monkeypatch):
    """Such as what its base scored, and the matrices that PiSSA begins with."""
    monkeypatch.setattr("medct.train.Trainer.score_base", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(settings)
    for other in ({"templates": ["{label} seen.|No {label} seen."]}, {"adaptation": "pissa"}):
        with pytest.raises(
            OtherSettingsError, match=r"was started with (labels, prompts .*|adaptation 'lora', not 'pissa')"
        ):
            run(dataclasses.replace(settings, resume=True, **other))


def test_a_run_is_what_its_settings_its_launch_and_its_base_say(settings, monkeypatch):
    """Each of these changes what is computed, so none may change when a run is resumed."""
    trainer = Trainer(settings)
    fixed = trainer._fixed()
    changes = {
        "processes": (trainer.accelerator.state, "num_processes", 2),
        "mixed precision": (trainer.accelerator.state, "_mixed_precision", "bf16"),
        "the base's weights": (trainer, "fingerprint", "another"),
        "the base's preprocessing": (trainer.config.vision_config, "hu_min", -900),
        "fsdp2": (trainer, "settings", dataclasses.replace(trainer.settings, fsdp2=True)),
    }
    for name, change in changes.items():
        with monkeypatch.context() as patched:
            patched.setattr(*change)
            assert {key for key, value in trainer._fixed().items() if value != fixed[key]} == {name}
    moved = dataclasses.replace(trainer.settings, model="elsewhere", revision="main")
    monkeypatch.setattr(trainer, "settings", moved)
    assert trainer._fixed() == fixed  # of the same weights, which may lie anywhere


def test_a_full_disk_costs_no_finished_adapter(settings, monkeypatch, tmp_path):
    """Checkpoints are skipped with a warning, and the reserved space is enough for the end."""
    reserve = tmp_path / "run.unfinished" / ".reserve"
    save, was_released = training.save_weights, []

    def full(*_):
        raise OSError(28, "No space left on device")

    def save_after_release(*arguments):
        was_released.append(not reserve.exists())
        return save(*arguments)

    def reserved_bytes() -> None:
        was_released.append(reserve.stat().st_size > 2**22)

    monkeypatch.setattr("medct.training.checkpoints.save_file", full)
    monkeypatch.setattr(training, "save_weights", save_after_release)
    at_the_end_of_step(monkeypatch, 2, reserved_bytes)
    with pytest.warns(UserWarning, match=r"no checkpoint was written .*No space left"):
        run(settings)
    assert was_released == [True, True]
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert sum(path.stat().st_size for path in (tmp_path / "run").iterdir()) < 2**22


def test_only_the_last_checkpoints_are_kept(settings, monkeypatch, tmp_path):
    at_the_end_of_step(monkeypatch, 6, cut_power)
    with pytest.raises(PowerCutError):
        run(dataclasses.replace(settings, checkpoint_steps=1, keep_checkpoints=2))
    kept = sorted(path.name for path in (tmp_path / "run.unfinished/checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000005"]


@pytest.fixture
def ct_rate(tmp_path) -> Path:
    """A miniature CT-RATE with its known faults."""
    return write_files(tmp_path / "ct_rate", ct_rate_files())


def test_bad_studies_are_listed_beside_the_adapter(settings, ct_rate, tmp_path):
    settings = dataclasses.replace(settings, data=str(ct_rate), batch_size=2)
    results = run(settings)
    listed = [
        json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {line["id"].removesuffix(".nii.gz") for line in listed} == set(BROKEN)
    assert all(line["reason"] for line in listed)
    assert results["synthetic"] is False
    assert "SYNTHETIC" not in (tmp_path / "run/README.md").read_text(encoding="utf-8")
    with pytest.raises(DataError, match=r"(train_6|valid_3)_a_1.nii.gz cannot be used"):
        run(dataclasses.replace(settings, on_bad_sample="raise", output_dir=str(tmp_path / "again")))


def test_models_are_compared_on_the_studies_that_both_have_scored(settings, monkeypatch, tmp_path):
    """What one pass could not read, as its loader process was killed, may be there in the next."""

    def lossy(*arguments):
        found = score_studies(*arguments)
        rows = list(range(len(found.ids)))
        return found.take(rows[1:] if "base" in arguments[-1] else rows[:-1])

    monkeypatch.setattr(training, "score_studies", lossy)
    few = {"max_steps": 1, "phantom_train_patients": 4, "phantom_tune_patients": 8, "phantom_eval_patients": 10}
    results = run(dataclasses.replace(settings, **few))
    scored = read_predictions(tmp_path / "run/results.studies.csv").scored
    base, adapted = held_out = [each for key, each in scored.items() if key.split == "valid"]
    assert base.ids == adapted.ids and len(base.ids) == results["comparison"]["scans"] == 8
    for model, each in zip((BASE, ADAPTED), held_out, strict=True):
        expected = zero_shot_scores(each.scores, each.labels, each.names)["auroc"]
        assert results["comparison"][model]["auroc"]["value"] == pytest.approx(expected)


def test_studies_are_loaded_as_the_settings_and_the_launch_say(settings, processor, tmp_path):
    asked = {"batch_size": 3, "num_workers": 2, "on_bad_sample": "raise", "max_bad_share": 0.5}
    trainer = SimpleNamespace(
        settings=dataclasses.replace(settings, **asked),
        sources={"tune": phantom_source("A", range(2), 0)},
        processor=processor,
        config=SimpleNamespace(label_names=CT_CLIP_LABELS),
        accelerator=SimpleNamespace(process_index=1, num_processes=3, device="cpu"),
        folder=SimpleNamespace(bad_samples=tmp_path),
    )
    loader = Trainer.loader(trainer, "tune", with_text=False)
    assert {name: getattr(loader, name) for name in asked} == asked
    assert (loader.rank, loader.world_size, loader.bad_samples_file) == (1, 3, tmp_path)


def test_number_of_steps(settings):
    source = phantom_source("A", range(50), 0)
    assert number_of_steps(source, dataclasses.replace(settings, batch_size=8, epochs=3), processes=2) == 9
    assert number_of_steps(source, dataclasses.replace(settings, accumulation_steps=2), processes=2) == 3
    assert number_of_steps(source, dataclasses.replace(settings, max_steps=2), processes=1) == 2
    # 7 batches a pass, so that steps of 4 begin in one pass and end in the next: 10 passes, not 10 of 4 batches each.
    of_seven = dataclasses.replace(settings, batch_size=7, accumulation_steps=4, epochs=10)
    assert number_of_steps(source, of_seven, processes=1) == 7 * 10 // 4
    with pytest.raises(TrainingError, match="50 training studies do not fill one step of 64"):
        number_of_steps(source, dataclasses.replace(settings, batch_size=64), processes=1)
    with pytest.raises(TrainingError, match="Lower --batch_size, --accumulation_steps or the number of processes"):
        number_of_steps(source, dataclasses.replace(settings, batch_size=1), processes=51)


def test_the_optimizer_is_set_as_the_settings_say(settings, monkeypatch, tmp_path):
    """A warm-up of a tenth of the steps, then a cosine; `max_steps` goes before the epochs."""
    used = {}

    class Optimizer(torch.optim.AdamW):
        def __init__(self, parameters, **options):
            used.update(options)
            super().__init__(parameters, **options)

    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda weights, norm: used.update(norm=norm) or clip(weights, norm)
    )
    run(dataclasses.replace(settings, weight_decay=0.25, max_grad_norm=0.5, batch_size=1, max_steps=20))
    assert used == {"lr": 3e-3, "weight_decay": 0.25, "norm": 0.5}
    lines = (tmp_path / "run/history.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    cosine = [(1 + math.cos(math.pi * (step - 2) / 18)) / 2 for step in range(2, 20)]
    assert rates == pytest.approx([3e-3 * share for share in (0, 0.5, *cosine)])


def test_a_loss_that_is_not_finite_ends_the_run(settings, monkeypatch, tmp_path):
    monkeypatch.setattr("medct.train.StepLoss.backward", lambda *_: torch.tensor(math.nan))
    with pytest.raises(TrainingError, match="loss became nan in step 1"):
        run(settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["valid", "keep_valid"])
def test_held_out_studies_that_no_figure_can_come_from_are_refused_before_any_training(split):
    def scored(labels: list[float]) -> ScoredStudies:
        return ScoredStudies(["1", "2"], ["1", "2"], np.full((2, 1), 0.5), np.array(labels)[:, None], names=["nodule"])

    sources = {name: SimpleNamespace(description=f"2 studies of {name}") for name in ("valid", "keep_valid")}
    before = {name: scored([0, 0] if name == split else [0, 1]) for name in sources}
    with pytest.raises(TrainingError, match=f"2 studies of {split}: There is nothing to score"):
        Trainer._check_labels(SimpleNamespace(sources=sources), before)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rank": 0}, "--rank is 0"),
        ({"patience": 0}, "--patience is 0"),
        ({"eval_steps": -1}, "0 for never"),
        ({"replay_share": 1.0}, "--replay_share is 1"),
        ({"max_forgotten": 2.0}, "--max_forgotten is 2"),
        ({"replay": "phantoms"}, "--replay names the source of --data"),
        ({"keep": "phantoms"}, "--keep names the source of --data"),
        ({"data": "scans", "replay": "./scans/", "folds": 3}, "--replay names the source of --data"),
        ({"data": "scans", "keep": "there/../scans"}, "--keep names the source of --data"),
        ({"keep": "phantoms:D"}, "no such site"),
        ({"push_to_hub": True}, "--hub_model_id"),
        ({"push_to_hub": True, "hub_model_id": "org/site-b"}, "--hub_base"),
        ({"resume": True, "output_dir": None}, "--output_dir"),
        ({"fsdp2": True, "adaptation": "pissa"}, "from a sharded model"),
        ({"fsdp2": True}, "Start them with `accelerate launch` or `torchrun`"),
        ({"train_logit_scale": True, "adaptation": "pissa"}, "with a logit scale"),
    ],
)
def test_nonsensical_settings_are_refused(settings, changes, said):
    with pytest.raises((TrainingError, DataError), match=said):
        run(dataclasses.replace(settings, **changes))


@pytest.mark.parametrize(
    "asked, done_with, said",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, None, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, None, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, None, "parallelism_config"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, None, "fp8"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"compile": True}, "Pass --compile to train"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {"accumulation_steps": 4}, "Pass --accumulation_steps 4 to"),
        ({"ACCELERATE_USE_FSDP": "true"}, None, "Pass --fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, None, "fsdp_offload_par"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {"gradient_checkpointing": True},
            "Pass --gradient_checkpointing to train",
        ),
    ],
)
def test_what_accelerate_is_told_to_do_is_done_or_refused(settings, monkeypatch, asked, done_with, said):
    monkeypatch.setattr(
        "medct.training.launch.Accelerator", lambda **_: SimpleNamespace(num_processes=1, mixed_precision="no")
    )
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=said):
        make_accelerator(settings, Path("work"))
    if done_with:
        make_accelerator(dataclasses.replace(settings, **done_with), Path("work"))


def test_variables_that_another_launch_has_left_are_named(settings, monkeypatch):
    def refuse(**_):
        raise ValueError("`MASTER_ADDR` env was not set.")

    monkeypatch.setattr("medct.training.launch.Accelerator", refuse)
    with pytest.raises(LaunchError, match=r"`MASTER_ADDR` env was not set\. Use .* or unset WORLD_SIZE for a"):
        make_accelerator(settings, Path("work"))


@pytest.mark.parametrize(("tracker", "told"), [("none", None), ("tensorboard", None), ("trackio", "work/logs")])
def test_a_run_without_trackio_leaves_the_place_of_its_logs_to_others(settings, monkeypatch, tracker, told):
    """A notebook's own, say, after the run."""
    accelerator = SimpleNamespace(num_processes=1, mixed_precision="no", log_with=[tracker])
    monkeypatch.setattr("medct.training.launch.Accelerator", lambda **_: accelerator)
    monkeypatch.setenv("TRACKIO_DIR", "")  # so that what is set is taken back
    monkeypatch.delenv("TRACKIO_DIR")
    make_accelerator(dataclasses.replace(settings, report_to=tracker), Path("work"))
    assert os.environ.get("TRACKIO_DIR") == (told and str(Path(told)))


@pytest.mark.filterwarnings("ignore:.log_with=:UserWarning")
def test_a_tracker_that_is_not_installed_is_refused(settings, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(TrainingError, match=r"--report_to tensorboard needs a package .* `pip install tensorboard`"):
        make_accelerator(dataclasses.replace(settings, report_to="tensorboard"), Path("work"))


@pytest.mark.parametrize("variant, refused", [("lora", False), ("pissa", True)])
def test_accelerates_flag_shards_as_our_own_does(settings, monkeypatch, variant, refused):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("RANK", "0")
    settings = dataclasses.replace(settings, adaptation=variant)
    with (
        pytest.raises(TrainingError, match="Leave out --fsdp2 and --use_fsdp") if refused else contextlib.nullcontext()
    ):
        assert Trainer(settings)._fixed()["fsdp2"]


def test_held_out_studies_that_cannot_be_scored_are_refused_before_training(settings):
    with pytest.raises(TrainingError, match="1 SYNTHETIC phantoms of site B"):
        run(dataclasses.replace(settings, phantom_eval_patients=1))


def test_processes_that_do_not_meet_are_refused(settings, monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr("medct.training.launch.Accelerator", lambda **_: accelerator)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="they are not connected"):
        run(settings)


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"checkpoint_steps": 7}, {"phantom_eval_patients": 19}, {"phantom_tune_patients": 11}]
)
def test_processes_with_other_settings_are_refused_before_anything_is_kept(settings, change, monkeypatch):
    ours, theirs = (Trainer(each) for each in (settings, dataclasses.replace(settings, **change)))
    said = []
    monkeypatch.setattr("medct.common.distributed.of_all", lambda value: [*said, value])
    monkeypatch.setattr(ours.folder, "claim", lambda _: pytest.skip("too late"))
    scored = ("tune", "valid")
    said.append(json.loads(json.dumps(theirs._fixed() | theirs._scored_alike(scored))))
    with pytest.raises(LaunchError, match="Process 2 of 2 has "):
        ours.run()
    assert not any(ours.folder.work.iterdir())


def test_a_folder_that_is_another_one_elsewhere_is_refused(settings, monkeypatch):
    def refuse(folder, output):
        raise LaunchError(f"{folder.name} of {output.name}")

    monkeypatch.setattr(training, "refuse_unshared", refuse)
    with pytest.raises(LaunchError, match=r"run\.unfinished of run"):
        run(settings)


def test_every_flag_is_explained(capsys):
    assert all(field.metadata.get("help") for field in dataclasses.fields(TrainingSettings))
    with pytest.raises(SystemExit) as stop:
        training.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(TrainingSettings):
        assert f"--{field.name}" in shown


def test_bad_input_ends_in_one_line(converted, tmp_path, capsys):
    for arguments, said in (
        (["--model", str(converted), "--data", "nowhere"], "nowhere"),
        (["--model", "nowhere"], "nowhere: cannot load a model ("),
    ):
        with pytest.raises(SystemExit) as stop:
            training.main([*arguments, "--output_dir", str(tmp_path / "run"), "--cpu", "True"])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {said}")
        assert stop.value.code == FAILED
    assert not list(tmp_path.glob("*run*"))


PULL_AND_RUN = """
import sys, torch
from peft import AutoPeftModelForFeatureExtraction
from safetensors.torch import load_file, save_file
from transformers import AutoModel
inputs, commit, results = sys.argv[1:]
base = AutoModel.from_pretrained("org/base", revision=commit, trust_remote_code=True)
base.load_adapter("org/site-b")
auto = AutoPeftModelForFeatureExtraction.from_pretrained("org/site-b", trust_remote_code=True)
with torch.no_grad():
    logits = [model.eval()(**load_file(inputs)).logits_per_image for model in (base, auto)]
save_file({"base": logits[0], "auto": logits[1]}, results)
"""


@pytest.mark.filterwarnings("ignore:Could not find a config file in org/base")
def test_trained_pushed_and_pulled(hub, settings, converted, batch, monkeypatch, tmp_path):
    """There and back: a new process without `medct` has the logits of the trained adapter."""
    hub.connect(monkeypatch)
    commit = push_model(converted, "org/base").split("/")[-1]
    pushing = {"push_to_hub": True, "hub_model_id": "org/site-b", "max_steps": 2}
    training.main(flags(settings, model="org/base", **pushing))
    described = json.loads(hub.files("org/site-b")["adapter_config.json"])
    assert (described["base_model_name_or_path"], described["revision"]) == ("org/base", commit)
    assert str(tmp_path).encode() not in b"".join(hub.files("org/site-b").values())

    save_file(batch, tmp_path / "inputs")
    arguments = (tmp_path / "inputs", commit, tmp_path / "results")
    pulled = hub.run(PULL_AND_RUN, *arguments, home=tmp_path / "user", medct=False)
    assert pulled.returncode == 0, pulled.stderr
    model = PeftModel.from_pretrained(MedCTModel.from_pretrained(converted), tmp_path / "run").eval()
    with torch.no_grad():
        expected = model(**batch).logits_per_image
    found = load_file(tmp_path / "results")
    assert torch.equal(found["base"], expected)
    assert torch.equal(found["auto"], expected)


def test_a_failed_push_leaves_the_finished_adapter(hub, settings, converted, monkeypatch, tmp_path, capsys):
    hub.connect(monkeypatch)
    push_model(converted, "org/base")
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.fail("POST .*/commit/", 503, times=100)
    pushing = {"push_to_hub": True, "hub_model_id": "org/site-b", "hub_base": "org/base", "max_steps": 1}
    with pytest.raises(SystemExit, match=str(FAILED)):
        training.main(flags(settings, hub_base_revision="main", **pushing))
    assert re.search(r"medct push .*run org/site-b", capsys.readouterr().err)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def launch(*arguments: object, cwd: Path, **options) -> subprocess.CompletedProcess:
    command = launch_command(*arguments, **options)
    environment = os.environ | QUICKLY
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=cwd, check=False, env=environment)


def test_launched_run(settings, tmp_path):
    run = launch(*flags(settings, num_workers=1, max_steps=2, report_to="tensorboard"), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "trainable parameters: " in run.stdout
    assert "| **mean** |" in run.stdout
    assert "%|" not in run.stderr  # no terminal, no bar
    assert "Warning" not in run.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES | {"logs"}
    assert all((tmp_path / "run" / name).stat().st_size for name in FILES)
    assert list((tmp_path / "run/logs").rglob("events.out.tfevents.*"))


@pytest.fixture
def without_dropout(converted, tmp_path) -> Path:
    """The small model; the random numbers of dropout would depend on how studies are divided."""
    model = MedCTModel.from_pretrained(converted)
    model.config.text_config.hidden_dropout_prob = model.config.text_config.attention_probs_dropout_prob = 0.0
    folder = tmp_path / "without_dropout"
    model.save_pretrained(folder)
    MedCTProcessor.from_pretrained(converted).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("fsdp2", [False, True], ids=["whole", "fsdp2"])
def test_two_processes_have_the_losses_of_one(settings, fsdp2, without_dropout, tmp_path):
    """With the gradients of two micro-batches in each; studies that do not divide evenly are scored, too."""
    settings = dataclasses.replace(settings, model=str(without_dropout), objective="both", phantom_eval_patients=19)
    one, two = tmp_path / "one", tmp_path / "two"
    run(dataclasses.replace(settings, output_dir=str(one)))
    changes = {"output_dir": two, "batch_size": 1, "accumulation_steps": 2, "fsdp2": fsdp2}
    launched = launch(*flags(settings, **changes), cwd=tmp_path, processes=2)
    assert launched.returncode == 0, launched.stderr
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    mine, theirs = (json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (one, two))
    assert theirs["processes"] == 2
    assert theirs["comparison"]["scans"] == 19
    for metric, interval in mine["comparison"]["base"].items():
        assert theirs["comparison"]["base"][metric] == pytest.approx(interval, abs=1e-6)


@pytest.mark.slow
def test_a_killed_run_always_resumes_to_the_same_bytes(settings, tmp_path):
    """Killed at random moments, from the first import on; what is left is little enough to be reached in the end."""
    settings = dataclasses.replace(settings, epochs=4, checkpoint_steps=1, dropout=0.1)
    script = [sys.executable, training.__file__]
    started = time.monotonic()
    subprocess.run([*script, *flags(settings)], check=True, capture_output=True)
    whole_seconds = time.monotonic() - started
    command = [*script, *flags(settings, output_dir=tmp_path / "killed", resume=True)]
    moments, kills = random.Random(0), 0
    while kills < 8 and not (tmp_path / "killed").exists():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=moments.uniform(0.2, 0.7) * whole_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    if not (tmp_path / "killed").exists():
        subprocess.run(command, check=True, capture_output=True)
    assert kills >= 2
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "run")
    assert losses(tmp_path / "killed") == losses(tmp_path / "run")


@pytest.mark.slow
def test_a_killed_sharded_run_resumes_to_the_same_bytes(settings, tmp_path):
    settings = dataclasses.replace(settings, batch_size=1, checkpoint_steps=1, dropout=0.1, fsdp2=True, max_steps=6)
    settings = dataclasses.replace(settings, eval_steps=3, strength="auto")
    whole = launch(*flags(settings), cwd=tmp_path, processes=2)
    assert whole.returncode == 0, whole.stderr
    command = launch_command(*flags(settings, output_dir=tmp_path / "killed", resume=True), processes=2)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = psutil.Popen(command, **quiet)
    while not list(tmp_path.glob("killed.unfinished/checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    for each in [process, *process.children(recursive=True)]:
        each.kill()
    process.wait()
    assert not (tmp_path / "killed").exists()
    subprocess.run(command, check=True, **quiet)
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "run")
    assert losses(tmp_path / "killed") == losses(tmp_path / "run")


def test_the_phantom_base_knows_site_a():
    """With fewer patients than the README's figures, so that the test takes seconds."""
    model, processor = MedCTModel.from_pretrained(PHANTOM_BASE), MedCTProcessor.from_pretrained(PHANTOM_BASE)
    scored = scores_of(model, processor, patients=50, site="A")
    assert training.zero_shot_scores(scored.scores, scored.labels, CT_CLIP_LABELS)["auroc"] > 0.9


@pytest.mark.slow
def test_default_run_lifts_the_base_by_the_papers_difference(tmp_path):
    run = launch("--output_dir", "run", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))
    assert results["comparison"]["base"]["auroc"]["value"] > 0.60
    assert results["comparison"]["difference"]["auroc"]["value"] >= 0.076
