"""What a run of few patients or few steps says of itself."""

import dataclasses
import math
import re

import numpy as np
import pytest

from medct.adapters_medct import calibrated
from medct.evaluation.calibration import fit_calibration
from medct.evaluation.operating_points import choose_points
from medct.evaluation.scoring import ScoredStudies
from medct.training import handing_out
from medct.training.results import (
    FEW_STEPS,
    compare_all,
    few_patients,
    few_steps,
    lower_precision,
    remarks_on,
    repeatable,
)
from medct.training.settings import TrainingSettings

NAMES = ["nodule", "mass"]


def scored(patients: int, with_mass: int, seed: int) -> ScoredStudies:
    """Two scans a patient; every second patient has a nodule."""
    people = np.repeat(np.arange(patients), 2)
    labels = np.stack([people % 2, people < with_mass], axis=1).astype(float)
    scores = np.clip(labels / 4 + np.random.default_rng(seed).random(labels.shape) * 3 / 4, 0, 1)
    ids = [f"{index}.nii" for index in range(len(people))]
    return ScoredStudies(ids, list(map(str, people)), scores, labels, names=NAMES)


def results(tune: ScoredStudies, valid: ScoredStudies) -> dict:
    before = {"tune": tune, "valid": valid}
    after = {split: dataclasses.replace(each, scores=each.scores**2) for split, each in before.items()}
    return {"label_names": NAMES} | compare_all(before, after, 20, 0)


def test_a_run_of_five_patients_says_what_it_cannot_tell():
    found = results(scored(5, 2, 0), scored(5, 2, 1))
    assert (found["thresholds"], found["calibration"]) == (None, None)
    assert found["comparison"]["adapted"]["auroc"]["low"] is None
    intervals, points = few_patients(found)
    assert intervals.startswith("5 held-out patients are too few to tell")
    assert intervals.endswith("With --folds 5 every patient is held out once.")
    assert points.startswith("No operating point for any finding: fewer than 5 tuning patients")
    assert "Without an interval" in found["table"]


def test_means_without_an_interval_are_not_said_to_be_all_figures():
    columns, names = [0, 1, 1], [*NAMES, "lump"]
    tune, valid = (
        dataclasses.replace(each, scores=each.scores[:, columns], labels=each.labels[:, columns], names=names)
        for each in (scored(20, 8, 0), scored(20, 3, 1))
    )
    found = results(tune, valid) | {"label_names": names}
    assert found["comparison"]["adapted"]["auroc/nodule"]["low"] is not None
    (intervals,) = few_patients(found)
    assert intervals.startswith("20 held-out patients are too few to tell how reliable means over findings are")


def test_findings_without_an_operating_point_are_named():
    found = results(scored(20, 3, 0), scored(20, 6, 1))
    assert found["thresholds"].keys() == {"nodule"}
    assert found["comparison"]["operating_points"]["adapted"]["youden"]["sensitivity/nodule"]["low"] is not None
    (points,) = few_patients(found)
    assert points.startswith("No operating point for mass: fewer than 5")


def test_what_is_chosen_is_chosen_on_tuning_patients_for_each_model():
    tune = scored(20, 8, 0)
    found = results(tune, scored(20, 8, 1))
    about = tune.labels, NAMES
    base, adapted = (choose_points(scores, *about, {}, tune.patients) for scores in (tune.scores, tune.scores**2))
    assert found["calibration"] == fit_calibration(tune.scores**2, *about, tune.patients)
    assert found["thresholds"] == adapted["youden"] != base["youden"]
    points = found["comparison"]["operating_points"]
    assert [points[model]["youden"]["thresholds"] for model in ("base", "adapted")] == [
        base["youden"],
        adapted["youden"],
    ]
    few = results(scored(8, 4, 0), scored(20, 8, 1))  # eight scans of four patients
    assert (few["thresholds"], few["calibration"]) == (None, None)


def test_a_run_of_enough_patients_has_nothing_to_say():
    assert few_patients(results(scored(20, 8, 0), scored(20, 8, 1))) == []


@pytest.mark.parametrize(
    ("steps", "batches", "changes", "remedy"),
    [
        (5, 5, {}, "Pass --epochs 10."),
        (14, 7, {"epochs": 2}, "Pass --epochs 8."),
        (3, 100, {"max_steps": 3}, "Pass a higher --max_steps than 3."),
        (3, 3, {"max_steps": 3}, "Pass --epochs 17 and a higher --max_steps than 3."),
        (3, 3, {"max_steps": 9}, "Pass --epochs 17 and a higher --max_steps than 9."),
        (30, 30, {"max_steps": 100}, "Pass --epochs 2."),
        (18, 7, {"accumulation_steps": 4, "epochs": 11}, "Pass --epochs 29."),
        (FEW_STEPS, FEW_STEPS, {}, None),
    ],
)
def test_few_steps_are_remarked_on_with_what_to_do(steps, batches, changes, remedy):
    settings = TrainingSettings(**changes)
    said = few_steps(steps, batches, settings)
    assert said is None if remedy is None else said.endswith(remedy)
    if remedy is not None:  # whoever does so hears no more of it
        flags = dict(re.findall(r"--(\w+)(?: than)? (\d+)", remedy))
        epochs = int(flags.get("epochs", settings.epochs))
        max_steps = None if "max_steps" in flags else settings.max_steps
        better = dataclasses.replace(settings, epochs=epochs, max_steps=max_steps)
        steps = min(batches * epochs // settings.accumulation_steps, max_steps or math.inf)
        assert few_steps(steps, batches, better) is None


def test_what_is_worse_or_forgotten_is_remarked_on():
    found = results(scored(20, 8, 0), scored(20, 8, 1)) | {"strength": 1.0, "strengths_tried": [{"strength": 1.0}]}

    def remarks(tune=(0.7, 0.8), gained=0.1, kept=-0.01, max_forgotten=0.01) -> list[str]:
        def changed(value):
            return {"difference": {"auroc": {"value": value}}}

        changes = {"tune_auroc": dict(zip(("base", "adapted"), tune, strict=True)), "kept": changed(kept)}
        return remarks_on(found | changes | {"comparison": found["comparison"] | changed(gained)}, max_forgotten)

    assert remarks() == remarks(tune=(0.8, 0.8), gained=0.0) == []
    (said,) = remarks(tune=(0.8, 0.7))
    assert said == "Worse than the base on the tuning patients: mean AUROC 0.700, not 0.800."
    (said,) = remarks(gained=-0.02)
    assert said == "Worse than the base on the held-out patients: mean AUROC -0.020."
    (said,) = remarks(kept=-0.05)
    assert "it forgets 0.050 of mean AUROC, more than the allowed 0.01" in said
    assert remarks(kept=0.05) == []
    found["keep_tune_auroc"] = {"base": None, "adapted": None}
    (said,) = remarks()
    assert "tuning patients of what is to be kept, so nothing limited what is forgotten" in said
    found["strengths_tried"] = []  # with --strength 1 nothing was to be limited
    assert remarks() == []


def test_a_run_is_repeated_with_what_it_was_run_with():
    chosen = {"reconstructions": "all", "seed": 3, "bootstrap_resamples": 5, "batch_size": 2, "templates": ["a|b"]}
    settings = TrainingSettings(
        data="hf://datasets/o/n",
        data_revision="c",
        mapping="m",
        keep="k",
        keep_mapping="l",
        max_eval_studies=7,
        adaptation="lora",
        **chosen,
    )
    found = repeatable(settings, "abc", {"adapted": {}})
    assert found | chosen == found
    assert (found["data"], found["mapping"]) == (["hf://datasets/o/n@c", "k"], ["hf://datasets/o/n@c=m", "k=l"])
    assert (found["limit"], found["revision"], found["split"], found["points"]) == (7, "abc", "valid", {"adapted": {}})
    alone = repeatable(dataclasses.replace(settings, keep="none", keep_mapping=None), "abc", {})
    assert (alone["data"], alone["mapping"]) == (["hf://datasets/o/n@c"], ["hf://datasets/o/n@c=m"])
    for other in ({"adaptation": "full"}, {"folds": 5, "fold": 2}):
        assert repeatable(dataclasses.replace(settings, **other), "abc", {}) is None


def test_figures_under_autocast_say_so():
    assert lower_precision("no") is None
    assert lower_precision("bf16").startswith("Scored in bf16: operating points and calibration are for scores in that")


@pytest.mark.parametrize("is_for_all", [True, False])
def test_calibrated_probabilities_are_drawn_where_all_findings_have_them(is_for_all, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(handing_out, "roc_plot", lambda *_: None)
    monkeypatch.setattr(handing_out, "calibration_plot", lambda models, *_, what: drawn.update(models, what=what))
    monkeypatch.setattr(handing_out, "save_plot", lambda *_: None)
    valid = scored(20, 8, 1)
    lines = {name: [1.0, 0.5] for name in NAMES[: 2 if is_for_all else 1]}
    handing_out.draw_pictures(tmp_path, {"calibration": lines, "kept": None}, valid, valid, "", "")
    assert drawn["what"] == ("score, or calibrated probability" if is_for_all else "score")
    assert ("calibrated" in drawn) == is_for_all
    if is_for_all:
        np.testing.assert_allclose(drawn["calibrated"], calibrated(valid.scores, 1.0, 0.5))
