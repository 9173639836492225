"""What a run leaves of its scores, whenever it is stopped."""

import json

import numpy as np
import pytest

from medct.cli.records import only_json
from medct.common import files
from medct.evaluation.predictions import Key, Predictions
from medct.evaluation.record import read_scores, scores_path, write_record
from medct.evaluation.scoring import ScoredStudies


def record(score):
    studies = ScoredStudies(["a"], ["p"], np.array([[score]]), np.array([[1.0]]), names=["Mass"])
    results = {"score": score, "sources": [], "prompts": {}, "provenance": {"settings": {}}}
    return results, Predictions(["Mass"], {Key("model", "site", "valid"): studies})


def score_in(path):
    """The score that the figures tell, and the one beside them."""
    (scored,) = read_scores(path).scored.values() if scores_path(path).exists() else (None,)
    return json.loads(path.read_text(encoding="utf-8"))["score"], scored and scored.scores.item()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("before", [[], [0.25]], ids=["new", "replaced"])
def test_scores_never_lie_without_figures_or_beside_those_of_others(before, error, tmp_path, monkeypatch):
    flush, stops, is_stopped = files.flush_to_disk, 0, True
    while is_stopped:
        stops += 1
        path = tmp_path / f"{stops}" / "scores.json"
        for each in before:
            write_record(path, *record(each))
        left = iter(range(stops - 1))

        def stop(path, left=left):
            if next(left, None) is None:
                raise error
            flush(path)

        with monkeypatch.context() as patched:
            patched.setattr(files, "flush_to_disk", stop)
            try:
                write_record(path, *record(0.75))
                is_stopped = False
            except error:
                pass
        assert {each.name for each in path.parent.iterdir()} <= {"scores.json", "scores.studies.csv"}
        if path.exists():
            figure, score = score_in(path)
            assert score in (figure, None)
        with only_json(path, "evaluate"):  # refuses scores without figures
            write_record(path, *record(0.75))
        assert score_in(path) == (0.75, 0.75)
    assert stops > 4


def test_what_a_killed_run_has_left_of_its_scores_is_removed(tmp_path):
    left = tmp_path / ".scores.studies.csv.partial-0a1b2c3d"
    left.touch()
    with only_json(tmp_path / "scores.json", "evaluate"):
        assert not left.exists()
