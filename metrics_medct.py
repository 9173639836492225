"""Scores of zero-shot classification, from arrays.

Also an `evaluate` module: `evaluate.load("metrics_medct.py")`. So it imports nothing of this package.
"""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import roc_auc_score


def label_aurocs(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each label by itself.

    Args:
        scores: `(scans, labels)`, greater is more likely present.
        labels: `(scans, labels)`, 0 or 1.

    Returns:
        `(labels,)`, in [0, 1]; NaN where all scans agree, as the area is then undefined.
    """
    return np.array(
        [
            roc_auc_score(truth, score) if truth.min() < truth.max() else np.nan
            for truth, score in zip(np.asarray(labels).T, np.asarray(scores).T, strict=True)
        ]
    )


def zero_shot_scores(scores: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, float]:
    """Mean and single areas under the ROC curve.

    Args:
        scores: `(scans, labels)`, greater is more likely present.
        labels: `(scans, labels)`, 0 or 1.
        names: Of the labels.

    Returns:
        `auroc`, the mean over the labels that both occur and lack; `auroc/NAME` of each; `scans`, their number.

    Raises:
        ValueError: If no label both occurs and lacks.
    """
    aurocs = label_aurocs(scores, labels)
    if np.isnan(aurocs).all():
        raise ValueError(f"AUROC is undefined: in these {len(labels)} scans each label is always or never present.")
    by_name = {f"auroc/{name}": float(auroc) for name, auroc in zip(names, aurocs, strict=True)}
    return {"auroc": float(np.nanmean(aurocs)), **by_name, "scans": len(labels)}


class ZeroShotScores(evaluate.Metric):
    """`zero_shot_scores` as an `evaluate` module; `names` may be given to `compute`."""

    def _info(self):
        rows = datasets.List(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions: scores, references: 0 or 1; one row a scan, one column a label.",
            features=datasets.Features({"predictions": rows, "references": rows}),
        )

    def _compute(self, predictions, references, names=None):
        scores, labels = np.array(predictions), np.array(references)
        return zero_shot_scores(scores, labels, names or [str(index) for index in range(scores.shape[1])])
