"""How well scans find their reports, reports their scans, and scans other scans with the same findings.

* Recall at k: share of queries with a right answer among the k nearest. Every study with the very same report is right,
  since no text can tell them apart.
* Unique reports: the same among one study a report, the first.
* CT-CLIP protocol, recall: among all studies, and only the query's own partner is right, so equal reports are errors.
* MAP at k, of scans with a finding: precision at each of the k nearest that shares one, summed, over k. Other scans of
  the patient are left out.
* CT-CLIP protocol, MAP: the same with other scans of the patient among the answers, as RadFinder's evaluation has it.
* Pools: recall at k among N studies at a time, the mean over random pools. Figures of pools of other sizes cannot be
  compared.

Of answers that are equally near, the earlier one in the index counts as nearer. Intervals are the middle 95 % of a
bootstrap over the patients of the queries (over reports where patients are not known), against the same answers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medct.evaluation.metrics import FEWEST, Interval, intervals_of, over_draws

RECALL_AT = (5, 10, 50, 100)
MAP_AT = (5, 10, 50)
POOL_REPEATS = 100
# The similarities of this many to 50,000 studies take 0.2 GB.
_QUERIES_AT_ONCE = 1024

Mask = Callable[[np.ndarray], np.ndarray]
"""From the rows of some queries, `(queries,)`, to which answers it applies, `(queries, answers)`."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Scans and their reports in the common space.

    Args:
        image_embeds: `(studies, width)`, of length 1.
        text_embeds: `(studies, width)`, likewise.
        report_ids: `(studies,)`, equal for equal reports.
        patients: `(studies,)`; `None` where they are not known.
    """

    image_embeds: np.ndarray
    text_embeds: np.ndarray
    report_ids: np.ndarray
    patients: np.ndarray | None = None

    @property
    def people(self) -> np.ndarray:
        """`(studies,)`, who is drawn together: studies of one patient, or with one report where no patient is known."""
        return self.report_ids if self.patients is None else self.patients

    def take(self, rows: np.ndarray) -> "Pairs":
        """Some of the studies, by their indices."""
        patients = None if self.patients is None else self.patients[rows]
        return Pairs(self.image_embeds[rows], self.text_embeds[rows], self.report_ids[rows], patients)


def recall_figures(
    pairs: Pairs, at: Sequence[int] = RECALL_AT, pool: int | None = None, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Recall of reports for scans and of scans for reports.

    Args:
        pairs: All studies that have a report.
        at: Values of k; those above the number of answers are left out.
        pool: Number of studies in a pool, for figures among so few; none by default.
        resamples: Of the bootstrap.
        seed: Of the bootstrap and the pools.

    Returns:
        Ready for JSON. `studies`, `reports` and `patients`, their numbers, `None` for patients that are not known;
        `text_to_image` and `image_to_text`, each from k to an interval, and `chance`, from k to a share; the same in
        `unique_reports` and `ct_clip_protocol`; and with `pool` in `pools`, whose figures are shares.
    """
    ids = pairs.report_ids
    _, first = np.unique(ids, return_index=True)
    options = {"at": at, "resamples": resamples, "seed": seed}
    patients = None if pairs.patients is None else len(np.unique(pairs.patients))
    found = {"studies": len(ids), "reports": len(first), "patients": patients}
    found |= _both_ways(pairs, lambda rows: ids[rows][:, None] == ids[None], **options)
    protocols = {"unique_reports": pairs.take(np.sort(first)), "ct_clip_protocol": pairs}
    for name, some in protocols.items():
        everyone = np.arange(len(some.report_ids))
        own = _both_ways(some, lambda rows, everyone=everyone: rows[:, None] == everyone[None], **options)
        found[name] = {"studies": len(everyone), **own}
    if pool is not None:
        found["pools"] = _pools(pairs, [k for k in at if k <= pool], pool, seed)
    return found


def _both_ways(pairs: Pairs, is_right: Mask, at: Sequence[int], resamples: int, seed: int) -> dict[str, Any]:
    count = len(pairs.report_ids)
    at = [k for k in at if k <= count] or [count]
    rows = np.arange(count)
    num_right = np.concatenate([is_right(some).sum(axis=1) for some in _some(rows)])
    found: dict[str, Any] = {"chance": {k: float(np.mean([_chance(count, n, k) for n in num_right])) for k in at}}
    sides = {"text_to_image": (pairs.text_embeds, pairs.image_embeds)}
    sides["image_to_text"] = (pairs.image_embeds, pairs.text_embeds)
    for name, (queries, answers) in sides.items():
        ranks = right_ranks(queries, answers, is_right)
        hits = np.stack([ranks < k for k in at], axis=1).astype(float)
        found[name] = dict(zip(at, _means(hits, pairs.people, resamples, seed), strict=True))
    return found


def _some(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), _QUERIES_AT_ONCE):
        yield rows[start : start + _QUERIES_AT_ONCE]


def _chance(answers: int, right: int, k: int) -> float:
    """How likely k answers drawn at random hold a right one."""
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def _means(values: np.ndarray, people: np.ndarray, resamples: int, seed: int) -> list[Interval]:
    """Means `(figures,)` of values `(queries, figures)` with intervals."""

    def means(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {"means": values.T @ weights / weights.sum(axis=0)}

    drawn = over_draws(means, people, resamples, seed)["means"]
    # As elsewhere, so few people tell no spread, and neither does what is at an end of its range in every resample.
    at_an_end = np.isin(drawn[:, :1], (0, 1)) & (drawn == drawn[:, :1]).all(axis=1, keepdims=True)
    is_untold = at_an_end | (len(np.unique(people)) < FEWEST)
    drawn = np.where(is_untold & (np.arange(drawn.shape[1]) > 0), np.nan, drawn)
    return list(intervals_of({str(index): row for index, row in enumerate(drawn)}).values())


def right_ranks(queries: np.ndarray, answers: np.ndarray, is_right: Mask) -> np.ndarray:
    """How many wrong answers are nearer to each query than its nearest right one.

    Args:
        queries: `(queries, width)`, of length 1.
        answers: `(answers, width)`, likewise.
        is_right: Which answers are right; every query has one.

    Returns:
        `(queries,)`, 0 if the nearest answer is right.
    """
    ranks = []
    position = np.arange(len(answers))
    for rows in _some(np.arange(len(queries))):
        similarity = queries[rows] @ answers.T
        right = is_right(rows)
        best = np.where(right, similarity, -np.inf)
        place = best.argmax(axis=1)  # the earliest of the nearest right ones
        nearest = best.max(axis=1)[:, None]
        is_nearer = (similarity > nearest) | ((similarity == nearest) & (position < place[:, None]))
        ranks.append((is_nearer & ~right).sum(axis=1))
    return np.concatenate(ranks)


def _pools(pairs: Pairs, at: Sequence[int], size: int, seed: int) -> dict[str, Any]:
    """Mean recall in random pools that do not overlap, over several divisions of the studies into pools."""
    count = len(pairs.report_ids)
    if size > count or not at:
        raise ValueError(f"A pool of {size} needs as many studies, and k up to that; there are {count}.")
    generator = np.random.default_rng(seed)
    hits: dict[str, list[list[float]]] = {"text_to_image": [], "image_to_text": []}
    for _ in range(POOL_REPEATS):
        order = generator.permutation(count)
        for start in range(0, count - size + 1, size):
            some = pairs.take(order[start : start + size])
            same = some.report_ids[:, None] == some.report_ids[None]
            sides = (some.text_embeds, some.image_embeds), (some.image_embeds, some.text_embeds)
            for found, (queries, answers) in zip(hits.values(), sides, strict=True):
                ranks = right_ranks(queries, answers, lambda rows, same=same: same[rows])
                found.append([float((ranks < k).mean()) for k in at])
    means = {name: dict(zip(at, np.mean(found, axis=0).tolist(), strict=True)) for name, found in hits.items()}
    return {"size": size, "repeats": POOL_REPEATS, **means}


def shared_findings(
    image_embeds: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    at: Sequence[int] = MAP_AT,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean average precision of scans that find other scans with the same findings.

    Args:
        image_embeds: `(studies, width)`, of length 1.
        labels: `(studies, labels)`, 1 where a finding is present; anything else counts as absent.
        patients: `(studies,)`.
        at: Values of k; those above the number of answers are left out.
        resamples: Of the bootstrap over patients.
        seed: Of the bootstrap.

    Returns:
        Ready for JSON. `studies`, those with a finding, which are both queries and answers; `image_to_image`, from k to
        an interval; `chance`, from k to what answers in random order have in the mean; and `ct_clip_protocol` with the
        same two, where other scans of the query's patient are among the answers.

    Raises:
        ValueError: If fewer than two patients have a finding.
    """
    has_finding = (labels == 1).any(axis=1)
    embeds, present, people = image_embeds[has_finding], labels[has_finding] == 1, patients[has_finding]
    if len(np.unique(people)) < 2:
        raise ValueError("Fewer than two patients have a finding. Pass labels of more studies.")
    rows = np.arange(len(embeds))
    masks: dict[str, Mask] = {
        "": lambda some: people[some][:, None] != people[None],
        "ct_clip_protocol": lambda some: some[:, None] != rows[None],
    }
    found: dict[str, Any] = {"studies": len(embeds)}
    for name, may_answer in masks.items():
        most = min(may_answer(some).sum(axis=1).min() for some in _some(rows))
        kept = [k for k in at if k <= most] or [int(most)]
        precisions, by_chance = [], []
        for some in _some(rows):
            allowed = may_answer(some)
            # As floats, since only their products are fast.
            relevant = (present[some].astype(np.float32) @ present.T.astype(np.float32) > 0) & allowed
            similarity = np.where(allowed, embeds[some] @ embeds.T, -np.inf)
            nearest = nearest_first(similarity, max(kept))
            precisions.append(average_precision_at(np.take_along_axis(relevant, nearest, 1), kept))
            by_chance.append(_average_precision_by_chance(allowed.sum(axis=1), relevant.sum(axis=1), kept))
        figures = {
            "image_to_image": dict(zip(kept, _means(np.concatenate(precisions), people, resamples, seed), strict=True)),
            "chance": dict(zip(kept, np.concatenate(by_chance).mean(axis=0).tolist(), strict=True)),
        }
        found |= {name: figures} if name else figures
    return found


def nearest_first(similarity: np.ndarray, count: int) -> np.ndarray:
    """Which answers are nearest to each query, the earlier one first of those equally near; sorts no others.

    Args:
        similarity: `(queries, answers)`, without NaN.
        count: How many of them, at most as many as there are.

    Returns:
        `(queries, count)`, the nearest first.
    """
    least = np.partition(similarity, -count, axis=1)[:, -count, None]
    # By query and answer; more than `count` a query where several are as near as the last.
    query, answer = np.nonzero(similarity >= least)
    order = np.lexsort((-similarity[query, answer], query))  # keeps the order of equals
    first = np.searchsorted(query, np.arange(len(similarity)))[:, None]
    return answer[order][first + np.arange(count)]


def _average_precision_by_chance(answers: np.ndarray, relevant: np.ndarray, at: Sequence[int]) -> np.ndarray:
    """What `average_precision_at` gives in the mean over all orders, `(queries, len(at))`, from numbers `(queries,)`.

    The answer at rank i is relevant with a chance of relevant / answers, and so is with it each of the i - 1 before it
    with one of (relevant - 1) / (answers - 1).
    """
    one = relevant / answers
    two = one * (relevant - 1) / np.maximum(answers - 1, 1)
    harmonic = [(1 / np.arange(1, k + 1)).sum() for k in at]
    return np.stack([(one * each + two * (k - each)) / k for k, each in zip(at, harmonic, strict=True)], axis=1)


def average_precision_at(is_relevant: np.ndarray, at: Sequence[int]) -> np.ndarray:
    """Precision at each relevant answer among the first k, summed, over k.

    Args:
        is_relevant: `(queries, answers)`, nearest first.
        at: Values of k.

    Returns:
        `(queries, len(at))`.
    """
    ranks = np.arange(1, is_relevant.shape[1] + 1)
    precision = is_relevant * is_relevant.cumsum(axis=1) / ranks
    return np.stack([precision[:, :k].sum(axis=1) / k for k in at], axis=1)
