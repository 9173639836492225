"""A miniature RAD-ChestCT with what is odd about it: a dictionary from paths to bytes, to be written to disk or served.

| scan | what is odd about it |
| --- | --- |
| trn00001, trn00002 | two scans of one patient |
| trn00003 | its last slices are a constant 8 HU, as the resampler left them |
| trn00004 | no file |
| trn00005 | no row in the metadata |
| trn00006 | `nodulegr1cm` alone, without `nodule` |
| tst00001 to tst00006 | see `TEST_LABELS` |

Rows of the tables run backwards. The metadata hold a slope and an intercept that must not be used, and many scans that
were never published.
"""

import csv
import io

import numpy as np

_NAMES = """
air_trapping airspace_disease atelectasis atherosclerosis breast_implant bronchial_wall_thickening bronchiectasis
bronchiolectasis cabg calcification cardiomegaly catheter_or_port chest_tube clip consolidation coronary_artery_disease
emphysema fibrosis gi_tube groundglass hardware heart_valve_replacement hernia honeycombing infiltrate
interstitial_lung_disease lymphadenopathy nodule nodulegr1cm opacity pacemaker_or_defib pericardial_effusion
pleural_effusion reticulation scarring septal_thickening staple stent sternotomy suture tracheal_tube
"""
ABNORMALITIES = _NAMES.split()
LOCATIONS = ("left_lung", "right_lung", "heart", "other_location")
SHAPE = (10, 12, 14)  # (inferior, posterior, left)
SCANS = {
    "train": [f"trn{number:05d}" for number in range(1, 7)],
    "valid": ["val00001", "val00002"],
    "test": [f"tst{number:05d}" for number in range(1, 7)],
}
PATIENTS = {"trn00001": "p1", "trn00002": "p1", "tst00001": "p20", "tst00002": "p20"}
"""Patients of more than one scan; each of the others is one of its own."""
PRESENT = {
    "trn00001": {"nodule*left_lung"},
    "trn00002": {"calcification*heart", "hardware*other_location"},
    "trn00003": {"emphysema*right_lung", "calcification*left_lung"},
    "trn00004": {"nodule*right_lung"},
    "trn00005": {"nodule*right_lung"},
    "trn00006": {"nodulegr1cm*left_lung"},
    "val00001": {"cardiomegaly*heart"},
    "val00002": {"hernia*other_location"},
    "tst00001": {"calcification*heart", "cardiomegaly*heart"},
    "tst00002": {"calcification*left_lung", "nodule*left_lung", "nodule*right_lung"},
    "tst00003": {"calcification*other_location"},
    "tst00004": {"nodulegr1cm*right_lung", "cardiomegaly*heart"},
    "tst00005": {"stent*heart", "clip*other_location"},
    "tst00006": {"air_trapping*left_lung", "nodule*left_lung"},
}


def hu_of(name: str) -> np.ndarray:
    """What a scan shows: air, a level of its own, and bone in the corner that is superior, anterior and right."""
    array = np.full(SHAPE, -1000, np.int16)
    array[2:8, 2:10, 2:12] = 10 * int(name[3:]) + 100 * ["trn", "val", "tst"].index(name[:3])
    array[:2, :3, :4] = 1000
    if name == "trn00003":
        array[-3:] = 8
    return array


def npz_bytes(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=True, **arrays)
    return buffer.getvalue()


def labels_csv(split: str) -> bytes:
    columns = [f"{abnormality}*{location}" for abnormality in ABNORMALITIES for location in LOCATIONS]
    rows = [[name, *(str(int(column in PRESENT[name])) for column in columns)] for name in reversed(SCANS[split])]
    return _csv([["NoteAcc_DEID", *columns], *rows])


def patient_of(name: str) -> str:
    return PATIENTS.get(name, f"patient of {name}")


def metadata_csv() -> bytes:
    names = [name for names in SCANS.values() for name in names if name != "trn00005"]
    rows = [[f"{name}.npz", patient_of(name), "2.0", "-1024", "1,0,0,0,1,0", "[0.6, 0.6]"] for name in reversed(names)]
    others = [[f"trn{number:05d}.npz", f"other {number}", "1", "-1024", "1,0,0,0,1,0", ""] for number in range(90, 99)]
    header = ["VolumeAcc_DEID", "MRN_DEID", "orig_slope", "orig_inter", "orig_orientation", "orig_zdiff_set"]
    return _csv([header, *others, *rows])


def _csv(rows: list[list[str]]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue().encode()


def rad_chestct_files() -> dict[str, bytes]:
    """All files by their paths."""
    files = {f"img{split}_Abnormality_and_Location_Labels.csv": labels_csv(split) for split in SCANS}
    files["CT_Scan_Metadata_Complete_35747.csv"] = metadata_csv()
    names = [name for names in SCANS.values() for name in names if name != "trn00004"]
    return files | {f"{name}.npz": npz_bytes(ct=hu_of(name)) for name in names}
