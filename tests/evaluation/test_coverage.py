"""How often 95 % intervals cover the truth, by simulation: as often as docs/scores.md says."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from medct.evaluation.metrics import compare

PREVALENCE = np.linspace(0.07, 0.45, 18)
NAMES = [f"finding {index}" for index in range(18)]
PAGE = Path(__file__).parents[2] / "docs" / "scores.md"
ROWS = {
    "mean AUROC": ("adapted", r"auroc"),
    "mean average precision": ("adapted", r"average_precision"),
    "accuracy, macro-F1, sensitivity, specificity": ("adapted", r"accuracy|macro_f1|sensitivity|specificity"),
    "AUROC of one finding": ("adapted", r"auroc/.*"),
    "average precision of one finding": ("adapted", r"average_precision/.*"),
    "paired difference of mean AUROC": ("difference", r"auroc"),
    "CT-CLIP protocol: accuracy": ("adapted", r"ct_clip_protocol/accuracy"),
    "RadFinder protocol: accuracy (balanced)": ("adapted", r"radfinder_protocol/balanced_accuracy"),
}


def figures(patients: int, seed: int, resamples: int) -> dict[tuple[str, str], dict]:
    """Of two models, on scans of which a patient has up to three, alike and with labels that may differ."""
    generator = np.random.default_rng(seed)
    people = np.repeat(np.arange(patients), generator.integers(1, 4, patients))

    def noise(of_patient: float, of_scan: float) -> np.ndarray:
        both = (generator.normal(size=(count, 18)) for count in (patients, len(people)))
        return of_patient * next(both)[people] + of_scan * next(both)

    labels = (noise(0.9, np.sqrt(0.19)) > norm.isf(PREVALENCE)).astype(float)
    common = 1.2 * labels + noise(0.8, 0.5) - 1
    models = [expit(1.5 * (common + noise(0, 0.8))), expit(1.5 * (common + 0.3 * labels + noise(0, 0.6)))]
    thresholds = np.full(18, 0.5)
    found = compare(*models, labels, people, NAMES, thresholds, thresholds, resamples=resamples, seed=seed)
    return {(part, key): each for part in ("adapted", "difference") for key, each in found[part].items()}


def covered(patients: int, studies: int) -> dict[str, float]:
    """By row, the share of intervals that hold the value of 50,000 patients."""
    truth = {key: each["value"] for key, each in figures(50_000, 0, 1).items()}
    hits = defaultdict(list)
    for seed in range(1, studies + 1):
        found = figures(patients, seed, 300)
        for row, (part, pattern) in ROWS.items():
            for (where, key), each in found.items():
                if where == part and re.fullmatch(pattern, key) and each["low"] is not None:
                    hits[row].append(each["low"] <= truth[where, key] <= each["high"])
    return {row: float(np.mean(each)) for row, each in hits.items()}


@pytest.mark.slow
@pytest.mark.parametrize("column", [0, 1])
def test_the_page_says_how_often_intervals_cover_the_truth(column):
    cells = dict(re.findall(r"^\| ([^|]+) \| (\d+ \| \d+ \| \d+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    found = covered((20, 50, 200)[column], 100)
    for row, share in found.items():
        assert 100 * share == pytest.approx(int(cells[row].split(" | ")[column]), abs=12), row
