"""Single values of Parquet files: read if written as `medct prepare` writes them, and never a damaged one."""

import io
import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from medct.data.parquet_pages import Chunk, chunks_of, read_value
from medct.workers_medct import Place

SCHEMA = pa.schema([("id", pa.string()), ("volume", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
AS_PREPARED = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True, "row_group_size": 1}
VALUE = np.random.default_rng(0).integers(0, 9, 5000, np.uint8).tobytes()


def written(*values, **options) -> tuple[bytes, list[Chunk]]:
    """A file, and where its values lie."""
    table = pa.Table.from_pylist([{"id": "one", "volume": {"bytes": value}} for value in values], SCHEMA)
    file = io.BytesIO()
    parquet.write_table(table, file, **{**AS_PREPARED, "compression": "lz4", **options})
    return file.getvalue(), chunks_of(io.BytesIO(file.getvalue()), "volume.bytes")


def read(file: bytes, chunk: Chunk, num_bytes: int, place: Place | None = None) -> bytes | None:
    found = read_value(io.BytesIO(file), chunk, num_bytes, place or Place())
    return None if found is None else bytes(found.numpy())


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=3), st.sampled_from(["zstd", "lz4"]))
def test_every_value_is_as_it_was_written(values, compression):
    file, chunks = written(*values, compression=compression)
    assert [read(file, *each) for each in zip(chunks, map(len, values), strict=True)] == values


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_large_value_is_as_it_was_written(compression):
    file, (chunk,) = written(VALUE * 400, compression=compression)
    assert chunk.num_bytes < len(VALUE) * 400 and read(file, chunk, len(VALUE) * 400) == VALUE * 400


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none"},
        {"compression": "snappy"},
        {"data_page_version": "2.0"},
        {"use_dictionary": True},
        {"write_page_checksum": False},
        {"row_group_size": 2},
    ],
    ids=str,
)
def test_what_is_written_otherwise_is_left_to_arrow(options):
    file, chunks = written(VALUE, VALUE, **options)
    assert {read(file, chunk, len(VALUE)) for chunk in chunks} == {None}


def test_another_length_than_expected_is_left_to_arrow():
    file, (chunk,) = written(VALUE)
    assert [read(file, chunk, len(VALUE) + off) for off in (-1, 1, 2**31)] == [None] * 3
    assert read(file, chunk._replace(num_bytes=chunk.num_bytes - 1), len(VALUE)) is None
    assert read(file, chunk._replace(offset=len(file)), len(VALUE)) is None


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_no_flipped_bit_of_a_chunk_is_read(compression):
    value = VALUE[:200]
    whole, (chunk,) = written(value, compression=compression)
    file, refused = bytearray(whole), 0
    for place, bit in itertools.product(range(chunk.offset, chunk.offset + chunk.num_bytes), range(8)):
        file[place] ^= 1 << bit
        found = read(bytes(file), chunk, len(value))
        assert found in (None, value), (place - chunk.offset, bit)  # some bits of a header mean nothing
        refused += found is None
        file[place] ^= 1 << bit
    assert refused > 7 * chunk.num_bytes


def test_a_value_is_written_into_its_place_alone():
    class Counted(Place):
        made = ()

        def empty(self, shape, dtype=None):
            self.made += (super().empty(shape, dtype),)
            return self.made[-1]

    file, (chunk,) = written(VALUE)
    place = Counted()
    value = read_value(io.BytesIO(file), chunk, len(VALUE), place)
    (memory,) = place.made
    assert value.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
