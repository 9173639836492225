"""Single values of Parquet files: what Arrow reads, whatever way the file was written, and never a damaged one."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from medct.data import parquet_pages
from medct.data.parquet_pages import read_value
from medct.workers_medct import Place

SCHEMA = pa.schema([("id", pa.string()), ("volume", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
AS_PREPARED = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
VALUE = np.random.default_rng(0).integers(0, 9, 5000, np.uint8).tobytes()


def written(value=VALUE, rows=1, **options) -> pa.Buffer:
    table = pa.Table.from_pylist([{"id": "one", "volume": {"bytes": value}}] * rows, SCHEMA)
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, **{**AS_PREPARED, "compression": "lz4", **options})
    return sink.getvalue()


def read(file: pa.Buffer | bytes, metadata=None) -> bytes:
    metadata = metadata or parquet.read_metadata(pa.BufferReader(file))
    return bytes(read_value(pa.BufferReader(file), metadata, 0, "volume.bytes", Place()).numpy())


@pytest.fixture
def arrow_reads(monkeypatch):
    """How often Arrow itself was asked to read."""
    asked = []
    whole = parquet.ParquetFile

    def counted(*args, **options):
        asked.append(1)
        return whole(*args, **options)

    monkeypatch.setattr(parquet_pages.parquet, "ParquetFile", counted)
    return asked


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("length", [1, 2, 100, 5000])
def test_what_prepare_writes_is_read_without_arrow(compression, length, arrow_reads):
    file = written(VALUE[:length], compression=compression)
    arrow_reads.clear()
    assert read(file) == VALUE[:length]
    assert not arrow_reads


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none"},
        {"compression": "snappy"},
        {"compression": "gzip"},
        {"data_page_version": "2.0"},
        {"use_dictionary": True},
        {"write_page_checksum": False},
    ],
    ids=str,
)
def test_what_is_written_otherwise_is_read_by_arrow(options, arrow_reads):
    file = written(**options)
    arrow_reads.clear()
    assert read(file) == VALUE
    assert arrow_reads


@given(st.binary(min_size=1, max_size=300), st.sampled_from(["zstd", "lz4"]), st.booleans())
def test_every_value_is_as_it_was_written(value, compression, with_statistics):
    assert read(written(value, compression=compression, write_statistics=with_statistics)) == value


def test_several_rows_in_a_group_are_refused():
    with pytest.raises(ValueError, match="too many values"):
        read(written(rows=2))


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_no_flipped_bit_of_a_chunk_is_read(compression):
    value = VALUE[:200]
    file = bytearray(written(value, compression=compression))
    metadata = parquet.read_metadata(pa.BufferReader(bytes(file)))
    column = metadata.row_group(0).column(1)
    start, refused = column.data_page_offset, 0
    for place, bit in itertools.product(range(start, start + column.total_compressed_size), range(8)):
        file[place] ^= 1 << bit
        try:
            assert read(bytes(file), metadata) == value, (place - start, bit)  # some bits of a header mean nothing
        except (OSError, pa.ArrowException, ValueError):
            refused += 1
        file[place] ^= 1 << bit
    assert refused > 7 * column.total_compressed_size


def test_a_value_is_written_into_its_place_alone():
    class Counted(Place):
        made = ()

        def empty(self, shape, dtype=None):
            self.made += (super().empty(shape, dtype),)
            return self.made[-1]

    file, place = written(), Counted()
    value = read_value(pa.BufferReader(file), parquet.read_metadata(pa.BufferReader(file)), 0, "volume.bytes", place)
    (memory,) = place.made
    assert value.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
