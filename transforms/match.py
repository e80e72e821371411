"""Input patterns -> Shards. Only paths and sizes are handled here; the bytes are read in read.py.

A pattern is a file, a directory (everything below it) or a glob, on any file system Beam knows. In a glob `*` and `?`
stay within a path component, `[...]` is a set, and `**` crosses directories, none included: `a/**/x.jpg` matches
`a/x.jpg`. A path that exists is taken literally before it is tried as a glob.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Literal
from urllib.parse import quote

from apache_beam.io.filesystem import FileSystem
from apache_beam.io.filesystems import FileSystems

from transforms.images import has_image_extension
from transforms.read import ReadConfig, cut_chunks, read_images, relative_path
from transforms.records import FORMATS, Shard, SourceFile

TAR_EXTENSIONS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

# File systems allow 255 bytes a name, and `-<chunk>.parquet` follows.
MAX_NAME_BYTES = 150
GLOB_CHARACTERS = re.compile(r"[*?[]")


@dataclass(frozen=True)
class InputConfig:
    """What to label.

    Attributes:
      input: files, directories and globs, on any Beam file system.
      input_format: format of all files. Default: by each file's name.
      chunk_size: images in a chunk, at least 1: more makes larger output files, fewer loses less work when killed.
      limit: label only the first so many images, at least 1. Default: all.
    """

    input: tuple[str, ...]
    input_format: Literal["image", "tfrecord", "tar", "parquet"] | None = None
    chunk_size: int = 32
    limit: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.input, str) or not self.input or not all(self.input):
            raise ValueError(f"input is {self.input!r}; expected one or more files, directories or globs, none empty.")
        if self.input_format is not None and self.input_format not in FORMATS:
            raise ValueError(f"input_format is {self.input_format!r}; expected one of {', '.join(FORMATS)}.")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size is {self.chunk_size}; expected at least 1 image. The default is 32.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; expected at least 1 image. Leave it out to label all.")


@dataclass(frozen=True)
class Matched:
    """What the patterns stand for.

    Attributes:
      root: the directory that image ids and shard names are relative to.
      shards: sorted by path.
      ignored: paths, relative to root, of files in no known format, sorted.
    """

    root: str
    shards: tuple[Shard, ...]
    ignored: tuple[str, ...]


def match_shards(config: InputConfig, read: ReadConfig | None = None) -> Matched:
    """Finds the files of all patterns and makes Shards of them.

    Args:
      config: what to label.
      read: names inside shards, used only to count images for a limit; None = the defaults.

    Raises:
      ValueError: a pattern matches nothing usable, a directory cannot be listed, or the patterns have no common root.
    """
    starts, files = [], {}
    for pattern in config.input:
        start, found = list_files(absolute(pattern))
        _check_usable(pattern, found, config.input_format)
        starts.append(start)
        files.update({file.path: file for file in found})
    root = _common_directory(starts)

    shards, ignored, loose = [], [], defaultdict(list)
    for path in sorted(files):
        file_format = config.input_format or format_of(path)
        if file_format is None:
            ignored.append(relative_path(path, root))
        elif file_format == "image":
            loose[_parent(path)].append(files[path])
        else:
            shards.append(Shard(shard_name(relative_path(path, root)), path, file_format, (files[path],)))
    for directory, images in loose.items():
        shards.extend(_loose_shards(directory, images, config.chunk_size, root))
    shards.sort(key=lambda shard: (shard.path, shard.format, shard.first_chunk))

    _check_names(shards)
    if config.limit is not None:
        shards = list(first_images(shards, config.limit, read or ReadConfig(), root))
    return Matched(root, tuple(shards), tuple(ignored))


def check_output(config: InputConfig, output: str) -> None:
    """Refuses an output directory whose files a later start would take for input.

    Raises:
      ValueError: a directory of `input` or one of its globs would match annotations written to `output`.
    """
    output = absolute(output)
    for pattern in config.input:
        path = absolute(pattern)
        inside = _reads_from(path, output)
        if not inside and _is_local(path) and _is_local(output):
            # Links may lead into the input: compare the real places, too.
            start = path if os.path.isdir(path) else _glob_start(path)
            inside = _reads_from(os.path.realpath(start) + path[len(start) :], os.path.realpath(output))
        if inside:
            raise ValueError(
                f"the output {output!r} lies inside the input {pattern!r}: a later start would read labels as images. "
                "Choose an output beside the input."
            )


def _reads_from(pattern: str, output: str) -> bool:
    """True if the tables in output would match the pattern, taken as a directory or, if it may be one, as a glob."""
    tables = [_join(output, f"{directory}/x.parquet") for directory in ("annotations", "candidates", "images")]
    if any(table.startswith(_join(pattern, "")) for table in tables):
        return True
    literal = _is_local(pattern) and os.path.exists(pattern)
    return not literal and any(_glob_matcher(pattern)(table) for table in tables)


def format_of(path: str) -> str | None:
    """The format a file's name tells, None if it tells none.

    >>> format_of("d/train.tfrecord-00000-of-00010"), format_of("a.tar.gz"), format_of("a.parquet"), format_of("a.txt")
    ('tfrecord', 'tar', 'parquet', None)
    """
    base = path.rpartition("/")[2].lower()
    if ".tfrecord" in base:
        return "tfrecord"
    if base.endswith(TAR_EXTENSIONS):
        return "tar"
    if base.endswith(".parquet"):
        return "parquet"
    return "image" if has_image_extension(base) else None


def shard_name(path: str) -> str:
    """A flat, portable and unique file name for a path relative to root.

    Readers of Parquet datasets ignore names that begin with a dot or an underscore, so those are encoded. A long name
    is cut and closed with "~" and a hash. "" is the root directory itself. No other path gives "~" or "@".

    >>> shard_name("train/a b.tar"), shard_name("_old/.x.tar"), shard_name("")
    ('train%2Fa%20b.tar', '%5Fold%2F.x.tar', '@root')
    """
    name = quote(path.encode("utf-8", "surrogateescape"), safe="").replace("~", "%7E")
    if name.startswith((".", "_")):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) > MAX_NAME_BYTES:
        whole_escapes = re.sub("%.?$", "", name[:120])
        name = f"{whole_escapes}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name or "@root"


def first_images(shards: Iterable[Shard], limit: int, read: ReadConfig, root: str) -> Iterator[Shard]:
    """The shards that hold the first `limit` images, the last one shortened to fit.

    Images in a shard are counted by reading them, since only that finds broken ones; at most `limit` are read.
    """
    for shard in shards:
        if shard.format == "image":
            shard = replace(shard, files=shard.files[:limit])
            count = len(shard.files)
        else:
            count = sum(1 for _ in islice(read_images(shard, read, root), limit))
            shard = replace(shard, max_images=limit) if count == limit else shard
        yield shard
        limit -= count
        if not limit:
            return


def list_files(pattern: str) -> tuple[str, list[SourceFile]]:
    """The directory an absolute pattern starts from, and its files.

    A file starts from its parent directory, a directory from itself, a glob from the directory before its first glob
    character.

    Raises:
      ValueError: a local directory cannot be listed, or the pattern is no valid glob.
      BeamIOError: another file system fails.
    """
    start = _glob_start(pattern)
    is_glob = GLOB_CHARACTERS.search(pattern) is not None
    if _is_local(pattern):
        if os.path.isdir(pattern):
            return pattern, list(_walk(pattern, ("**",)))
        if os.path.exists(pattern):
            return _parent(pattern), [_source_file(pattern, os.stat(pattern))]
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
            return _parent(pattern), literal
        if below := [file for file in found if file.path.startswith(pattern + "/")]:
            return pattern, below
    matches = _glob_matcher(pattern)
    return start, [file for file in found if matches(file.path)]


def _match(pattern: str) -> list[SourceFile]:
    # Object stores mark directories with empty objects whose names end with a slash.
    metadata = FileSystems.match([pattern])[0].metadata_list
    return [
        SourceFile(file.path, file.size_in_bytes, file.last_updated_in_seconds or 0.0)
        for file in metadata
        if not file.path.endswith("/")
    ]


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
            elif len(parts) > 1 and _glob_matcher(parts[0])(entry.name):
                pending.append((entry.path, parts[1:], above | {identity}))


def _listed(entry: os.DirEntry[str]) -> SourceFile:
    try:
        return _source_file(entry.path, entry.stat())
    except OSError:  # a dangling link: reading it says why it fails
        return SourceFile(entry.path, 0)


def _source_file(path: str, status: os.stat_result) -> SourceFile:
    return SourceFile(path, status.st_size, status.st_mtime)


def _loose_shards(directory: str, files: Sequence[SourceFile], chunk_size: int, root: str) -> Iterator[Shard]:
    name = shard_name("" if directory == root else relative_path(directory, root))
    for index, (chunk, _) in enumerate(cut_chunks(files, lambda file: file.num_bytes, chunk_size)):
        yield Shard(name, directory, "image", chunk, first_chunk=index)


def _check_usable(pattern: str, files: Sequence[SourceFile], input_format: str | None) -> None:
    if not files:
        raise ValueError(
            f"the input {pattern!r} matches no file. Expected a file, a directory with files in it, or a glob "
            "(`**` crosses directories). Check the spelling; a glob may need quotes to get past the shell."
        )
    if input_format is None and not any(format_of(file.path) for file in files):
        names = ", ".join(repr(name) for name in sorted(file.path.rpartition("/")[2] for file in files)[:3])
        raise ValueError(
            f"the input {pattern!r} matches {len(files)} files, but none has a name of a known format: {names}"
            f"{', ...' if len(files) > 3 else ''}. Say what they are with --input_format {'|'.join(FORMATS)}."
        )


def _check_names(shards: Iterable[Shard]) -> None:
    # Object stores allow a file and a directory of one name.
    sources: dict[str, tuple[str, str]] = {}
    for shard in shards:
        path, file_format = sources.setdefault(shard.name, (shard.path, shard.format))
        if (path, file_format) != (shard.path, shard.format):
            raise ValueError(
                f"{path!r} ({file_format}) and {shard.path!r} ({shard.format}) would share the output name "
                f"{shard.name!r}. Label them with two runs into two outputs."
            )


def absolute(path: str) -> str:
    """A local path made absolute and normal, a URL without a trailing slash."""
    if _is_local(path):
        return os.path.abspath(path)
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{rest.rstrip('/')}"


def _is_local(path: str) -> bool:
    return FileSystems.get_scheme(path) is None


def _scheme_prefix(path: str) -> str:
    return "" if _is_local(path) else path[: path.index("://") + 3]


def _join(directory: str, name: str) -> str:
    return directory + ("" if directory.endswith("/") else "/") + name


def _parent(path: str) -> str:
    prefix = _scheme_prefix(path)
    return prefix + path.removeprefix(prefix).rpartition("/")[0] or "/"


def _glob_start(pattern: str) -> str:
    return _parent(GLOB_CHARACTERS.split(pattern)[0])


def _common_directory(directories: Sequence[str]) -> str:
    """The root: the directory that all others lie in."""
    prefixes = {_scheme_prefix(directory) for directory in directories}
    if len(prefixes) > 1:
        raise ValueError(
            f"the inputs lie on {len(prefixes)} file systems ({', '.join(sorted(p or 'local' for p in prefixes))}); "
            "expected one, since image ids are relative to a common directory. Label them with a run each."
        )
    prefix = prefixes.pop()
    parts = [directory.removeprefix(prefix).rstrip("/").split("/") for directory in directories]
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))]
    return prefix + "/".join(common) or "/"


def _glob_matcher(pattern: str) -> Callable[[str], re.Match[str] | None]:
    expression = FileSystem.translate_pattern(pattern).replace("/.*/", "/(?:.*/)?")
    try:
        return re.compile(expression).match
    except re.error as error:
        raise ValueError(f"the input {pattern!r} is no valid glob: {error}. Mind the order in [a-z].") from error
