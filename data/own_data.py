"""Your own studies: a folder with `metadata.csv`, or Parquet with a `Nifti()` column.

`metadata.csv` follows the folder convention of `datasets`: `file_name` (a NIfTI file or a DICOM folder, relative to the
csv file), `report`, one column per label and, optionally, `patient`, `split` and `subgroups`. It lies at the top of the
folder, or there is one in each of `train/`, `valid/` (or `validation/`) and `test/`; `metadata.xlsx` will do. Parquet
has the same columns, with `volume` or any other `Nifti()` column in place of `file_name`, and the splits of its
repository.

Splits: "valid" is the split called valid, validation, val or test. If there is both a test split and one of the others,
test is "valid" and the other is "tune". Without any of them, a tenth of the patients is held out. Without a `patient`
column, each study is a patient of its own.
"""

import contextlib
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
from datasets import ClassLabel, Features, Nifti, load_dataset_builder
from pyarrow import parquet

from medct.data.folders import HUB_ADDRESS, Folder, LocalFolder
from medct.data.sources import DataError, Deferred, Source, hash_share
from medct.data.study_names import composed
from medct.data.subgroups import COLUMNS as SUBGROUPS
from medct.data.subgroups import subgroup_columns
from medct.data.table_files import columns_of, read_table
from medct.data.tables import (
    MAPPING_HINT,
    SPLITS,
    Selection,
    Sieve,
    belongs,
    check_labels,
    join_text,
    merge_doubles,
    misnamed,
    patients_of,
    refuse_misnamed,
    refuse_two_spellings,
    table_source,
)

HELD_OUT_SHARE = 0.1
"""Share of the patients that form "valid" where nothing says which split they belong to."""
METADATA = "metadata.csv"
REPORT_COLUMNS = ("report", "findings", "impression", "Findings_EN", "Impressions_EN")
ID_COLUMNS = ("id", "VolumeName", "file_name")
_TRAIN, _VALID, _TEST = ("train", "training"), ("valid", "validation", "val"), ("test",)
_SPLIT_NAMES = (*_TRAIN, "tune", *_VALID, *_TEST)


def split_meanings(names: Sequence[str], where: str) -> dict[str, str]:
    """Which of our splits each of a source's split names means.

    Args:
        names: Split names as the source has them.
        where: Name of the source in messages.

    Returns:
        "train", "tune" or "valid" by name.

    Raises:
        DataError: If a name is unknown, or the names leave no meaning for one.
    """
    for name in names:
        if name.lower() not in _SPLIT_NAMES:
            raise DataError(f"{where}: it has the split {name!r}. Call its splits train, tune, valid or test.")
    has_test = any(name.lower() in _TEST for name in names)
    has_tune = "tune" in (name.lower() for name in names)
    of_valid = "tune" if has_test and not has_tune else "valid"
    if has_test and has_tune and any(name.lower() in _VALID for name in names):
        raise DataError(f"{where}: it has a tune, a validation and a test split. Rename one of the last two.")
    meanings = dict.fromkeys(_TRAIN, "train") | dict.fromkeys(_VALID, of_valid) | {"test": "valid", "tune": "tune"}
    return {name: meanings[name.lower()] for name in names}


def choose_split(table: pd.DataFrame, selection: Selection, where: str) -> tuple[pd.DataFrame, str, dict[str, int]]:
    """The rows of one split, how it was made, and how many rows are in the others.

    Args:
        table: With `patient` and `split`, the latter empty where unknown.
        selection: Which split, and how large a tune split to make where there is none.
        where: Name of the source in messages.

    Raises:
        DataError: If a patient is in two splits, or written in two ways, or only some rows have a split.
    """
    refuse_two_spellings(table["patient"], where)
    named = table["split"] != ""
    how = ""
    if named.any():
        if not named.all():
            raise DataError(f"{where}: {int((~named).sum())} rows have no split. Fill it in.")
        table = table.assign(split=table["split"].map(split_meanings(list(table["split"].unique()), where)))
    if "valid" not in set(table["split"]):
        shares = {name: hash_share(name, "valid") for name in table["patient"].unique()}
        is_held_out = table["patient"].map(shares) < HELD_OUT_SHARE
        table = table.assign(split=table["split"].mask(table["split"] == "", "train").mask(is_held_out, "valid"))
        how = f", split by a hash of the patient: {HELD_OUT_SHARE:.0%} held out"
    doubled = table.groupby("patient")["split"].nunique() > 1
    if doubled.any():
        raise DataError(
            f"{where}: {int(doubled.sum())} patients are in several splits, so scores would be too optimistic. Give "
            "each patient one split."
        )
    if "tune" not in set(table["split"]):
        is_tune = (table["split"] == "train") & belongs(table["patient"], "tune", selection.tune_share)
        table = table.assign(split=table["split"].mask(is_tune, "tune"))
    others = table["split"][table["split"] != selection.split].value_counts()
    elsewhere = {split: int(others[split]) for split in SPLITS if split in others}
    return table[table["split"] == selection.split], how, elsewhere


def tidy(table: pd.DataFrame, label_names: Sequence[str], where: str) -> pd.DataFrame:
    """Make a table of studies as `tables` describes it, with a column `split`.

    Args:
        table: With `id`, `volume`, labels, and any of the other columns, as text.
        label_names: Labels to read.
        where: Name of the source in messages.

    Raises:
        DataError: If a label is not a number from 0 to 1, or a patient is empty.
    """
    parts = [table[column] for column in REPORT_COLUMNS if column in table]
    reports = [join_text(*part) for part in zip(*parts, strict=True)] if parts else [""] * len(table)
    table = check_labels(table, label_names, where)
    splits = table.get("split", pd.Series("", table.index)).astype(str).str.strip().map(composed)
    table = table.assign(patient=patients_of(table, "id", where), split=splits, id=table["id"].map(composed))
    columns = ["id", "patient", "split", "volume", *label_names]
    return table[columns].assign(report=reports, **subgroup_columns(table))


def _refuse_passed_over(columns: Sequence[str], where: str) -> None:
    """Refuse a table of which patients, splits or reports would be passed over for the name of their column."""
    refuse_misnamed(columns, where)
    if "report" in columns or "Findings_EN" in columns:
        return
    for wanted in ("report", "findings", "impression"):
        if found := misnamed(columns, wanted, (wanted, f"{wanted}s", f"{wanted}text")):
            raise DataError(
                f"{where}: it has a column {found!r}, which is read if it is called {wanted!r}. Rename it, or call it "
                "'other' if it is no report."
            )


# ---------------------------------------------------------------------------------------------------------------------
# A folder with metadata.csv
# ---------------------------------------------------------------------------------------------------------------------


def metadata_files(folder: Folder) -> dict[str, Path]:
    """`metadata.csv` at the top (keyed by ""), or those of the split folders (keyed by their names).

    In a local folder, `metadata.xlsx` will do.

    Raises:
        DataError: If there are both.
    """
    if path := _metadata_file(folder, ""):
        return {"": path}
    found = {name: _metadata_file(folder, f"{name}/") for name in _split_folders(folder)}
    return {name: path for name, path in found.items() if path}


def _split_folders(folder: Folder) -> Sequence[str]:
    """Folders called like a split, in any capitals; of a repository, which is not listed, those that may be there."""
    if isinstance(folder, LocalFolder):
        return sorted(path.name for path in folder.root.iterdir() if path.name.lower() in _SPLIT_NAMES)
    return _SPLIT_NAMES


def _metadata_file(folder: Folder, within: str) -> Path | None:
    # A repository is asked once for each name, and each costs a request.
    names = [METADATA, METADATA.replace(".csv", ".xlsx")] if folder.is_local else [METADATA]
    found = [path for name in names if (path := folder.file(within + name))]
    if len(found) > 1:
        raise DataError(f"{folder}: it has both {within}{names[0]} and {within}{names[1]}. Keep the one that holds.")
    return found[0] if found else None


def metadata_source(folder: Folder, files: dict[str, Path], label_names: Sequence[str], selection: Selection) -> Source:
    """A split of a folder with `metadata.csv`; see the top of this file.

    Args:
        folder: Folder that `files` and the volumes lie in.
        files: From `metadata_files`.
        label_names: Labels to read.
        selection: Which studies.

    Raises:
        DataError: If a column is missing, a label is invalid, or nothing is left.
    """
    tables = []
    for split, path in files.items():
        shown = f"{folder}/{split}/{path.name}" if split else f"{folder}/{path.name}"
        groups = [name for name in SUBGROUPS if name not in label_names]
        optional = ("patient", "split", *REPORT_COLUMNS, *groups)
        needed = ["file_name", *label_names]
        _refuse_passed_over(columns_of(path, [*needed, *optional]), shown)
        table = read_table(path, needed, optional, shown, dict.fromkeys(label_names, MAPPING_HINT))
        table = merge_doubles(table, "file_name", shown, groups)
        names = f"{split}/" + table["file_name"] if split else table["file_name"]
        table = table.assign(id=names, volume=names)
        tables.append(tidy(table.assign(split=split) if split else table, label_names, shown))
    table = pd.concat(tables, ignore_index=True)
    _refuse_same_files(table["volume"], str(folder))
    chosen, how, elsewhere = choose_split(table, selection, str(folder))
    sieve = Sieve(chosen.drop(columns="split"))
    sieve.table = sieve.table.assign(volume=sieve.table["volume"].map(folder.find_volume))
    sieve.drop(sieve.table["volume"].isna(), "no such file")
    return table_source(sieve, label_names, folder.volume, selection, f"{folder}{how}", elsewhere)


def _refuse_same_files(volumes: pd.Series, folder: str) -> None:
    """Refuse a file that is a study twice under two spellings, since its copies may be in two splits."""
    plain = volumes.map(lambda name: composed(posixpath.normpath(posixpath.join(folder, name))))
    for name in volumes[plain.duplicated()][:1]:
        first = volumes[plain == composed(posixpath.normpath(posixpath.join(folder, name)))].iloc[0]
        raise DataError(f"{folder}: the rows {first!r} and {name!r} are of the same file. Keep one.")


# ---------------------------------------------------------------------------------------------------------------------
# Parquet with a Nifti() column
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetVolume(Deferred):
    """A volume in a Parquet file."""

    path: str
    row_group: int
    row: int
    column: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    @contextlib.contextmanager
    def open(self) -> Iterator[dict[str, Any]]:
        """Yield an undecoded `datasets.Nifti()` value: `bytes`, or the `path` of a file.

        Raises:
            OSError, pyarrow.ArrowException: If it cannot be fetched or is damaged.
        """
        with fsspec.open(self.path, "rb", **self.options) as file:
            # Arrow verifies pages only on request; otherwise flipped bits read as wrong voxels.
            shard = parquet.ParquetFile(file, page_checksum_verification=True)
            table = shard.read_row_group(self.row_group, columns=[self.column], use_threads=False)
        yield table.column(self.column)[self.row].as_py()


@dataclass(frozen=True)
class ParquetVolumes:
    """Turns a cell `(file, row group, row)` into its volume."""

    paths: tuple[str, ...]
    column: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def __call__(self, cell: tuple[int, int, int]) -> ParquetVolume:
        file, row_group, row = cell
        return ParquetVolume(self.paths[file], row_group, row, self.column, self.options)


def parquet_source(
    address: str,
    label_names: Sequence[str],
    selection: Selection,
    revision: str | None = None,
    token: str | None = None,
) -> Source:
    """A split of Parquet files, or of a `datasets` repository stored as Parquet, with a `Nifti()` column.

    Until the first volume is needed, only text and labels are read, once.

    Args:
        address: Parquet file, folder, or `hf://datasets/ORG/NAME`.
        label_names: Labels to read.
        selection: Which studies.
        revision: Branch, tag or commit of the repository.
        token: Token for the repository.

    Raises:
        DataError: If there is no Parquet, no `Nifti()` column or several, or a label is missing.
    """
    files = _data_files(address, revision, token)
    options = {"token": token} if token and address.startswith(HUB_ADDRESS) else {}
    split_of = {path: split for split, paths in files.items() for path in paths}
    paths = tuple(split_of)
    tables, columns = [], set()
    for number, (path, name) in enumerate(zip(paths, _short_names(paths), strict=True)):
        table, column = _light_columns(path, name, number, options, label_names)
        alone = "" if split_of[path].lower() not in (*_VALID, *_TEST) else split_of[path]  # "train" is any file's
        tables.append(table.assign(split=split_of[path] if len(files) > 1 else table.get("split", alone)))
        columns.add(column)
    if len(columns) != 1:
        differing = ", ".join(sorted(columns))
        raise DataError(f"{address}: the volume columns of its files differ ({differing}). Call them alike.")
    table = tidy(merge_doubles(pd.concat(tables, ignore_index=True), "id", address, SUBGROUPS), label_names, address)
    chosen, how, elsewhere = choose_split(table, selection, address)
    volumes = ParquetVolumes(paths, columns.pop(), options)
    sieve = Sieve(chosen.drop(columns="split"))
    return table_source(sieve, label_names, volumes, selection, f"{address}{how}", elsewhere)


def _data_files(address: str, revision: str | None, token: str | None) -> dict[str, list[str]]:
    """The Parquet files of each split."""
    if address.endswith(".parquet"):
        return {"train": [address]}
    try:
        name = address.removeprefix(HUB_ADDRESS)
        builder = load_dataset_builder(name, revision=revision, token=token)
    except Exception as error:  # of several libraries
        raise DataError(
            f"{address}: not in CT-RATE's layout, no {METADATA}, and not a dataset ({type(error).__name__}). Pass "
            f"CT-RATE's folder, one with a {METADATA}, or Parquet files with a Nifti() column."
        ) from error
    if builder.dataset_name is None or builder.name != "parquet" or not builder.config.data_files:
        as_parquet = "Write it as Parquet with `Dataset.push_to_hub` or `Dataset.to_parquet`"
        as_table = f"List its files in a {METADATA}; a metadata.jsonl is not read"
        remedy = as_table if builder.name == "niftifolder" else as_parquet
        raise DataError(f"{address}: not in CT-RATE's layout, no {METADATA}, and stored as {builder.name}. {remedy}.")
    return {str(split): [str(path) for path in paths] for split, paths in builder.config.data_files.items()}


def _short_names(paths: Sequence[str]) -> list[str]:
    """What to call files: by their names alone or, if some have the same, with the folders in which they differ."""
    names = [PurePath(path).name for path in paths]
    if len(set(names)) == len(names):
        return names
    return [PurePath(path).relative_to(os.path.commonpath(paths)).as_posix() for path in paths]


def _light_columns(
    path: str, short_name: str, number: int, options: dict[str, Any], label_names: Sequence[str]
) -> tuple[pd.DataFrame, str]:
    """All columns of a Parquet file but the volumes, with where each volume lies; and the name of their column."""
    try:
        with fsspec.open(path, "rb", **options) as file:
            shard = parquet.ParquetFile(file)
            features = Features.from_arrow_schema(shard.schema_arrow)
            column = _volume_column(path, features)
            _refuse_passed_over(shard.schema_arrow.names, path)
            groups = [name for name in SUBGROUPS if name not in label_names]
            wanted = [*label_names, *ID_COLUMNS, *REPORT_COLUMNS, *groups, "patient", "split"]
            missing = [name for name in label_names if name not in shard.schema_arrow.names]
            if missing:
                raise DataError(f"{path}: it has no column {missing[0]!r}. Add it. {MAPPING_HINT}")
            table = shard.read([name for name in wanted if name in shard.schema_arrow.names]).to_pandas()
            table = _in_words(table, features)
            sizes = [shard.metadata.row_group(group).num_rows for group in range(shard.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file ({type(error).__name__}). Copy it again.") from error
    cells = [(number, group, row) for group, size in enumerate(sizes) for row in range(size)]
    names = next((table[name].astype(str) for name in ID_COLUMNS if name in table), None)
    if names is None:
        names = [f"{short_name}, row {row}" for row in range(len(cells))]
    text = {name: table[name].fillna("").astype(str) for name in table if name not in label_names}
    return table.assign(**text).assign(id=names, volume=cells), column


def _in_words(table: pd.DataFrame, features: Features) -> pd.DataFrame:
    """Give classes their names: the order of their numbers means nothing. A negative number is unknown."""
    words = {name: dict(enumerate(features[name].names)) for name in table if isinstance(features[name], ClassLabel)}
    return table.assign(**{name: table[name].map(words[name]) for name in words})


def _volume_column(path: str, features: Features) -> str:
    columns = [name for name, feature in features.items() if isinstance(feature, Nifti)]
    if len(columns) != 1:
        found = f"the Nifti() columns {', '.join(columns)}" if columns else "no Nifti() column"
        raise DataError(f"{path}: it has {found}. Keep one, cast with `cast_column(name, datasets.Nifti())`.")
    return columns[0]


__all__ = ["METADATA", "metadata_files", "metadata_source", "parquet_source", "split_meanings"]
