"""Calibration of a site: it finds what was put in, keeps the order, and its errors are the known ones."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from medct.adapters_medct import calibrated
from medct.evaluation.calibration import (
    FEWEST,
    apply_calibration,
    calibration_bins,
    compare_calibration,
    expected_calibration_error,
    fit_calibration,
)

NAMES = ["nodule", "effusion"]
TRUE = {"nodule": (0.5, -1.0), "effusion": (1.5, 0.5)}


def cohort(scans: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose calibration is `TRUE`, and labels, some of them unknown."""
    random = np.random.default_rng(seed)
    scores = 1 / (1 + np.exp(-2 * random.normal(size=(scans, 2))))
    slopes, intercepts = np.array([TRUE[name] for name in NAMES]).T
    labels = (random.random((scans, 2)) < calibrated(scores, slopes, intercepts)).astype(float)
    labels[random.random((scans, 2)) < 0.1] = np.nan
    return scores, labels


def test_the_true_calibration_is_found():
    found = fit_calibration(*cohort(20_000, 0), NAMES)
    for name in NAMES:
        assert found[name] == pytest.approx(TRUE[name], abs=0.08)


@pytest.mark.parametrize(("scale", "shift"), [(1e-4, 0), (1e-3, 5), (1e-3, -5), (0.01, 5), (5, 0)])
def test_probabilities_are_the_same_however_close_scores_lie(scale, shift):
    """A model whose scores of all scans lie close to 0.9933 is calibrated as one with scores from 0 to 1."""
    random = np.random.default_rng(0)
    labels = (random.random((100, 1)) < 0.3).astype(float)
    margins = labels + random.normal(size=(100, 1))
    wide, close = (1 / (1 + np.exp(-each)) for each in (margins, scale * margins + shift))
    expected, found = (apply_calibration(each, fit_calibration(each, labels, ["a"]), ["a"]) for each in (wide, close))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_order_stays_and_probabilities_get_better_on_other_patients():
    calibration = fit_calibration(*cohort(300, 0), NAMES)
    scores, labels = cohort(1000, 1)
    patients = [str(number // 2) for number in range(1000)]
    probabilities = apply_calibration(scores, calibration, NAMES)
    for column in range(2):
        known = ~np.isnan(labels[:, column])
        aurocs = [roc_auc_score(labels[known, column], each[known, column]) for each in (scores, probabilities)]
        assert aurocs[0] == aurocs[1]
    found = compare_calibration(scores, labels, patients, NAMES, calibration, resamples=200)
    known = ~np.isnan(labels)
    for version, values in (("before", scores), ("after", probabilities)):
        error, brier = (found[version][key] for key in ("expected_calibration_error", "brier"))
        assert error["value"] == pytest.approx(expected_calibration_error(values, labels))
        assert brier["value"] == pytest.approx(brier_score_loss(labels[known], values[known]))
        assert error["low"] < error["value"] < error["high"]
        assert sum(each["count"] for each in found["reliability"][version]) == known.sum()
    assert found["difference"]["expected_calibration_error"]["high"] < 0
    assert found["difference"]["brier"]["high"] < 0
    assert found["labels"] == NAMES
    assert found["calibration"] == calibration  # so that "after" can be computed again


def test_a_bin_of_few_has_no_interval():
    """Of either kind; the scans of a bin say little about how often a finding is there."""
    scores = np.repeat([0.05, 0.55, 0.95], 40)[:, None]
    labels = np.zeros((120, 1))
    labels[:FEWEST], labels[40 : 40 + FEWEST - 1], labels[80:], labels[80 : 80 + FEWEST] = 1, 1, 1, 0
    patients = [str(number) for number in range(120)]
    found = compare_calibration(scores, labels, patients, ["nodule"], {"nodule": [1.0, 0.0]}, resamples=50)
    shares = [each["share"] for each in found["reliability"]["before"]]
    assert [share["low"] is not None for share in shares] == [True, False, True]
    patients[1] = patients[0]  # two scans of one
    found = compare_calibration(scores, labels, patients, ["nodule"], {"nodule": [1.0, 0.0]}, resamples=50)
    shares = [each["share"] for each in found["reliability"]["before"]]
    assert [share["low"] is not None for share in shares] == [False, False, True]


def test_certain_scores_are_no_infinities():
    assert np.all(np.diff(calibrated([0, 0.1, 0.9, 1], 0.5, 0.1)) > 0)
    assert np.isfinite(calibrated([0.0, 1.0], 3.0, 0.0)).all()
    separable = np.linspace(0, 1, 20)[:, None]
    (slope, intercept) = fit_calibration(separable, (separable > 0.5).astype(float), ["nodule"])["nodule"]
    assert 0 < slope < 100 and abs(intercept) < 100


@pytest.mark.parametrize("present", [0, FEWEST - 1])
def test_a_label_with_too_few_scans_has_none(present):
    scores = np.random.default_rng(0).random((40, 1))
    labels = (np.argsort(np.argsort(-scores, axis=0), axis=0) < present).astype(float)
    assert fit_calibration(scores, labels, ["nodule"]) == {}
    assert compare_calibration(scores, labels, ["a"] * 40, ["nodule"], {}) is None


def test_a_score_that_falls_with_the_finding_has_none():
    scores = np.linspace(0.1, 0.9, 40)[:, None]
    assert fit_calibration(scores, (scores < 0.5).astype(float), ["nodule"]) == {}


def test_a_certain_score_is_in_the_last_bin():
    scores = np.array([[0.0], [0.05], [0.95], [1.0]])
    probability, share, counts = calibration_bins(scores, (scores > 0.5).astype(float))
    assert counts.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert (probability[-1], share[-1]) == (pytest.approx(0.975), 1)


def test_labels_that_scores_tell_apart_are_not_made_certain():
    """Platt's targets: so few scans cannot tell 21 of 22 from all."""
    labels = np.repeat([[0.0], [1.0]], 20, axis=0)
    scores = 0.2 + 0.6 * labels
    found = apply_calibration(scores, fit_calibration(scores, labels, ["a"]), ["a"])
    np.testing.assert_allclose(found, (1 + 20 * labels) / 22, atol=1e-3)


def test_a_label_that_is_known_of_no_scan_is_left_out():
    scores, labels = cohort(200, 0)
    labels[:, 1] = np.nan
    patients = [str(number) for number in range(200)]
    found = compare_calibration(scores, labels, patients, NAMES, TRUE, resamples=20)
    assert found["labels"] == ["nodule"]
    assert found == compare_calibration(scores[:, :1], labels[:, :1], patients, ["nodule"], TRUE, resamples=20)
