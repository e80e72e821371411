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
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from maskbeam.transforms.files.parquet_file import open_parquet, read_table
from maskbeam.transforms.files.storage import MAX_JSON_BYTES, read_json, read_json_bytes
from maskbeam.transforms.files.strict_json import parse_json
from maskbeam.transforms.formats.coco import COCO_FIELD, category_ids, run_categories
from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.labels.check_tables import check_annotations, check_candidates, check_images
from maskbeam.transforms.labels.layout import (
    ANNOTATIONS_DIR,
    CANDIDATES_DIR,
    IMAGES_DIR,
    RUN_FILE,
    SUMMARY_FILE,
    ChunkKey,
    list_tables,
)
from maskbeam.transforms.labels.manifest import newest, read_manifest
from maskbeam.transforms.labels.schema import ANNOTATIONS, CANDIDATES, IMAGES, OPTIONAL
from maskbeam.transforms.masks.amg import AmgConfig
from maskbeam.transforms.masks.rle import MAX_PIXELS
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.records import DamagedFile

_log = logging.getLogger(__name__)

_EXPECTED = "Expected the --output of `maskbeam label`, `refine` or `import`."
_MADE_BY_US = {"root", "model_fingerprint", "amg"}

# Fields of run.json that others than run.json's own comparison look at, all but _MADE_BY_US may be missing.
_KINDS: dict[str, tuple[type, ...]] = {
    "root": (str, type(None)),
    "input_format": (str, type(None)),
    "model": (str, type(None)),
    "model_fingerprint": (str, type(None)),
    "exif": (str,),
    "max_pixels": (int,),
    "amg": (dict,),
    "names": (dict,),
    "versions": (dict,),
    "refined_from": (dict,),
    "coco": (dict,),
    "prompts": (dict,),
    "categories": (list, type(None)),
}


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
      DamagedFile: it is, but run.json is damaged.
    """
    return _parse_run(labels, _read_run(labels))


def _read_run(labels: str) -> bytes:
    path = FileSystems.join(labels, RUN_FILE)
    FileSystems.get_filesystem(path)  # raises what is wrong with a path that is on none
    try:
        return read_json_bytes(path, MAX_JSON_BYTES)
    except OSError as error:
        if FileSystems.exists(path):
            raise
        raise ValueError(f"{labels} holds no labels: there is no {RUN_FILE}. {_EXPECTED}") from error
    except ValueError as error:
        raise _damaged_run(path, error) from error


def _parse_run(labels: str, data: bytes) -> dict[str, Any]:
    path = FileSystems.join(labels, RUN_FILE)
    try:
        run = parse_json(data)
    except ValueError as error:
        raise _damaged_run(path, error) from error
    if not isinstance(run, dict) or not run.keys() >= _MADE_BY_US:
        raise ValueError(f"{path} was not written by maskbeam. {_EXPECTED}")
    try:
        for name, kinds in _KINDS.items():
            if name in run and type(run[name]) not in kinds:
                raise ValueError(f"its {name} is {str(run[name])[:100]!r}; expected {kinds[0].__name__}")
        ReadConfig(**{name: tuple(names) for name, names in run.get("names", {}).items()})
        ImageConfig(run.get("exif", ImageConfig.exif), run.get("max_pixels", ImageConfig.max_pixels))
        _category_ids(run)
    except (ValueError, TypeError) as error:  # TypeError: the settings of another version
        raise _damaged_run(path, error) from error
    return run


def _damaged_run(path: str, error: Exception) -> DamagedFile:
    return DamagedFile(f"{path} is damaged: {error}. Label again, into another --output.")


def _category_ids(run: dict[str, Any]) -> frozenset[int] | None:
    """The classes that masks may have; None = any."""
    categories = run_categories(run)
    return None if categories is None else category_ids(categories)


@lru_cache(maxsize=4)
def _limits(labels: str, data: bytes) -> tuple[int, frozenset[int] | None]:
    """What run.json says of the rows: pixels that an image may have, and _category_ids. By its content, since a
    directory may be labeled again."""
    run = _parse_run(labels, data)
    return min(run.get("max_pixels", MAX_PIXELS), MAX_PIXELS), _category_ids(run)


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
    """The two tables of a committed chunk, checked.

    Raises:
      DamagedFile: a file is not what it should be; names it, and the row.
    """
    max_pixels, categories = _limits(labels, _read_run(labels))
    name = chunk.file_name
    images = _read_checked_images(labels, name, max_pixels)
    with _reading(FileSystems.join(labels, ANNOTATIONS_DIR, name)) as file:
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
    max_pixels, _ = _limits(labels, _read_run(labels))
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
    with _reading(FileSystems.join(labels, CANDIDATES_DIR, chunk.file_name)) as file:
        candidates = read_table(file, CANDIDATES, columns)
        check_candidates(candidates, images, config)
    return candidates


def _read_checked_images(labels: str, name: str, max_pixels: int) -> pa.Table:
    with _reading(FileSystems.join(labels, IMAGES_DIR, name)) as file:
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
        with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
            yield file
    except (ValueError, OSError, pa.ArrowException) as error:
        first_line = str(error).partition("\n")[0]
        raise DamagedFile(
            f"{path} cannot be read: {first_line}. Delete it, if it is there, and run the command that made it again."
        ) from error
