"""What a run found: scores before and after, what was forgotten, operating points, calibration, and remarks."""

import math
from typing import Any

import numpy as np

from medct.evaluation.calibration import compare_calibration, fit_calibration
from medct.evaluation.metrics import choose_thresholds, compare, zero_shot_scores
from medct.evaluation.report import calibration_table, results_table, sites_table
from medct.evaluation.scoring import ScoredStudies

SPLITS = ("tune", "valid")
KEPT_SPLITS = ("keep_tune", "keep_valid")

Scored = dict[str, ScoredStudies]
"""By split: "tune" and "valid" of the new site, and where something is to be kept "keep_tune" and "keep_valid"."""


def mean_auroc(scored: ScoredStudies) -> float | None:
    """Mean AUROC over labels; `None` if none of them varies among these studies.

    Args:
        scored: Studies with their scores.
    """
    try:
        return zero_shot_scores(scored.scores, scored.labels, scored.names)["auroc"]
    except ValueError:
        return None


def thresholds_from(scored: ScoredStudies) -> np.ndarray | None:
    """Operating points; None if no label varies among these studies."""
    try:
        return choose_thresholds(scored.scores, scored.labels)
    except ValueError:
        return None


def operating_points(thresholds: np.ndarray, names: list[str]) -> dict[str, float]:
    """Thresholds by label, of those that have one.

    Args:
        thresholds: `(labels,)`, NaN where a label has none.
        names: Of the labels.
    """
    return {name: float(each) for name, each in zip(names, thresholds, strict=True) if not math.isnan(each)}


def compare_all(before: Scored, after: Scored, resamples: int, seed: int) -> dict[str, Any]:
    """Base and adapted model on held-out studies.

    Args:
        before: Of the base.
        after: Of the adapted model.
        resamples: Of the bootstrap over patients.
        seed: Of the bootstrap.

    Returns:
        Ready for JSON. `comparison`: on the new site, see `metrics.compare`. `kept`: the same on what is to be kept, or
        `None`. `tune_auroc`: mean AUROC of each model on the new site's tuning studies, `keep_tune_auroc` on those to
        be kept. `thresholds` and `calibration`: of the adapted model, from the tuning studies. `calibration_error`: see
        `compare_calibration`. `table`: all of it in Markdown.
    """
    thresholds = [thresholds_from(scored["tune"]) for scored in (before, after)]
    options = {"resamples": resamples, "seed": seed}
    comparison = _compared(before["valid"], after["valid"], *thresholds, **options)
    kept = None
    if KEPT_SPLITS[1] in before and mean_auroc(before["keep_valid"]) is not None:
        kept = _compared(before["keep_valid"], after["keep_valid"], **options)
    tune, valid, names = after["tune"], after["valid"], after["valid"].names
    calibration = fit_calibration(tune.scores, tune.labels, names)
    errors = compare_calibration(valid.scores, valid.labels, valid.patients, names, calibration, **options)
    tables = [results_table(comparison, names), sites_table(comparison, kept), calibration_table(errors)]
    return {
        "comparison": comparison,
        "kept": kept,
        "tune_auroc": _by_model(before, after, "tune"),
        "keep_tune_auroc": _by_model(before, after, "keep_tune"),
        "thresholds": None if thresholds[1] is None else operating_points(thresholds[1], names),
        "calibration": calibration or None,
        "calibration_error": errors,
        "table": "\n\n".join(table for table in tables if table),
    }


def _compared(
    before: ScoredStudies, after: ScoredStudies, *thresholds: np.ndarray | None, **options: int
) -> dict[str, Any]:
    return compare(before.scores, after.scores, before.labels, before.patients, before.names, *thresholds, **options)


def _by_model(before: Scored, after: Scored, split: str) -> dict[str, float | None] | None:
    if split not in before:
        return None
    return {"base": mean_auroc(before[split]), "adapted": mean_auroc(after[split])}


def remarks_on(results: dict[str, Any], max_forgotten: float) -> list[str]:
    """What nobody should miss who uses the adapter, each in a sentence or two.

    Args:
        results: With `strength` and what `compare_all` returns.
        max_forgotten: Most that the mean AUROC on what is to be kept may fall.
    """
    if results["strength"] == 0:
        return [
            "This adapter does not help: on the tuning patients no strength of it scores above the base within what "
            "may be forgotten. Its strength is 0, so what is saved is the base, unchanged."
        ]
    remarks = []
    tune = results["tune_auroc"]
    if tune["base"] is None:
        remarks.append("No label varies among the tuning patients, so nothing could be chosen there.")
    elif tune["adapted"] < tune["base"]:
        remarks.append(
            f"Worse than the base on the tuning patients: mean AUROC {tune['adapted']:.3f}, not {tune['base']:.3f}."
        )
    if (gained := results["comparison"]["difference"]["auroc"]["value"]) < 0:
        remarks.append(f"Worse than the base on the held-out patients: mean AUROC {gained:+.3f}.")
    lost = -results["kept"]["difference"]["auroc"]["value"] if results["kept"] else 0
    if lost > max_forgotten:
        remarks.append(
            f"On held-out patients of what is to be kept it forgets {lost:.3f} of mean AUROC, more than the allowed "
            f"{max_forgotten:g}."
        )
    return remarks
