"""Scores in a csv file: read back to the bit, joined with metadata, paired between runs."""

import dataclasses
import unicodedata

import numpy as np
import pandas as pd
import pytest

from medct.data import DataError
from medct.evaluation.predictions import (
    Key,
    Predictions,
    _of_models,
    held_out,
    join_metadata,
    paired,
    read_predictions,
    short_names,
    write_predictions,
)
from medct.evaluation.scoring import ScoredStudies

NAMES = ["Lung nodule", "Mass"]


def studies(seed: int = 0, count: int = 4, about: bool = False) -> ScoredStudies:
    generator = np.random.default_rng(seed)
    scores = generator.random((count, 2)).astype(np.float32)
    labels = np.array([[1, 0], [0, np.nan], [0, 1], [1, 1]] * count, np.float32)[:count]
    groups = [{"sex": "F"}, {}, {"sex": "M"}, {"sex": "F"}] if about else []
    names = [f"a/{index}.nii.gz" for index in range(count)]
    return ScoredStudies(names, list("ppqr")[:count], scores, labels, groups, names=NAMES)


def test_what_was_written_is_read_back_to_the_bit(tmp_path):
    written = {Key("base", "site-b", "valid"): studies(0, about=True), Key("new", "site-b", "valid"): studies(1)}
    path = tmp_path / "results.csv"
    write_predictions(path, Predictions(NAMES, written), [("site-b", "train", ["x.nii", "y.nii"])])
    read = read_predictions(path)
    assert read.names == NAMES
    assert list(read.scored) == list(written)
    for key, expected in written.items():
        found = read.scored[key]
        assert (found.ids, found.patients) == (expected.ids, expected.patients)
        assert found.scores.tolist() == expected.scores.tolist()
        np.testing.assert_array_equal(found.labels, expected.labels)
    assert [about["sex"] for about in read.scored[Key("base", "site-b", "valid")].about] == ["F", "", "M", "F"]
    table = pd.read_csv(path, keep_default_na=False)
    assert table["file_name"][table["split"] == "train"].tolist() == ["x.nii", "y.nii"]


def test_scores_of_tuning_patients_are_no_result():
    tune, valid = Key("new", "site-b", "tune"), Key("new", "site-b", "valid")
    both = Predictions(NAMES, {tune: studies(0), valid: studies(1)})
    assert list(held_out(both).scored) == [valid]
    assert list(held_out(Predictions(NAMES, {tune: studies(0)})).scored) == [tune]


@pytest.mark.parametrize(("in_scores", "in_metadata"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_the_same_however_they_are_composed(tmp_path, in_scores, in_metadata):
    for path, form, label in (("scores.csv", in_scores, 0.7), ("metadata.csv", in_metadata, 1)):
        text = unicodedata.normalize(form, f"file_name,Mass\nÜberblick.nii,{label}\n")
        (tmp_path / path).write_text(text, encoding="utf-8")
    (scored,) = join_metadata(tmp_path / "scores.csv", tmp_path / "metadata.csv").scored.values()
    assert scored.labels.tolist() == [[1]]


@pytest.mark.filterwarnings("ignore:.*left out")
def test_scores_join_with_metadata_by_the_name_of_the_file(tmp_path):
    """As `medct predict` writes them: paths from elsewhere, a column for people, and more studies than are labelled."""
    table = {"study": ["/data/a/0.nii.gz", "b/1.nii.gz", "2.nii.gz", "other.nii"], "Mass": [0.1, 0.9, 0.4, 0.5]}
    pd.DataFrame(table | {"Lung nodule": 0.5, "Mass present": 1}).to_csv(tmp_path / "scores.csv", index=False)
    rows = {"file_name": ["2.nii.gz", "a/0.nii.gz", "1.nii.gz"], "Mass": ["1", "", "0"], "patient": ["p", "q", "r"]}
    rows |= {"split": ["test", "test", "train"], "PatientAge": ["030Y", "", "65"]}
    pd.DataFrame(rows).to_csv(tmp_path / "metadata.csv", index=False)
    found = join_metadata(tmp_path / "scores.csv", tmp_path / "metadata.csv")
    assert found.names == ["Mass"]
    (scored,) = found.scored.values()
    assert scored.ids == ["a/0.nii.gz", "1.nii.gz", "2.nii.gz"]
    assert scored.patients == ["q", "r", "p"]
    assert scored.about == [{}, {"age": "60-79"}, {"age": "under 40"}]
    assert scored.scores[:, 0].tolist() == [0.1, 0.9, 0.4]
    np.testing.assert_array_equal(scored.labels[:, 0], [np.nan, 0, 1])
    (scored,) = join_metadata(tmp_path / "scores.csv", tmp_path / "metadata.csv", "test").scored.values()
    assert scored.ids == ["a/0.nii.gz", "2.nii.gz"]


def test_equal_rows_are_one_as_in_a_source(tmp_path):
    for name, column in (("scores.csv", [0.2, 0.7, 0.2]), ("metadata.csv", [0, 1, 0])):
        pd.DataFrame({"file_name": ["a", "b", "a"], "Mass": column}).to_csv(tmp_path / name, index=False)
    (scored,) = join_metadata(tmp_path / "scores.csv", tmp_path / "metadata.csv").scored.values()
    assert scored.ids == ["a", "b"]


def test_a_runs_own_scores_join_with_the_table_it_was_made_of(tmp_path):
    """Subgroups are no labels, what was trained on has no scores, and what was tuned on is not held out."""
    valid, tune = studies(0, about=True), studies(1)
    tune = dataclasses.replace(tune, ids=[f"t/{each}" for each in tune.ids])
    written = {Key("new", "site-b", "tune"): tune, Key("new", "site-b", "valid"): valid}
    path, metadata = tmp_path / "results.csv", tmp_path / "metadata.csv"
    write_predictions(path, Predictions(NAMES, written), [("site-b", "train", ["x.nii"])])
    table = pd.DataFrame({"file_name": [*valid.ids, *tune.ids, "x.nii"], "sex": "F", "Lung nodule": 1, "Mass": 0})
    table.assign(split=["valid"] * 4 + ["tune"] * 4 + ["train"]).to_csv(metadata, index=False)
    said = {None: "4 scores of tuning patients left out", "tune": "4 of 8 rows"}
    for split, expected in ((None, valid), ("tune", tune)):
        with pytest.warns(UserWarning, match=said[split]):
            found = join_metadata(path, metadata, split)
        (scored,) = found.scored.values()
        assert (found.names, scored.ids) == (NAMES, expected.ids)
        assert scored.scores.tolist() == expected.scores.tolist()
    foreign = pd.DataFrame({"file_name": valid.ids, "sex": "F", "Mass": 0.5})
    foreign.to_csv(path, index=False)
    assert join_metadata(path, metadata).names == ["Mass"]


def test_scores_that_the_table_of_labels_lacks_are_named(tmp_path):
    """Not what stands beside them in a file of `medct predict`, nor what is no score."""
    scores = {"study": ["a", "b"], "Mass": ["0,1", "0,9"], "Erguss": ["0,2", "0,3"], "notes": ["", "cut"]}
    scores |= {"mAs": [90, 9], "Erguss present": [0, 1], "Erguss probability": [0.1, 0.2], "Bild": ["", ""]}
    pd.DataFrame(scores).to_csv(tmp_path / "scores.csv", sep=";", index=False)
    pd.DataFrame({"file_name": ["a", "b"], "Mass": [0, 1]}).to_csv(tmp_path / "metadata.csv", index=False)
    with pytest.warns(UserWarning, match="metadata.csv has no column Erguss, so these scores are left out"):
        assert join_metadata(tmp_path / "scores.csv", tmp_path / "metadata.csv").names == ["Mass"]


@pytest.mark.parametrize(
    ("scores", "metadata", "said"),
    [
        ({"file_name": ["a"], "Mass": [1]}, {"file_name": ["b"], "Mass": [1]}, "No study of "),
        ({"file_name": ["a"], "Mass": [1]}, {"file_name": ["a"], "Nodule": [1]}, "have no label in common"),
        (
            {"file_name": ["a", "a"], "Mass": [1, 0]},
            {"file_name": ["a"], "Mass": [1]},
            "row is of a study that has one",
        ),
        (
            {"file_name": ["a"], "Mass": [1]},
            {"file_name": ["a", "a"], "Mass": [1, 0]},
            "row is of a study that has one",
        ),
        ({"name": ["a"], "Mass": [1]}, {"file_name": ["a"], "Mass": [1]}, "has no column 'file_name'"),
        ({"file_name": ["a"], "Mass": ["high"]}, {"file_name": ["a"], "Mass": [1]}, "Write a number"),
    ],
)
def test_tables_that_do_not_go_together_are_refused(tmp_path, scores, metadata, said):
    for name, table in (("scores.csv", scores), ("metadata.csv", metadata)):
        pd.DataFrame(table).to_csv(tmp_path / name, index=False)
    with pytest.raises(DataError, match=said):
        join_metadata(tmp_path / "scores.csv", tmp_path / "metadata.csv")


def test_what_metrics_are_not_of_is_named(tmp_path):
    """A split that the table does not have, and scores alone, as `medct predict` writes them."""
    scores, metadata = tmp_path / "scores.csv", tmp_path / "metadata.csv"
    pd.DataFrame({"study": ["a"], "Mass": [0.5]}).to_csv(scores, index=False)
    pd.DataFrame({"file_name": ["a", "b"], "Mass": [1, 0], "split": ["test", "train"]}).to_csv(metadata, index=False)
    with pytest.raises(DataError, match=r"no study of the split 'valid'\. Pass one of its own: test, train"):
        join_metadata(scores, metadata, "valid")
    with pytest.raises(DataError, match=r"holds no labels beside its scores.*a table of labels as well"):
        read_predictions(scores)


def test_runs_are_paired_by_the_names_of_their_studies():
    first, second = studies(0), studies(1).take([3, 1, 0])
    one, two = paired(first, second, "site b")
    assert one.ids == two.ids == [first.ids[0], first.ids[1], first.ids[3]]
    assert one.scores.tolist() == first.scores[[0, 1, 3]].tolist()
    assert two.scores.tolist() == studies(1).scores[[0, 1, 3]].tolist()
    other = dataclasses.replace(first, labels=1 - first.labels)
    with pytest.raises(DataError, match="site b: the two runs were scored on different labels"):
        paired(first, other, "site b")
    with pytest.raises(DataError, match="different patients"):
        paired(first, dataclasses.replace(first, patients=list("zzzz")), "site b")
    with pytest.raises(DataError, match="no study in common"):
        paired(first, dataclasses.replace(first, ids=list("wxyz")), "site b")


def test_names_in_tables_are_short_and_different():
    addresses = ["/data/site", "other/site", "hf://datasets/ORG/NAME", "phantoms:B", "site"]
    assert short_names(addresses) == ["site", "site (2)", "hf://datasets/ORG/NAME", "phantoms:B", "site (3)"]


def test_sources_with_other_labels_are_read_back_with_their_own(tmp_path):
    one, two = studies(0), studies(1).only(["Mass"])
    written = Predictions(["Lung nodule", "Mass"], {Key("m", "a", "valid"): one, Key("m", "b", "valid"): two})
    write_predictions(tmp_path / "scores.csv", written)
    found = read_predictions(tmp_path / "scores.csv").scored
    assert [each.names for each in found.values()] == [["Lung nodule", "Mass"], ["Mass"]]
    assert found[Key("m", "b", "valid")].scores.tolist() == two.scores.astype(float).tolist()


def test_patients_of_a_table_are_as_everywhere(tmp_path):
    """Spaces do not count, and nobody is called nothing."""
    pd.DataFrame({"file_name": ["a", "b", "c", "x"], "nodule": [0.1, 0.2, 0.3, 0.4]}).to_csv(
        tmp_path / "s.csv", index=False
    )
    table = pd.DataFrame({"file_name": ["a", "b", "c"], "nodule": [0, 1, 1], "patient": [" P1", "P1 ", "P2"]})
    table.to_csv(tmp_path / "m.csv", index=False)
    with pytest.warns(UserWarning, match=r"1 of 4 rows of .*s.csv are not in .*m.csv; left out"):
        (scored,) = join_metadata(tmp_path / "s.csv", tmp_path / "m.csv").scored.values()
    assert scored.patients == ["P1", "P1", "P2"]
    table.assign(patient=["", " ", "P2"]).to_csv(tmp_path / "m.csv", index=False)
    with pytest.raises(DataError, match="2 rows have an empty 'patient'"):
        join_metadata(tmp_path / "s.csv", tmp_path / "m.csv")


def test_a_cell_that_is_no_number_is_named(tmp_path):
    table = pd.DataFrame({"file_name": ["a", "b"], "nodule": ["0,25", "1e-3"], "mass": [" 0.5 ", ""]})
    table.to_csv(tmp_path / "s.csv", index=False, sep=";")
    labels = pd.DataFrame({"file_name": ["a", "b"], "nodule": [0, 1], "mass": [1, 0]})
    labels.to_csv(tmp_path / "m.csv", index=False)
    (scored,) = join_metadata(tmp_path / "s.csv", tmp_path / "m.csv").scored.values()
    np.testing.assert_array_equal(scored.scores, [[0.25, 0.5], [0.001, np.nan]])
    table.assign(mass=["0.5", "high"]).to_csv(tmp_path / "s.csv", index=False)
    with pytest.raises(DataError, match=r"s.csv: 'mass' is 'high' somewhere. Write a number"):
        join_metadata(tmp_path / "s.csv", tmp_path / "m.csv")


@pytest.mark.parametrize(
    ("splits", "split", "kept"),
    [("tune valid", None, "valid"), ("tune tune", None, "tune tune"), ("tune valid", "tune", "tune valid")],
)
@pytest.mark.filterwarnings("ignore:.*tuning patients left out")
def test_scores_of_tuning_patients_are_joined_where_there_are_no_others(splits, split, kept):
    scores = _of_models(pd.DataFrame({"split": splits.split()}), split)
    assert scores["split"].tolist() == kept.split()
