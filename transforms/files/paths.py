"""Paths and patterns on any file system: absolute, relative, listed, matched."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

from maskbeam.transforms.files.systems import is_local, list_uri
from maskbeam.transforms.records import SourceFile

GLOB_CHARACTERS = re.compile(r"[*?[]")

# A bracket that is not closed is a character. ?+ and *+ never give back what they took.
_GLOB_PART = re.compile(r"(?P<many>\*\*?)|(?P<one>\?)|\[(?P<no>!?+)(?P<set>\]?+[^\]]*+)\]|.", re.DOTALL)


def list_files(pattern: str) -> tuple[str, list[SourceFile]]:
    """The directory an absolute pattern starts from, and its files.

    A file starts from its parent directory, a directory from itself, a glob from the directory before its first glob
    character.

    Raises:
      ValueError: a local directory cannot be listed, or the pattern is no valid glob.
      BeamIOError: another file system fails.
    """
    start = glob_start(pattern)
    is_glob = GLOB_CHARACTERS.search(pattern) is not None
    if is_local(pattern):
        if os.path.isdir(pattern):
            return pattern, list(_walk(pattern, ("**",)))
        if os.path.exists(pattern):
            return parent(pattern), [_source_file(pattern, os.stat(pattern))]
        if not is_glob or not os.path.isdir(start):
            return start, []
        found = list(_walk(start, tuple(pattern[len(start) :].lstrip("/").split("/"))))
    elif not is_glob:
        if below := _match(pattern + "/**"):
            return pattern, below
        return start, _match(pattern)
    else:
        # One listing answers all three questions: a file of this very name, a directory, a glob.
        found = _match(GLOB_CHARACTERS.split(pattern)[0] + "**")
        if literal := [file for file in found if file.path == pattern]:
            return parent(pattern), literal
        if below := [file for file in found if file.path.startswith(pattern + "/")]:
            return pattern, below
    matches = glob_matcher(pattern)
    return start, [file for file in found if matches(file.path)]


def _match(pattern: str) -> list[SourceFile]:
    # Object stores mark directories with empty objects whose names end with a slash.
    return [file for file in list_uri(pattern) if not file.path.endswith("/")]


def _walk(directory: str, parts: tuple[str, ...]) -> Iterator[SourceFile]:
    """The files of a local directory and of those below it that may match the parts of a glob.

    Beam's own listing leaves out what it cannot list, dangling links and linked directories. Here the first is an
    error, the second a file that will fail with its name, and the third is followed.
    """
    pending: list[tuple[str, tuple[str, ...], frozenset[tuple[int, int]]]] = [(directory, parts, frozenset())]
    while pending:
        directory, parts, above = pending.pop()
        try:
            status = os.stat(directory)
            entries = list(os.scandir(directory))
        except OSError as error:
            raise ValueError(
                f"the directory {directory!r} cannot be listed: {error.strerror}. Make it readable, or leave it out "
                "with a narrower input."
            ) from error
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # a link back to a directory that is being listed already
            continue
        for entry in entries:
            if not entry.is_dir():
                yield _listed(entry)
            elif "**" in parts[0]:
                pending.append((entry.path, parts, above | {identity}))
            elif len(parts) > 1 and glob_matcher(parts[0])(entry.name):
                pending.append((entry.path, parts[1:], above | {identity}))


def _listed(entry: os.DirEntry[str]) -> SourceFile:
    try:
        return _source_file(entry.path, entry.stat())
    except OSError:  # a dangling link: reading it says why it fails
        return SourceFile(entry.path, 0)


def _source_file(path: str, status: os.stat_result) -> SourceFile:
    return SourceFile(path, status.st_size, status.st_mtime)


def absolute(path: str) -> str:
    """A local path made absolute and normal, a URL without a trailing slash."""
    if is_local(path):
        return os.path.abspath(path)
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{rest.rstrip('/')}"


def scheme_prefix(path: str) -> str:
    """A URL's beginning, such as s3://; nothing of a local path."""
    return "" if is_local(path) else path[: path.index("://") + 3]


def join(directory: str, name: str) -> str:
    """A name below a directory, on any file system."""
    return directory + ("" if directory.endswith("/") else "/") + name


def parent(path: str) -> str:
    """The directory that a path lies in."""
    prefix = scheme_prefix(path)
    return prefix + path.removeprefix(prefix).rpartition("/")[0] or "/"


def glob_start(pattern: str) -> str:
    """The directory that a glob's first special character lies in."""
    return parent(GLOB_CHARACTERS.split(pattern)[0])


def glob_matcher(pattern: str) -> Callable[[str], re.Match[str] | None]:
    """What matches whole paths against a glob.

    Raises:
      ValueError: the glob is not valid; the message names it.
    """
    expression = "".join(_to_expression(part) for part in _GLOB_PART.finditer(pattern)).replace("/.*/", "/(?:.*/)?")
    try:
        return re.compile(rf"(?ms){expression}\Z").match
    except re.error as error:
        raise ValueError(f"the input {pattern!r} is no valid glob: {error}. Mind the order in [a-z].") from error


def _to_expression(part: re.Match[str]) -> str:
    """A part of a glob as a regular expression, as Beam's file systems read it."""
    if part["many"]:
        return ".*" if len(part["many"]) == 2 else r"[^/\\]*"
    if part["one"]:
        return "."
    if part["set"]:
        characters = part["set"].replace("\\", r"\\")
        if part["no"]:
            return f"[^{characters}]"
        return f"[\\{characters}]" if characters.startswith("^") else f"[{characters}]"
    return re.escape(part[0])


def relative_path(path: str, root: str) -> str:
    """A path below root without the root.

    >>> relative_path("gs://b/train/a.tar", "gs://b"), relative_path("/a.tar", "/")
    ('train/a.tar', 'a.tar')
    """
    return path.removeprefix(root if root.endswith("/") else root + "/")
