"""Wishes to end a run after the step that it is at."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import torch

from medct.common.distributed import sum_over_processes


class StopWish:
    """Whether this process, or another of the run, was told to stop.

    Attributes:
        by: Name of the signal that told this process, such as `SIGTERM`; empty before.
    """

    def __init__(self) -> None:
        self.by = ""

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Within it, SIGTERM and Ctrl-C are noted instead of obeyed; a second Ctrl-C is not put off.

        Raises:
            KeyboardInterrupt: At the second Ctrl-C.
        """

        def note(number: int, *_: Any) -> None:
            if self.by and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.by = signal.Signals(number).name

        before: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # in a thread, which gets no signals
            for each in (signal.SIGTERM, signal.SIGINT):
                # A job in the background ignores Ctrl-C, which is meant for another.
                if signal.getsignal(each) is not signal.SIG_IGN:
                    before[each] = signal.signal(each, note)
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def is_anyones(self, device: torch.device) -> bool:
        """Whether any process was told to stop; all of them hear the same after the same step."""
        return bool(sum_over_processes(torch.tensor(float(bool(self.by)), device=device)))
