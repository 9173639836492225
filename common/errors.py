"""How a command ends: with an exit status, and if something is wrong with one sentence."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from medct.errors_medct import MedCTError

OK, SOME_FAILED, FAILED = 0, 1, 2
"""All is done; done, but some studies could not be read; it could not be done."""
STOPPED = 75
"""Stopped on request and to be resumed; of sysexits.h, "temporary failure, try again"."""
INTERRUPTED, BROKEN_PIPE = 128 + 2, 128 + 13
"""As shells report SIGINT and SIGPIPE."""
DEBUG_VARIABLE = "MEDCT_DEBUG"


class StoppedError(MedCTError):
    """Work that was stopped on request; the message says how to resume it."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, without what follows."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line on stderr when the block raises, with the traceback if `MEDCT_DEBUG` is set.

    What a user can mend (`MedCTError`, and what the system reports) is said as it is. Anything else is a fault: its
    line names the place it came from as well.
    """
    try:
        yield
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exception(error)
        status, line = _end_of(error)
        if line:
            print(line, file=sys.stderr)
        sys.exit(status)


def _end_of(error: BaseException) -> tuple[int, str]:
    """Exit status and last line of a command."""
    torch = sys.modules.get("torch")  # not imported for this
    match error:
        case StoppedError():
            return STOPPED, str(error)
        case KeyboardInterrupt():
            return INTERRUPTED, "stopped; a command with --output resumes from here when it is run again."
        case BrokenPipeError():
            # Whoever reads has enough. The interpreter must not try to flush once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE, ""
        case MedCTError():
            return FAILED, f"error: {error}"
        case OSError(filename=str() as name, strerror=str() as reason):
            return FAILED, f"error: {name}: {reason}."
        case OSError():
            return FAILED, f"error: {error}"
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return FAILED, "error: the accelerator's memory is full. Lower --batch_size, or use bfloat16."
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    report = f"Please report this, with the traceback that {DEBUG_VARIABLE}=1 shows"
    return FAILED, f"error: {type(error).__name__}: {first_line(error)} ({where}). {report}."
