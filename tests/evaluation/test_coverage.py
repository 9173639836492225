"""How often 95 % intervals cover the truth, by simulation: as often as docs/scores.md says."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from medct.evaluation.calibration import (
    apply_calibration,
    compare_calibration,
    expected_calibration_error,
    fit_calibration,
)
from medct.evaluation.metrics import compare, with_intervals
from medct.evaluation.retrieval import Pairs, recall_figures, shared_findings

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


def cohort(patients: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Who was scanned, labels, and scores of two models; scans of a patient are alike, and labels may differ."""
    generator = np.random.default_rng(seed)
    people = np.repeat(np.arange(patients), generator.integers(1, 4, patients))

    def noise(of_patient: float, of_scan: float) -> np.ndarray:
        both = (generator.normal(size=(count, 18)) for count in (patients, len(people)))
        return of_patient * next(both)[people] + of_scan * next(both)

    labels = (noise(0.9, np.sqrt(0.19)) > norm.isf(PREVALENCE)).astype(float)
    common = 1.2 * labels + noise(0.8, 0.5) - 1
    return people, labels, [expit(1.5 * (common + noise(0, 0.8))), expit(1.5 * (common + 0.3 * labels + noise(0, 0.6)))]


def figures(patients: int, seed: int, resamples: int) -> dict[tuple[str, str], dict]:
    """Of both models of a cohort, and their difference."""
    people, labels, models = cohort(patients, seed)
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


def calibration_covered(patients: int, studies: int) -> dict[str, float]:
    """The same of calibrated probabilities, whose truth is what each calibration gives 20,000 patients."""
    _, truth, (_, scores) = cohort(20_000, 0)
    hits = defaultdict(list)
    for seed in range(1, studies + 1):
        tuned, held_out = cohort(patients, 2 * seed), cohort(patients, 2 * seed + 1)
        calibration = fit_calibration(tuned[2][1], tuned[1], NAMES, tuned[0])
        found = compare_calibration(held_out[2][1], held_out[1], held_out[0], NAMES, calibration, 300, seed)["after"]
        calibrated = apply_calibration(scores, calibration, NAMES)
        present = truth[:, [name in calibration for name in NAMES]]
        of_all = {"Brier score": ("brier", ((calibrated - present) ** 2).mean())}
        error = expected_calibration_error(calibrated, present)
        of_all["expected calibration error, calibrated"] = ("expected_calibration_error", error)
        for row, (key, value) in of_all.items():
            hits[row].append(found[key]["low"] <= value <= found[key]["high"])
    return {row: float(np.mean(each)) for row, each in hits.items()}


def retrieval_covered(patients: int, studies: int) -> dict[str, float]:
    """The same of retrieval among as many patients, whose truth is the mean over all cohorts."""
    generator = np.random.default_rng(0)
    of_finding = generator.normal(size=(16, 18))
    of_finding /= np.linalg.norm(of_finding, axis=0)

    def unit(vectors: np.ndarray) -> np.ndarray:
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    found = defaultdict(list)
    for seed in range(studies):
        people = np.repeat(np.arange(patients), generator.integers(1, 4, patients))
        own = np.sqrt(0.7) * generator.normal(size=(patients, 16))[people]
        own += np.sqrt(0.3) * generator.normal(size=own.shape)
        labels = (own @ of_finding > norm.isf(PREVALENCE)).astype(float)
        images, texts = (unit(own + 0.7 * generator.normal(size=own.shape)) for _ in range(2))
        pairs = Pairs(images, texts, np.arange(len(people)), people)
        recall = recall_figures(pairs, at=(5,), resamples=300, seed=seed)
        found["recall at 5"] += recall["text_to_image"].values()
        found["MAP at 5"] += shared_findings(images, labels, people, (5,), 300, seed)["image_to_image"].values()
    truth = {row: np.mean([each["value"] for each in of_row]) for row, of_row in found.items()}
    return {
        row: float(np.mean([each["low"] <= truth[row] <= each["high"] for each in of_row if each["low"] is not None]))
        for row, of_row in found.items()
    }


def covered_with_few(present: int, auroc: float, studies: int) -> float:
    """How often the interval of a finding that so many of 200 patients have covers its AUROC."""
    generator = np.random.default_rng(0)
    labels = (np.arange(200) < present).astype(float)[:, None]
    apart = np.sqrt(2) * norm.ppf(auroc)
    hits = []
    for seed in range(studies):
        scores = expit(generator.normal(size=labels.shape) + apart * labels)
        found = with_intervals(scores, labels, None, ["finding"], resamples=300, seed=seed)["scores"]["auroc/finding"]
        if found["low"] is not None:
            hits.append(found["low"] <= auroc <= found["high"])
    return float(np.mean(hits))


@pytest.fixture
def cells() -> dict[str, list[int]]:
    """The rows of the page that have three figures."""
    rows = re.findall(r"^\| ([^|]+) \| (\d+ \| \d+ \| \d+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {title: [int(cell) for cell in row.split(" | ")] for title, row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("simulate", [covered, calibration_covered, retrieval_covered])
def test_the_page_says_how_often_intervals_cover_the_truth(simulate, column, cells):
    for row, share in simulate((20, 50, 200)[column], 100).items():
        assert 100 * share == pytest.approx(cells[row][column], abs=12), row


@pytest.mark.slow
@pytest.mark.parametrize("auroc", [0.7, 0.9, 0.98])
def test_the_page_says_how_often_intervals_of_rare_findings_do(auroc, cells):
    for column, present in enumerate((5, 12, 30)):
        found = covered_with_few(present, auroc, 200)
        assert 100 * found == pytest.approx(cells[f"AUROC {auroc:g}"][column], abs=8), present


@pytest.mark.slow
@pytest.mark.parametrize(("present", "at_most"), [(30, 1.5), (5, 2.6)])
def test_the_page_says_how_many_of_18_findings_look_significant_by_chance(present, at_most):
    """Two models that are equally good: about one, and about two where few have each."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(200)[:, None] < present, 18, axis=1).astype(float)
    found = []
    for seed in range(20):
        common = np.sqrt(0.7) * generator.normal(size=labels.shape) + labels
        models = [expit(common + np.sqrt(0.3) * generator.normal(size=labels.shape)) for _ in range(2)]
        difference = compare(*models, labels, None, NAMES, resamples=300, seed=seed)["difference"]
        intervals = [difference[f"auroc/{name}"] for name in NAMES]
        found.append(sum(not each["low"] <= 0 <= each["high"] for each in intervals))
    assert at_most - 1.1 < np.mean(found) < at_most
    said = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert "of 18 findings without any effect, about one looks significant, and about two if five patients" in said
