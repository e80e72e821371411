"""Files on any of Beam's file systems as streams: retried where reading fails, decompressed by what they hold."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import time
from typing import IO, Any

import pyarrow as pa
from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems

import transforms.s3  # noqa: F401  # one client for all files
from transforms.records import SourceFile

# Waits between the tries of a file system, in seconds.
RETRY_SECONDS = (0.2, 1.0)
BUFFER_BYTES = 2**20


def describe_error(error: Exception) -> str:
    """An error as a sentence for people; our own messages need no type before them."""
    if isinstance(error, BeamIOError) and error.exception_details:  # the path, or a pair of paths, and the cause
        ((where, cause), *_) = error.exception_details.items()
        where = where if isinstance(where, str) else where[-1]
        return f"{where}: {describe_error(cause)}"
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


class _RetriedFile(io.RawIOBase):
    """A file on any of Beam's file systems; what fails is opened again and tried three times.

    Raises:
      OSError: the last try failed, whatever the file system itself raised.
    """

    def __init__(self, file: SourceFile) -> None:
        self._source = file
        self._file: Any = None
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.num_bytes}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        for seconds in (*RETRY_SECONDS, None):
            try:
                data = self._read(len(buffer))
                break
            except (FileNotFoundError, PermissionError, IsADirectoryError):  # trying again would not help
                raise
            except Exception as error:
                self._drop()
                if seconds is None:
                    raise OSError(f"reading failed {len(RETRY_SECONDS) + 1} times: {describe_error(error)}") from error
                time.sleep(seconds)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, num_bytes: int) -> bytes:
        if self._file is None:
            self._file = FileSystems.open(self._source.path, compression_type=CompressionTypes.UNCOMPRESSED)
        if self._file.tell() != self._position:
            self._file.seek(self._position)
        return self._file.read(num_bytes)

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):  # it was only read
                file.close()


def open_file(file: SourceFile) -> io.BufferedReader:
    """Opens a file on any of Beam's file systems, as it is, and retries what fails."""
    return io.BufferedReader(_RetriedFile(file), BUFFER_BYTES)


def decompress(source: io.BufferedReader) -> Any:
    """The bytes behind a gzip, bzip2, xz, zstd or zlib header; the source itself if it has none.

    Names are not asked: `x.tfrecord-00000-of-00010` may be compressed, and what is called .gz often is not.
    """
    head = source.peek(6)[:6]
    if head.startswith(b"\x1f\x8b\x08"):
        return gzip.open(source)
    if head.startswith(b"BZh"):
        return bz2.open(source)
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(source)
    # Arrow's streams report a cut, which zstandard's own reader takes for the end.
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return pa.CompressedInputStream(source, "zstd")
    if head.startswith(b"x") and int.from_bytes(head[:2], "big") % 31 == 0:
        return pa.CompressedInputStream(source, "gzip")  # detects zlib by itself
    return source


def read_up_to(stream: IO[bytes], num_bytes: int) -> bytes:
    """Reads num_bytes, or all there is, without allocating more than that."""
    pieces = []
    while num_bytes > 0 and (piece := stream.read(min(num_bytes, BUFFER_BYTES))):
        pieces.append(piece)
        num_bytes -= len(piece)
    return b"".join(pieces)
