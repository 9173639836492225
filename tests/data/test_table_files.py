"""Tables as people save them."""

import csv
import unicodedata
import zipfile

import damage
import openpyxl
import pytest
from openpyxl import Workbook

from medct.data import DataError
from medct.data.table_files import _text, columns_of, read_table

HEADER = ["file_name", "Erguss, links", "report"]
ROWS = [["a.nii.gz", "0,5", 'Er sagte "nein"; nichts.'], ["b.nii.gz", "1", "Zwei\nZeilen, ein Tab\there."]]
COLUMNS = ["file_name", "Erguss, links"]


def write_csv(path, separator=",", encoding="utf-8", rows=(HEADER, *ROWS)):
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    return path


def write_xlsx(path, *sheets):
    book = Workbook()
    book.remove(book.active)
    for rows in sheets:
        sheet = book.create_sheet()
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def cells(table):
    return table.to_numpy().tolist()


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_any_separator_gives_the_same(tmp_path, separator, encoding):
    path = write_csv(tmp_path / "table.csv", separator, encoding)
    assert cells(read_table(path, COLUMNS, ["report", "patient"])) == ROWS
    assert columns_of(path) == HEADER


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("line", ["sep={}\r\n", '\ufeff"SEP={}"\n'])
def test_a_line_that_tells_excel_the_separator_is_passed_over(tmp_path, separator, line):
    path = write_csv(tmp_path / "table.csv", separator)
    path.write_bytes(line.format(separator).encode() + path.read_bytes())
    assert cells(read_table(path, COLUMNS, ["report"])) == ROWS
    assert columns_of(path) == HEADER


@pytest.mark.parametrize("name", ["table.xlsx", "renamed.csv"])
def test_a_sheet_gives_the_same(name, tmp_path):
    sheets = [["Notes"], ["of somebody"]], [HEADER, *ROWS, [None, None, None]]
    path = write_xlsx(tmp_path / "table.xlsx", *sheets).rename(tmp_path / name)
    assert cells(read_table(path, COLUMNS, ["report"])) == ROWS


def test_of_two_sheets_with_the_columns_none_is_taken(tmp_path):
    path = write_xlsx(tmp_path / "table.xlsx", [HEADER, *ROWS[:1]], [["Notes"]], [HEADER, *ROWS])
    book = openpyxl.load_workbook(path)
    book.worksheets[0].sheet_state = "hidden"
    book.save(path)
    with pytest.raises(DataError, match=r"sheets 'Sheet \(hidden\)' and 'Sheet2' both have such columns\. Keep"):
        read_table(path, COLUMNS, ["report"])


def test_merged_cells_of_a_sheet_hold_what_is_shown_in_each_place(tmp_path):
    path = write_xlsx(tmp_path / "table.xlsx", [["file_name", "patient", "Erguss", "Herz", "Befund"]])
    book = openpyxl.load_workbook(path)
    for row in (["a.nii", 7, "ja"], ["b.nii"], ["c.nii", 8, None, "nein"]):
        book.active.append(row)
    for area in ("B2:B3", "C2:D3", "E1:G1"):
        book.active.merge_cells(area)
    book.save(path)
    table = read_table(path, ["file_name", "patient", "Erguss", "Herz"])
    assert cells(table) == [["a.nii", "7", "ja", "ja"], ["b.nii", "7", "ja", "ja"], ["c.nii", "8", "", "nein"]]
    assert columns_of(path) == ["file_name", "patient", "Erguss", "Herz", "Befund", "", ""]


def test_a_sheet_is_unpacked_once_however_often_it_is_read_and_again_once_it_has_changed(tmp_path, monkeypatch):
    loaded, load = [], openpyxl.load_workbook
    monkeypatch.setattr(openpyxl, "load_workbook", lambda *a, **options: loaded.append(a) or load(*a, **options))
    path = write_xlsx(tmp_path / "table.xlsx", [HEADER, *ROWS])
    for _ in range(3):
        assert columns_of(path) == HEADER
        assert cells(read_table(path, COLUMNS, ["report"], name="another name")) == ROWS
    assert len(loaded) == 1
    write_xlsx(path, [HEADER, *ROWS[:1]])
    assert cells(read_table(path, COLUMNS, ["report"])) == ROWS[:1]


def test_cells_of_a_sheet_are_text_as_csv_has_it(tmp_path):
    path = write_xlsx(tmp_path / "table.xlsx", [["id", "value"], [7, True], [7.0, 0.5], ["007", None]])
    assert cells(read_table(path, ["id", "value"])) == [["7", "True"], ["7", "0.5"], ["007", ""]]


def test_spaces_and_accents_of_a_name_do_not_matter(tmp_path):
    name = "Überblähung"
    path = write_csv(tmp_path / "table.csv", rows=[["file_name ", unicodedata.normalize("NFD", name)], ["a", "1"]])
    assert list(read_table(path, ["file_name", name])) == ["file_name", name]


def test_rows_that_are_shorter_or_empty(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b,c\n1,2\n\n,,\n4,5,6,,\n", encoding="utf-8")
    assert cells(read_table(path, ["a", "c"])) == [["1", ""], ["4", "6"]]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a,b\n1,2,3\n", "row 2 has more cells than the header"),
        (b"a,b\n1,0,5\n", "row 2 has more cells than the header. Put cells that hold the separator into quotes"),
        (b"a,b,c\n1,#REF!,\n", "row 2 holds '#REF!', a formula that failed"),
        ("a,b\n1,2\n#¡VALOR!,2\n".encode(), "row 3 holds '#¡VALOR!'"),
        (b"a,b\n#NAME?,2\n", "'#NAME\\?'"),
        (b"a,b,a\n1,2,3\n", "has the column 'a' twice"),
        (b"b,c\n1,2\n", "has no column 'a', but 'b', 'c'"),
        (b"", "has no column 'a' .*, but nothing. Add it"),
        ("a,b\nä,ü\n".encode("latin-1"), "not a readable csv file"),
        (b'a,b\n1,"2\n', "not a readable csv file"),
        (
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
            "an old or encrypted Excel file, which is not read. In Excel",
        ),
        (
            b"PK\x03\x04 cut off",
            r"an Excel file that cannot be unpacked: the zip archive is damaged \(BadZipFile\)\. In Excel, save it as",
        ),
        (damage.zipped([b"no workbook"]), r"a damaged Excel file \(KeyError\)\. In Excel, save it"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path, content, message):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        read_table(path, ["a", "b"])
    assert str(refusal.value).startswith(f"{path}: ")


def test_a_table_that_is_not_there_is_said_to_be_so(tmp_path):
    with pytest.raises(DataError) as refusal:
        read_table(tmp_path / "nope.csv", ["a"])
    assert str(refusal.value) == f"{tmp_path / 'nope.csv'}: no such file. Check the path."


def test_a_cell_far_outside_of_the_table_is_refused(tmp_path):
    """Walking over all cells before the last one in use would take minutes and all memory."""
    book = Workbook()
    book.active["A1"], book.active["XFD1048576"] = "id", "typed by accident"
    book.save(tmp_path / "table.xlsx")
    with pytest.raises(DataError, match="the sheet 'Sheet' reaches from A1 to XFD1048576"):
        read_table(tmp_path / "table.xlsx", ["id"])


def with_value(path, value: str):
    """The same workbook with another value in the cells of formulas, as other writers leave it."""
    with zipfile.ZipFile(path) as parts:
        files = {name: parts.read(name) for name in parts.namelist()}
    with zipfile.ZipFile(path, "w") as parts:
        for name, content in files.items():
            parts.writestr(name, content.replace(b"</f><v />", f"</f><v>{value}</v>".encode()))
    return path


@pytest.mark.parametrize("value", ["", "0"])
def test_formulas_that_nobody_has_calculated_are_refused(tmp_path, value):
    path = write_xlsx(tmp_path / "table.xlsx", [["id", "Erguss"], ["1", "=IF(2>1,1,0)"]])
    with pytest.raises(DataError, match=r"the cell B2 holds a formula that has not been calculated\. Open the file in"):
        read_table(with_value(path, value), ["id", "Erguss"])


def test_formulas_that_a_spreadsheet_has_calculated_are_read(tmp_path):
    path = tmp_path / "table.xlsx"
    book = Workbook()
    book.active.append(["id", "Erguss"])
    book.active.append(["1", "=IF(2>1,1,0)"])
    book.calculation.fullCalcOnLoad = None
    book.save(path)
    assert read_table(with_value(path, "1"), ["id", "Erguss"]).values.tolist() == [["1", "1"]]


def test_without_openpyxl_it_says_what_to_do(tmp_path, monkeypatch):
    path = write_xlsx(tmp_path / "table.xlsx", [["a"], ["1"]])
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    with pytest.raises(DataError, match=r"needs openpyxl: pip install openpyxl\. Or: In Excel, save it as"):
        read_table(path, ["a"])


def test_the_separator_is_the_one_that_finds_the_columns(tmp_path):
    """However often another one stands in the header."""
    path = tmp_path / "table.csv"
    path.write_text("file_name;length, width, height in mm\na;1, 2, 3\n", encoding="utf-8")
    assert cells(read_table(path, ["file_name"])) == [["a"]]


@pytest.mark.parametrize(("cell", "text"), [(7.0, "7"), (0.5, "0.5"), (7, "7"), (None, ""), ("7.0", "7.0")])
def test_a_whole_number_of_a_sheet_has_no_point(cell, text):
    """As some programs save it: a patient 7.0 would be another than 7 of a csv file."""
    assert _text(cell) == text


def test_a_number_that_a_spreadsheet_rounded_is_shown_so():
    assert _text(123456789012.0) == "123456789012"
    assert _text(1.23456789012346e17) == "1.23456789012346e+17"
