"""All figures of one source: of one model, or of two and their paired difference.

What training reports of its held-out studies, what `medct evaluate` reports of each source, and what `medct compare`
and `medct metrics` compute again from scores in a file, is made here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medct.evaluation.calibration import compare_calibration, fit_calibration
from medct.evaluation.metrics import (
    compare,
    intervals_of,
    mean_over_labels,
    over_draws,
    resampled_aurocs,
    trusted,
    varying,
    with_intervals,
)
from medct.evaluation.operating_points import YOUDEN, Points, as_array, carried_over, choose_points
from medct.evaluation.scoring import ScoredStudies

FEWEST_IN_GROUP = 20
"""Scans below which a subgroup is counted and not scored."""


@dataclass(frozen=True)
class Scores:
    """What a model said about the studies of a source, and what it brought along from its tuning patients.

    Args:
        scored: The studies.
        points: Operating points by name.
        calibration: Slope and intercept by label.
    """

    scored: ScoredStudies
    points: Points = field(default_factory=dict)
    calibration: Mapping[str, list[float]] = field(default_factory=dict)


def choose_on(tuned: ScoredStudies, wanted: Mapping[str, tuple[str, float]]) -> tuple[Points, dict[str, list[float]]]:
    """Operating points and calibration of a model, for other patients than these.

    Args:
        tuned: Its scores of tuning patients.
        wanted: Points besides Youden's, see `wanted_points`.
    """
    about = tuned.scores, tuned.labels, tuned.names
    return choose_points(*about, wanted, tuned.patients), fit_calibration(*about, tuned.patients)


def source_figures(
    models: Mapping[str, Scores], names: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """All figures of one source.

    Args:
        models: One model, or two to compare, by name; of two, the second is the newer one, and both have scored the
            same studies in the same order.
        names: Of the labels.
        resamples: Of the bootstrap over patients.
        seed: Of the bootstrap.

    Returns:
        Ready for JSON. Of one model what `metrics.with_intervals` returns, of two what `metrics.compare` does, where
        `base` is the first and `adapted` the second. `models`: their names, by `scores`, or `base` and `adapted`.
        `operating_points`: by model, see `carried_over`. `calibration_error`: by model, see `compare_calibration`.
        `subgroups`: see `subgroup_figures`.

    Raises:
        ValueError: If no label varies, or arrays hold what they should not.
    """
    options = {"resamples": resamples, "seed": seed}
    first = next(iter(models.values())).scored
    about = (first.labels, first.patients, names)
    scores = [each.scored.scores for each in models.values()]
    called = [each.points.get(YOUDEN, {}) for each in models.values()]
    shared = set.intersection(*map(set, called))
    thresholds = [as_array({name: each[name] for name in shared}, names) for each in called]
    if any(each is None for each in thresholds):
        thresholds = [None] * len(thresholds)
    if len(models) == 1:
        figures = with_intervals(*scores, *about, *thresholds, **options)
    else:
        figures = compare(*scores, *about, *thresholds, **options)
    places = ("scores",) if len(models) == 1 else ("base", "adapted")
    points, errors = {}, {}
    for name, each in models.items():
        if each.points:
            points[name] = carried_over(each.points, each.scored.scores, *about, **options)
        if error := compare_calibration(each.scored.scores, *about, dict(each.calibration), **options):
            errors[name] = error
    return {
        "models": dict(zip(places, models, strict=True)),
        **figures,
        "operating_points": points,
        "calibration_error": errors,
        "subgroups": subgroup_figures({name: each.scored for name, each in models.items()}, names, **options),
    }


def subgroup_figures(
    models: Mapping[str, ScoredStudies], names: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """Mean AUROC in the subgroups of a source, such as women, or scans of one manufacturer.

    Args:
        models: See `source_figures`.
        names: Of the labels.
        resamples: Of the bootstrap over patients.
        seed: Of the bootstrap.

    Returns:
        For each division, such as "sex": `division`; `groups`, each with `group`, `scans`, `patients`, `labels` (how
        many vary there, over which the mean is) and, by model, `auroc` as an interval, `None` for those of fewer than
        `FEWEST_IN_GROUP` scans; with two models also that of `difference`.
    """
    first = next(iter(models.values()))
    # A file of several sources has the columns of all.
    divisions = dict.fromkeys(division for about in first.about for division, group in about.items() if group)
    found = []
    for division in divisions:
        group_of = np.array([about.get(division, "") or "unknown" for about in first.about])
        groups = [
            _group(models, names, group_of == group, str(group), resamples, seed) for group in np.unique(group_of)
        ]
        found.append({"division": division, "groups": groups})
    return found


def _group(
    models: Mapping[str, ScoredStudies],
    names: Sequence[str],
    is_in: np.ndarray,
    group: str,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    rows = np.flatnonzero(is_in)
    parts = {name: scored.take(rows) for name, scored in models.items()}
    first = next(iter(parts.values()))
    labels = int(varying(first.labels).sum())
    about = {"group": group, "scans": len(rows), "patients": len(set(first.patients)), "labels": labels}
    if len(rows) < FEWEST_IN_GROUP or not labels:
        return about | {"auroc": None}
    drawn = {name: _mean_aurocs(part, resamples, seed) for name, part in parts.items()}
    drawn = {
        name: trusted({"auroc": each}, first.labels, first.patients, names)["auroc"] for name, each in drawn.items()
    }
    aurocs = intervals_of(drawn)
    if len(drawn) == 2:
        old, new = drawn.values()
        aurocs |= intervals_of({"difference": new - old}, lowest=-1)
    return about | {"auroc": aurocs}


def _mean_aurocs(scored: ScoredStudies, resamples: int, seed: int) -> np.ndarray:
    """Mean AUROC over labels, `(1 + resamples,)`: of the scans as they are, then of each resample."""

    def mean(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {"mean": mean_over_labels(resampled_aurocs(scored.scores, scored.labels, weights))}

    return over_draws(mean, np.asarray(scored.patients), resamples, seed)["mean"]
