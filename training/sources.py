"""What a run reads: its studies by split, and how many steps they make."""

import itertools
import math
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import numpy as np

from medct.common.counting import counted
from medct.configuration_medct import MedCTConfig
from medct.data import ALL, open_source
from medct.data.label_space import LabelTable, told_apart
from medct.data.loader import StudyLoader
from medct.data.sources import Row, Source, digest_of
from medct.training.folds import divide
from medct.training.replay import parts_of, with_replay
from medct.training.results import SPLITS
from medct.training.settings import NO_SOURCE, TrainingError, TrainingSettings, complete

_COMPARED = 20
"""Of studies with the same name, so many are compared: a row of a shard on the Hub costs a request."""


def load_sources(
    settings: TrainingSettings, config: MedCTConfig, mapping: LabelTable | None = None
) -> dict[str, Source]:
    """Studies to train on, to tune on and, as "valid", to score on; no patient is in two of them.

    Args:
        settings: The run's settings.
        config: Configuration of its base, with what it is asked.
        mapping: Of the names in `--data`; see `label_space.read_label_flags`.

    Returns:
        By split. Replayed studies are among those to train on; "keep_tune" and "keep_valid" are of the source to keep.
    """
    settings = complete(settings, config)
    limits = {"train": None, "tune": settings.max_tune_studies, "valid": settings.max_eval_studies}

    def source(address: str, split: str, **options: Any) -> Source:
        options |= {"reconstructions": settings.reconstructions, "limit": limits.get(split)}
        reports = settings.objective != "prompts" and split in ("train", ALL)
        return open_source(address, split, config, need_reports=reports, **options)

    own = {"revision": settings.data_revision, "phantoms": settings.phantoms, "mapping": mapping}
    if settings.folds:
        whole = source(settings.data, ALL, **own)
        sources = divide(whole, settings.folds, settings.fold or 1, settings.max_tune_studies)
    else:
        sources = {split: source(settings.data, split, **own) for split in limits}
    sources["train"] = told_apart(sources["train"])
    others: dict[str, Any] = {"phantoms": settings.other_phantoms}
    if settings.replay != NO_SOURCE and settings.replay_share:
        replayed = told_apart(source(settings.replay, "train", **others, mapping=settings.replay_mapping))
        sources["train"] = with_replay(sources["train"], replayed, settings.replay_share)
    if settings.keep != NO_SOURCE:
        sources |= {
            f"keep_{split}": source(settings.keep, split, **others, mapping=settings.keep_mapping) for split in SPLITS
        }
    return sources


def mappings_of(sources: Mapping[str, Source]) -> dict[str, Any]:
    """What the names of labels mean, by split and, for what is replayed, by "replay"; splits without a mapping are left
    out.

    Args:
        sources: From `load_sources`.
    """
    named = {**sources, **dict(zip(("train", "replay"), parts_of(sources["train"]), strict=False))}
    return {split: source.mapping for split, source in named.items() if source.mapping}


def remarks_on_overlap(sources: Mapping[str, Source]) -> Iterator[str]:
    """Remarks on studies or patients to learn from that bear the names of others to score: --replay and --keep may lie
    at another address than --data and be the same, such as its prepared shards.

    Args:
        sources: From `load_sources`.

    Raises:
        TrainingError: If most such studies have the same patient, report and labels, so that they are the same.
    """
    learned = parts_of(sources["train"])
    others = {split: source for split, source in sources.items() if split != "train"}
    if len(learned) == 1 and others.keys() == set(SPLITS):
        return  # of one source, which is divided by patient
    for source, scored in itertools.product(learned, others.values()):
        _refuse_same_studies(source, scored)
    told = {of: set[str]().union(*map(of, learned)) for of in (_names, _patients)}
    for split, scored in others.items():
        studies, patients = (len(of(scored) & known) for of, known in told.items())
        both = counted(studies, "study", "studies") if studies else counted(patients, "patient")
        if studies or patients:
            yield (
                f"{split}: {both} of the same name as one that is learned from. If they are the same, the figures are "
                "too optimistic."
            )


def _names(source: Source) -> set[str]:
    return set(source.names)


def _patients(source: Source) -> set[str]:
    """Nothing of drawings, whose numbers say it, and of shards, each row of which costs a request on the Hub."""
    is_costly = source.is_synthetic or source.checksum
    return set() if is_costly else {source.read(keys[0])["patient"] for keys in source.groups}


def _refuse_same_studies(learned: Source, scored: Source) -> None:
    place = dict(zip(scored.names, scored.groups, strict=True))
    both = [(keys, place[name]) for name, keys in zip(learned.names, learned.groups, strict=True) if name in place]
    rows = [(learned.read(ours[0]), scored.read(theirs[0])) for ours, theirs in both[:_COMPARED]]
    if 2 * sum(_is_same(*pair) for pair in rows) > len(rows):
        raise TrainingError(
            f"{counted(len(both), 'study', 'studies')}, such as {rows[0][0]['id']}, would be learned from and scored: "
            f"of {learned.description}, and of {scored.description}. Name another source with --replay or --keep."
        )


def _is_same(one: Row, other: Row) -> bool:
    """Whether two rows are of one study, as far as both tell; nothing speaks against what only one knows."""
    told = zip(one["labels"], other["labels"], strict=True)
    return (one["patient"], one["report"]) == (other["patient"], other["report"]) and all(
        ours == theirs or math.isnan(ours) or math.isnan(theirs) for ours, theirs in told
    )


def batches_per_pass(source: Source, settings: TrainingSettings, processes: int) -> int:
    """Whole batches that a process has of one pass over the training studies.

    Args:
        source: Studies to train on.
        settings: The run's settings.
        processes: Number of training processes.

    Raises:
        TrainingError: If there are fewer studies than a step takes.
    """
    batches = source.num_studies // (settings.batch_size * processes)
    if batches < settings.accumulation_steps:
        studies_per_step = settings.batch_size * settings.accumulation_steps * processes
        raise TrainingError(
            f"{source.num_studies} training studies do not fill one step of {studies_per_step} ({settings.batch_size} "
            f"x {settings.accumulation_steps} in {processes} processes). Lower --batch_size, --accumulation_steps or "
            "the number of processes."
        )
    return batches


def number_of_steps(source: Source, settings: TrainingSettings, processes: int) -> int:
    """Optimizer steps of a run. A step may begin in one pass and end in the next.

    Args:
        source, settings, processes: See `batches_per_pass`.

    Raises:
        TrainingError: If there are fewer studies than a step takes.
    """
    steps = batches_per_pass(source, settings, processes) * settings.epochs // settings.accumulation_steps
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def endless(loader: StudyLoader) -> Generator[dict[str, Any], None, None]:
    """Batches of one epoch after the other."""
    while True:
        yield from loader


def has_known_label(source: Source) -> bool:
    """Whether a label of any study is known.

    Args:
        source: Whose rows are read, without their volumes, until one is.
    """
    return any(not all(map(math.isnan, row["labels"])) for row in map(source.read, source.keys()))


def has_different_reports(source: Source) -> bool:
    """Whether two studies have different reports.

    Args:
        source: Whose rows are read, without their volumes, until two have.
    """
    rows = map(source.read, source.keys())
    first = next(rows)["report"]
    return any(row["report"] != first for row in rows)


def remarks_on_labels(source: Source) -> Iterator[str]:
    """A remark on findings that no training study differs in.

    Args:
        source: Whose rows are read, without their volumes. Nothing is told of drawings, and of shards, each row of
            which costs a request on the Hub.
    """
    if source.is_synthetic or source.checksum:
        return
    labels = np.array([row["labels"] for row in source.rows("look at labels")], dtype=float)
    alike = np.fmax.reduce(labels) == np.fmin.reduce(labels)
    unknown = np.isnan(labels).all(axis=0)
    if names := [name for name, is_same in zip(source.label_names, alike | unknown, strict=True) if is_same]:
        yield (
            f"{counted(len(names), 'finding')} of {len(alike)}, such as {names[0]}: the same in every training study "
            "that it is known of, so nothing tells studies with it from those without."
        )


def digest_of_studies(source: Source) -> str:
    """What is learned from which studies in which order, in a few letters; drawings have a seed that says it.

    Args:
        source: Whose rows are read, without their volumes, unless it has a checksum of them.
    """
    return " ".join(map(digest_of, parts_of(source)))
