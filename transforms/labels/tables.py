"""A directory of labels, read back as a stream: run.json, and the two tables chunk by chunk.

The one door to labels: whatever is read here is checked here (transforms/labels/check_tables.py), so that nobody else
must. A chunk counts once it is committed, with both its files, as in transforms/labels/resume.py; what a killed run
left beside those is not read.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

import pyarrow as pa

from maskbeam.transforms.files.parquet_file import open_parquet, read_table
from maskbeam.transforms.files.storage import read_json
from maskbeam.transforms.files.systems import join_path, open_path, path_exists
from maskbeam.transforms.formats.coco import COCO_FIELD
from maskbeam.transforms.labels.check_tables import check_annotations, check_candidates, check_images
from maskbeam.transforms.labels.layout import (
    ANNOTATIONS_DIR,
    CANDIDATES_DIR,
    IMAGES_DIR,
    SUMMARY_FILE,
    ChunkKey,
    list_tables,
)
from maskbeam.transforms.labels.manifest import newest, read_manifest
from maskbeam.transforms.labels.run_file import parse_run, read_run, read_run_bytes
from maskbeam.transforms.labels.schema import ANNOTATIONS, CANDIDATES, IMAGES, OPTIONAL
from maskbeam.transforms.masks.amg import AmgConfig
from maskbeam.transforms.records import DamagedFile

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChunkTables:
    """The rows of one chunk.

    Attributes:
      shard: its name, as in the names of the files.
      index: position in the shard, from 0.
      images: schema.IMAGES; its metadata has the chunk's report.
      annotations: schema.ANNOTATIONS, an image's masks in their order.
    """

    shard: str
    index: int
    images: pa.Table
    annotations: pa.Table

    def rows(self) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Each row of the images table with the image's rows of the annotations table."""
        masks: dict[str, list[dict[str, Any]]] = {}
        for mask in self.annotations.to_pylist():
            masks.setdefault(mask["image_id"], []).append(mask)
        for image in self.images.to_pylist():
            yield image, masks.get(image["image_id"], [])


@lru_cache(maxsize=4)
def _limits(labels: str, data: bytes) -> tuple[int, frozenset[int] | None]:
    """What run.json says of the rows: pixels that an image may have, and classes that masks may have; None = any.

    By its content, since a directory may be labeled again.
    """
    run = parse_run(labels, data)
    return run.most_pixels, run.category_ids


def list_chunks(labels: str) -> list[ChunkKey]:
    """The committed chunks, in the order in which everything that reads labels goes through them.

    Of a run that is not finished, a warning says so.

    Raises:
      ValueError: there is none, some that the summary counts are missing, or the directory is not one of ours.
    """
    manifest = read_manifest(labels, read_run(labels).manifest)
    committed = list_tables(labels, (IMAGES_DIR, ANNOTATIONS_DIR)).committed()
    chunks = newest(committed) if manifest is None else manifest.counting(committed)
    if not chunks:
        raise ValueError(f"{labels} holds no finished chunk. Let `maskbeam label` run until it has committed some.")
    gone = {shard.name for shard in manifest.gone} if manifest else set()
    _check_complete(labels, sum(chunk.shard not in gone for chunk in chunks))
    return chunks


def _check_complete(labels: str, num_chunks: int) -> None:
    """Compares the chunks that are there with those that the summary counts."""
    path = join_path(labels, SUMMARY_FILE)
    if not path_exists(path):
        _log.warning("%s is not finished: this is what it has so far. Run the command that makes it again.", labels)
        return
    expected = read_json(path).get("chunks") or 0
    if num_chunks < expected:
        raise ValueError(
            f"{expected - num_chunks} of the {expected} chunks that {path} counts are missing in {labels}. Run the "
            "command that made it again: it makes them anew."
        )


def read_chunk(labels: str, chunk: ChunkKey) -> ChunkTables:
    """The two tables of a committed chunk, checked.

    Raises:
      DamagedFile: a file is not what it should be; names it, and the row.
    """
    max_pixels, categories = _limits(labels, read_run_bytes(labels))
    name = chunk.file_name
    images = _read_checked_images(labels, name, max_pixels)
    with _reading(join_path(labels, ANNOTATIONS_DIR, name)) as file:
        annotations = _read_table(file, ANNOTATIONS)
        check_annotations(annotations, images, categories)
    return ChunkTables(chunk.shard, chunk.index, images, annotations)


def read_chunks(labels: str) -> Iterator[ChunkTables]:
    """All committed chunks, one at a time in memory.

    Raises:
      ValueError: there is none.
      DamagedFile: see read_chunk.
    """
    for chunk in list_chunks(labels):
        yield read_chunk(labels, chunk)


def read_image_ids(labels: str, chunks: list[ChunkKey]) -> Iterator[str]:
    """The ids of all images of the chunks; see read_images."""
    for images in read_images(labels, chunks, ["image_id"]):
        yield from images["image_id"].to_pylist()


def read_images(labels: str, chunks: list[ChunkKey], columns: list[str]) -> Iterator[pa.Table]:
    """Columns of the images table of each chunk, of which the annotations are not read.

    Raises:
      DamagedFile: a file is not what it should be; names it, and the row.
    """
    max_pixels, _ = _limits(labels, read_run_bytes(labels))
    for chunk in chunks:
        yield _read_checked_images(labels, chunk.file_name, max_pixels).select(columns)


def read_candidates(labels: str, chunk: ChunkKey, images: pa.Table, columns: list[str], config: AmgConfig) -> pa.Table:
    """Columns of the candidates of a committed chunk, checked; "segmentation.counts" is a part of one.

    Args:
      images: of the chunk, from read_chunk.
      config: the settings that the candidates were made with.

    Raises:
      DamagedFile: the file is not there, or not what it should be; names it, and the row.
    """
    with _reading(join_path(labels, CANDIDATES_DIR, chunk.file_name)) as file:
        candidates = read_table(file, CANDIDATES, columns)
        check_candidates(candidates, images, config)
    return candidates


def _read_checked_images(labels: str, name: str, max_pixels: int) -> pa.Table:
    with _reading(join_path(labels, IMAGES_DIR, name)) as file:
        images = _read_table(file, IMAGES)
        check_images(images, max_pixels)
    return images


def _read_table(file: IO[bytes], schema: pa.Schema) -> pa.Table:
    """All columns of the schema, and the one of imported labels."""
    imported = COCO_FIELD.name in open_parquet(file).schema_arrow.names
    schema = schema.append(COCO_FIELD) if imported else schema
    return read_table(file, schema, schema.names, OPTIONAL)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[IO[bytes]]:
    """A file of a chunk. What turns out to be wrong with it becomes the one sentence that a command ends with."""
    try:
        with open_path(path) as file:
            yield file
    except (ValueError, OSError, pa.ArrowException) as error:
        first_line = str(error).partition("\n")[0]
        raise DamagedFile(
            f"{path} cannot be read: {first_line}. Delete it, if it is there, and run the command that made it again."
        ) from error
