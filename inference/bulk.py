"""One command over thousands of studies: resumable, and spread over the processes of a launch.

Each row is a line on disk before the next one is made, and a line cut short by a crash is dropped when the file is next
opened. Every process of a launch appends to a file of its own; the first one merges them when all are done. Beside the
output file lie `NAME.settings.json`, which its rows were made with, and `NAME.failed.csv`, the studies that could not
be read and why; the next run tries these again.
"""

import contextlib
import csv
import glob
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from medct.common.distributed import refuse_different, refuse_unshared
from medct.common.files import refuse_other_settings, remove_leftovers, whole_file, with_version, write_text
from medct.common.formulas import as_text, of_text
from medct.common.output import visible
from medct.common.progress import remark, tqdm
from medct.errors_medct import MedCTError
from medct.inference.studies import FailedStudy, LoadStudy, ReadStudy, Study, batched_reads, read_ahead
from medct.inference.weights import KEY as WEIGHTS
from medct.inference.weights import NAMES

if TYPE_CHECKING:
    from accelerate import PartialState

KEY = "study"


class OutputError(MedCTError, ValueError):
    """A file that this run would have to add to but cannot; the message says why and what to do."""


class RowFormat(Protocol):
    """How rows become lines; each holds its study under `KEY`."""

    def header(self) -> str: ...
    def line(self, row: dict[str, Any]) -> str: ...
    def rows(self, lines: Iterable[str]) -> Iterator[dict[str, Any]]: ...


class JsonLines:
    """One object per line."""

    def header(self) -> str:
        return ""

    def line(self, row: dict[str, Any]) -> str:
        return visible(json.dumps(row, ensure_ascii=False, allow_nan=False)) + "\n"

    def rows(self, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
        return map(json.loads, lines)


class Csv:
    """Comma-separated values; a value never holds a line break, and none is a formula.

    Args:
        columns: Names of the columns, `KEY` first.
    """

    def __init__(self, columns: Sequence[str]):
        self.columns = list(columns)

    def header(self) -> str:
        return self._line(self.columns)

    def line(self, row: dict[str, Any]) -> str:
        return self._line([row.get(column, "") for column in self.columns])

    def rows(self, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
        for row in csv.DictReader(lines, fieldnames=self.columns):
            yield {column: of_text(cell) if isinstance(cell, str) else cell for column, cell in row.items()}

    def _line(self, values: Sequence[Any]) -> str:
        line = io.StringIO()
        cells = [as_text(" ".join(str(value).splitlines())) for value in values]
        csv.writer(line, lineterminator="\n").writerow(cells)
        return line.getvalue()


def read_rows(path: Path, format: RowFormat) -> Iterator[dict[str, Any]]:
    """Read the rows of a file one by one, without an incomplete last line; none if there is no file.

    Args:
        path: The file, which may be larger than memory.
        format: Format of its lines.

    Raises:
        OutputError: If the file holds anything but such rows.
    """
    if not path.exists():
        return
    taken = f"{path} exists and holds rows that this run would not write. Choose another --output, or remove it."
    # File names may be any bytes.
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        lines = (line for line in file if line.endswith("\n"))
        header = format.header()
        if header and next(lines, header) != header:
            raise OutputError(taken)
        try:
            for row in format.rows(lines):
                if not isinstance(row, dict) or not row.get(KEY):
                    raise ValueError("no row of a study")
                yield row
        except ValueError as error:
            raise OutputError(taken) from error


class RowFile:
    """Appends rows to a file, each on disk before the next one is made.

    Args:
        path: File to make or add to; an incomplete last line is cut off.
        format: Format of its lines.

    Raises:
        OutputError: If the file holds anything but such rows; from `write`, if it has been removed.
    """

    def __init__(self, path: Path, format: RowFormat):
        self.path, self.format = path, format
        self.done = {row[KEY] for row in read_rows(path, format)}
        if path.exists():
            with path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8", errors="surrogateescape", newline="")
        if not path.stat().st_size:
            self._file.write(format.header())
            self._file.flush()

    def write(self, row: dict[str, Any]) -> None:
        if not self.path.exists():  # the system would write on into nothing
            raise OutputError(f"{self.path} was removed while rows were written to it. Start the same command again.")
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
    """Where one process of a launch writes.

    Args:
        path: The output that all of them contribute to.
        index: Index of the process, from 0.
    """
    return path.with_name(f"{path.name}.part-{index:04d}")


def part_paths(path: Path) -> list[Path]:
    """Files that the processes of a launch have written and that are not yet merged."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.part-[0-9][0-9][0-9][0-9]"))


def merge(path: Path, format: RowFormat, order: Iterable[str] = ()) -> int:
    """Put the rows of a file and of its parts into the file, each study once, and remove the parts.

    Args:
        path: The file; need not exist.
        format: Format of all of them.
        order: Studies in the order wanted for their rows; rows of other studies come first, in their present order.

    Returns:
        Number of rows.
    """
    parts = part_paths(path)
    lines = {row[KEY]: format.line(row) for file in (path, *parts) for row in read_rows(file, format)}
    place = {study: index for index, study in enumerate(order)}
    with whole_file(path) as aside, aside.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(format.header())
        file.writelines(lines[study] for study in sorted(lines, key=lambda study: place.get(study, -1)))
    for part in parts:
        part.unlink()
    return len(lines)


_FAILED = Csv([KEY, "reason"])


@dataclass(frozen=True)
class Reading:
    """How studies are read and batched.

    Args:
        load: Reads a study.
        batch_size: Studies that go through the model together.
        num_workers: Processes that read ahead.
        reword: Puts the reason why a study could not be read into the words of the command.
    """

    load: LoadStudy
    batch_size: int = 1
    num_workers: int = 1
    reword: Callable[[str], str] = str


def process(
    studies: Sequence[Study],
    reading: Reading,
    rows_of: Callable[[list[ReadStudy]], Iterable[dict[str, Any] | FailedStudy]],
    write: Callable[[dict[str, Any]], None],
    write_failed: Callable[[dict[str, Any]], None],
    show_progress: bool = True,
) -> int:
    """Read studies, turn them into rows and write each row as soon as it is made.

    Args:
        studies: Studies in reading order.
        reading: How to read and batch them.
        rows_of: Makes one row for each study of a batch, or says why that cannot be done.
        write: Takes each row.
        write_failed: Takes a row for each study that could not be read, which is reported on stderr, too.
        show_progress: Whether to show a bar on stderr.

    Returns:
        Number of studies that could not be read.
    """
    failed = 0
    reads = read_ahead(studies, reading.load, reading.num_workers, reading.batch_size)
    with (
        contextlib.closing(reads),  # at once, if this run is stopped
        tqdm(total=len(studies), unit="study", disable=not show_progress) as bar,
    ):
        for read in batched_reads(reads, reading.batch_size):
            for row in [read] if isinstance(read, FailedStudy) else rows_of(read):
                if isinstance(row, FailedStudy):
                    failed += 1
                    reason = reading.reword(row.reason)
                    write_failed({KEY: row.study.id, "reason": reason})
                    bar.write(visible(f"failed: {reason}"), file=sys.stderr)
                else:
                    write(row)
                bar.update(1)
    return failed


def process_to_file(
    studies: Sequence[Study],
    reading: Reading,
    rows_of: Callable[[list[ReadStudy]], Iterable[dict[str, Any] | FailedStudy]],
    output: Path,
    format: RowFormat,
    settings: dict[str, Any],
    state: "PartialState",
    done: Iterable[str] = (),
    rows_path: Path | None = None,
) -> int:
    """`process` with all that a run overnight needs: resumption, several processes, and a list of what failed.

    Args:
        studies: All studies, including those already in the output.
        reading: How to read and batch them.
        rows_of: See `process`.
        output: File of the rows; an existing one is added to. The files beside it are named after it.
        format: Format of the rows.
        settings: Everything that decides the rows. A run with other settings does not add to the file.
        state: State of the launch.
        done: Studies that need no row although they do not have one yet.
        rows_path: Where the rows go if not to `output`, which is then made from them later.

    Returns:
        In the main process, the number of studies that could not be read in all processes; 0 in the others.

    Raises:
        OtherSettingsError, OutputError: If the output holds rows made with other settings, or anything else.
        LaunchError: If the processes do not see one output, or were started with other settings or studies.
    """
    failed_path = output.with_name(f"{output.name}.failed.csv")
    rows_path = rows_path or output
    output.parent.mkdir(parents=True, exist_ok=True)
    refuse_unshared(output.parent, output)
    refuse_different(settings | {"studies": _list_of(studies)})
    if state.is_main_process:
        _tidy_up(output, rows_path, failed_path, format, settings)
    state.wait_for_everyone()
    finished = {row[KEY] for row in read_rows(rows_path, format)} | set(done)
    left = [study for study in studies if study.id not in finished]
    if state.is_main_process and len(left) < len(studies):
        remark(f"{len(studies) - len(left)} of {len(studies)} studies are already in {output}.")
    index, count = state.process_index, state.num_processes
    rows, failures = (
        RowFile(path if count == 1 else part_path(path, index), of)
        for path, of in ((rows_path, format), (failed_path, _FAILED))
    )
    try:
        process(left[index::count], reading, rows_of, rows.write, failures.write, state.is_main_process)
    finally:
        rows.close()
        failures.close()
    state.wait_for_everyone()
    failed = _put_together(studies, rows_path, format, failed_path) if state.is_main_process else 0
    state.wait_for_everyone()
    return failed


def _tidy_up(output: Path, rows_path: Path, failed_path: Path, format: RowFormat, settings: dict[str, Any]) -> None:
    """Before anything is read: refuse what does not belong together, and merge what an interrupted launch has left."""
    for path in (rows_path, failed_path, _settings_path(output)):
        remove_leftovers(path)
    _keep_settings(output, rows_path, settings)
    merge(rows_path, format)
    merge(failed_path, _FAILED)
    failed_path.unlink()


def _put_together(studies: Sequence[Study], rows_path: Path, format: RowFormat, failed_path: Path) -> int:
    """After everything was read: merge what all processes wrote; returns how many studies could not be read."""
    order = [study.id for study in studies]
    merge(rows_path, format, order)
    failed = merge(failed_path, _FAILED, order)
    if not failed:
        failed_path.unlink()
    return failed


def _list_of(studies: Sequence[Study]) -> str:
    """Their number and a digest of their names, which may be those of patients."""
    names = json.dumps([study.id for study in studies])
    return f"{len(studies)}, {hashlib.sha256(names.encode()).hexdigest()[:16]}"


def _settings_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.settings.json")


def _keep_settings(output: Path, rows_path: Path, settings: dict[str, Any]) -> None:
    """Write the settings beside the output, or compare them with those it was started with."""
    path, settings = _settings_path(output), with_version(settings)
    is_begun = bool(part_paths(rows_path)) or any(file.exists() and file.stat().st_size for file in (output, rows_path))
    if is_begun and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before.get(WEIGHTS) is not None and before[WEIGHTS] == settings.get(WEIGHTS):
            before |= {name: settings[name] for name in NAMES if name in settings}
        no_digest = {WEIGHTS: None}  # it says nothing to a reader
        refuse_other_settings(output, before | no_digest, settings | no_digest, "--output")
        if before.get(WEIGHTS) != settings.get(WEIGHTS):
            raise OutputError(
                f"{output} was started with other weights than those that model and adapter have now. Choose another "
                "--output, or remove it."
            )
    elif is_begun:
        raise OutputError(
            f"{output} exists, but {path.name} is missing, so it is not known how it was made. Choose another "
            "--output, or remove it."
        )
    write_text(path, json.dumps(settings, indent=2) + "\n")
