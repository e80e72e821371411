"""What a Parquet file says of itself, read from its bytes before Arrow reads them, so that it cannot hurt.

Arrow descends into nested columns by recursion, without a limit: a footer of a few hundred kilobytes with thousands of
levels overflows the stack and ends the process (tried with pyarrow 25: 7,000 levels in a thread of 8 MiB). Asking it
for a damaged file's columns ends the process, too. And it takes the memory for a page that the page's header asks for:
a file of a few kilobytes may ask for gigabytes, whatever the sizes in its footer are.

FileMetaData, SchemaElement and PageHeader are those of parquet-format's parquet.thrift, in Thrift's compact protocol
(thrift/doc/specs/thrift-compact-protocol.md).
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO

import pyarrow as pa

# Read at once from the end of a file: the whole footer, unless it is long. A request to an object store each.
_TAIL_BYTES = 2**15

# Fields of FileMetaData, SchemaElement, RowGroup and ColumnChunk.
_SCHEMA, _ROW_GROUPS = 2, 4
_NUM_CHILDREN = 5
_COLUMNS, _NUM_ROWS = 1, 3
_COLUMN_META_DATA = 3
# Of ColumnMetaData.
_TYPE, _PATH, _CODEC, _NUM_VALUES, _COMPRESSED_BYTES, _DATA_OFFSET, _DICTIONARY_OFFSET = 1, 3, 4, 5, 7, 9, 11
_TEXT = 6  # the type of columns of byte arrays
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
# Of PageHeader, and of the headers of data pages (of two versions) in it.
_PAGE_TYPE, _PAGE_BYTES, _PAGE_COMPRESSED_BYTES, _DATA_PAGE, _DATA_PAGE_V2 = 1, 2, 3, 5, 8
_DICTIONARY_PAGE = 2  # the type of the page with the values to which others point
_PAGE_VALUES = 1
_PAGE_ENCODING = {_DATA_PAGE: 2, _DATA_PAGE_V2: 4}

# An encoding of strings in which each may repeat most of the one before, so that they grow with the square of the page.
_DELTA_BYTE_ARRAY = 7

# Bytes that are read to find a page's header in; those with long statistics have more, up to Arrow's own limit.
_HEADER_BYTES = (2**12, 2**24)

# Thrift's structs within structs: more than Parquet has, and fewer than Python's stack takes.
_MAX_STRUCTS = 64


def read_footer(file: IO[bytes]) -> bytes:
    """The serialized FileMetaData at the end of a Parquet file.

    Raises:
      ValueError: it is no Parquet file, or is cut.
    """
    # A file ends with: FileMetaData | its length, uint32 little endian | PAR1.
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(max(num_bytes - _TAIL_BYTES, 0))
    tail = file.read(_TAIL_BYTES)
    footer_bytes = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != b"PAR1" or footer_bytes > num_bytes - 8:
        raise ValueError("it is no Parquet file, or its end is missing")
    if footer_bytes <= len(tail) - 8:
        return tail[len(tail) - 8 - footer_bytes : -8]
    file.seek(num_bytes - 8 - footer_bytes)
    return file.read(footer_bytes)


def schema_depth(footer: bytes) -> int:
    """Levels of groups in the schema of a serialized FileMetaData; 1 = all columns are plain.

    Raises:
      ValueError, IndexError: the bytes are no FileMetaData.
    """
    values = _CompactValues(footer)
    depth = 0
    for number, kind in values.fields():
        if number != _SCHEMA:
            values.skip(kind)
            continue
        # The schema is a tree in preorder: of each group on the way to an element, the children still to come.
        groups: list[int] = []
        for _ in range(values.list_size()):
            children = values.num_children()
            if groups:
                groups[-1] -= 1
            if children > 0:
                groups.append(children)
                depth = max(depth, len(groups))
            while groups and groups[-1] <= 0 and children <= 0:
                groups.pop()
        return depth
    return depth


@dataclass(frozen=True)
class ColumnChunk:
    """One column of one row group, as the footer has it.

    Attributes:
      path: names of the column and of its parts, as in ("segmentation", "counts").
      num_values: at the lowest level.
      start, num_bytes: where its pages lie in the file, compressed.
      text: whether its values are byte arrays.
      codec: of the compression, None without one.
    """

    path: tuple[str, ...]
    num_values: int
    start: int
    num_bytes: int
    text: bool = False
    codec: str | None = None


def column_chunks(footer: bytes) -> Iterator[ColumnChunk]:
    """The column chunks of all row groups; see row_groups."""
    return itertools.chain.from_iterable(row_groups(footer))


def row_groups(footer: bytes) -> Iterator[list[ColumnChunk]]:
    """The column chunks of each row group of a serialized FileMetaData.

    Raises:
      ValueError, IndexError: the bytes are no FileMetaData, or its numbers of rows and values contradict each other.
    """
    values = _CompactValues(footer)
    for number, kind in values.fields():
        if number != _ROW_GROUPS:
            values.skip(kind)
            continue
        for _ in range(values.list_size()):
            yield values.row_group()


@dataclass(frozen=True)
class Inflated:
    """What a column chunk becomes, by its pages' headers.

    Attributes:
      num_bytes: of its pages, decompressed.
      num_values: in them.
      dictionary: place, compressed and decompressed bytes of the page with the values to which others point.
    """

    num_bytes: int
    num_values: int
    dictionary: tuple[int, int, int] | None = None


def inflate(file: IO[bytes], column: ColumnChunk) -> Inflated:
    """Reads the headers of a column chunk's pages.

    Raises:
      ValueError, IndexError: a header is damaged, or an encoding may inflate without bound.
    """
    num_bytes = num_values = 0
    dictionary = None
    for page in read_pages(file, column):
        if page.encoding == _DELTA_BYTE_ARRAY:
            raise ValueError(f"the page at byte {page.place} has an encoding that no reader here takes")
        num_bytes, num_values = num_bytes + page.num_bytes, num_values + page.num_values
        if page.is_dictionary:
            dictionary = (page.place + page.header_bytes, page.compressed_bytes, page.num_bytes)
    if num_values != column.num_values:
        raise ValueError(f"the pages have {num_values} values; its footer says {column.num_values}")
    return Inflated(num_bytes, num_values, dictionary)


def longest_text(file: IO[bytes], column: ColumnChunk, inflated: Inflated) -> int:
    """Bytes of the longest text in a column chunk's dictionary: any row may point to it. 0 without a dictionary.

    Raises:
      ValueError: it cannot be decompressed.
    """
    if not column.text or inflated.dictionary is None:
        return 0
    start, compressed_bytes, num_bytes = inflated.dictionary
    file.seek(start)
    data = file.read(compressed_bytes)
    if column.codec is not None:
        if column.codec not in _CODECS.values():
            raise ValueError(f"the column {'.'.join(column.path)} has a compression that is not read here")
        data = pa.Codec(column.codec).decompress(data, num_bytes, asbytes=True)
    longest = place = 0
    while place + 4 <= len(data):  # of each text its length, uint32 little endian, and itself
        length = int.from_bytes(data[place : place + 4], "little")
        longest, place = max(longest, length), place + 4 + length
    return longest


@dataclass(frozen=True)
class Page:
    """A page, as its header has it.

    Attributes:
      kind: by parquet.thrift.
      header_bytes, num_bytes, compressed_bytes: of the header, of the page in memory, of the page in the file.
      num_values: 0 for a dictionary.
      encoding: by parquet.thrift; -1 for a dictionary.
      place: of its header in the file.
    """

    kind: int
    header_bytes: int
    num_bytes: int
    compressed_bytes: int
    num_values: int
    encoding: int
    place: int = 0

    @property
    def is_dictionary(self) -> bool:
        return self.kind == _DICTIONARY_PAGE


def read_pages(file: IO[bytes], column: ColumnChunk) -> Iterator[Page]:
    """The pages of a column chunk that Arrow would read: until all values are there, or the chunk ends.

    Raises:
      ValueError, IndexError: a header is damaged.
    """
    place, end, values_left = column.start, column.start + column.num_bytes, column.num_values
    while values_left > 0 and place < end:
        page = _read_page(file, place)
        if min(page.num_bytes, page.compressed_bytes, page.num_values) < 0:
            raise ValueError(f"the page at byte {place} has negative sizes")
        yield page
        values_left -= page.num_values
        place += page.header_bytes + page.compressed_bytes


def _read_page(file: IO[bytes], place: int) -> Page:
    for most in _HEADER_BYTES:
        file.seek(place)
        data = file.read(most)
        try:
            return replace(_CompactValues(data).page(), place=place)
        except IndexError:
            if len(data) < most or most == _HEADER_BYTES[-1]:
                raise
    raise AssertionError("the last try raises")


class _CompactValues:
    """Values of Thrift's compact protocol, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def _byte(self) -> int:
        self._place += 1
        return self._data[self._place - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()  # zigzag: 0, -1, 1, -2, ...
        return (value >> 1) ^ -(value & 1)

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and type of each field of a struct; the caller reads or skips the value before the next one."""
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._integer()
            yield number, header & 15

    def list_size(self) -> int:
        """The header of a list."""
        size = self._byte() >> 4
        return self._varint() if size == 15 else size

    def num_children(self) -> int:
        """Reads a SchemaElement; 0 for a column."""
        children = 0
        for number, kind in self.fields():
            if number == _NUM_CHILDREN:
                children = self._integer()
            else:
                self.skip(kind)
        return children

    def row_group(self) -> list[ColumnChunk]:
        """Reads a RowGroup."""
        columns: list[ColumnChunk] = []
        num_rows = -1
        for number, kind in self.fields():
            if number == _COLUMNS:
                columns = [self._column_chunk() for _ in range(self.list_size())]
            elif number == _NUM_ROWS:
                num_rows = self._integer()
            else:
                self.skip(kind)
        if any(not 0 <= num_rows <= column.num_values for column in columns):
            raise ValueError(f"a group of {num_rows} rows has columns of fewer values")
        return columns

    def _column_chunk(self) -> ColumnChunk:
        path: tuple[str, ...] = ()
        found: dict[int, int] = {}
        for number, kind in self.fields():
            if number != _COLUMN_META_DATA:
                self.skip(kind)
                continue
            for field, inner in self.fields():
                if field == _PATH:
                    path = tuple(self._text() for _ in range(self.list_size()))
                elif inner in (4, 5, 6):
                    found[field] = self._integer()
                else:
                    self.skip(inner)
        data, dictionary = found.get(_DATA_OFFSET, -1), found.get(_DICTIONARY_OFFSET, 0)
        start = dictionary if 0 < dictionary < data else data
        number = found.get(_CODEC, 0)
        codec = _CODECS.get(number, f"number {number}") if number else None
        num_values, num_bytes = found.get(_NUM_VALUES, -1), found.get(_COMPRESSED_BYTES, -1)
        column = ColumnChunk(path, num_values, start, num_bytes, found.get(_TYPE) == _TEXT, codec)
        if min(column.num_values, column.start, column.num_bytes) < 0:
            raise ValueError(f"the column {'.'.join(path)} has no place in the file")
        return column

    def page(self) -> Page:
        """Reads a PageHeader."""
        sizes = {_PAGE_TYPE: -1, _PAGE_BYTES: -1, _PAGE_COMPRESSED_BYTES: -1}
        num_values, encoding = 0, -1
        for number, kind in self.fields():
            if number in sizes:
                sizes[number] = self._integer()
            elif number in _PAGE_ENCODING:
                for field, inner in self.fields():
                    if field == _PAGE_VALUES:
                        num_values = self._integer()
                    elif field == _PAGE_ENCODING[number]:
                        encoding = self._integer()
                    else:
                        self.skip(inner)
            else:
                self.skip(kind)
        return Page(
            sizes[_PAGE_TYPE], self._place, sizes[_PAGE_BYTES], sizes[_PAGE_COMPRESSED_BYTES], num_values, encoding
        )

    def _text(self) -> str:
        num_bytes = self._varint()
        self._place += num_bytes
        return self._data[self._place - num_bytes : self._place].decode("utf-8", "backslashreplace")

    def skip(self, kind: int, depth: int = 0) -> None:
        """Skips a field's value."""
        if depth > _MAX_STRUCTS:
            raise ValueError(f"values nest more than {_MAX_STRUCTS} levels deep")
        if kind in (1, 2):  # true, false
            return
        if kind == 3:  # a byte
            self._place += 1
        elif kind in (4, 5, 6):  # integers
            self._varint()
        elif kind == 7:  # a double
            self._place += 8
        elif kind == 8:  # a string
            num_bytes = self._varint()
            self._place += num_bytes
        elif kind in (9, 10):  # a list, a set
            header = self._byte()
            size = self._varint() if header >> 4 == 15 else header >> 4
            for _ in range(size):
                self.skip(3 if header & 15 in (1, 2) else header & 15, depth + 1)
                if self._place > len(self._data):
                    raise IndexError("a list that is longer than the data")
        elif kind == 12:  # a struct
            for _, inner in self.fields():
                self.skip(inner, depth + 1)
        else:
            raise ValueError(f"a value of type {kind}, which Parquet's own structs do not have")
