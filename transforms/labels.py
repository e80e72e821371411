"""A directory of labels, read back as a stream: run.json, and the two tables chunk by chunk.

A chunk counts once it is committed, with both its files, as in transforms/resume.py; what a killed run left beside
those is not read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from transforms.manifest import newest, read_manifest
from transforms.parquet_file import open_parquet
from transforms.resume import list_tables
from transforms.schema import ANNOTATIONS, IMAGES
from transforms.summary import SUMMARY_FILE, read_json
from transforms.write import ANNOTATIONS_DIR, CANDIDATES_DIR, IMAGES_DIR, RUN_FILE, ChunkKey

_log = logging.getLogger(__name__)

_EXPECTED = "Expected the --output of `maskbeam label`, `refine` or `import`."
_MADE_BY_US = {"root", "model_fingerprint", "amg"}


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


def read_run(labels: str) -> dict[str, Any]:
    """The content of run.json.

    Args:
      labels: directory that `maskbeam label`, `refine` or `import` wrote, on any Beam file system.

    Raises:
      ValueError: the directory is not one of ours.
    """
    path = FileSystems.join(labels, RUN_FILE)
    if not FileSystems.exists(path):
        raise ValueError(f"{labels} holds no labels: there is no {RUN_FILE}. {_EXPECTED}")
    try:
        run = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Label again, into another --output.") from error
    if not isinstance(run, dict) or not run.keys() >= _MADE_BY_US:
        raise ValueError(f"{path} was not written by maskbeam. {_EXPECTED}")
    return run


def list_chunks(labels: str) -> list[ChunkKey]:
    """The committed chunks, in the order in which everything that reads labels goes through them.

    Of a run that is not finished, a warning says so.

    Raises:
      ValueError: there is none, some that the summary counts are missing, or the directory is not one of ours.
    """
    run = read_run(labels)
    manifest = read_manifest(labels, run)
    committed = list_tables(labels, (IMAGES_DIR, ANNOTATIONS_DIR)).committed()
    chunks = newest(committed) if manifest is None else manifest.counting(committed)
    if not chunks:
        raise ValueError(f"{labels} holds no finished chunk. Let `maskbeam label` run until it has committed some.")
    gone = {shard.name for shard in manifest.gone} if manifest else set()
    _check_complete(labels, sum(chunk.shard not in gone for chunk in chunks))
    return chunks


def _check_complete(labels: str, num_chunks: int) -> None:
    """Compares the chunks that are there with those that the summary counts."""
    path = FileSystems.join(labels, SUMMARY_FILE)
    if not FileSystems.exists(path):
        _log.warning("%s is not finished: this is what it has so far. Run the command that makes it again.", labels)
        return
    expected = read_json(path).get("chunks") or 0
    if num_chunks < expected:
        raise ValueError(
            f"{expected - num_chunks} of the {expected} chunks that {path} counts are missing in {labels}. Run the "
            "command that made it again: it makes them anew."
        )


def read_chunk(labels: str, chunk: ChunkKey) -> ChunkTables:
    """The two tables of a committed chunk.

    Raises:
      ValueError: a file is damaged, or is not one of ours.
    """
    tables = []
    for directory, schema in ((IMAGES_DIR, IMAGES), (ANNOTATIONS_DIR, ANNOTATIONS)):
        path = FileSystems.join(labels, directory, chunk.file_name)
        tables.append(_read_table(path))
        if missing := [name for name in schema.names if name not in tables[-1].column_names]:
            raise ValueError(
                f"{path} has no column {missing[0]}: it was not written by maskbeam, or by another version."
            )
    images, annotations = tables
    strays = set(annotations["image_id"].unique().to_pylist()) - set(images["image_id"].to_pylist())
    if strays:
        raise ValueError(
            f"the annotations of chunk {chunk.file_name} in {labels} are of images that its images table "
            f"does not have, such as {min(strays)!r}: its two files do not belong together. Label again."
        )
    return ChunkTables(chunk.shard, chunk.index, images, annotations)


def read_chunks(labels: str) -> Iterator[ChunkTables]:
    """All committed chunks, one at a time in memory.

    Raises:
      ValueError: there is none, or one is damaged.
    """
    for chunk in list_chunks(labels):
        yield read_chunk(labels, chunk)


def read_image_ids(labels: str, chunks: list[ChunkKey]) -> Iterator[str]:
    """The ids of all images of the chunks, of which nothing else is read.

    Raises:
      ValueError: a file is damaged, or is not one of ours.
    """
    for images in read_images(labels, chunks, ["image_id"]):
        yield from images["image_id"].to_pylist()


def read_images(labels: str, chunks: list[ChunkKey], columns: list[str]) -> Iterator[pa.Table]:
    """Columns of the images table of each chunk, of which nothing else is read.

    Raises:
      ValueError: a file is damaged, or is not one of ours.
    """
    for chunk in chunks:
        yield _read_table(FileSystems.join(labels, IMAGES_DIR, chunk.file_name), columns)


def read_candidates(labels: str, chunk: ChunkKey, columns: list[str]) -> pa.Table:
    """Columns of the candidates of a committed chunk; "segmentation.counts" is a part of one.

    Raises:
      ValueError: the file is not there or damaged.
    """
    return _read_table(FileSystems.join(labels, CANDIDATES_DIR, chunk.file_name), columns)


def _read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    try:
        with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
            return open_parquet(file).read(columns, use_threads=False)
    except (ValueError, OSError, pa.ArrowException) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read: {first_line}. Delete it, if it is there, and run the command that made it again."
        ) from error
