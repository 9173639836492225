"""The base class of all errors that a user can fix, and what may be said of any other."""

import traceback
from pathlib import Path


class MedCTError(Exception):
    """An input, a setting or a place that cannot be used; the message says in one sentence what, where and the remedy.

    Any other exception is a bug of this package or of a library.
    """


def said_of(error: Exception) -> str:
    """Why a scan cannot be read: what a refusal of ours says; of anything else only what it is and where it arose.

    The text of a library may quote a header, which can name a patient. Ours are known by name: the processor's code
    may be another copy of this one.
    """
    if MedCTError.__name__ in (each.__name__ for each in type(error).__mro__):
        return str(error)
    what = ": ".join(filter(None, [type(error).__name__, getattr(error, "strerror", None)]))
    remedy = "Check the file and, if it is remote, the connection" if isinstance(error, OSError) else "Report this"
    return f"reading failed ({what} in {place_of(error)}). {remedy}."


def first_line(error: BaseException) -> str:
    """First line of a library's error message; the error's class if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def place_of(error: BaseException) -> str:
    """The file and line of code where an error arose."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}"


__all__ = ["MedCTError"]
