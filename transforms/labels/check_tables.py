"""What the tables of a chunk must hold: checked once, when they are read, so that nothing behind has to.

The numbers of all rows are checked together. Each function raises a ValueError that names the first row with a fault
and says what was expected; the file is named by who reads it (transforms/labels/tables.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maskbeam.transforms.files.strict_json import parse_json
from maskbeam.transforms.formats.coco import COCO_FIELD, is_id, is_text
from maskbeam.transforms.labels.schema import ANNOTATIONS, CANDIDATES, IMAGES
from maskbeam.transforms.masks import rle
from maskbeam.transforms.masks.amg import AmgConfig
from maskbeam.transforms.masks.crops import generate_crop_boxes

_STATUSES = ("labeled", "empty", "failed")

# Ids come from the input, and may be as long as that likes.
_SHOWN = 200


@dataclass(frozen=True)
class _Rows:
    """A table, and what its rows are called."""

    table: pa.Table
    name: Callable[[int], str]

    def require(self, good: Any, problem: Callable[[int], str]) -> None:
        """Raises ValueError with the problem of the first row that is not good; good is (N,) bool."""
        good = np.asarray(good, bool)
        if not good.all():
            row = int(np.argmin(good))
            raise ValueError(f"{self.name(row)}: {problem(row)}")

    def require_column(self, column: str, good: Any, expected: str) -> None:
        """require, for what depends on one column."""
        self.require(good, lambda row: f"its {column} is {self.show(column, row)}; expected {expected}")

    def show(self, column: str, row: int) -> str:
        """A value for people."""
        return repr(self.table[column][row].as_py())[:_SHOWN]

    def array(self, column: str) -> pa.Array:
        array = self.table[column].combine_chunks()
        return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array

    def numbers(self, column: str) -> np.ndarray:
        """(N,); null is 0."""
        return np.asarray(self.array(column).fill_null(0))

    def known(self, column: str) -> np.ndarray:
        """(N,) bool, False for null."""
        return np.asarray(self.array(column).is_valid())

    def vectors(self, column: str, size: int) -> np.ndarray:
        """(N, size) numbers of a column of lists that have so many."""
        lists = self.array(column)
        self.require_column(column, np.asarray(pc.list_value_length(lists)) == size, f"{size} numbers")
        items = lists.flatten()
        missing = np.asarray(items.is_null()).reshape(-1, size)
        self.require_column(column, ~missing.any(axis=1), f"{size} numbers")
        return np.asarray(items).reshape(-1, size)

    def where(self, chosen: np.ndarray) -> _Rows:
        """Some of the rows, by their names; chosen is (N,) bool."""
        rows = np.flatnonzero(chosen)
        return _Rows(self.table.filter(pa.array(chosen)), lambda row: self.name(int(rows[row])))

    def require_values(self, schema: pa.Schema) -> None:
        """That no value is null where the schema has none."""
        for field in schema:
            if not field.nullable and field.name in self.table.column_names:
                self.require_column(field.name, self.known(field.name), "a value")


def check_images(images: pa.Table, max_pixels: int) -> None:
    """Checks an images table.

    Args:
      images: with the types of schema.IMAGES, and perhaps COCO_FIELD.
      max_pixels: that an image with masks can have.

    Raises:
      ValueError: names the image.
    """
    rows = _rows_by_name(images)
    rows.require_values(IMAGES)
    image_ids = images["image_id"].to_pylist()
    first = {image_id: row for row, image_id in reversed(list(enumerate(image_ids)))}
    rows.require([image_id != "" for image_id in image_ids], lambda row: f"row {row} has no image_id")
    rows.require([first[image_id] == row for row, image_id in enumerate(image_ids)], lambda row: "it is there twice")

    statuses = images["status"].to_pylist()
    rows.require_column("status", [status in _STATUSES for status in statuses], f"one of {', '.join(_STATUSES)}")
    failed = np.array([status == "failed" for status in statuses], bool)
    for column in ("error_stage", "error"):
        rows.require_column(column, ~failed | rows.known(column), "a value, since it failed")
    height, width = (rows.numbers(side).astype(np.int64) for side in ("height", "width"))
    for column, side in (("height", height), ("width", width)):
        rows.require_column(column, (failed & ~rows.known(column)) | (side > 0), "pixels, at least 1")
    rows.require(
        failed | (height * width <= max_pixels),
        lambda row: f"it has {height[row]} x {width[row]} pixels; expected at most {max_pixels} in all",
    )

    for field in IMAGES:
        if pa.types.is_integer(field.type) and field.name not in ("height", "width"):
            rows.require_column(field.name, rows.numbers(field.name) >= 0, "a number that is not negative")
    orientation, seconds = rows.numbers("exif_orientation"), rows.numbers("seconds")
    rows.require_column("exif_orientation", (orientation >= 1) & (orientation <= 8), "1 to 8")
    rows.require_column("seconds", np.isfinite(seconds) & (seconds >= 0), "seconds")
    labeled = np.array([status == "labeled" for status in statuses], bool)
    rows.require(
        (rows.numbers("num_masks") > 0) == labeled,
        lambda row: f"its status is {statuses[row]}, but its num_masks {rows.show('num_masks', row)}",
    )
    _check_coco(rows, ("width", "height"))


def check_annotations(annotations: pa.Table, images: pa.Table, category_ids: Collection[int] | None) -> None:
    """Checks an annotations table.

    Args:
      annotations: with the types of schema.ANNOTATIONS, and perhaps COCO_FIELD.
      images: of the same chunk, checked.
      category_ids: that masks may have; None = any.

    Raises:
      ValueError: names the mask by its image and mask_index.
    """
    rows = _Rows(annotations, lambda row: f"mask {annotations['mask_index'][row]} of {_show_id(annotations, row)}")
    rows.require_values(ANNOTATIONS)
    of_image = _rows_of_images(rows, images)
    position, num_masks = _count_within(of_image, len(images))
    _rows_by_name(images).require(
        images["num_masks"].to_numpy() == num_masks,
        lambda row: f"it has {num_masks[row]} rows, but the images table says {images['num_masks'][row]}",
    )
    rows.require_column("mask_index", rows.numbers("mask_index") == position, "0, 1, 2, ... in the order of the rows")

    size_hw = _sizes(images)[of_image]
    _check_segmentation(rows, size_hw)
    box_xywh = rows.vectors("bbox", 4)
    inside = (box_xywh[:, :2] >= 0) & (box_xywh[:, 2:] >= 0) & (box_xywh[:, :2] + box_xywh[:, 2:] <= size_hw[:, ::-1])
    rows.require_column("bbox", inside.all(axis=1), "[x, y, width, height] within the image")
    for column in ("predicted_iou", "stability_score"):
        rows.require_column(column, ~np.isinf(rows.numbers(column)), "a finite number, or NaN")
    _check_prompts(rows, _num_prompts(images)[of_image])
    rows.require_column("crop_box", np.isfinite(rows.vectors("crop_box", 4)).all(axis=1), "finite numbers")
    if category_ids is not None:
        rows.require_column(
            "category_id",
            np.isin(rows.numbers("category_id"), sorted(category_ids)),
            f"one of {str(sorted(category_ids))[1:-1]:.{_SHOWN}}, the categories in run.json",
        )
    rows.require_column("iscrowd", np.isin(rows.numbers("iscrowd"), (0, 1)), "0 or 1")
    _check_order(rows, of_image, position, num_masks[of_image])
    _check_coco(rows, ("segmentation", "image_id"))


def check_candidates(candidates: pa.Table, images: pa.Table, config: AmgConfig) -> None:
    """Checks a candidates table, as far as it was read.

    Args:
      candidates: with the types of schema.CANDIDATES.
      images: of the same chunk, checked.
      config: the settings that the candidates were made with.

    Raises:
      ValueError: names the candidate by its image and its position among the image's candidates.
    """
    numbered = _Rows(candidates, lambda row: f"row {row}")
    numbered.require_values(CANDIDATES)
    of_image = _rows_of_images(numbered, images)
    position, num_candidates = _count_within(of_image, len(images))
    rows = _Rows(
        candidates,
        lambda row: f"candidate {position[row]} of {_show_id(candidates, row)}",
    )
    rows.require(
        np.r_[True, (np.diff(of_image) == 0) | (position[1:] == 0)][: len(of_image)],
        lambda row: "it does not follow the others of its image",
    )
    said = images["num_candidates"].to_numpy()
    rows.require(num_candidates[of_image] <= said[of_image], lambda row: "the images table says that there are fewer")
    sizes_hw = _sizes(images)
    rows.require((sizes_hw[of_image] > 0).all(axis=1), lambda row: "its image has no size")

    num_crops = np.zeros(len(images), np.int64)
    for image in np.unique(of_image).tolist():
        height, width = sizes_hw[image].tolist()
        num_crops[image] = len(generate_crop_boxes((height, width), config.crop_n_layers, config.crop_overlap_ratio))
    crop_index = rows.numbers("crop_index")
    rows.require_column(
        "crop_index", (crop_index >= 0) & (crop_index < num_crops[of_image]), "one of the image's crops"
    )
    size_hw = sizes_hw[of_image]
    rows.require_column("predicted_iou", np.isfinite(rows.numbers("predicted_iou")), "a finite number")
    stability = rows.numbers("stability_score")
    rows.require_column("stability_score", ~np.isinf(stability), "a finite number, or NaN")
    _check_grid_points(rows, lambda numbers: ~np.isfinite(numbers))
    box_xyxy = rows.vectors("box_xyxy", 4)
    inside = (box_xyxy[:, :2] >= 0) & (box_xyxy[:, :2] <= box_xyxy[:, 2:]) & (box_xyxy[:, 2:] < size_hw[:, ::-1])
    rows.require_column("box_xyxy", inside.all(axis=1), "[x0, y0, x1, y1] within the crop")

    counts = pc.struct_field(rows.array("segmentation"), "counts")
    encoded = np.asarray(counts.is_valid())
    stable = stability >= config.bar.stability_score_thresh
    rows.require(encoded | ~stable, lambda row: "it has no segmentation, though it is stable enough to have one")
    areas = np.zeros(len(counts), np.int64)
    areas[encoded] = _areas(counts.drop_null(), size_hw[encoded])
    rows.require(areas >= 0, lambda row: _describe_counts(counts[row].as_py(), size_hw[row]))


def _rows_by_name(images: pa.Table) -> _Rows:
    return _Rows(images, lambda row: f"the image {_show_id(images, row)}")


def _show_id(table: pa.Table, row: int) -> str:
    return repr(table["image_id"][row].as_py())[:_SHOWN]


def _rows_of_images(rows: _Rows, images: pa.Table) -> np.ndarray:
    """(N,) the row of the images table that each row of another table is of."""
    found = pc.index_in(rows.array("image_id"), value_set=images["image_id"].combine_chunks())
    rows.require(found.is_valid(), lambda row: "its image is not in the images table: the files are of different runs")
    return np.asarray(found.fill_null(0)).astype(np.int64)


def _count_within(of_image: np.ndarray, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the position of each row among those of its image, and (num_images,) how many those are."""
    counts = np.bincount(of_image, minlength=num_images)
    order = np.argsort(of_image, kind="stable")
    position = np.empty(len(of_image), np.int64)
    position[order] = np.arange(len(of_image)) - np.repeat(np.cumsum(counts) - counts, counts)
    return position, counts


def _sizes(images: pa.Table) -> np.ndarray:
    """(N, 2) height and width in pixels; 0 where they are null."""
    return np.stack([np.asarray(images[side].combine_chunks().fill_null(0)) for side in ("height", "width")], axis=1)


def _num_prompts(images: pa.Table) -> np.ndarray:
    """(N,); 0 where it is null."""
    return np.asarray(images["num_prompts"].combine_chunks().fill_null(0))


def _check_segmentation(rows: _Rows, size_hw: np.ndarray) -> None:
    """That the RLE is one of the image, and of so many pixels as the area says."""
    segmentation = rows.array("segmentation")
    parts = _Rows(pa.table({name: pc.struct_field(segmentation, name) for name in ("size", "counts")}), rows.name)
    counts = parts.array("counts")
    parts.require_column("counts", parts.known("counts"), "a compressed RLE")
    size = parts.vectors("size", 2)
    parts.require_column("size", (size == size_hw).all(axis=1), "[height, width] of its image")
    areas, area = _areas(counts, size_hw), rows.numbers("area")
    rows.require(areas >= 0, lambda row: _describe_counts(counts[row].as_py(), size_hw[row]))
    rows.require(areas == area, lambda row: f"its area is {area[row]}, but its RLE has {areas[row]} pixels")


def _areas(counts: pa.StringArray, size_hw: np.ndarray) -> np.ndarray:
    """rle.counts_to_areas of an array without nulls."""
    _, offsets, characters = counts.buffers()
    bounds = np.frombuffer(offsets, np.int32)[counts.offset :][: len(counts) + 1].astype(np.int64)
    text = np.frombuffer(characters, np.uint8) if characters is not None else np.zeros(0, np.uint8)
    return rle.counts_to_areas(text, bounds, size_hw.astype(np.int64).prod(axis=1))


def _describe_counts(counts: str, size_hw: np.ndarray) -> str:
    try:
        rle.check_counts(counts, (int(size_hw[0]), int(size_hw[1])))
    except ValueError as error:
        return f"its counts are no RLE of its image: {error}"
    raise AssertionError("counts_to_areas and check_counts disagree")


def _check_grid_points(rows: _Rows, wrong: Callable[[np.ndarray], np.ndarray]) -> None:
    """That there is one point with two numbers that are not wrong."""
    points = rows.array("point_coords")
    rows.require_column("point_coords", np.asarray(pc.list_value_length(points)) == 1, "one point [x, y]")
    _check_coordinates(rows, wrong)


def _check_coordinates(rows: _Rows, wrong: Callable[[np.ndarray], np.ndarray]) -> None:
    points = rows.array("point_coords")
    of_point = np.repeat(np.arange(len(points)), np.asarray(pc.list_value_length(points)))
    inner = _Rows(pa.table({"point_coords": points.flatten()}), lambda point: rows.name(int(of_point[point])))
    inner.require_column("point_coords", inner.known("point_coords"), "[x, y]")
    inner.require_column("point_coords", ~wrong(inner.vectors("point_coords", 2)).any(axis=1), "finite numbers")


def _check_prompts(rows: _Rows, num_prompts: np.ndarray) -> None:
    """What each mask answers: a point of the grid, or a prompt that was given.

    Args:
      num_prompts: (N,) of each row's image; 0 = none was given.
    """
    given = rows.known("prompt_index")
    _check_grid_points(rows.where(~given), np.isinf)
    for column in ("prompt_id", "prompt_box", "point_labels", "mask_prompt", "prompt_score", "mask_token"):
        rows.require_column(column, given | ~rows.known(column), "null, since it has no prompt_index")
    prompted = rows.where(given)
    index = prompted.numbers("prompt_index")
    prompted.require_column("prompt_index", (index >= 0) & (index < num_prompts[given]), "one of the image's prompts")
    for column in ("point_labels", "mask_prompt", "mask_token"):
        prompted.require_column(column, prompted.known(column), "a value, since it has a prompt_index")
    token = prompted.numbers("mask_token")
    prompted.require_column("mask_token", (token >= 0) & (token <= 3), "0 to 3")
    prompted.require_column("prompt_score", np.isfinite(prompted.numbers("prompt_score")), "a finite number, or null")
    _check_coordinates(prompted, lambda numbers: ~np.isfinite(numbers))
    _check_point_labels(prompted)
    boxed = prompted.where(prompted.known("prompt_box"))
    box_xywh = boxed.vectors("prompt_box", 4)
    good = np.isfinite(box_xywh).all(axis=1) & (box_xywh[:, 2:] > 0).all(axis=1)
    boxed.require_column("prompt_box", good, "[x, y, width, height], neither side 0")


def _check_point_labels(rows: _Rows) -> None:
    labels = rows.array("point_labels")
    counts = np.asarray(pc.list_value_length(labels))
    num_points = np.asarray(pc.list_value_length(rows.array("point_coords")))
    rows.require_column("point_labels", counts == num_points, "one for each point of point_coords")
    good = np.isin(np.asarray(labels.flatten().fill_null(-1)), (0, 1))
    wrong = np.bincount(np.repeat(np.arange(len(counts)), counts), weights=~good, minlength=len(counts))
    rows.require_column("point_labels", wrong == 0, "0 and 1")


def _check_order(rows: _Rows, of_image: np.ndarray, position: np.ndarray, num_masks: np.ndarray) -> None:
    """The columns that refer to other masks of the image."""
    rank = rows.numbers("rank")
    ranked = np.zeros(len(rank), bool)
    order = np.lexsort((rank, of_image))
    ranked[order] = rank[order] == position[np.argsort(of_image, kind="stable")]
    rows.require_column("rank", ranked, "each of 0, 1, 2, ... once for the masks of an image")
    parent = rows.numbers("parent_id")
    good = (parent >= 0) & (parent < num_masks) & (parent != position)
    rows.require_column("parent_id", ~rows.known("parent_id") | good, "the mask_index of another mask of the image")


def _check_coco(rows: _Rows, columns: tuple[str, ...]) -> None:
    """The JSON of what an imported record has beside the columns, which would take the place of a column's value."""
    if COCO_FIELD.name not in rows.table.column_names:
        return
    rows.require_column(COCO_FIELD.name, rows.known(COCO_FIELD.name), "a JSON object")
    for row, text in enumerate(rows.table[COCO_FIELD.name].to_pylist()):
        try:
            kept = parse_json(text.encode())
        except ValueError as error:
            raise ValueError(f"{rows.name(row)}: its {COCO_FIELD.name}: {error}") from error
        if not isinstance(kept, dict) or not is_id(kept.get("id")) or kept.keys() & set(columns):
            raise ValueError(
                f"{rows.name(row)}: its {COCO_FIELD.name} is {text[:_SHOWN]!r}; expected an object with an id and "
                f"without {' and '.join(columns)}"
            )
        for name in ("file_name", "image_id"):
            if name in kept and not is_text(kept[name]):
                raise ValueError(f"{rows.name(row)}: its {name} is {str(kept[name])[:_SHOWN]!r}; expected text")
