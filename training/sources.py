"""What a run reads: its studies by split, and how many steps they make."""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

from medct.configuration_medct import MedCTConfig
from medct.data import ALL, open_source
from medct.data.label_space import LabelTable, told_apart
from medct.data.loader import StudyLoader
from medct.data.sources import Source
from medct.training.folds import divide
from medct.training.replay import ReadEither, with_replay
from medct.training.results import SPLITS
from medct.training.settings import NO_SOURCE, TrainingError, TrainingSettings, complete


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


def steps_per_epoch(source: Source, settings: TrainingSettings, processes: int) -> int:
    """Optimizer steps that the training studies make once.

    Args:
        source: Studies to train on.
        settings: The run's settings.
        processes: Number of training processes.

    Raises:
        TrainingError: If there are fewer studies than a step takes.
    """
    studies_per_step = settings.batch_size * settings.accumulation_steps * processes
    per_epoch = source.num_studies // studies_per_step
    if not per_epoch:
        raise TrainingError(
            f"{source.num_studies} training studies do not fill one step of {studies_per_step} ({settings.batch_size} "
            f"x {settings.accumulation_steps} in {processes} processes). Lower --batch_size."
        )
    return per_epoch


def number_of_steps(source: Source, settings: TrainingSettings, processes: int) -> int:
    """Optimizer steps of a run.

    Args:
        source, settings, processes: See `steps_per_epoch`.

    Raises:
        TrainingError: If there are fewer studies than a step takes.
    """
    steps = steps_per_epoch(source, settings, processes) * settings.epochs
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def endless(loader: StudyLoader) -> Iterator[dict[str, Any]]:
    """Batches of one epoch after the other."""
    while True:
        yield from loader


def has_known_label(source: Source) -> bool:
    """Whether a label of any study is known.

    Args:
        source: Whose rows are read, without their volumes, until one is.
    """
    return any(not all(map(math.isnan, row["labels"])) for row in map(source.read, source.keys()))


def digest_of_studies(source: Source) -> str:
    """What is learned from which studies in which order, in a few letters; drawings have a seed that says it.

    Args:
        source: Whose rows are read, without their volumes, unless it has a checksum of them.
    """
    if isinstance(source.read, ReadEither):
        return f"{digest_of_studies(source.read.own)} {digest_of_studies(source.read.replayed)}"
    found = hashlib.sha256(json.dumps([source.checksum, *source.groups]).encode())
    for row in [] if source.checksum or source.is_synthetic else map(source.read, source.keys()):
        found.update(json.dumps([row[name] for name in ("id", "report", "labels")]).encode())
    return found.hexdigest()[:16]
