"""Replay: studies of another source between those that are learned, so that less of it is forgotten.

Both become one source, whose keys are in turn those of the one and of the other. So workers, processes, studies that
cannot be read and the place that a run is resumed from need no other care than those of a single source.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from medct.data.sources import DataError, Row, Source


@dataclass(frozen=True)
class ReadEither:
    """Rows of two sources by keys of `ReplaySource`; pickles, for loader processes.

    Args:
        own: What is learned.
        replayed: What is not to be forgotten.
    """

    own: Source
    replayed: Source

    def __call__(self, key: tuple[bool, int]) -> Row:
        is_replayed, key_within = key
        return (self.replayed if is_replayed else self.own).read(key_within)


class ReplaySource(Source):
    """Two sources, one study in so many being of the second; see `with_replay`."""

    def keys(self, epoch: int = 0, seed: int | None = None) -> list[tuple[bool, int]]:  # type: ignore[override]
        """One pass over the first source, with the next studies of the second in between, evenly.

        Args:
            epoch, seed: See `Source.keys`.

        Returns:
            Whether the study is of the second source, and its key there.
        """
        sources: ReadEither = self.read  # type: ignore[assignment]
        size, count = self.num_studies, self.num_studies - sources.own.num_studies
        own, replayed = iter(sources.own.keys(epoch, seed)), _from(sources.replayed, epoch * count, seed)
        found = []
        for index in range(size):
            # The share is kept from the first study on: among any n neighbours, n times the share, up to one.
            is_replayed = (index + 1) * count // size > index * count // size
            found.append((is_replayed, next(replayed if is_replayed else own)))
        return found


def _from(source: Source, start: int, seed: int | None) -> Iterator[int]:
    """Keys of a source, pass after pass, from a place on."""
    epoch, start = divmod(start, source.num_studies)
    while True:
        yield from source.keys(epoch, seed)[start:]
        epoch, start = epoch + 1, 0


def parts_of(source: Source) -> list[Source]:
    """The sources that one is made of: what is learned and, if there is such, what is replayed."""
    return [source.read.own, source.read.replayed] if isinstance(source.read, ReadEither) else [source]


def drawn_names(source: Source, passes: int, seed: int) -> list[list[str]]:
    """Names of the studies that passes over a source draw, of each that it is made of, in its own order.

    Args:
        source: What a run trains on.
        passes: How many there are, the last one whole or in part.
        seed: Of the order.
    """
    own, *others = parts_of(source)
    if not others:
        return [list(own.names)]
    (replayed,) = others
    keys = {key for epoch in range(passes) for is_replayed, key in source.keys(epoch, seed) if is_replayed}
    drawn = [name for name, group in zip(replayed.names, replayed.groups, strict=True) if keys.intersection(group)]
    return [list(own.names), drawn]


def with_replay(own: Source, replayed: Source, share: float) -> Source:
    """A source of which a share is another.

    An epoch is one pass over `own`. The other goes on from epoch to epoch where it stopped, however long it is.

    Args:
        own: What is learned.
        replayed: What is not to be forgotten.
        share: Of all studies, and of every batch up to one study, in [0, 1).

    Raises:
        DataError: If their labels differ.
    """
    if own.label_names != replayed.label_names:
        raise DataError(
            f"{replayed.description}: its labels ({', '.join(replayed.label_names)}) are not those of "
            f"{own.description} ({', '.join(own.label_names)}). Give it a column for each of the model's labels, "
            "empty where unknown."
        )
    count = round(own.num_studies * share / (1 - share))
    if not count:
        return own
    return ReplaySource(
        groups=[(index,) for index in range(own.num_studies + count)],
        read=ReadEither(own, replayed),  # type: ignore[arg-type]
        label_names=own.label_names,
        description=f"{own.description}, with {count} of {replayed.description} in between",
        skipped=(*own.skipped, *replayed.skipped),
        names=[*own.names, *replayed.names],
        is_synthetic=own.is_synthetic,
    )
