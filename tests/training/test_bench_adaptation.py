"""The benchmark of adaptation: its runs come past the scores of the base, which they share."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from medct.evaluation.scoring import ScoredStudies
from medct.train import Trainer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_base_is_scored_once_for_a_seed(monkeypatch):
    class ReachedTrainingError(Exception):
        """The run would train next."""

    def train(self) -> None:
        raise ReachedTrainingError

    def score(self, model, split, what) -> ScoredStudies:
        scored.append((self.settings.seed, split))
        return ScoredStudies(["1", "2"], ["1", "2"], np.eye(2), np.eye(2), names=["A", "B"])

    scored: list[tuple[int, str]] = []
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench_adaptation")
    monkeypatch.setattr(Trainer, "_score", score)
    monkeypatch.setattr(Trainer, "_attach", train)
    for kind, seed in (("full", 0), ("vision, replay", 0), ("paper", 1)):
        with pytest.raises(ReachedTrainingError):
            bench.make(bench.Key(kind, 8, seed))
    splits = ["tune", "valid", "keep_tune", "keep_valid"]
    assert scored == [(seed, split) for seed in (0, 1) for split in splits]
