"""A large value of a Parquet file, written straight to where it is used.

Arrow's own reader decompresses the page that holds the value and then copies the value out of it; where the value is to
lie elsewhere, it is copied once more. For a volume of 111 MB, these copies and Arrow's checksum are half of the time
and most of the memory traffic. Here the page is decompressed into its place. Only what is laid out as Arrow writes a
single value is read so; all else is left to Arrow, which also says what is wrong with it.

Layout: https://parquet.apache.org/docs/file-format, data pages of version 1. A page's header is in Thrift's compact
protocol; only the four integers that it begins with are needed.
"""

import re
import struct
from collections.abc import Callable
from typing import Any

import cramjam
import numpy as np
import pyarrow as pa
import torch
from isal import isal_zlib
from pyarrow import parquet

from medct.workers_medct import Place

_FOUR_INTEGERS = re.compile(rb"\x15([\x80-\xff]{0,4}[\x00-\x7f])" * 4)
"""Each is the next field of type int32; the high bit of a byte says that another follows."""
_DATA_PAGE = 0
_LEVELS = struct.pack("<iBB", 2, 1 << 1, 2)
"""Definition levels of one value at depth 2 (a nullable struct's nullable field): a run of one 2, with its length."""


def read_value(file: Any, metadata: parquet.FileMetaData, row_group: int, path: str, place: Place) -> torch.Tensor:
    """The bytes of one column in a row group of one row.

    Args:
        file: The Parquet file, seekable.
        metadata: Its footer.
        row_group: Index of the row group.
        path: Of the column in the schema: a binary field of a struct, as `volume.bytes`.
        place: Where the result is to lie.

    Returns:
        `(num_bytes,)`, uint8, verified by its checksum.

    Raises:
        OSError, pyarrow.ArrowException: If it is damaged, or the file cannot be read.
        ValueError: If the row group has another number of rows.
    """
    group = metadata.row_group(row_group)
    (column,) = (each for each in map(group.column, range(group.num_columns)) if each.path_in_schema == path)
    file.seek(column.data_page_offset)
    found = _decompressed(file.read(column.total_compressed_size), column, place)
    if found is not None:
        return found
    shard = parquet.ParquetFile(file, metadata=metadata, page_checksum_verification=True)
    (value,) = shard.read_row_group(row_group, [path], use_threads=False).flatten().column(path)
    array = np.frombuffer(value.as_buffer(), np.uint8)
    found = place.empty(array.shape, torch.uint8)
    found.numpy()[:] = array
    return found


def _decompressed(chunk: bytes, column: parquet.ColumnChunkMetaData, place: Place) -> torch.Tensor | None:
    """The value of a chunk that is a single page of a single value; `None` if it is anything else, or damaged."""
    header = _FOUR_INTEGERS.match(chunk)
    if header is None or column.compression not in _DECOMPRESS or column.has_dictionary_page:
        return None
    kind, num_bytes, num_compressed, checksum = map(_integer, header.groups())
    start = column.total_compressed_size - num_compressed  # where there is one page; the total must agree
    if kind != _DATA_PAGE or column.num_values != 1 or num_bytes != column.total_uncompressed_size - start:
        return None
    compressed = memoryview(chunk)[start:]
    if len(compressed) != num_compressed or isal_zlib.crc32(compressed) != checksum % 2**32:
        return None
    page = place.empty((num_bytes,), torch.uint8)
    try:
        num_written = _DECOMPRESS[column.compression](compressed, page.numpy())
    except (OSError, pa.ArrowException, cramjam.DecompressionError):
        return None
    value = page[len(_LEVELS) + 4 :]
    head = bytes(page[: len(_LEVELS) + 4].numpy())
    return value if num_written == num_bytes and head == _LEVELS + struct.pack("<I", len(value)) else None


def _integer(digits: bytes) -> int:
    """Seven bits a byte, the lowest first; the lowest of all is the sign."""
    number = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(digits))
    return (number >> 1) ^ -(number & 1)


def _of_zstd(compressed: memoryview, out: np.ndarray) -> int:
    # cramjam and Arrow's streams decompress in small steps; all at once is faster by more than the copy costs.
    page = pa.Codec("zstd").decompress(pa.py_buffer(compressed), len(out))
    out[:] = np.frombuffer(page, np.uint8)
    return len(page)


_DECOMPRESS: dict[str, Callable[[memoryview, np.ndarray], int]] = {
    "ZSTD": _of_zstd,
    "LZ4": cramjam.lz4.decompress_block_into,
}
"""By Arrow's names for codecs."""


__all__ = ["read_value"]
