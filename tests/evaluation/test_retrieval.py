"""Recall and MAP by their definitions, and a case worked out by hand."""

import itertools
import json
import math

import numpy as np
import pytest

from medct.evaluation.metrics import FEWEST
from medct.evaluation.report import retrieval_report
from medct.evaluation.retrieval import (
    Pairs,
    average_precision_at,
    nearest_first,
    recall_figures,
    right_ranks,
    shared_findings,
)


def unit(vectors) -> np.ndarray:
    vectors = np.asarray(vectors, float)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def pairs() -> Pairs:
    """123 scans and reports that resemble them; two studies share a report, three patients have two scans each."""
    random = np.random.default_rng(0)
    images = unit(random.normal(size=(123, 8)))
    texts = unit(images + 0.6 * random.normal(size=images.shape))
    texts[1] = texts[0]
    ids = np.arange(1, 124)
    ids[1] = ids[0]
    patients = np.arange(123)
    patients[[1, 11, 21]] = patients[[0, 10, 20]]
    return Pairs(images, texts, ids, patients)


def slow_recall(queries, vectors, is_right, k: int) -> float:
    """Share of queries with a right answer among the k of greatest cosine, one by one."""
    hits = 0
    for index, query in enumerate(queries):
        ranked = sorted(range(len(vectors)), key=lambda j: -float(query @ vectors[j]))
        hits += any(is_right(index, j) for j in ranked[:k])
    return hits / len(queries)


def values(figures: dict) -> list[float]:
    return [each["value"] for each in figures.values()]


def test_recall_is_its_definition(pairs):
    found = recall_figures(pairs, resamples=50)
    assert (found["studies"], found["reports"], found["patients"]) == (123, 122, 120)
    at = [5, 10, 50, 100]
    images, texts, ids = pairs.image_embeds, pairs.text_embeds, pairs.report_ids
    first = [0, *range(2, 123)]
    for name, queries, answers in (("text_to_image", texts, images), ("image_to_text", images, texts)):
        assert list(found[name]) == at
        same = [slow_recall(queries, answers, lambda i, j: ids[i] == ids[j], k) for k in at]
        own = [slow_recall(queries, answers, lambda i, j: i == j, k) for k in at]
        unique = [slow_recall(queries[first], answers[first], lambda i, j: i == j, k) for k in at]
        assert values(found[name]) == pytest.approx(same)
        assert values(found["ct_clip_protocol"][name]) == pytest.approx(own)
        assert values(found["unique_reports"][name]) == pytest.approx(unique)
    assert 0.3 < found["text_to_image"][5]["value"] < found["text_to_image"][50]["value"] <= 1
    assert found["ct_clip_protocol"]["chance"] == pytest.approx({k: k / 123 for k in at})
    # Of two of the 123 queries, two answers are right.
    two = {k: 1 - (123 - k) * (122 - k) / (123 * 122) for k in at}
    assert found["chance"] == pytest.approx({k: (2 * two[k] + 121 * k / 123) / 123 for k in at})
    assert json.loads(json.dumps(found, allow_nan=False))["text_to_image"]["5"] == found["text_to_image"][5]


def test_a_case_worked_out_by_hand():
    """Four scans at 0, 30, 60 and 90 degrees; their reports at 0, 20, 90 and 90, the last two the very same."""

    def at(*degrees):
        return unit([[math.cos(math.radians(each)), math.sin(math.radians(each))] for each in degrees])

    images, texts, ids = at(0, 30, 60, 90), at(0, 20, 90, 90), np.array([1, 2, 3, 3])
    # Report 1: scan 1 is nearest. 2: scan 2 is 10 degrees away, scan 1 is 20. 3, as 4: scan 4 is nearest, then scan 3.
    own = right_ranks(texts, images, lambda rows: rows[:, None] == np.arange(4)[None])
    assert own.tolist() == [0, 0, 1, 0]
    same = right_ranks(texts, images, lambda rows: ids[rows][:, None] == ids[None])
    assert same.tolist() == [0, 0, 0, 0]
    found = recall_figures(Pairs(images, texts, ids), at=(1, 2), resamples=20)
    assert values(found["text_to_image"]) == [1, 1]
    assert values(found["ct_clip_protocol"]["text_to_image"]) == [0.75, 1]
    # Scan 3 is 30 degrees from the two equal reports and 40 from the second: the earlier one, its own, is nearest.
    # For scan 4 its own report is the later of two that are equally near.
    assert values(found["ct_clip_protocol"]["image_to_text"]) == [0.75, 1]
    assert found["unique_reports"]["studies"] == 3
    assert found["chance"][1] == pytest.approx((1 / 4 + 1 / 4 + 2 / 4 + 2 / 4) / 4)


def test_map_worked_out_by_hand():
    # Relevant at ranks 1 and 3: 1/1 + 2/3 over k.
    relevant = np.array([[True, False, True, False], [False, False, False, True]])
    expected = [[1 / 2, (1 + 2 / 3) / 3, (1 + 2 / 3) / 4], [0, 0, 1 / 4 / 4]]
    np.testing.assert_allclose(average_precision_at(relevant, (2, 3, 4)), expected)
    degrees = np.radians([0, 5, 10, 40, 90])
    images = unit(np.stack([np.cos(degrees), np.sin(degrees)], axis=1))
    labels = np.array([[1, 0], [0, 0], [0, 1], [1, 0], [1, 1.0]])
    patients = np.array(list("aabac"))
    found = shared_findings(images, labels, patients, at=(1, 2), resamples=20)
    # The second scan has no finding. Scan 1 finds scan 3 (nothing shared), then, but for its own patient's, scan 5.
    # Scan 3: 1 (no), 4 (no). Scan 4: 3 (no), 5 (yes). Scan 5: 4 (yes), 3 (yes).
    assert found["studies"] == 4
    assert list(found["image_to_image"]) == [1, 2]
    assert values(found["image_to_image"]) == pytest.approx([1 / 4, (1 / 4 + 0 + 1 / 4 + 1) / 4])
    # With the patient's other scan: scan 1 finds 3 (no), then 4 (yes); scan 4 finds 3 (no), then 1 (yes).
    own = found["ct_clip_protocol"]
    assert values(own["image_to_image"]) == pytest.approx([1 / 4, (1 / 4 + 0 + 1 / 4 + 1) / 4])
    # Shared: 1 with 4 and 5, 3 with 5, 4 with 1 and 5, 5 with all three.
    assert own["chance"][1] == pytest.approx((2 + 1 + 2 + 3) / 12)
    assert found["chance"][1] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1) / 4)
    with pytest.raises(ValueError, match="Fewer than two patients"):
        shared_findings(images, labels * 0, patients)


@pytest.mark.parametrize("count", [1, 3, 30])
def test_the_nearest_are_those_of_a_sort_and_of_equals_the_earlier(count):
    similarity = np.random.default_rng(0).integers(5, size=(20, 30)).astype(np.float32)
    similarity[::2, :9] = -np.inf
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    assert np.array_equal(nearest_first(similarity, count), expected)


def test_only_answers_that_count_are_sorted(pairs, monkeypatch):
    sizes, argsort, lexsort = [], np.argsort, np.lexsort
    monkeypatch.setattr(np, "argsort", lambda each, *a, **k: sizes.append(np.size(each)) or argsort(each, *a, **k))
    monkeypatch.setattr(np, "lexsort", lambda keys, *a: sizes.append(len(keys[0])) or lexsort(keys, *a))
    shared_findings(pairs.image_embeds, np.ones((123, 2)), pairs.patients, at=(5,), resamples=0)
    assert sizes == [123 * 5] * 2


def test_chance_of_map_is_the_mean_over_all_orders():
    """The share of relevant answers would be two to four times as high, and a good model look worse than chance."""
    images = unit(np.eye(6))
    labels = np.array([[1, 0], [1, 0], [1, 1], [0, 1], [0, 1], [1, 0]])
    found = shared_findings(images, labels, np.arange(6), at=(1, 2, 4), resamples=20)["chance"]
    orders = [
        (labels[[query]] @ labels[list(rest)].T > 0)[0]
        for query in range(6)
        for rest in itertools.permutations(set(range(6)) - {query})
    ]
    expected = average_precision_at(np.array(orders), (1, 2, 4)).mean(axis=0)
    assert list(found.values()) == pytest.approx(expected)


def test_pools_are_means_over_random_divisions(pairs):
    found = recall_figures(pairs, at=(5,), pool=20, resamples=5)
    pools = found["pools"]
    assert (pools["size"], pools["repeats"]) == (20, 100)
    # Among fewer answers the right one is found more often, as often as a slow simulation finds it.
    random, hits = np.random.default_rng(9), []
    for _ in range(300):
        some = random.permutation(123)[:20]
        images, texts = pairs.image_embeds[some], pairs.text_embeds[some]
        hits.append(slow_recall(texts, images, lambda i, j: i == j, 5))
    assert pools["text_to_image"][5] == pytest.approx(np.mean(hits), abs=0.01)
    assert pools["text_to_image"][5] > found["text_to_image"][5]["value"]
    with pytest.raises(ValueError, match="A pool of 200 needs as many studies"):
        recall_figures(pairs, pool=200, resamples=5)


def test_intervals_are_by_patient_and_ks_beyond_the_studies_left_out(pairs):
    found = recall_figures(pairs, resamples=200)["text_to_image"][5]
    assert 0 < found["low"] < found["value"] < found["high"] < 1
    few = pairs.take(np.arange(17))
    assert list(recall_figures(few, resamples=5)["text_to_image"]) == [5, 10]


@pytest.mark.parametrize("patients", [1, FEWEST - 1, FEWEST])
def test_few_patients_tell_no_interval(pairs, patients):
    """Of a single one every resample is the same, and the interval would be as narrow as none is."""
    people = Pairs(pairs.image_embeds, pairs.text_embeds, pairs.report_ids, np.arange(123) % patients)
    found = recall_figures(people, resamples=20)["text_to_image"][5]
    assert 0 < found["value"] < 1 and (found["low"] is None) == (patients < FEWEST)


def test_reports_are_not_counted_as_patients(pairs):
    """Without a table nobody knows who was scanned; the report says so, and what was drawn in their place."""
    unknown = recall_figures(Pairs(pairs.image_embeds, pairs.text_embeds, pairs.report_ids), resamples=20)
    assert unknown["patients"] is None
    head, *_, caption = retrieval_report(unknown).split("\n\n")
    assert head == "123 studies with a report, 122 different reports, patients not known"
    assert "bootstrap over the reports of the queries, against the same answers" in caption
    known = retrieval_report(recall_figures(pairs, resamples=20))
    assert "122 different reports, 120 patients\n" in known and "bootstrap over the patients of the queries" in known


def test_what_is_right_in_every_resample_has_no_interval(pairs):
    same = Pairs(pairs.image_embeds, pairs.image_embeds, pairs.report_ids, pairs.patients)
    assert recall_figures(same, resamples=20)["text_to_image"][5] == {"value": 1.0, "low": None, "high": None}


def test_the_report_shows_each_protocol(pairs):
    results = recall_figures(pairs, pool=20, resamples=20)
    labels = np.random.default_rng(1).integers(0, 2, (123, 3)).astype(float)
    results["findings"] = shared_findings(pairs.image_embeds, labels, pairs.patients, resamples=20)
    rows = [line.strip("| ").split(" | ") for line in retrieval_report(results).splitlines() if line[:1] == "|"]
    cells = {title: figures for title, *figures in rows}
    for prefix in ("", "unique reports: ", "CT-CLIP protocol: "):
        figure = results if not prefix else results[prefix.split(":")[0].replace(" ", "_").replace("-", "_").lower()]
        assert cells[f"{prefix}text to image"][0].startswith(f"{figure['text_to_image'][5]['value']:.3f} (")
    assert cells["pools of 20: text to image"][2:] == ["–", "–"]
    assert cells["image to image"][0].startswith(f"{results['findings']['image_to_image'][5]['value']:.3f} (")
