"""Metrics compared with recorded figures, scikit-learn, and definitions written out slowly."""

import json
import math

import evaluate
import numpy as np
import pytest
import scipy.stats
import tqdm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn import metrics as sklearn_metrics

from medct.evaluation import metrics as metrics
from medct.evaluation.calibration import calibration_bins, expected_calibration_error
from medct.evaluation.metrics import (
    FEWEST,
    choose_thresholds,
    compare,
    ct_clip_protocol,
    radfinder_protocol,
    with_intervals,
    zero_shot_scores,
)
from medct.evaluation.operating_points import carried_over, named

SCORES = np.array([[0.9, 0.2], [0.8, 0.3], [0.3, 0.1], [0.1, 0.7]])
LABELS = np.array([[1, 0], [0, 0], [1, 0], [0, 0]])
NAMES = ["nodule", "mass", "effusion"]
DECISIONS = {
    "accuracy": sklearn_metrics.accuracy_score,
    "balanced_accuracy": sklearn_metrics.balanced_accuracy_score,
    "f1": sklearn_metrics.f1_score,
    "precision": lambda truth, said: sklearn_metrics.precision_score(truth, said, zero_division=0),
    "sensitivity": sklearn_metrics.recall_score,
    "specificity": lambda truth, said: sklearn_metrics.recall_score(truth, said, pos_label=0),
}


def study(patients: int = 60, scans_each: int = 2, seed: int = 0, unknown: float = 0.1):
    """Scores with ties, labels with gaps, and patients, for three labels."""
    generator = np.random.default_rng(seed)
    patient_of_scan = np.repeat(np.arange(patients), scans_each)
    habit = generator.normal(size=(patients, 3))[patient_of_scan]  # a patient's scans resemble each other
    labels = (habit + generator.normal(size=habit.shape) > [0.3, 0.6, 1.2]).astype(float)
    logits = labels + habit / 2 + generator.normal(size=habit.shape)
    labels[generator.random(labels.shape) < unknown] = np.nan
    return np.round(1 / (1 + np.exp(-logits)), 2), labels, [f"patient-{index}" for index in patient_of_scan]


def slow_auroc(scores, truth):
    """Share of pairs of a present and an absent scan that are in order; ties count half."""
    present = [score for score, here in zip(scores, truth, strict=True) if here == 1]
    absent = [score for score, here in zip(scores, truth, strict=True) if here == 0]
    return math.fsum((p > a) + 0.5 * (p == a) for p in present for a in absent) / (len(present) * len(absent))


def slow_protocol(scores, truth):
    """CT-CLIP's protocol for one label, one threshold of the grid after another."""
    best = None
    for step in range(100):
        said = [score >= step / 99 for score in scores]
        pairs = list(zip(said, truth, strict=True))
        hit, miss = pairs.count((True, 1)), pairs.count((False, 1))
        alarm, rest = pairs.count((True, 0)), pairs.count((False, 0))
        distance = (miss / (hit + miss)) ** 2 + (alarm / (alarm + rest)) ** 2
        if best is None or distance < best[0] - 1e-12:
            f1, f1_absent = 2 * hit / (2 * hit + miss + alarm), 2 * rest / (2 * rest + miss + alarm)
            weighted = ((hit + miss) * f1 + (alarm + rest) * f1_absent) / len(truth)
            figures = {"accuracy": (hit + rest) / len(truth), "weighted_f1": weighted, "binary_f1": f1}
            best = (distance, figures | {"precision": hit / (hit + alarm) if hit else 0, "threshold": step / 99})
    return best[1]


def test_equals_the_recorded_figures(shared):
    recorded = json.loads((shared / "golden/metrics.json").read_text(encoding="utf-8"))
    scores, labels, expected = recorded["scores"], recorded["labels"], recorded["expected"]
    names = [str(index) for index in range(18)]
    protocol = ct_clip_protocol(scores, labels, names)
    protocol["closest_corner_threshold"] = protocol["threshold"]
    protocol |= {f"closest_corner_threshold/{name}": protocol[f"threshold/{name}"] for name in names}
    figures = zero_shot_scores(scores, labels, names) | protocol
    for metric, mean in expected.pop("mean").items():
        assert figures[metric] == pytest.approx(mean, abs=1e-12)
        of_labels = [figures[f"{metric}/{name}"] for name in names]
        np.testing.assert_allclose(of_labels, expected.pop(metric), rtol=0, atol=1e-12)
    assert not expected
    assert figures["scans"] == 400


@pytest.mark.parametrize("seed", range(3))
def test_single_figures_equal_scikit_learns(seed):
    scores, labels, _ = study(seed=seed)
    thresholds = np.array([0.5, 0.61, 0.99])
    figures = zero_shot_scores(scores, labels, NAMES, thresholds)
    for index, name in enumerate(NAMES):
        known = ~np.isnan(labels[:, index])
        score, truth = scores[known, index], labels[known, index]
        ranked = sklearn_metrics.average_precision_score(truth, score)
        assert figures[f"average_precision/{name}"] == pytest.approx(ranked, abs=1e-12)
        assert figures[f"auroc/{name}"] == pytest.approx(slow_auroc(score, truth), abs=1e-12)
        for metric, reference in DECISIONS.items():
            expected = reference(truth, (score >= thresholds[index]).astype(float))
            assert figures[f"{metric}/{name}"] == pytest.approx(expected, abs=1e-12), metric
    for metric in ("auroc", "average_precision", *DECISIONS):
        mean = np.mean([figures[f"{metric}/{name}"] for name in NAMES])
        assert figures["macro_f1" if metric == "f1" else metric] == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_protocol_equals_its_slow_definition(seed):
    scores, labels, _ = study(seed=seed)
    figures = ct_clip_protocol(scores, labels, NAMES)
    for index, name in enumerate(NAMES):
        known = ~np.isnan(labels[:, index])
        expected = slow_protocol(scores[known, index].tolist(), labels[known, index].astype(int).tolist())
        assert {metric: figures[f"{metric}/{name}"] for metric in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_radfinders_protocol_equals_scikit_learns(seed):
    """Youden's threshold from the ROC curve of the scored scans, and what its authors report there."""
    scores, labels, _ = study(seed=seed)
    figures = radfinder_protocol(scores, labels, NAMES)
    for index, name in enumerate(NAMES):
        known = ~np.isnan(labels[:, index])
        score, truth = scores[known, index], labels[known, index]
        false_alarms, hits, thresholds = sklearn_metrics.roc_curve(truth, score, drop_intermediate=False)
        best = np.argmax(np.round(hits - false_alarms, 12))
        said = score >= thresholds[best]
        expected = {
            "threshold": thresholds[best],
            "sensitivity": hits[best],
            "specificity": 1 - false_alarms[best],
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(truth, said),
            "precision": sklearn_metrics.precision_score(truth, said),
            "weighted_f1": sklearn_metrics.f1_score(truth, said, average="weighted"),
        }
        assert {key: figures[f"{key}/{name}"] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert figures["weighted_f1"] == pytest.approx(np.mean([figures[f"weighted_f1/{name}"] for name in NAMES]))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1.0, np.nan])), min_size=2, max_size=25))
def test_rankings_hold_for_any_ties_and_gaps(rows):
    scores, labels = (np.array(column, float)[:, None] for column in zip(*rows, strict=True))
    known = ~np.isnan(labels[:, 0])
    truth, score = labels[known, 0], scores[known, 0]
    if len(set(truth.tolist())) < 2:
        with pytest.raises(ValueError, match="always or never present"):
            zero_shot_scores(scores, labels, ["nodule"])
        return
    figures = zero_shot_scores(scores, labels, ["nodule"])
    assert figures["auroc"] == pytest.approx(slow_auroc(score, truth), abs=1e-12)
    expected = sklearn_metrics.average_precision_score(truth, score)
    assert figures["average_precision"] == pytest.approx(expected, abs=1e-12)
    assert zero_shot_scores(np.exp(scores), labels, ["nodule"]) == figures
    assert zero_shot_scores(-scores, labels, ["nodule"])["auroc"] == pytest.approx(1 - figures["auroc"], abs=1e-12)


def test_a_label_that_never_occurs_has_no_score():
    scores = zero_shot_scores(SCORES, LABELS, ["nodule", "mass"], np.array([0.5, 0.5]))
    assert scores["auroc/nodule"] == scores["auroc"] == 0.75
    assert scores["accuracy"] == scores["accuracy/nodule"] == 0.5
    assert np.isnan(scores["auroc/mass"]) and np.isnan(scores["accuracy/mass"])


def test_an_unknown_label_is_skipped():
    """The scan still counts for its other label."""
    more_scores = np.vstack([SCORES, [[0.0, 0.9]]])
    labels = np.array([[1, 0], [0, 1], [1, 0], [0, 1]])
    figures = zero_shot_scores(more_scores, np.vstack([labels, [[np.nan, 1]]]), ["nodule", "mass"])
    assert figures["auroc/nodule"] == zero_shot_scores(SCORES, labels, ["nodule", "mass"])["auroc/nodule"]
    assert figures["auroc/mass"] == slow_auroc(more_scores[:, 1], [*labels[:, 1], 1]) == 1
    assert figures["average_precision/mass"] == 1
    assert figures["scans"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SCORES, LABELS * 0, ["a", "b"]), "always or never present"),
        ((SCORES, LABELS * np.nan, ["a", "b"]), "always or never present"),
        ((SCORES, LABELS * 2, ["a", "b"]), "not 0, 1 or NaN"),
        ((SCORES[:3], LABELS, ["a", "b"]), r"Scores \(3, 2\) and labels \(4, 2\)"),
        ((SCORES[:, 0], LABELS[:, 0], ["a"]), r"\(scans, labels\)"),
        ((SCORES, LABELS, ["a"]), "2 labels have 1 names"),
        ((SCORES + np.inf, LABELS, ["a", "b"]), "4 of 4 scans have scores that are not finite"),
        ((SCORES, LABELS, ["a", "b"], np.array([0.5])), "2 labels have 1 thresholds"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        zero_shot_scores(*arguments)


def test_bad_comparisons_are_refused():
    with pytest.raises(ValueError, match="4 scans have 3 patients"):
        with_intervals(SCORES, LABELS, ["a", "b", "c"], ["nodule", "mass"])
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        compare(SCORES, SCORES * 2, LABELS, None, ["nodule", "mass"])
    with pytest.raises(ValueError, match="Only one model has thresholds"):
        compare(SCORES, SCORES, LABELS, None, ["nodule", "mass"], thresholds_base=np.array([0.5, 0.5]))


def test_thresholds_are_the_best_of_all():
    scores, labels, _ = study()
    for index, threshold in enumerate(choose_thresholds(scores, labels)):
        known = ~np.isnan(labels[:, index])
        score, truth = scores[known, index], labels[known, index]

        def youden(at, score=score, truth=truth):
            return (score[truth == 1] >= at).mean() - (score[truth == 0] >= at).mean()

        assert youden(threshold) == pytest.approx(max(youden(at) for at in score), abs=1e-12)
        assert threshold in score


def test_of_equal_thresholds_the_highest_is_chosen():
    """In whole numbers: as fractions, 4/10 - 2/10 is more than 3/10 - 1/10 by rounding alone."""
    generator = np.random.default_rng(0)
    scores, labels = generator.permuted(np.arange(20.0)[:, None].repeat(40, 1), axis=0), np.arange(20) < 10
    for score, threshold in zip(scores.T, choose_thresholds(scores, labels[:, None].repeat(40, 1)), strict=True):
        merits = {at: (score[labels] >= at).sum() - (score[~labels] >= at).sum() for at in score}
        assert threshold == max(at for at, merit in merits.items() if merit == max(merits.values()))


def test_the_protocols_choose_by_another_rule():
    scores = np.arange(12)[:, None] / 99 + 0.001  # each above another point of CT-CLIP's grid
    labels = np.array([0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0])[:, None]
    assert choose_thresholds(scores, labels).tolist() == [scores[4]]  # sensitivity 1, specificity 4/9
    assert ct_clip_protocol(scores, labels, ["nodule"])["threshold"] == pytest.approx(7 / 99)  # 2/3 and 6/9


def test_no_threshold_from_a_label_that_does_not_vary():
    """A label that never varied cannot be predicted later; rankings are scored all the same."""
    thresholds = choose_thresholds(SCORES, LABELS)
    assert thresholds[0] == 0.9 and np.isnan(thresholds[1])
    figures = zero_shot_scores(SCORES, np.array([[1, 0], [0, 1], [1, 0], [0, 1]]), ["nodule", "mass"], thresholds)
    assert np.isnan(figures["f1/mass"]) and figures["macro_f1"] == figures["f1/nodule"]
    assert figures["auroc/mass"] == 1


def test_resamples_equal_repeated_scans(monkeypatch):
    """The weighted figures are those of a data set that holds each scan as often as it was drawn."""
    scores, labels, patients = study(patients=12)
    thresholds = np.array([0.5, 0.4, 0.7])
    models = [(scores, thresholds)]
    monkeypatch.setattr(metrics, "RESAMPLES_AT_ONCE", 7)  # 20 resamples in three blocks
    (drawn,) = metrics._resampled(models, labels, patients, NAMES, 20, 3)
    weights = np.hstack(list(metrics.patient_draws(np.array(patients), 20, 3))).astype(int)
    assert weights.shape == (24, 21) and (weights[:, 0] == 1).all() and (weights.sum(axis=0) == 24).all()
    assert (weights[::2] == weights[1::2]).all()  # both scans of a patient
    for column in range(21):
        again = np.repeat(np.arange(24), weights[:, column])
        protocols = {"ct_clip_protocol": ct_clip_protocol, "radfinder_protocol": radfinder_protocol}
        expected = {
            f"{prefix}/{key}": value
            for prefix, protocol in protocols.items()
            for key, value in protocol(scores[again], labels[again], NAMES).items()
        }
        expected |= zero_shot_scores(scores[again], labels[again], NAMES, thresholds)
        for key, values in drawn.items():
            assert values[column] == pytest.approx(expected[key], abs=1e-12, nan_ok=True), key


def test_figures_that_take_long_show_how_far_they_are(monkeypatch, capsys):
    scores, labels, patients = study(patients=12)
    monkeypatch.setattr(metrics, "tqdm", lambda **options: tqdm.tqdm(**options | {"ncols": 80, "mininterval": 0}))
    with_intervals(scores, labels, patients, NAMES, resamples=300)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(metrics, "SHOWN_AFTER_SECONDS", 1e-9)
    with_intervals(scores, labels, patients, NAMES, resamples=300)
    assert "128/300" in (shown := capsys.readouterr().err) and "256/300" in shown


def test_interval_equals_scipys():
    """Two thousand resamples each, drawn differently; patients with one scan each."""
    scores, labels, _ = study(patients=150, scans_each=1, unknown=0)
    by_name = with_intervals(scores, labels, None, NAMES, resamples=2000)["scores"]

    def auroc(rows):
        present = labels[rows, 0] == 1
        ranks = scipy.stats.rankdata(scores[rows, 0])[present]
        return (ranks.sum() - present.sum() * (present.sum() + 1) / 2) / present.sum() / (~present).sum()

    expected = scipy.stats.bootstrap(
        (np.arange(150),), auroc, n_resamples=2000, method="percentile", vectorized=False, rng=np.random.default_rng(1)
    ).confidence_interval
    assert by_name["auroc/nodule"]["value"] == pytest.approx(auroc(np.arange(150)), abs=1e-12)
    assert by_name["auroc/nodule"]["low"] == pytest.approx(expected.low, abs=0.01)
    assert by_name["auroc/nodule"]["high"] == pytest.approx(expected.high, abs=0.01)


def test_a_model_does_not_differ_from_itself():
    scores, labels, patients = study()
    thresholds = choose_thresholds(scores, labels)
    compared = compare(scores, scores.copy(), labels, patients, NAMES, thresholds, thresholds, resamples=50)
    assert set(map(tuple, (row.values() for row in compared["difference"].values()))) == {(0.0, 0.0, 0.0)}
    assert compared["base"] == compared["adapted"]
    assert compared["base"]["auroc"]["low"] < compared["base"]["auroc"]["value"] < compared["base"]["auroc"]["high"]


def test_pairing_narrows_the_interval_of_the_difference():
    scores, labels, patients = study()
    better = np.clip(scores + 0.05 * (labels == 1), 0, 1)
    compared = compare(scores, better, labels, patients, NAMES, resamples=200)
    low, high = compared["difference"]["auroc"]["low"], compared["difference"]["auroc"]["high"]
    assert 0 < low < compared["difference"]["auroc"]["value"] < high
    assert high - low < (compared["base"]["auroc"]["high"] - compared["base"]["auroc"]["low"]) / 2
    assert compared["difference"]["auroc"]["value"] == pytest.approx(
        compared["adapted"]["auroc"]["value"] - compared["base"]["auroc"]["value"], abs=1e-15
    )


def test_more_scans_of_the_same_patients_do_not_narrow_intervals():
    scores, labels, patients = study()
    once = with_intervals(scores, labels, patients, NAMES, resamples=50)
    twice = with_intervals(np.vstack([scores] * 2), np.vstack([labels] * 2), patients * 2, NAMES, resamples=50)
    assert twice["patients"] == once["patients"] == 60 and twice["scans"] == 2 * once["scans"]
    for key, interval in once["scores"].items():
        assert twice["scores"][key] == pytest.approx(interval, abs=1e-12), key


def test_seed_decides_and_order_does_not():
    scores, labels, patients = study()
    order = np.random.default_rng(9).permutation(len(scores))
    base = with_intervals(scores, labels, patients, NAMES, resamples=50)["scores"]
    assert base == with_intervals(scores, labels, patients, NAMES, resamples=50)["scores"]
    assert base != with_intervals(scores, labels, patients, NAMES, resamples=50, seed=1)["scores"]
    shuffled = with_intervals(scores[order], labels[order], np.array(patients)[order], NAMES, resamples=50)["scores"]
    for key, interval in base.items():
        assert shuffled[key] == pytest.approx(interval, abs=1e-12), key


def test_a_rare_label_is_left_out_of_resamples_that_lack_it():
    scores, labels, patients = study(unknown=0)
    labels[:, 2] = 0
    labels[:2, 2] = 1  # one patient: about a third of the resamples have no such scan
    alone = with_intervals(scores[:, :2], labels[:, :2], patients, NAMES[:2], resamples=100)["scores"]
    all_three = with_intervals(scores, labels, patients, NAMES, resamples=100)["scores"]
    assert all_three["auroc/mass"] == alone["auroc/mass"]
    (drawn,) = metrics._resampled([(scores, None)], labels, patients, NAMES, 100, 0)
    lacking = np.isnan(drawn["auroc/effusion"])
    assert 20 < lacking.sum() < 55
    means = (drawn["auroc/nodule"] + drawn["auroc/mass"])[lacking] / 2
    np.testing.assert_allclose(drawn["auroc"][lacking], means, atol=1e-12)
    defined = drawn["auroc/effusion"][1:][~lacking[1:]]
    rare = metrics.intervals_of(drawn)["auroc/effusion"]
    bias = defined.mean() - rare["value"]
    assert rare["low"] == pytest.approx(np.quantile(defined, 0.025) - bias, abs=1e-12)
    assert rare["high"] == pytest.approx(np.quantile(defined, 0.975) - bias, abs=1e-12)
    assert all_three["auroc/effusion"] == {"value": rare["value"], "low": None, "high": None}  # of a single patient


def test_intervals_stay_in_range():
    """Few patients give wide intervals, which the shift could push out of range."""
    labels = np.array([0, 0, 1, 0, 1, 1] * 2)[:, None]
    scores = np.tile(np.linspace(0, 1, 6), 2)[:, None]  # AUROC 8/9
    compared = compare(1 - scores, scores, labels, None, ["nodule"], resamples=200)
    ends = {
        model: [interval[end] for interval in compared[model].values() for end in ("low", "high")]
        for model in ("base", "adapted", "difference")
    }
    assert min(ends["base"]) == 0 and max(ends["adapted"]) == 1
    assert min(ends["difference"]) >= -1 and max(ends["difference"]) <= 1


def test_a_finding_of_few_patients_has_a_value_and_no_interval():
    """Nine studies of five patients, whose scores happen to be in order: nothing tells how far to trust that."""
    patients = ["a", "a", "b", "b", "c", "c", "d", "d", "e"]
    labels = np.array([[1, 1, 0], [1, 0, 0], *[[0, 1, 0]] * 7], float)
    scores = np.clip(labels * 0.8 + 0.1, 0, 1)
    compared = compare(1 - scores, scores, labels, patients, NAMES, resamples=100)
    assert compared["adapted"]["auroc"] == {"value": 1, "low": None, "high": None}
    for version in ("base", "adapted", "difference"):
        assert all(interval["low"] is None is interval["high"] for interval in compared[version].values())
    assert compared["difference"]["auroc"]["value"] == 1
    assert compared["too_few"] == NAMES[:2]  # the third never varies


@pytest.mark.parametrize("few", ["with", "without"])
@pytest.mark.parametrize("patients", [FEWEST - 1, FEWEST])
def test_patients_count_not_scans(few, patients):
    """Four scans each; those of one kind are rare, and the other label is common."""
    generator = np.random.default_rng(0)
    people = np.repeat(np.arange(60), 4)
    rare = people < patients
    labels = np.stack([rare if few == "with" else ~rare, generator.random(240) < 0.5], axis=1).astype(float)
    scores = np.clip(labels / 5 + generator.random(labels.shape), 0, 1)
    found = with_intervals(scores, labels, people, ["rare", "common"], resamples=50)
    assert metrics.enough(labels, people).tolist() == [patients == FEWEST, True]
    assert (found["scores"]["auroc/rare"]["low"] is None) == (patients < FEWEST)
    assert found["scores"]["auroc/common"]["low"] < found["scores"]["auroc/common"]["value"]
    assert found["scores"]["auroc"]["low"] is not None  # half of the labels have enough
    assert found["too_few"] == (["rare"] if patients < FEWEST else [])


@pytest.mark.parametrize("called", [["rare"], ["common"], ["rare", "common"]])
def test_means_at_thresholds_are_trusted_by_the_findings_that_have_one(called):
    """A mean over two findings of two patients each is no better known for findings that have no part in it."""
    generator = np.random.default_rng(0)
    labels = (generator.random((60, 4)) < 0.5).astype(float)
    labels[:, :2] = (np.arange(60) < 2)[:, None]
    scores = generator.random(labels.shape)
    names = ["rare", "rare too", "common", "common too"]
    thresholds = np.array([0.5 if name.split()[0] in called else np.nan for name in names])
    of_one = with_intervals(scores, labels, None, names, thresholds, resamples=50)["scores"]
    of_two = compare(scores, 1 - scores, labels, None, names, thresholds, thresholds, resamples=50)["difference"]
    for figures in (of_one, of_two):
        for metric in metrics.AT_THRESHOLDS:
            assert (figures[metric]["low"] is None) == (called == ["rare"]), metric
        assert figures["auroc"]["low"] is not None
    points = {"youden": named(thresholds, names)}
    found = carried_over(points, scores, labels, list(map(str, range(60))), names, resamples=50)["youden"]
    assert (found["sensitivity"]["low"] is None) == (called == ["rare"])


def test_a_figure_that_no_resample_moves_from_the_end_of_its_range_has_no_interval():
    scores, labels, patients = study()
    labels = np.nan_to_num(labels)
    found = compare(scores, labels, labels, patients, NAMES, resamples=50)
    assert found["adapted"]["auroc"] == found["adapted"]["auroc/mass"] == {"value": 1, "low": None, "high": None}
    assert found["base"]["auroc"]["low"] < found["base"]["auroc"]["value"]
    assert found["difference"]["auroc"]["low"] is None


def test_comparison_is_json_without_nan():
    scores, labels, patients = study(patients=10)
    labels[:, 2] = 0
    thresholds = choose_thresholds(scores, labels)
    compared = compare(scores, scores**2, labels, patients, NAMES, thresholds, thresholds, resamples=20)
    assert json.loads(json.dumps(compared, allow_nan=False)) == compared
    assert compared["base"]["auroc/effusion"] == {"value": None, "low": None, "high": None}
    assert compared["present"]["effusion"] == 0 < compared["absent"]["effusion"] == 20
    assert (compared["scans"], compared["patients"], compared["resamples"]) == (20, 10, 20)
    assert {"macro_f1", "accuracy", "average_precision", "ct_clip_protocol/weighted_f1"} < set(compared["difference"])


def coverage(patients_known: bool, studies: int = 200) -> dict[str, float]:
    """Share of intervals that cover the population's value; 60 patients, 4 scans each."""
    generator = np.random.default_rng(0)

    def draw(patients):
        present = np.repeat(generator.random(patients) < 0.4, 4).astype(float)
        habit = np.repeat(generator.normal(size=patients), 4)
        return expit(present + habit + generator.normal(size=4 * patients) / 2)[:, None], present[:, None]

    truth = zero_shot_scores(*draw(100_000), ["nodule"])
    held = dict.fromkeys(metrics.RANK_METRICS, 0)
    for seed in range(studies):
        scores, labels = draw(60)
        patients = np.repeat(np.arange(60), 4) if patients_known else None
        intervals = with_intervals(scores, labels, patients, ["nodule"], resamples=400, seed=seed)["scores"]
        for metric in held:
            held[metric] += intervals[metric]["low"] <= truth[metric] <= intervals[metric]["high"]
    return {metric: count / studies for metric, count in held.items()}


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_claim():
    """They would not if each scan counted as a patient."""
    assert all(0.90 <= share <= 0.99 for share in coverage(patients_known=True).values())
    assert coverage(patients_known=False)["auroc"] < 0.85


@pytest.mark.slow
def test_bias_of_average_precision_is_corrected():
    """Means over many labels have narrow intervals, which the bias of resampling would shift past the truth."""
    generator = np.random.default_rng(5)
    prevalence, separation = np.linspace(0.07, 0.45, 18), np.linspace(0.3, 2, 18)
    names = [str(index) for index in range(18)]

    def draw(scans):
        labels = (generator.random((scans, 18)) < prevalence).astype(float)
        return expit(labels * separation + generator.normal(size=labels.shape)), labels

    truth = zero_shot_scores(*draw(200_000), names)["average_precision"]
    moved = unmoved = 0
    for seed in range(100):
        scores, labels = draw(150)
        interval = with_intervals(scores, labels, None, names, resamples=200, seed=seed)["scores"]["average_precision"]
        (drawn,) = metrics._resampled([(scores, None)], labels, None, names, 200, seed)
        low, high = np.quantile(drawn["average_precision"][1:], metrics.INTERVAL)
        moved += interval["low"] <= truth <= interval["high"]
        unmoved += low <= truth <= high
    assert unmoved < 70 and moved > 75, (unmoved, moved)


def test_calibration_of_a_known_case():
    scores = np.array([[0.05, 0.95], [0.05, 0.95], [0.05, 1.0], [0.05, 0.5]])
    labels = np.array([[0, 1], [0, 1], [1, 0], [0, np.nan]])
    probability, share, counts = calibration_bins(scores, labels)
    assert counts.tolist() == [4, *[0] * 8, 3]
    assert probability[[0, -1]] == pytest.approx([0.05, 2.9 / 3])
    assert share[[0, -1]] == pytest.approx([1 / 4, 2 / 3])
    assert np.isnan(probability[1:-1]).all() and np.isnan(share[1:-1]).all()
    assert expected_calibration_error(scores, labels) == pytest.approx((4 * 0.20 + 3 * 0.30) / 7)
    edges = np.array([[0.0], [0.1], [0.19], [0.2], [0.999]])
    assert calibration_bins(edges, edges * 0)[2].tolist() == [1, 2, 1, *[0] * 6, 1]
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        calibration_bins(scores * 2, labels)
    for some in (labels * np.nan, labels[:0]):
        with pytest.raises(ValueError, match="No label of these scans is known"):
            expected_calibration_error(scores[: len(some)], some)


def test_loads_as_an_evaluate_module(tmp_path):
    """From the file alone, offline, with unknown labels; whole or in batches."""
    scores, labels, _ = study()
    thresholds = choose_thresholds(scores, labels)
    expected = zero_shot_scores(scores, labels, NAMES, thresholds)
    protocol = ct_clip_protocol(scores, labels, NAMES)
    module = evaluate.load(metrics.__file__, cache_dir=str(tmp_path))
    computed = module.compute(predictions=scores, references=labels, names=NAMES, thresholds=thresholds)
    assert {key: computed[key] for key in expected} == expected
    assert computed["ct_clip_protocol/weighted_f1"] == protocol["weighted_f1"]
    for start in range(0, len(scores), 50):
        rows = slice(start, start + 50)
        module.add_batch(predictions=scores[rows].tolist(), references=labels[rows].tolist())
    assert module.compute(names=NAMES, thresholds=thresholds) == computed
    assert module.compute(predictions=scores, references=labels)["auroc/0"] == expected["auroc/nodule"]


def test_a_model_that_is_worse_differs_by_less_than_nothing():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, (200, 2)).astype(float)
    good = np.clip(0.5 + 0.4 * (labels - 0.5) + generator.normal(0, 0.1, labels.shape), 0, 1)
    difference = compare(good, 1 - good, labels, None, ["a", "b"], resamples=50)["difference"]["auroc"]
    assert -1 <= difference["low"] <= difference["value"] <= difference["high"] < -0.5
    swapped = compare(1 - good, good, labels, None, ["a", "b"], resamples=50)["difference"]["auroc"]
    assert swapped["value"] == pytest.approx(-difference["value"])
