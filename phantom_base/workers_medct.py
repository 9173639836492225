"""Processes that load studies ahead of the one that uses them; a process that dies costs its study, not the run.

Torch's loader raises wherever its user happens to be when a worker dies, cannot tell which study it was at, and can
wait for ever for the rest of a message. Here each process has a pipe of its own and says which study it begins.

Unusual: volumes are written straight into memory that both sides map; see `shared_memory_medct`.
"""

import contextlib
import ctypes
import importlib
import math
import multiprocessing
import operator
import os
import pickle
import queue
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from transformers.dynamic_module_utils import init_hf_modules

from .errors_medct import MedCTError, first_line
from .shared_memory_medct import MEMORY, Receiver, Sender

_LOOK_S = 1.0
"""How often it is looked whether a process still lives, should its end of the pipe not tell."""
_LIKELY = {"SIGKILL": "the machine's memory was full", "SIGBUS": "shared memory was full"}
_OMP_PAUSE_SOFT = 1
"""From OpenMP's `omp.h`."""


def _end_threads() -> None:
    """End the threads that torch computes with in this one; they start again when they are needed.

    A forked process lacks them, and GNU's OpenMP would wait in it for ever for those that its parent had. Other
    kinds of OpenMP see to it themselves.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).omp_pause_resource_all(_OMP_PAUSE_SOFT)


if hasattr(os, "register_at_fork"):
    # One thread, since such processes are many as a rule, and threads of several processes wait for each other.
    os.register_at_fork(before=_end_threads, after_in_child=lambda: torch.set_num_threads(1))


class LoaderError(MedCTError, RuntimeError):
    """Loader processes that cannot be started; the message says what to do."""


class PicklesAnywhere:
    """Objects whose class came as remote code, and that other processes can unpickle all the same.

    `datasets.map(num_proc=2)` and spawned loader processes begin with an interpreter that does not know yet where the
    library keeps remote code.
    """

    def __reduce_ex__(self, protocol):
        if not type(self).__module__.startswith("transformers_modules."):
            return super().__reduce_ex__(protocol)
        # dill, which `datasets` pickles with, looks for modules in their packages, where the library has not put them.
        package, _, name = type(self).__module__.rpartition(".")
        setattr(importlib.import_module(package), name, sys.modules[type(self).__module__])
        reduced = (object.__new__, (type(self),), self.__dict__)
        # Parts are unpickled in their order: first the place of remote code, then the object.
        return operator.getitem, ((_AsReduced((init_hf_modules, ())), _AsReduced(reduced)), 1)


class _AsReduced:
    """Pickles as something else."""

    def __init__(self, reduced: tuple):
        self.reduced = reduced

    def __reduce_ex__(self, protocol):
        return self.reduced


@dataclass(frozen=True)
class Lost:
    """A study whose process died while it loaded it.

    Args:
        item: What was to be loaded.
        name: What `load` called it; "" if it had not come so far.
        reason: How the process ended.
    """

    item: Any
    name: str
    reason: str


class Place:
    """Where a study is loaded: here, the process that uses it."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory for what is loaded; a tensor that crosses to the user without a copy.

        Args:
            shape: Of the tensor.
            dtype: Of its elements.
        """
        return torch.empty(tuple(shape), dtype=dtype)

    def begin(self, name: str) -> None:
        """Say what the study is called, which is all that is known of it if this process dies."""


def load_ahead(
    items: Iterable[Any],
    load: Callable[[Any, Place], Any],
    num_workers: int = 0,
    batch_size: int = 1,
    pinned: bool = False,
) -> Generator[Any, None, None]:
    """Studies in their order, loaded by other processes.

    At most `num_workers * max(2, ceil(batch_size / num_workers))` studies are loaded, or being loaded, beyond the one
    that is given out: about a batch. Memory is that of so many, of one more a process, and of what the user holds.

    Args:
        items: What is to be loaded; taken one by one. With processes, each pickles.
        load: Makes of an item what is given out, both of which pickle.
        num_workers: Processes; 0 loads in this one, when asked.
        batch_size: Studies that are used together.
        pinned: Whether to pin the memory, so that a GPU fetches it by itself.

    Yields:
        What `load` returned, or a `Lost`.

    Raises:
        LoaderError: If processes cannot be started or are fewer than none, or an item does not pickle.
        Exception: What `load` or `items` raised, after the studies before.
    """
    if num_workers < 0:
        raise LoaderError(f"`num_workers` is {num_workers}. Pass a number of processes, or 0 for none.")
    if not num_workers:
        here = Place()
        for item in items:
            yield load(item, here)
        return
    per_worker = max(2, math.ceil(batch_size / num_workers))
    ahead = num_workers * per_worker
    pool = _Pool(iter(items), load, num_workers, per_worker, pinned)
    try:
        place = 0
        while pool.has(place, ahead):
            if isinstance(pool.done[place], _Raised):
                raise pool.done[place].error
            yield pool.done.pop(place)  # held by its user alone
            place += 1
    finally:
        pool.stop()


@dataclass(frozen=True)
class _Raised:
    error: Exception


class _Pool:
    """The processes, and where each study is."""

    def __init__(
        self, items: Iterator[Any], load: Callable[[Any, Place], Any], num_workers: int, per_worker: int, pinned: bool
    ):
        self.items, self.load, self.pinned = items, load, pinned
        self.num_workers, self.per_worker = num_workers, per_worker
        self.workers: list[_Worker] = []
        self.done: dict[int, Any] = {}
        self.again: deque[tuple[int, Any]] = deque()
        self.num_taken = 0
        # At the latest when the interpreter ends, before it takes apart what ending them needs.
        self.stop = weakref.finalize(self, _stop, os.getpid(), self.workers)

    def has(self, place: int, ahead: int) -> bool:
        """Wait for a study; returns whether there is one."""
        for worker in self.workers:
            worker.tell()  # what the last study has freed
        self._hand_out(place + ahead)
        while place not in self.done:
            if place == self.num_taken:
                return False
            self._look()
            self._hand_out(place + ahead)
        self._hand_out(place + 1 + ahead)
        return True

    def _hand_out(self, end: int) -> None:
        while self.again or self.num_taken < end:
            if self.again:
                place, item = self.again.popleft()
            else:
                try:
                    place, item = self.num_taken, next(self.items)
                except StopIteration:
                    return
                except Exception as error:  # the user's; those before it come first
                    self.done[self.num_taken], self.items = _Raised(error), iter(())
                    self.num_taken += 1
                    return
                self.num_taken += 1
            self._idlest().give(place, item)

    def _idlest(self) -> "_Worker":
        # The one that will be idle first: processors are not equally fast. But none may fill ever more memory.
        having_room = [worker for worker in self.workers if worker.held() <= self.per_worker]
        worker = min(having_room or self.workers, key=lambda each: (len(each.places), each.held()), default=None)
        if worker is None or (worker.places and len(self.workers) < self.num_workers):
            worker = _Worker(self.load, self.pinned)
            self.workers.append(worker)
        return worker

    def _look(self) -> None:
        wait([worker.connection for worker in self.workers], _LOOK_S)
        for worker in list(self.workers):
            if not worker.take(self.done):
                self.workers.remove(worker)
                self.again.extendleft(reversed(worker.left(self.done)))


def _stop(owner: int, workers: list["_Worker"]) -> None:
    if owner != os.getpid():  # a forked process, which has inherited the names of these alone
        return
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.stop()


class _Worker:
    """One process and what it was given to do."""

    def __init__(self, load: Callable[[Any, Place], Any], pinned: bool):
        if multiprocessing.current_process().daemon:
            raise LoaderError(
                "Processes such as those of `multiprocessing.Pool` and Celery may start no others. Leave out "
                "`num_workers` in them."
            )
        context = multiprocessing.get_context()
        self.connection, theirs = context.Pipe()
        # A forked process has this end, too, and would never see it closed.
        ours = self.connection if context.get_start_method() == "fork" else None
        self.process = context.Process(target=_Serving(load), args=(theirs, ours), daemon=True)
        self.process.start()
        theirs.close()
        self.receiver = Receiver(self.connection, pinned)
        self.places: deque[tuple[int, Any]] = deque()  # in their order; the first is being loaded
        self.begun: str | None = None  # name of that one; none while it waits
        self.has_served = False

    def held(self) -> int:
        """Studies that it has to load, and that lie in its memory."""
        return len(self.places) + len(self.receiver.lent)

    def give(self, place: int, item: Any) -> None:
        try:
            self.tell(item)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise LoaderError(
                f"What is to be loaded cannot be sent to a loader process ({first_line(error)}). Pass paths or bytes, "
                "or leave out `num_workers`."
            ) from error
        self.places.append((place, item))

    def tell(self, *items: Any) -> None:
        """What to load, and which memory is free again."""
        freed = self.receiver.take_freed()
        if items or freed:
            with contextlib.suppress(OSError):  # it has died, which `take` will find
                self.connection.send((items, freed))

    def take(self, done: dict[int, Any]) -> bool:
        """Put what has come into `done`; returns whether the process lives."""
        is_alive = self.process.is_alive()  # asked before looking for the last that it has sent
        try:
            while self.connection.poll():
                self._note(done, *self.receiver.receive())
        except (EOFError, OSError):
            return False
        return is_alive

    def _note(self, done: dict[int, Any], kind: str, content: Any) -> None:
        self.has_served = True
        if kind == "begun":
            self.begun = content
        elif kind != MEMORY:
            done[self.places.popleft()[0]], self.begun = content, None

    def left(self, done: dict[int, Any]) -> list[tuple[int, Any]]:
        """What a dead process has not done and is not to blame for; the study that it was at is put into `done`.

        Raises:
            LoaderError: If it ended by itself before it came to any study, as others would.
        """
        self.process.join(_LOOK_S)  # it can have closed the pipe just before
        self.stop()
        if not self.has_served and (self.process.exitcode or 0) > 0:
            raise LoaderError(
                f"No loader process can be started: the first {_end_of(self.process.exitcode)} and said why. A script "
                'that starts them guards what it does by `if __name__ == "__main__":`; or leave out `num_workers`.'
            )
        # One that was killed while it waited had not begun what it was given since; one that never served anything may
        # have died of its first study, or would die again.
        if self.places and (self.begun is not None or not self.has_served):
            place, item = self.places.popleft()
            done[place] = Lost(item, self.begun or "", f"its loader process {_end_of(self.process.exitcode)}")
        return list(self.places)

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(_LOOK_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _end_of(status: int | None) -> str:
    if status is None or status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name
        return f"was killed by {name}" + (f" (perhaps {_LIKELY[name]})" if name in _LIKELY else "")
    return f"was killed by signal {-status}"


# ---------------------------------------------------------------------------------------------------------------------
# In a loader process
# ---------------------------------------------------------------------------------------------------------------------


class _SharedPlace(Place):
    def __init__(self, sender: Sender):
        self.empty, self.sender = sender.empty, sender

    def begin(self, name: str) -> None:
        self.sender.tell("begun", name)


class _Serving(PicklesAnywhere):
    """What a process does: load the studies that it is told to, until nobody listens."""

    def __init__(self, load: Callable[[Any, Place], Any]):
        self.load = load

    def __call__(self, connection: Connection, ours: Any) -> None:
        if ours is not None:
            ours.close()
        # Ctrl-C reaches all processes of a terminal, and a forked one has the run's own handlers; the run ends this.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        sender, parent = Sender(connection), os.getppid()
        place = _SharedPlace(sender)
        waiting: deque[Any] = deque()
        with contextlib.suppress(EOFError, OSError):  # nobody listens any more
            while True:
                while not waiting or connection.poll():
                    if not connection.poll(_LOOK_S):
                        if os.getppid() != parent:  # processes that were forked later hold the pipe open
                            return
                        continue
                    items, freed = connection.recv()
                    waiting.extend(items)
                    sender.take_back(freed)
                place.begin("")  # until its name is known
                sender.send("done", self._loaded(waiting.popleft(), place))

    def _loaded(self, item: Any, place: Place) -> Any:
        try:
            return self.load(item, place)
        except Exception as error:
            return _Raised(_that_pickles(error))


def _that_pickles(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# ---------------------------------------------------------------------------------------------------------------------
# On the way to a GPU
# ---------------------------------------------------------------------------------------------------------------------


def overlapped(
    items: Generator[Any, None, None], device: torch.device | str, tensors_of: Callable[[Any], Iterable[torch.Tensor]]
) -> Generator[Any, None, None]:
    """Make items in a thread, one ahead, so that a GPU copies and prepares the next one while it uses the last.

    Args:
        items: Makes them, on the current stream of `device`.
        device: Where they are used; on a CPU they are made when asked for.
        tensors_of: Those of an item that lie on the device.

    Yields:
        The items, whole.

    Raises:
        Exception: What `items` raised, after the items before.
    """
    if torch.device(device).type != "cuda":
        with contextlib.closing(items):
            yield from items
        return
    # By its number, since a thread begins with the first one as the current one.
    device = torch.device("cuda", torch.cuda.current_device()) if torch.device(device).index is None else device
    ready: queue.Queue = queue.Queue(1)
    is_stopped = threading.Event()
    thread = threading.Thread(target=_make, args=(items, torch.device(device), ready, is_stopped), daemon=True)
    thread.start()
    try:
        while True:
            item, error, is_last = ready.get()
            if error is not None:
                raise error
            if is_last:
                return
            for tensor in tensors_of(item):  # whose memory must not be used again while this stream reads it
                tensor.record_stream(torch.cuda.current_stream(device))
            yield item
            del item
    finally:
        is_stopped.set()
        thread.join()


def _make(
    items: Generator[Any, None, None], device: torch.device, ready: queue.Queue, is_stopped: threading.Event
) -> None:
    def put(item: Any, error: BaseException | None = None, is_last: bool = False) -> None:
        while not is_stopped.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put((item, error, is_last), timeout=0.1)

    try:
        stream = torch.cuda.Stream(device)
        with contextlib.closing(items), torch.cuda.device(device), torch.cuda.stream(stream):
            for item in items:
                stream.synchronize()
                put(item)
                del item
                if is_stopped.is_set():
                    return
    except BaseException as error:
        put(None, error)
    else:
        put(None, is_last=True)


__all__ = ["LoaderError", "Lost", "PicklesAnywhere", "Place", "load_ahead", "overlapped"]
