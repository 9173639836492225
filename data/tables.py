"""From tables of studies to sources: which study belongs to which split, which are left out and why, and their rows.

A table of studies has one row per volume and the columns `id`, `patient`, `report`, `volume` (a path in the source's
folder, or whatever its `volume_of` understands), one column per label and, where there are several reconstructions,
`scan`. It may have columns of `subgroups`, `rescale_slope`, `rescale_intercept` and the spacings `i_mm`, `j_mm` and
`k_mm`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from medct.data.cells import DECIMAL_COMMA, is_unknown, truth_of
from medct.data.sources import (
    MAPPING_FLAGS,
    AllLeftOutError,
    DataError,
    NoSuchSplitError,
    Row,
    Skipped,
    Source,
    first_of,
    hash_share,
)
from medct.data.study_names import composed
from medct.data.subgroups import subgroups_of
from medct.volume_medct import affine_from_spacing

SPLITS = ("train", "tune", "valid")
TUNE_SHARE = 0.1
"""Default share of a train split's patients that form the tune split."""
SPACINGS_MM = ["i_mm", "j_mm", "k_mm"]
MAPPING_HINT = f"If it has another name there, say so with {MAPPING_FLAGS}; other findings are asked for with --labels."
"""What else to do if a label has no column."""
_ROUNDED = re.compile(r"[0-9]+(?:[.,][0-9]+)?[Ee]\+[0-9]+")
# What reports hold where nothing was dictated.
_NO_TEXT = {"not given.", "not given"}


@dataclass(frozen=True)
class Selection:
    """Which studies of a source are wanted.

    Args:
        split: "train", "tune" or "valid".
        reconstructions: "one" per scan and epoch, so that no report comes twice, or "all" as studies of their own.
        tune_share: Share of the train split's patients that form the tune split, in [0, 1).
        limit: Number of studies to take, the first of a fixed pseudo-random order; all if `None`.
        need_reports: Leave out studies without a report.

    Raises:
        DataError: If a value is not one of these.
    """

    split: str
    reconstructions: Literal["one", "all"] = "one"
    tune_share: float = TUNE_SHARE
    limit: int | None = None
    need_reports: bool = False

    def __post_init__(self):
        if self.split not in SPLITS:
            raise DataError(f"There is no split {self.split!r}. Choose one of {', '.join(SPLITS)}.")
        if self.reconstructions not in ("one", "all"):
            raise DataError(f'`reconstructions` is "one" or "all", not {self.reconstructions!r}.')
        if not 0 <= self.tune_share < 1:
            raise DataError(f"`tune_share` must lie in [0, 1), not {self.tune_share}.")
        if self.limit is not None and self.limit < 1:
            raise DataError(f"`limit` must be 1 or more, not {self.limit}.")


def belongs(patients: pd.Series, split: str, tune_share: float) -> pd.Series:
    """Which patients of the train split belong to "train", or to "tune".

    Args:
        patients: One name per row.
        split: "train" or "tune".
        tune_share: Share of the patients that form "tune", in [0, 1).

    Returns:
        One boolean per row.
    """
    is_tune = patients.map({name: hash_share(name, "tune") < tune_share for name in patients.unique()})
    return is_tune.astype(bool) if split == "tune" else ~is_tune.astype(bool)


def join_text(*parts: object) -> str:
    """Join the parts of a report, without those that say nothing ("Not given.", "NULL" and empty ones)."""
    texts = (" ".join(str(part).split()) for part in parts if isinstance(part, str))
    return " ".join(text for text in texts if text.lower() not in _NO_TEXT and not is_unknown(text))


def merge_doubles(table: pd.DataFrame, key: str, name: str, remarks: Sequence[str] = ()) -> pd.DataFrame:
    """Reduce a table to one row per key by merging equal rows.

    Args:
        table: Columns of text.
        key: Column that identifies a row.
        name: What to call the table in messages.
        remarks: Columns in which rows may differ; the first one's counts.

    Raises:
        DataError: If two rows with one key contradict each other, or a key is empty.
    """
    compared = [column for column in table if column not in remarks]
    table = table.assign(**{key: table[key].str.strip()}).drop_duplicates(compared)
    _refuse_empty(table[key], key, name)
    doubled = table[key][table[key].duplicated()]
    if len(doubled):
        raise DataError(
            f"{name}: {doubled.nunique()} values of {key!r} have several rows that contradict each other, such as "
            f"{doubled.iloc[0]!r}. Keep one row of each."
        )
    return table


def _refuse_empty(cells: pd.Series, column: str, name: str) -> None:
    if empty := int((cells == "").sum()):
        raise DataError(f"{name}: {empty} rows have an empty {column!r}. Fill it in.")


def patients_of(table: pd.DataFrame, study: str, name: str) -> pd.Series:
    """Who was scanned in each row of a table, `composed`; without a column `patient`, each study is its own.

    Args:
        table: Columns of text.
        study: Column that names the study.
        name: What to call the table in messages.

    Raises:
        DataError: If a patient is empty, unknown, or a number that was rounded: all such would count as one.
    """
    patients = table.get("patient", table[study]).astype(str).str.strip().map(composed)
    _refuse_empty(patients, "patient", name)
    if "patient" not in table:
        return patients
    if unknown := list(filter(is_unknown, patients)):
        raise DataError(f"{name}: {len(unknown)} rows have the patient {unknown[0]!r}, which names nobody. Fill it in.")
    if rounded := list(filter(_ROUNDED.fullmatch, patients)):
        raise DataError(
            f"{name}: the patient {rounded[0]!r} is a long number that was rounded, so that several look like one. "
            "Format the column as text before you fill it, and save it again."
        )
    return patients


def refuse_misnamed(columns: Sequence[str], name: str) -> None:
    """Refuse a table whose patients or splits stand in a column that would be passed over for its name.

    Args:
        columns: Of the table.
        name: What to call the table in messages.

    Raises:
        DataError: If there is such a column, and none of the right name.
    """
    for wanted, others in (("patient", ("patient", "patientid")), ("split", ("split",))):
        if found := misnamed(columns, wanted, others):
            raise DataError(
                f"{name}: it has a column {found!r}, which is read if it is called {wanted!r}. Rename it, so that "
                "no patient is in two splits."
            )


def misnamed(columns: Sequence[str], wanted: str, others: Sequence[str]) -> str | None:
    """A column that would be passed over for its name; `None` if there is none, or one of the right name.

    Args:
        columns: Of a table.
        wanted: The right name.
        others: What else it may be called, in small letters; capitals, spaces and signs do not matter.
    """
    found = [column for column in columns if re.sub(r"[\W_]", "", column).casefold() in others]
    return found[0] if found and wanted not in columns else None


_NUMBERED = re.compile(r"(\D*)0*(\d+?)(?:\.0)?")


def refuse_two_spellings(patients: Iterable[str], name: str) -> None:
    """Refuse patients that differ in leading zeros, or ".0": programs for tables drop the one and add the other.

    Args:
        patients: Their names, in any order and number.
        name: What to call the table in messages.

    Raises:
        DataError: If there are such two, who might be one patient in two splits.
    """
    spelling: dict[tuple[str, ...], str] = {}
    for patient in patients:
        if found := _NUMBERED.fullmatch(patient):
            first = spelling.setdefault(found.groups(), patient)
            if first != patient:
                raise DataError(
                    f"{name}: the patients {first!r} and {patient!r} may be one, who would count as two. Write each "
                    "patient in one way, or add a letter to one of these."
                )


def to_numbers(table: pd.DataFrame, columns: Sequence[str], name: str) -> pd.DataFrame:
    """Convert columns from text to float64; empty cells become NaN.

    Args:
        table: With these columns.
        columns: Columns to convert.
        name: What to call the table in messages.

    Raises:
        DataError: If a cell is not a number.
    """
    found = {}
    for column in columns:
        cells = table[column].str.strip() if table[column].dtype == object else table[column]
        numbers = pd.to_numeric(cells.replace(DECIMAL_COMMA, r"\1.\2", regex=True).replace("", np.nan), errors="coerce")
        strange = cells[numbers.isna() & cells.notna() & (cells != "") & (cells.astype(str).str.lower() != "nan")]
        if len(strange):
            raise DataError(f"{name}: {column!r} is {strange.iloc[0]!r} somewhere. Write a number, or leave it empty.")
        found[column] = numbers.astype(float)
    return table.assign(**found)


def check_labels(table: pd.DataFrame, label_names: Sequence[str], name: str) -> pd.DataFrame:
    """Convert labels to numbers from 0 to 1; NaN if unknown.

    Args:
        table: With one column per label: text, numbers or truth values.
        label_names: Columns of the labels.
        name: What to call the table in messages.

    Raises:
        DataError: If a label is neither a number in this range, nor a word of `cells.WORDS`, nor unknown.
    """
    for label in label_names:
        numbers = table[label].map({cell: truth_of(cell) for cell in table[label].unique()}).astype(float)
        strange = table[label][numbers.isna() & ~table[label].map(is_unknown) | (numbers < 0) | (numbers > 1)]
        if len(strange):
            raise DataError(
                f"{name}: the label {label!r} is {_shown(strange.iloc[0])} somewhere. Write 1 (present), 0 (not "
                "present), or leave the cell empty (unknown)."
            )
        table = table.assign(**{label: numbers})
    return table


def _shown(cell: Any) -> str:
    number = truth_of(cell)
    if not math.isnan(number):
        return f"{number:g}"
    return repr(cell if len(cell) <= 20 else f"{cell[:17]}...")


class Sieve:
    """A table of studies from which rows are removed, each with a reason.

    Attributes:
        table: What is left.
        skipped: What was removed.
    """

    def __init__(self, table: pd.DataFrame):
        self.table = table
        self.skipped: list[Skipped] = []

    def drop(self, where: pd.Series, reason: str) -> None:
        """Remove rows.

        Args:
            where: One boolean per row of the table.
            reason: Why these rows are left out.
        """
        self.skipped += [Skipped(study, reason) for study in self.table["id"][where]]
        self.table = self.table[~where]


@dataclass(frozen=True)
class TableRows:
    """Rows of a table of studies, by their index.

    Args:
        table: See the top of this file. Arrow holds it in a few buffers, which forked processes share.
        label_names: Columns that form `labels`.
        volume_of: Turns a `volume` cell into what `read_study` takes.
    """

    table: pa.Table
    label_names: tuple[str, ...]
    volume_of: Callable[[Any], Any]

    def __call__(self, key: int) -> Row:
        (study,) = self.table.slice(key, 1).to_pylist()
        row: Row = {name: study[name] for name in ("id", "patient", "report")}
        row["labels"] = [math.nan if study[name] is None else study[name] for name in self.label_names]
        row["volume"] = self.volume_of(study["volume"])
        if "rescale_slope" in study:
            row |= {name: study[name] for name in ("rescale_slope", "rescale_intercept")}
        row["about"] = subgroups_of(study)
        if SPACINGS_MM[0] in study:
            row["affine"] = affine_from_spacing([study[name] for name in SPACINGS_MM], "LPS")
        return row


def table_source(
    sieve: Sieve,
    label_names: Sequence[str],
    volume_of: Callable[[Any], Any],
    selection: Selection,
    where: str,
    elsewhere: Mapping[str, int] | None = None,
) -> Source:
    """Make a source of what a sieve has left.

    Args:
        sieve: Its table holds one split and is sifted further here.
        label_names: Columns of the labels.
        volume_of: See `TableRows`.
        selection: Which studies; its split serves for messages only.
        where: Name of the data in the description and in messages.
        elsewhere: See `Source`.

    Raises:
        NoSuchSplitError: If nothing is left.
    """
    if selection.need_reports:
        sieve.drop(sieve.table["report"] == "", "no report")
    table = sieve.table.reset_index(drop=True)
    by_scan = selection.reconstructions == "one" and "scan" in table
    together = table.groupby("scan", sort=False).indices.values() if by_scan else ([row] for row in range(len(table)))
    groups = sorted(tuple(map(int, rows)) for rows in together)
    if not groups:
        reasons = "; ".join(sorted({study.reason for study in sieve.skipped}))
        others = ", ".join(f"{count} in {split}" for split, count in (elsewhere or {}).items())
        is_elsewhere = others and not reasons
        remedy = "Give some patients that split, in a column 'split'" if is_elsewhere else "Check its tables"
        why = reasons or others or "its tables are empty"
        kind = AllLeftOutError if reasons else NoSuchSplitError
        raise kind(f"{where}: no study of the {selection.split} split is left ({why}). {remedy}.")
    scan_or_id = table["scan" if "scan" in table else "id"]
    names = [scan_or_id[rows[0]] for rows in groups]
    chosen = first_of(names, selection.limit)
    groups, names = [groups[index] for index in chosen], [names[index] for index in chosen]
    kept = sorted(row for rows in groups for row in rows)
    number = {row: index for index, row in enumerate(kept)}
    table = table.iloc[kept].reset_index(drop=True)
    groups = [tuple(number[row] for row in rows) for rows in groups]
    description = f"{len(groups)} {selection.split} {'study' if len(groups) == 1 else 'studies'} of {where}"
    rows = TableRows(pa.Table.from_pandas(table, preserve_index=False), tuple(label_names), volume_of)
    return Source(groups, rows, tuple(label_names), description, tuple(sieve.skipped), names, elsewhere=elsewhere or {})
