"""Numbers of things in sentences."""

from medct.common.counting import counted


def test_one_is_singular():
    assert [counted(number, "scan") for number in (0, 1, 2, 1204)] == ["0 scans", "1 scan", "2 scans", "1,204 scans"]
    assert [counted(number, "process", "processes") for number in (1, 2)] == ["1 process", "2 processes"]
