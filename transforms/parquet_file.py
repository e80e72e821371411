"""The one way in which Parquet files are opened: without threads, and not before their schema is known to be safe.

A read with Arrow's own threads can end after the program does: a thread of its pool then asks for Python's lock while
the interpreter goes away, and the process dies with "terminate called without an active exception" (exit code 134).
That takes `pre_buffer=False` here and `use_threads=False` in `read` and `iter_batches`; one alone is not enough.
"""

from __future__ import annotations

import io
from typing import IO

import pyarrow.parquet as pq

from transforms.parquet_footer import schema_depth

MAX_PARQUET_NESTING = 100

# A column is read through a buffer of this size: row groups are often as large as the file.
_BUFFER_BYTES = 2**20


def open_parquet(file: IO[bytes], verify: bool = False) -> pq.ParquetFile:
    """Opens a Parquet file. Read from it with `use_threads=False`.

    Args:
      file: seekable; stays open as long as the result is used.
      verify: compare the checksums of its pages, where it has any.

    Raises:
      ValueError: it is damaged, or nests too deep.
    """
    _check_nesting(file)
    return pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=verify)


def _check_nesting(file: IO[bytes]) -> None:
    """Refuses a schema that would overflow Arrow's stack. Arrow reports everything else that may be wrong."""
    # A file ends with: FileMetaData | its length, uint32 little endian | PAR1.
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(max(num_bytes - 8, 0))
    tail = file.read(8)
    footer_bytes = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or footer_bytes > num_bytes - 8:
        return
    file.seek(num_bytes - 8 - footer_bytes)
    try:
        depth = schema_depth(file.read(footer_bytes))
    except (ValueError, IndexError) as error:
        raise ValueError("the file's footer is damaged: it holds no schema") from error
    if depth > MAX_PARQUET_NESTING:
        raise ValueError(f"the schema nests {depth} levels deep; at most {MAX_PARQUET_NESTING} are read")
