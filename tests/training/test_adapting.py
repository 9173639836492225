"""Learning more and forgetting less: replay, early stopping, strength and calibration in whole runs."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from launching import QUICKLY, launch_command
from peft import PeftModel
from safetensors.torch import load_file

from medct import CT_CLIP_LABELS, MedCTForImageClassification, MedCTModel, MedCTProcessor
from medct import train as training
from medct.adapters_medct import calibrated, read_description
from medct.data import StudyLoader, phantom_source
from medct.evaluation.metrics import FEWEST, zero_shot_scores
from medct.evaluation.scoring import prompts_for, score_studies
from medct.pipeline_medct import CTClassificationPipeline
from medct.train import Trainer, run
from medct.training import strength
from medct.training.best import BestSoFar
from medct.training.settings import TrainingSettings
from medct.training.strength import GRID, Trial

TUNE, EVAL, SITE_A_TUNE = 16, 12, range(12, 28)


@pytest.fixture
def settings(small_run) -> TrainingSettings:
    """With everything that a run can choose: at most 8 steps."""
    default = TrainingSettings()
    return dataclasses.replace(
        small_run,
        replay=default.replay,
        keep=default.keep,
        strength=default.strength,
        learning_rate=1e-2,
        rank=2,
        replay_share=0.25,
        epochs=2,
        eval_steps=2,
        phantom_train_patients=12,
        phantom_tune_patients=TUNE,
        phantom_eval_patients=EVAL,
        checkpoint_steps=3,
    )


def results_in(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def history_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def aurocs(folder: Path) -> dict[int, float]:
    return {each["step"]: each["tune_auroc"] for each in history_in(folder) if "tune_auroc" in each}


def same_run(one: Path, two: Path) -> None:
    """To the bit, but for how long it took, and by which command."""
    assert (one / "adapter_model.safetensors").read_bytes() == (two / "adapter_model.safetensors").read_bytes()
    found = [results_in(folder) | {"seconds": 0, "provenance": {}} for folder in (one, two)]
    assert found[0] == found[1]
    assert [each["loss"] for each in history_in(one)] == [each["loss"] for each in history_in(two)]


def test_a_run_says_what_it_chose_and_what_was_forgotten(settings, converted, processor, tmp_path, capsys):
    run(settings)
    folder = tmp_path / "run"
    results, shown = results_in(folder), capsys.readouterr().out
    assert not any("text_" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert "with 4 of 2000 SYNTHETIC phantoms of site A in between" in results["data"]

    scores = aurocs(folder)
    assert list(scores) == [2, 4, 6, 8][: len(scores)] and results["steps"] == max(scores)
    assert results["best_step"] == max(scores, key=lambda step: (scores[step], -step))
    trials = {each["strength"]: each for each in results["strengths_tried"]}
    assert tuple(trials) == GRID
    assert trials[1.0]["gained"] == pytest.approx(
        scores[results["best_step"]] - results["tune_auroc"]["base"], abs=1e-6
    )
    assert trials[0.0]["gained"] == trials[0.0]["forgotten"] == 0
    chosen = strength.choose([Trial(**each) for each in trials.values()], settings.max_forgotten)
    assert results["strength"] == chosen
    assert trials[chosen]["forgotten"] <= settings.max_forgotten

    # What was handed out has these scores, by PEFT's own loader.
    loaded = PeftModel.from_pretrained(MedCTModel.from_pretrained(converted), folder)
    for site, split, patients in (("B", "comparison", range(EVAL)), ("A", "kept", range(EVAL))):
        source = phantom_source(site, patients, 0)
        loader = StudyLoader(source, processor, CT_CLIP_LABELS, batch_size=4, with_text=False)
        prompts = prompts_for(loaded.base_model.model, processor)
        scored = score_studies(loaded.base_model.model, loader, prompts, Accelerator(cpu=True), "score")
        expected = zero_shot_scores(scored.scores, scored.labels, CT_CLIP_LABELS)["auroc"]
        assert results[split]["adapted"]["auroc"]["value"] == pytest.approx(expected, abs=1e-6)
        counts = [results[split][side].values() for side in ("present", "absent")]
        fewest = [min(pair) for pair in zip(*counts, strict=True) if min(pair)]
        has_interval = 2 * sum(each >= FEWEST for each in fewest) >= len(fewest)
        assert (results[split]["difference"]["auroc"]["low"] is not None) == has_interval
    assert f"| to be kept ({EVAL} scans of {EVAL} patients) |" in results["table"]
    assert results["table"] in shown and f"Strength: {chosen:g}" in shown
    assert "On what was to be kept: difference" in (folder / "README.md").read_text(encoding="utf-8")
    description = read_description(folder)
    assert (description["strength"], description["calibration"]) == (chosen, results["calibration"])


def test_a_strength_of_nothing_is_said(settings, converted, batch, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(strength, "choose", lambda *_: 0.0)
    run(dataclasses.replace(settings, max_steps=1))
    base = MedCTModel.from_pretrained(converted).eval()
    with torch.no_grad():
        expected = base(**batch).logits_per_image
        loaded = PeftModel.from_pretrained(base, tmp_path / "run").eval()(**batch).logits_per_image
    assert torch.equal(loaded, expected)
    for said in (capsys.readouterr().out, (tmp_path / "run/README.md").read_text(encoding="utf-8")):
        assert "This adapter does not help" in said
    assert results_in(tmp_path / "run")["comparison"]["difference"]["auroc"]["value"] == 0


@pytest.mark.usefixtures("pictures_are_drawn")
def test_a_classifier_has_strength_calibration_and_something_to_keep(
    settings, classifier_folder, batch, nifti, monkeypatch, tmp_path
):
    """It is asked nothing in words, and its head moves with the adapter."""
    monkeypatch.setattr(strength, "choose", lambda *_: 0.5)
    trainer = Trainer(dataclasses.replace(settings, model=str(classifier_folder), max_steps=2))
    results = trainer.run()
    assert results["prompts"] == [] and results["strength"] == 0.5
    assert len(results["strengths_tried"]) == len(GRID) and results["kept"]["scans"] == EVAL
    assert (tmp_path / "run/learned.png").is_file()
    assert "(learned.png)" in (tmp_path / "run/README.md").read_text(encoding="utf-8")
    base = MedCTForImageClassification.from_pretrained(classifier_folder).eval()
    with torch.no_grad():
        before = base(batch["pixel_values"]).logits
        base.load_adapter(str(tmp_path / "run"))
        after = base.eval()(batch["pixel_values"]).logits
        assert torch.equal(after, trainer.base.eval()(batch["pixel_values"]).logits)
    assert not torch.allclose(after, before)
    processor = MedCTProcessor.from_pretrained(classifier_folder)
    pipe = CTClassificationPipeline(model=base, processor=processor, device="cpu")
    calibration = results["calibration"]
    findings = {each["label"]: each for each in pipe(nifti(np.zeros((12, 9, 5), np.int16)))}
    assert calibration and calibration.keys() == {label for label, each in findings.items() if "probability" in each}
    for label, line in calibration.items():
        assert findings[label]["probability"] == pytest.approx(float(calibrated(findings[label]["score"], *line)))
    with pytest.raises(ValueError, match="trained whole"):
        base.set_adapter_strength("default", 0.5)


def test_what_is_worse_than_the_base_is_said(settings, monkeypatch, tmp_path):
    """With the strength left at 1, and weights that are noise."""

    def ruin(self, model):
        with torch.no_grad():
            for parameter in training.trainable_parameters(model).values():
                parameter.normal_()
        self.steps_done, self.best_step, self.passes = 0, None, 0

    trainer = Trainer(dataclasses.replace(settings, strength="1", max_steps=1))
    monkeypatch.setattr(Trainer, "_train", ruin)
    monkeypatch.setattr(trainer, "score_base", lambda split: perfect(trainer, split))
    results = trainer.run()
    said = " ".join(results["remarks"])
    assert "Worse than the base on the tuning patients" in said
    assert "Worse than the base on the held-out patients" in said
    assert "forgets" in said and "more than the allowed 0.01" in said
    assert all(remark in (tmp_path / "run/README.md").read_text(encoding="utf-8") for remark in results["remarks"])


def perfect(trainer: Trainer, split: str):
    """Scores of a base that knows everything."""
    scored = trainer._score(trainer.base, split, "base")
    return dataclasses.replace(scored, scores=scored.labels.copy())


class PowerCutError(BaseException):
    """Nothing handles it."""


def cut_power(*_):
    raise PowerCutError


@pytest.mark.parametrize("step", [2, pytest.param(99, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_one_that_never_stopped(settings, step, monkeypatch, tmp_path):
    """Cut after the scores of a step, of which no checkpoint knows, and while strengths are tried."""
    settings = dataclasses.replace(settings, dropout=0.1, objective="both", patience=2)
    run(settings)
    watch = Trainer._watch

    def cut(self, model, state):
        figures = watch(self, model, state)
        if state.step == step:
            raise PowerCutError
        return figures

    stopped = dataclasses.replace(settings, output_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch, pytest.raises(PowerCutError):
        patch.setattr(Trainer, "_watch", cut)
        patch.setattr(training, "choose_strength", cut_power)
        run(stopped)
    torch.rand(7)
    run(dataclasses.replace(stopped, resume=True, num_workers=1))
    same_run(tmp_path / "run", tmp_path / "stopped")


def test_a_run_stops_early_and_keeps_its_best_weights(settings, monkeypatch, tmp_path):
    """The second score is the best one; after two worse ones it ends."""
    given = iter([0.6, 0.7, 0.65, 0.69, 0.9])
    monkeypatch.setattr(training, "mean_auroc", lambda *_: next(given))
    weights = {}
    watch = Trainer._watch

    def remember(self, model, state):
        weights[state.step] = {name: each.detach().clone() for name, each in state.parameters.items()}
        return watch(self, model, state)

    monkeypatch.setattr(Trainer, "_watch", remember)
    changes = {"eval_steps": 1, "patience": 2, "strength": "1", "max_steps": 8}
    trainer = Trainer(dataclasses.replace(settings, **changes))
    model = {}
    monkeypatch.setattr(Trainer, "_check_base", lambda self, trained: model.update(trained=trained))
    results = trainer.run()
    assert (results["steps"], results["planned_steps"], results["best_step"]) == (4, 8, 2)
    for name, parameter in training.trainable_parameters(model["trained"]).items():
        assert torch.equal(parameter, weights[2][name]) and not torch.equal(parameter, weights[4][name])


def test_scores_that_cannot_be_told_stop_nothing():
    parameter = torch.nn.Parameter(torch.zeros(2))
    best = BestSoFar({"weight": parameter}, patience=1)
    for step in range(3):
        best.note(step, None)
    assert not best.has_waited_enough and best.step is None
    best.restore()  # nothing to restore
    assert torch.equal(parameter, torch.zeros(2))


def test_prompts_are_encoded_once_where_no_text_is_learned(settings, monkeypatch):
    calls = []
    encode = MedCTModel.get_text_features
    settings = dataclasses.replace(settings, eval_steps=0, keep="none", strength="1")

    def counted(self, *arguments, **options):
        calls.append(self.training)
        return encode(self, *arguments, **options)

    monkeypatch.setattr(MedCTModel, "get_text_features", counted)
    run(dataclasses.replace(settings, max_steps=3))
    scored, trained = 4, 1  # base and adapted, tuning and held-out patients; all steps together
    assert calls == [False] * (scored + trained)


def launch(settings: TrainingSettings, processes: int = 1, **changes) -> list[str]:
    values = dataclasses.asdict(dataclasses.replace(settings, **changes))
    flags = [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
    if processes == 1:
        return [sys.executable, training.__file__, *flags]
    return launch_command(*flags, processes=processes)


ENVIRONMENT = {"env": os.environ | QUICKLY, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@pytest.mark.slow
def test_two_processes_choose_what_one_chooses(settings, tmp_path):
    run(settings)
    subprocess.run(
        launch(settings, 2, batch_size=2, output_dir=str(tmp_path / "two")), check=True, cwd=tmp_path, **ENVIRONMENT
    )
    mine, theirs = (results_in(tmp_path / name) for name in ("run", "two"))
    assert theirs["processes"] == 2
    assert [theirs[key] for key in ("steps", "best_step", "strength")] == [
        mine[key] for key in ("steps", "best_step", "strength")
    ]
    losses = [[each["loss"] for each in history_in(tmp_path / name)] for name in ("run", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert aurocs(tmp_path / "two") == pytest.approx(aurocs(tmp_path / "run"), abs=1e-3)
    for split in ("comparison", "kept"):
        for model in ("base", "adapted"):
            values = [each[split][model]["auroc"]["value"] for each in (mine, theirs)]
            assert values[1] == pytest.approx(values[0], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumes_to_the_same_bytes(settings, processes, tmp_path):
    settings = dataclasses.replace(settings, checkpoint_steps=1, dropout=0.1, batch_size=4 // processes, epochs=4)
    subprocess.run(launch(settings, processes), check=True, cwd=tmp_path, **ENVIRONMENT)
    command = launch(settings, processes, output_dir=str(tmp_path / "killed"), resume=True)
    for checkpoint in ("step-00000003", "step-00000005"):
        process = psutil.Popen(command, cwd=tmp_path, **ENVIRONMENT)
        while not list(tmp_path.glob(f"killed.unfinished/checkpoints/{checkpoint}")):
            if process.poll() is not None:
                break
            time.sleep(0.02)
        for each in [*process.children(recursive=True), process] if process.is_running() else []:
            each.kill()
        process.wait()
    if not (tmp_path / "killed").exists():
        subprocess.run(command, check=True, cwd=tmp_path, **ENVIRONMENT)
    same_run(tmp_path / "run", tmp_path / "killed")
