"""Which row of a table is a study's: the one whose name is the study's whole path, or else the longest end of it.

Unusual: a letter with an accent can be one character or two, which nobody sees; macOS and its archives give files the
one, keyboards and programs for tables the other. Names are compared with their accents composed.
"""

import unicodedata
from collections.abc import Container, Iterable


def composed(name: str) -> str:
    """A name as it is compared with others: its accents composed, in Unicode's form C."""
    return unicodedata.normalize("NFC", name)


def matched(studies: Iterable[str], known: Container[str]) -> list[str | None]:
    """The known name that each study's path ends with; `None` if there is none.

    Args:
        studies: Names or paths of studies.
        known: Names in a table, `composed`.
    """
    matched = []
    for study in studies:
        name = composed(str(study))
        parts = name.replace("\\", "/").split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        matched.append(next((end for end in (name, *ends) if end in known), None))
    return matched
