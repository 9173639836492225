"""What loader processes hand over is whole and in order, in memory that is bounded and not overwritten while held."""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medct import shared_memory_medct
from medct.workers_medct import LoaderError, Lost, _Pool, _Serving, _stop, _Worker, load_ahead, overlapped

needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at processes there")


def fill(length, place):
    """A volume of so many voxels, each of which says its number, and one that is given up on the way."""
    place.begin(f"of {length}")
    place.empty((length + 7,), torch.int16).fill_(-1)
    volume = place.empty((length, 2)).copy_(torch.arange(2 * length).view(length, 2))
    return {"name": length, "volume": volume, "turned": volume.T, "small": torch.tensor([length])}


def assert_filled(found, length):
    expected = torch.arange(2 * length, dtype=torch.float32).view(length, 2)
    assert found["name"] == length == int(found["small"])
    assert torch.equal(found["volume"], expected) and torch.equal(found["turned"], expected.T)


@pytest.fixture(params=["anonymous files", "torch"])
def memory(request, monkeypatch):
    """Both kinds of shared memory."""
    if request.param == "torch":
        monkeypatch.setattr(shared_memory_medct, "_HAS_ANONYMOUS_FILES", False)
    elif not shared_memory_medct._HAS_ANONYMOUS_FILES:
        pytest.skip("there are none")


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_what_is_held_is_never_overwritten(memory, num_workers):
    lengths = [3, 1, 4000, 15, 9000, 2, 6, 5000] * 3
    held = list(load_ahead(lengths, fill, num_workers))
    for found, length in zip(held, lengths, strict=True):
        assert_filled(found, length)
    part = held[4]["volume"][10:12, 1]
    del held, found
    assert part.tolist() == [21, 23]


@needs_proc
@pytest.mark.parametrize("batch_size", [1, 5])
def test_memory_is_used_again(batch_size):
    """However many studies there are, no more is mapped than is read ahead, and one more a process."""
    most = 2 * (max(2, -(-batch_size // 2)) + 1)
    for found in load_ahead([1000] * 40, fill, 2, batch_size):
        assert_filled(found, 1000)
        assert len(mapped()) <= most + 2  # and what each process writes and does not send
    assert len(mapped()) == 1  # the last one's
    del found
    gc.collect()
    assert not mapped()


def mapped() -> set[str]:
    """Inodes of the shared memory that this process maps."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return {line.split()[4] for line in lines if "memfd:medct" in line}


def test_a_study_that_dies_keeps_those_before_it():
    """What a process had sent stays readable when it is gone."""
    studies = load_ahead(range(1, 9), die_at_five, 2)
    held = [next(studies) for _ in range(3)]
    held += studies
    lost = held.pop(4)
    assert lost == Lost(5, "of 5", lost.reason) and lost.reason.startswith("its loader process was killed by SIGKILL")
    for found, length in zip(held, (1, 2, 3, 4, 6, 7, 8), strict=True):
        assert_filled(found, length)
    assert not multiprocessing.active_children()


def die_at_five(length, place):
    found = fill(length, place)
    if length == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return found


def refuse_five(length, place):
    if length == 5:
        raise ValueError("five")
    return fill(length, place)


def lengths_that_end():
    yield from range(1, 5)
    raise ValueError("five")


@pytest.mark.parametrize(("items", "load"), [(range(1, 9), refuse_five), (lengths_that_end(), fill)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_come_after_the_studies_before(items, load, num_workers):
    items = lengths_that_end() if load is fill else items
    studies = load_ahead(items, load, num_workers)
    for length in range(1, 5):
        assert_filled(next(studies), length)
    with pytest.raises(ValueError, match="five"):
        next(studies)
    assert not multiprocessing.active_children()


def test_items_are_taken_no_earlier_than_they_are_read():
    taken = []
    studies = load_ahead((taken.append(k) or k + 1 for k in range(20)), fill, 2, batch_size=6)
    for count in range(1, 15):
        next(studies)
        assert len(taken) == min(20, count + 6)
    studies.close()
    assert not multiprocessing.active_children()
    assert list(load_ahead([], fill, 2)) == []


def load_slowly_in_one(folder_of_slow, place):
    """In the process that comes first each study takes long."""
    folder = Path(folder_of_slow)
    slow = folder / "slow"
    with contextlib.suppress(FileExistsError), slow.open("x") as file:
        file.write(str(os.getpid()))
        file.flush()
    is_slow = slow.read_text() == str(os.getpid())
    time.sleep(0.15 if is_slow else 0.05)
    return {"is_slow": is_slow, "volume": place.empty((1000,)).fill_(1)}


def test_slow_processes_get_fewer_studies(tmp_path):
    """No process is idle while another has studies waiting; memory sets a limit to that."""
    found = []
    for study in load_ahead([str(tmp_path)] * 24, load_slowly_in_one, 2):
        found.append(study["is_slow"])
        del study
    assert sum(found) < 12, found


def test_a_fast_process_fills_no_more_memory_than_its_share():
    pool = _Pool(iter(()), fill, num_workers=2, per_worker=2, pinned=False)
    fast, slow = SimpleNamespace(places=[], held=lambda: 3), SimpleNamespace(places=[0], held=lambda: 1)
    pool.workers = [fast, slow]
    assert pool._idlest() is slow
    fast.held = lambda: 2
    assert pool._idlest() is fast


def sleep(seconds, place):
    time.sleep(seconds)
    return seconds


def run_for_ever(told):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    studies = load_ahead([0] * 2 + [60] * 4, sleep, 2)
    told.send([next(studies), next(studies)])
    next(studies)


@needs_proc
def test_ctrl_c_ends_everything():
    """The terminal sends it to all processes of its group."""
    hears, tells = multiprocessing.Pipe()
    run = multiprocessing.Process(target=run_for_ever, args=(tells,))
    run.start()
    assert hears.recv() == [0, 0]
    assert len(group(run.pid)) == 3
    os.killpg(run.pid, signal.SIGINT)
    run.join(30)
    assert run.exitcode == 1  # by a KeyboardInterrupt
    assert not group(run.pid)


def test_studies_that_nobody_takes_end_with_the_interpreter_and_not_with_a_traceback():
    """As of `batches = iter(loader)` in a script: what ends processes is gone when such variables are deleted."""
    studies = load_ahead([3] * 20, fill, 2)
    next(studies)
    pool = studies.gi_frame.f_locals["pool"]
    processes = [worker.process for worker in pool.workers]
    _stop(os.getppid(), pool.workers)  # a forked process that ends
    assert all(each.is_alive() for each in processes)
    assert pool.stop.alive and pool.stop.atexit
    pool.stop()
    assert not any(each.is_alive() for each in processes)
    studies.close()


def group(leader: int) -> list[int]:
    """Processes of a group that live, or wait to be reaped."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(status.read_text(encoding="utf-8").rpartition(")")[2].split()[2]) == leader:
                found.append(int(status.parent.name))
    return found


def test_on_a_cpu_items_are_made_when_asked_for():
    made = []

    def make():
        with contextlib.suppress(GeneratorExit):
            for index in range(3):
                made.append(index)
                yield index
        made.append("closed")

    items = overlapped(make(), "cpu", lambda _: ())
    assert next(items) == 0 and made == [0]
    items.close()
    assert made == [0, "closed"]


def test_arrays_from_shared_memory_keep_it(memory):
    (found,) = load_ahead([50], fill, 1)
    array = found["volume"].numpy()
    del found
    gc.collect()
    assert np.array_equal(array.ravel(), np.arange(100))


def test_on_a_gpu_one_item_is_made_ahead_in_a_thread(fake_gpu):
    made, threads = [], set()

    def make():
        try:
            for index in range(9):
                made.append(index)
                threads.add(threading.current_thread())
                yield index
        finally:
            made.append("closed")

    items = overlapped(make(), "cuda", lambda _: ())
    for index in range(4):
        assert next(items) == index
        time.sleep(0.05)
        assert made[-1] <= index + 2  # one waits, and one is being made
    items.close()
    assert made[-1] == "closed"
    assert not any(thread.is_alive() for thread in threads) and threading.current_thread() not in threads


def test_on_a_gpu_errors_come_after_the_items_before(fake_gpu):
    items = overlapped(load_ahead(range(1, 9), refuse_five, 2), "cuda", lambda _: ())
    for length in range(1, 5):
        assert_filled(next(items), length)
    with pytest.raises(ValueError, match="five"):
        next(items)
    (found,) = overlapped(load_ahead([3], fill, 1), "cuda:1", lambda _: ())
    assert_filled(found, 3)
    assert not multiprocessing.active_children()


class OnCard:
    """Stands for a tensor on a card that a side stream has made."""

    def __init__(self, log, index):
        self.log, self.index = log, index

    def record_stream(self, stream):
        self.log.append((f"used on {stream}", self.index))


def test_on_a_gpu_an_item_is_whole_when_it_comes_and_stays_until_it_is_used(fake_gpu, monkeypatch):
    log, side = [], torch.cuda.Stream()
    side.synchronize = lambda: log.append("made")
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the user's stream of {device}")
    for item in overlapped((OnCard(log, index) for index in range(3)), "cuda:1", lambda item: [item]):
        assert ("used on the user's stream of cuda:1", item.index) in log
        assert log.count("made") > item.index


def of_a_dead_process(exitcode, begun, has_served):
    worker = object.__new__(_Worker)
    worker.process = SimpleNamespace(exitcode=exitcode, join=lambda *_: None, terminate=list, is_alive=bool)
    worker.connection = SimpleNamespace(close=list)
    worker.places, worker.begun, worker.has_served = deque([(0, "a"), (1, "b")]), begun, has_served
    return worker


@pytest.mark.parametrize("has_served", [False, True])
@pytest.mark.parametrize("begun", [None, "", "scan"])
def test_a_study_is_lost_with_the_process_that_was_at_it_or_never_came_to_one(has_served, begun):
    """Else a process that dies at once would be started for ever; what one has not begun goes to another."""
    done = {}
    left = of_a_dead_process(-9, begun, has_served).left(done)
    is_lost = begun is not None or not has_served
    assert left == [(1, "b")] if is_lost else left == [(0, "a"), (1, "b")]
    assert [(place, each.item, each.name) for place, each in done.items()] == [(0, "a", begun or "")] * is_lost


def test_no_study_is_blamed_for_processes_that_cannot_be_started():
    """As a script that starts them without a guard, where there is no fork."""
    worker = of_a_dead_process(1, begun=None, has_served=False)
    with pytest.raises(LoaderError, match=r"first ended with status 1 and said why\. .*`if __name__ == \"__main__\":`"):
        worker.left({})


def test_a_loader_process_computes_on_one_core(monkeypatch):
    """Several processes with a thread for each core would wait for each other."""
    threads = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    theirs, ours = multiprocessing.Pipe()
    ours.close()
    _Serving(fill)(theirs, None)
    assert threads == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_computes_after_its_parent_has():
    """On one thread, as workers of `datasets.map(num_proc=2)`, or on more, as those of `notebook_launcher`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(2**20).exp()  # by both threads
    child = os.fork()
    if child == 0:
        signal.alarm(5)  # ends it, should it wait for ever
        status = torch.get_num_threads() - 1
        torch.set_num_threads(2)
        torch.ones(2**20).exp()
        os._exit(status)
    torch.set_num_threads(threads)
    assert os.waitpid(child, 0)[1] == 0


def test_what_cannot_be_sent_to_a_process_is_said_in_a_sentence():
    said = r"^What is to be loaded cannot be sent .*BufferedReader.*Pass paths or bytes"
    with Path(__file__).open("rb") as file, pytest.raises(LoaderError, match=said):
        list(load_ahead([1, file], fill, 1))


def test_processes_that_may_start_none_are_told_so(monkeypatch):
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
    with pytest.raises(LoaderError, match=r"Pool` and Celery may start no others. Leave out `num_workers`"):
        next(load_ahead([1], fill, 1))
    assert_filled(next(load_ahead([1], fill)), 1)
