"""Paths of the user's machine in what is about to be handed out: found, and reduced to their last part.

Any text may hold paths that nobody knows of; those are recognised by their form. Paths that are known, such as the
folders that a run was given, are recognised whatever they are made of: blanks, brackets, a single part.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

_ROOT_PARTS = 2
"""Of what may lie anywhere, such as `/home`."""
_PART = r"[\w.@+-]+"
# At least two parts, since "and/or" and "/" are not paths; not after a letter or colon, as in web addresses; not what
# every Linux has.
_UNKNOWN = (
    rf"(?<![\w.:/\\])(?!/(?:proc|dev)/)(?:(?:/{_PART}){{2,}}/?|[A-Za-z]:\\[\w.@+\\-]+|\\\\{_PART}(?:\\{_PART})+)"
    rf"|file:/+(?:{_PART}/?)+"
)
_WHOLE = re.compile(r"(?:/|~/|[A-Za-z]:\\)[^\n]*")
"""A text that is a path and nothing else, whatever its letters."""


def local_paths(settings: Mapping[str, Any]) -> list[str]:
    """The paths of this machine among the values of a record, as they are written there, in full, and what they lie in.

    Args:
        settings: Values by name, such as those of `train_config.json`.
    """
    found: set[str] = set()
    for value in settings.values():
        if isinstance(value, str) and not re.match(r"\w+://", value) and _is_path(value):
            full = Path(value).absolute()
            found |= {value, str(full), *(str(above) for above in full.parents if len(above.parts) > _ROOT_PARTS)}
    return sorted(found)


def _is_path(text: str) -> bool:
    try:
        return Path(text).is_absolute() or PureWindowsPath(text).is_absolute() or Path(text).exists()
    except (OSError, ValueError):  # too long for a name, or no name at all
        return False


def find_paths(text: str, known: Iterable[str] = ()) -> list[str]:
    """Paths of a machine in a text.

    Args:
        text: To be searched.
        known: Paths to find besides absolute ones; from `local_paths`.
    """
    return [match[0] for match in _pattern(known).finditer(text)]


def without_paths(value: Any, known: Iterable[str] = ()) -> Any:
    """The same value, with every path in its texts reduced to the last part.

    Args:
        value: Text, or lists and dictionaries of such.
        known: See `find_paths`.
    """
    return _shortened(value, _pattern(known))


def _shortened(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return _last_part(value) or value
    if isinstance(value, str):
        return pattern.sub(lambda match: _last_part(match[0]), value)
    if isinstance(value, dict):
        return {_shortened(key, pattern): _shortened(part, pattern) for key, part in value.items()}
    return [_shortened(part, pattern) for part in value] if isinstance(value, list | tuple) else value


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _pattern(known: Iterable[str]) -> re.Pattern[str]:
    own = [rf"(?<![\w.:/\\]){re.escape(path)}(?:[/\\]{_PART})*[/\\]?(?!\w)" for path in _telling(known)]
    return re.compile("|".join([*own, _UNKNOWN]))


def _telling(paths: Iterable[str]) -> Iterator[str]:
    """Paths that say more than their last part, longest first: one may be the beginning of another."""
    # It stays "~" where nobody knows it, as for a number without a name in a container.
    stripped = {path.rstrip("/\\") for path in (*paths, os.path.expanduser("~"))}  # noqa: PTH111 - `Path` raises
    return (path for path in sorted(stripped, key=len, reverse=True) if path and _last_part(path) != path)
