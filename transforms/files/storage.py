"""Writing, listing and deleting on any file system."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import stat
import uuid
from collections.abc import Iterator
from typing import IO, Any

from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.files.streams import read_up_to
from maskbeam.transforms.files.strict_json import parse_json
from maskbeam.transforms.files.systems import is_local, join_path, list_uri, open_path, path_exists
from maskbeam.transforms.records import SourceFile


def delete_file(path: str) -> None:
    """Deletes a file, if it is there, on any file system."""
    delete_files([path] if path_exists(path) else [])


def delete_files(paths: list[str]) -> None:
    """Deletes files of one file system that were there a moment ago."""
    if paths and not is_local(paths[0]):
        from maskbeam.transforms.files.beam_files import FileSystems

        FileSystems.delete(paths)
        return
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)  # Beam would take the name for a pattern


def list_tree(path: str) -> list[str]:
    """The files below a directory, on any file system."""
    if is_local(path):
        return [os.path.join(directory, name) for directory, _, names in os.walk(path) for name in names]
    return [file.path for file in list_uri(join_path(escape_glob(path), "**"))]


def list_directory(path: str) -> list[SourceFile]:
    """The files in a directory, without those in folders of it, on any file system; none if it is not there.

    Raises:
      OSError: it cannot be listed.
    """
    if not is_local(path):
        return list_uri(join_path(escape_glob(path), "*"))
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # deleted since, or a link that leads nowhere
                status = entry.stat()
                if not stat.S_ISDIR(status.st_mode):
                    found.append(SourceFile(entry.path, status.st_size, status.st_mtime))
    return found


def escape_glob(path: str) -> str:
    """Makes a path match itself in Beam's patterns, which have no quoting but character classes."""
    # A backslash before the bracket: Python's re warns of a class that begins with one.
    return re.sub(r"[*?[]", lambda found: r"[\[]" if found[0] == "[" else f"[{found[0]}]", path)


# Of run.json, summary.json and the like. What an imported file had beside its annotations is in one, too.
MAX_JSON_BYTES = 2**26

_HEAD_BYTES = 2**10


def write_json(path: str, content: dict[str, Any]) -> None:
    """Writes a JSON file on any Beam file system, replacing it as a whole."""
    try:
        with replace_file(path) as file:
            file.write(json.dumps(content, indent=2, sort_keys=True).encode() + b"\n")
    except Exception as error:
        raise OSError(f"cannot write {path}: {describe_error(error)}") from error


@contextlib.contextmanager
def replace_file(path: str) -> Iterator[IO[bytes]]:
    """A file to write, on any Beam file system, that gets its name when all is written, and else is deleted."""
    from maskbeam.transforms.files.beam_files import CompressionTypes, FileSystems

    temporary = f"{path}.{uuid.uuid4().hex}"
    try:
        with FileSystems.create(temporary, compression_type=CompressionTypes.UNCOMPRESSED) as file:
            yield file
        FileSystems.rename([temporary], [path])
    except BaseException:
        with contextlib.suppress(Exception):  # it may never have been there
            delete_file(temporary)
        raise


def read_json(path: str) -> Any:
    """Reads a JSON file of ours from any Beam file system.

    Raises:
      ValueError: it is not JSON, or too large; says what is wrong in a few words, to stand after the path.
      OSError: it cannot be read.
    """
    return parse_json(read_json_bytes(path, MAX_JSON_BYTES))


def read_json_bytes(path: str, max_bytes: int) -> bytes:
    """All of a JSON file on any Beam file system. What cannot be one is not read to its end.

    Raises:
      ValueError: it begins like no JSON object or list, or is larger than max_bytes.
      OSError: it cannot be read.
    """
    with open_path(path) as file:
        data = read_up_to(file, _HEAD_BYTES)
        if not data.removeprefix(codecs.BOM_UTF8).lstrip().startswith((b"{", b"[")):
            raise ValueError(f"it is not JSON: it begins with {data[:20]!r}, not with {{ or [")
        data += read_up_to(file, max_bytes + 1 - len(data))
    if len(data) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes} bytes, and would take a lot of memory. Split it")
    return data
