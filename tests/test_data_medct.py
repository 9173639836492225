"""Sources stream rows in CT-RATE's columns, and rows become batches."""

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import IterableDataset

from medct import CT_CLIP_LABELS, MedCTConfig
from medct.data_medct import Collator, DataError, ct_rate_source, phantom_source, volume_path


def write_scan(path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.full((6, 6, 6), value, np.int16), np.diag([-2.0, -2, 3, 1])), path)


def write_tables(root, split: str, volumes: list[str], report_split: str | None = None) -> None:
    labels = {name: [index % 2 for index in range(len(volumes))] for name in CT_CLIP_LABELS}
    for folder in ("multi_abnormality_labels", "radiology_text_reports"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame({"VolumeName": volumes, **labels})
    table.to_csv(root / f"multi_abnormality_labels/{split}_predicted_labels.csv", index=False)
    reports = pd.DataFrame({"VolumeName": volumes, "Findings_EN": "Clear.", "Impressions_EN": [None] * len(volumes)})
    reports.to_csv(root / f"radiology_text_reports/{report_split or split}_reports.csv", index=False)


@pytest.fixture
def ct_rate(tmp_path):
    """A local copy of CT-RATE in small: `train` in CT-RATE's tree, `valid` flat."""
    trained = ["train_1_a_1.nii.gz", "train_2_a_1.nii.gz"]
    held_out = ["valid_1_a_1.nii.gz"]
    write_tables(tmp_path / "dataset", "train", trained)
    write_tables(tmp_path / "dataset", "valid", held_out, report_split="validation")
    for index, name in enumerate(trained):
        scan = name.removesuffix("_1.nii.gz")
        write_scan(tmp_path / f"dataset/train_fixed/{scan.removesuffix('_a')}/{scan}/{name}", 100 * index)
    write_scan(tmp_path / held_out[0], 300)
    return tmp_path


def test_phantoms_stream_without_being_drawn_first():
    source = phantom_source("B", range(10**5), seed=0)
    assert isinstance(source.stream, IterableDataset)
    assert source.num_rows == 10**5
    assert next(iter(source.stream))["VolumeName"] == "phantom_b_0_a_1.nii.gz"


def test_shuffling_and_splitting_lose_and_double_nobody():
    source = phantom_source("A", range(8), seed=0)
    names = {row["VolumeName"] for row in source.stream}
    shuffled = source.stream.shuffle(seed=1, buffer_size=1)
    assert [row["VolumeName"] for row in shuffled] != sorted(names)
    parts = [shuffled.shard(num_shards=2, index=index) for index in range(2)]
    assert sorted(row["VolumeName"] for part in parts for row in part) == sorted(names)


def test_ct_rate_folder_joins_its_tables(ct_rate):
    config = MedCTConfig()
    train = ct_rate_source(ct_rate, "train", config)
    assert train.num_rows == 2
    rows = list(train.stream)
    assert [row["Lung nodule"] for row in rows] == [0, 1]
    assert rows[0]["Findings_EN"] == "Clear."
    assert rows[0]["Impressions_EN"] == ""
    assert rows[1]["volume"].endswith("train_fixed/train_2/train_2_a/train_2_a_1.nii.gz")
    (row,) = ct_rate_source(ct_rate, "valid", config).stream
    assert row["volume"] == str(ct_rate / "valid_1_a_1.nii.gz")


def test_volume_path_without_a_file_names_the_top(tmp_path):
    assert volume_path(tmp_path, "train", "train_9_b_2.nii.gz") == tmp_path / "train_9_b_2.nii.gz"


def test_other_folders_are_refused(ct_rate, tmp_path):
    config = MedCTConfig()
    with pytest.raises(DataError, match="no such folder"):
        ct_rate_source(tmp_path / "nowhere", "train", config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"named valid_\*.csv or validation_\*.csv has the columns VolumeName"):
        ct_rate_source(tmp_path / "empty", "valid", config)
    reports = ct_rate / "dataset/radiology_text_reports/train_reports.csv"
    reports.write_text("VolumeName,Findings_EN,Impressions_EN\ntrain_7_a_1.nii.gz,Clear.,Normal.\n")
    with pytest.raises(DataError, match="no VolumeName of the train split has both"):
        ct_rate_source(ct_rate, "train", config)


def test_rows_become_a_batch(ct_rate, processor):
    rows = list(ct_rate_source(ct_rate, "train", MedCTConfig()).stream)
    batch = Collator(processor, CT_CLIP_LABELS, with_text=True)(rows)
    assert batch["pixel_values"].shape == (2, 1, 8, 12, 8)
    assert batch["labels"].tolist() == [[0.0] * 18, [1.0] * 18]
    assert batch["input_ids"].shape[0] == 2
    centre = batch["pixel_values"][:, 0, 4, 6, 4]
    torch.testing.assert_close(centre, torch.tensor([0.0, 0.1]))
    without = Collator(processor, ["Lung nodule"], with_text=False)(rows)
    assert set(without) == {"pixel_values", "labels"}
    assert without["labels"].shape == (2, 1)


def test_phantoms_become_a_batch(processor):
    rows = list(phantom_source("B", range(2), seed=0).stream)
    batch = Collator(processor, CT_CLIP_LABELS, with_text=True)(rows)
    assert batch["pixel_values"].shape == (2, 1, 8, 12, 8)
    assert batch["labels"].shape == (2, 18)
