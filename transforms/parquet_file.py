"""The one way in which Parquet files are opened: without threads, and in memory that the file itself justifies.

A read with Arrow's own threads can end after the program does: a thread of its pool then asks for Python's lock while
the interpreter goes away, and the process dies with "terminate called without an active exception" (exit code 134).
That takes `pre_buffer=False` here and `use_threads=False` in `read` and `iter_batches`; one alone is not enough.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from transforms.parquet_footer import column_chunks, inflated_bytes, read_footer, schema_depth

MAX_PARQUET_NESTING = 100

# A column is read through a buffer of this size: row groups are often as large as the file.
_BUFFER_BYTES = 2**20

# A table that is read whole may become so many bytes, and so many for each byte of its file. Tables of masks inflate
# three times or so; what goes far beyond is damaged, or made to fill the memory.
_FREE_INFLATION = 2**26
_MAX_INFLATION = 32
# What a value takes beside its page, at most: itself, its two levels, and what they grow by.
_VALUE_BYTES = 16
_MAX_FOOTER_BYTES = 2**24


def open_parquet(file: IO[bytes], text: Sequence[str] = ()) -> pq.ParquetFile:
    """Opens a Parquet file. Read from it with `use_threads=False`.

    Args:
      file: seekable; stays open as long as the result is used.
      text: columns to read as dictionaries, which are as small in memory as in the file.

    Raises:
      ValueError: it is damaged, or nests too deep.
    """
    _check_nesting(read_footer(file))
    return pq.ParquetFile(
        file,
        buffer_size=_BUFFER_BYTES,
        pre_buffer=False,
        read_dictionary=list(text),
        page_checksum_verification=True,  # where there are checksums
    )


def read_table(file: IO[bytes], schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """Reads a table whole; that it may have other columns, too, does not matter.

    Args:
      file: seekable.
      schema: fields that its columns must have; the names within lists, and whether values may be null, are not
        looked at.
      columns: of the schema; "segmentation.counts" is a part of one.

    Returns:
      a table with the types of the schema and the metadata of the file; any value may be null.

    Raises:
      ValueError: it is no such table, it is damaged, or it inflates to far more than its size. Says it in a few words.
    """
    num_bytes = file.seek(0, io.SEEK_END)
    footer = read_footer(file)
    if len(footer) > _MAX_FOOTER_BYTES:
        raise ValueError(f"its footer has {len(footer)} bytes; at most {_MAX_FOOTER_BYTES} are read")
    _check_nesting(footer)
    expected = _part_of(schema, columns)
    found = open_parquet(file).schema_arrow
    for field in expected:
        if field.name not in found.names:
            raise ValueError(f"it has no column {field.name}: it was not written by maskbeam, or by another version")
        if found.names.count(field.name) > 1 or not _alike(found.field(field.name).type, field.type):
            raise ValueError(f"its column {field.name} is {found.field(field.name).type}; expected {field.type}")
    allowed = _FREE_INFLATION + _MAX_INFLATION * num_bytes
    _check_pages(file, footer, expected, allowed)
    table = open_parquet(file, _text_columns(expected)).read(list(columns), use_threads=False)
    if (text_bytes := _text_bytes(table)) > allowed:
        raise ValueError(f"its {num_bytes} bytes hold {text_bytes} of text: no table of masks does")
    # Nulls are left to who knows what a row is called.
    nullable = pa.schema([field.with_nullable(True) for field in expected], table.schema.metadata)
    table = table.cast(nullable)
    table.validate(full=True)
    return table


def _check_nesting(footer: bytes) -> None:
    """Refuses a schema that would overflow Arrow's stack. Arrow reports everything else that may be wrong."""
    try:
        depth = schema_depth(footer)
    except (ValueError, IndexError) as error:
        raise ValueError("the file's footer is damaged: it holds no schema") from error
    if depth > MAX_PARQUET_NESTING:
        raise ValueError(f"the schema nests {depth} levels deep; at most {MAX_PARQUET_NESTING} are read")


def _check_pages(file: IO[bytes], footer: bytes, expected: pa.Schema, allowed: int) -> None:
    """Refuses columns that would take more memory than is allowed."""
    try:
        columns = [column for column in column_chunks(footer) if column.path[0] in expected.names]
        sizes = [inflated_bytes(file, column) for column in columns]
    except (ValueError, IndexError) as error:
        raise ValueError(f"its columns are damaged: {error}") from error
    inflated = sum(num_bytes + num_values * _VALUE_BYTES for num_bytes, num_values in sizes)
    if inflated > allowed:
        raise ValueError(f"it would take {inflated} bytes of memory: no table of masks of its size does")


def _part_of(schema: pa.Schema, columns: Sequence[str]) -> pa.Schema:
    """The fields of some columns, of structs those parts that are asked for."""
    fields = []
    for name in columns:
        column, _, part = name.partition(".")
        field = schema.field(column)
        fields.append(field.with_type(pa.struct([field.type.field(part)])) if part else field)
    return pa.schema(fields)


def _text_columns(schema: pa.Schema) -> list[str]:
    """The columns of text, those in structs too."""
    parts = [
        (f"{field.name}.{part.name}", part.type)
        for field in schema
        if pa.types.is_struct(field.type)
        for part in field.type.fields
    ]
    plain = [(field.name, field.type) for field in schema]
    return [name for name, kind in (*plain, *parts) if pa.types.is_string(kind)]


def _alike(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether one type holds the same values as the other."""
    if pa.types.is_struct(expected):
        return pa.types.is_struct(found) and all(
            found.get_field_index(part.name) >= 0 and _alike(found.field(part.name).type, part.type)
            for part in expected.fields
        )
    if _is_list(expected):
        return _is_list(found) and _alike(found.value_type, expected.value_type)
    if pa.types.is_string(expected):
        found = found.value_type if pa.types.is_dictionary(found) else found
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    return bool(found == expected)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _text_bytes(table: pa.Table) -> int:
    """Bytes of all text once no dictionary holds it: one of a megabyte may be in a million rows."""
    total = 0
    for column in table.flatten().itercolumns():
        for chunk in column.chunks if pa.types.is_dictionary(column.type) else ():
            lengths = pc.binary_length(chunk.dictionary).to_numpy(zero_copy_only=False)
            total += int(lengths[chunk.indices.drop_null().to_numpy()].sum(dtype=np.int64))
    return total
