"""Tables of scores."""

import re

import numpy as np
import pytest

from medct.evaluation.metrics import choose_thresholds, compare
from medct.evaluation.report import markdown_table, prompts_report, results_table

NAMES = ["nodule", "mass"]
SCORES = np.array([[0.9, 0.2], [0.8, 0.3], [0.3, 0.1], [0.1, 0.7]])
LABELS = np.array([[1, 0], [0, 0], [1, 0], [0, 0]])


def rows(table: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {title: values for title, *values in cells}


def test_figures_are_those_of_the_comparison():
    scores, labels = (np.tile(each, (5, 1)) for each in (SCORES, LABELS))
    patients = [f"{name}{block}" for block in range(5) for name in ("a", "b", "c", "c")]
    better = scores.copy()
    better[1] = 0.2
    compared = compare(scores, better, labels, patients, NAMES, resamples=200)
    table = results_table(compared, NAMES)
    base, adapted, difference = rows(table)["nodule (10)"]
    assert base.startswith("0.750 (0.") and adapted.startswith("0.800 (0.")
    assert difference.startswith("+0.050 (+0.00")
    low = compared["base"]["auroc/nodule"]["low"]
    assert f"({low:.3f} to " in base
    assert rows(table)["**mean**"] == rows(table)["AUROC"] == [base, adapted, difference]
    assert "20 scans of 15 patients" in table and "200 resamples" in table
    assert "CT-CLIP protocol: weighted F1" in table and "on the scans that they score" in table


def test_a_label_without_a_score_is_shown_as_such():
    table = results_table(compare(SCORES, SCORES, LABELS, None, NAMES, resamples=5), NAMES)
    assert rows(table)["mass (0)"] == ["–"] * 3
    assert "–: always or never present" in table
    nodule = slice(0, 1)
    compared = compare(SCORES[:, nodule], SCORES[:, nodule], LABELS[:, nodule], None, ["nodule"], resamples=5)
    assert "–" not in results_table(compared, ["nodule"])


@pytest.mark.parametrize("is_one_certain", [False, True])
def test_a_figure_without_an_interval_is_explained(is_one_certain):
    """Five of each kind are enough, but where all are in order the resamples tell no spread."""
    labels = np.tile([[1], [0]], (6, 1))
    base = labels * 0.5 + np.linspace(0.2, 0.3, 12)[:, None]
    base[:2] = [[0.1], [0.9]]
    adapted = labels * 0.8 if is_one_certain else base
    compared = compare(base, adapted, labels, None, NAMES[:1], resamples=50)
    cells = rows(results_table(compared, NAMES[:1]))["nodule (6)"]
    assert (cells[1] == "1.000") == is_one_certain and "(" in cells[0] and ("(" in cells[2]) != is_one_certain
    said = "A figure that is 0 or 1 in every resample has no interval, nor has its difference."
    assert (said in results_table(compared, NAMES[:1])) == is_one_certain


def test_the_name_of_a_label_stays_in_its_cell():
    """Else the base's figure stands under the name of the adapted model."""
    names = ["nodule|mass", "x"]
    found = {
        "present": 1,
        "usual": 0.5,
        "mean": 0.5,
        "lowest": 0.5,
        "highest": 0.5,
        "best": {"name": "a|b", "template": ["{label}"]},
    }
    chosen = {"prompt_templates": [], "names": {}, "auroc": 0.5}
    spread = {"findings": {names[0]: found}, "templates": [{"template": ["a|", "b"], "auroc": 0.5}], "ensemble": 0.5}
    tables = [
        results_table(compare(SCORES, SCORES, LABELS, None, names, resamples=5), names),
        prompts_report(spread | {"chosen": chosen, "studies": 1, "patients": 1}),
    ]
    for table in tables:
        line = next(line for line in table.splitlines() if "nodule" in line)
        assert line.startswith(r"| nodule\|mass (")
        assert len(re.findall(r"(?<!\\)\|", line)) == table.splitlines()[0].count("|")


def test_whatever_stands_in_a_cell_makes_no_two_of_it():
    lines = markdown_table(["a|b", "c"], [["d", "e|f"]]).splitlines()
    assert lines == [r"| a\|b | c |", "| --- | ---: |", r"| d | e\|f |"]


@pytest.mark.parametrize("with_thresholds", [True, False])
def test_accuracy_needs_thresholds(with_thresholds):
    thresholds = [choose_thresholds(SCORES, LABELS)] * 2 if with_thresholds else []
    table = results_table(compare(SCORES, SCORES, LABELS, None, NAMES, *thresholds, resamples=5), NAMES)
    assert ("accuracy" in rows(table)) == ("macro-F1" in rows(table)) == with_thresholds
    assert ("chosen on other scans" in table) == with_thresholds
