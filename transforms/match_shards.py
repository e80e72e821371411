"""Input patterns -> Shards. Only paths and sizes are handled here; the bytes are read in read.py.

A pattern is a file, a directory (everything below it) or a glob, on any file system Beam knows. In a glob `*` and `?`
stay within a path component, `[...]` is a set, and `**` crosses directories, none included: `a/**/x.jpg` matches
`a/x.jpg`. A path that exists is taken literally before it is tried as a glob.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Literal

from maskbeam.transforms.chunks import cut_chunks
from maskbeam.transforms.files.paths import (
    absolute,
    glob_matcher,
    glob_start,
    join,
    list_files,
    parent,
    relative_path,
    scheme_prefix,
)
from maskbeam.transforms.files.systems import is_local
from maskbeam.transforms.labels.layout import shard_name
from maskbeam.transforms.readers.formats import format_of
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.readers.shard import read_images
from maskbeam.transforms.records import FORMATS, Shard, SourceFile


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
            loose[parent(path)].append(files[path])
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
        if not inside and is_local(path) and is_local(output):
            # Links may lead into the input: compare the real places, too.
            start = path if os.path.isdir(path) else glob_start(path)
            inside = _reads_from(os.path.realpath(start) + path[len(start) :], os.path.realpath(output))
        if inside:
            raise ValueError(
                f"the output {output!r} lies inside the input {pattern!r}: a later start would read labels as images. "
                "Choose an output beside the input."
            )


def _reads_from(pattern: str, output: str) -> bool:
    """True if the tables in output would match the pattern, taken as a directory or, if it may be one, as a glob."""
    tables = [join(output, f"{directory}/x.parquet") for directory in ("annotations", "candidates", "images")]
    if any(table.startswith(join(pattern, "")) for table in tables):
        return True
    literal = is_local(pattern) and os.path.exists(pattern)
    return not literal and any(glob_matcher(pattern)(table) for table in tables)


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


def _common_directory(directories: Sequence[str]) -> str:
    """The root: the directory that all others lie in."""
    prefixes = {scheme_prefix(directory) for directory in directories}
    if len(prefixes) > 1:
        raise ValueError(
            f"the inputs lie on {len(prefixes)} file systems ({', '.join(sorted(p or 'local' for p in prefixes))}); "
            "expected one, since image ids are relative to a common directory. Label them with a run each."
        )
    prefix = prefixes.pop()
    parts = [directory.removeprefix(prefix).rstrip("/").split("/") for directory in directories]
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))]
    return prefix + "/".join(common) or "/"
