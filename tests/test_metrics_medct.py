"""Scores against recorded figures and known cases."""

import json

import evaluate
import numpy as np
import pytest

from medct.metrics_medct import label_aurocs, zero_shot_scores

SCORES = np.array([[0.9, 0.2], [0.8, 0.3], [0.3, 0.1], [0.1, 0.7]])
LABELS = np.array([[1, 0], [0, 0], [1, 0], [0, 0]])


def test_equals_the_recorded_figures(shared):
    recorded = json.loads((shared / "golden/metrics.json").read_text())
    aurocs = label_aurocs(recorded["scores"], recorded["labels"])
    np.testing.assert_allclose(aurocs, recorded["expected"]["auroc"], atol=1e-9)
    names = [str(index) for index in range(18)]
    scores = zero_shot_scores(recorded["scores"], recorded["labels"], names)
    assert scores["auroc"] == pytest.approx(recorded["expected"]["mean"]["auroc"], abs=1e-9)
    assert scores["scans"] == 400


def test_a_label_that_never_occurs_has_no_score():
    scores = zero_shot_scores(SCORES, LABELS, ["nodule", "mass"])
    assert scores["auroc/nodule"] == scores["auroc"] == 0.75
    assert np.isnan(scores["auroc/mass"])


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="always or never present"):
        zero_shot_scores(SCORES, LABELS * 0, ["nodule", "mass"])


def test_loads_as_an_evaluate_module(tmp_path):
    from medct import metrics_medct

    module = evaluate.load(metrics_medct.__file__, cache_dir=str(tmp_path))
    computed = module.compute(predictions=SCORES.tolist(), references=LABELS.tolist(), names=["nodule", "mass"])
    assert computed["auroc"] == 0.75
