"""One small case, every number of which is worked out by hand; operating points, subgroups, two models."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medct.evaluation.figures import FEWEST_IN_GROUP, Scores, source_figures, subgroup_figures
from medct.evaluation.metrics import zero_shot_scores
from medct.evaluation.operating_points import (
    as_array,
    carried_over,
    choose_points,
    threshold_for,
    wanted_points,
)
from medct.evaluation.report import evaluation_report
from medct.evaluation.scoring import ScoredStudies

NAMES = ["nodule"]
# Present 0.9, 0.6, 0.4; absent 0.7, 0.3, 0.2.
SCORES = np.array([0.9, 0.7, 0.6, 0.4, 0.3, 0.2])[:, None]
LABELS = np.array([1, 0, 1, 1, 0, 0.0])[:, None]
PATIENTS = ["a", "b", "c", "d", "e", "f"]


def scored(scores=SCORES, about=()) -> ScoredStudies:
    return ScoredStudies(
        [f"{index}.nii" for index in range(len(scores))], PATIENTS, scores, LABELS, list(about), names=NAMES
    )


def values(figures: dict) -> dict[str, float]:
    return {key: interval["value"] for key, interval in figures.items()}


def test_every_number_of_a_small_case():
    points = {"youden": {"nodule": 0.6}, "sensitivity 0.9": {"nodule": 0.25}}
    found = source_figures({"model": Scores(scored(), points)}, NAMES, resamples=50)
    assert (found["scans"], found["patients"], found["present"], found["absent"]) == (
        6,
        6,
        {"nodule": 3},
        {"nodule": 3},
    )
    assert found["models"] == {"scores": "model"}
    expected = {
        # 0.9 beats all three absent scans, 0.6 and 0.4 two each.
        "auroc": 7 / 9,
        # Precision at each present scan, from above: 1 of 1, 2 of 3, 3 of 4.
        "average_precision": (1 + 2 / 3 + 3 / 4) / 3,
        # At 0.6: 0.9 and 0.6 itself are hits, 0.7 a false alarm, 0.4 a miss.
        "accuracy": 4 / 6,
        "balanced_accuracy": (2 / 3 + 2 / 3) / 2,
        "macro_f1": 2 * 2 / (2 * 2 + 1 + 1),
        "precision": 2 / 3,
        "sensitivity": 2 / 3,
        "specificity": 2 / 3,
        # The corner is nearest where all present scans and one absent are called: the grid's first step above 0.3.
        "ct_clip_protocol/threshold": 30 / 99,
        "ct_clip_protocol/accuracy": 5 / 6,
        "ct_clip_protocol/binary_f1": 6 / 7,
        "ct_clip_protocol/weighted_f1": (3 * 6 / 7 + 3 * 4 / 5) / 6,
        "ct_clip_protocol/precision": 3 / 4,
        # Youden's index is highest at 0.4: 1 + 2/3 - 1.
        "radfinder_protocol/threshold": 0.4,
        "radfinder_protocol/sensitivity": 1,
        "radfinder_protocol/specificity": 2 / 3,
        "radfinder_protocol/balanced_accuracy": 5 / 6,
        "radfinder_protocol/weighted_f1": (3 * 6 / 7 + 3 * 4 / 5) / 6,
        "radfinder_protocol/precision": 3 / 4,
    }
    means = {key: value for key, value in values(found["scores"]).items() if not key.endswith("/nodule")}
    assert means == pytest.approx(expected, abs=1e-12)
    of_points = found["operating_points"]["model"]
    assert [of_points[name]["sensitivity"]["value"] for name in points] == pytest.approx([2 / 3, 1])
    assert [of_points[name]["specificity/nodule"]["value"] for name in points] == pytest.approx([2 / 3, 1 / 3])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_thresholds_worked_out_by_hand():
    wanted = wanted_points(sensitivity=0.6, specificity=0.6)
    assert choose_points(SCORES, LABELS, NAMES, wanted) == {}  # three patients of either kind say too little
    points = choose_points(*(np.tile(each, (2, 1)) for each in (SCORES, LABELS)), NAMES, wanted)
    assert points == {"youden": {"nodule": 0.4}, "sensitivity 0.6": {"nodule": 0.6}, "specificity 0.6": {"nodule": 0.4}}
    score, truth = SCORES[:, 0], LABELS[:, 0]
    reached = {share: threshold_for(score, truth, "sensitivity", share) for share in (0.1, 1 / 3, 0.34, 2 / 3, 1)}
    assert list(reached.values()) == [0.9, 0.9, 0.6, 0.6, 0.4]
    passed = {share: threshold_for(score, truth, "specificity", share) for share in (0.1, 1 / 3, 0.34, 2 / 3, 1)}
    assert list(passed.values()) == [0.3, 0.3, 0.4, 0.4, 0.9]
    # Of 20 present scans, 0.95 are 19, whatever 0.95 * 20 rounds to.
    many, present = np.arange(40) / 40, np.arange(40) >= 20
    assert threshold_for(many, present.astype(float), "sensitivity", 0.95) == 21 / 40


@pytest.mark.parametrize("rule", ["sensitivity", "specificity"])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_wanted_is_reached_and_no_more_given_away(rule, seed):
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 2, 60).astype(float)
    score = np.round(np.clip(truth / 3 + generator.random(60) / 1.5, 0, 1), 2)  # with ties
    truth[:5] = np.nan

    def gives(at: float) -> dict[str, float]:
        return {"sensitivity": (score[truth == 1] >= at).mean(), "specificity": (score[truth == 0] < at).mean()}

    for share in (0.5, 0.8, 0.95):
        chosen = threshold_for(score, truth, rule, share)
        other = "specificity" if rule == "sensitivity" else "sensitivity"
        enough = [at for at in np.unique(score[~np.isnan(truth)]) if gives(at)[rule] >= share]
        assert chosen in enough
        assert gives(chosen)[other] == max(gives(at)[other] for at in enough)


def test_the_page_says_how_far_a_wanted_sensitivity_falls_short_on_others():
    """Of m present scans that score alike, the k-th highest of them is reached by k / (m + 1) of others in the mean."""
    page = (Path(__file__).parents[2] / "docs" / "scores.md").read_text(encoding="utf-8")
    claims = re.findall(r"(0\.\d\d) if (\d+)\s(?:tuning patients )?have", page)
    assert [int(present) for _, present in claims] == [20, 5]
    generator = np.random.default_rng(0)
    for said, present in claims:
        truth = np.repeat([1.0, 0.0], int(present))
        chosen = [threshold_for(generator.random(len(truth)), truth, "sensitivity", 0.95) for _ in range(2000)]
        assert 1 - np.mean(chosen) == pytest.approx(float(said), abs=0.015)  # uniform scores


def test_what_cannot_be_had_has_no_threshold():
    # The highest score is an absent scan's: no score passes all absent ones.
    assert math.isnan(threshold_for(np.array([0.9, 0.5]), np.array([0.0, 1]), "specificity", 1))
    assert math.isnan(threshold_for(np.array([0.9, 0.5]), np.array([1.0, 1]), "sensitivity", 0.5))
    assert choose_points(SCORES, LABELS * 0, NAMES, {}) == {}
    assert as_array({"other": 0.5}, NAMES) is None
    with pytest.raises(ValueError, match=r"A sensitivity of 1\.5 is impossible"):
        wanted_points(sensitivity=1.5)


def test_points_carried_over_have_intervals_by_patient():
    """Equal to the figures of `zero_shot_scores` on resampled scans; a label without a threshold has none."""
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, (30, 2)).astype(float)
    scores = np.clip(labels / 4 + generator.random((30, 2)) * 3 / 4, 0, 1)
    patients = [f"p{index // 2}" for index in range(30)]
    found = carried_over({"youden": {"a": 0.5}}, scores, labels, patients, ["a", "b"], resamples=200)["youden"]
    expected = zero_shot_scores(scores, labels, ["a", "b"], np.array([0.5, np.nan]))
    for key in ("sensitivity", "specificity"):
        assert found[key]["value"] == found[f"{key}/a"]["value"] == pytest.approx(expected[f"{key}/a"])
        assert found[key]["low"] < found[key]["value"] < found[key]["high"]
        assert found[f"{key}/b"]["value"] is None
    assert found["thresholds"] == {"a": 0.5}


def test_two_models_are_compared_and_named():
    better = np.where(LABELS == 1, 0.95, 0.05)
    found = source_figures({"old": Scores(scored()), "new": Scores(scored(better))}, NAMES, resamples=20)
    assert found["models"] == {"base": "old", "adapted": "new"}
    assert found["difference"]["auroc"]["value"] == pytest.approx(2 / 9)
    table = evaluation_report([{"source": "site b", **found}, {"source": "site c", **found}], NAMES)
    assert "| mean AUROC | old | new | difference |" in table
    assert table.count("| AUROC: finding (scans with it) | old | new | difference |") == 2
    assert f"| site b (6 scans of {found['patients']} patients) | 0.778" in table


def test_sources_are_columns_with_numbers_of_positives():
    found = source_figures({"model": Scores(scored(), {"youden": {"nodule": 0.5}})}, NAMES, resamples=20)
    table = evaluation_report([{"source": "b", **found}, {"source": "c", **found}], NAMES)
    lines = table.splitlines()
    assert lines[0] == "| AUROC (scans with the finding) | b (6 scans) | c (6 scans) |"
    cells = lines[2].strip("| ").split(" | ")
    assert cells[0] == "nodule" and cells[1] == cells[2]
    assert cells[1] == "0.778, 3"
    assert "| model: youden, 1 finding | 0.667 | 0.667 |" in table
    assert "Without an interval: findings that fewer than 5 patients have, or are without (nodule)" in table
    assert "Accuracy and F1 are at thresholds chosen on other scans." in table


def test_subgroups_are_scored_where_they_are_large_enough():
    generator = np.random.default_rng(2)
    count = 3 * FEWEST_IN_GROUP
    labels = generator.integers(0, 2, (count, 2)).astype(float)
    scores = generator.random((count, 2))
    sexes = ["F"] * (2 * FEWEST_IN_GROUP) + ["M"] * (FEWEST_IN_GROUP - 1) + [""]
    patients = [str(index // 2) for index in range(count)]
    about = [{"sex": each} for each in sexes]
    studies = ScoredStudies(list(map(str, range(count))), patients, scores, labels, about, names=["a", "b"])
    (found,) = subgroup_figures({"old": studies, "new": studies}, ["a", "b"], resamples=30)
    women, men, unknown = found["groups"]
    assert (found["division"], women["group"], men["group"], unknown["group"]) == ("sex", "F", "M", "unknown")
    assert (women["scans"], women["patients"], women["labels"]) == (40, 20, 2)
    expected = zero_shot_scores(scores[:40], labels[:40], ["a", "b"])["auroc"]
    assert women["auroc"]["old"]["value"] == pytest.approx(expected)
    assert women["auroc"]["difference"] == {"value": 0, "low": 0, "high": 0}
    assert men["auroc"] is None and unknown["auroc"] is None
    # A table of several sources has columns that one of them knows nothing of.
    blank = replace(studies, about=[{"sex": each["sex"], "age": ""} for each in about])
    assert subgroup_figures({"old": blank, "new": blank}, ["a", "b"], resamples=30) == [found]
    other = replace(studies, scores=1 - scores)
    changes = [
        subgroup_figures(dict(zip(("old", "new"), pair, strict=True)), ["a", "b"], resamples=30)[0]["groups"][0]
        for pair in ((studies, other), (other, studies))
    ]
    gained, lost = (each["auroc"]["difference"] for each in changes)
    assert [lost["value"], lost["low"], lost["high"]] == pytest.approx(
        [-gained["value"], -gained["high"], -gained["low"]]
    )
    models = {"old": Scores(studies), "new": Scores(studies)}
    table = evaluation_report([{"source": "b", **source_figures(models, ["a", "b"], resamples=5)}], ["a", "b"])
    assert "| sex: M | 19 | 10 | 2 | too few | too few | too few |" in table
    assert "The smallest group has 1 scan." in table


def test_means_at_thresholds_are_of_the_same_findings_and_say_of_which():
    """Of two adapters, each has operating points of its own; a source may know less than an adapter was tuned on."""
    names = ["nodule", "mass", "unknown"]
    scores = np.hstack([SCORES, 1 - SCORES, SCORES])
    labels = np.hstack([LABELS, LABELS, LABELS * np.nan])
    studies = ScoredStudies([f"{index}.nii" for index in range(6)], PATIENTS, scores, labels, names=names)
    calibration = {name: [1.0, 0.0] for name in names}
    old = Scores(studies, {"youden": {"nodule": 0.6, "mass": 0.5, "unknown": 0.5}}, calibration)
    new = Scores(studies, {"youden": {"nodule": 0.6, "unknown": 0.5}})
    found = source_figures({"old": old, "new": new}, names, resamples=5)
    assert found["base"]["accuracy"]["value"] == found["adapted"]["accuracy"]["value"] == 4 / 6
    assert found["difference"]["accuracy"]["value"] == 0
    assert found["no_threshold"] == ["mass"]
    table = evaluation_report([{"source": "site", **found}], names)
    assert "Their means leave out findings without a threshold (mass)." in table
    assert "| old: youden, 2 findings |" in table and "| new: youden, 1 finding |" in table
    assert "| old on site: probabilities of 2 findings together |" in table
    assert table.endswith("the expected calibration error of few scans too high, most of all once they are calibrated.")
    none = Scores(studies, {"youden": {"mass": 0.5}})
    assert "accuracy" not in source_figures({"new": new, "none": none}, names, resamples=5)["base"]


def test_of_two_models_only_one_may_have_operating_points():
    models = {"old": Scores(scored()), "new": Scores(scored(1 - SCORES), {"youden": {"nodule": 0.6}})}
    for pair in (models, dict(reversed(models.items()))):
        found = source_figures(pair, NAMES, resamples=5)
        assert found["operating_points"].keys() == {"new"}
        assert "auroc" in found["base"] and "sensitivity" not in found["base"]
