"""Standard output that says what it can, and what went wrong with it."""

import codecs
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

_ESCAPED = "medct.escaped"
# Control characters, separators of lines, and what turns the direction of the letters that follow.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def replace_closed() -> None:
    """Let output that this process was started without, as a service may be, lead nowhere.

    Else the next file that is opened would get the number, and with it what libraries written in C print.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the first that is free
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - until the end


def escape_unknown() -> None:
    """Let characters that the terminal's or the file's encoding lacks be printed as escapes, which JSON can read."""
    codecs.register_error(_ESCAPED, _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPED)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def visible(text: str) -> str:
    """A text as one line in which escapes, as JSON has them, stand for what a terminal would obey instead of showing.

    Names of files, for one, may hold anything.
    """
    return _OBEYED.sub(lambda match: json.dumps(match[0])[1:-1], text)


def as_word(text: str | os.PathLike) -> str:
    """A text as one word of a command that is to be copied into a shell of this system."""
    # Shells of Windows take single quotes for letters, and ours take every backslash for a reason to quote.
    quote = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    return quote([os.fspath(text)])


def flush_output() -> None:
    """Write out what has been printed, here and not when the process ends, where nobody could say what went wrong.

    Raises:
        OSError: If it cannot be written, of a full disk say; what is left of it is dropped.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise OSError(error.errno, error.strerror, "standard output") from error


def drop_output() -> None:
    """Let what has not been written out go nowhere: the interpreter would try once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
