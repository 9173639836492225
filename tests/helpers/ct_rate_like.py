"""A miniature CT-RATE with its known faults: a dictionary from paths to bytes, to be written to disk or served.

| study | what is odd about it |
| --- | --- |
| train_1_a | two reconstructions |
| train_2_a | head and neck: in the no-chest list, under its version 1 path |
| train_3_a | both parts of the report are "Not given." |
| train_4_a | no findings, only an impression |
| train_5_a | no z spacing |
| train_6_a | the volume is truncated |
| train_7_a | -8192 outside the field of view; in version 1 the intercept is -8192 |
| train_8_a | labels, but no report |
| train_9_a | a report, but no labels |
| train_10 | two scans, the first with two reconstructions |
| train_11_a | the same row of labels twice |
| train_12_a | an empty label |
| valid_1_a | two reconstructions |
| valid_2_a | nothing |
| valid_3_a | the volume is truncated |
| valid_4_a | head and neck |
"""

import gzip
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd

from medct import CT_CLIP_LABELS

SHAPE = (6, 8, 5)  # (L, P, S)
SPACING_MM = (2.0, 2.0, 3.0)
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
OUTSIDE_HU = -8192

SCANS = {
    "train": {
        **{f"train_{patient}_a": 1 for patient in range(2, 10)},
        **{"train_1_a": 2, "train_10_a": 2, "train_10_b": 1, "train_11_a": 1, "train_12_a": 1},
    },
    "valid": {"valid_1_a": 2, "valid_2_a": 1, "valid_3_a": 1, "valid_4_a": 1},
}
NO_CHEST = {"train": ["train_2_a_1"], "valid": ["valid_4_a_1"]}
BROKEN = ["train_6_a_1", "valid_3_a_1"]
REPORT_SPLIT = {"train": "train", "valid": "validation"}
UNUSABLE = {"train_2_a_1", "train_5_a_1", "train_9_a_1"}
"""Left out of the train split before any volume is read."""


def volumes(split: str) -> list[str]:
    """Names without suffix."""
    return [f"{scan}_{number + 1}" for scan, count in SCANS[split].items() for number in range(count)]


def hu_of(name: str) -> np.ndarray:
    """What a volume shows: a constant of its own and, in one of them, nothing outside the field of view."""
    split, patient, scan, number = name.split("_")
    level = 100 * int(patient) + 10 * (scan == "b") + int(number) - (700 if split == "train" else 300)
    array = np.full(SHAPE, level, np.int16)
    array[0, 0] = OUTSIDE_HU if name.startswith("train_7_") else -1000  # some air, as in every scan
    return array


def intercept(name: str) -> int:
    return -8192 if name.startswith("train_7_") else -1024


def nifti_bytes(array: np.ndarray, affine: np.ndarray | None) -> bytes:
    return gzip.compress(nibabel.Nifti1Image(array, affine).to_bytes(), 1)


def volume_path(name: str, version: int) -> str:
    split, patient, scan, _ = name.split("_")
    tree = f"{split}_fixed" if version == 2 else split
    return f"dataset/{tree}/{split}_{patient}/{split}_{patient}_{scan}/{name}.nii.gz"


def volume_files(split: str) -> dict[str, bytes]:
    """Both versions of all volumes."""
    files = {}
    for name in volumes(split):
        hu = hu_of(name)
        files[volume_path(name, 2)] = nifti_bytes(hu, AFFINE)
        # version 1: stored values, and a header that says nothing
        files[volume_path(name, 1)] = nifti_bytes((hu - intercept(name)).astype(np.int16), None)
        if name in BROKEN:
            for version in (1, 2):
                files[volume_path(name, version)] = files[volume_path(name, version)][:60]
    return files


def labels_table(split: str, label_names: Sequence[str] = CT_CLIP_LABELS) -> pd.DataFrame:
    names = [name for name in volumes(split) if not name.startswith("train_9_")]
    rows = [
        {"VolumeName": f"{name}.nii.gz"}
        | {label: str((int(name.split("_")[1]) + index) % 2) for index, label in enumerate(label_names)}
        for name in names
    ]
    table = pd.DataFrame(rows)
    table.loc[table["VolumeName"] == "train_12_a_1.nii.gz", label_names[0]] = ""
    return pd.concat([table, table[table["VolumeName"] == "train_11_a_1.nii.gz"]])


def reports_table(split: str) -> pd.DataFrame:
    rows = []
    for name in volumes(split):
        scan = name.rpartition("_")[0]
        texts = {"Findings_EN": f"Findings of {scan}.", "Impressions_EN": f"Impression of {scan}."}
        if scan == "train_3_a":
            texts = dict.fromkeys(texts, "Not given.")
        if scan == "train_4_a":
            texts["Findings_EN"] = ""
        if scan != "train_8_a":
            rows.append({"VolumeName": f"{name}.nii.gz", "ClinicalInformation_EN": "Cough, fever.", **texts})
    return pd.DataFrame(rows)


def metadata_table(split: str) -> pd.DataFrame:
    x, y, z = SPACING_MM
    return pd.DataFrame(
        {
            "VolumeName": f"{name}.nii.gz",
            "Manufacturer": "Nobody",
            "RescaleSlope": 1.0,
            "RescaleIntercept": float(intercept(name)),
            "XYSpacing": f"[{x}, {y}]",
            "ZSpacing": "" if name.startswith("train_5_") else z,
        }
        for name in volumes(split)
    )


def ct_rate_files(label_names: Sequence[str] = CT_CLIP_LABELS) -> dict[str, bytes]:
    """All files by their paths in the repository."""
    files: dict[str, bytes] = {}
    for split, report_split in REPORT_SPLIT.items():
        tables = {
            f"multi_abnormality_labels/{split}_predicted_labels.csv": labels_table(split, label_names),
            f"radiology_text_reports/{report_split}_reports.csv": reports_table(split),
            f"metadata/{report_split}_metadata.csv": metadata_table(split),
        }
        files |= {f"dataset/{path}": table.to_csv(index=False).encode() for path, table in tables.items()}
        paths = [volume_path(name, 1) for name in NO_CHEST[split]]
        files[f"dataset/metadata/no_chest_{split}.txt"] = "\n".join(paths).encode()
        files |= volume_files(split)
    return files


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root
