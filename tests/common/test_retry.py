"""Temporary failures are retried, others are not."""

import pytest

from medct.common.retry import keep_trying


class Flaky:
    def __init__(self, *failures: Exception):
        self.failures = list(failures)

    def __call__(self) -> str:
        if self.failures:
            raise self.failures.pop(0)
        return "done"


def passes(error: Exception) -> float | None:
    return None if isinstance(error, KeyError) else float(str(error))


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    noted: list[float] = []
    monkeypatch.setattr("time.sleep", noted.append)
    return noted


def test_a_temporary_failure_is_retried_after_the_longer_wait(waits):
    told: list[tuple[str, float]] = []
    act = Flaky(OSError("0"), OSError("9"))
    assert keep_trying(act, passes, (1, 2), lambda error, wait_s: told.append((str(error), wait_s))) == "done"
    assert waits == [1, 9]
    assert told == [("0", 1), ("9", 9)]


def test_the_last_failure_and_a_permanent_one_are_raised(waits):
    with pytest.raises(OSError, match="3"):
        keep_trying(Flaky(OSError("1"), OSError("2"), OSError("3")), passes, (1, 2))
    assert waits == [1, 2]
    with pytest.raises(KeyError):
        keep_trying(Flaky(KeyError()), passes, (1, 2))
    assert waits == [1, 2]
