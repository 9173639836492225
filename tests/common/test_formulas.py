"""Cells that a spreadsheet would compute stand as text, and come back."""

import csv

import numpy as np
import pytest

from medct.common.formulas import as_text, of_text
from medct.evaluation.predictions import Key, Predictions, read_predictions, write_predictions
from medct.evaluation.scoring import ScoredStudies
from medct.inference.bulk import KEY, Csv, RowFile, read_rows

FORMULAS = ['=HYPERLINK("http://host","x")', "+x.nii", "-x.nii", "@SUM(A1)", "\t=1+1", "'=1", "''-x"]


@pytest.mark.parametrize("cell", FORMULAS)
def test_a_formula_becomes_text_and_comes_back(cell):
    assert as_text(cell) == f"'{cell}" and of_text(as_text(cell)) == cell


@pytest.mark.parametrize("cell", ["", "a.nii", "scans/=x.nii", "-0.5", "+1e-3", "-inf", "'", "'quoted'", "5 - 3"])
def test_all_else_stays(cell):
    assert as_text(cell) == of_text(cell) == cell


def begins_formula(path) -> bool:
    with path.open(newline="", encoding="utf-8") as file:
        return any(cell[:1] in tuple("=+-@\t") for row in csv.reader(file) for cell in row if cell != "-0.5")


def test_rows_hold_no_formula(tmp_path):
    format = Csv([KEY, "=finding"])
    rows = [{KEY: name, "=finding": "-0.5"} for name in FORMULAS]
    file = RowFile(tmp_path / "rows.csv", format)
    for row in rows:
        file.write(row)
    file.close()
    assert not begins_formula(tmp_path / "rows.csv")
    assert list(read_rows(tmp_path / "rows.csv", format)) == rows
    assert RowFile(tmp_path / "rows.csv", format).done == {*FORMULAS}


def test_scores_hold_no_formula(tmp_path):
    scores = np.full((len(FORMULAS), 1), 0.25)
    scored = ScoredStudies(FORMULAS, FORMULAS, scores, scores.round(), names=["=finding"])
    write_predictions(tmp_path / "scores.csv", Predictions(["=finding"], {Key("-model", "+site", "test"): scored}))
    assert not begins_formula(tmp_path / "scores.csv")
    (found,) = read_predictions(tmp_path / "scores.csv").scored.items()
    assert found[0] == ("-model", "+site", "test") and found[1].names == ["=finding"]
    assert found[1].ids == found[1].patients == FORMULAS
