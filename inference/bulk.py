"""One command over thousands of studies: resumed where it stopped, spread over the processes of a launch.

Beside the output file lie `NAME.settings.json`, what its rows were made with, and `NAME.failed.csv`, the studies that
could not be read and why; these are tried again by the next run.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from medct.common.files import remove_leftovers, whole_file
from medct.image_processing_medct import MedCTImageProcessor
from medct.inference.row_files import KEY, Csv, RowFile, RowFormat, merge, part_path, part_paths, read_rows
from medct.inference.studies import FailedStudy, ReadStudy, Study, batched_reads, read_ahead

_FAILED = Csv([KEY, "reason"])


@dataclass(frozen=True)
class Reading:
    """How studies are read and batched.

    Args:
        image_processor: The model's.
        batch_size: Studies that go through the model together.
        num_workers: Threads that read ahead.
        options: For `read_volume`.
    """

    image_processor: MedCTImageProcessor
    batch_size: int = 1
    num_workers: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def process(
    studies: Sequence[Study],
    reading: Reading,
    rows_of: Callable[[list[ReadStudy]], Iterable[dict[str, Any]]],
    write: Callable[[dict[str, Any]], None],
    write_failed: Callable[[dict[str, Any]], None],
    show_progress: bool = True,
) -> int:
    """Read studies, make rows of them and write each as soon as it is made.

    Args:
        studies: In the order they are read.
        reading: How.
        rows_of: One row for each study of a batch.
        write: Where rows go.
        write_failed: Where rows of studies that could not be read go; each is reported on stderr, too.
        show_progress: Whether to show a bar on stderr.

    Returns:
        How many studies could not be read.
    """
    failed = 0
    reads = read_ahead(studies, reading.image_processor, reading.num_workers, **reading.options)
    with tqdm(total=len(studies), unit="study", disable=not show_progress) as bar:
        for read in batched_reads(reads, reading.batch_size):
            if isinstance(read, FailedStudy):
                failed += 1
                write_failed({KEY: read.study.id, "reason": read.reason})
                bar.write(f"failed: {read.reason}", file=sys.stderr)
                bar.update(1)
                continue
            for row in rows_of(read):
                write(row)
            bar.update(len(read))
    return failed


def process_to_file(
    studies: Sequence[Study],
    reading: Reading,
    rows_of: Callable[[list[ReadStudy]], Iterable[dict[str, Any]]],
    output: Path,
    format: RowFormat,
    settings: dict[str, Any],
    state: PartialState,
    done: Iterable[str] = (),
    rows_path: Path | None = None,
) -> int:
    """`process` with all that a night needs: resumption, several processes, and a list of what failed.

    Args:
        studies: All of them, those already in the output too.
        reading: How.
        rows_of: See `process`.
        output: File of the rows; one that exists is gone on with. Its name is that of the files beside it, too.
        format: Of the rows.
        settings: What decides about the rows. A run with others does not go on with the file.
        state: Of the launch.
        done: Studies that need no row although there is none of them yet.
        rows_path: Where the rows go if not into `output`, because that is made of them later.

    Returns:
        In the main process, how many studies could not be read in all processes; 0 in the others.

    Raises:
        ValueError: If the output holds rows made with other settings, or something else.
    """
    failed_path = output.with_name(f"{output.name}.failed.csv")
    rows_path = rows_path or output
    if state.is_main_process:
        _tidy_up(output, rows_path, failed_path, format, settings)
    state.wait_for_everyone()
    finished = {row[KEY] for row in read_rows(rows_path, format)} | set(done)
    left = [study for study in studies if study.id not in finished]
    if state.is_main_process and len(left) < len(studies):
        print(f"{len(studies) - len(left)} of {len(studies)} studies are in {output} already.", file=sys.stderr)
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
    failed = 0
    if state.is_main_process:
        order = [study.id for study in studies]
        merge(rows_path, format, order)
        failed = merge(failed_path, _FAILED, order)
        if not failed:
            failed_path.unlink()
    state.wait_for_everyone()
    return failed


def _tidy_up(output: Path, rows_path: Path, failed_path: Path, format: RowFormat, settings: dict[str, Any]) -> None:
    """Before anything is read: refuse what does not belong together, merge what a launch that was cut off has left."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for path in (rows_path, failed_path, _settings_path(output)):
        remove_leftovers(path)
    _keep_settings(output, rows_path, settings)
    merge(rows_path, format)
    merge(failed_path, _FAILED)
    failed_path.unlink()


def _settings_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.settings.json")


def _keep_settings(output: Path, rows_path: Path, settings: dict[str, Any]) -> None:
    """Write the settings beside the output, or compare with those it was begun with."""
    path = _settings_path(output)
    settings = json.loads(json.dumps(settings))
    is_begun = bool(part_paths(rows_path)) or any(file.exists() and file.stat().st_size for file in (output, rows_path))
    if is_begun and path.exists():
        before = json.loads(path.read_text())
        for name in sorted({*before, *settings}):
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"{output} was begun with {name} {before.get(name)!r}, not {settings.get(name)!r}. Choose another "
                    "--output, or remove it."
                )
    elif is_begun:
        raise ValueError(
            f"{output} exists, and {path.name} is missing, so nobody knows how it was made. Choose another --output, "
            "or remove it."
        )
    with whole_file(path) as aside:
        aside.write_text(json.dumps(settings, indent=2) + "\n")
