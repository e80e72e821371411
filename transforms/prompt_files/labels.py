"""Prompts from a directory of maskbeam's labels: the masks that are there, with their boxes, to be refined."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from maskbeam.transforms.labels.run_file import read_run
from maskbeam.transforms.labels.tables import read_chunks
from maskbeam.transforms.prompt_files.categories import from_records
from maskbeam.transforms.prompt_files.rows import make_batch


def label_categories(labels: str) -> dict[int, str]:
    """The classes of a directory of labels, id -> name.

    Raises:
      ValueError: it holds none.
      DamagedFile: its run.json is not what it should be.
    """
    return from_records(read_run(labels).categories or [])


def read_label_prompts(labels: str) -> Iterator[pa.RecordBatch]:
    """A row for each mask that is no crowd region, named by the id that it was imported with, else by its mask_index.

    Raises:
      ValueError: it holds none.
      DamagedFile: a file is not what it should be.
    """
    for chunk in read_chunks(labels):
        rows = [_row(image, mask) for image, masks in chunk.rows() for mask in masks if not mask["iscrowd"]]
        yield make_batch(rows)


def _row(image: Mapping[str, Any], mask: Mapping[str, Any]) -> dict[str, Any]:
    x, y, width, height = mask["bbox"]
    imported = json.loads(mask["coco"]) if mask.get("coco") else {}
    score = mask["predicted_iou"]
    return {
        "image": mask["image_id"],
        "bbox": [x, y, x + width, y + height],
        "segmentation": json.dumps(mask["segmentation"]),
        "category_id": mask["category_id"],
        "score": None if math.isnan(score) else score,
        "id": str(imported.get("id", mask["mask_index"])),
        "width": image["width"],
        "height": image["height"],
    }
