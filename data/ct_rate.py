"""CT-RATE as it is: on the Hub or as a local copy, version 1 or 2, with its known faults.

| fault | what is done |
| --- | --- |
| "valid" in some names, "validation" in others | both are tried |
| scans of head and neck, listed under version 1 paths | left out, by file name |
| two reconstructions of most scans share one report | one per epoch, in turn; `reconstructions="all"` gives all |
| "Not given." and empty findings or impressions | removed; a report with neither is "", as is a missing one |
| a study without a row of labels | left out: it can be neither scored nor learned from |
| no spacing in the metadata | left out |
| version 1: stored values, blank headers | slope, intercept and spacing come from the metadata |
| -8192 outside the field of view | clipped by the processor |
| a patient in both splits, possible only with names other than CT-RATE's | refused |
| a volume that cannot be read | skipped and counted by `StudyLoader` |

All paths are derived from `VolumeName`; the repository, with its 50,000 files, is never listed. A local folder may also
hold csv files and volumes side by side.

Source: the dataset's page and its issues.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medct.data.folders import Folder, LocalFolder
from medct.data.sources import DataError, NoSuchSplitError, Source
from medct.data.subgroups import COLUMNS as SUBGROUPS
from medct.data.subgroups import PREFIX, subgroup_columns
from medct.data.table_files import columns_of, read_table
from medct.data.tables import (
    MAPPING_HINT,
    SPACINGS_MM,
    Selection,
    Sieve,
    belongs,
    check_labels,
    join_text,
    merge_doubles,
    table_source,
    to_numbers,
)

NAME = "VolumeName"
REPORT_COLUMNS = ("Findings_EN", "Impressions_EN")
METADATA_COLUMNS = ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
_SPELLINGS = {"train": ("train",), "valid": ("valid", "validation")}
_PREFIXES = ("dataset/", "")
_LABELS = "multi_abnormality_labels/{split}_predicted_labels.csv"
_REPORTS = "radiology_text_reports/{split}_reports.csv"
_METADATA = "metadata/{split}_metadata.csv"
_NO_CHEST = "metadata/no_chest_{split}.txt"
# split_patient_scan_reconstruction, such as train_1_a_2.nii.gz
_VOLUME_NAME = re.compile(r"(?P<scan>(?P<patient>[^_]+_[^_]+)_[^_]+)_[^_]+?(\.nii)?(\.gz)?")


@dataclass(frozen=True)
class CTRate:
    """A folder in CT-RATE's layout.

    Args:
        folder: The folder.
        split: "train" or "valid", as CT-RATE divides the data.
        version: 2, whose values are HU, or 1, which needs the metadata.
    """

    folder: Folder
    split: str
    version: int = 2

    def find(self, name: str) -> tuple[str, Path] | None:
        """One of its tables, under either spelling of the split, and the prefix of its path: `dataset/` or nothing."""
        for prefix in _PREFIXES:
            for spelling in _SPELLINGS[self.split]:
                if path := self.folder.file(prefix + name.format(split=spelling)):
                    return prefix, path
        return None

    def table(self, name: str, columns: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame | None:
        """`VolumeName` and columns of one of its tables; in a local folder, of any csv file of the split that has them.

        Args:
            name: The table's path, with `{split}`.
            columns: Columns besides `VolumeName`.
            optional: Columns that it may have.

        Returns:
            Columns of text, one row per volume; `None` if there is no such table.

        Raises:
            DataError: If a column is missing, or rows contradict each other.
        """
        found = self.find(name)
        path = found[1] if found else self._file_with(columns)
        if path is None:
            return None
        shown = str(path) if self.folder.is_local else f"{self.folder}: {path.name}"
        hints = dict.fromkeys(columns, MAPPING_HINT) if name == _LABELS else None
        table = read_table(path, [NAME, *columns], optional, shown, hints)
        return merge_doubles(table, NAME, shown, optional)

    def _file_with(self, columns: Sequence[str]) -> Path | None:
        """The first csv file of the split, at most two folders deep, that has all columns."""
        for path in _shallow(self.folder, "*.csv"):
            if path.name.split("_")[0] in _SPELLINGS[self.split] and {NAME, *columns} <= set(columns_of(path)):
                return path
        return None

    def labels(self, label_names: Sequence[str]) -> pd.DataFrame:
        """The labels of each volume, 0 to 1, NaN if unknown.

        Raises:
            DataError: If there are none, or not the model's.
        """
        table = self.table(_LABELS, label_names)
        if table is None:
            raise self._missing(_LABELS, label_names)
        return check_labels(table, label_names, f"{self.folder}: labels")

    def reports(self) -> pd.DataFrame:
        """One report per volume.

        Raises:
            DataError: If there are none.
        """
        table = self.table(_REPORTS, REPORT_COLUMNS)
        if table is None:
            raise self._missing(_REPORTS, REPORT_COLUMNS)
        parts = zip(*(table[column] for column in REPORT_COLUMNS), strict=True)
        return pd.DataFrame({NAME: table[NAME], "report": [join_text(*part) for part in parts]})

    def metadata(self) -> pd.DataFrame | None:
        """Rescaling, spacing and subgroups of each volume; `None` if version 2 has no such table.

        Raises:
            DataError: If version 1 lacks it.
        """
        others = [column for column in SUBGROUPS if column not in METADATA_COLUMNS]
        table = self.table(_METADATA, METADATA_COLUMNS, others)
        if table is None:
            if self.version == 1:
                raise self._missing(_METADATA, METADATA_COLUMNS)
            return None
        spacing = table["XYSpacing"].str.strip("[] ").str.split(r"[,\s]+", expand=True, regex=True)
        spacing = spacing.reindex(columns=[0, 1]).fillna("")
        table = table.assign(i_mm=spacing[0], j_mm=spacing[1], k_mm=table["ZSpacing"])
        table = table.rename(columns={"RescaleSlope": "rescale_slope", "RescaleIntercept": "rescale_intercept"})
        columns = ["rescale_slope", "rescale_intercept", *SPACINGS_MM]
        groups = subgroup_columns(table)
        return to_numbers(table[[NAME, *columns]], columns, f"{self.folder}: metadata").assign(**groups)

    def no_chest(self) -> set[str]:
        """Names of volumes that show head or neck; CT-RATE lists them by version 1 paths."""
        found = self.find(_NO_CHEST)
        paths = [found[1]] if found else _shallow(self.folder, f"no_chest_{self.split}*.txt")
        lines = [line.strip() for path in paths for line in path.read_text(encoding="utf-8-sig").splitlines()]
        return {line.replace("\\", "/").rsplit("/", 1)[-1] for line in lines if line}

    def volume_paths(self, names: pd.Series) -> list[str | None]:
        """Where each volume lies in the folder; `None` if it is not there."""
        found = self.find(_LABELS)
        prefixes = [found[0]] if found else list(_PREFIXES)
        tree = f"{self.split}_fixed" if self.version == 2 else self.split
        paths: list[str | None] = []
        for name in names:
            match = _VOLUME_NAME.fullmatch(name)
            in_tree = f"{tree}/{match['patient']}/{match['scan']}/{name}" if match else f"{tree}/{name}"
            candidates = [*(prefix + in_tree for prefix in prefixes), name]
            paths.append(next(filter(None, map(self.folder.find_volume, candidates)), None))
        return paths

    def _missing(self, name: str, columns: Sequence[str]) -> DataError:
        wanted = " or ".join(name.format(split=spelling) for spelling in _SPELLINGS[self.split])
        listed = ", ".join([NAME, *columns][:4]) + (" ..." if len(columns) > 3 else "")
        return NoSuchSplitError(
            f"{self.folder}: no csv file of the {self.split} split with the columns {listed}. In CT-RATE's layout it "
            f"is {_PREFIXES[0]}{wanted}."
        )


def _shallow(folder: Folder, pattern: str) -> list[Path]:
    """Files in a local folder, at most two folders deep; a repository is never listed."""
    if not isinstance(folder, LocalFolder):
        return []
    return sorted(path for depth in ("", "*/", "*/*/") for path in folder.root.glob(depth + pattern))


def is_ct_rate(folder: Folder) -> bool:
    """Whether a folder has a table in CT-RATE's layout."""
    if any(CTRate(folder, split).find(_LABELS) for split in _SPELLINGS):
        return True
    return any(NAME in columns_of(path) for path in _shallow(folder, "*.csv"))


def ct_rate_source(folder: Folder, label_names: Sequence[str], selection: Selection, version: int = 2) -> Source:
    """A split of CT-RATE; see the top of this file.

    Args:
        folder: Folder in CT-RATE's layout.
        label_names: Labels to read.
        selection: Which studies; "tune" is part of CT-RATE's train split.
        version: 1 or 2.

    Raises:
        DataError: If a table or a column is missing, rows contradict each other, or nothing is left.
    """
    if version not in (1, 2):
        raise DataError(f"CT-RATE has the versions 1 and 2, not {version}.")
    data = CTRate(folder, "valid" if selection.split == "valid" else "train", version)
    labels, reports, metadata = data.labels(label_names), data.reports(), data.metadata()
    studies = labels.merge(reports, on=NAME, how="outer", indicator=True)
    if metadata is not None:
        studies = studies.merge(metadata, on=NAME, how="left", indicator="with_metadata")
    studies = studies.assign(
        id=studies[NAME],
        patient=_part(studies[NAME], "patient"),
        scan=_part(studies[NAME], "scan"),
        report=studies["report"].fillna(""),
    )
    refuse_shared_patients(data, set(studies["patient"]))
    if data.split == "train":
        studies = studies[belongs(studies["patient"], selection.split, selection.tune_share)]
    sieve = sift(studies, data)
    sieve.table["volume"] = data.volume_paths(sieve.table[NAME])
    sieve.drop(sieve.table["volume"].isna(), "no such file")
    columns = ["id", "patient", "scan", "report", "volume", *label_names]
    columns += [column for column in sieve.table if column.startswith(PREFIX)]
    if version == 1:
        columns += ["rescale_slope", "rescale_intercept", *SPACINGS_MM]
    sieve.table = sieve.table[columns]
    return table_source(sieve, label_names, folder.volume, selection, f"CT-RATE ({folder}, version {version})")


def _part(names: pd.Series, part: str) -> list[str]:
    """Patient or scan of each volume; a name of another form counts as a patient or scan of its own."""
    return [match[part] if (match := _VOLUME_NAME.fullmatch(name)) else name for name in names]


def refuse_shared_patients(data: CTRate, patients: set[str]) -> None:
    """Refuse data that have a patient in both splits.

    CT-RATE numbers patients by split, train_1 and valid_1; other names are looked up in the other split's labels.

    Args:
        data: One split.
        patients: Names of its patients.

    Raises:
        DataError: If a patient is in both splits.
    """
    if all(name.startswith(f"{data.split}_") for name in patients):
        return
    other = CTRate(data.folder, "train" if data.split == "valid" else "valid", data.version).table(_LABELS, [])
    shared = set() if other is None else patients.intersection(_part(other[NAME], "patient"))
    if shared:
        raise DataError(
            f"{data.folder}: {len(shared)} patients are in both the train and the valid split, so scores would be "
            "too optimistic. Give each patient one split."
        )


def sift(studies: pd.DataFrame, data: CTRate) -> Sieve:
    """Leave out what cannot be used, before any volume is looked for.

    Args:
        studies: Labels, reports and metadata merged, with `_merge` and `with_metadata` from the merges.
        data: The split they are from.
    """
    sieve = Sieve(studies)
    sieve.drop(sieve.table[NAME].isin(data.no_chest()), "no chest in it, by CT-RATE's list")
    sieve.drop(sieve.table["_merge"] == "right_only", "a report, but no row of labels")
    if "with_metadata" in sieve.table:
        has_row = sieve.table["with_metadata"] == "both"
        no_spacing = ~(sieve.table[SPACINGS_MM] > 0).all(axis=1)
        sieve.drop(has_row & no_spacing, "no spacing in its metadata")
    if data.version == 1:
        sieve.drop(sieve.table["with_metadata"] != "both", "no row of metadata, which version 1 needs")
        no_rescale = sieve.table[["rescale_slope", "rescale_intercept"]].isna().any(axis=1)
        sieve.drop(no_rescale, "no rescale slope or intercept in its metadata")
    sieve.table = sieve.table.copy()
    return sieve


__all__ = ["CTRate", "ct_rate_source", "is_ct_rate"]
