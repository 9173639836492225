"""CUDA graphs imitated on the CPU: calls of torch are noted while one is recorded, and made again by a replay."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def replay(self) -> None:
        for function, args, kwargs, made in self.calls:
            again = function(*args, **kwargs)
            if not function.is_view:
                for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)


class _Noting(TorchDispatchMode):
    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, made))
        return made


class Streams:
    """Which stream is the current one."""

    current: Any = "main"

    @classmethod
    @contextmanager
    def stream(cls, stream: Any) -> Iterator[None]:
        before, cls.current = cls.current, stream
        try:
            yield
        finally:
            cls.current = before

    @classmethod
    @contextmanager
    def recording(cls, graph: Graph, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """As torch's, also in that the stream stays the current one if it fails."""
        assert capture_error_mode == "thread_local"
        before, cls.current = cls.current, stream
        with _Noting(graph):
            yield
        cls.current = before


def imitate(monkeypatch) -> None:
    """Put the imitation in the place of torch's own.

    Args:
        monkeypatch: pytest's fixture.
    """
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(Streams, "current", "main")
    monkeypatch.setattr(torch.cuda, "graph", Streams.recording)
    monkeypatch.setattr(torch.cuda, "stream", Streams.stream)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: "a new one")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Streams.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
