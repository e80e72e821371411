"""Files on any of Beam's file systems as streams: retried where reading fails, decompressed by what they hold."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import time
from collections.abc import Callable
from functools import partial
from typing import IO, Any

import pyarrow as pa

from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.files.outage import is_out
from maskbeam.transforms.files.systems import open_path
from maskbeam.transforms.records import SourceFile

# Waits between the tries of a file system, in seconds.
RETRY_SECONDS = (0.2, 1.0)
# While an object store does not answer at all.
OUT_SECONDS = 1.0
BUFFER_BYTES = 2**20

# Real shards hold images, which hardly compress. What inflates to more than the first bytes for free and then so many
# times its size is a decompression bomb.
FREE_INFLATION = 2**28
MAX_INFLATION = 200

# Memory that an xz stream may ask for; `xz -9` asks for 65 MiB.
_XZ_MEMORY = 2**29


class _RetriedFile(io.RawIOBase):
    """A file on any of Beam's file systems; what fails is opened again and tried three times.

    Raises:
      OSError: the last try failed, whatever the file system itself raised.
      StoreUnavailable: an object store does not answer.
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
        waits = list(RETRY_SECONDS)
        while True:
            try:
                data = self._read(len(buffer))
                break
            except (FileNotFoundError, PermissionError, IsADirectoryError):  # trying again would not help
                raise
            except Exception as error:
                self._drop()
                if is_out(self._source.path):  # not the file's fault; not for ever
                    time.sleep(OUT_SECONDS)
                elif waits:
                    time.sleep(waits.pop(0))
                else:
                    raise OSError(f"reading failed {len(RETRY_SECONDS) + 1} times: {describe_error(error)}") from error
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, num_bytes: int) -> bytes:
        if self._file is None:
            self._file = open_path(self._source.path)
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


class _ConcatenatedStreams(io.RawIOBase):
    """The bytes behind bzip2 or xz streams that follow each other in a file.

    Python's own readers take damage at the start of a later stream for the end of the file.
    """

    def __init__(self, source: io.BufferedReader, new: Callable[[], Any]) -> None:
        self._source = source
        self._new = new
        self._stream = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            compressed = b""
            if self._stream.eof:
                # xz pads streams with zeros; no stream begins with one.
                compressed = self._stream.unused_data.lstrip(b"\0")
                while not compressed:
                    if not (block := self._source.read(BUFFER_BYTES)):
                        return 0
                    compressed = block.lstrip(b"\0")
                self._stream = self._new()
            elif self._stream.needs_input and not (compressed := self._source.read(BUFFER_BYTES)):
                raise EOFError("the compressed stream is cut")
            if data := self._stream.decompress(compressed, len(buffer)):
                buffer[: len(data)] = data
                return len(data)


class _Inflated:
    """A decompressed stream that ends with an error where it turns out to be a decompression bomb."""

    def __init__(self, stream: Any, source: io.BufferedReader) -> None:
        self._stream = stream
        self._source = source
        self._num_bytes = 0
        self._allowed = FREE_INFLATION

    def read(self, num_bytes: int) -> bytes:
        data = self._stream.read(num_bytes)
        self._num_bytes += len(data)
        if self._num_bytes > self._allowed:
            self._allowed = allowed_inflation(self._source.tell())
            if self._num_bytes > self._allowed:
                raise ValueError(describe_bomb(self._num_bytes, self._source.tell()))
        return data


def allowed_inflation(num_bytes: int) -> int:
    """Bytes that so many compressed ones may become."""
    return FREE_INFLATION + MAX_INFLATION * num_bytes


def describe_bomb(num_inflated: int, num_bytes: int) -> str:
    """Why a file is not read any further."""
    return (
        f"{num_bytes} bytes of the file inflate to {num_inflated} or more: a decompression bomb. If it is genuine, "
        "decompress it yourself"
    )


def decompress(source: io.BufferedReader) -> Any:
    """A stream of the bytes behind a gzip, bzip2, xz, zstd or zlib header; the source itself if it has none.

    Names are not asked: `x.tfrecord-00000-of-00010` may be compressed, and what is called .gz often is not.
    """
    head = source.peek(6)[:6]
    stream: Any = None
    if head.startswith(b"\x1f\x8b\x08"):
        stream = gzip.GzipFile(fileobj=source)
    elif head.startswith(b"BZh"):
        stream = io.BufferedReader(_ConcatenatedStreams(source, bz2.BZ2Decompressor))
    elif head.startswith(b"\xfd7zXZ\x00"):
        new = partial(lzma.LZMADecompressor, memlimit=_XZ_MEMORY)
        stream = io.BufferedReader(_ConcatenatedStreams(source, new))
    # Arrow's streams report a cut, which zstandard's own reader takes for the end.
    elif head.startswith(b"\x28\xb5\x2f\xfd"):
        stream = pa.CompressedInputStream(source, "zstd")
    elif head.startswith(b"x") and int.from_bytes(head[:2], "big") % 31 == 0:
        stream = pa.CompressedInputStream(source, "gzip")  # detects zlib by itself
    return source if stream is None else _Inflated(stream, source)


def read_up_to(stream: IO[bytes], num_bytes: int) -> bytes:
    """Reads num_bytes, or all there is, without allocating more than that."""
    data = io.BytesIO()  # gives its bytes away without a copy
    while num_bytes > 0 and (piece := stream.read(min(num_bytes, BUFFER_BYTES))):
        data.write(piece)
        num_bytes -= len(piece)
    return data.getvalue()
