"""Trying again what failed in passing."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Answer = TypeVar("Answer")


def keep_trying(
    act: Callable[[], Answer],
    passes: Callable[[Exception], float | None],
    waits_s: Sequence[float],
    tell: Callable[[Exception, float], None] = lambda error, wait_s: None,
) -> Answer:
    """Do it, and again after failures that pass.

    Args:
        act: What to do.
        passes: Seconds to wait at least after a failure; `None` if trying again cannot help.
        waits_s: Seconds before each further attempt.
        tell: Called before each wait with the failure and the seconds.

    Raises:
        Exception: The last failure, or the first that does not pass.
    """
    for wait_s in waits_s:
        try:
            return act()
        except Exception as error:
            asked_s = passes(error)
            if asked_s is None:
                raise
            tell(error, max(wait_s, asked_s))
            time.sleep(max(wait_s, asked_s))
    return act()
