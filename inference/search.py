"""Embeddings of studies and reports in one Parquet file, and search in it.

Columns: `id`, the study; `image_embeds`, `projection_dim` float32, of length 1; `text_embeds`, the same for its report,
or null; `report_id`, int64, equal for equal reports, or null. The file's metadata says which model made it. It holds
no reports, no labels and nothing from a scan's header; an `id` is the path that the user gave.
"""

import json
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from medct.common.files import whole_file
from medct.data.ct_rate import REPORT_COLUMNS
from medct.data.study_names import composed, matched
from medct.data.table_files import columns_of, read_table
from medct.data.tables import join_text
from medct.errors_medct import MedCTError
from medct.inference.bulk import KEY

_NAME_COLUMNS = ("file_name", "VolumeName")
_METADATA_KEY = b"medct"


class SearchError(MedCTError, ValueError):
    """An index or a csv of reports that cannot be used; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Embeddings:
    """What an index holds.

    Args:
        ids: Names of the studies.
        image_embeds: `(studies, projection_dim)`, float32, of length 1.
        text_embeds: The same for their reports, NaN where there is none.
        report_ids: `(studies,)`, int64, equal for equal reports, 0 where there is none.
        settings: Which model made them.
    """

    ids: list[str]
    image_embeds: np.ndarray
    text_embeds: np.ndarray
    report_ids: np.ndarray
    settings: dict[str, Any]

    @property
    def has_report(self) -> np.ndarray:
        return np.isfinite(self.text_embeds).all(axis=1)

    def rows(self) -> list[dict[str, Any]]:
        """The rows, as `write_embeddings` takes them."""
        return [
            {
                KEY: study,
                "image_embeds": image,
                "text_embeds": text if has_report else None,
                "report_id": report_id if has_report else None,
            }
            for study, image, text, report_id, has_report in zip(
                self.ids, self.image_embeds, self.text_embeds, self.report_ids, self.has_report, strict=True
            )
        ]


def read_reports(path: Path) -> dict[str, str]:
    """Read reports by the names of their files, `composed`, without those that say nothing ("Not given.").

    Args:
        path: csv file or Excel sheet with a column `file_name` or `VolumeName`, and `report` or CT-RATE's two.

    Raises:
        DataError, SearchError: If the file cannot be read, columns are missing, or a file has two reports.
    """
    table = read_table(path, (), (*_NAME_COLUMNS, "report", *REPORT_COLUMNS))
    name = next((column for column in _NAME_COLUMNS if column in table), None)
    columns = ["report"] if "report" in table else [column for column in REPORT_COLUMNS if column in table]
    if name is None or not columns:
        raise SearchError(
            f"{path}: it has the columns {', '.join(columns_of(path))}. Name one {' or '.join(_NAME_COLUMNS)}, "
            f"and one report, or {' and '.join(REPORT_COLUMNS)}."
        )
    reports = [join_text(*parts) for parts in table[columns].itertuples(index=False)]
    found: dict[str, str] = {}
    for study, report in zip(table[name].str.strip().map(composed), reports, strict=True):
        if report and found.setdefault(study, report) != report:
            raise SearchError(f"{path}: {study!r} has several rows with different reports. Keep one of them.")
    return found


def report_of(study: str, reports: dict[str, str]) -> str | None:
    """The report of a study, found by its whole path or the end of it.

    Args:
        study: Path of the study.
        reports: From `read_reports`.

    Returns:
        The report under the longest end of the path; `None` if there is none.
    """
    (name,) = matched([study], reports)
    return None if name is None else reports[name]


def refuse_shared(names: Container[str], studies: Sequence[str], path: Path) -> None:
    """Refuse rows of which nobody can tell whose they are, because paths of several studies end with their name.

    Args:
        names: Of the rows of a table of reports or labels.
        studies: Paths of all studies that a row may be given to.
        path: The table, for messages.

    Raises:
        SearchError: If a row would be given to several of them.
    """
    first: dict[str, str] = {}
    for study, name in zip(studies, matched(studies, names), strict=True):
        if name is not None and first.setdefault(name, study) != study:
            raise SearchError(
                f"{path}: its row {name!r} could be of {first[name]} and of {study}. Write more of their paths into it."
            )


def can_name(study: str) -> bool:
    """Whether an index can hold the name of a study: those of files may be any bytes, those of Parquet are UTF-8.

    Args:
        study: Path of the study.
    """
    return not any("\ud800" <= letter <= "\udfff" for letter in study)


def compact(row: dict[str, Any]) -> dict[str, Any]:
    """A row with arrays of float32 in place of lists of numbers, which take eight times the memory.

    Args:
        row: As `write_embeddings` takes it.
    """
    return {name: np.array(each, np.float32) if isinstance(each, list) else each for name, each in row.items()}


def write_embeddings(path: Path, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write an index.

    Args:
        path: File to make or replace.
        rows: Each with `study`, `image_embeds`, and `text_embeds` and `report_id`, which may be `None`.
        settings: Which model made them.
    """
    width = len(rows[0]["image_embeds"]) if rows else 0
    vectors = pa.list_(pa.float32(), width)
    columns = {
        "id": pa.array([row[KEY] for row in rows], pa.string()),
        "image_embeds": pa.array([row["image_embeds"] for row in rows], vectors),
        "text_embeds": pa.array([row.get("text_embeds") for row in rows], vectors),
        "report_id": pa.array([row.get("report_id") for row in rows], pa.int64()),
    }
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(settings).encode()})
    with whole_file(path) as aside:
        pq.write_table(table, aside, write_page_checksum=True)


def read_embeddings(path: Path) -> Embeddings:
    """Read an index.

    Raises:
        SearchError: If there is no such file, or it is damaged or not an index.
    """
    wanted = ["id", "image_embeds", "text_embeds", "report_id"]
    try:
        table = pq.read_table(path, columns=wanted, page_checksum_verification=True)
        settings = json.loads((table.schema.metadata or {})[_METADATA_KEY])
        # Also of an index without any study, because none could be read.
        shape = table.num_rows, table.schema.field("image_embeds").type.list_size
    except FileNotFoundError as error:
        raise SearchError(f"{path}: no such file. Make it with `medct embed SCAN... --output {path}`.") from error
    except Exception as error:  # Arrow's, the system's, and of what is a table of something else
        kind = type(error).__name__
        raise SearchError(
            f"{path}: not a readable file of embeddings ({kind}). Make one with `medct embed`."
        ) from error
    # A copy, because Arrow's memory is read-only, and torch warns about such arrays.
    image_embeds = table["image_embeds"].combine_chunks().flatten().to_numpy().reshape(shape).copy()
    text_embeds = np.full_like(image_embeds, np.nan)
    texts = table["text_embeds"].combine_chunks()
    has_text = texts.is_valid().to_numpy(zero_copy_only=False)
    text_embeds[has_text] = texts.drop_null().flatten().to_numpy().reshape(has_text.sum(), shape[1])
    report_ids = table["report_id"].fill_null(0).to_numpy()
    return Embeddings(table["id"].to_pylist(), image_embeds, text_embeds, report_ids, settings)


def nearest(vectors: np.ndarray, query: torch.Tensor, k: int) -> tuple[list[float], list[int]]:
    """The vectors most similar to a query, by exact search.

    Args:
        vectors: `(vectors, width)`, float32, of length 1.
        query: `(width,)`, likewise.
        k: Number of vectors to find; fewer if there are fewer.

    Returns:
        Their cosine similarities and their indices, the most similar first.
    """
    found = (query[None] @ torch.as_tensor(vectors).t())[0].topk(min(k, len(vectors)))
    return found.values.tolist(), found.indices.tolist()
