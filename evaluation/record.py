"""What a run leaves of its scores: figures in a JSON file, and the score of every study in a csv file beside it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medct.common.files import json_text, whole_file
from medct.common.run_files import RESULTS
from medct.data.sources import DataError
from medct.errors_medct import first_line
from medct.evaluation.predictions import Predictions, read_predictions, write_predictions

_WANTED = "Pass a training run's folder, or the JSON file of `medct evaluate --output`."


def scores_path(path: Path) -> Path:
    """The csv file of scores that belongs to a JSON file of figures, such as `results.studies.csv`."""
    return path.with_name(f"{path.stem}.studies.csv")


def write_record(
    path: Path,
    results: Mapping[str, Any],
    predictions: Predictions,
    others: Iterable[tuple[str, str, Sequence[str]]] = (),
) -> None:
    """Write figures, and the scores that they are of; whenever it is stopped, none of the scores are without figures,
    or beside others.

    Args:
        path: JSON file to make or replace; the scores go into `scores_path` of it.
        results: The figures, with `provenance`.
        predictions: The scores.
        others: See `write_predictions`.
    """
    scores = scores_path(path)
    with whole_file(scores) as scores_aside:
        write_predictions(scores_aside, predictions, others)
        with whole_file(path) as aside:
            aside.write_text(json_text(results), encoding="utf-8")
            scores.unlink(missing_ok=True)


def results_file(run: Path) -> Path:
    """The JSON file of a run, which may be named by its folder."""
    return run / RESULTS if run.is_dir() else run


def read_results(run: Path) -> dict[str, Any]:
    """The figures of a run.

    Args:
        run: Its folder, or the JSON file.

    Raises:
        DataError: If there are none.
    """
    path = results_file(run)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file. {_WANTED}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no results ({first_line(error)}). {_WANTED}") from error
    if not isinstance(results, dict):
        raise DataError(f"{path}: these are not results. Pass what `medct train` or `medct evaluate` wrote.")
    return results


def read_scores(run: Path) -> Predictions:
    """The scores of a run.

    Args:
        run: Its folder, its JSON file, or the csv file itself.

    Raises:
        DataError: If there are none.
    """
    path = results_file(run)
    if path.suffix == ".csv":
        return read_predictions(path)
    scores = scores_path(path)
    if not path.exists() and not scores.exists():
        raise DataError(f"{path}: no such file. {_WANTED}")
    if not scores.exists():
        raise DataError(
            f"{path}: there is no {scores.name} beside it, without which only the figures are known, as of runs of "
            "versions before 0.2.0. Score the studies again with `medct evaluate --output`."
        )
    return read_predictions(scores)
