"""Cells of csv files that a spreadsheet would compute: names of files and findings may begin as formulas do."""

import re

_BEGINS_AS_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def as_text(cell: str) -> str:
    """A cell as spreadsheets take it for text: with an apostrophe in front where it begins as a formula does.

    Args:
        cell: Any text; numbers stay as they are.
    """
    if not _BEGINS_AS_FORMULA.match(cell):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def of_text(cell: str) -> str:
    """What `as_text` was given."""
    return cell[1:] if cell.startswith("'") and _BEGINS_AS_FORMULA.match(cell) else cell
