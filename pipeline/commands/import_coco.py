"""maskbeam import: COCO annotations, or the results of another tool, as a directory of labels."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
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
    coco_to_image,
    group_by_image,
)
from maskbeam.transforms.labels.commit import RunReplaced, commit_tables
from maskbeam.transforms.labels.layout import ANNOTATIONS_DIR, IMAGES_DIR, chunk_name, shard_name
from maskbeam.transforms.labels.schema import chunk_to_tables
from maskbeam.transforms.match_shards import InputConfig
from maskbeam.transforms.records import ChunkReport, DamagedFile, LabeledChunk, Shard, SourceFile, Totals
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
    try:
        content, source, digest = _read(config.annotations)
        about = content if isinstance(content, dict) else {}
        if isinstance(content, list):
            if config.images_from is None:
                raise UsageError(
                    f"{config.annotations} is a list of results; say with --images_from which file has their images"
                )
            about, _, images_digest = _read(config.images_from)
            digest += images_digest
        elif config.images_from is not None:
            raise UsageError(f"{config.annotations} is no list of results, so --images_from has no use")
        if not isinstance(about, dict):
            raise ValueError("expected an object with images, annotations and categories")
        records = about.get("annotations") if isinstance(content, dict) else content
        grouped = group_by_image(about.get("images"), records)
        if not grouped:
            raise ValueError("it has no images")
        check_categories([record for _, annotations in grouped for record in annotations], about.get("categories"))
        images = [
            coco_to_image(image, row, annotations)
            for row, (image, annotations) in enumerate(progress_bar(grouped, unit="image"))
        ]
        _check_image_ids([image.source.image_id for image in images])
    except UsageError:
        raise
    except ValueError as error:
        raise DamagedFile(f"cannot import {config.annotations}: {error}. {MEND_COCO}") from error
    except OSError as error:
        raise UsageError(f"cannot import {config.annotations}: {error}") from error
    shard = Shard(shard_name(config.annotations.rpartition("/")[2]), absolute(config.annotations), "coco", (source,))
    run = _describe(shard, digest, {key: about[key] for key in about if key not in ("images", "annotations")})
    run = claim_output(config.output, run, config.overwrite)
    # Each file has it in its metadata, and categories can be long.
    in_files = {key: value for key, value in run.items() if key != "coco"}
    totals = Totals()
    try:
        for first in progress_bar(range(0, len(images), _CHUNK_SIZE), unit="chunk"):
            part = slice(first, first + _CHUNK_SIZE)
            chunk = LabeledChunk(
                shard, first // _CHUNK_SIZE, tuple(images[part]), first + _CHUNK_SIZE >= len(images), digest
            )
            report = ChunkReport(shard.name, chunk.index, chunk.final, digest, shard.source, chunk.totals())
            annotations_table, images_table = add_coco_columns(
                *chunk_to_tables(chunk, report, in_files),
                [image for image, _ in grouped[part]],
                [annotation for _, annotations in grouped[part] for annotation in annotations],
            )
            tables = {ANNOTATIONS_DIR: annotations_table, IMAGES_DIR: images_table}
            commit_tables(tables, chunk_name(shard.name, chunk.index), config.output, in_files)
            totals += report.totals
        write_summary(totals, config.output, run)
    except (OSError, RunReplaced) as error:
        print(f"maskbeam: {error}. Run the same command to go on.", file=sys.stderr)
        return EXIT_FAILED
    print(f"{totals.images} images with {totals.masks} masks: {config.output}")
    return EXIT_DONE


def _read(path: str) -> tuple[Any, SourceFile, str]:
    """A JSON file's content, itself and its sha256."""
    data = read_json_bytes(path, MAX_COCO_BYTES)
    return parse_json(data), SourceFile(absolute(path), len(data)), hashlib.sha256(data).hexdigest()


def _check_image_ids(image_ids: list[str]) -> None:
    """Images are known by their file names from here on."""
    seen: set[str] = set()
    for image_id in image_ids:
        if image_id in seen:
            raise ValueError(f"two images have the file_name {image_id!r}; expected unique names")
        seen.add(image_id)


def _describe(shard: Shard, digest: str, coco: dict[str, Any]) -> dict[str, Any]:
    """The content of run.json. It has the fields of a labeling run, and no model.

    Args:
      coco: what the file has beside its images and annotations.
    """
    return {
        "root": shard.path.rpartition("/")[0],
        "chunk_size": _CHUNK_SIZE,
        "model": None,
        "model_fingerprint": None,
        "amg": {},
        "imported": shard.path,
        "imported_sha256": digest,
        "versions": versions(),
        "coco": coco,
    }
