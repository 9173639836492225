"""Which row of a table is a study's: the one whose name is the study's whole path, or else the longest end of it."""

from collections.abc import Container, Iterable


def matched(studies: Iterable[str], known: Container[str]) -> list[str | None]:
    """The known name that each study's path ends with; `None` if there is none.

    Args:
        studies: Names or paths of studies.
        known: Names in a table.
    """
    matched = []
    for study in studies:
        parts = str(study).replace("\\", "/").split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        matched.append(next((end for end in (study, *ends) if end in known), None))
    return matched
