"""A miniature CT-RATE, from disk and over HTTP: each known fault is handled as the module's docstring says."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from ct_rate_like import BROKEN, NO_CHEST, OUTSIDE_HU, UNUSABLE, ct_rate_files, hu_of, volume_path, volumes, write_files

from medct import CT_CLIP_LABELS, MedCTConfig, MedCTImageProcessor
from medct.data import DataError, StudyLoader, open_source, read_study

CONFIG = MedCTConfig()


@pytest.fixture(scope="module")
def files():
    return ct_rate_files()


@pytest.fixture
def ct_rate(tmp_path, files):
    return write_files(tmp_path / "ct_rate", files)


def rows_by_name(source):
    return {row["id"].removesuffix(".nii.gz"): row for row in source.stream()}


def reasons(source):
    return {study.id.removesuffix(".nii.gz"): study.reason for study in source.skipped}


def test_every_usable_volume_is_streamed_once(ct_rate):
    source = open_source(str(ct_rate), "train", CONFIG, reconstructions="all", tune_share=0)
    rows = rows_by_name(source)
    assert set(rows) == set(volumes("train")) - UNUSABLE
    assert source.num_studies == len(rows) == 12
    assert source.description == f"12 train studies of CT-RATE ({ct_rate}, version 2)"
    row = rows["train_1_a_2"]
    assert row["volume"] == str(ct_rate / volume_path("train_1_a_2", 2))
    assert row["patient"] == "train_1"
    assert row["report"] == "Findings of train_1_a. Impression of train_1_a."
    assert row["labels"] == [(1 + index) % 2 for index in range(18)]


def test_valid_is_also_called_validation(ct_rate):
    source = open_source(str(ct_rate), "valid", CONFIG)
    assert sorted(rows_by_name(source)) == ["valid_1_a_1", "valid_2_a_1", "valid_3_a_1"]
    for path in (ct_rate / "dataset").rglob("*valid*.*"):
        if path.suffix in (".csv", ".txt"):  # the other spelling everywhere
            name = (
                path.name.replace("validation_", "valid_")
                if "validation" in path.name
                else path.name.replace("valid_", "validation_")
            )
            path.rename(path.with_name(name))
    assert sorted(rows_by_name(open_source(str(ct_rate), "valid", CONFIG))) == [
        "valid_1_a_1",
        "valid_2_a_1",
        "valid_3_a_1",
    ]


def test_volumes_without_a_chest_are_left_out_by_file_name(ct_rate):
    for split in ("train", "valid"):
        found = reasons(open_source(str(ct_rate), split, CONFIG, tune_share=0))
        assert [found[name] for name in NO_CHEST[split]] == ["no chest in it, by CT-RATE's list"]


def test_one_reconstruction_per_scan_and_epoch_in_turn(ct_rate):
    source = open_source(str(ct_rate), "train", CONFIG, tune_share=0)
    assert source.num_studies == 10
    epochs = [[row["id"] for row in source.stream(epoch, seed=5)] for epoch in range(3)]
    for names in epochs:
        scans = [name.rpartition("_")[0] for name in names]
        assert len(scans) == len(set(scans)) == 10
    taken = [{name for name in names if name.startswith("train_1_a")} for names in epochs]
    assert taken[0] != taken[1] and taken[0] == taken[2]
    assert epochs[0] != epochs[2]  # the order
    assert epochs[1] == [row["id"] for row in source.stream(1, seed=5)]
    assert {row["id"] for row in source.stream(1)} >= {"train_1_a_1.nii.gz", "train_10_a_1.nii.gz"}


def test_reports_that_say_nothing_are_empty(ct_rate):
    rows = rows_by_name(open_source(str(ct_rate), "train", CONFIG, tune_share=0))
    assert rows["train_3_a_1"]["report"] == ""
    assert rows["train_4_a_1"]["report"] == "Impression of train_4_a."
    assert rows["train_8_a_1"]["report"] == ""  # no row at all
    source = open_source(str(ct_rate), "train", CONFIG, tune_share=0, need_reports=True)
    assert {"train_3_a_1", "train_8_a_1"}.isdisjoint(rows_by_name(source))
    assert reasons(source)["train_3_a_1"] == reasons(source)["train_8_a_1"] == "no report"


def test_labels_without_reports_and_reports_without_labels(ct_rate):
    source = open_source(str(ct_rate), "train", CONFIG, tune_share=0)
    assert "train_8_a_1" in rows_by_name(source)
    assert reasons(source)["train_9_a_1"] == "a report, but no row of labels"
    assert math.isnan(rows_by_name(source)["train_12_a_1"]["labels"][0])


def test_a_study_without_spacing_is_left_out(ct_rate):
    assert reasons(open_source(str(ct_rate), "train", CONFIG, tune_share=0))["train_5_a_1"] == (
        "no spacing in its metadata"
    )


@pytest.mark.parametrize("version", [1, 2])
def test_values_are_hu_in_both_versions(ct_rate, version):
    rows = rows_by_name(open_source(str(ct_rate), "train", CONFIG, tune_share=0, version=version))
    for name in ("train_7_a_1", "train_11_a_1"):
        assert volume_path(name, version) in rows[name]["volume"]
        volume = read_study(rows[name], "SLP")
        np.testing.assert_array_equal(volume.array, hu_of(name))
        np.testing.assert_allclose(volume.affine, np.diag([-2.0, -2.0, 3.0, 1.0]))
    assert read_study(rows["train_7_a_1"], "SLP").array.min() == OUTSIDE_HU


def test_what_lies_outside_the_field_of_view_is_clipped(ct_rate):
    row = rows_by_name(open_source(str(ct_rate), "train", CONFIG, tune_share=0))["train_7_a_1"]
    processor = MedCTImageProcessor(image_size=(5, 6, 8), target_spacing_mm=(3, 2, 2))
    pixel_values = processor.process_volume(read_study(row, "SLP"))
    assert pixel_values[:, 0, 0].tolist() == [-1.0] * 5
    assert pixel_values[:, 1, 1].tolist() == pytest.approx([0.001] * 5)


def test_unreadable_volumes_are_counted_while_streaming(ct_rate, processor, tmp_path):
    source = open_source(str(ct_rate), "train", CONFIG, tune_share=0)
    listed = tmp_path / "bad.jsonl"
    loader = StudyLoader(source, processor, CT_CLIP_LABELS, batch_size=4, with_text=True, bad_samples_file=listed)
    names = [name for batch in loader for name in batch["ids"]]
    assert len(names) == 9
    assert not {f"{name}.nii.gz" for name in BROKEN} & set(names)
    assert (loader.num_bad, loader.num_seen) == (1, 10)
    assert "train_6_a_1" in listed.read_text(encoding="utf-8")


def test_tune_is_part_of_the_train_patients(ct_rate):
    splits = {
        split: rows_by_name(open_source(str(ct_rate), split, CONFIG, reconstructions="all", tune_share=0.3))
        for split in ("train", "tune")
    }
    patients = {split: {row["patient"] for row in rows.values()} for split, rows in splits.items()}
    assert not patients["train"] & patients["tune"]
    assert set(splits["train"]) | set(splits["tune"]) == set(volumes("train")) - UNUSABLE
    assert patients["tune"] == {
        row["patient"] for row in open_source(str(ct_rate), "tune", CONFIG, tune_share=0.3).stream()
    }


def test_a_limit_takes_the_same_studies_and_a_larger_one_adds_to_them(ct_rate):
    def names(limit):
        return {row["id"] for row in open_source(str(ct_rate), "train", CONFIG, tune_share=0, limit=limit).stream()}

    assert len(names(4)) == 4
    assert names(4) < names(7)
    assert len(names(100)) == 10


def test_flat_folder_of_tables_and_volumes(tmp_path, files):
    flat = {path.rsplit("/", 1)[-1]: content for path, content in files.items() if "/train/" not in path}
    source = open_source(str(write_files(tmp_path, flat)), "train", CONFIG, tune_share=0)
    rows = rows_by_name(source)
    assert rows["train_11_a_1"]["volume"] == str(tmp_path / "train_11_a_1.nii.gz")
    assert set(reasons(source)) == UNUSABLE


def test_a_partial_copy_leaves_out_what_is_not_there(ct_rate):
    (ct_rate / volume_path("train_11_a_1", 2)).unlink()
    source = open_source(str(ct_rate), "train", CONFIG, tune_share=0)
    assert reasons(source)["train_11_a_1"] == "no such file"
    assert "train_11_a_1" not in rows_by_name(source)


def test_rows_that_contradict_each_other_are_refused(ct_rate):
    labels = ct_rate / "dataset/multi_abnormality_labels/train_predicted_labels.csv"
    lines = labels.read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith("train_4_a_1"))
    labels.write_text("\n".join([*lines, row[:-1] + str(1 - int(row[-1]))]), encoding="utf-8")
    with pytest.raises(DataError, match=r"1 values of 'VolumeName' have several rows .* 'train_4_a_1.nii.gz'"):
        open_source(str(ct_rate), "train", CONFIG)


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("multi_abnormality_labels/train_predicted_labels.csv", "Emphysema"),
        ("radiology_text_reports/train_reports.csv", "Impressions_EN"),
        ("metadata/train_metadata.csv", "ZSpacing"),
    ],
)
def test_a_missing_column_is_named(ct_rate, table, column):
    path = ct_rate / "dataset" / table
    path.write_text(path.read_text(encoding="utf-8").replace(column, "Other", 1), encoding="utf-8")
    with pytest.raises(DataError, match=f"{path.name}: has no column '{column}'"):
        open_source(str(ct_rate), "train", CONFIG)


def test_a_missing_table_is_named(ct_rate):
    (ct_rate / "dataset/metadata/train_metadata.csv").unlink()
    open_source(str(ct_rate), "train", CONFIG)  # version 2 does without
    with pytest.raises(DataError, match=r"with the columns VolumeName, RescaleSlope.* dataset/metadata/train_metadata"):
        open_source(str(ct_rate), "train", CONFIG, version=1)
    (ct_rate / "dataset/radiology_text_reports/train_reports.csv").unlink()
    with pytest.raises(DataError, match=r"dataset/radiology_text_reports/train_reports\.csv"):
        open_source(str(ct_rate), "train", CONFIG)


def test_damaged_tables_are_refused_in_one_sentence(ct_rate):
    labels = ct_rate / "dataset/multi_abnormality_labels/train_predicted_labels.csv"
    labels.write_text(labels.read_text(encoding="utf-8").replace(",1,", ",maybe,", 1), encoding="utf-8")
    with pytest.raises(DataError, match="the label 'Arterial wall calcification' is 'maybe' somewhere"):
        open_source(str(ct_rate), "train", CONFIG)
    labels.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a readable csv file"):
        open_source(str(ct_rate), "train", CONFIG)


def test_version_1_needs_a_complete_row_of_metadata(ct_rate):
    path = ct_rate / "dataset/metadata/train_metadata.csv"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("train_11_a_1")]
    path.write_text(
        "\n".join(line.replace("-1024.0", "") if "train_4_a" in line else line for line in lines), encoding="utf-8"
    )
    found = reasons(open_source(str(ct_rate), "train", CONFIG, tune_share=0, version=1))
    assert found["train_11_a_1"] == "no row of metadata, which version 1 needs"
    assert found["train_4_a_1"] == "no rescale slope or intercept in its metadata"
    assert "train_11_a_1" not in reasons(open_source(str(ct_rate), "train", CONFIG, tune_share=0))


@pytest.mark.parametrize("patient", ["train_1", "case_1"])
def test_a_patient_in_both_splits_is_refused(ct_rate, patient):
    """In CT-RATE itself, the names of patients state the split."""
    for split, tables in (("train", "train_*.csv"), ("valid", "valid*.csv")):
        for path in (ct_rate / "dataset").rglob(tables):
            path.write_text(path.read_text(encoding="utf-8").replace(f"{split}_1_", f"{patient}_"), encoding="utf-8")
    with pytest.raises(DataError, match=r"1 patients are in both the train and the valid split, so scores would be"):
        open_source(str(ct_rate), "valid", CONFIG)
    if patient == "case_1":
        with pytest.raises(DataError, match="1 patients are in both"):
            open_source(str(ct_rate), "train", CONFIG)


def test_other_names_of_patients_are_accepted(ct_rate):
    for path in (ct_rate / "dataset").rglob("train_*.csv"):
        path.write_text(path.read_text(encoding="utf-8").replace("train_11_", "case_11_"), encoding="utf-8")
    (ct_rate / "dataset/train_fixed/train_11").rename(ct_rate / "dataset/train_fixed/case_11")
    source = open_source(str(ct_rate), "train", CONFIG, tune_share=0)
    assert reasons(source)["case_11_a_1"] == "no such file"  # its folder and file have the old name
    assert source.num_studies == 9


def test_settings_out_of_range(ct_rate):
    for setting, message in (
        ({"version": 3}, "versions 1 and 2"),
        ({"tune_share": 1.0}, "tune_share"),
        ({"limit": 0}, "limit"),
        ({"reconstructions": "some"}, "reconstructions"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(str(ct_rate), "train", CONFIG, **setting)
    with pytest.raises(DataError, match="no split 'test'"):
        open_source(str(ct_rate), "test", CONFIG)
    with pytest.raises(DataError, match="no such folder"):
        open_source(str(ct_rate / "nowhere"), "train", CONFIG)


def test_no_scan_of_a_patient_stands_in_another_split(tmp_path):
    """Of forty patients with three scans each, some would be torn apart if scans were dealt out."""
    names = [f"train_{patient}_{scan}_1.nii.gz" for patient in range(40) for scan in "abc"]
    labels = pd.DataFrame({"VolumeName": names} | dict.fromkeys(CT_CLIP_LABELS, "0"))
    reports = pd.DataFrame({"VolumeName": names, "Findings_EN": "Clear.", "Impressions_EN": "Nothing."})
    files = {f"dataset/train_fixed/{name}": b"" for name in names}
    files["dataset/multi_abnormality_labels/train_predicted_labels.csv"] = labels.to_csv(index=False).encode()
    files["dataset/radiology_text_reports/train_reports.csv"] = reports.to_csv(index=False).encode()
    files = {
        path if "train_fixed" not in path else volume_path(path.rsplit("/", 1)[1].removesuffix(".nii.gz"), 2): content
        for path, content in files.items()
    }
    write_files(tmp_path, files)
    patients = {
        split: [row["patient"] for row in open_source(str(tmp_path), split, CONFIG, tune_share=0.4).stream()]
        for split in ("train", "tune")
    }
    assert len(patients["train"]) + len(patients["tune"]) == 120
    assert not set(patients["train"]) & set(patients["tune"])
    assert all(count == 3 for split in patients.values() for count in Counter(split).values())


def test_the_spacings_of_version_1_are_those_of_their_axes(ct_rate):
    path = ct_rate / "dataset/metadata/train_metadata.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("[2.0, 2.0]", "[0.5, 0.75]"), encoding="utf-8")
    row = rows_by_name(open_source(str(ct_rate), "train", CONFIG, tune_share=0, version=1))["train_12_a_1"]
    assert read_study(row, "SLP").spacing_mm == (0.5, 0.75, 3.0)
