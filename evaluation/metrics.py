"""Metrics of zero-shot classification with intervals, computed from arrays.

Also an `evaluate` module: `evaluate.load("evaluation/metrics.py")`.

What holds throughout:

* Labels are 0, 1 or NaN; NaN means unknown, and such a scan is skipped for that label alone.
* A label that is always or never present among its known scans has no score, and no part in the mean over labels. The
  same holds within a resample, so the mean there may be over fewer labels.
* A label is predicted where its score reaches the threshold. Thresholds come from scans that are not scored; the
  exceptions, CT-CLIP's and RadFinder's protocols, are marked by their names.
* Precision and F1 are 0 where nothing is predicted.
* Intervals are the middle 95 % of a bootstrap over patients: a patient drawn comes with all their scans. Two models are
  compared on the same resamples. Resamples repeat scans, which inflates average precision and CT-CLIP's protocol, so an
  interval is shifted back by the difference between the resamples' mean and the value. Of 100 such intervals, 80
  covered the mean average precision of 18 labels in 150 scans; without the shift, 62 did
  (`test_bias_of_average_precision_is_corrected`). What the value itself is too high by is not taken off: intervals of
  the protocols stand around a value that is too good. `docs/scores.md` says how many cover the truth.
* Where resamples cannot tell the spread, there is no interval; see `trusted`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import evaluate
import numpy as np

from medct.common.progress import SHOWN_AFTER_SECONDS, tqdm

# CT-CLIP searches its thresholds here, and takes the one whose ROC point is closest to the corner as the best.
CT_CLIP_GRID = np.linspace(0, 1, 100)
CT_CLIP_PREFIX = "ct_clip_protocol/"
RADFINDER_PREFIX = "radfinder_protocol/"
# How good a threshold is, given the shares of present and of absent scans that reach it.
_RULES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "youden": lambda sensitivity, false_alarms: sensitivity - false_alarms,
    "closest_corner": lambda sensitivity, false_alarms: -np.hypot(1 - sensitivity, false_alarms),
}
RANK_METRICS = ("auroc", "average_precision")
SINGLE_METRICS = (*RANK_METRICS, "sensitivity", "specificity")
"""Those that are given for each label as well as in the mean."""
AT_THRESHOLDS = ("accuracy", "balanced_accuracy", "macro_f1", "precision", "sensitivity", "specificity")
"""Means in which a label without a threshold has no part."""
MEAN_NAMES = {"f1": "macro_f1"}  # where the mean over labels has a name of its own
INTERVAL = (0.025, 0.975)
_ROUNDING = 1e-12  # 0.4 - 0.2 is more than 0.3 - 0.1, by rounding alone
RESAMPLES_AT_ONCE = 128  # a block of weights fits the processor's cache

FEWEST = 5
"""Patients with a finding, and as many without it, that an interval, an operating point and a calibration need."""

Interval = dict[str, float | None]


def zero_shot_scores(
    scores: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    thresholds: np.ndarray | None = None,
) -> dict[str, float]:
    """Means over labels, and the figures of each label.

    Args:
        scores: `(scans, labels)`, greater is more likely present.
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.
        names: Names of the labels.
        thresholds: `(labels,)`, chosen on other scans by `choose_thresholds`; without them only rankings are scored.

    Returns:
        `auroc`, `average_precision` and, with thresholds, `accuracy`, `balanced_accuracy`, `macro_f1`, `precision`,
        `sensitivity`, `specificity`: means over labels. `auroc/NAME`, ..., `f1/NAME`: the figure of one label, NaN
        where it has no score. `scans`: their number.

    Raises:
        ValueError: If shapes do not match, arrays hold other values, or no label varies.
    """
    scores, labels = checked(scores, labels, names)
    figures = _figures(scores, labels, thresholds, np.ones((len(labels), 1)))
    figures = {key: values for key, values in figures.items() if "/" not in key}
    return {**_once(figures, names), "scans": len(labels)}


def ct_clip_protocol(scores: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """The figures that CT-CLIP and its successors report, for comparison with theirs.

    Thresholds are chosen on the very labels that are scored, so these figures are better than new scans would give.

    Args:
        scores: `(scans, labels)`, probabilities.
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.
        names: Names of the labels.

    Returns:
        `accuracy`, `weighted_f1` (the F1 of presence and of absence, weighted by their scans), `binary_f1`, `precision`
        and `threshold`: means over labels. `accuracy/NAME`, ...: the figure of one label, NaN where it has no score.

    Raises:
        ValueError: If shapes do not match, arrays hold other values, or no label varies.
    """
    return _protocol(scores, labels, names, CT_CLIP_PREFIX)


def radfinder_protocol(scores: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """The figures that RadFinder (arXiv 2603.02026) and CheXzero report, for comparison with theirs.

    As in `ct_clip_protocol`, thresholds are chosen on the very labels that are scored, here by Youden's index among the
    scores that occur.

    Args:
        scores, labels, names: See `ct_clip_protocol`. RadFinder's own come from an ensemble of templates.

    Returns:
        `balanced_accuracy` (its "accuracy"), `weighted_f1`, `precision`, `sensitivity`, `specificity` and `threshold`:
        means over labels. `precision/NAME`, ...: the figure of one label, NaN where it has no score.

    Raises:
        ValueError: If shapes do not match, arrays hold other values, or no label varies.
    """
    return _protocol(scores, labels, names, RADFINDER_PREFIX)


def _protocol(scores: np.ndarray, labels: np.ndarray, names: Sequence[str], prefix: str) -> dict[str, float]:
    scores, labels = checked(scores, labels, names, probabilities=True)
    figures = _figures(scores, labels, None, np.ones((len(labels), 1)))
    return _once({key.removeprefix(prefix): values for key, values in figures.items() if key.startswith(prefix)}, names)


def choose_thresholds(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The threshold of each label with the most sensitivity + specificity (Youden), for scans other than these.

    Args:
        scores: `(scans, labels)`, greater is more likely present.
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.

    Returns:
        `(labels,)`, each a score that occurs, the highest if several are best; NaN where the label does not vary.

    Raises:
        ValueError: If shapes do not match, arrays hold other values, or no label varies.
    """
    scores, labels = checked(scores, labels)
    once = np.ones((len(labels), 1))
    thresholds = np.full(labels.shape[1], np.nan)
    for index in np.flatnonzero(varying(labels)):
        known = ~np.isnan(labels[:, index])
        candidates = np.unique(scores[known, index])[::-1]
        reach = _Reach(scores[:, index], labels[:, index], once)
        thresholds[index] = candidates[_best(reach, candidates, "youden")[0]]
    return thresholds


def with_intervals(
    scores: np.ndarray,
    labels: np.ndarray,
    patients: Sequence[str] | None,
    names: Sequence[str],
    thresholds: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of one model with 95 % intervals.

    Args:
        scores: `(scans, labels)`, probabilities.
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.
        patients: `(scans,)`, the patient of each scan; None makes every scan a patient of its own.
        names: Names of the labels.
        thresholds: `(labels,)`, chosen on other scans.
        resamples: Number of bootstrap resamples.
        seed: Seed for the bootstrap; the order of the scans has no influence.

    Returns:
        Ready for JSON. `scores`: `{"value", "low", "high"}` by metric, with None where undefined; the means of
        `zero_shot_scores`, those of the protocols prefixed with `ct_clip_protocol/` and `radfinder_protocol/`, and
        `auroc/NAME` and `average_precision/NAME`. Besides, `scans`, `patients`, `resamples`, and `present` and
        `absent`, which count the scans by label; `too_few`, the labels that have a value and no interval, see `enough`;
        with thresholds `no_threshold`, the labels that have an AUROC and no part in the means at thresholds.

    Raises:
        ValueError: If shapes do not match, arrays hold other values, or no label varies.
    """
    (drawn,) = _resampled([(scores, thresholds)], labels, patients, names, resamples, seed)
    return {
        **_about(labels, patients, names, resamples, thresholds),
        "scores": intervals_of(trusted(drawn, labels, patients, names, thresholds)),
    }


def compare(
    base_scores: np.ndarray,
    adapted_scores: np.ndarray,
    labels: np.ndarray,
    patients: Sequence[str] | None,
    names: Sequence[str],
    thresholds_base: np.ndarray | None = None,
    thresholds_adapted: np.ndarray | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of two models on the same scans, and their paired difference, with 95 % intervals.

    Args:
        base_scores: `(scans, labels)`, probabilities before adaptation.
        adapted_scores: `(scans, labels)`, probabilities after it.
        labels, patients, names: See `with_intervals`.
        thresholds_base: `(labels,)`, for the scores before adaptation, chosen on other scans.
        thresholds_adapted: `(labels,)`, for the scores after adaptation, chosen on other scans. A label for which one
            of the models has none has no part in the means at thresholds, whose difference would be of other labels.
        resamples, seed: See `with_intervals`.

    Returns:
        As `with_intervals`, with `base`, `adapted` and `difference` (adapted - base) in place of `scores`.

    Raises:
        ValueError: If shapes do not match, arrays hold other values, no label varies, or only one model has thresholds.
    """
    if (thresholds_base is None) != (thresholds_adapted is None):
        raise ValueError("Only one model has thresholds. Pass thresholds_base and thresholds_adapted, or neither.")
    if thresholds_base is not None and thresholds_adapted is not None:
        thresholds_base, thresholds_adapted = _of_both(thresholds_base, thresholds_adapted)
    models = [(base_scores, thresholds_base), (adapted_scores, thresholds_adapted)]
    drawn = _resampled(models, labels, patients, names, resamples, seed)
    base, adapted = (trusted(each, labels, patients, names, thresholds_base) for each in drawn)
    return {
        **_about(labels, patients, names, resamples, thresholds_base),
        "base": intervals_of(base),
        "adapted": intervals_of(adapted),
        "difference": intervals_of({key: adapted[key] - base[key] for key in base}, lowest=-1),
    }


def _of_both(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds of the labels for which both models have one; NaN for others."""
    if len(one) != len(other):  # refused where they are used
        return one, other
    is_lacking = np.isnan(one) | np.isnan(other)
    return np.where(is_lacking, np.nan, one), np.where(is_lacking, np.nan, other)


class _Reach:
    """How many scans of one label reach a threshold, in many resamples at once.

    Sorted once, so each metric of each resample is read off cumulative sums.

    Args:
        scores: `(scans,)`.
        truth: `(scans,)`, 0, 1 or NaN.
        weights: `(scans, resamples)`, how often each scan was drawn.
    """

    def __init__(self, scores: np.ndarray, truth: np.ndarray, weights: np.ndarray):
        self._sides = []
        for side in (1, 0):
            scans = np.flatnonzero(truth == side)
            scans = scans[np.argsort(-scores[scans])]
            drawn = np.zeros((len(scans) + 1, weights.shape[1]))  # (k, resamples): draws among the k highest scores
            np.cumsum(weights[scans], axis=0, out=drawn[1:])
            self._sides.append((-scores[scans], drawn))
        self.present_scores = -self._sides[0][0]
        self.present, self.absent = (drawn[-1] for _, drawn in self._sides)

    def counts(self, thresholds: np.ndarray, beyond: bool = False) -> Iterator[np.ndarray]:
        """Present and absent scans, each `(thresholds, resamples)`, that reach or, with `beyond`, exceed a threshold.

        Args:
            thresholds: `(thresholds,)`.
            beyond: Leave out scans whose score equals the threshold.
        """
        for falling, drawn in self._sides:
            yield drawn[np.searchsorted(falling, -thresholds, side="left" if beyond else "right")]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Quotient of two arrays; 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole > 0)


def _rank_figures(reach: _Reach) -> dict[str, np.ndarray]:
    """AUROC and average precision, `(resamples,)` each; ties count half in the one, and as one step in the other."""
    steps = np.unique(reach.present_scores)
    hits, false_alarms = reach.counts(steps)
    hits_beyond, false_alarms_beyond = reach.counts(steps, beyond=True)
    gained = hits - hits_beyond
    pairs_lost = np.einsum("sr,sr->r", gained, (false_alarms + false_alarms_beyond) / 2)
    precision = _ratio(hits, hits + false_alarms)
    return {
        "auroc": 1 - _ratio(pairs_lost, reach.present * reach.absent),
        "average_precision": _ratio(np.einsum("sr,sr->r", gained, precision), reach.present),
    }


def resampled_aurocs(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC of each label in each resample, `(labels, resamples)`; NaN where the label does not vary there.

    Args:
        scores: `(scans, labels)`.
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.
        weights: `(scans, resamples)`, how often each scan was drawn.
    """
    aurocs = []
    for score, truth in zip(np.asarray(scores, float).T, np.asarray(labels, float).T, strict=True):
        reach = _Reach(score, truth, weights)
        varies = (reach.present > 0) & (reach.absent > 0)
        aurocs.append(np.where(varies, _rank_figures(reach)["auroc"], np.nan))
    return np.stack(aurocs)


def _decision_figures(reach: _Reach, hits: np.ndarray, false_alarms: np.ndarray) -> dict[str, np.ndarray]:
    """Figures that follow from the counts of hits and false alarms, `(resamples,)` each."""
    misses, rejections = reach.present - hits, reach.absent - false_alarms
    scans = reach.present + reach.absent
    sensitivity, specificity = _ratio(hits, reach.present), _ratio(rejections, reach.absent)
    f1 = _ratio(2 * hits, 2 * hits + false_alarms + misses)
    f1_of_absence = _ratio(2 * rejections, 2 * rejections + false_alarms + misses)
    return {
        "accuracy": _ratio(hits + rejections, scans),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "f1": f1,
        "weighted_f1": _ratio(reach.present * f1 + reach.absent * f1_of_absence, scans),
        "precision": _ratio(hits, hits + false_alarms),
        "sensitivity": sensitivity,
        "specificity": specificity,
    }


def _best(reach: _Reach, candidates: np.ndarray, rule: str) -> np.ndarray:
    """Index of the first of the best thresholds, `(resamples,)`."""
    hits, false_alarms = reach.counts(candidates)
    merit = _RULES[rule](_ratio(hits, reach.present), _ratio(false_alarms, reach.absent))
    return (merit > merit.max(axis=0) - _ROUNDING).argmax(axis=0)


# Protocols that choose their thresholds on the scans that they score: by which rule, and what they report, by our names
# and theirs.
_PROTOCOLS: dict[str, tuple[str, dict[str, str]]] = {
    CT_CLIP_PREFIX: (
        "closest_corner",
        {"accuracy": "accuracy", "weighted_f1": "weighted_f1", "f1": "binary_f1", "precision": "precision"},
    ),
    RADFINDER_PREFIX: (
        "youden",
        {name: name for name in ("balanced_accuracy", "weighted_f1", "precision", "sensitivity", "specificity")},
    ),
}


def _protocol_figures(reach: _Reach, scores: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of the protocols, `(resamples,)` each, with thresholds chosen anew in each resample."""
    found: dict[str, np.ndarray] = {}
    for prefix, (rule, reported) in _PROTOCOLS.items():
        # Of a label that is unknown throughout there are no scores, and nothing is reported.
        candidates = CT_CLIP_GRID if prefix == CT_CLIP_PREFIX or not len(scores) else np.unique(scores)[::-1]
        best = _best(reach, candidates, rule)
        hits, false_alarms = (np.take_along_axis(counts, best[None], 0)[0] for counts in reach.counts(candidates))
        figures = _decision_figures(reach, hits, false_alarms)
        found |= {prefix + theirs: figures[ours] for ours, theirs in reported.items()}
        found[f"{prefix}threshold"] = candidates[best]
    return found


def _label_figures(
    scores: np.ndarray, truth: np.ndarray, weights: np.ndarray, threshold: float | None
) -> dict[str, np.ndarray]:
    """All figures of one label, `(resamples,)` each; NaN where it does not vary."""
    reach = _Reach(scores, truth, weights)
    scores = scores[~np.isnan(truth)]
    figures = _rank_figures(reach)
    if threshold is not None:
        hits, false_alarms = (counts[0] for counts in reach.counts(np.array([threshold])))
        decisions = _decision_figures(reach, hits, false_alarms)
        del decisions["weighted_f1"]
        chosen = np.nan if np.isnan(threshold) else 1
        figures |= {key: chosen * values for key, values in decisions.items()}
    figures |= _protocol_figures(reach, scores)
    varies = (reach.present > 0) & (reach.absent > 0)
    return {key: np.where(varies, values, np.nan) for key, values in figures.items()}


def _figures(
    scores: np.ndarray, labels: np.ndarray, thresholds: np.ndarray | None, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """All figures by metric, `(labels, resamples)` each, from weights `(scans, resamples)`."""
    chosen = [None] * labels.shape[1] if thresholds is None else np.asarray(thresholds, float)
    if len(chosen) != labels.shape[1]:
        raise ValueError(f"{labels.shape[1]} labels have {len(chosen)} thresholds. Pass one for each label.")
    by_label = [
        _label_figures(score, truth, weights, threshold)
        for score, truth, threshold in zip(scores.T, labels.T, chosen, strict=True)
    ]
    return {key: np.stack([figures[key] for figures in by_label]) for key in by_label[0]}


def mean_over_labels(values: np.ndarray) -> np.ndarray:
    """`(labels, resamples)` to `(resamples,)`, over the labels that have a figure; NaN where none has."""
    defined = (~np.isnan(values)).sum(axis=0)
    return np.where(defined > 0, np.nansum(values, axis=0) / np.maximum(defined, 1), np.nan)


def _named(figures: dict[str, np.ndarray], names: Sequence[str], singly: Collection[str]) -> dict[str, np.ndarray]:
    """Means over labels and, for some metrics, also the figures of each label; `(resamples,)` each."""
    means = {MEAN_NAMES.get(key, key): mean_over_labels(values) for key, values in figures.items()}
    return means | {f"{key}/{name}": row for key in singly for name, row in zip(names, figures[key], strict=True)}


def _once(figures: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, float]:
    """Means, and the figures of each label, on the scans as they are."""
    return {key: float(value) for key, (value,) in _named(figures, names, singly=figures).items()}


def patient_draws(patients: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each scan is drawn, `(scans, resamples)` in blocks; the first is `(scans, 1)`, every scan once.

    Args:
        patients: `(scans,)`, who was scanned; patients are drawn, with all their scans.
        resamples: Number of draws after the first.
        seed: Seed of the draws.
    """
    ids, patient_of_scan = np.unique(patients, return_inverse=True)
    generator = np.random.default_rng(seed)
    yield np.ones((len(patients), 1))
    with tqdm(total=resamples, desc="figures", unit="resample", delay=SHOWN_AFTER_SECONDS, leave=False) as bar:
        for start in range(0, resamples, RESAMPLES_AT_ONCE):
            size = min(RESAMPLES_AT_ONCE, resamples - start)
            drawn = generator.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size)
            yield np.ascontiguousarray(drawn.T, dtype=float)[patient_of_scan]
            bar.update(size)


def over_draws(
    figures: Callable[[np.ndarray], Mapping[str, np.ndarray]], patients: np.ndarray, resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Figures of the scans as they are, then of each resample, along the last axis; the same resamples for a seed.

    Args:
        figures: From weights, as `patient_draws` gives them, to figures by name, `(..., resamples)` each.
        patients, resamples, seed: See `patient_draws`.
    """
    blocks = [figures(weights) for weights in patient_draws(patients, resamples, seed)]
    return {name: np.concatenate([block[name] for block in blocks], axis=-1) for name in blocks[0]}


def _resampled(
    models: Sequence[tuple[np.ndarray, np.ndarray | None]],
    labels: np.ndarray,
    patients: Sequence[str] | None,
    names: Sequence[str],
    resamples: int,
    seed: int,
) -> list[dict[str, np.ndarray]]:
    """For each model and metric, `(1 + resamples,)`: on the scans as they are, then on each resample."""
    all_scores = [checked(scores, labels, names, probabilities=True)[0] for scores, _ in models]
    labels = np.asarray(labels, float)
    people = np.arange(len(labels)) if patients is None else np.asarray(patients)
    if people.shape != labels.shape[:1]:
        raise ValueError(f"{len(labels)} scans have {len(people)} patients. Pass one for each scan.")

    def figures(weights: np.ndarray, scores: np.ndarray, thresholds: np.ndarray | None) -> dict[str, np.ndarray]:
        return _named(_figures(scores, labels, thresholds, weights), names, singly=RANK_METRICS)

    return [
        over_draws(partial(figures, scores=scores, thresholds=thresholds), people, resamples, seed)
        for scores, (_, thresholds) in zip(all_scores, models, strict=True)
    ]


def intervals_of(drawn: dict[str, np.ndarray], lowest: float = 0) -> dict[str, Interval]:
    """Value and interval, within `lowest`..1, of each metric; resamples where it is undefined are left out.

    Args:
        drawn: `(1 + resamples,)` by metric; the first is the value.
        lowest: Least value that the metrics can have.
    """
    intervals: dict[str, Interval] = {}
    for key, (value, *_) in drawn.items():
        resampled = drawn[key][1:]
        resampled = resampled[~np.isnan(resampled)]
        defined = not np.isnan(value) and len(resampled) > 0
        low, high = None, None
        if defined:
            moved = np.quantile(resampled, INTERVAL) - (resampled.mean() - value)
            low, high = np.clip(moved, lowest, 1).tolist()
        intervals[key] = {"value": None if np.isnan(value) else float(value), "low": low, "high": high}
    return intervals


def _about(
    labels: np.ndarray,
    patients: Sequence[str] | None,
    names: Sequence[str],
    resamples: int,
    thresholds: np.ndarray | None,
) -> dict[str, Any]:
    """What was scored: numbers of scans, patients and resamples, and what is known of each label."""
    labels = np.asarray(labels, float)
    varies = varying(labels)

    def named(which: np.ndarray) -> list[str]:
        return [name for name, is_one in zip(names, which, strict=True) if is_one]

    about = {
        "scans": len(labels),
        "patients": len(labels) if patients is None else len(np.unique(patients)),
        "resamples": resamples,
        "present": dict(zip(names, (labels == 1).sum(axis=0).tolist(), strict=True)),
        "absent": dict(zip(names, (labels == 0).sum(axis=0).tolist(), strict=True)),
        "too_few": named(varies & ~enough(labels, patients)),
    }
    return about if thresholds is None else about | {"no_threshold": named(varies & np.isnan(thresholds))}


def enough(labels: np.ndarray, patients: Sequence[str] | None) -> np.ndarray:
    """Whether `FEWEST` patients have a finding, and as many are without it, in some scan of theirs; `(labels,)`.

    Args:
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.
        patients: `(scans,)`; None makes every scan a patient of its own.
    """
    labels = np.asarray(labels, float)
    people = np.arange(len(labels)) if patients is None else np.unique(np.asarray(patients), return_inverse=True)[1]
    sides = [[len(np.unique(people[truth == side])) for truth in labels.T] for side in (1, 0)]
    return np.min(sides, axis=0) >= FEWEST


def trusted(
    drawn: Mapping[str, np.ndarray],
    labels: np.ndarray,
    patients: Sequence[str] | None,
    names: Sequence[str],
    thresholds: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Figures whose resamples are NaN, so that they have no interval, where these say nothing of the spread.

    That is so for a label with too few patients, see `enough`; for a mean over labels of which more than half are such;
    and for a figure that is at the end of its range in every resample, as when few scans happen to be in order.

    Args:
        drawn: `(1 + resamples,)` by metric, or by metric and label, "METRIC/LABEL".
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.
        patients: `(scans,)`; None makes every scan a patient of its own.
        names: Of the labels.
        thresholds: `(labels,)`, NaN for a label that has no part in the means of `AT_THRESHOLDS`.
    """
    is_enough, varies = enough(labels, patients), varying(np.asarray(labels, float))
    of_label = {
        f"{metric}/{name}": each for metric in SINGLE_METRICS for name, each in zip(names, is_enough, strict=True)
    }
    is_called = varies if thresholds is None else varies & ~np.isnan(thresholds)
    found = {}
    for key, values in drawn.items():
        at_an_end = values[0] in (0, 1) and (values[np.isfinite(values)] == values[0]).all()
        has_part = is_called if key in AT_THRESHOLDS else varies
        of_mean = 2 * (is_enough & has_part).sum() >= max(1, has_part.sum())
        is_trusted = of_label.get(key, of_mean) and not at_an_end
        found[key] = values if is_trusted else np.where(np.arange(len(values)) == 0, values, np.nan)
    return found


def varying(labels: np.ndarray) -> np.ndarray:
    """Which labels are both present and absent, `(labels,)`.

    Args:
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.
    """
    return (labels == 1).any(axis=0) & (labels == 0).any(axis=0)


def checked(
    scores: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str] | None = None,
    must_vary: bool = True,
    probabilities: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels as float64.

    Args:
        scores: `(scans, labels)`.
        labels: `(scans, labels)`, 0, 1 or NaN for unknown.
        names: Of the labels; their number is compared where they are given.
        must_vary: Refuse labels of which none is both present and absent.
        probabilities: Refuse scores outside [0, 1].

    Raises:
        ValueError: If shapes do not match, arrays hold other values, or no label varies.
    """
    scores, labels = np.asarray(scores, float), np.asarray(labels, float)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"Scores {scores.shape} and labels {labels.shape} differ. Pass both as (scans, labels).")
    if names is not None and len(names) != labels.shape[1]:
        raise ValueError(f"{labels.shape[1]} labels have {len(names)} names. Pass one for each label.")
    if not np.isin(labels[~np.isnan(labels)], (0, 1)).all():
        raise ValueError("Some label is not 0, 1 or NaN. Pass 1 for present, 0 for absent, NaN for unknown.")
    if not np.isfinite(scores).all():
        bad = (~np.isfinite(scores)).any(axis=1).sum()
        raise ValueError(f"{bad} of {len(scores)} scans have scores that are not finite. Leave them out.")
    if probabilities and scores.size and not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError(
            "Some score is outside 0..1. Pass probabilities: CT-CLIP's protocol and calibration need them."
        )
    if must_vary and not varying(labels).any():
        raise ValueError(
            "There is nothing to score: in these scans each label is always or never present. "
            "Pass scans with and without a finding."
        )
    return scores, labels


class ZeroShotScores(evaluate.Metric):
    """`zero_shot_scores` and the means of `ct_clip_protocol`, prefixed with its name, as an `evaluate` module.

    `compute` also takes `names` and `thresholds`. With many processes, gather the arrays first and compute in one.
    """

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.List(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=(
                "predictions: scores; references: 0, 1 or NaN for unknown; one row per scan, one column per label. "
                "names: one per label. thresholds: one per label, chosen on other scans."
            ),
            features=datasets.Features({"predictions": rows, "references": rows}),
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[list[float]],
        names: Sequence[str] | None = None,
        thresholds: np.ndarray | None = None,
    ) -> dict[str, float]:
        scores, labels = np.array(predictions), np.array(references)
        names = [str(index) for index in range(scores.shape[1])] if names is None else names
        protocol = ct_clip_protocol(scores, labels, names)
        means = {CT_CLIP_PREFIX + key: value for key, value in protocol.items() if "/" not in key}
        return zero_shot_scores(scores, labels, names, thresholds) | means
