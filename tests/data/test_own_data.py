"""Folders with `metadata.csv`, Parquet and repositories with a `Nifti()` column, and their splits."""

import contextlib
import math
import unicodedata

import nibabel
import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Nifti, Value
from hub_server import HubServer
from scan_files import write_series

from medct import MedCTConfig
from medct.data import DataError, StudyLoader, open_source, open_splits, read_study
from medct.data.own_data import split_meanings
from medct.data.tables import refuse_misnamed
from medct.training.replay import with_replay

CONFIG = MedCTConfig(id2label={0: "nodule", 1: "fluid"}, label2id={"nodule": 0, "fluid": 1})
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


def write_scan(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((6, 8, 5), level, np.int16)
    array[0, 0] = -1000
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), path)
    return path


def write_metadata(folder, count=40, **columns):
    """A folder of a few scans, which a table lists repeatedly under different names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"scan{number:02d}.nii.gz" for number in range(count)]
    for number, name in enumerate(names):
        write_scan(folder / name, number)
    table = {
        "file_name": names,
        "report": [f"Report {number}." for number in range(count)],
        "nodule": [number % 2 for number in range(count)],
        "fluid": ["" if number == 3 else 0.5 for number in range(count)],
        "other": "left alone",
        **columns,
    }
    pd.DataFrame(table).to_csv(folder / "metadata.csv", index=False)
    return folder


def names_of(address, split, **options):
    return {row["id"] for row in open_source(str(address), split, CONFIG, **options).stream()}


def test_a_folder_with_metadata(tmp_path):
    folder = write_metadata(tmp_path / "scans", patient=[number // 2 for number in range(40)])
    sources = {split: open_source(str(folder), split, CONFIG) for split in ("train", "tune", "valid")}
    rows = {split: list(source.stream()) for split, source in sources.items()}
    patients = [{row["patient"] for row in rows[split]} for split in rows]
    assert all(patients) and sum(len(part) for part in patients) == len(set().union(*patients)) == 20
    assert sum(source.num_studies for source in sources.values()) == 40
    assert "split by a hash of the patient: 10% held out" in sources["valid"].description
    by_name = {row["id"]: row for row in sum(rows.values(), [])}  # noqa: RUF017
    assert by_name["scan05.nii.gz"]["report"] == "Report 5."
    assert by_name["scan05.nii.gz"]["labels"] == [1, 0.5]
    assert math.isnan(by_name["scan03.nii.gz"]["labels"][1])
    assert read_study(by_name["scan05.nii.gz"], "SLP").array.max() == 5


def test_a_source_is_shown_without_its_studies_patients_and_reports(tmp_path):
    folder = write_metadata(tmp_path / "scans", patient=[f"Doe {number}" for number in range(40)])
    source = open_source(str(folder), "train", CONFIG)
    for each, kind in ((source, "Source"), (with_replay(source, source, 0.2), "ReplaySource")):
        assert repr(each) == f"{kind}({each.description})"
        assert not any(told in repr(each) for told in ("Doe", "Report", "scan05"))


def test_a_split_column(tmp_path):
    split = ["train"] * 30 + ["validation"] * 6 + ["test"] * 4
    folder = write_metadata(tmp_path / "scans", split=split)
    assert len(names_of(folder, "train")) == 30
    assert names_of(folder, "tune") == {f"scan{number}.nii.gz" for number in range(30, 36)}
    assert names_of(folder, "valid") == {f"scan{number}.nii.gz" for number in range(36, 40)}


def test_a_folder_per_split(tmp_path):
    write_metadata(tmp_path / "train", 4)
    write_metadata(tmp_path / "validation", 2)
    assert names_of(tmp_path, "valid") == {"validation/scan00.nii.gz", "validation/scan01.nii.gz"}
    rows = list(open_source(str(tmp_path), "train", CONFIG, tune_share=0).stream())
    assert len(rows) == 4
    assert rows[1]["volume"] == str(tmp_path / "train/scan01.nii.gz")


def test_a_folder_of_a_split_is_not_passed_over_for_its_spelling(tmp_path):
    for name, count in (("training", 4), ("Test", 2)):
        write_metadata(tmp_path / name, count)
    found = {split: source.num_studies for split, source in open_splits(str(tmp_path), CONFIG, tune_share=0).items()}
    assert found == {"train": 4, "valid": 2}


def test_a_dicom_folder_is_a_study(tmp_path, processor):
    write_series(tmp_path / "scans/series1", np.full((6, 8, 5), -700, np.int16))
    table = pd.DataFrame(
        {"file_name": ["series1"], "report": ["Clear."], "nodule": [0], "fluid": [1], "split": "valid"}
    )
    table.to_csv(tmp_path / "scans/metadata.csv", index=False)
    source = open_source(str(tmp_path / "scans"), "valid", CONFIG)
    (batch,) = StudyLoader(source, processor, CONFIG.label_names, batch_size=1, with_text=True)
    assert batch["ids"] == ["series1"]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("file_name,Patient,Mass", "it has a column 'Patient', which is read if it is called 'patient'"),
        ("file_name,patient_id,Mass", "'patient_id'"),
        ("file_name,patient,Split,Mass", "'Split'"),
        ("file_name,PatientID,patient,Mass", None),
        ("file_name,PatientSex,Mass", None),
    ],
)
def test_patients_and_splits_are_not_passed_over_for_their_name(tmp_path, header, said):
    """Each scan would count as a patient, and scans of one would be in two splits."""
    (tmp_path / "metadata.csv").write_text(f"{header}\na.nii,p,p,1\n", encoding="utf-8")
    if said is None:
        refuse_misnamed(header.split(","), "x")
        return
    with pytest.raises(DataError, match=said):
        open_source(str(tmp_path), "train", MedCTConfig(id2label={0: "Mass"}, label2id={"Mass": 0}))


@pytest.mark.parametrize(
    ("patient", "said"),
    [
        ("nan", "6 rows have the patient 'nan', which names nobody"),
        ("NULL", "'NULL'"),
        ("#N/A", "'#N/A'"),
        ("unbekannt", "'unbekannt'"),
        ("1.23457E+11", "the patient '1.23457E\\+11' is a long number that was rounded"),
        ("1,2E+15", "rounded"),
    ],
)
def test_what_names_nobody_is_not_one_patient(tmp_path, patient, said):
    folder = write_metadata(tmp_path, 6, patient=patient)
    with pytest.raises(DataError, match=said):
        open_source(str(folder), "train", CONFIG)


@pytest.mark.parametrize("report", ["NULL", "nan", "n/a", "#N/A", "Not given.", " "])
def test_a_report_that_says_nothing_is_none(tmp_path, report):
    rows = open_source(str(write_metadata(tmp_path, 6, report=report)), "train", CONFIG).stream()
    assert {row["report"] for row in rows} == {""}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["Report"], "it has a column 'Report', which is read if it is called 'report'"),
        (["Findings", "Impression"], "'Findings'"),
        (["findings", "IMPRESSION "], "'IMPRESSION'"),
        (["report_text"], "'report_text'"),
        (["report", "Findings"], None),
        (["findings"], None),
        (["reported by"], None),
    ],
)
def test_reports_are_not_passed_over_for_their_name(tmp_path, columns, said):
    folder = write_metadata(tmp_path, 6)
    table = pd.read_csv(folder / "metadata.csv").drop(columns="report")
    table.assign(**dict.fromkeys(columns, "A nodule.")).to_csv(folder / "metadata.csv", index=False)
    if said is None:
        assert open_source(str(folder), "train", CONFIG).num_studies
        return
    with pytest.raises(DataError, match=said):
        open_source(str(folder), "train", CONFIG)


def test_names_are_looked_at_in_the_sheet_that_is_read(tmp_path):
    write_metadata(tmp_path, 2)
    table = pd.read_csv(tmp_path / "metadata.csv").assign(Patient="p")
    (tmp_path / "metadata.csv").unlink()
    with pd.ExcelWriter(tmp_path / "metadata.xlsx") as book:
        pd.DataFrame({"notes": ["of somebody"]}).to_excel(book, sheet_name="notes", index=False)
        table.to_excel(book, sheet_name="studies", index=False)
    with pytest.raises(DataError, match="it has a column 'Patient'"):
        open_source(str(tmp_path), "train", CONFIG)


@pytest.mark.parametrize(
    ("first", "second", "is_one"),
    [
        ("1", "01", True),
        ("7", "7.0", True),
        ("P12", "P0012", True),
        ("0", "00", True),
        ("1", "10", False),
        ("P1", "Q1", False),
        ("1a2", "01a2", False),  # letters and digits at random are of one length
        ("12345678901234567890", "12345678901234567891", False),
    ],
)
def test_a_patient_written_in_two_ways_is_refused(tmp_path, first, second, is_one):
    """Excel drops leading zeros, and other programs add `.0`."""
    rows = f"a.nii,{first},train,1\nb.nii,{second},valid,1\n"
    (tmp_path / "metadata.csv").write_text(f"file_name,patient,split,Mass\n{rows}", encoding="utf-8")
    (tmp_path / "a.nii").touch()
    said = pytest.raises(DataError, match=f"the patients '{first}' and '{second}' may be one")
    with said if is_one else contextlib.nullcontext():
        open_source(str(tmp_path), "train", MedCTConfig(id2label={0: "Mass"}, label2id={"Mass": 0}))


@pytest.mark.parametrize("other", ["./ä.nii", "sub/../ä.nii", "sub//../ä.nii", "{folder}/ä.nii", "a\u0308.nii"])
def test_a_file_is_one_study_however_its_path_is_written(tmp_path, other):
    """One spelling might be in one split, and one in another."""
    rows = f"ä.nii,p,train,1\n{other.format(folder=tmp_path)},q,valid,1\n"
    (tmp_path / "metadata.csv").write_text(f"file_name,patient,split,Mass\n{rows}", encoding="utf-8")
    with pytest.raises(DataError, match=r"the rows 'ä.nii' and .* are of the same file. Keep one"):
        open_source(str(tmp_path), "train", MedCTConfig(id2label={0: "Mass"}, label2id={"Mass": 0}))


@pytest.mark.parametrize(("in_table", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_the_same_however_they_are_composed(tmp_path, in_table, on_disk):
    """On macOS, and from its archives, files have them decomposed; tables have them composed."""
    scan = write_scan(tmp_path / unicodedata.normalize(on_disk, "Brüche/Überblick.nii"), 3)
    rows = unicodedata.normalize(in_table, "Brüche/Überblick.nii,Jürgen,train,1,\n")
    (tmp_path / "metadata.csv").write_text(f"file_name,patient,split,nodule,fluid\n{rows}", encoding="utf-8")
    (row,) = open_source(str(tmp_path), "train", CONFIG, tune_share=0).stream()
    assert (row["id"], row["patient"]) == ("Brüche/Überblick.nii", "Jürgen")
    assert row["volume"] == str(scan)
    assert read_study(row, "SLP").array.max() == 3


def test_a_patient_is_one_however_accents_are_composed(tmp_path):
    write_scan(tmp_path / "a.nii", 1)
    rows = "a.nii,Jürgen,train,1,\nb.nii,Ju\u0308rgen,valid,1,\n"
    (tmp_path / "metadata.csv").write_text(f"file_name,patient,split,nodule,fluid\n{rows}", encoding="utf-8")
    with pytest.raises(DataError, match="1 patients are in several splits"):
        open_source(str(tmp_path), "train", CONFIG)


def test_columns_and_values_that_are_missing_or_strange(tmp_path):
    folder = write_metadata(tmp_path / "scans", 6)
    table = pd.read_csv(folder / "metadata.csv", dtype=str, keep_default_na=False)

    def refused(message, **columns):
        changed = table.drop(columns=[name for name, value in columns.items() if value is None])
        changed = changed.assign(**{name: value for name, value in columns.items() if value is not None})
        changed.to_csv(folder / "metadata.csv", index=False)
        with pytest.raises(DataError, match=message):
            open_source(str(folder), "train", CONFIG)

    refused(r"metadata.csv: has no column 'fluid', but 'file_name', 'report', 'nodule', 'other'\.", fluid=None)
    refused("has no column 'file_name'", file_name=None)
    refused("the label 'nodule' is -1 somewhere", nodule="-1")
    refused("the label 'nodule' is 'perhaps' somewhere", nodule="perhaps")
    refused("6 rows have an empty 'patient'", patient="")
    refused("has the split 'holdout'", split="holdout")
    refused("1 rows have no split", split=["train"] * 5 + [""])
    refused("3 patients are in several splits", patient=["a", "b", "c"] * 2, split=["train"] * 3 + ["valid"] * 3)
    refused("contradict each other, such as 'one.nii.gz'", file_name="one.nii.gz")
    refused("no study of the train split is left .no such file", file_name=[f"{number}" for number in range(6)])


def test_reports_are_not_needed(tmp_path):
    folder = write_metadata(tmp_path / "scans", 30, report=["", "Not given."] + ["Text."] * 28)
    rows = {row["id"]: row["report"] for row in open_source(str(folder), "train", CONFIG).stream()}
    assert {rows.get("scan00.nii.gz", ""), rows.get("scan01.nii.gz", "")} == {""}
    source = open_source(str(folder), "train", CONFIG, need_reports=True)
    assert all(row["report"] for row in source.stream())


def test_names_of_splits():
    assert split_meanings(["train", "val"], "x") == {"train": "train", "val": "valid"}
    assert split_meanings(["train", "test"], "x") == {"train": "train", "test": "valid"}
    assert split_meanings(["Train", "validation", "test"], "x") == {
        "Train": "train",
        "validation": "tune",
        "test": "valid",
    }
    with pytest.raises(DataError, match="tune, a validation and a test"):
        split_meanings(["tune", "val", "test"], "x")


FEATURES = Features(
    {
        "scan": Nifti(),
        "report": Value("string"),
        "nodule": Value("int8"),
        "fluid": Value("float32"),
        "id": Value("string"),
    }
)


def nifti_dataset(tmp_path, count, first=0):
    rows = []
    for number in range(first, first + count):
        content = write_scan(tmp_path / f"made/{number}.nii.gz", number).read_bytes()
        rows.append(
            {
                "scan": {"bytes": content if number != 1 else content[:50], "path": None},
                "report": f"Report {number}.",
                "nodule": number % 2,
                "fluid": None if number == 3 else 0.0,
                "id": f"study{number}",
            }
        )
    return Dataset.from_list(rows, features=FEATURES)


def test_a_parquet_file(tmp_path, processor):
    nifti_dataset(tmp_path, 24).to_parquet(str(tmp_path / "scans.parquet"), batch_size=5)
    source = open_source(str(tmp_path / "scans.parquet"), "train", CONFIG, tune_share=0)
    rows = {row["id"]: row for row in source.stream(seed=3)}
    held_out = names_of(tmp_path / "scans.parquet", "valid")
    assert held_out and not held_out & set(rows)
    assert held_out | set(rows) == {f"study{number}" for number in range(24)}
    for name in set(rows) - {"study1"}:
        assert read_study(rows[name], "SLP").array.max() == int(name.removeprefix("study"))
    loader = StudyLoader(
        source, processor, CONFIG.label_names, batch_size=8, with_text=True, num_workers=2, max_bad_share=0.1
    )
    assert sum(len(batch["ids"]) for batch in loader) == len(set(rows) - {"study1"})
    assert loader.num_bad == ("study1" in rows)


def test_a_folder_of_parquet_files(tmp_path):
    (tmp_path / "set/data").mkdir(parents=True)
    nifti_dataset(tmp_path, 4, 10).to_parquet(str(tmp_path / "set/data/train-00000-of-00001.parquet"))
    nifti_dataset(tmp_path, 2, 20).to_parquet(str(tmp_path / "set/data/test-00000-of-00001.parquet"))
    assert names_of(tmp_path / "set", "train", tune_share=0) == {f"study{number}" for number in range(10, 14)}
    assert names_of(tmp_path / "set", "valid") == {"study20", "study21"}


def test_a_test_split_alone_is_scored_as_a_whole(tmp_path):
    (tmp_path / "set").mkdir()
    nifti_dataset(tmp_path, 4, 10).to_parquet(str(tmp_path / "set/test-00000-of-00001.parquet"))
    assert names_of(tmp_path / "set", "valid") == {f"study{number}" for number in range(10, 14)}


@pytest.mark.parametrize(
    ("train", "test", "named"),
    [
        ("train.parquet", "test.parquet", "test.parquet, row 1"),
        ("train/scans.parquet", "test/scans.parquet", "test/scans.parquet, row 1"),
    ],
)
def test_rows_of_parquet_files_without_names_are_told_apart(train, test, named, tmp_path):
    for path, first in ((tmp_path / "set" / train, 10), (tmp_path / "set" / test, 20)):
        path.parent.mkdir(parents=True, exist_ok=True)
        nifti_dataset(tmp_path, 2, first).remove_columns("id").to_parquet(str(path))
    assert names_of(tmp_path / "set", "valid") == {named, named.replace("row 1", "row 0")}


def test_a_class_is_read_by_its_name(tmp_path):
    """`class_encode_column` numbers words in the order of the alphabet: "ja" is 0, and so present."""
    words, path = {-1: math.nan, 0: 1.0, 1: 0.0}, str(tmp_path / "scans.parquet")
    classes = ClassLabel(names=["ja", "nein"])
    table = nifti_dataset(tmp_path, 6).remove_columns("fluid").add_column("fluid", [-1, 0, 1] * 2)
    table = table.add_column("split", [0, 0, 0, 1, 1, 1]).cast_column("fluid", classes)
    table.cast_column("split", ClassLabel(names=["test", "train"])).to_parquet(path)
    for split, numbers in (("valid", range(3)), ("train", range(3, 6))):
        rows = {row["id"]: row["labels"][1] for row in open_source(path, split, CONFIG, tune_share=0).stream()}
        expected = {f"study{number}": words[number % 3 - 1] for number in numbers}
        np.testing.assert_equal(rows, expected)


def test_a_repository_with_a_nifti_column(tmp_path, monkeypatch):
    hub = HubServer()
    hub.connect(monkeypatch)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    for split, count, first in (("train", 3, 10), ("validation", 2, 20)):
        path = tmp_path / f"{split}.parquet"
        nifti_dataset(tmp_path, count, first).to_parquet(str(path))
        hub.add_file("dataset", "org/scans", f"data/{split}-00000-of-00001.parquet", path.read_bytes())
    address = "hf://datasets/org/scans"
    assert names_of(address, "train", tune_share=0) == {"study10", "study11", "study12"}
    (row, _) = open_source(address, "valid", CONFIG).stream()
    assert read_study(row, "SLP").array.max() == 20
    hub.close()


@pytest.mark.parametrize("within", ["", "train"])
def test_of_two_tables_none_is_taken(tmp_path, within):
    (tmp_path / within).mkdir(exist_ok=True)
    for name in ("metadata.csv", "metadata.xlsx"):
        (tmp_path / within / name).touch()
    with pytest.raises(DataError, match=r"it has both .*metadata\.csv and .*metadata\.xlsx\. Keep the one that holds"):
        open_source(str(tmp_path), "train", CONFIG)


def test_a_split_that_no_patient_fell_into_is_not_called_an_empty_table(tmp_path):
    write_metadata(tmp_path, 2, patient=["p", "q"], split=["train", "valid"])
    with pytest.raises(DataError, match=r"of the tune split is left \(1 in train, 1 in valid\)\. Give some"):
        open_source(str(tmp_path), "tune", CONFIG, tune_share=0.0)


def test_what_is_not_a_source_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: not in CT-RATE's layout, no metadata.csv, and not a dataset"):
        open_source(str(tmp_path / "empty"), "train", CONFIG)
    write_scan(tmp_path / "files/a.nii.gz", 0)
    (tmp_path / "files/metadata.jsonl").write_text('{"file_name": "a.nii.gz", "nodule": 1, "fluid": 0}\n', "utf-8")
    with pytest.raises(DataError, match=r"List its files in a metadata\.csv; a metadata\.jsonl is not read\."):
        open_source(str(tmp_path / "files"), "train", CONFIG)
    Dataset.from_dict({"nodule": [1], "fluid": [0]}).to_parquet(str(tmp_path / "plain.parquet"))
    with pytest.raises(DataError, match=r"has no Nifti\(\) column"):
        open_source(str(tmp_path / "plain.parquet"), "train", CONFIG)
    nifti_dataset(tmp_path, 3).remove_columns("fluid").to_parquet(str(tmp_path / "few.parquet"))
    with pytest.raises(DataError, match="has no column 'fluid'"):
        open_source(str(tmp_path / "few.parquet"), "train", CONFIG)
    nifti_dataset(tmp_path, 3).rename_column("id", "PatientID").to_parquet(str(tmp_path / "patients.parquet"))
    with pytest.raises(DataError, match="a column 'PatientID', which is read if it is called 'patient'"):
        open_source(str(tmp_path / "patients.parquet"), "train", CONFIG)
    (tmp_path / "two").mkdir()
    nifti_dataset(tmp_path, 3).to_parquet(str(tmp_path / "two/train.parquet"))
    nifti_dataset(tmp_path, 3, 3).rename_column("scan", "volume").to_parquet(str(tmp_path / "two/test.parquet"))
    with pytest.raises(DataError, match=r"volume columns of its files differ \(scan, volume\)\. Call them alike"):
        open_source(str(tmp_path / "two"), "train", CONFIG)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        open_source(str(tmp_path / "broken.parquet"), "train", CONFIG)
