"""What is shown while a command works, and is not part of its result: bars for people, remarks."""

import sys

import tqdm as library

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
        print(text, file=sys.stderr)


class tqdm(library.tqdm):  # noqa: N801 - the library's own name
    """The library's bar, where a person is looking: never in a file, a pipe or a quiet process."""

    def __init__(self, *args, disable: bool = False, **kwargs):
        # `None` leaves it to the library to see whether this is a terminal.
        super().__init__(*args, disable=True if disable or _is_quiet else None, **kwargs)
