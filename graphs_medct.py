"""Launches on a card recorded once and replayed as one, as a CUDA graph.

A single volume keeps a card busy for less time than a processor needs to launch everything one by one. A recording
holds the addresses of weights, not their values: it follows what is written in place, and is made anew once one lies
elsewhere.
"""

import math
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .errors_medct import first_line

MOST_VOLUMES = 2
"""Of more volumes a card has enough to do while the next launches are made."""
_MOST_OFF = 1e-2
"""By how much a replay may differ, as a share of the result's length: the library may sum in another order."""

use_graphs = os.environ.get("MEDCT_GRAPHS") != "0"
"""Whether launches are recorded where they can be; the environment variable "0" has them made one by one."""
_recordings: weakref.WeakKeyDictionary[nn.Module, "_Recording"] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class _Recording:
    """What a module launches for inputs of one kind.

    Args:
        key: All that decides what is launched, and where.
    """

    def __init__(self, key: tuple):
        self.key = key
        self.graph: torch.cuda.CUDAGraph | None = None

    def record(self, run: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], rows: torch.Tensor) -> None:
        """Record, nothing is computed yet."""
        # Inference tensors could not be written outside of inference mode. And where torch fails to record, it leaves
        # the stream that it records on the current one.
        current = torch.cuda.stream(torch.cuda.current_stream(rows.device))
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(rows.device), current:
            self.rows = torch.empty_like(rows)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on, as those that pin memory.
            stream = torch.cuda.Stream(rows.device)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.results = run(self.rows)
        self.graph = graph

    def replay(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the module makes of other rows, in memory that no later replay writes to."""
        assert self.graph is not None
        with torch.cuda.device(rows.device):
            self.rows.copy_(rows)
            self.graph.replay()
            return tuple(each.clone() for each in self.results)


def can_replay(rows: torch.Tensor) -> bool:
    """Whether launches for some volumes are worth a recording, and can be recorded here and now.

    Args:
        rows: `(batch, ...)`.
    """
    if torch.compiler.is_compiling() or not use_graphs:  # a compiled program takes other batches, too
        return False
    if len(rows) > MOST_VOLUMES or torch.is_grad_enabled() or not rows.is_cuda:
        return False
    return not torch.cuda.is_current_stream_capturing()


def replayed(
    owner: nn.Module,
    run: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
    rows: torch.Tensor,
    weights: Iterable[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """`run(rows)`, from the third call of its kind on without launching everything one by one.

    The first call compiles what has to be compiled, the second records and compares. If nothing can be recorded, or
    what is replayed is not what was recorded, a warning says so, and this process records nothing more.

    Args:
        owner: Whose recording it is; one is kept for each.
        run: Launches the same for all `rows` of one shape, and reads nothing else that changes but `weights`.
        rows: On a card.
        weights: What `run` reads besides.
    """
    global use_graphs
    with _lock:
        key = _key(rows, weights)
        recording = _recordings.get(owner)
        if recording is None or recording.key != key:
            _recordings[owner] = _Recording(key)
            return run(rows)
        if recording.graph is not None:
            return recording.replay(rows)
        expected = run(rows)
        try:
            recording.record(run, rows)
            off = _distance(recording.replay(rows), expected)
        except RuntimeError as error:
            reason = f"cannot be recorded ({type(error).__name__}: {first_line(error)})"
        else:
            if off <= _MOST_OFF:
                return expected
            reason = f"are off by {off:.0%} when replayed"
        use_graphs = False
        _recordings.clear()
        warnings.warn(
            f"Launches on this card {reason}, so they are made one by one. That takes longer for single volumes only.",
            RuntimeWarning,
            stacklevel=2,
        )
        return expected


def _key(rows: torch.Tensor, weights: Iterable[torch.Tensor]) -> tuple[Any, ...]:
    """All that decides what is launched for `rows`, and what it reads."""
    stream = torch.cuda.current_stream(rows.device)
    of_rows = rows.shape, rows.dtype, rows.device, stream
    precision = torch.backends.cuda.matmul.fp32_precision
    return (*of_rows, precision, *((each.data_ptr(), each.dtype) for each in weights))


def _distance(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """The largest relative difference of two results, by norm; results without a length say nothing."""
    far = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        off, length = (ours.double() - theirs.double()).norm().item(), theirs.double().norm().item()
        if math.isfinite(length) and off > 0:
            far = max(far, off / max(length, 1e-9))
    return far
