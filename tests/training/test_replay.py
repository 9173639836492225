"""Replay: a share of every batch, whatever the sizes, epochs, processes and stops."""

import dataclasses
import itertools
import math

import pytest

from medct import CT_CLIP_LABELS, MedCTProcessor
from medct.data import DataError, Source, StudyLoader, phantom_source
from medct.data.sources import Skipped
from medct.training.replay import drawn_names, with_replay
from medct.training.settings import PHANTOM_BASE, TrainingError
from medct.training.sources import remarks_on_overlap

SEED = 3


def numbered(count: int, name: str, bad: tuple[int, ...] = ()) -> Source:
    """Phantoms by another name, some of which cannot be read."""
    phantoms = phantom_source("A", range(count), 0)

    def read(key: int):
        row = phantoms.read(key) | {"id": f"{name}_{key}", "patient": f"{name}_{key}"}
        return row | {"volume": "no such file"} if key in bad else row

    return dataclasses.replace(phantoms, read=read, description=name)


@pytest.mark.parametrize(
    "own, replayed, share", [(20, 7, 0.2), (25, 400, 0.2), (9, 3, 0.5), (40, 5, 0.1), (8, 8, 0.75)]
)
def test_any_neighbours_hold_the_share_up_to_one(own, replayed, share):
    mixed = with_replay(numbered(own, "own"), numbered(replayed, "replayed"), share)
    keys = [key for epoch in range(3) for key in mixed.keys(epoch, SEED)]
    is_replayed = [key[0] for key in keys]
    for length in (2, 4, 8, 16):
        for start in range(0, mixed.num_studies - length):
            assert abs(sum(is_replayed[start : start + length]) - share * length) <= 1 + length / mixed.num_studies
    one_pass = [key for flag, key in mixed.keys(1, SEED) if not flag]
    assert one_pass == numbered(own, "own").keys(1, SEED)


def test_what_is_replayed_goes_on_from_epoch_to_epoch():
    """A large source is seen in full before any of it comes again."""
    mixed = with_replay(numbered(8, "own"), numbered(7, "replayed"), 0.2)  # two an epoch
    found = [key for epoch in range(7) for flag, key in mixed.keys(epoch, SEED) if flag]
    assert sorted(found[:7]) == sorted(found[7:]) == list(range(7))
    assert found[:7] != found[7:]


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_those_that_were_drawn_are_named(passes):
    own, replayed = numbered(8, "own"), numbered(7, "replayed")
    mixed = with_replay(own, replayed, 0.2)
    found = {key for epoch in range(passes) for flag, key in mixed.keys(epoch, SEED) if flag}
    assert len(found) == min(2 * passes, 7)
    assert drawn_names(mixed, passes, SEED) == [own.names, [replayed.names[key] for key in sorted(found)]]
    assert drawn_names(own, passes, SEED) == [own.names]


def test_without_a_share_nothing_is_replayed():
    own = numbered(8, "own")
    assert with_replay(own, numbered(7, "replayed"), 0) is own
    assert with_replay(own, numbered(7, "replayed"), 0.05) is own  # less than half a study an epoch


def test_what_both_have_left_out_is_known():
    own, replayed = (
        dataclasses.replace(numbered(8, name), skipped=(Skipped(name, "no report"),)) for name in ("own", "replayed")
    )
    assert with_replay(own, replayed, 0.2).skipped == (*own.skipped, *replayed.skipped)


def test_labels_that_differ_are_refused():
    other = dataclasses.replace(numbered(7, "replayed"), label_names=("Nodule",))
    with pytest.raises(DataError, match=r"replayed: its labels \(Nodule\) are not those of own"):
        with_replay(numbered(8, "own"), other, 0.2)


def loader(source: Source, **options) -> StudyLoader:
    processor = MedCTProcessor.from_pretrained(PHANTOM_BASE)
    return StudyLoader(source, processor, CT_CLIP_LABELS, batch_size=4, with_text=True, seed=SEED, **options)


def ids(batches) -> list[list[str]]:
    return [batch["ids"] for batch in batches]


def test_bad_studies_of_either_are_listed_and_passed_by(tmp_path):
    mixed = with_replay(numbered(12, "own", bad=(2,)), numbered(3, "replayed", bad=(1,)), 0.25)
    stream = loader(mixed, bad_samples_file=tmp_path / "bad.jsonl")
    seen = {name for batch in ids(stream) for name in batch}
    assert seen == {f"own_{key}" for key in range(12) if key != 2} | {"replayed_0", "replayed_2"}
    assert len((tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines()) == stream.num_bad >= 2


def test_processes_share_the_batches_of_one():
    mixed = with_replay(numbered(12, "own"), numbered(5, "replayed"), 0.25)
    whole = ids(loader(mixed))
    parts = [
        ids(StudyLoader(mixed, loader(mixed).processor, CT_CLIP_LABELS, batch_size=2, with_text=True, seed=SEED,
                        rank=rank, world_size=2))
        for rank in range(2)
    ]  # fmt: skip
    for batch, *halves in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(itertools.chain(*halves))


def test_a_stream_goes_on_where_it_stopped():
    mixed = with_replay(numbered(12, "own"), numbered(5, "replayed"), 0.25)
    whole = loader(mixed)
    expected = ids(whole) + ids(whole)
    for stop in (1, 3, 5):
        first, second = loader(mixed), loader(mixed)
        batches = itertools.chain(first, first)
        begun = ids(itertools.islice(batches, stop))
        second.load_state_dict(first.state_dict())
        assert begun + ids(second) + (ids(second) if stop < 4 else []) == expected


def table(names: str, **columns) -> Source:
    """A study for each letter, of a patient of that name, with one label; no volume is ever read."""
    rows = [
        {"id": name, "patient": name, "report": f"Of {name}.", "labels": [float(name in "ace")]}
        | {column: cells[index] for column, cells in columns.items()}
        for index, name in enumerate(names)
    ]
    return Source([(index,) for index in range(len(names))], rows.__getitem__, ("Mass",), names, names=list(names))


def overlap(**sources: Source) -> list[str]:
    return list(remarks_on_overlap({"tune": table("t"), "valid": table("ab"), **sources}))


@pytest.mark.parametrize(
    "sources",
    [
        {"train": with_replay(table("xyz"), table("ab"), 0.5)},
        {"train": with_replay(table("xyz"), table("ab", labels=[[math.nan]] * 2), 0.5)},  # under another mapping
        {"train": table("xyz"), "keep_tune": table("t"), "keep_valid": table("y")},
    ],
    ids=["replay", "unknown labels", "keep"],
)
def test_what_is_scored_is_not_learned_from_under_another_address(sources):
    with pytest.raises(TrainingError, match=r"would be learned from and scored: of .*--replay or --keep"):
        overlap(**sources)


def test_other_studies_of_the_same_name_or_patient_are_remarked_on():
    """Hospitals number their scans alike; a shard's rows are not read for it."""
    assert overlap(train=with_replay(table("xyz"), table("de"), 0.5)) == []
    ends = "of the same name as one that is learned from. If they are the same, the figures are too optimistic."
    others = table("abe", report=["1", "2", "3"])
    assert overlap(train=with_replay(table("xyz"), others, 0.5)) == [f"valid: 2 studies {ends}"]
    of_patients = table("de", patient=["b", "t"])
    assert overlap(train=with_replay(table("xyz"), of_patients, 0.5)) == [
        f"{split}: 1 patient {ends}" for split in ("tune", "valid")
    ]
    shards = dataclasses.replace(of_patients, read=None, checksum="known")
    assert overlap(train=with_replay(table("xyz"), shards, 0.5)) == []
    assert overlap(train=dataclasses.replace(shards, names=["a", "b"])) == [], "one source is divided by patient"
