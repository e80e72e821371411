"""Rows of an image whose size is known -> its prompts, in its pixels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from maskbeam.transforms.formats.coco import segmentation_to_counts
from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.labeler import PromptError
from maskbeam.transforms.prompt_files.config import PromptConfig
from maskbeam.transforms.records import CATEGORY_OBJECT, Prompts

# EXIF orientations that swap width and height.
_TURNED = range(5, 9)


@dataclass(frozen=True, eq=False)
class Resolved:
    """The prompts of one image.

    Attributes:
      prompts: in its pixels, one for each row. What a row has wrong makes it a prompt without box, points and mask.
      problems: what is wrong with those, by their position.
    """

    prompts: Prompts
    problems: Mapping[int, str]


def above_score(rows: pa.Table, min_score: float | None) -> pa.Table:
    """The rows with at least the score, and those without any."""
    if min_score is None or "score" not in rows.column_names:
        return rows
    scores = rows["score"].fill_null(np.inf).to_numpy()
    return rows.filter(pa.array(scores >= np.float32(min_score)))


def resolve(
    rows: pa.Table,
    categories: Mapping[int, str],
    size_hw: tuple[int, int],
    exif_orientation: int,
    config: PromptConfig,
    images: ImageConfig,
) -> Resolved:
    """The prompts of an image.

    Args:
      rows: of rows.SCHEMA, of this image; columns may be missing.
      categories: id -> name; empty = the prompts have no classes, and all are objects.
      size_hw: (H, W) of the image in pixels after orientation.
      exif_orientation: of the image, 1..8.

    Raises:
      PromptError: they are for an image of another size.
    """
    width, height = size_hw[1], size_hw[0]
    named = {name: category_id for category_id, name in sorted(categories.items(), reverse=True)}
    found, problems = [], {}
    for position, row in enumerate(rows.to_pylist()):
        try:
            scale_xy = _scale(row, size_hw, exif_orientation, config, images)
            if row.get("problem"):
                raise ValueError(row["problem"])
            row["category_id"] = _category_id(row, categories, named)
            row["counts"] = _counts(row.get("segmentation"), row.get("relative"), size_hw, scale_xy)
            row["scale_xy"] = (width, height) if row.get("relative") else scale_xy
            found.append(row)
        except PromptError:
            raise
        except ValueError as error:
            problems[position] = str(error)
            found.append({"id": row.get("id"), "category_id": 0, "counts": None, "scale_xy": (1.0, 1.0)})
    return Resolved(_make_prompts(found), problems)


def _scale(
    row: Mapping[str, Any],
    size_hw: tuple[int, int],
    exif_orientation: int,
    config: PromptConfig,
    images: ImageConfig,
) -> tuple[float, float]:
    """(x, y) factors from the numbers of a row to pixels."""
    height, width = row.get("height"), row.get("width")
    if not height or not width or (height, width) == size_hw or row.get("relative"):
        return 1.0, 1.0
    if (width, height) == size_hw and exif_orientation in _TURNED and images.exif == "apply":
        raise PromptError(
            f"the prompts are for {width} x {height}, the image is {size_hw[1]} x {size_hw[0]} once it is turned as "
            "its EXIF orientation says: they were drawn on the stored pixels. Use --exif ignore."
        )
    if not config.scale_prompts:
        raise PromptError(
            f"the prompts are for {width} x {height}, the image has {size_hw[1]} x {size_hw[0]}. If it was resized, "
            "--scale_prompts scales them with it."
        )
    return size_hw[1] / width, size_hw[0] / height


def _category_id(row: Mapping[str, Any], categories: Mapping[int, str], named: Mapping[str, int]) -> int:
    category_id, name = row.get("category_id"), row.get("category")
    if category_id is not None:
        if categories and category_id not in categories:
            raise ValueError(f"the class {category_id} is not among the {len(categories)} of --categories")
        return category_id
    if name is not None:  # of prompts in the record
        if name not in named:
            raise ValueError(f"the class {name!r} has no id. Give --categories, a file with a name a line")
        return named[name]
    if categories:
        raise ValueError("it has no class, while others have")
    return CATEGORY_OBJECT


def _counts(
    segmentation: str | None, relative: bool | None, size_hw: tuple[int, int], scale_xy: tuple[float, float]
) -> str | None:
    """RLE of a mask of the image's size."""
    if segmentation is None:
        return None
    found = json.loads(segmentation)
    factors = (size_hw[1], size_hw[0]) if relative else scale_xy
    if isinstance(found, list) and factors != (1.0, 1.0):
        found = [_scale_polygon(polygon, factors) for polygon in found]
    return segmentation_to_counts(found, size_hw)


def _scale_polygon(polygon: Any, factors: tuple[float, float]) -> Any:
    if not isinstance(polygon, list) or not all(type(value) in (int, float) for value in polygon):
        return polygon  # it is refused as it is
    return [value * factors[index % 2] for index, value in enumerate(polygon)]


def _make_prompts(rows: Sequence[Mapping[str, Any]]) -> Prompts:
    scales = np.array([row["scale_xy"] for row in rows], float).reshape(-1, 2)
    boxes = np.array([row.get("bbox") or [np.nan] * 4 for row in rows], float).reshape(-1, 4)
    counts = [len(row.get("points") or []) // 2 for row in rows]
    points = np.array([value for row in rows for value in row.get("points") or []], float).reshape(-1, 2)
    labels = np.array([value for row in rows for value in row.get("point_labels") or []], np.int8)
    scores = [np.nan if row.get("score") is None else row["score"] for row in rows]
    return Prompts(
        boxes_xyxy=boxes * np.tile(scales, 2),
        points_xy=points * np.repeat(scales, counts, axis=0),
        point_labels=labels,
        first_point=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        masks=tuple(row["counts"] for row in rows),
        category_ids=np.array([row["category_id"] for row in rows], np.int32),
        scores=np.array(scores, np.float32),
        ids=tuple(row.get("id") or "" for row in rows),
    )
