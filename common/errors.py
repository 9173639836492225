"""How a command ends: with an exit status and, if something went wrong, one sentence."""

import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from medct.common.output import drop_output, flush_output, replace_closed, visible
from medct.errors_medct import MedCTError, first_line, place_of

OK, SOME_FAILED, FAILED = 0, 1, 2
"""Everything was done; done, but some studies could not be read; not done."""
STOPPED = 75
"""Stopped on request, to be resumed; in sysexits.h, "temporary failure, try again"."""
INTERRUPTED, BROKEN_PIPE = 128 + 2, 128 + 13
"""The statuses that shells report for SIGINT and SIGPIPE."""
DEBUG_VARIABLE = "MEDCT_DEBUG"
_SOON_S = 0.01


class StoppedError(MedCTError):
    """Work that was stopped on request; the message says how to resume it."""


@contextlib.contextmanager
def one_line_errors(reword: Callable[[str], str] = str) -> Iterator[None]:
    """End the process with one line on stderr when the block raises, with the traceback if `MEDCT_DEBUG` is set.

    Errors that a user can fix (`MedCTError`, and those of the operating system) are printed as they are. Anything else
    is a bug, and its line also names the place it came from.

    Args:
        reword: Puts a message into the words of the command.
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
            print(visible(reword(line)), file=sys.stderr)
        sys.exit(status)


def run_process(main: Callable[[], int | None]) -> NoReturn:
    """Run a command in a process of its own, which ends without taking apart what the command imported.

    Python would look for garbage in all of it, for a fifth of the time that one scan takes. Keeping it from that by
    `gc.freeze` is not enough, because Triton from 3.9 on reports whatever is still there at the end.

    Args:
        main: Imports what it needs, and returns the exit status or raises `SystemExit` with it.
    """
    statuses: list[int] = []

    def end() -> None:
        if statuses:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(statuses[0])

    replace_closed()
    # Otherwise the first process of a container would not hear it, and others would leave what Ctrl-C clears away.
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # those of a launch hear nothing while they wait
    if is_alone and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.unraisablehook = _interrupt_again
    atexit.register(end)  # before all that `main` and its imports register, so called after them
    try:
        with one_line_errors(), contextlib.ExitStack() as stack:
            stack.callback(flush_output)  # while what goes wrong with it can still be said
            sys.exit(main())
    except SystemExit as ending:
        if not isinstance(ending.code, str):  # which Python still has to print
            statuses.append(ending.code or OK)
        raise


def _interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Python drops what is raised in a callback of a weak reference, of which each import has one: Ctrl-C, too."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    # A job in the background ignores Ctrl-C.
    heard = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT
    # Not from here, where it would be dropped as well.
    again = functools.partial(signal.pthread_kill, threading.main_thread().ident, heard)
    threading.Timer(_SOON_S, again).start()


def _end_of(error: BaseException) -> tuple[int, str]:
    """Exit status and last line of a command."""
    match error:
        case StoppedError():
            return STOPPED, str(error)
        case KeyboardInterrupt():
            return (
                INTERRUPTED,
                "stopped; `predict --output`, `embed` and `prepare` continue from here when run again.",
            )
        case BrokenPipeError():
            drop_output()  # the reader has had enough
            return BROKEN_PIPE, ""
        case MedCTError():
            return FAILED, f"error: {error}"
        case OSError(filename=str() as name, strerror=str() as reason):
            return FAILED, f"error: {name}: {reason}."
        case OSError():
            return FAILED, f"error: {error}"
    if (memory := _full_memory(error)) is not None:
        return FAILED, f"error: {memory} is full. Lower --batch_size, or use bfloat16."
    if (line := _lost_others(error)) is not None:
        return FAILED, line
    report = f"Please report this, with the traceback that {DEBUG_VARIABLE}=1 shows"
    return FAILED, f"error: {type(error).__name__}: {first_line(error)} ({place_of(error)}). {report}."


def _full_memory(error: BaseException) -> str | None:
    """The memory that there was not enough of; torch has a class only for that of some accelerators."""
    torch = sys.modules.get("torch")  # not worth importing just for this
    if (torch is not None and isinstance(error, torch.OutOfMemoryError)) or "MPS backend out of memory" in str(error):
        return "the accelerator's memory"
    return "this machine's memory" if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) else None


def _lost_others(error: BaseException) -> str | None:
    """What a process says when another one of its launch has ended or cannot be reached; `None` of any other error."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, getattr(torch.distributed, "DistError", ())):
        detail = f" ({first_line(error)})"  # such as a port that is taken
    elif isinstance(error, RuntimeError) and "/gloo/" in str(error):  # which has no class of its own
        detail = ""
    else:
        return None
    return (
        f"error: lost the other processes of this launch{detail}. See which of them ended and what it said, and start "
        "all of them again; a training run continues with --resume."
    )
