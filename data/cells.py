"""What a cell of a table says, in whatever way people write numbers and words."""

import math
import re
from typing import Any

_YES = "yes y true present positive ja wahr vorhanden oui vrai présent si sí sì presente sim evet var tak да 是 有 阳性"
_NO = "no n false absent negative nein falsch non faux nee não hayır yok nie нет 否 无 無 阴性"
WORDS = {**dict.fromkeys(_YES.split(), 1.0), "はい": 1.0, **dict.fromkeys(_NO.split(), 0.0), "いいえ": 0.0}
"""Labels that are written as words, casefolded; what means different things in different places is not among them."""
_NOT_KNOWN = "nan na n/a <na> #n/a #nv null unknown unbekannt inconnu desconocido sconosciuto bilinmiyor 未知"
_UNKNOWN = {"", *_NOT_KNOWN.split()}
DECIMAL_COMMA = re.compile(r"^([+-]?[0-9]*),([0-9]+)$")


def number_of(text: str) -> float:
    """Text as a number; NaN if it is none."""
    try:
        return math.nan if "_" in text else float(DECIMAL_COMMA.sub(r"\1.\2", text.strip()))  # Python's may hold one
    except ValueError:
        return math.nan


def truth_of(cell: Any) -> float:
    """A label as a number, from words too; NaN if it is unknown, or none."""
    if not isinstance(cell, str):
        return math.nan if cell is None else float(cell)
    word = cell.strip().casefold()
    return WORDS[word] if word in WORDS else number_of(word)


def is_unknown(cell: Any) -> bool:
    """Whether a cell is empty, or says that nobody knows."""
    return cell.strip().casefold() in _UNKNOWN if isinstance(cell, str) else cell is None or math.isnan(cell)
