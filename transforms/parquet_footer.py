"""How deep a Parquet schema nests, told from the footer's bytes before Arrow reads them.

Arrow descends into nested columns by recursion, without a limit: a footer of a few hundred kilobytes with thousands of
levels overflows the stack and ends the process (tried with pyarrow 25: 7,000 levels in a thread of 8 MiB).

FileMetaData and SchemaElement are those of parquet-format's parquet.thrift, in Thrift's compact protocol
(thrift/doc/specs/thrift-compact-protocol.md).
"""

from __future__ import annotations

from collections.abc import Iterator

_SCHEMA = 2  # field of FileMetaData
_NUM_CHILDREN = 5  # field of SchemaElement


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

    def skip(self, kind: int) -> None:
        """Skips a field's value of a type that comes before or within the schema."""
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
        elif kind == 12:  # a struct
            for _, inner in self.fields():
                self.skip(inner)
        else:
            raise ValueError(f"a value of type {kind}, which a schema does not have")
