"""Labels read back, chunk by chunk: what `label` committed, from any file system, one chunk in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from transforms.resume import committed_chunks
from transforms.write import ANNOTATIONS_DIR, IMAGES_DIR, chunk_name


@dataclass(frozen=True, eq=False)
class ChunkTables:
    """The rows of one committed chunk, as in transforms/schema.py; later columns may follow."""

    annotations: pa.Table
    images: pa.Table


class LabelsDamaged(ValueError):
    """A file of the labels cannot be read; the message says which, and what to do."""


def chunk_names(labels: str) -> list[str]:
    """The file names of the committed chunks: the shards in the order of their names, their chunks by index."""
    return [chunk_name(shard, index) for shard, indices in committed_chunks(labels).items() for index in indices]


def read_chunk(labels: str, name: str) -> ChunkTables:
    """Both tables of a chunk.

    Raises:
      LabelsDamaged: a file cannot be read.
    """
    return ChunkTables(*(_read_table(FileSystems.join(labels, part, name)) for part in (ANNOTATIONS_DIR, IMAGES_DIR)))


def read_image_ids(labels: str, names: Sequence[str]) -> Iterator[str]:
    """The ids of all images of the chunks.

    Raises:
      LabelsDamaged: a file cannot be read.
    """
    for name in names:
        yield from _read_table(FileSystems.join(labels, IMAGES_DIR, name), ["image_id"])["image_id"].to_pylist()


def _read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        try:
            return pq.ParquetFile(file).read(columns)
        except (pa.ArrowException, OSError) as error:
            raise LabelsDamaged(
                f"{path} is damaged: {error}. Delete it and give the label command again: it does that chunk anew."
            ) from error
