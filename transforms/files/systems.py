"""The file system that a path leads to: this machine's own, used directly, or one of Beam's.

Reading a local path must not cost an import of Beam, which takes seconds. So what is read is opened and listed through
the functions here, and only a URI goes to transforms/files/beam_files.py.
"""

from __future__ import annotations

import os
import re
from typing import IO

from maskbeam.transforms.records import SourceFile

_URI = re.compile(r"([a-zA-Z][-a-zA-Z0-9+.]*)://")


def scheme_of(path: str) -> str | None:
    """The scheme of a URI; None for a path of this machine.

    >>> scheme_of("s3://bucket/a.tar"), scheme_of("/data/a.tar")
    ('s3', None)
    """
    found = _URI.match(path.strip())
    return found[1] if found else None


def is_local(path: str) -> bool:
    """Whether a path is one of the machine itself: it has no scheme."""
    return scheme_of(path) is None


def join_path(directory: str, *names: str) -> str:
    """A path below a directory."""
    if is_local(directory):
        return os.path.join(directory, *names)
    from maskbeam.transforms.files.beam_files import FileSystems

    return FileSystems.join(directory, *names)


def open_path(path: str) -> IO[bytes]:
    """Opens a file to read it as it is, never decompressed.

    Raises:
      OSError: it cannot be opened; a URI's file system may raise errors of its own.
      ValueError: no file system has the URI's scheme.
    """
    if is_local(path):
        return open(path, "rb")
    from maskbeam.transforms.files.beam_files import CompressionTypes, FileSystems

    return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


def path_exists(path: str) -> bool:
    """Whether there is a file or a directory."""
    if is_local(path):
        return os.path.exists(path)
    from maskbeam.transforms.files.beam_files import FileSystems

    return FileSystems.exists(path)


def list_uri(pattern: str) -> list[SourceFile]:
    """The files that match a URI, in which `*`, `?`, `[...]` and `**` are special."""
    from maskbeam.transforms.files.beam_files import FileSystems

    (match,) = FileSystems.match([pattern])
    return [
        SourceFile(file.path, file.size_in_bytes, file.last_updated_in_seconds or 0.0) for file in match.metadata_list
    ]


def check_scheme(path: str) -> None:
    """Raises ValueError if no file system has the URI's scheme."""
    if not is_local(path):
        from maskbeam.transforms.files.beam_files import FileSystems

        FileSystems.get_filesystem(path)
