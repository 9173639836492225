"""What a source of studies is: an ordered list of lightweight keys, and a reader that turns a key into a row on demand.

A row describes one study before its volume is read:

| key | content |
| --- | --- |
| `id` | name of the study, unique in its source |
| `patient` | name of the patient; no patient is in two splits |
| `report` | findings and impression, "" if there is none |
| `labels` | one number per label, in the order of `Source.label_names`; NaN if unknown |
| `volume` | anything `read_volume` takes, or a `Deferred`; `read_study` reads both; of shards a `PreparedVolume` |
| `affine`, `rescale_slope`, `rescale_intercept`, `spacing_mm` | only where the volume itself does not say |
| `about` | only where something is known: the subgroups that the study belongs to, such as `{"sex": "F"}` |
"""

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import IterableDataset

from medct.common.lock import is_first_process
from medct.common.progress import SHOWN_AFTER_SECONDS, tqdm
from medct.errors_medct import MedCTError
from medct.volume_io_medct import read_volume
from medct.volume_medct import CTVolume

Row = dict[str, Any]


class DataError(MedCTError, ValueError):
    """A source that does not hold what it should; the message says what is wrong and what to do."""


class NoSuchSplitError(DataError):
    """A split that a source does not have, or of which nothing is left."""


class AllLeftOutError(NoSuchSplitError):
    """A split that a source has, and of which every study was left out."""


@dataclass(frozen=True)
class Skipped:
    """A study that is left out, and why."""

    id: str
    reason: str


MAPPING_FLAGS = "--mapping (or --keep_mapping, --replay_mapping)"
"""The flags of commands that say which names in the data mean which finding, as messages name them."""


@dataclass(frozen=True)
class Merged:
    """Findings that the labels of a source cannot tell apart, so that they are scored as one.

    Args:
        findings: Their names, two or more.
        rule: How their scores become one: "max", or "max_or_min", the highest if it is above 0.5, else the lowest.
    """

    findings: tuple[str, ...]
    rule: str = "max"

    @property
    def name(self) -> str:
        """What they are called together."""
        return " or ".join(self.findings)


FEWEST_JUDGED = 100
"""With fewer studies, bad ones are judged as if there were this many: at 5 %, five may always be bad."""


def too_many_bad(num_bad: int, num_seen: int, max_share: float) -> bool:
    """Whether more of the studies seen so far are unusable than allowed; see `FEWEST_JUDGED`.

    Args:
        num_bad: Unusable studies so far.
        num_seen: All studies so far.
        max_share: Largest share allowed, in [0, 1].
    """
    return num_bad > max_share * max(num_seen, FEWEST_JUDGED)


def why_skipped(skipped: Sequence["Skipped"], is_named: bool = True) -> str:
    """The reasons for which studies were left out, and how many each.

    Args:
        skipped: The studies.
        is_named: Whether an example is named; not where others read it, as a file's name may be a patient's.
    """
    first = {each.reason: f", such as {each.id}" if is_named else "" for each in reversed(skipped)}
    counts = Counter(each.reason for each in skipped)
    return "; ".join(f"{reason} ({counts[reason]:,}{example})" for reason, example in first.items())


def hash_share(name: str, purpose: str) -> float:
    """A number in [0, 1) that depends only on a name and a purpose: the same everywhere, for ever.

    Args:
        name: What is hashed, such as a patient's name.
        purpose: Makes the numbers of different uses independent.
    """
    digest = hashlib.blake2b(f"{purpose}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def first_of(names: Sequence[str], limit: int | None) -> list[int]:
    """Choose the studies that come first in a fixed pseudo-random order that depends only on their names.

    Args:
        names: Names of the studies or scans.
        limit: How many to choose; all if `None`.

    Returns:
        Their indices, ascending.
    """
    if limit is None or limit >= len(names):
        return list(range(len(names)))
    return sorted(sorted(range(len(names)), key=lambda index: hash_share(names[index], "limit"))[:limit])


class Deferred(ABC):
    """A volume that is fetched only when it is read, so that a failure affects this study alone."""

    @abstractmethod
    def open(self) -> contextlib.AbstractContextManager[Any]:
        """Yield what `read_volume` takes, for as long as the context lasts."""


@dataclass(frozen=True)
class Source:
    """Labelled studies that can be streamed repeatedly. Nothing is read or drawn before it is needed.

    Args:
        groups: One entry per study of an epoch: the keys of its reconstructions, of which each epoch takes one.
        read: Turns a key into a row; cheap, since the costly part is deferred. Must be picklable for loader processes.
        label_names: Meaning of a row's `labels`, in their order.
        description: "300 studies of ...", for people.
        skipped: Studies left out before any volume is read.
        names: Names of the groups' scans, by which a `limit` chooses; their indices by default.
        is_synthetic: Whether these are drawings and not patients.
        elsewhere: Studies that the address holds in other splits, by split, where the division is this package's or in
            the user's own table; nothing where a data set comes divided.
        merged: Findings whose labels hold for all of them together. Each has the label of all in a row.
        mapping: Which names of the data the labels come from, ready for JSON; `None` if they have the same names.
        checksum: Of all that the rows hold, where it is known without reading them; empty where it is not.
        caveat: End of the description, of all studies of the address.
    """

    groups: Sequence[Sequence[int]]
    read: Callable[[int], Row]
    label_names: tuple[str, ...]
    description: str
    skipped: tuple[Skipped, ...] = ()
    names: Sequence[str] = ()
    is_synthetic: bool = False
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    merged: tuple[Merged, ...] = ()
    mapping: dict[str, Any] | None = None
    checksum: str = ""
    caveat: str = ""

    def __post_init__(self):
        if not self.names:
            object.__setattr__(self, "names", [str(index) for index in range(len(self.groups))])

    def __repr__(self) -> str:
        # The fields name studies and patients, and quote reports.
        return f"{type(self).__name__}({self.description})"

    @property
    def num_studies(self) -> int:
        """Studies in one epoch, including any that turn out to be unreadable."""
        return len(self.groups)

    def keys(self, epoch: int = 0, seed: int | None = None) -> list[int]:
        """The keys of one epoch, in order.

        Args:
            epoch: Changes the order, and which of several reconstructions is taken.
            seed: Seed for the order; `None` gives the source's own order and always the first reconstruction.
        """
        if seed is None:
            return [group[0] for group in self.groups]
        first = np.random.default_rng(seed).integers(2**31, size=len(self.groups))
        order = np.random.default_rng([seed, epoch]).permutation(len(self.groups))
        return [group[(first[index] + epoch) % len(group)] for index in order if (group := self.groups[index])]

    def rows(self, what: str) -> Iterable[Row]:
        """The first row of each study in the source's own order, with a bar where that takes long: rows of shards on
        the Hub cost a request each.

        Args:
            what: Name for the bar.
        """
        shown: dict[str, Any] = {"delay": SHOWN_AFTER_SECONDS, "leave": False, "disable": not is_first_process()}
        return tqdm(map(self.read, self.keys()), what, self.num_studies, unit="study", **shown)

    def stream(self, epoch: int = 0, seed: int | None = None) -> IterableDataset:
        """Rows of one epoch; each study is a shard, so that any number of processes can divide them.

        Args:
            epoch, seed: See `keys`.
        """
        # A list in `gen_kwargs` is what `datasets` divides among processes and workers.
        options = {"keys": self.keys(epoch, seed), "read": self.read}
        return IterableDataset.from_generator(_read_rows, gen_kwargs=options)


def digest_of(source: Source) -> str:
    """Which studies a source holds in which order, with reports and labels, in a few letters.

    Args:
        source: Whose rows are read, without their volumes, unless it has a checksum of them or they are drawings.
    """
    found = hashlib.sha256(json.dumps([source.checksum, *source.groups]).encode())
    for row in [] if source.checksum or source.is_synthetic else source.rows("note which studies"):
        found.update(json.dumps([row[name] for name in ("id", "report", "labels")]).encode())
    return found.hexdigest()[:16]


def _read_rows(keys: list[int], read: Callable[[int], Row]) -> Iterator[Row]:
    for key in keys:
        yield read(key)


@dataclass(frozen=True)
class _ReadJoined:
    """Rows of several sources by keys that say which; picklable, for loader processes.

    Args:
        reads: Of each source.
    """

    reads: tuple[Callable[[int], Row], ...]

    def __call__(self, key: int) -> Row:
        within, source = divmod(key, len(self.reads))
        return self.reads[source](within)


def joined(sources: Sequence[Source], description: str, limit: int | None = None) -> Source:
    """Several sources of the same labels as one, in their order.

    Args:
        sources: With no study in two of them.
        description: Of the whole, without its number of studies.
        limit: Take only this many studies, the first of a fixed pseudo-random order.
    """
    groups = [
        tuple(key * len(sources) + index for key in group)
        for index, source in enumerate(sources)
        for group in source.groups
    ]
    names = [name for source in sources for name in source.names]
    chosen = first_of(names, limit)
    mapping = sources[0].mapping
    by = "" if mapping is None else f", labels by {mapping['name']}"
    is_synthetic = any(source.is_synthetic for source in sources)
    return Source(
        [groups[index] for index in chosen],
        _ReadJoined(tuple(source.read for source in sources)),
        sources[0].label_names,
        f"{len(chosen)} {'SYNTHETIC ' if is_synthetic else ''}{description}{sources[0].caveat}{by}",
        skipped=tuple(study for source in sources for study in source.skipped),
        names=[names[index] for index in chosen],
        is_synthetic=is_synthetic,
        merged=sources[0].merged,
        mapping=mapping,
        checksum=" ".join(source.checksum for source in sources) if all(source.checksum for source in sources) else "",
        caveat=sources[0].caveat,
    )


def read_study(row: Row, orientation: str) -> CTVolume:
    """Read the volume of a row that is not prepared.

    Args:
        row: Row of a source.
        orientation: The model's orientation, see `read_volume`.

    Raises:
        VolumeError, OSError: If the volume cannot be fetched or is not a usable CT volume.
    """
    volume = row["volume"]
    known: Row = {name: row.get(name) for name in ("affine", "rescale_slope", "rescale_intercept", "spacing_mm")}
    with volume.open() if isinstance(volume, Deferred) else contextlib.nullcontext(volume) as opened:
        return read_volume(opened, orientation=orientation, **known)
