"""Results of many studies, row by row: what is written stays written, and a second run goes on from there.

Every process of a launch appends to a file of its own; the first one merges them when all are done. A row is a line,
and a line that was torn by a crash is dropped when the file is opened again.
"""

import contextlib
import csv
import glob
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from medct.common.files import whole_file

KEY = "study"


class RowFormat(Protocol):
    """How rows become lines; each holds its study under `KEY`."""

    def header(self) -> str: ...
    def line(self, row: dict[str, Any]) -> str: ...
    def rows(self, lines: list[str]) -> list[dict[str, Any]]: ...


class JsonLines:
    """One object a line."""

    def header(self) -> str:
        return ""

    def line(self, row: dict[str, Any]) -> str:
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"

    def rows(self, lines: list[str]) -> list[dict[str, Any]]:
        return [json.loads(line) for line in lines]


class Csv:
    """Comma-separated values; a value never holds a line break.

    Args:
        columns: Their names, `KEY` first.
    """

    def __init__(self, columns: Sequence[str]):
        self.columns = list(columns)

    def header(self) -> str:
        return self._line(self.columns)

    def line(self, row: dict[str, Any]) -> str:
        return self._line([row.get(column, "") for column in self.columns])

    def rows(self, lines: list[str]) -> list[dict[str, Any]]:
        return list(csv.DictReader(lines, fieldnames=self.columns))

    def _line(self, values: Sequence[Any]) -> str:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([" ".join(str(value).splitlines()) for value in values])
        return line.getvalue()


def read_rows(path: Path, format: RowFormat) -> list[dict[str, Any]]:
    """The rows of a file, without a last line that was torn; none if there is no file.

    Raises:
        ValueError: If the file holds something else than such rows.
    """
    if not path.exists():
        return []
    text = path.read_bytes().decode("utf-8", "surrogateescape")  # a name of a file may be any bytes
    lines = [line + "\n" for line in text.split("\n")[:-1]]
    header = format.header()
    taken = f"{path} exists and holds other rows than this run would write. Choose another --output, or remove it."
    if header:
        if lines and lines[0] != header:
            raise ValueError(taken)
        lines = lines[1:]
    try:
        rows = format.rows(lines)
    except ValueError as error:
        raise ValueError(taken) from error
    if not all(isinstance(row, dict) and row.get(KEY) for row in rows):
        raise ValueError(taken)
    return rows


class RowFile:
    """Appends rows to a file, each on disk before the next one is made.

    Args:
        path: File to make or go on with; a torn last line is cut off.
        format: Of its lines.

    Raises:
        ValueError: If the file holds something else.
    """

    def __init__(self, path: Path, format: RowFormat):
        self.path, self.format = path, format
        rows = read_rows(path, format)
        self.done = {row[KEY] for row in rows}
        if path.exists():
            with path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8", errors="surrogateescape", newline="")
        if not path.stat().st_size:
            self._file.write(format.header())
            self._file.flush()

    def write(self, row: dict[str, Any]) -> None:
        try:
            self._file.write(self.format.line(row))
            self._file.flush()
        except OSError as error:  # of a full disk, say, which names no file
            error.filename = str(self.path)
            raise
        self.done.add(row[KEY])

    def close(self) -> None:
        with contextlib.suppress(OSError):  # said by `write`; what is torn is dropped when the file is opened again
            self._file.close()


def part_path(path: Path, index: int) -> Path:
    """Where process `index` of a launch writes."""
    return path.with_name(f"{path.name}.part-{index:04d}")


def part_paths(path: Path) -> list[Path]:
    """What the processes of a launch have written and nobody has merged yet."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.part-[0-9][0-9][0-9][0-9]"))


def merge(path: Path, format: RowFormat, order: Iterable[str] = ()) -> int:
    """Put the rows of a file and of its parts into the file, each study once, and remove the parts.

    Args:
        path: The file; need not exist.
        format: Of all of them.
        order: Studies in the order their rows shall have; rows of others go before them, in the order they have.

    Returns:
        How many rows there are.
    """
    parts = part_paths(path)
    rows = {row[KEY]: row for file in (path, *parts) for row in read_rows(file, format)}
    place = {study: index for index, study in enumerate(order)}
    ordered = sorted(rows.values(), key=lambda row: place.get(row[KEY], -1))
    with whole_file(path) as aside, aside.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(format.header())
        file.writelines(map(format.line, ordered))
    for part in parts:
        part.unlink()
    return len(rows)
