"""What a Parquet file says of itself, read from its bytes before Arrow reads them.

Arrow descends into nested columns by recursion, without a limit: a footer of a few hundred kilobytes with thousands of
levels overflows the stack and ends the process (tried with pyarrow 25: 7,000 levels in a thread of 8 MiB). It also
allocates whatever size the header of a page claims.

FileMetaData, RowGroup, ColumnChunk, ColumnMetaData, SchemaElement and PageHeader are those of parquet-format's
parquet.thrift, in Thrift's compact protocol (thrift/doc/specs/thrift-compact-protocol.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Numbers of fields.
_SCHEMA, _ROW_GROUPS = 2, 4  # FileMetaData
_NUM_CHILDREN = 5  # SchemaElement
_COLUMNS = 1  # RowGroup
_META_DATA = 3  # ColumnChunk
_PATH, _COLUMN_VALUES, _COLUMN_BYTES, _DATA_OFFSET, _DICTIONARY_OFFSET = 3, 5, 7, 9, 11  # ColumnMetaData
_PAGE_KIND, _INFLATED_BYTES, _PAGE_BYTES = 1, 2, 3  # PageHeader
_HEADERS_BY_KIND = (5, 7, 8)  # PageHeader: of data, a dictionary, data of version 2; field 1 of each counts the values

_DICTIONARY_PAGE = 2  # a kind of page


@dataclass(frozen=True)
class ColumnChunk:
    """A column of a row group.

    Attributes:
      path: names from the root to the column, joined by dots.
      start, num_bytes: where its pages are in the file.
      num_values: in all its pages.
    """

    path: str
    start: int
    num_bytes: int
    num_values: int


@dataclass(frozen=True)
class PageHeader:
    """What precedes a page.

    Attributes:
      header_bytes: its own size.
      is_dictionary: whether the page holds a dictionary and no values of rows.
      inflated_bytes, num_bytes: of the page, in memory and in the file.
      num_values: in the page.
    """

    header_bytes: int
    is_dictionary: bool
    inflated_bytes: int
    num_bytes: int
    num_values: int


def read_page_header(data: bytes) -> PageHeader:
    """The header that the bytes begin with.

    Raises:
      IndexError: it goes on beyond the bytes.
      ValueError: they are no PageHeader.
    """
    values = _CompactValues(data)
    numbers = {_PAGE_KIND: -1, _INFLATED_BYTES: -1, _PAGE_BYTES: -1}
    num_values = 0
    for number, kind in values.fields():
        if number in numbers and kind in _INTEGERS:
            numbers[number] = values.integer()
        elif number in _HEADERS_BY_KIND and kind == _STRUCT:
            num_values = values.integers(1).get(1, 0)
        else:
            values.skip(kind)
    page_kind, inflated_bytes, num_bytes = numbers.values()
    if min(inflated_bytes, num_bytes, num_values) < 0:
        raise ValueError(f"it claims {num_values} values in {inflated_bytes} bytes, {num_bytes} of them in the file")
    return PageHeader(values.place, page_kind == _DICTIONARY_PAGE, inflated_bytes, num_bytes, num_values)


def read_row_groups(footer: bytes) -> Iterator[list[ColumnChunk]]:
    """The columns of each row group of a serialized FileMetaData.

    Raises:
      ValueError, IndexError: the bytes are no FileMetaData.
    """
    values = _CompactValues(footer)
    for number, kind in values.fields():
        if number == _ROW_GROUPS:
            for _ in range(values.list_size()):
                yield _read_row_group(values)
        else:
            values.skip(kind)


def _read_row_group(values: _CompactValues) -> list[ColumnChunk]:
    columns: list[ColumnChunk] = []
    for number, kind in values.fields():
        if number == _COLUMNS:
            columns = [_read_column_chunk(values) for _ in range(values.list_size())]
        else:
            values.skip(kind)
    return columns


def _read_column_chunk(values: _CompactValues) -> ColumnChunk:
    chunk = ColumnChunk("", 0, 0, 0)
    for number, kind in values.fields():
        if number == _META_DATA and kind == _STRUCT:
            chunk = _read_column_meta_data(values)
        else:
            values.skip(kind)
    return chunk


def _read_column_meta_data(values: _CompactValues) -> ColumnChunk:
    path: list[str] = []
    numbers = dict.fromkeys((_COLUMN_VALUES, _COLUMN_BYTES, _DATA_OFFSET, _DICTIONARY_OFFSET), 0)
    for number, kind in values.fields():
        if number == _PATH:
            path = [values.text() for _ in range(values.list_size())]
        elif number in numbers and kind in _INTEGERS:
            numbers[number] = values.integer()
        else:
            values.skip(kind)
    num_values, num_bytes, start, dictionary_start = numbers.values()
    if 0 < dictionary_start < start:  # as Arrow does
        start = dictionary_start
    return ColumnChunk(".".join(path), start, num_bytes, num_values)


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


# Types of values in the compact protocol.
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = 1, 2, 3, 7, 8, 9, 10, 11, 12, 13
_INTEGERS = (4, 5, 6)
_WIDTHS = {_TRUE: 0, _FALSE: 0, _BYTE: 1, _DOUBLE: 8, _UUID: 16}  # a field's truth is in its type


class _CompactValues:
    """Values of Thrift's compact protocol, one after the other.

    Attributes:
      place: of the next byte.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.place = 0

    def _byte(self) -> int:
        self.place += 1
        return self._data[self.place - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number of more than 64 bits")

    def integer(self) -> int:
        value = self._varint()  # zigzag: 0, -1, 1, -2, ...
        return (value >> 1) ^ -(value & 1)

    def text(self) -> str:
        num_bytes = self._varint()
        self.place += num_bytes
        return self._data[self.place - num_bytes : self.place].decode("utf-8", "replace")

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and type of each field of a struct; the caller reads or skips the value before the next one."""
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self.integer()
            yield number, header & 15

    def integers(self, *wanted: int) -> dict[int, int]:
        """Reads a struct; the integers among its fields that are wanted, by number."""
        found = {}
        for number, kind in self.fields():
            if number in wanted and kind in _INTEGERS:
                found[number] = self.integer()
            else:
                self.skip(kind)
        return found

    def num_children(self) -> int:
        """Reads a SchemaElement; 0 for a column."""
        return self.integers(_NUM_CHILDREN).get(_NUM_CHILDREN, 0)

    def list_size(self) -> int:
        """The header of a list."""
        return self._list_header()[0]

    def _list_header(self) -> tuple[int, int]:
        header = self._byte()
        return self._varint() if header >> 4 == 15 else header >> 4, header & 15

    def skip(self, kind: int) -> None:
        """Skips a field's value."""
        if kind in _WIDTHS:
            self.place += _WIDTHS[kind]
        elif kind in _INTEGERS:
            self._varint()
        elif kind == _BINARY:
            num_bytes = self._varint()
            self.place += num_bytes
        elif kind in (_LIST, _SET):
            self._skip_elements(*self._list_header())
        elif kind == _MAP:
            if size := self._varint():
                kinds = self._byte()
                for _ in range(size):
                    self._skip_elements(1, kinds >> 4)
                    self._skip_elements(1, kinds & 15)
        elif kind == _STRUCT:
            for _, inner in self.fields():
                self.skip(inner)
        else:
            raise ValueError(f"a value of type {kind}, which there is not")

    def _skip_elements(self, size: int, kind: int) -> None:
        if kind in _WIDTHS:
            self.place += size * (_WIDTHS[kind] or 1)  # in a list, a truth is a byte
            if self.place > len(self._data):
                raise IndexError
            return
        for _ in range(size):
            self.skip(kind)
