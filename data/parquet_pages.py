"""A large value of a Parquet file, written straight to where it is used.

Arrow's own reader decompresses the page that holds the value and then copies the value out of it; where the value is to
lie elsewhere, it is copied once more. For a volume of 111 MB, these copies and Arrow's checksum are half of the time
and most of the memory traffic. Here the page is decompressed into its place. Only what is laid out as Arrow writes a
single value is read so; all else is left to Arrow, which also says what is wrong with it.

Where a value lies is noted when it is written. The footer says so as well, but it has no checksum, and some flipped
bits of what it says of a column end the process that asks Arrow for it.

Layout: https://parquet.apache.org/docs/file-format, data pages of version 1. A page's header is in Thrift's compact
protocol; only the four integers that it begins with are needed.
"""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


class Chunk(NamedTuple):
    """Where the only value of a column in a row group lies: a page with its header.

    Args:
        offset: Of the first byte in the file.
        num_bytes: As it is stored.
        compression: "zstd" or "lz4".
    """

    offset: int
    num_bytes: int
    compression: str


def chunks_of(path: Path, column: str) -> list[Chunk]:
    """Where the values of a column lie, one for each row group.

    Args:
        path: Parquet file that has just been written, each row group of one row.
        column: Its path in the schema.
    """
    metadata = parquet.read_metadata(path)
    index = [metadata.schema.column(index).path for index in range(metadata.num_columns)].index(column)
    columns = [metadata.row_group(row).column(index) for row in range(metadata.num_row_groups)]
    return [Chunk(each.data_page_offset, each.total_compressed_size, each.compression.lower()) for each in columns]


def read_value(file: Any, chunk: Chunk, num_bytes: int, place: Place) -> torch.Tensor | None:
    """The value of a chunk, a binary field of a struct.

    Args:
        file: The Parquet file, seekable.
        chunk: Where the value lies.
        num_bytes: Length of the value.
        place: Where the result is to lie.

    Returns:
        `(num_bytes,)`, uint8, verified by its checksum; `None` if there is no such value, or it is damaged.
    """
    file.seek(chunk.offset)
    stored = file.read(chunk.num_bytes)
    header = _FOUR_INTEGERS.match(stored)
    if header is None or chunk.compression not in _DECOMPRESS:
        return None
    head = _LEVELS + struct.pack("<I", num_bytes)
    kind, num_decompressed, num_compressed, checksum = map(_integer, header.groups())
    if kind != _DATA_PAGE or num_decompressed != len(head) + num_bytes or not 0 < num_compressed < len(stored):
        return None
    compressed = memoryview(stored)[-num_compressed:]  # all that follows the header, if there is but one page
    if isal_zlib.crc32(compressed) != checksum % 2**32:
        return None
    page = place.empty((num_decompressed,), torch.uint8)
    try:
        num_written = _DECOMPRESS[chunk.compression](compressed, page.numpy())
    except (OSError, pa.ArrowException, cramjam.DecompressionError):
        return None
    is_one_value = num_written == num_decompressed and bytes(page[: len(head)].numpy()) == head
    return page[len(head) :] if is_one_value else None


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
    "zstd": _of_zstd,
    "lz4": cramjam.lz4.decompress_block_into,
}


__all__ = ["Chunk", "chunks_of", "read_value"]
