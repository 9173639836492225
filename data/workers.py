"""Processes that load studies ahead of the one that uses them; a process that dies costs its study, not the run.

Torch's loader raises wherever its user happens to be when a worker dies, cannot tell which study it was at, and can
wait for ever for the rest of a message. Here each process has a pipe of its own and says which study it begins.
"""

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # how tensors are pickled: through shared memory

from medct.data.sources import Row, Skipped

_LOOK_S = 1.0
"""How often it is looked whether a process still lives, should its end of the pipe not tell."""
_LIKELY = {"SIGKILL": "the machine's memory was full", "SIGBUS": "shared memory, /dev/shm, was full"}


def load_in_processes(
    keys: Sequence[int],
    read: Callable[[int], Row],
    load: Callable[[Row], Row | Skipped],
    num_workers: int,
    ahead: int,
) -> Iterator[Row | Skipped]:
    """Studies in the order of their keys, loaded by other processes.

    Args:
        keys: Of the studies.
        read: Makes the row of a key; see `Source.read`.
        load: Makes of it what is given out. Both pickle.
        num_workers: Processes, 1 or more.
        ahead: Studies that are loaded, or being loaded, beyond the one that is given out.

    Yields:
        What `load` returned, or a `Skipped` of a study whose process died while it loaded it.

    Raises:
        Exception: What `read` raised.
    """
    workers = [_Worker(read, load) for _ in range(num_workers)]
    done: dict[int, Row | Skipped] = {}
    waiting = deque(range(len(keys)))

    def hand_out(end: int) -> None:
        while waiting and waiting[0] < end:
            place = waiting.popleft()
            min(workers, key=lambda worker: len(worker.places)).give(place, keys[place])

    try:
        for place in range(len(keys)):
            while place not in done:
                hand_out(place + ahead)
                wait([worker.connection for worker in workers], _LOOK_S)
                for index, worker in enumerate(workers):
                    if worker.take(done):
                        continue
                    waiting.extendleft(reversed(worker.left(keys, done)))
                    workers[index] = _Worker(read, load)
            hand_out(place + 1 + ahead)
            yield done.pop(place)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process and what it was given to do."""

    def __init__(self, read: Callable[[int], Row], load: Callable[[Row], Row | Skipped]):
        context = multiprocessing.get_context()
        self.connection, theirs = context.Pipe()
        # A forked process has this end, too, and would never see it closed.
        ours = self.connection if context.get_start_method() == "fork" else None
        self.process = context.Process(target=_serve, args=(theirs, ours, read, load), daemon=True)
        self.process.start()
        theirs.close()
        self.places: deque[int] = deque()  # in their order; the first is being loaded
        self.begun: str | None = None  # id of that one, or its number while that is not known
        self.has_served = False
        self.lost: list[int] = []  # places whose studies were loaded and did not arrive

    def give(self, place: int, key: int) -> None:
        self.places.append(place)
        with contextlib.suppress(OSError):  # it has died, which `take` will find
            self.connection.send(key)

    def take(self, done: dict[int, Row | Skipped]) -> bool:
        """Put what has come into `done`; returns whether the process lives."""
        is_alive = self.process.is_alive()  # asked before looking for the last that it has sent
        while True:
            try:
                if not self.connection.poll():
                    return is_alive
                message = self.connection.recv_bytes()
            except (EOFError, OSError):
                return False
            self._note(message, done)

    def _note(self, message: bytes, done: dict[int, Row | Skipped]) -> None:
        self.has_served = True
        try:
            content = ForkingPickler.loads(message)
        except Exception:
            self.process.join(_LOOK_S)
            if self.process.is_alive():
                raise
            # Its tensors are gone from shared memory with the process, so it is to be loaded again.
            self.lost.append(self.places.popleft())
            self.begun = None
            return
        match content:
            case str():
                self.begun = content
            case Exception():
                raise content
            case _:
                done[self.places.popleft()], self.begun = content, None

    def left(self, keys: Sequence[int], done: dict[int, Row | Skipped]) -> list[int]:
        """What a dead process has not done and is not to blame for; the study that it was at is put into `done`."""
        self.process.join(_LOOK_S)  # it can have closed the pipe just before
        self.stop()
        # One that was killed while it waited had not begun what it was given since; one that never served anything may
        # have died of its first study, or would die again.
        if self.places and (self.begun or not self.has_served):
            first = self.places.popleft()
            name = self.begun or f"study {keys[first]}"
            done[first] = Skipped(name, f"its loader process {_end_of(self.process.exitcode)}")
        return sorted((*self.lost, *self.places))

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


def _serve(connection: Connection, ours: Any, read: Callable[[int], Row], load: Callable[[Row], Row | Skipped]) -> None:
    """What a process does: load the studies that it is told to, until nobody listens."""
    if ours is not None:
        ours.close()
    # Ctrl-C reaches all processes of a terminal, and a forked one has the run's own handlers; the run ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    parent = os.getppid()
    with contextlib.suppress(EOFError, OSError):  # nobody listens any more
        while True:
            while not connection.poll(_LOOK_S):
                if os.getppid() != parent:  # processes that were forked later hold the pipe open
                    return
            key = connection.recv()
            connection.send(f"study {key}")  # until its id is known
            try:
                row = read(key)
            except Exception as error:
                connection.send(_that_pickles(error))
                continue
            connection.send(row["id"])
            connection.send(load(row))


def _that_pickles(error: Exception) -> Exception:
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
