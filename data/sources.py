"""What a source of studies is: light keys in an order, and a reader that makes a row of a key when it is asked for.

A row is what one study is before its volume is read:

| key | what |
| --- | --- |
| `id` | name of the study, unique in its source |
| `patient` | name of the patient; nobody stands in two splits |
| `report` | findings and impression, "" if there is none |
| `labels` | one number a label, in the order of `Source.label_names`; NaN if unknown |
| `volume` | anything `read_volume` takes, or a `Deferred`: `read_study` reads both |
| `affine`, `rescale_slope`, `rescale_intercept`, `spacing_mm` | only where the volume does not say it itself |
| `prepared` | only of prepared shards: `volume` is int16 HU `(z, y, x)` on the model's grid |
"""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import IterableDataset

from medct.errors_medct import MedCTError
from medct.volume_io_medct import CTVolume, read_volume

Row = dict[str, Any]


class DataError(MedCTError, ValueError):
    """A source that does not hold what it should; the message says what and what to do."""


@dataclass(frozen=True)
class Skipped:
    """One study that is left out, and why."""

    id: str
    reason: str


FEWEST_JUDGED = 100
"""Bad studies of fewer are judged as if they were of so many: of 5 %, five may always be bad."""


def too_many_bad(num_bad: int, num_seen: int, max_share: float) -> bool:
    """Whether a greater share than allowed of the studies seen so far cannot be used; see `FEWEST_JUDGED`."""
    return num_bad > max_share * max(num_seen, FEWEST_JUDGED)


def hash_share(name: str, purpose: str) -> float:
    """A number in [0, 1) that depends on a name alone: the same everywhere, for ever, and another for each purpose."""
    digest = hashlib.blake2b(f"{purpose}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def first_of(names: Sequence[str], limit: int | None) -> list[int]:
    """Which of the named studies come first in a fixed pseudo-random order that depends on their names alone.

    Args:
        names: Of the studies or scans.
        limit: How many; all of them if `None`.

    Returns:
        Their indices, ascending.
    """
    if limit is None or limit >= len(names):
        return list(range(len(names)))
    return sorted(sorted(range(len(names)), key=lambda index: hash_share(names[index], "limit"))[:limit])


class Deferred(ABC):
    """A volume that is fetched only when it is read, so that a failure concerns this study alone."""

    @abstractmethod
    def open(self) -> contextlib.AbstractContextManager[Any]:
        """Gives what `read_volume` takes, for as long as the context lasts."""


@dataclass(frozen=True)
class Source:
    """Labelled studies that can be streamed again and again. Nothing is read or drawn before it is asked for.

    Args:
        groups: One entry a study of an epoch: the keys of its reconstructions, of which each epoch takes one.
        read: Makes the row of a key; cheap, since what costs time is deferred. Pickles, for loader processes.
        label_names: What `labels` of a row stand for.
        description: "300 studies of ...", for people.
        skipped: Studies left out before any volume is read.
        names: Of the groups' scans, by which a `limit` chooses; their numbers where nothing is given.
        is_synthetic: Whether these are drawings, of nobody.
    """

    groups: Sequence[Sequence[int]]
    read: Callable[[int], Row]
    label_names: tuple[str, ...]
    description: str
    skipped: tuple[Skipped, ...] = ()
    names: Sequence[str] = ()
    is_synthetic: bool = False

    def __post_init__(self):
        if not self.names:
            object.__setattr__(self, "names", [str(index) for index in range(len(self.groups))])

    @property
    def num_studies(self) -> int:
        """Studies of one epoch, before unreadable ones."""
        return len(self.groups)

    def keys(self, epoch: int = 0, seed: int | None = None) -> list[int]:
        """The keys of one epoch in their order.

        Args:
            epoch: Changes the order, and which of several reconstructions is taken.
            seed: Of the order; `None` is the source's own order and always the first reconstruction.
        """
        if seed is None:
            return [group[0] for group in self.groups]
        first = np.random.default_rng(seed).integers(2**31, size=len(self.groups))
        order = np.random.default_rng([seed, epoch]).permutation(len(self.groups))
        return [group[(first[index] + epoch) % len(group)] for index in order if (group := self.groups[index])]

    def stream(self, epoch: int = 0, seed: int | None = None) -> IterableDataset:
        """Rows of one epoch; each study is a shard, so that any number of processes can divide them. See `keys`."""
        return self.stream_keys(self.keys(epoch, seed))

    def stream_keys(self, keys: Sequence[int]) -> IterableDataset:
        """Rows of these keys."""
        # A list in `gen_kwargs` is what `datasets` divides among processes and workers.
        return IterableDataset.from_generator(_read_rows, gen_kwargs={"keys": list(keys), "read": self.read})


def _read_rows(keys: list[int], read: Callable[[int], Row]) -> Iterator[Row]:
    for key in keys:
        yield read(key)


def read_study(row: Row, orientation: str) -> CTVolume:
    """Read the volume of a row that is not prepared.

    Args:
        row: Of a source.
        orientation: Of the model, see `read_volume`.

    Raises:
        VolumeError, OSError: If it cannot be fetched or is no usable CT volume.
    """
    volume = row["volume"]
    known: Row = {name: row.get(name) for name in ("affine", "rescale_slope", "rescale_intercept", "spacing_mm")}
    with volume.open() if isinstance(volume, Deferred) else contextlib.nullcontext(volume) as opened:
        return read_volume(opened, orientation=orientation, **known)
