"""What is shown while a command works, and is not part of its result: bars for people, remarks."""

import sys

import tqdm as library

from medct.common.output import visible

SHOWN_AFTER_SECONDS = 2.0
"""When a bar appears of what takes no time for a few studies."""
LINE_SECONDS = 60.0
"""How often a run whose output goes to a file says there how far it is; one that is done sooner never does."""
_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

_is_quiet = False


def be_quiet(quiet: bool = True) -> None:
    """Show no bars and no remarks in this process; errors are told all the same.

    Args:
        quiet: Whether from now on.
    """
    global _is_quiet
    _is_quiet = quiet


def remark(text: str) -> None:
    """Tell on standard error what is good to know."""
    if not _is_quiet:
        print(visible(text), file=sys.stderr)


class tqdm(library.tqdm):  # noqa: N801 - the library's own name
    """The library's bar, on standard error: where a person is looking a bar, in a file a line now and then."""

    def __init__(self, *args, disable: bool = False, **kwargs):
        if not sys.stderr.isatty():
            # The clock is looked at after every step; else a thread of the library's would, and write a second line.
            times = {"delay": LINE_SECONDS, "mininterval": LINE_SECONDS, "miniters": 1}
            # The first position of a screen, for a bar within another would move the cursor.
            kwargs |= {"file": _Lines(), "bar_format": _LINE, "position": 0, **times}
        super().__init__(*args, disable=disable or _is_quiet, **kwargs)


class _Lines:
    """Takes what would be written over a bar, and writes it to standard error as a line."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()
