"""The one way in which Parquet files are opened: without threads, and in memory that the file itself justifies.

A read with Arrow's own threads can end after the program does: a thread of its pool then asks for Python's lock while
the interpreter goes away, and the process dies with "terminate called without an active exception" (exit code 134).
That takes `pre_buffer=False` here and `use_threads=False` in `read` and `iter_batches`; one alone is not enough.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from maskbeam.transforms.files.parquet_footer import (
    ColumnChunk,
    Page,
    column_chunks,
    inflate,
    longest_text,
    read_footer,
    read_pages,
    row_groups,
    schema_depth,
)

MAX_PARQUET_NESTING = 100

# A column is read through a buffer of this size: row groups are often as large as the file.
_BUFFER_BYTES = 2**20

# Where a file is read row by row, what pages that are in memory together may inflate to: this many bytes for free, and
# this many times their size. Images hardly compress; pages of a thousand of them are common, and as large as they are.
FREE_PAGE_BYTES = 2**27
MAX_PAGE_INFLATION = 4
# Lengths of a page's values are decoded at once, and a few bytes can stand for any number of them.
MAX_PAGE_VALUES = 2**24

# A table that is read whole may become so many bytes, and so many for each byte of its file. Tables of masks inflate
# three times or so; what goes far beyond is damaged, or made to fill the memory.
_FREE_INFLATION = 2**26
_MAX_INFLATION = 32
# What a value takes beside its page, at most: itself, its two levels, and what they grow by.
_VALUE_BYTES = 16
_MAX_FOOTER_BYTES = 2**24
_BATCH_BYTES = 2**25


def open_parquet(file: IO[bytes]) -> pq.ParquetFile:
    """Opens a Parquet file. Read from it with `use_threads=False`.

    Args:
      file: seekable; stays open as long as the result is used.

    Raises:
      ValueError: it is damaged, or nests too deep.
    """
    return _open_parquet(file, read_footer(file))


def _open_parquet(file: IO[bytes], footer: bytes) -> pq.ParquetFile:
    _check_nesting(footer)
    # Arrow gets the footer from here: read again, it would be another request to an object store.
    footer_file = io.BytesIO(b"".join([b"PAR1", footer, len(footer).to_bytes(4, "little"), b"PAR1"]))
    return pq.ParquetFile(
        file,
        metadata=pq.read_metadata(footer_file),
        buffer_size=_BUFFER_BYTES,
        pre_buffer=False,
        page_checksum_verification=True,  # where there are checksums
    )


def read_table(file: IO[bytes], schema: pa.Schema, columns: Sequence[str], optional: Collection[str] = ()) -> pa.Table:
    """Reads a table whole; that it may have other columns, too, does not matter.

    Args:
      file: seekable.
      schema: fields that its columns must have; the names within lists, and whether values may be null, are not
        looked at.
      columns: of the schema; "segmentation.counts" is a part of one.
      optional: columns that are null if the file does not have them.

    Returns:
      a table with the types of the schema and the metadata of the file; any value may be null.

    Raises:
      ValueError: it is no such table, it is damaged, or it inflates to far more than its size. Says it in a few words.
    """
    allowed = _FREE_INFLATION + _MAX_INFLATION * file.seek(0, io.SEEK_END)
    footer = read_footer(file)
    if len(footer) > _MAX_FOOTER_BYTES:
        raise ValueError(f"its footer has {len(footer)} bytes; at most {_MAX_FOOTER_BYTES} are read")
    parquet = _open_parquet(file, footer)
    found = parquet.schema_arrow
    absent = {name for name in optional if name not in found.names}
    present = [name for name in columns if name not in absent]
    expected = _part_of(schema, present)
    for field in expected:
        if field.name not in found.names:
            raise ValueError(f"it has no column {field.name}: it was not written by maskbeam, or by another version")
        if found.names.count(field.name) > 1 or not _alike(found.field(field.name).type, field.type):
            raise ValueError(f"its column {field.name} is {found.field(field.name).type}; expected {field.type}")
    # Rows that are read together: a few, if each may be a long text of which the file has only one.
    num_rows = max(1, _BATCH_BYTES // max(1, _check_pages(file, footer, expected, allowed)))
    batches, num_bytes = [], 0
    for batch in parquet.iter_batches(batch_size=num_rows, columns=present, use_threads=False):
        batches.append(batch)
        num_bytes += batch.nbytes
        if num_bytes > allowed:
            raise ValueError(_describe_inflation(num_bytes))
    # Nulls are left to who knows what a row is called.
    nullable = pa.schema([_nullable(field) for field in expected], found.metadata)
    table = pa.Table.from_batches(batches, batches[0].schema) if batches else nullable.empty_table()
    table = table.combine_chunks().cast(nullable)
    table.validate(full=True)
    for index, name in enumerate(columns):
        if name in absent:
            field = _nullable(schema.field(name))
            table = table.add_column(index, field, pa.nulls(table.num_rows, field.type))
    return table


def checked_row_groups(file: IO[bytes], columns: Collection[str]) -> Iterator[int]:
    """The index of each row group, once its pages are known not to take too much memory where it is read row by row.

    Arrow inflates a page as a whole, to whatever size its header claims.

    Args:
      columns: paths of the columns that will be read, names joined by dots.

    Raises:
      ValueError: the pages of a row group that are in memory together inflate too far, or the file is damaged.
    """
    try:
        for index, group in enumerate(row_groups(read_footer(file))):
            _check_largest_pages(file, index, [column for column in group if ".".join(column.path) in columns])
            yield index
    except IndexError as error:
        raise ValueError("the file's footer, or the header of a page, is damaged") from error


def _check_largest_pages(file: IO[bytes], index: int, columns: list[ColumnChunk]) -> None:
    largest = [page for column in columns for page in _largest_pages(file, column)]
    inflated, stored = sum(page.num_bytes for page in largest), sum(page.compressed_bytes for page in largest)
    if inflated > FREE_PAGE_BYTES + MAX_PAGE_INFLATION * stored:
        raise ValueError(
            f"pages of row group {index} inflate from {stored} to {inflated} bytes: a decompression bomb. If the file "
            "is genuine, write it again with fewer rows in a row group"
        )


def _largest_pages(file: IO[bytes], column: ColumnChunk) -> list[Page]:
    """Of a column the dictionary and the page of values that inflate furthest: they are in memory together."""
    furthest: dict[bool, Page] = {}
    for page in read_pages(file, column):
        if page.num_values > MAX_PAGE_VALUES:
            raise ValueError(f"the page at byte {page.place} claims {page.num_values} values")
        furthest[page.is_dictionary] = max(page, furthest.get(page.is_dictionary, page), key=_excess_bytes)
    return list(furthest.values())


def _excess_bytes(page: Page) -> int:
    return page.num_bytes - MAX_PAGE_INFLATION * page.compressed_bytes


def _check_nesting(footer: bytes) -> None:
    """Refuses a schema that would overflow Arrow's stack. Arrow reports everything else that may be wrong."""
    try:
        depth = schema_depth(footer)
    except (ValueError, IndexError) as error:
        raise ValueError("the file's footer is damaged: it holds no schema") from error
    if depth > MAX_PARQUET_NESTING:
        raise ValueError(f"the schema nests {depth} levels deep; at most {MAX_PARQUET_NESTING} are read")


def _check_pages(file: IO[bytes], footer: bytes, expected: pa.Schema, allowed: int) -> int:
    """Refuses columns that take more memory than is allowed; bytes of the longest text that many rows may have."""
    try:
        columns = [column for column in column_chunks(footer) if column.path[0] in expected.names]
        sizes = [inflate(file, column) for column in columns]
        inflated = sum(size.num_bytes + size.num_values * _VALUE_BYTES for size in sizes)
        if inflated <= allowed:
            return max((longest_text(file, *pair) for pair in zip(columns, sizes, strict=True)), default=0)
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"its columns are damaged: {error}") from error
    raise ValueError(_describe_inflation(inflated))


def _describe_inflation(num_bytes: int) -> str:
    return f"it would take {num_bytes} bytes of memory or more: no table of masks of its size does"


def _nullable(field: pa.Field) -> pa.Field:
    kind = field.type
    if pa.types.is_struct(kind):
        kind = pa.struct([_nullable(part) for part in kind.fields])
    return pa.field(field.name, kind)


def _part_of(schema: pa.Schema, columns: Sequence[str]) -> pa.Schema:
    """The fields of some columns, of structs those parts that are asked for."""
    fields = []
    for name in columns:
        column, _, part = name.partition(".")
        field = schema.field(column)
        fields.append(field.with_type(pa.struct([field.type.field(part)])) if part else field)
    return pa.schema(fields)


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
