"""maskbeam import: COCO annotations, or the results of another tool, as a directory of labels."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from maskbeam.pipeline.exits import EXIT_DONE, EXIT_FAILED, UsageError
from maskbeam.pipeline.launch.identity import claim_output, versions
from maskbeam.pipeline.options import parse_job
from maskbeam.pipeline.progress import progress_bar
from maskbeam.transforms.files.paths import absolute
from maskbeam.transforms.files.storage import read_json_bytes
from maskbeam.transforms.files.strict_json import parse_json
from maskbeam.transforms.formats.coco import (
    MAX_COCO_BYTES,
    MEND_COCO,
    add_coco_columns,
    check_categories,
    check_unique_names,
    coco_to_image,
    group_by_image,
)
from maskbeam.transforms.labels.commit import RunReplaced, commit_chunk
from maskbeam.transforms.labels.layout import shard_name
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.match_shards import InputConfig
from maskbeam.transforms.records import DamagedFile, LabeledChunk, LabeledImage, Totals
from maskbeam.transforms.summarize import write_summary

_CHUNK_SIZE = InputConfig.chunk_size

_DESCRIPTION = (
    "Makes labels of COCO annotations or results. Polygons and uncompressed RLE become RLE, as pycocotools does it; "
    "all else that the file says is kept, and exported again."
)


@dataclass(frozen=True)
class ImportConfig:
    """What becomes labels.

    Attributes:
      annotations: COCO instances file (JSON), or a list of results, which needs --images_from; on any Beam file system.
      output: directory of the labels, on any Beam file system.
      format: that of the annotations.
      images_from: COCO instances file with the images and categories of a list of results.
      overwrite: delete the labels that an earlier run left in output and start anew.
    """

    annotations: str
    output: str
    format: Literal["coco"] = "coco"
    images_from: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.format != "coco":
            raise ValueError(f"format is {self.format}; expected coco.")


@dataclass(frozen=True)
class ImportJob:
    """Everything `maskbeam import` was asked to do."""

    imported: ImportConfig


def main(argv: list[str]) -> int:
    """Parses the flags and imports."""
    return run_import(parse_import(argv).imported)


def parse_import(argv: list[str]) -> ImportJob:
    """Command line -> what to do."""
    return parse_job("import", ImportJob, argv, _DESCRIPTION)


def run_import(config: ImportConfig) -> int:
    """Imports and prints what came of it. The whole file is checked before anything is written.

    Returns:
      the exit code.

    Raises:
      UsageError: the file cannot be read, or the output cannot be written.
      DamagedFile: it is not what it should be.
    """
    source = read_source(config)
    run = claim_output(config.output, _describe(source), config.overwrite)
    try:
        totals = _write(source, config.output, run)
        write_summary(totals, config.output, run)
    except (OSError, RunReplaced) as error:
        print(f"maskbeam: {error}. Run the same command to go on.", file=sys.stderr)
        return EXIT_FAILED
    print(f"{totals.images} images with {totals.masks} masks: {config.output}")
    return EXIT_DONE


@dataclass(frozen=True)
class ImportSource:
    """A checked file of annotations.

    Attributes:
      path: absolute.
      num_bytes: of the file.
      digest: sha256 of it, followed by that of the file with its images.
      records: the COCO records of each image and of its annotations.
      images: what they became.
      rest: what the file with the images has beside images and annotations.
    """

    path: str
    num_bytes: int
    digest: str
    records: list[tuple[dict[str, Any], list[dict[str, Any]]]]
    images: list[LabeledImage]
    rest: dict[str, Any]


def read_source(config: ImportConfig) -> ImportSource:
    """Reads and checks the file; see run_import for the errors."""
    try:
        data = read_json_bytes(config.annotations, MAX_COCO_BYTES)
        content, digest = parse_json(data), _sha256(data)
        holder = content
        if isinstance(content, list):
            images_data = _read_images_of_results(config)
            holder, digest = parse_json(images_data), digest + _sha256(images_data)
        elif config.images_from is not None:
            raise UsageError(f"{config.annotations} is no list of results, so --images_from has no use")
        if not isinstance(holder, dict):
            raise ValueError("expected an object with images, annotations and categories")
        records = _check_records(holder, content if isinstance(content, list) else holder.get("annotations"))
        images = [
            coco_to_image(image, row, annotations)
            for row, (image, annotations) in enumerate(progress_bar(records, unit="image"))
        ]
        check_unique_names([image.source.image_id for image in images])
    except UsageError:
        raise
    except ValueError as error:
        raise DamagedFile(f"cannot import {config.annotations}: {error}. {MEND_COCO}") from error
    except OSError as error:
        raise UsageError(f"cannot import {config.annotations}: {error}") from error
    rest = {key: value for key, value in holder.items() if key not in ("images", "annotations")}
    return ImportSource(absolute(config.annotations), len(data), digest, records, images, rest)


def _read_images_of_results(config: ImportConfig) -> bytes:
    if config.images_from is None:
        raise UsageError(
            f"{config.annotations} is a list of results; say with --images_from which file has their images"
        )
    return read_json_bytes(config.images_from, MAX_COCO_BYTES)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _check_records(holder: dict[str, Any], annotations: Any) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The records of each image and of its annotations, which are of known categories."""
    grouped = group_by_image(holder.get("images"), annotations)
    if not grouped:
        raise ValueError("it has no images")
    check_categories([record for _, records in grouped for record in records], holder.get("categories"))
    return grouped


def _write(source: ImportSource, output: str, run: Run) -> Totals:
    """Commits the images chunk by chunk."""
    name = shard_name(source.path.rpartition("/")[2])
    about = f"1 file, {source.num_bytes} bytes"
    totals = Totals()
    for first in progress_bar(range(0, len(source.images), _CHUNK_SIZE), unit="chunk"):
        part = slice(first, first + _CHUNK_SIZE)
        final = first + _CHUNK_SIZE >= len(source.images)
        images = tuple(source.images[part])
        chunk = LabeledChunk(name, source.path, about, first // _CHUNK_SIZE, images, final, source.digest)
        add_columns = partial(add_coco_columns, records=source.records[part])
        totals += commit_chunk(chunk, output, run, add_columns).totals
    return totals


def _describe(source: ImportSource) -> Run:
    """It has the fields of a labeling run, and no model."""
    return Run(
        root=source.path.rpartition("/")[0],
        chunk_size=_CHUNK_SIZE,
        imported=source.path,
        imported_sha256=source.digest,
        versions=versions(),
        coco=source.rest,
    )
