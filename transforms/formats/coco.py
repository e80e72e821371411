"""Rows of the tables <-> records of COCO's instances format (https://cocodataset.org/#format-data).

What a COCO record has beside the columns (its id, an area that is no count of pixels, a licence, attributes, ...) is
kept as JSON in a column of its own, which imported labels have beside the others. So a file that is imported and
exported again says what it said, but that polygons and uncompressed RLE have become compressed RLE.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from maskbeam.transforms.formats.polygons import PolygonLoss, counts_to_outlines, polygons_iou
from maskbeam.transforms.masks import rle
from maskbeam.transforms.records import CATEGORY_OBJECT, EncodedImage, LabeledImage, Mask, Prompt

COCO_FIELD = pa.field(
    "coco",
    pa.string(),
    nullable=False,
    metadata={"description": "JSON of what the record in the imported COCO file has beside the other columns."},
)

OBJECT_CATEGORY = {"id": CATEGORY_OBJECT, "name": "object", "supercategory": "object"}

# Corners of a polygon may lie outside the image by this many times its size; pycocotools takes memory for all the way.
_MAX_OUTSIDE = 1

# Pixels that a polygon's outline may have: pycocotools takes 77 bytes for each.
_MAX_OUTLINE = 4_000_000

# Bytes of a file, which is read whole. COCO's own has half of that, LVIS' about as many.
MAX_COCO_BYTES = 2**31

# After what is wrong with a file.
MEND_COCO = "Mend the file; expected COCO's instances format (https://cocodataset.org/#format-data)."

_INT32_MAX = 2**31 - 1

_FLOAT32_MAX = float(np.finfo(np.float32).max)

_UNKNOWN_POINT = [math.nan, math.nan]


def file_name(image: dict[str, Any]) -> str:
    """COCO's file_name of a row of the images table: where the image lies below the directory of the images.

    For loose files that is the image_id, their path; in shards the record's own file name, or the image_id without one.

    >>> file_name({"image_id": "train/a.jpg", "file_name": "a.jpg"})
    'train/a.jpg'
    >>> file_name({"image_id": "train.tar#7", "file_name": "cats/a.jpg"})
    'cats/a.jpg'
    """
    own: str | None = image["file_name"]
    image_id: str = image["image_id"]
    return image_id if own is None or image_id.rpartition("/")[2] == own else own


def image_to_coco(image: dict[str, Any], number: int) -> dict[str, Any]:
    """The COCO record of a row of the images table whose size is known.

    Args:
      number: its id, unless it was imported with one.
    """
    record = {"id": number, "file_name": file_name(image), "width": image["width"], "height": image["height"]}
    if record["file_name"] != image["image_id"]:
        record["image_id"] = image["image_id"]  # the way back to the tables
    return {**record, **_kept(image)}


def annotation_to_coco(mask: dict[str, Any], number: int, image_id: Any) -> dict[str, Any]:
    """The COCO record of a row of the annotations table. What was never known (NaN) is left out.

    Args:
      number: its id, unless it was imported with one.
      image_id: the id of the image's COCO record.
    """
    record = {
        "id": number,
        "image_id": image_id,
        "category_id": mask["category_id"],
        "segmentation": mask["segmentation"],
        "area": mask["area"],
        "bbox": mask["bbox"],
        "iscrowd": mask["iscrowd"],
    }
    predicted_iou, stability_score = mask["predicted_iou"], mask["stability_score"]
    if not math.isnan(predicted_iou):
        # COCO's results are ranked by score.
        record["score"] = record["predicted_iou"] = shortest(predicted_iou)
    if not math.isnan(stability_score):
        record["stability_score"] = shortest(stability_score)
    if not any(math.isnan(value) for point in mask["point_coords"] for value in point):
        record["point_coords"], record["crop_box"] = mask["point_coords"], mask["crop_box"]
    return {**record, **_kept(mask)}


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    kept = row.get(COCO_FIELD.name)
    return json.loads(kept) if kept else {}


def shortest(value: float) -> float:
    """A float32 as the double with the fewest digits that is the same float32.

    >>> shortest(0.8999999761581421)
    0.9
    """
    return float(str(np.float32(value)))


def segmentation_to_polygons(mask: dict[str, Any], loss: PolygonLoss) -> list[list[int]] | dict[str, Any]:
    """The polygons [x, y, x, y, ...] of a row of the annotations table, its parts without their holes.

    Crowds and masks without a pixel stay RLE: COCO has crowds in RLE, and nothing has no outline.

    Args:
      loss: what is lost is added to it.
    """
    segmentation: dict[str, Any] = mask["segmentation"]
    if mask["iscrowd"] or not mask["area"]:
        return segmentation
    counts, size_hw = segmentation["counts"], tuple(segmentation["size"])
    outlines = counts_to_outlines(counts, size_hw)
    polygons = [part.ravel().tolist() for part in outlines.parts]
    loss.count(outlines, polygons_iou(polygons, counts, size_hw), mask_name(mask))
    return polygons


def mask_name(mask: dict[str, Any]) -> str:
    """A mask for people."""
    return f"{mask['image_id']}, mask_index {mask['mask_index']}"


def group_by_image(images: Any, annotations: Any) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The images of a COCO file in their order, each with its annotations in theirs.

    Annotations without an id, as results are, get their position, from 1, as pycocotools' loadRes does.

    Args:
      images, annotations: the file's lists of records, whatever is in them.

    Raises:
      ValueError: a list is none, an id is missing or comes twice, an annotation is of no image.
    """
    image_ids = _unique_ids("image", images)
    of_image: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in image_ids}
    if isinstance(annotations, list):
        annotations = [
            {"id": position, **record} if isinstance(record, dict) else record
            for position, record in enumerate(annotations, 1)
        ]
    _unique_ids("annotation", annotations)
    for record in annotations:
        told = f"the annotation with id {record['id']!r}"
        image_id = record.get("image_id")
        if not is_id(image_id) or image_id not in of_image:
            raise ValueError(f"{told} has image_id {image_id!r}, but there is no such image")
        if record.get("iscrowd", 0) not in (0, 1):
            raise ValueError(f"{told} has iscrowd {record['iscrowd']!r}; expected 0 or 1")
        of_image[image_id].append(record)
    return [(image, of_image[image["id"]]) for image in images]


def check_categories(annotations: Sequence[dict[str, Any]], categories: Any) -> None:
    """Checks that every annotation is of one of the categories.

    Args:
      annotations: as group_by_image gives them.
      categories: the file's list of records, whatever is in it.

    Raises:
      ValueError: one is not.
    """
    known = category_ids(categories)
    for record in annotations:
        told, category_id = f"the annotation with id {record['id']!r}", record.get("category_id")
        if not is_id(category_id) or category_id not in known:
            raise ValueError(f"{told} has category_id {category_id!r}, but there is no such category")


def check_unique_names(names: Iterable[str]) -> None:
    """Images are known by their names from here on.

    Raises:
      ValueError: two have the same one.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"two images have the file_name {name!r}; expected unique names")
        seen.add(name)


def category_ids(categories: Any) -> frozenset[int]:
    """The ids of a file's categories.

    Args:
      categories: the list of records, whatever is in it.

    Raises:
      ValueError: it is none, or an id comes twice or cannot be stored, or a name is none.
    """
    ids = _unique_ids("category", categories)
    for record in categories:
        if type(record["id"]) is not int or abs(record["id"]) > _INT32_MAX:
            raise ValueError(f"the category with id {record['id']!r} has an id that is no whole number of 32 bits")
        if not isinstance(record.get("name", ""), str):
            raise ValueError(f"the category with id {record['id']!r} has name {record['name']!r}; expected text")
    return frozenset(ids)


def _unique_ids(kind: str, records: Any) -> set[Any]:
    if not isinstance(records, list):
        raise ValueError(f"there is no list of {kind} records")
    ids = set()
    for record in records:
        if not isinstance(record, dict) or not is_id(record.get("id")):
            raise ValueError(f"the {kind} record {str(record)[:100]} has no id that is a number or a string")
        if record["id"] in ids:
            raise ValueError(f"two {kind} records have the id {record['id']!r}; expected unique ids")
        ids.add(record["id"])
    return ids


def is_id(value: Any) -> bool:
    """Whether it is an id as COCO's records have it: a whole number, or text."""
    return type(value) is int or is_text(value)


def coco_to_image(record: dict[str, Any], row: int, annotations: Sequence[dict[str, Any]]) -> LabeledImage:
    """An image of a COCO file with its annotations.

    Args:
      record: of the image.
      row: its position in the file.
      annotations: its records, in their order.

    Raises:
      ValueError: a record does not have what it needs, or has it wrong.
    """
    name, size_hw = name_and_size(record)
    image_id: Any = record.get("image_id", name)
    if not is_text(image_id):
        raise ValueError(f"the image with id {record['id']!r} has image_id {image_id!r}; expected text, not empty")
    masks = tuple(coco_to_mask(annotation, size_hw) for annotation in annotations)
    source = EncodedImage(image_id, row, str(record["id"]), name, b"")
    return LabeledImage(source, 0, "", size_hw, exif_orientation=1, masks=masks, num_candidates=len(masks))


def name_and_size(record: dict[str, Any]) -> tuple[str, tuple[int, int]]:
    """The file_name of a record of an image, and its (H, W) in pixels.

    Raises:
      ValueError: it does not have them, or has them wrong.
    """
    name: Any = record.get("file_name")
    width: Any = record.get("width")
    height: Any = record.get("height")
    if not is_text(name):
        raise ValueError(f"the image with id {record['id']!r} has file_name {name!r}; expected text, not empty")
    if not all(type(side) is int and 0 < side <= _INT32_MAX for side in (width, height)):
        raise ValueError(
            f"the image with id {record['id']!r} has width {width!r} and height {height!r}; expected pixels"
        )
    if width * height > rle.MAX_PIXELS:
        raise ValueError(
            f"the image with id {record['id']!r} has {width} x {height} pixels; at most {rle.MAX_PIXELS} can be counted"
        )
    return name, (height, width)


def is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can store; JSON can also say halves of surrogate pairs."""
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def coco_to_mask(record: dict[str, Any], size_hw: tuple[int, int]) -> Mask:
    """The mask of a COCO annotation or result. What it does not have becomes NaN, its crop the whole image.

    Raises:
      ValueError: it has no mask of this size, or a number that is none.
    """
    try:
        counts = segmentation_to_counts(record.get("segmentation"), size_hw)
        area, bbox_xywh = rle.area_and_bbox_xywh(counts, size_hw)
        (point_xy,) = record.get("point_coords", [_UNKNOWN_POINT])
        point_x, point_y = point_xy if point_xy is _UNKNOWN_POINT else numbers("point_coords", point_xy, 2)
        crop_x, crop_y, crop_w, crop_h = numbers("crop_box", record.get("crop_box", [0, 0, *size_hw[::-1]]), 4)
        return Mask(
            size_hw,
            counts,
            bbox_xywh,
            area,
            predicted_iou=_score(record, "predicted_iou", _score(record, "score", math.nan)),
            stability_score=_score(record, "stability_score", math.nan),
            prompt=Prompt(((float(point_x), float(point_y)),)),
            crop_box_xywh=(float(crop_x), float(crop_y), float(crop_w), float(crop_h)),
            category_id=record.get("category_id", CATEGORY_OBJECT),
            iscrowd=int(record.get("iscrowd", 0)),
        )
    except (ValueError, TypeError) as error:  # TypeError: what is no list
        raise ValueError(f"the annotation with id {record['id']!r} cannot be read: {error}") from error


def _score(record: dict[str, Any], name: str, default: float) -> float:
    value = record.get(name, default)
    if value is not default and not (is_number(value) and abs(value) <= _FLOAT32_MAX):
        raise ValueError(f"its {name} is {value!r:.100}; expected a float of 32 bits")
    return float(value)


def numbers(name: str, value: Any, count: int) -> list[float]:
    """The numbers of a list, where there must be so many.

    Raises:
      ValueError: it is something else.
    """
    if not isinstance(value, list) or len(value) != count or not all(map(is_number, value)):
        raise ValueError(f"its {name} is {value!r:.100}; expected {count} numbers")
    return value


def segmentation_to_counts(segmentation: Any, size_hw: tuple[int, int]) -> str:
    """Compressed RLE of any of COCO's three forms: polygons, which pycocotools fills, RLE, uncompressed RLE.

    Raises:
      ValueError: it is none of them, or of another size.
    """
    height, width = size_hw
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or not all(map(is_number, polygon)):
                raise ValueError("its polygons are not lists of numbers")
            for axis, side in enumerate((width, height)):
                if not all(-_MAX_OUTSIDE * side <= at <= (1 + _MAX_OUTSIDE) * side for at in polygon[axis::2]):
                    raise ValueError(f"a polygon lies far outside the image of {width} x {height} pixels")
            if _outline(polygon) > _MAX_OUTLINE:
                raise ValueError(f"a polygon's outline is longer than {_MAX_OUTLINE} pixels")
        return rle.polygons_to_counts(segmentation, size_hw)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError("its segmentation is neither a list of polygons nor an RLE with size and counts")
    if segmentation["size"] != [height, width]:
        raise ValueError(f"its RLE has size {segmentation['size']}, the image [height, width] {[height, width]}")
    counts = segmentation["counts"]
    if isinstance(counts, str):
        rle.check_counts(counts, size_hw)
        return counts
    if isinstance(counts, list) and all(type(length) is int for length in counts):
        return rle.lengths_to_counts(counts, size_hw)
    raise ValueError("the counts of its RLE are neither a string nor a list of whole numbers")


def _outline(polygon: list[float]) -> float:
    """Its length in pixels, closed, as pycocotools walks it: along the longer axis."""
    if len(polygon) < 4 or len(polygon) % 2:
        return 0.0
    corners_xy = np.array(polygon, float).reshape(-1, 2)
    return float(np.abs(corners_xy - np.roll(corners_xy, 1, axis=0)).max(axis=1).sum())


def is_number(value: Any) -> bool:
    """Whether it is a number that a double holds: JSON has longer ones, and Python reads NaN and Infinity as well."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def add_coco_columns(
    tables: tuple[pa.Table, pa.Table], records: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]]
) -> tuple[pa.Table, pa.Table]:
    """The tables of imported images, with what the records have beside the columns.

    Args:
      tables: annotations and images, as schema.chunk_to_tables makes them.
      records: of their images with those of their annotations, as group_by_image gives them.
    """
    annotations, images = tables
    of_images = [image for image, _ in records]
    of_annotations = [annotation for _, annotations in records for annotation in annotations]
    kept_images = [
        _beside(record, image_to_coco(row, 0)) for row, record in zip(images.to_pylist(), of_images, strict=True)
    ]
    kept = [
        _beside(record, annotation_to_coco(row, 0, record["image_id"]))
        for row, record in zip(annotations.to_pylist(), of_annotations, strict=True)
    ]
    return (
        annotations.append_column(COCO_FIELD, pa.array(kept, COCO_FIELD.type)),
        images.append_column(COCO_FIELD, pa.array(kept_images, COCO_FIELD.type)),
    )


def _beside(record: dict[str, Any], rebuilt: dict[str, Any]) -> str:
    """JSON of a record's id and of all that the one rebuilt from the columns has not, or has otherwise."""
    kept = {
        key: value
        for key, value in record.items()
        if key == "id" or (key != "segmentation" and (key not in rebuilt or rebuilt[key] != value))
    }
    return json.dumps(kept)
