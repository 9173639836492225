"""Tables as people save them: csv with any of three separators, or an Excel sheet, as columns of text.

| as found | what is done |
| --- | --- |
| commas, semicolons or tabs between the cells | the separator by which the header has the columns that are asked for |
| spaces around a column's name, accents composed in another way | the name all the same |
| a first line `sep=;`, which is for Excel | passed over; the separator is the one that finds the columns |
| a column twice, a row longer than the header | refused: nobody knows which cell is meant |
| an apostrophe before what would be a formula | left out, as in a spreadsheet |
| a row shorter than the header | its last cells are empty |
| `.xlsx` | read with openpyxl if it is installed, from the sheet that has the columns; refused if several do |
| cells of a sheet that are merged, below the header | each holds what is shown |
| formulas that no spreadsheet has calculated, as programs write them | refused: their cells are empty, or 0 |
| what formulas leave that failed, such as `#REF!` | refused |
| another encoding than UTF-8, `.xls`, an encrypted workbook | refused |
"""

import csv
import functools
import itertools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from medct.byte_sources_medct import ZIP_MAGIC, of_path, of_zip
from medct.common.formulas import of_text
from medct.data.sources import DataError
from medct.data.study_names import composed
from medct.errors_medct import first_line
from medct.volume_medct import VolumeError

SUFFIXES = (".csv", ".xlsx")
_SEPARATORS = ",;\t"
_LONGEST_CELL = 2**24
_MOST_CELLS = 2**26
"""Of one sheet: all up to its last cell in use, each of which is walked over."""
_FIRST_ROUNDED = 1e15
"""Spreadsheets keep 15 digits: the later ones of a longer number are lost."""
_OLD_OFFICE = b"\xd0\xcf\x11\xe0"  # .xls, and workbooks with a password
_CALCULATE_FIRST = re.compile(rb'fullCalcOnLoad="(1|true)"')
_FORMULA = re.compile(rb'<c r="([A-Z]+[0-9]+)"[^>]*><f[ />]')
_FAILED = re.compile(r"#[¡\w/]+[!?]")  # such as #REF!, #NAME? and #¡VALOR!
_FOR_EXCEL = re.compile(r'"?sep=.?"?\s*', re.IGNORECASE)
"""A first line that tells Excel the separator, and is shown in no row."""
_AS_CSV = "In Excel, save it as `CSV UTF-8`"


def read_table(
    path: Path,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    name: str | None = None,
    hints: Mapping[str, str] | None = None,
    comments: bool = False,
) -> pd.DataFrame:
    """Read columns of a csv file or an Excel sheet as text.

    Args:
        path: The file.
        columns: Columns that it must have.
        optional: Columns that it may have.
        name: What to call it in messages; its path by default.
        hints: What else to do if a column is missing, a sentence, by column.
        comments: Pass over lines of a csv file before the header that begin with "#".

    Returns:
        The columns in this order, without rows that are empty throughout; empty cells are "".

    Raises:
        DataError: If the file cannot be read, a column is missing or there twice, or a row is longer than the header.
    """
    name = name or str(path)
    rows = _rows_of(path, [*columns, *optional], name, comments)
    found = [tidy_name(cell) for cell in next(rows, [])]
    missing = [column for column in columns if tidy_name(column) not in found]
    if missing:
        more = f" (and {len(missing) - 1} others that are needed)" if len(missing) > 1 else ""
        shown = ", ".join(map(repr, found[:4])) + (" ..." if len(found) > 4 else "")
        hint = f" {hints[missing[0]]}" if hints and missing[0] in hints else ""
        raise DataError(
            f"{name}: has no column {missing[0]!r}{more}, but {shown or 'nothing'}. Add it to the file.{hint}"
        )
    wanted = [column for column in (*columns, *optional) if tidy_name(column) in found]
    for column in wanted:
        if found.count(tidy_name(column)) > 1:
            raise DataError(f"{name}: has the column {column!r} twice. Keep one.")
    places = [found.index(tidy_name(column)) for column in wanted]
    cells = []
    for number, row in enumerate(rows, start=2):
        if any(row[len(found) :]):
            raise DataError(
                f"{name}: row {number} has more cells than the header. Put cells that hold the separator into quotes."
            )
        if any(row):
            cells.append([row[place] if place < len(row) else "" for place in places])
            if failed := next(filter(_FAILED.fullmatch, cells[-1]), None):
                raise DataError(
                    f"{name}: row {number} holds {failed!r}, a formula that failed. Correct it, or empty it."
                )
    return pd.DataFrame(cells, columns=wanted, dtype=str)


def columns_of(path: Path, wanted: Sequence[str] = ()) -> list[str]:
    """The names of a table's columns, in their order; none if it is not a readable table.

    Args:
        path: The file.
        wanted: All columns that `read_table` is asked for, so that both read one sheet.
    """
    try:
        return [tidy_name(cell) for cell in next(_rows_of(path, wanted, str(path)), [])]
    except DataError:
        return []


def tidy_name(name: str) -> str:
    """A column's name without what nobody sees: spaces around it, and how its accents are composed."""
    return composed(str(name)).strip()


def _rows_of(path: Path, wanted: Sequence[str], name: str, comments: bool = False) -> Iterator[list[str]]:
    """All rows, the header first."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start == _OLD_OFFICE:
            raise DataError(f"{name}: an old or encrypted Excel file, which is not read. {_AS_CSV}.")
        yield from _sheet(path, wanted, name) if start == ZIP_MAGIC else _csv(path, wanted, comments)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file. Check the path.") from error
    except (OSError, ValueError, csv.Error) as error:  # wrong encodings are ValueErrors
        raise DataError(f"{name}: not a readable csv file ({first_line(error)}). Save it as csv in UTF-8.") from error


def _csv(path: Path, wanted: Sequence[str], comments: bool) -> Iterator[list[str]]:
    csv.field_size_limit(_LONGEST_CELL)

    def rows(separator: str) -> Iterator[list[str]]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            heads = itertools.dropwhile(lambda line: comments and line.startswith("#"), file)
            lines = itertools.dropwhile(_FOR_EXCEL.fullmatch, heads)
            for row in csv.reader(lines, delimiter=separator, strict=True):
                yield list(map(of_text, row))

    headers = {separator: _first(rows(separator)) for separator in _SEPARATORS}
    # Of equals the first: commas, unless another separator finds more.
    yield from rows(max(_SEPARATORS, key=lambda each: (_count(headers[each], wanted), len(headers[each]))))


def _first(rows: Iterator[list[str]]) -> list[str]:
    try:
        return next(rows, [])
    except csv.Error:  # quotes that close elsewhere with this separator
        return []


def _count(header: Sequence[str], wanted: Sequence[str]) -> int:
    return len({tidy_name(cell) for cell in header} & {tidy_name(column) for column in wanted})


def _sheet(path: Path, wanted: Sequence[str], name: str) -> Iterator[list[str]]:
    status = path.stat()
    try:
        of_zip(of_path(path)[0])  # refuses what would unpack to gigabytes
        texts = _sheets(path, (status.st_ino, status.st_size, status.st_mtime_ns))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except VolumeError as error:
        raise DataError(f"{name}: an Excel file that cannot be unpacked: {error.reason}. {_AS_CSV}.") from error
    except ImportError as error:
        raise DataError(f"{name}: an Excel file, which needs openpyxl: pip install openpyxl. Or: {_AS_CSV}.") from error
    except Exception as error:  # openpyxl raises those of zipfile, XML and its own
        raise DataError(f"{name}: a damaged Excel file ({type(error).__name__}). {_AS_CSV}.") from error
    counts = {title: _count(rows[0], wanted) for title, rows in texts.items()}
    alike = [title for title, count in counts.items() if count == max(counts.values())]
    if len(alike) > 1 and counts[alike[0]]:
        first, second = map(repr, alike[:2])
        raise DataError(f"{name}: its sheets {first} and {second} both have such columns. Keep the one that holds.")
    yield from texts[alike[0]] if alike else []


@functools.lru_cache(maxsize=1)
def _sheets(path: Path, state: tuple[int, ...]) -> dict[str, list[list[str]]]:
    """All sheets as text, kept since each split asks for the header and the rows, and openpyxl takes its time.

    Args:
        path: The file.
        state: What differs once the file was written again.

    Returns:
        Rows of cells by title; sheets without any are left out.
    """
    from openpyxl import load_workbook

    with path.open("rb") as file:  # by its path, openpyxl would refuse one of another suffix
        found = load_workbook(file, data_only=True).worksheets
    for sheet in found:
        if sheet.max_row * sheet.max_column > _MOST_CELLS:
            raise DataError(
                f"the sheet {sheet.title!r} reaches from {sheet.dimensions.replace(':', ' to ')}, more than a "
                f"table holds. Delete what stands far outside of the table, or: {_AS_CSV}."
            )
    if cell := _uncalculated(path):
        raise DataError(
            f"the cell {cell} holds a formula that has not been calculated. Open the file in a spreadsheet and save it."
        )
    titles = [sheet.title + ("" if sheet.sheet_state == "visible" else " (hidden)") for sheet in found]
    return {title: rows for title, sheet in zip(titles, found, strict=True) if (rows := _texts(sheet))}


def _uncalculated(path: Path) -> str | None:
    """The first cell with a formula, in a workbook whose writer left all calculation to the next program."""
    with zipfile.ZipFile(path) as parts:
        books = [name for name in parts.namelist() if name.startswith("xl/workbook")]
        if not any(_CALCULATE_FIRST.search(parts.read(name)) for name in books):
            return None
        sheets = (parts.read(name) for name in parts.namelist() if name.startswith("xl/worksheets/"))
        found = next(filter(None, map(_FORMULA.search, sheets)), None)
    return found and found[1].decode()


def _texts(sheet: Any) -> list[list[str]]:
    """The cells of a sheet as csv would hold them; below the header, what is merged stands in each place it covers."""
    rows = [[_text(cell) for cell in row] for row in sheet.iter_rows(values_only=True)]
    for area in sheet.merged_cells.ranges:
        for row, column in area.cells if area.min_row > 1 else ():
            rows[row - 1][column - 1] = rows[area.min_row - 1][area.min_col - 1]
    return rows


def _text(cell: Any) -> str:
    """A cell of a sheet as csv would hold it."""
    if cell is None:
        return ""
    is_whole = isinstance(cell, float) and cell.is_integer() and abs(cell) < _FIRST_ROUNDED
    return str(int(cell)) if is_whole else str(cell)


__all__ = ["SUFFIXES", "columns_of", "read_table", "tidy_name"]
