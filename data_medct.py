"""Streamed sources of studies, and batches made of them.

Every source yields rows in CT-RATE's columns: `VolumeName`, report columns, one column a label (0 or 1), and `volume`:
the path of a file, or an array with `affine`. Nothing is read or drawn before it is asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import IterableDataset

from .configuration_medct import MedCTConfig
from .phantoms import make_phantom
from .processing_medct import MedCTProcessor

REPORT_COLUMNS = ("Findings_EN", "Impressions_EN")
# CT-RATE calls the same split "valid" in some file names and "validation" in others.
_SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation")}


class DataError(ValueError):
    """A source that does not hold what it should; the message says what and what to do."""


@dataclass(frozen=True)
class Source:
    """A stream of studies, and how many it holds."""

    stream: IterableDataset
    num_rows: int


def phantom_source(site: str, patients: Sequence[int], seed: int) -> Source:
    """Synthetic studies, drawn as they are asked for.

    Args:
        site: Which synthetic hospital, see `phantoms.SITES`.
        patients: Their numbers; streams of disjoint numbers share no patient.
        seed: Of the whole cohort.
    """
    # A list in `gen_kwargs` is what `datasets` divides among processes and workers.
    stream = IterableDataset.from_generator(
        _draw_phantoms, gen_kwargs={"patients": list(patients), "site": site, "seed": seed}
    )
    return Source(stream, len(patients))


def _draw_phantoms(patients: list[int], site: str, seed: int) -> Iterator[dict[str, Any]]:
    for patient in patients:
        yield make_phantom(patient, site, seed)


def ct_rate_source(root: str | Path, split: str, config: MedCTConfig) -> Source:
    """A local folder in CT-RATE's layout.

    Args:
        root: Folder with csv files that have a `VolumeName` column, at its top or up to two folders down: reports, and
            labels. Volumes lie where CT-RATE has them (`train_fixed/train_1/train_1_a/train_1_a_1.nii.gz`) or at the
            top.
        split: "train" or "valid".
        config: Whose label names the label csv has.

    Raises:
        DataError: If the folder, a csv file or a column is missing, or no study has report and labels.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. Pass a folder in CT-RATE's layout, or `phantoms`.")
    reports = _read_table(root, split, REPORT_COLUMNS)
    labels = _read_table(root, split, config.label_names)
    studies = labels.merge(reports, on="VolumeName", validate="one_to_one")
    if studies.empty:
        raise DataError(f"{root}: no VolumeName of the {split} split has both a report and labels.")
    rows = studies.astype(dict.fromkeys(REPORT_COLUMNS, object)).fillna("").to_dict("records")
    for row in rows:
        row["volume"] = str(volume_path(root, split, row["VolumeName"]))
    stream = IterableDataset.from_generator(_read_rows, gen_kwargs={"rows": rows})
    return Source(stream, len(rows))


def _read_rows(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from rows


def _read_table(root: Path, split: str, columns: Sequence[str]) -> pd.DataFrame:
    """`VolumeName` and the given columns of the first csv file of a split that has them all."""
    wanted = ["VolumeName", *columns]
    for path in sorted(path for depth in ("*.csv", "*/*.csv", "*/*/*.csv") for path in root.glob(depth)):
        if path.name.split("_")[0] in _SPLIT_NAMES[split] and set(wanted) <= set(pd.read_csv(path, nrows=0).columns):
            return pd.read_csv(path, usecols=wanted)[wanted]
    raise DataError(
        f"{root}: no csv file named {' or '.join(f'{name}_*.csv' for name in _SPLIT_NAMES[split])} has the columns "
        f"{', '.join(wanted[:4])}{' ...' if len(wanted) > 4 else ''}."
    )


def volume_path(root: Path, split: str, volume_name: str) -> Path:
    """Where a volume lies, from its name (`split_patient_scan_recon.nii.gz`); at the top of the folder otherwise."""
    scan = volume_name.removesuffix(".gz").removesuffix(".nii").rpartition("_")[0]
    patient = scan.rpartition("_")[0]
    for base in (root, root / "dataset"):
        path = base / f"{split}_fixed" / patient / scan / volume_name
        if path.exists():
            return path
    return root / volume_name


class Collator:
    """Rows of a source to a batch of the model's inputs; pickles, so that loader processes can use it.

    Args:
        processor: The model's.
        label_names: Columns that become `labels`.
        with_text: Whether reports are wanted; scores need none.
    """

    def __init__(self, processor: MedCTProcessor, label_names: Sequence[str], with_text: bool):
        self.processor = processor
        self.label_names = list(label_names)
        self.with_text = with_text

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `pixel_values` `(batch, 1, z, y, x)`, `labels` `(batch, labels)`, `input_ids`, `attention_mask`."""
        batch = self.processor.image_processor(
            [row["volume"] for row in rows], affine=[row.get("affine") for row in rows], return_tensors="pt"
        )
        batch["labels"] = torch.tensor([[float(row[name]) for name in self.label_names] for row in rows])
        if self.with_text:
            reports = [" ".join(row[column] for column in REPORT_COLUMNS) for row in rows]
            batch.update(self.processor(text=reports, return_tensors="pt"))
        return dict(batch)
