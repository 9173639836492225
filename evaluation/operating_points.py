"""Operating points: the least score that counts as "present", chosen on tuning patients, and what it gives on others.

Youden's index weighs a miss like a false alarm. Where one of them costs more, a share is wanted: the highest threshold
that finds enough of those with a finding (sensitivity), or the lowest that passes enough of those without
(specificity).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from medct.evaluation.metrics import (
    FEWEST,
    checked,
    choose_thresholds,
    enough,
    intervals_of,
    mean_over_labels,
    over_draws,
    trusted,
)

YOUDEN = "youden"
WANTED = ("sensitivity", "specificity")
_ROUNDING = 1e-9  # 0.95 of 20 scans are 19

Points = dict[str, dict[str, float]]
"""By name ("youden", "sensitivity 0.95"), the threshold of each label that has one."""


def wanted_points(sensitivity: float | None = None, specificity: float | None = None) -> dict[str, tuple[str, float]]:
    """What is wanted besides Youden's points, by name.

    Args:
        sensitivity: Share in (0, 1] of those with a finding that must be called.
        specificity: Share in (0, 1] of those without it that must not be.

    Raises:
        ValueError: If one is not such a share.
    """
    wanted = {}
    for rule, share in zip(WANTED, (sensitivity, specificity), strict=True):
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"A {rule} of {share:g} is impossible. Pass a share above 0, up to 1.")
        if share is not None:
            wanted[f"{rule} {share:g}"] = (rule, share)
    return wanted


def wanted_of(names: Iterable[str]) -> dict[str, tuple[str, float]]:
    """What points were chosen to give, by name; the opposite of `wanted_points`.

    Args:
        names: Of operating points, such as "sensitivity 0.95".
    """
    parts = {name: name.split() for name in names}
    return {name: (rule, float(share)) for name, (rule, share) in parts.items()}


def choose_points(
    scores: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    wanted: Mapping[str, tuple[str, float]],
    patients: Sequence[str] | None = None,
) -> Points:
    """Operating points of each label, for scans other than these.

    Args:
        scores: `(scans, labels)`, of tuning patients.
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.
        names: Of the labels.
        wanted: From `wanted_points`.
        patients: `(scans,)`, who was scanned; None makes every scan a patient of its own.

    Returns:
        Youden's and those that are wanted; a label with too few patients here, see `metrics.enough`, or for which no
        score gives what is wanted, has none. Nothing if all labels have too few.
    """
    scores, labels = checked(scores, labels, names, must_vary=False)
    labels = np.where(enough(labels, patients), labels, np.nan)
    try:
        points = {YOUDEN: named(choose_thresholds(scores, labels), names)}
    except ValueError:  # no label has enough
        return {}
    for name, (rule, share) in wanted.items():
        columns = zip(scores.T, labels.T, strict=True)
        points[name] = named([threshold_for(score, truth, rule, share) for score, truth in columns], names)
    return points


def remark_on_points(
    thresholds: Mapping[str, float], names: Sequence[str], tuned: Sequence[str] | None = None
) -> list[str]:
    """Why findings have no operating point; nothing if all have one.

    Args:
        thresholds: By finding, of those that have one.
        names: Of all.
        tuned: Of those that the tuning patients have labels of; all by default.
    """
    lacking = [name for name in names if name not in thresholds]
    unknown = [] if tuned is None else [name for name in lacking if name not in tuned]
    few = [name for name in lacking if name not in unknown]
    remarks = []
    if few:
        which = "any finding" if len(few) == len(names) else ", ".join(few)
        why = f"fewer than {FEWEST} tuning patients have it, or are without it"
        remarks.append(f"No operating point for {which}: {why}.")
    if unknown:
        remarks.append(f"No operating point for {', '.join(unknown)}: the tuning patients have no such label.")
    return remarks


def threshold_for(scores: np.ndarray, labels: np.ndarray, rule: str, share: float) -> float:
    """The highest score that reaches a sensitivity, or the lowest that reaches a specificity.

    Args:
        scores: `(scans,)`.
        labels: `(scans,)`, 0, 1 or NaN for unknown.
        rule: "sensitivity" or "specificity".
        share: What is wanted, in (0, 1].

    Returns:
        A score that occurs; NaN where the label does not vary, or none gives what is wanted.
    """
    present, absent = (np.sort(scores[labels == side]) for side in (1, 0))
    if not len(present) or not len(absent):
        return math.nan
    if rule == "sensitivity":
        return float(present[len(present) - math.ceil(share * len(present) - _ROUNDING)])
    candidates = np.unique(scores[~np.isnan(labels)])
    passed = np.searchsorted(absent, candidates)  # absent scans below a candidate
    enough = candidates[passed >= share * len(absent) - _ROUNDING]
    return float(enough[0]) if len(enough) else math.nan


def named(thresholds: Sequence[float] | np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Thresholds by label, of those that have one.

    Args:
        thresholds: `(labels,)`, NaN where a label has none.
        names: Of the labels.
    """
    return {name: float(each) for name, each in zip(names, thresholds, strict=True) if not math.isnan(each)}


def as_array(thresholds: Mapping[str, float] | None, names: Sequence[str]) -> np.ndarray | None:
    """Thresholds `(labels,)`, NaN where a label has none; `None` if no label of these has one.

    Args:
        thresholds: By label.
        names: Of the labels.
    """
    array = np.array([(thresholds or {}).get(name, np.nan) for name in names], float)
    return array if np.isfinite(array).any() else None


def carried_over(
    points: Points,
    scores: np.ndarray,
    labels: np.ndarray,
    patients: Sequence[str],
    names: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """What operating points that were chosen on other patients give on these, with 95 % intervals.

    Args:
        points: From `choose_points`, or an adapter's.
        scores: `(scans, labels)`.
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.
        patients: `(scans,)`, who was scanned.
        names: Of the labels.
        resamples: Of the bootstrap over patients.
        seed: Of the bootstrap.

    Returns:
        Ready for JSON. By name of the point: `thresholds` by label; `sensitivity` and `specificity`, means over labels;
        `sensitivity/LABEL` and `specificity/LABEL`; each as `{"value", "low", "high"}`, with None where a label has no
        threshold or does not vary.
    """
    scores, labels = checked(scores, labels, names, must_vary=False)
    found = {}
    for name, thresholds in points.items():
        at = np.array([thresholds.get(label, np.nan) for label in names], float)
        drawn = over_draws(partial(_shares, scores, labels, at), np.asarray(patients), resamples, seed)
        figures = {key: mean_over_labels(values) for key, values in drawn.items()}
        figures |= {f"{key}/{label}": row for key in WANTED for label, row in zip(names, drawn[key], strict=True)}
        found[name] = {"thresholds": dict(thresholds), **intervals_of(trusted(figures, labels, patients, names, at))}
    return found


def _shares(
    scores: np.ndarray, labels: np.ndarray, thresholds: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Sensitivity and specificity, `(labels, resamples)` each; NaN without a threshold or a label that varies."""
    is_called = scores >= thresholds
    present, absent = (labels == 1).T @ weights, (labels == 0).T @ weights  # (labels, resamples)
    hits, passed = (is_called & (labels == 1)).T @ weights, (~is_called & (labels == 0)).T @ weights
    is_defined = (present > 0) & (absent > 0) & ~np.isnan(thresholds)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = (hits / present, passed / absent)
    return {key: np.where(is_defined, share, np.nan) for key, share in zip(WANTED, shares, strict=True)}
