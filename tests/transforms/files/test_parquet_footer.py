"""What a Parquet file says of its pages, read from bytes made by hand; whole files are in test_door.py."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maskbeam.transforms.files.parquet_footer import ColumnChunk, Inflated, column_chunks, inflate, read_footer


def zigzag(value: int) -> bytes:
    """A 32-bit integer as Thrift's compact protocol has it."""
    value = value << 1 if value >= 0 else (-value << 1) - 1
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def page(num_bytes: int, compressed: int, num_values: int, encoding: int = 0) -> bytes:
    """A PageHeader of a data page: field headers 0x15 = the next field, an integer; 0x2c = the one after, a struct."""
    sizes = b"\x15" + zigzag(0) + b"\x15" + zigzag(num_bytes) + b"\x15" + zigzag(compressed)
    data_page = b"\x15" + zigzag(num_values) + b"\x15" + zigzag(encoding) + b"\x15\x06\x15\x06\x00"
    return sizes + b"\x2c" + data_page + b"\x00"


def test_pages_say_what_they_become() -> None:
    first, second = page(2**31 - 1, 3, 5), page(100, 2, 7)
    data = b"PAR1" + first + b"xxx" + second + b"xx"
    column = ColumnChunk(("a",), 12, 4, len(data) - 4)
    assert inflate(io.BytesIO(data), column) == Inflated(2**31 + 99, 12)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (page(10, 1, 2**31 - 1), "the pages have 2147483647 values; its footer says 12"),
        (page(10, 1, 3), "the pages have 3 values"),
        (page(-1, 1, 12), "negative sizes"),
        (page(10, -1, 12), "negative sizes"),
        (page(10, 1, -12), "negative sizes"),
        (page(10, 1, 12, encoding=7), "an encoding that no reader here takes"),
        (b"\x19\xfc" + b"\xff" * 4 + b"\x0f", "nest more than|index out of range|type"),
    ],
)
def test_pages_that_lie_are_an_error(header: bytes, told: str) -> None:
    with pytest.raises((ValueError, IndexError), match=told):
        inflate(io.BytesIO(header + b"x"), ColumnChunk(("a",), 12, 0, len(header) + 1))


def test_the_columns_are_those_that_were_written() -> None:
    rows = pa.table({"a": [1, 2, 3, 4, 5], "b": [{"c": ["x"]}] * 4 + [{"c": ["y"] * 4}]})
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, row_group_size=3, compression="zstd")
    columns = list(column_chunks(read_footer(buffer)))
    assert [(column.path, column.num_values) for column in columns] == [
        (("a",), 3),
        (("b", "c", "list", "element"), 3),
        (("a",), 2),
        (("b", "c", "list", "element"), 5),
    ]
    metadata = pq.ParquetFile(buffer).metadata
    for index, column in enumerate(columns):
        written = metadata.row_group(index // 2).column(index % 2)
        assert (column.num_bytes, column.start) == (written.total_compressed_size, written.dictionary_page_offset)
        assert inflate(buffer, column).num_values == written.num_values


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1", b"a text of more than eight bytes"])
def test_what_is_no_parquet_file_has_no_footer(data: bytes) -> None:
    with pytest.raises(ValueError, match="no Parquet file"):
        read_footer(io.BytesIO(data))
