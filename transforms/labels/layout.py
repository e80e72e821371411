"""The directory of labels: what its files are called, and which chunks are committed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

from maskbeam.transforms.files.storage import escape_glob, list_directory
from maskbeam.transforms.files.systems import is_local, join_path

RUN_FILE = "run.json"
SUMMARY_FILE = "summary.json"
ANNOTATIONS_DIR = "annotations"
CANDIDATES_DIR = "candidates"
IMAGES_DIR = "images"
TEMPORARY_DIR = "_tmp"

# File systems allow 255 bytes a name, and `-<chunk>.parquet` follows.
MAX_NAME_BYTES = 150


@dataclass(frozen=True)
class OutputConfig:
    """Where the labels go.

    Attributes:
      output: directory of the labels, on any Beam file system.
      overwrite: delete the labels that an earlier run left in output and start anew.
      retry_failed: label the images again that failed in an earlier start, of shards their chunks.
      accept_changed: label changed shards again, and let rows go whose photos a changed input no longer has.
      max_failed_fraction: end the run when more than this fraction of the images failed (judged after 100 images of a
        process): a mistake in the input should not become ten million failed rows.
    """

    output: str
    overwrite: bool = False
    retry_failed: bool = False
    accept_changed: bool = False
    max_failed_fraction: float = 0.5

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty; expected a directory.")
        if not is_local(self.output) and escape_glob(self.output) != self.output:
            raise ValueError(
                f"output is {self.output}, but only local directories may have *, ? or [ in their names: other file "
                "systems would take it for a pattern when files are deleted. Choose another directory."
            )
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"max_failed_fraction must be between 0 and 1, got {self.max_failed_fraction}")


@dataclass(frozen=True, order=True)
class ChunkKey:
    """Which chunk: its shard's name, its index there, and its generation: a higher one replaces the lower ones."""

    shard: str
    index: int
    generation: int = 0

    @property
    def file_name(self) -> str:
        """The name of its files, in all directories."""
        return chunk_name(self.shard, self.index, self.generation)


@dataclass(frozen=True)
class TableFiles:
    """The files of an output that have names of chunks, as they are listed.

    Attributes:
      num_bytes: by directory and chunk.
    """

    num_bytes: dict[str, dict[ChunkKey, int]]

    def committed(self, keep_candidates: bool = False) -> list[ChunkKey]:
        """The chunks that have all their files, sorted; keep_candidates = that of the candidates is one of them."""
        needed = [IMAGES_DIR, ANNOTATIONS_DIR] + [CANDIDATES_DIR] * keep_candidates
        return sorted(set.intersection(*(set(self.num_bytes[directory]) for directory in needed)))


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


def chunk_name(shard: str, index: int, generation: int = 0) -> str:
    """Name of a chunk's files, in all directories.

    >>> chunk_name("train.tar", 7), chunk_name("train.tar", 7, 2)
    ('train.tar-00007.parquet', 'train.tar-00007.2.parquet')
    """
    return f"{shard}-{index:05d}{f'.{generation}' if generation else ''}.parquet"


def parse_chunk_name(name: str) -> ChunkKey | None:
    """Inverse of chunk_name; None for other names."""
    found = re.fullmatch(r"(.+)-(\d{5,})(?:\.([1-9]\d*))?\.parquet", name, re.ASCII | re.DOTALL)
    return ChunkKey(found[1], int(found[2]), int(found[3] or 0)) if found else None


def manifest_path(output: str, manifest: str) -> str:
    """Where a manifest lies, see transforms/labels/manifest.py."""
    return join_path(output, f"manifest-{manifest}.json")


def list_tables(output: str, directories: Iterable[str] = (IMAGES_DIR, ANNOTATIONS_DIR, CANDIDATES_DIR)) -> TableFiles:
    """Lists an output's tables: images first, so that what a chunk found there was committed with is found, too."""
    return TableFiles({directory: _list_directory(output, directory) for directory in directories})


def _list_directory(output: str, directory: str) -> dict[ChunkKey, int]:
    found = {}
    for file in list_directory(join_path(output, directory)):
        if key := parse_chunk_name(file.path.rpartition("/")[2]):  # people put other files there
            found[key] = file.num_bytes
    return found


def committed_chunks(output: str, keep_candidates: bool = False) -> dict[str, list[int]]:
    """The indices of the committed chunks of each shard, ascending: those that have all their files.

    Args:
      output: directory of the labels.
      keep_candidates: whether the candidates file is one of them.
    """
    directories = [IMAGES_DIR, ANNOTATIONS_DIR] + [CANDIDATES_DIR] * keep_candidates
    found: dict[str, set[int]] = {}
    for key in list_tables(output, directories).committed(keep_candidates):
        found.setdefault(key.shard, set()).add(key.index)
    return {shard: sorted(indices) for shard, indices in found.items()}
