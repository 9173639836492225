"""Retrying what failed temporarily."""

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
    """Call a function, and call it again after temporary failures.

    Args:
        act: The function.
        passes: Returns the least number of seconds to wait after a failure, or `None` if a retry cannot help.
        waits_s: Seconds to wait before each retry.
        tell: Called before each wait with the failure and the seconds.

    Returns:
        What `act` returned.

    Raises:
        Exception: The last failure, or the first permanent one.
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
