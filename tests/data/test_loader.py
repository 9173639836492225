"""Batches stay full, every study comes once, and a resumed run gets the batch that would have come."""

import contextlib
import faulthandler
import gc
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from medct import CT_CLIP_LABELS, VolumeError
from medct.data import DataError, Source, StudyLoader, phantom_source, report_id
from medct.data import loader as loader_module
from medct.data.loader import LoadRow
from medct.data.prepared import PreparedVolume
from medct.data.sources import Deferred, too_many_bad
from medct.data.tables import Selection, Sieve, table_source
from medct.workers_medct import load_ahead, overlapped

NAMES = ("one", "two")
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


class Prepared(PreparedVolume):
    """A volume that is its number everywhere."""

    def load(self, place):
        return place.empty(self.shape, torch.int16).fill_(self.row)


class Rows:
    """Rows of tiny arrays; some hold something other than a volume."""

    def __init__(self, bad=(), prepared=False):
        self.bad, self.prepared = set(bad), prepared

    def __call__(self, key):
        volume = np.full((4, 4, 4), 10 * (key % 50) - 1000, np.int16)
        volume[0, 0, 0] = -1024
        row = {"id": f"study-{key}", "patient": f"p{key // 2}", "report": "a" * (key % 3), "labels": [key % 2, np.nan]}
        if self.prepared:
            return {**row, "volume": Prepared("", key, (8, 12, 8))}
        return {**row, "volume": "nothing.nii.gz" if key in self.bad else volume, "affine": AFFINE}


def make_source(count=23, bad=(), prepared=False):
    return Source([(key,) for key in range(count)], Rows(bad, prepared), NAMES, f"{count} tiny studies")


def make_loader(processor, source=None, **settings):
    settings = {"batch_size": 4, "with_text": False, "seed": 1, **settings}
    return StudyLoader(source or make_source(), processor, NAMES, **settings)


def ids_of(loader, epochs=2):
    """Ids in each batch of some epochs."""
    batches = []
    while loader.epoch < epochs:
        batches += [batch["ids"] for batch in loader]
    return batches


def all_of(loader, epochs=1):
    """Ids of some epochs, in order."""
    return list(itertools.chain.from_iterable(ids_of(loader, epochs)))


def first_of(loader, count):
    """The first batches, across the ends of epochs, and the state after them."""
    batches = []
    while True:
        for batch in loader:
            batches.append(batch["ids"])
            if len(batches) == count:
                return batches, pickle.loads(pickle.dumps(loader.state_dict()))


def test_a_batch(processor):
    (batch,) = make_loader(processor, make_source(3), batch_size=3, with_text=True, seed=None)
    assert batch["ids"] == ["study-0", "study-1", "study-2"]
    assert batch["patients"] == ["p0", "p0", "p1"]
    assert batch["pixel_values"].shape == (3, 1, 8, 12, 8)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"][:, 0].tolist() == [0, 1, 0] and batch["labels"][:, 1].isnan().all()
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 3)
    assert batch["report_ids"].tolist() == [0, report_id("a"), report_id("aa")]
    assert batch["report_ids"].dtype == torch.int64
    assert len(set(batch["report_ids"].tolist())) == 3


def test_each_epoch_is_another_full_permutation(processor):
    loader = make_loader(processor)
    batches = ids_of(loader, epochs=2)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 3] * 2
    names = list(itertools.chain.from_iterable(batches))
    first, second = names[:23], names[23:]
    everyone = [f"study-{key}" for key in range(23)]
    assert sorted(first) == sorted(second) == sorted(everyone)
    assert first != second and first != everyone
    assert ids_of(make_loader(processor)) == batches
    assert ids_of(make_loader(processor, seed=2)) != batches
    assert all_of(make_loader(processor, seed=None)) == everyone


def test_the_order_does_not_depend_on_the_workers(processor):
    expected = ids_of(make_loader(processor))
    for num_workers in (1, 2):
        assert ids_of(make_loader(processor, num_workers=num_workers)) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_see_each_study_once(processor, num_workers):
    parts = [all_of(make_loader(processor, rank=rank, world_size=2, num_workers=num_workers)) for rank in range(2)]
    assert [len(part) for part in parts] == [12, 11]
    assert sorted(parts[0] + parts[1]) == sorted(f"study-{key}" for key in range(23))


@pytest.mark.parametrize(
    ("workers", "count"),
    [*((workers, count) for workers in ((0, 0), (2, 2)) for count in (1, 4, 6, 8)), ((2, 0), 4), ((0, 1), 6)],
)
def test_a_resumed_run_gets_the_batch_that_would_have_come(processor, workers, count):
    source = make_source(23, bad=[3, 11])
    settings = {"max_bad_share": 0.2, "drop_last": True}
    expected = make_loader(processor, source, **settings)
    batches = ids_of(expected, epochs=3)
    before, state = first_of(make_loader(processor, source, num_workers=workers[0], **settings), count)
    again = make_loader(processor, source, num_workers=workers[1], **settings)
    again.load_state_dict(state)
    assert again.epoch == (0 if count <= 5 else 1)
    assert before + ids_of(again, epochs=3) == batches
    assert again.state_dict() == expected.state_dict()


@pytest.mark.parametrize("count", [1, 4, 6])
def test_a_batch_ahead_does_not_count(processor, fake_gpu, monkeypatch, count):
    """On a GPU the next batch is made meanwhile, and bad studies are met early."""
    source, settings = make_source(23, bad=[3, 11]), {"max_bad_share": 0.2, "num_workers": 2}
    batches = ids_of(make_loader(processor, source, **settings), epochs=3)
    monkeypatch.setattr(
        loader_module, "overlapped", lambda items, device, tensors: overlapped(items, "cuda", lambda _: ())
    )
    before, state = first_of(make_loader(processor, source, **settings), count)
    again = make_loader(processor, source, **settings)
    again.load_state_dict(state)
    assert before + ids_of(again, epochs=3) == batches


def test_an_abandoned_pass_starts_again(processor):
    loader = make_loader(processor)
    first = next(iter(loader))["ids"]
    assert loader.epoch == 0
    assert next(iter(loader))["ids"] == first


def test_the_state_of_another_run_is_refused(processor):
    state = make_loader(processor).state_dict()
    for other in (
        make_loader(processor, make_source(24)),
        make_loader(processor, seed=2),
        make_loader(processor, world_size=2),
    ):
        with pytest.raises(DataError, match="Resume with the same data and settings"):
            other.load_state_dict(state)


def test_loading_draws_no_global_random_numbers(processor):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    ids_of(make_loader(processor), epochs=2)
    assert torch.rand(1) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_studies_are_skipped_and_listed(processor, tmp_path, num_workers):
    listed = tmp_path / "bad.jsonl"
    source = make_source(40, bad=[7, 8])
    loader = make_loader(processor, source, bad_samples_file=listed, num_workers=num_workers, max_bad_share=0.1)
    assert [len(batch) for batch in ids_of(loader, epochs=1)] == [4] * 9 + [2]
    assert (loader.num_bad, loader.num_seen) == (2, 40)
    lines = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    assert {line["id"] for line in lines} == {"study-7", "study-8"}
    assert lines[0]["epoch"] == 0
    assert lines[0]["reason"].startswith("nothing.nii.gz: it cannot be read")


def test_a_bad_study_may_end_the_run(processor):
    loader = make_loader(processor, make_source(6, bad=[5]), on_bad_sample="raise")
    with pytest.raises(DataError, match="study-5 cannot be used: nothing"):
        ids_of(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_studies_end_the_run(processor, num_workers):
    loader = make_loader(processor, make_source(40, bad=range(0, 40, 4)), num_workers=num_workers)
    with pytest.raises(DataError, match=r"6 of \d+ studies cannot be used, more than the allowed share of 0.05; the l"):
        ids_of(loader)
    few = make_loader(processor, make_source(36, bad=range(5)))  # of so few studies, a share says little
    assert [len(part) for part in (all_of(few, 3), all_of(few, 6))] == [3 * 31] * 2
    assert (few.num_bad, few.num_seen) == (5, 36)  # of the last pass: the same studies come again in each
    strict = make_loader(processor, make_source(36, bad=[1]), max_bad_share=0)
    with pytest.raises(DataError, match="the last: study-1"):
        ids_of(strict)


def test_a_share_is_judged_over_a_hundred_studies_or_more():
    assert not too_many_bad(5, 10, 0.05) and too_many_bad(6, 10, 0.05)
    assert not too_many_bad(50, 1000, 0.05) and too_many_bad(51, 1000, 0.05)
    assert not too_many_bad(1000, 1000, 1.0)


def test_a_bad_study_is_listed_once_however_often_it_is_met(processor, tmp_path):
    """In three epochs, by two processes between which studies change, and after the run was resumed."""
    source, settings = make_source(40, bad=[7, 8]), {"bad_samples_file": tmp_path / "bad.jsonl"}
    for rank in range(2):
        loader = make_loader(processor, source, rank=rank, world_size=2, **settings)
        ids_of(loader, epochs=3)
    again = make_loader(processor, source, rank=1, world_size=2, **settings)
    again.load_state_dict(loader.state_dict())
    ids_of(again, epochs=5)
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(line["id"] for line in lines) == ["study-7", "study-8"]


class NotedRows(Rows):
    """Writes a file for each row that is read."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __call__(self, key):
        (self.folder / str(key)).touch()
        return super().__call__(key)


def test_single_volumes_are_freed_while_their_batch_is_used(processor, monkeypatch):
    volumes, load = [], LoadRow.__call__

    def noted(self, row, place):
        study = load(self, row, place)
        volumes.append(weakref.ref(study["part"]))
        return study

    monkeypatch.setattr(LoadRow, "__call__", noted)
    batches = iter(make_loader(processor))
    for count in (1, 2):
        next(batches)
        assert len(volumes) == 4 * count
        assert not any(volume() is not None for volume in volumes)


@pytest.mark.parametrize(("num_workers", "ahead"), [(0, 0), (1, 4), (2, 4)])
def test_no_more_is_read_ahead_than_documented(processor, tmp_path, num_workers, ahead):
    source = Source([(key,) for key in range(60)], NotedRows(tmp_path), NAMES, "60 tiny studies")
    batches = iter(make_loader(processor, source, num_workers=num_workers))
    for count in (1, 2):
        next(batches)
        time.sleep(0.3)  # the workers read all they may
        assert len(list(tmp_path.iterdir())) <= 4 * count + ahead


def test_a_pass_without_a_batch_is_refused(processor):
    with pytest.raises(DataError, match=r"no batch of 4 \(3 of 3 studies could not be read\)"):
        ids_of(make_loader(processor, make_source(3, bad=range(3))))
    with pytest.raises(DataError, match="Lower the batch size"):
        ids_of(make_loader(processor, make_source(3), drop_last=True))


def test_other_labels_than_the_models_are_refused(processor):
    with pytest.raises(DataError, match=r"its labels \(one, two\) are not the model's \(two, one\)"):
        StudyLoader(make_source(), processor, ["two", "one"], batch_size=2, with_text=False)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prepared_volumes_become_the_models_unit(processor, num_workers):
    (batch,) = make_loader(processor, make_source(3, prepared=True), seed=None, num_workers=num_workers)
    assert batch["pixel_values"].dtype == torch.float32
    expected = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1, 1).expand(3, 1, 8, 12, 8) / 1000
    assert torch.equal(batch["pixel_values"], expected)


def test_prepared_volumes_of_another_size_are_bad(processor):
    processor.image_processor.image_size = [4, 4, 4]
    loader = make_loader(processor, make_source(3, prepared=True), on_bad_sample="raise")
    with pytest.raises(DataError, match=r"it has shape \(8, 12, 8\). Prepare it for this model"):
        next(iter(loader))


def test_a_source_is_a_stream_of_datasets():
    source = make_source(10)
    stream = source.stream(epoch=1, seed=3)
    assert isinstance(stream, IterableDataset)
    everyone = [row["id"] for row in stream]
    assert everyone == [f"study-{key}" for key in source.keys(1, 3)]
    parts = [
        [row["id"] for row in DataLoader(part, batch_size=None, num_workers=2)]
        for part in (split_dataset_by_node(stream, rank, 2, strategy="shards") for rank in range(2))
    ]
    assert sorted(parts[0] + parts[1]) == sorted(everyone)
    rows = iter(stream)
    seen = [next(rows)["id"] for _ in range(4)]
    state = stream.state_dict()
    del rows
    again = source.stream(epoch=1, seed=3)
    again.load_state_dict(state)
    assert seen + [row["id"] for row in again] == everyone


def test_memory_does_not_grow_with_the_source():
    """With 25 times as many studies, the tables are larger, but nothing accumulates while they stream."""

    def objects_while_streaming(count):
        """Number of objects, and how many more there are after 150 rows."""
        columns = {"report": "Clear.", "volume": "scan.nii.gz", "one": 1.0}
        names = [f"{number:05d}" for number in range(count)]
        sieve = Sieve(pd.DataFrame({"id": names, "patient": names, **columns}))
        stream = iter(table_source(sieve, ["one"], str, Selection("train"), "tables").stream(seed=0))
        next(stream)
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(150):
            next(stream)
        gc.collect()
        return before, len(gc.get_objects()) - before

    objects_while_streaming(199)  # what libraries keep from their first use
    few, many = objects_while_streaming(200), objects_while_streaming(5000)
    assert few[1] < 50 and many[1] < 50
    # `datasets` keeps a dictionary and a list for each shard, but no row, text or volume.
    assert many[0] - few[0] < 3 * 5000


def test_phantoms_are_drawn_on_demand(processor):
    source = phantom_source("B", range(10**5), seed=0)
    assert source.num_studies == 10**5
    assert source.description == "100000 SYNTHETIC phantoms of site B"
    row = next(iter(source.stream()))
    assert row["id"] == "phantom_b_0_a_1.nii.gz"
    assert row["patient"] == "phantom_b_0"
    assert row["report"].endswith(".") and len(row["labels"]) == 18
    loader = StudyLoader(phantom_source("B", range(2), 0), processor, CT_CLIP_LABELS, batch_size=2, with_text=True)
    (batch,) = loader
    assert batch["pixel_values"].shape == (2, 1, 8, 12, 8)
    assert batch["labels"].shape == (2, 18)


# loader processes that die


class Deadly(Rows):
    """Rows of tiny arrays; some end the process that makes them, or loads them, with a status or a signal."""

    def __init__(self, reading=(), loading=(), code=3):
        super().__init__()
        self.reading, self.loading, self.code = reading, loading, code

    def __call__(self, key):
        if key in self.reading:
            os._exit(self.code)
        row = super().__call__(key)
        return {**row, "volume": DeadlyVolume(row["volume"], self.code)} if key in self.loading else row


@dataclass(frozen=True)
class DeadlyVolume(Deferred):
    volume: np.ndarray
    code: int

    @contextlib.contextmanager
    def open(self):
        if self.code < 0:
            faulthandler.disable()  # or it would look like a crash of the tests
            os.kill(os.getpid(), -self.code)
        os._exit(self.code)
        yield self.volume


class UnpicklableError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_a_full_disk_costs_the_line_of_a_bad_study_and_not_the_run(processor, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    loader = make_loader(processor, make_source(23, bad=[3]), bad_samples_file=tmp_path / "bad.jsonl")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.warns(UserWarning, match="study-3 was not recorded"):
            assert len(all_of(loader)) == 22
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (loader.num_bad, (tmp_path / "bad.jsonl").read_text(encoding="utf-8")) == (1, "")


ENDS = {
    -signal.SIGKILL: r"was killed by SIGKILL \(perhaps the machine's memory was full\)",
    -signal.SIGSEGV: "was killed by SIGSEGV",
    -signal.SIGBUS: r"was killed by SIGBUS \(perhaps shared memory was full\)",
    3: "ended with status 3",
}


@pytest.mark.parametrize(("code", "num_workers"), list(zip(ENDS, (1, 3, 1, 3), strict=True)))
def test_a_loader_process_that_dies_costs_its_study_alone(processor, tmp_path, num_workers, code):
    deadly = [0, 7, 8, 19, 22]
    source = Source([(key,) for key in range(23)], Deadly(loading=deadly, code=code), NAMES, "23 tiny studies")
    loader = make_loader(
        processor,
        source,
        seed=None,
        num_workers=num_workers,
        max_bad_share=0.5,
        bad_samples_file=tmp_path / "bad.jsonl",
    )
    started = time.monotonic()
    assert all_of(loader) == [f"study-{key}" for key in range(23) if key not in deadly]
    assert time.monotonic() - started < 10
    assert (loader.num_bad, loader.num_seen) == (5, 23)
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == [f"study-{key}" for key in deadly]
    assert all(re.search(f"its loader process {ENDS[code]}$", line["reason"]) for line in lines)


def test_a_process_that_dies_ends_a_strict_run_with_its_study(processor):
    source = Source([(key,) for key in range(9)], Deadly(loading=[4], code=-signal.SIGKILL), NAMES, "9 tiny studies")
    loader = make_loader(processor, source, seed=None, num_workers=2, on_bad_sample="raise")
    with pytest.raises(DataError, match=r"^study-4 cannot be used: its loader process was killed by SIGKILL"):
        ids_of(loader)
    assert not multiprocessing.active_children()


def test_processes_that_all_die_end_the_run(processor):
    source = Source([(key,) for key in range(40)], Deadly(reading=range(40)), NAMES, "40 tiny studies")
    with pytest.raises(DataError, match=r"6 of 6 studies .*; the last: study \d+: its loader process ended"):
        ids_of(make_loader(processor, source, num_workers=2))


@pytest.mark.parametrize("moment", [1, 2, 4])
def test_processes_that_are_killed_while_nobody_looks_are_replaced(processor, moment):
    """What they had ready goes with them, and is loaded again."""
    loader = make_loader(processor, num_workers=2, seed=None, max_bad_share=1.0)
    batches = iter(loader)
    got = [next(batches)["ids"] for _ in range(moment)]
    time.sleep(0.1 * (moment % 2))
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    got += [batch["ids"] for batch in batches]
    names = list(itertools.chain.from_iterable(got))
    assert len(names) + loader.num_bad == 23 and loader.num_bad <= 2
    assert names == sorted(set(names), key=lambda name: int(name.split("-")[1]))


@pytest.mark.parametrize("error", [VolumeError("a", "b", "c"), OSError(5, "gone", "x"), UnpicklableError(1, 2)])
def test_what_reading_a_row_raises_is_raised_here(processor, error):
    def read(key):
        raise error

    source = Source([(key,) for key in range(4)], read, NAMES, "4 tiny studies")
    with pytest.raises((type(error), RuntimeError), match=str(error).replace("[", r"\[")):
        ids_of(make_loader(processor, source, num_workers=1))


def _row_of(key, place):
    return Rows()(key)


def _load_for_ever(told):
    studies = load_ahead(range(9), _row_of, 3)
    next(studies)
    pids = [child.pid for child in multiprocessing.active_children()]
    bystander = multiprocessing.Process(target=time.sleep, args=(60,))  # holds the pipes open
    bystander.start()
    told.send([pids, bystander.pid])
    time.sleep(60)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes there")
def test_loader_processes_end_with_the_run():
    """Also when it is killed, and none of them is told."""
    hears, tells = multiprocessing.Pipe()
    run = multiprocessing.Process(target=_load_for_ever, args=(tells,))
    run.start()
    pids, bystander = hears.recv()
    run.kill()
    run.join()
    assert len(pids) == 3
    patience = time.monotonic() + 20
    while any(map(_is_running, pids)) and time.monotonic() < patience:
        time.sleep(0.1)
    left = list(map(_is_running, pids))
    os.kill(bystander, signal.SIGKILL)
    assert not any(left)


def _is_running(pid):
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False


@pytest.mark.slow
def test_processes_are_started_where_there_is_no_fork(processor, monkeypatch):
    expected = ids_of(make_loader(processor))
    monkeypatch.setattr(multiprocessing, "get_context", lambda: multiprocessing.context.SpawnContext())
    assert ids_of(make_loader(processor, num_workers=2)) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_counts_of_a_pass_go_on_with_it(processor, num_workers):
    """So that too many bad studies end a run however often it is stopped."""
    source, settings = make_source(40, bad=[0, 1, 2, 3, 4, 30]), {"seed": None, "num_workers": num_workers}
    _, state = first_of(make_loader(processor, source, **settings), 2)
    assert (state["num_bad"], state["num_seen"]) == (5, 13)
    again = make_loader(processor, source, **settings)
    again.load_state_dict(state)
    with pytest.raises(DataError, match="6 of 31 studies cannot be used"):
        ids_of(again)
    patient = make_loader(processor, source, max_bad_share=1.0, **settings)
    patient.load_state_dict(state)
    ids_of(patient, epochs=1)
    assert (patient.num_bad, patient.num_seen) == (6, 40)


def wait_for(condition):
    patience = time.monotonic() + 20
    while not condition() and time.monotonic() < patience:
        time.sleep(0.05)
    time.sleep(0.5)


def test_no_study_is_blamed_for_a_process_that_is_killed_while_it_waits(processor, tmp_path):
    """What it had ready is gone with it, and is loaded again."""
    source = Source([(key,) for key in range(23)], NotedRows(tmp_path), NAMES, "23 tiny studies")
    loader = make_loader(processor, source, seed=None, num_workers=2)
    batches = iter(loader)
    got = next(batches)["ids"]
    wait_for(lambda: len(list(tmp_path.iterdir())) == 8)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    got += [name for batch in batches for name in batch["ids"]]
    assert got == [f"study-{key}" for key in range(23)]
    assert loader.num_bad == 0


def test_the_signals_of_a_terminal_are_left_to_the_run(processor, tmp_path):
    source = Source([(key,) for key in range(23)], NotedRows(tmp_path), NAMES, "23 tiny studies")
    batches = iter(make_loader(processor, source, seed=None, num_workers=2))
    next(batches)
    wait_for(lambda: len(list(tmp_path.iterdir())) == 8)
    before = {child.pid for child in multiprocessing.active_children()}
    for pid in before:
        os.kill(pid, signal.SIGINT)
    next(batches)
    time.sleep(0.2)
    assert {child.pid for child in multiprocessing.active_children()} == before
