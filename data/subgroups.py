"""Which subgroups a study belongs to, from columns that a table may have: nothing else of it is kept.

| subgroup | columns | becomes |
| --- | --- | --- |
| sex | `sex`, `PatientSex` | F, M or O |
| age | `age`, `PatientAge` (years, or DICOM's 058Y) | under 40, 40-59, 60-79, 80 and over |
| manufacturer | `manufacturer`, `Manufacturer` | as it is |
| kernel | `kernel`, `ConvolutionKernel` | as it is |
| slice thickness | `slice_thickness`, `SliceThickness`, else `ZSpacing`, in mm | up to 1 mm, 1 to 2 mm, over 2 mm |
| contrast | `contrast` (1, 0, or a word of `cells.WORDS`), `ContrastBolusAgent` (empty, or "none", is no) | yes or no |

What cannot be read so is unknown.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from medct.data.cells import is_unknown, number_of, truth_of

PREFIX = "subgroup "
"""Of the columns in a table of studies."""
_AGES = ((40, "under 40"), (60, "40-59"), (80, "60-79"))
_OLDEST = 130
"""In years; 999 and the like stand for an unknown age."""
_AGE = re.compile(r"0*(\d{1,3})(?:[.,]\d+)?\s*([YMWD]?)", re.IGNORECASE)
_SEXES = {
    "F": "f female feminine femenino feminino féminin femme femmina frau weiblich w woman mujer mulher",
    "M": "m male masculine masculino masculin maschio mann männlich man hombre homem homme",
    "O": "o other divers d",
}
# How a text begins that names no agent; French "non" is not among them, since agents are "non ionic".
_WITHOUT = ("no", "none", "without", "ohne", "kein", "keine", "sans", "sin", "senza")
_MM = re.compile(r"\s*mm\s*$", re.IGNORECASE)


def _sex(text: str) -> str:
    word = text.strip().casefold()
    return next((sex for sex, words in _SEXES.items() if word in words.split()), "")


def _age(text: str) -> str:
    if not (found := _AGE.fullmatch(text.strip())):
        return ""
    years = int(found[1]) if found[2].upper() in ("", "Y") else 0  # months, weeks and days are of children
    if years > _OLDEST:
        return ""
    return next((band for limit, band in _AGES if years < limit), "80 and over")


def _as_it_is(text: str) -> str:
    return "" if is_unknown(text) else text.strip()


def _thickness(text: str) -> str:
    millimetres = number_of(_MM.sub("", text))
    if not 0 < millimetres < math.inf:
        return ""
    return "up to 1 mm" if millimetres <= 1 else "1 to 2 mm" if millimetres <= 2 else "over 2 mm"


def _is_yes(text: str) -> str:
    return {1.0: "yes", 0.0: "no"}.get(truth_of(text), "")


def _agent_is_named(text: str) -> str:
    words = text.casefold().split()
    if not words or words[0] in _WITHOUT or truth_of(text) == 0:
        return "no"
    return "" if is_unknown(text) else "yes"


_READ: dict[str, dict[str, Callable[[str], str]]] = {
    "sex": {"sex": _sex, "PatientSex": _sex},
    "age": {"age": _age, "PatientAge": _age},
    "manufacturer": {"manufacturer": _as_it_is, "Manufacturer": _as_it_is},
    "kernel": {"kernel": _as_it_is, "ConvolutionKernel": _as_it_is},
    "slice thickness": {"slice_thickness": _thickness, "SliceThickness": _thickness, "ZSpacing": _thickness},
    "contrast": {"contrast": _is_yes, "ContrastBolusAgent": _agent_is_named},
}
COLUMNS: Sequence[str] = tuple(column for columns in _READ.values() for column in columns)
"""Columns that are looked for."""


def subgroup_columns(table: pd.DataFrame) -> dict[str, list[str]]:
    """The subgroups of each study, as columns of a table of studies; "" where unknown.

    Args:
        table: With any of `COLUMNS`, as text.

    Returns:
        By name of the column; none for what the table says nothing of.
    """
    found = {}
    for division, columns in _READ.items():
        if column := next((column for column in columns if column in table), None):
            found[PREFIX + division] = [columns[column](str(cell)) for cell in table[column].fillna("")]
    return found


def subgroups_of(study: Mapping[str, str | None]) -> dict[str, str]:
    """The subgroups of a row of a table of studies.

    Args:
        study: Cells by column.
    """
    return {name.removeprefix(PREFIX): str(cell) for name, cell in study.items() if name.startswith(PREFIX) and cell}
