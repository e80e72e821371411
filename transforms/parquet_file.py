"""The one way in which Parquet files are opened: without threads, and not before their schema is known to be safe.

A read with Arrow's own threads can end after the program does: a thread of its pool then asks for Python's lock while
the interpreter goes away, and the process dies with "terminate called without an active exception" (exit code 134).
That takes `pre_buffer=False` here and `use_threads=False` in `read` and `iter_batches`; one alone is not enough.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from typing import IO

import pyarrow.parquet as pq

from transforms.parquet_footer import ColumnChunk, PageHeader, read_page_header, read_row_groups, schema_depth

MAX_PARQUET_NESTING = 100

# What pages that are in memory together may inflate to: this many bytes for free, and this many times their size.
# Images hardly compress; pages of a thousand of them are common, and as large as they are.
FREE_PAGE_BYTES = 2**27
MAX_PAGE_INFLATION = 4
# Lengths of a page's values are decoded at once, and a few bytes can stand for any number of them.
MAX_PAGE_VALUES = 2**24

# A page's header is some tens of bytes, and many more with statistics.
_HEADER_BYTES = 256
_MAX_HEADER_BYTES = 2**20

# A column is read through a buffer of this size: row groups are often as large as the file.
_BUFFER_BYTES = 2**20


def open_parquet(file: IO[bytes]) -> pq.ParquetFile:
    """Opens a Parquet file. Read from it with `use_threads=False`.

    Args:
      file: seekable; stays open as long as the result is used.

    Raises:
      ValueError: it is damaged, or nests too deep.
    """
    _check_nesting(file)
    return pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def checked_row_groups(file: IO[bytes], columns: Collection[str]) -> Iterator[int]:
    """The index of each row group, once its pages are known not to take too much memory.

    Arrow inflates a page as a whole, to whatever size its header claims.

    Args:
      columns: paths of the columns that will be read, names joined by dots.

    Raises:
      ValueError: the pages of a row group that are in memory together inflate too far, or the file is damaged.
    """
    try:
        for index, group in enumerate(read_row_groups(_read_footer(file) or b"\0")):
            _check_pages(file, index, [chunk for chunk in group if chunk.path in columns])
            yield index
    except IndexError as error:
        raise ValueError("the file's footer is damaged") from error


def _check_pages(file: IO[bytes], index: int, columns: list[ColumnChunk]) -> None:
    largest = [page for chunk in columns for page in _largest_pages(file, chunk)]
    inflated, stored = sum(page.inflated_bytes for page in largest), sum(page.num_bytes for page in largest)
    if inflated > FREE_PAGE_BYTES + MAX_PAGE_INFLATION * stored:
        raise ValueError(
            f"pages of row group {index} inflate from {stored} to {inflated} bytes: a decompression bomb. If the file "
            "is genuine, write it again with fewer rows in a row group"
        )


def _largest_pages(file: IO[bytes], chunk: ColumnChunk) -> list[PageHeader]:
    """Of a column the dictionary and the page of values that inflate furthest: they are in memory together."""
    furthest: dict[bool, PageHeader] = {}
    place, values_left = chunk.start, chunk.num_values
    while values_left > 0 and place < chunk.start + chunk.num_bytes:
        page = _page_header_at(file, place)
        if page.num_values > (page.inflated_bytes if page.is_dictionary else MAX_PAGE_VALUES):
            raise ValueError(f"the page at byte {place} claims {page.num_values} values in {page.inflated_bytes} bytes")
        furthest[page.is_dictionary] = max(page, furthest.get(page.is_dictionary, page), key=_excess_bytes)
        values_left -= 0 if page.is_dictionary else page.num_values
        place += page.header_bytes + page.num_bytes
    return list(furthest.values())


def _excess_bytes(page: PageHeader) -> int:
    return page.inflated_bytes - MAX_PAGE_INFLATION * page.num_bytes


def _page_header_at(file: IO[bytes], place: int) -> PageHeader:
    for num_bytes in (_HEADER_BYTES, _MAX_HEADER_BYTES):
        try:
            file.seek(place)
            return read_page_header(file.read(num_bytes))
        except IndexError:  # statistics can make it long
            continue
        except ValueError as error:
            raise ValueError(f"the page at byte {place} is damaged: {error}") from error
    raise ValueError(f"the page at byte {place} is damaged: its header has no end")


def _check_nesting(file: IO[bytes]) -> None:
    """Refuses a schema that would overflow Arrow's stack. Arrow reports everything else that may be wrong."""
    footer = _read_footer(file)
    if footer is None:
        return
    try:
        depth = schema_depth(footer)
    except (ValueError, IndexError) as error:
        raise ValueError("the file's footer is damaged: it holds no schema") from error
    if depth > MAX_PARQUET_NESTING:
        raise ValueError(f"the schema nests {depth} levels deep; at most {MAX_PARQUET_NESTING} are read")


def _read_footer(file: IO[bytes]) -> bytes | None:
    """The serialized FileMetaData; None if the file does not end as a Parquet file does, which Arrow reports."""
    # A file ends with: FileMetaData | its length, uint32 little endian | PAR1.
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(max(num_bytes - 8, 0))
    tail = file.read(8)
    footer_bytes = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or footer_bytes > num_bytes - 8:
        return None
    file.seek(num_bytes - 8 - footer_bytes)
    return file.read(footer_bytes)
