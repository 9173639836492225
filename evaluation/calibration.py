"""Probabilities from scores: a calibration for each label, and how far it is to be believed.

A score of 0.8 is not a chance of 80 %. On studies of a hospital whose labels are known, slope and intercept of each
label are fitted, and studies of other patients show what came of it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from medct.adapters_medct import calibrated
from medct.evaluation.metrics import FEWEST, Interval, checked, enough, intervals_of, over_draws, trusted

BINS = 10
_NO_PENALTY = 1e10


def fit_calibration(
    scores: np.ndarray, labels: np.ndarray, names: Sequence[str], patients: Sequence[str] | None = None
) -> dict[str, list[float]]:
    """Slope and intercept of each label; see `calibrated`.

    Args:
        scores: `(scans, labels)`, in [0, 1], of other patients than those it will serve.
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.
        names: Of the labels.
        patients: `(scans,)`, who was scanned; None makes every scan a patient of its own.

    Returns:
        By label; none for those with too few patients, see `metrics.enough`, or whose score does not rise with the
        finding.
    """
    found = {}
    columns = zip(
        names, np.asarray(scores, float).T, np.asarray(labels, float).T, enough(labels, patients), strict=True
    )
    for name, score, truth, is_enough in columns:
        known = ~np.isnan(truth)
        slope_and_intercept = _platt(score[known], truth[known] == 1) if is_enough else None
        if slope_and_intercept is not None:
            found[name] = slope_and_intercept
    return found


def _platt(scores: np.ndarray, is_present: np.ndarray) -> list[float] | None:
    """Slope and intercept that make the labels likeliest, with Platt's targets instead of 0 and 1."""
    present, absent = is_present.sum(), (~is_present).sum()
    targets = np.where(is_present, (present + 1) / (present + 2), 1 / (absent + 2))
    margins = _logit(scores)[:, None]
    if np.ptp(margins) == 0:
        return None
    # The search ends at a small gradient, and close margins have no other: it is done in units of their spread.
    middle, spread = margins.mean(), margins.std()
    margins = (margins - middle) / spread
    model = LogisticRegression(C=_NO_PENALTY, max_iter=1000)
    # A target of 0.9 is nine tenths of a scan with the finding and one of a scan without.
    sides = np.repeat([1, 0], len(margins))
    model.fit(np.concatenate([margins, margins]), sides, sample_weight=np.concatenate([targets, 1 - targets]))
    slope = float(model.coef_[0, 0] / spread)
    return [slope, float(model.intercept_[0] - slope * middle)] if slope > 0 else None


def _logit(scores: np.ndarray) -> np.ndarray:
    """As `calibrated` takes it."""
    inside = calibrated(scores, 1.0, 0.0)
    return np.log(inside / (1 - inside))


def apply_calibration(scores: np.ndarray, calibration: dict[str, list[float]], names: Sequence[str]) -> np.ndarray:
    """Probabilities `(scans, calibrated labels)`, in the order of `names`.

    Args:
        scores: `(scans, labels)`, in [0, 1].
        calibration: From `fit_calibration`.
        names: Of the labels, in the order of the scores.
    """
    columns = [index for index, name in enumerate(names) if name in calibration]
    slopes, intercepts = np.array([calibration[names[index]] for index in columns]).reshape(-1, 2).T
    return calibrated(np.asarray(scores)[:, columns], slopes, intercepts)


def compare_calibration(
    scores: np.ndarray,
    labels: np.ndarray,
    patients: Sequence[str],
    names: Sequence[str],
    calibration: dict[str, list[float]],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Scores as probabilities, before and after calibration, on scans that it was not fitted to.

    Args:
        scores: `(scans, labels)`, in [0, 1].
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.
        patients: `(scans,)`, who was scanned.
        names: Of the labels.
        calibration: From `fit_calibration`; labels without one, or known of no scan, are left out, before and after.
        resamples: Of the bootstrap over patients.
        seed: Of the bootstrap.

    Returns:
        Ready for JSON: `before`, `after` and `difference`, each with `expected_calibration_error` and `brier` as
        `{"value", "low", "high"}`; `reliability`, by "before" and "after" a list of bins with `probability`, `count`
        and `share` present, as such an interval; `labels`; and the `calibration` of these. `None` if no label is
        calibrated.
    """
    is_known = ~np.isnan(np.asarray(labels, float)).all(axis=0)
    columns = [index for index, name in enumerate(names) if name in calibration and is_known[index]]
    if not columns:
        return None
    calibration = {names[index]: calibration[names[index]] for index in columns}
    truth = np.asarray(labels, float)[:, columns]
    versions = {
        "before": np.asarray(scores, float)[:, columns],
        "after": apply_calibration(scores, calibration, names),
    }
    labelled = [names[index] for index in columns]
    figures = {
        version: over_draws(partial(_figures, each, truth), np.asarray(patients), resamples, seed)
        for version, each in versions.items()
    }
    summary = {version: trusted(_errors(each), truth, patients, labelled) for version, each in figures.items()}
    before, after = summary["before"], summary["after"]
    summary["difference"] = {key: after[key] - before[key] for key in after}
    return {
        **{
            version: intervals_of(each, lowest=-1 if version == "difference" else 0)
            for version, each in summary.items()
        },
        "reliability": {
            version: _reliability(each, _enough_in_bins(versions[version], truth, np.asarray(patients)))
            for version, each in figures.items()
        },
        "labels": labelled,
        "calibration": calibration,
    }


def calibration_bins(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Probabilities against how often they come true, in bins of equal width over all labels together.

    Args:
        scores: `(scans, labels)`, probabilities.
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.

    Returns:
        Mean probability and share that is present, both NaN in an empty bin, and count; each `(BINS,)`.

    Raises:
        ValueError: If shapes do not match, arrays hold other values, scores are outside [0, 1], or no label is known.
    """
    scores, labels = checked(scores, labels, must_vary=False, probabilities=True)
    known = ~np.isnan(labels)
    if not known.any():
        raise ValueError("No label of these scans is known, so no probability comes true or not. Pass labels of some.")
    bin_of = _bin_of(scores[known])
    counts = np.bincount(bin_of, minlength=BINS)
    with np.errstate(invalid="ignore"):  # an empty bin is 0 / 0
        means = [np.bincount(bin_of, values[known], minlength=BINS) / counts for values in (scores, labels)]
    return means[0], means[1], counts


def expected_calibration_error(scores: np.ndarray, labels: np.ndarray) -> float:
    """How far probabilities are from how often they come true: mean over `calibration_bins`, weighted by count.

    Args:
        scores: `(scans, labels)`, probabilities.
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: See `calibration_bins`.
    """
    probability, share, counts = calibration_bins(scores, labels)
    filled = counts > 0
    return float(np.average(np.abs(probability - share)[filled], weights=counts[filled]))


def _figures(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Sums in bins of equal width, `(bins, resamples)`, and the Brier score, `(resamples,)`.

    Args:
        probabilities: `(scans, labels)`.
        labels: `(scans, labels)`.
        weights: `(scans, resamples)`, how often each scan was drawn.
    """
    known = ~np.isnan(labels)
    truth = np.where(known, labels, 0)
    bin_of = _bin_of(probabilities)
    in_bin = (bin_of[None] == np.arange(BINS)[:, None, None]) & known  # (bins, scans, labels)
    squares = (known * (probabilities - truth) ** 2).sum(axis=1)
    return {
        "count": in_bin.sum(axis=2) @ weights,
        "probability": (in_bin * probabilities).sum(axis=2) @ weights,
        "present": (in_bin * truth).sum(axis=2) @ weights,
        "brier": squares @ weights / (known.sum(axis=1) @ weights),
    }


def _errors(figures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    gaps = np.abs(figures["probability"] - figures["present"]).sum(axis=0)
    return {"expected_calibration_error": gaps / figures["count"].sum(axis=0), "brier": figures["brier"]}


def _bin_of(probabilities: np.ndarray) -> np.ndarray:
    return np.minimum((probabilities * BINS).astype(int), BINS - 1)


def _enough_in_bins(probabilities: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> list[bool]:
    """For each bin, whether `FEWEST` patients have a finding there, and as many are without one."""
    in_bins = [_bin_of(probabilities) == each for each in range(BINS)]
    is_side = [labels == 1, labels == 0]
    return [
        all(len(np.unique(patients[(in_bin & side).any(axis=1)])) >= FEWEST for side in is_side) for in_bin in in_bins
    ]


def _reliability(figures: dict[str, np.ndarray], is_enough: Sequence[bool]) -> list[dict[str, Any]]:
    """Bins that are not empty: mean probability, count, and share present, with its interval if patients are enough."""
    bins = []
    columns = (figures[key] for key in ("count", "probability", "present"))
    for count, probability, present, is_told in zip(*columns, is_enough, strict=True):
        if not count[0]:
            continue
        with np.errstate(invalid="ignore"):  # empty in a resample: 0 / 0
            shares = present / count
        if not is_told:
            shares[1:] = np.nan
        share: Interval = intervals_of({"share": shares})["share"]
        bins.append({"probability": probability[0] / count[0], "count": int(count[0]), "share": share})
    return bins
