"""Which subgroups a study belongs to: what columns say, in the words of tables, and nothing else."""

import nibabel
import numpy as np
import pandas as pd
import pytest
from ct_rate_like import ct_rate_files, write_files

from medct import CT_CLIP_LABELS, MedCTConfig
from medct.data import StudyLoader, open_source
from medct.data.subgroups import subgroup_columns, subgroups_of


@pytest.mark.parametrize(
    ("column", "cells"),
    [
        ("sex", {"F": "F", "female": "F", " m ": "M", "Male": "M", "O": "O", "": "", "unknown": "", "1": ""}),
        ("PatientSex", {"mujer": "F", "Mann": "M", "W": "F", "homme": "M", "missing": "", "Mädchen": "", "of": ""}),
        (
            "PatientAge",
            {"058Y": "40-59", "58": "40-59", "39.9": "under 40", "59,9": "40-59", "060Y": "60-79", "090M": "under 40"},
        ),
        (
            "age",
            {
                "40": "40-59",
                "80": "80 and over",
                "": "",
                "old": "",
                "-3": "",
                "1000Y": "",
                "999": "",
                "103": "80 and over",
            },
        ),
        ("ConvolutionKernel", {"B30f": "B30f", " I50f ": "I50f", "": ""}),
        ("manufacturer", {"GE": "GE", "nan": "", "NULL": "", "unknown": "", "#N/A": ""}),
        (
            "SliceThickness",
            {
                "1": "up to 1 mm",
                "0,6": "up to 1 mm",
                "1.25 mm": "1 to 2 mm",
                "5mm": "over 2 mm",
                "1.25": "1 to 2 mm",
                "2": "1 to 2 mm",
                "5": "over 2 mm",
                "0": "",
                "yes": "",
            },
        ),
        ("contrast", {"1": "yes", "no": "no", "0.0": "no", "TRUE": "yes", "ja": "yes", "": "", "maybe": ""}),
        ("ContrastBolusAgent", {"Ultravist": "yes", "Non ionic": "yes", "": "no", " ": "no", "NONE": "no", "0": "no"}),
        ("ContrastBolusAgent", {"NO CONTRAST": "no", "ohne KM": "no", "nein": "no", "n/a": "", "NULL": ""}),
    ],
)
def test_cells_become_subgroups(column, cells):
    (found,) = subgroup_columns(pd.DataFrame({column: list(cells)})).values()
    assert dict(zip(cells, found, strict=True)) == cells


def test_the_first_known_column_counts_and_others_are_not_kept():
    table = pd.DataFrame({"PatientSex": ["F"], "sex": ["M"], "PatientName": ["DOE^JOHN"], "ZSpacing": ["3.0"]})
    found = subgroup_columns(table)
    assert found == {"subgroup sex": ["M"], "subgroup slice thickness": ["over 2 mm"]}
    assert subgroups_of({"id": "a", "subgroup sex": "M", "subgroup age": ""}) == {"sex": "M"}


def test_they_come_with_the_studies_to_the_batch(tmp_path, model, processor):
    array = np.zeros((9, 12, 5), np.int16) - 1000
    array[0, 0] = 100
    rows = []
    for index, sex in enumerate(("F", "M", "")):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([-3.0, -2, 4, 1])), tmp_path / f"{index}.nii.gz")
        rows.append({"file_name": f"{index}.nii.gz", "sex": sex, "split": "test", **dict.fromkeys(CT_CLIP_LABELS, 0)})
    pd.DataFrame(rows).to_csv(tmp_path / "metadata.csv", index=False)
    source = open_source(str(tmp_path), "valid", model.config)
    (batch,) = StudyLoader(source, processor, CT_CLIP_LABELS, batch_size=3, with_text=False)
    assert batch["about"] == [{"sex": "F"}, {"sex": "M"}, {}]


@pytest.mark.parametrize("version", [1, 2])
def test_ct_rates_metadata(tmp_path, version):
    folder = write_files(tmp_path / "ct_rate", ct_rate_files())
    source = open_source(str(folder), "valid", MedCTConfig(), version=version)
    for row in source.stream():
        assert row["about"] == {"manufacturer": "Nobody", "slice thickness": "over 2 mm"}
    (path,) = folder.rglob("validation_metadata.csv")
    table = pd.read_csv(path).assign(PatientSex="F", PatientAge="062Y", Manufacturer="X", PatientName="DOE")
    table.to_csv(path, index=False)
    row = next(iter(open_source(str(folder), "valid", MedCTConfig(), version=version).stream()))
    assert row["about"] == {"sex": "F", "age": "60-79", "manufacturer": "X", "slice thickness": "over 2 mm"}


def test_rows_that_differ_in_them_alone_are_one_study(tmp_path):
    row = {"file_name": "0.nii.gz", "split": "test", **dict.fromkeys(CT_CLIP_LABELS, 0)}
    (tmp_path / "0.nii.gz").touch()
    pd.DataFrame([row | {"kernel": "B30f"}, row | {"kernel": "I50f"}]).to_csv(tmp_path / "metadata.csv", index=False)
    (study,) = open_source(str(tmp_path), "valid", MedCTConfig()).stream()
    assert study["about"] == {"kernel": "B30f"}


def test_a_label_may_have_the_name_of_a_subgroup(tmp_path):
    labels = ["contrast", "sex"]
    config = MedCTConfig(id2label=dict(enumerate(labels)))
    (tmp_path / "0.nii.gz").touch()
    row = {"file_name": "0.nii.gz", "split": "test", "contrast": 1, "sex": 0, "age": 50}
    pd.DataFrame([row]).to_csv(tmp_path / "metadata.csv", index=False)
    (study,) = open_source(str(tmp_path), "valid", config).stream()
    assert study["labels"] == [1, 0] and study["about"]["age"] == "40-59"
