"""Numbers of things: in sentences, and how many of them say anything."""

FEWEST_RESAMPLES = 20
"""Resamples of a bootstrap of which one may lie outside of a 95 % interval; of fewer, none does."""


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with the word for what it counts, such as "1 scan" or "1,204 scans".

    Args:
        number: How many.
        one: The word for one of them.
        many: The word for several, if it is another than `one` with an "s".
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
