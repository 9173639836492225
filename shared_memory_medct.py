"""Tensors that cross from one process to another without a copy, in memory that is used again.

The sender writes them where both sides map the memory, and sends the rest pickled. Once the receiver has let go of all
tensors in a piece of memory and says so, the sender writes there again: nothing is zeroed or mapped anew, and a GPU
driver needs to pin it only once.
"""

import contextlib
import io
import math
import mmap
import os
import pickle
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

MEMORY = "memory"
_HAS_ANONYMOUS_FILES = hasattr(os, "memfd_create")


class _Memory:
    """Memory that two processes map. Nothing of it is left when both have let go, however they ended.

    It is an anonymous file where there are such: they are limited by the machine's memory alone, and not by /dev/shm,
    which containers keep small. Elsewhere it is torch's shared memory.
    """

    def __init__(self, num_bytes: int, file: int | None = None, tensor: torch.Tensor | None = None):
        self.file, self.tensor = file, tensor
        if not _HAS_ANONYMOUS_FILES:
            self.tensor = torch.empty(num_bytes, dtype=torch.uint8).share_memory_() if tensor is None else tensor
            self.array = self.tensor.numpy()
            return
        if file is None:
            self.file = os.memfd_create("medct")
            os.ftruncate(self.file, num_bytes)
        mapped = mmap.mmap(self.file, num_bytes)
        with contextlib.suppress(AttributeError, OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
        self.array = np.frombuffer(mapped, np.uint8)

    def send(self, connection: Connection) -> None:
        """To the process that a pipe leads to; it stays mapped here."""
        if self.file is None:
            connection.send(self.tensor)
        else:
            reduction.send_handle(connection, self.file, None)
            os.close(self.file)

    @classmethod
    def received(cls, connection: Connection, num_bytes: int) -> "_Memory":
        if not _HAS_ANONYMOUS_FILES:
            return cls(num_bytes, tensor=connection.recv())
        file = reduction.recv_handle(connection)
        try:
            return cls(num_bytes, file)
        finally:
            os.close(file)

    def pin(self) -> None:
        """Let GPUs read it by themselves, as long as it is mapped; if they refuse, they read it more slowly."""
        runtime, address = torch.cuda.cudart(), self.array.ctypes.data
        portable = 1  # for all GPUs
        if int(runtime.cudaHostRegister(address, self.array.nbytes, portable)) == 0:
            weakref.finalize(self, _unpin, os.getpid(), runtime, address).atexit = False


def _unpin(process: int, runtime: Any, address: int) -> None:
    if os.getpid() == process:  # forked ones inherit the memory, but not the driver
        runtime.cudaHostUnregister(address)


class Sender:
    """The side that fills memory.

    Args:
        connection: To the receiver.
    """

    def __init__(self, connection: Connection):
        self.connection = connection
        self.memories: list[_Memory] = []
        self.free: set[int] = set()
        self.in_use: set[int] = set()  # by what is sent next

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory for a tensor that is part of what is sent next.

        Args:
            shape: Of the tensor.
            dtype: Of its elements.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        index = self._memory_of(max(1, num_bytes))
        self.free.discard(index)
        self.in_use.add(index)
        return torch.from_numpy(self.memories[index].array)[:num_bytes].view(dtype).view(tuple(shape))

    def _memory_of(self, num_bytes: int) -> int:
        """Index of free memory of some size: the smallest that is large enough, else a larger one in its place."""
        sizes = {index: self.memories[index].array.nbytes for index in self.free}
        fitting = {index: size for index, size in sizes.items() if size >= num_bytes}
        index = min(fitting or sizes, key=sizes.__getitem__, default=len(self.memories))
        if not fitting:
            memory = _Memory(num_bytes)
            self.memories[index : index + 1] = [memory]
            self.tell(MEMORY, (index, num_bytes))
            memory.send(self.connection)
        return index

    def send(self, kind: str, content: Any) -> None:
        """Send what was made; memory that is not part of it is free again.

        Args:
            kind: What it is, for the receiver.
            content: What pickles, but for tensors from `empty`, which stay where they are.
        """
        message = io.BytesIO()
        pickler = _Pickler(message, {self.memories[index].array.ctypes.data: index for index in self.in_use})
        pickler.dump((kind, content))
        self.free |= self.in_use - pickler.sent
        self.in_use = set()
        self.connection.send_bytes(message.getbuffer())

    def tell(self, kind: str, content: Any) -> None:
        """Send something meanwhile.

        Args:
            kind, content: As in `send`.
        """
        self.connection.send_bytes(pickle.dumps((kind, content)))

    def take_back(self, freed: Iterable[int]) -> None:
        """Memory that the receiver has let go of; see `Receiver.take_freed`."""
        self.free.update(freed)


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, index_of: dict[int, int]):
        super().__init__(file)
        self.index_of, self.sent = index_of, set()

    def persistent_id(self, content: Any) -> tuple | None:
        if not isinstance(content, torch.Tensor) or content.device.type != "cpu":
            return None
        index = self.index_of.get(content.untyped_storage().data_ptr())
        if index is None:
            return None
        self.sent.add(index)
        return index, content.dtype, content.storage_offset(), tuple(content.shape), content.stride()


class Receiver:
    """The side that reads.

    Args:
        connection: To the sender.
        pinned: Whether to pin the memory for GPUs.

    Attributes:
        lent: Indices of the memory with something that was received and is still used.
    """

    def __init__(self, connection: Connection, pinned: bool = False):
        self.connection, self.pinned = connection, pinned
        self.memories: dict[int, _Memory] = {}
        self.lent: set[int] = set()
        self._freed: deque[int] = deque()

    def receive(self) -> tuple[str, Any]:
        """The next message: its kind and content. Tensors in it may be kept as long as one likes.

        One of the kind `MEMORY` concerns only this class.
        """
        kind, content = _Unpickler(self.connection.recv_bytes(), self).load()
        if kind == MEMORY:
            index, num_bytes = content
            self.memories[index] = _Memory.received(self.connection, num_bytes)
            if self.pinned:
                self.memories[index].pin()
        return kind, content

    def lend(self, index: int) -> torch.UntypedStorage:
        """Memory that is in use until nothing refers to the result any more."""
        view = self.memories[index].array[:]
        weakref.finalize(view, _let_go, self.lent, self._freed, index, self.memories[index]).atexit = False
        self.lent.add(index)
        return torch.from_numpy(view).untyped_storage()  # holds the view as long as it lives

    def take_freed(self) -> list[int]:
        """Indices of the memory that nothing uses any more, each once, to be told to the sender."""
        return [self._freed.popleft() for _ in range(len(self._freed))]


def _let_go(lent: set[int], freed: deque[int], index: int, memory: _Memory) -> None:
    """Nothing uses a piece of memory any more; it is named here so that it is mapped, and pinned, until now."""
    lent.discard(index)
    freed.append(index)


class _Unpickler(pickle.Unpickler):
    def __init__(self, message: bytes, receiver: Receiver):
        super().__init__(io.BytesIO(message))
        self.receiver = receiver
        self.storages: dict[int, torch.UntypedStorage] = {}

    def persistent_load(self, place: tuple) -> torch.Tensor:
        index, dtype, *layout = place
        if index not in self.storages:
            self.storages[index] = self.receiver.lend(index)
        return torch.empty(0, dtype=dtype).set_(self.storages[index], *layout)


__all__ = ["MEMORY", "Receiver", "Sender"]
