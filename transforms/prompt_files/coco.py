"""Prompts in COCO's JSON: instances, and lists of results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from maskbeam.transforms.formats.coco import (
    category_ids,
    check_unique_names,
    group_by_image,
    is_id,
    is_text,
    name_and_size,
    numbers,
)
from maskbeam.transforms.prompt_files.categories import from_records
from maskbeam.transforms.prompt_files.config import PromptFilesError
from maskbeam.transforms.prompt_files.rows import make_batch

_ROWS = 2**16


@dataclass
class CocoPrompts:
    """The prompts of COCO files.

    Attributes:
      batches: of rows, as in rows.SCHEMA.
      categories: id -> name, of all that the file has.
      images: their names, those without annotations, too.
      crowds: annotations of crowd regions, which are no objects and no prompts.
    """

    batches: Iterator[pa.RecordBatch]
    categories: dict[int, str]
    images: list[str]
    crowds: int = 0


def is_results(content: Any) -> bool:
    """Whether it is a list of results, as detectors write it and pycocotools' loadRes reads it."""
    return isinstance(content, list)


def coco_prompts(instances: Any, results: Any = None) -> CocoPrompts:
    """A row for each annotation of an instances file, or for each result.

    An annotation's box is its prompt; its mask only where it has no box.

    Args:
      instances: content of the instances file, whatever it is; None = there is none, and results name their images.
      results: content of a list of results; None = the annotations are the prompts.

    Raises:
      ValueError: it is something else, or its ids do not fit; in the words of transforms/formats/coco.py.
    """
    if results is not None and (not isinstance(results, list) or not all(isinstance(one, dict) for one in results)):
        raise ValueError("it is no list of results, each with image_id, category_id, bbox and score")
    if instances is None:
        return CocoPrompts(_batches(_result_rows(results or [])), {}, [])
    if not isinstance(instances, dict):
        raise ValueError('it has no lists "images" and "annotations"; expected COCO instances JSON')
    annotations = instances.get("annotations") if results is None else _with_ids(results)
    grouped = group_by_image(instances.get("images"), annotations)
    categories = _categories(instances)
    names = [_image_name(image) for image, _ in grouped]
    check_unique_names(names)
    crowds = sum(bool(record.get("iscrowd")) for _, own in grouped for record in own)
    return CocoPrompts(_batches(_instance_rows(grouped)), categories, names, crowds)


def _categories(instances: Mapping[str, Any]) -> dict[int, str]:
    records = instances.get("categories", [])
    category_ids(records)
    return from_records(records)


def _image_name(image: Mapping[str, Any]) -> str:
    """What an image is called: a file that export wrote has the image_id where file_name is another."""
    image_id = image.get("image_id")
    return str(image_id if is_text(image_id) else image.get("file_name"))


def _with_ids(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results beside an instances file, with their position, from 1, for an id."""
    return [{**record, "id": record.get("id", position)} for position, record in enumerate(results, 1)]


def _instance_rows(grouped: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]]) -> Iterator[dict[str, Any]]:
    for image, own in grouped:
        _, (height, width) = name_and_size(image)
        for record in own:
            if not record.get("iscrowd"):
                where = f"annotation {record['id']}"
                yield {"image": _image_name(image), "width": width, "height": height, **_row(record, where)}


def _result_rows(results: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for position, record in enumerate(results, 1):
        image_id = record.get("image_id")
        if not is_id(image_id):
            yield {"problem": f"result {position} has image_id {image_id!r:.60}; expected the name of an image"}
        else:
            yield {"image": str(image_id), **_row({"id": position, **record}, f"result {position}")}


def _row(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    row: dict[str, Any] = {"id": str(record["id"])}
    try:
        box, segmentation, score = record.get("bbox"), record.get("segmentation"), record.get("score")
        category_id = record.get("category_id")
        if type(category_id) is not int or abs(category_id) >= 2**31:
            raise ValueError(f"its category_id is {category_id!r:.60}; expected a whole number")
        row["category_id"] = category_id
        if score is not None:
            row["score"] = numbers("score", [score], 1)[0]
        if box is not None:
            x, y, width, height = numbers("bbox", box, 4)
            row["bbox"] = [float(x), float(y), float(x) + float(width), float(y) + float(height)]
        elif isinstance(segmentation, (list, dict)):
            row["segmentation"] = json.dumps(segmentation)
        else:
            raise ValueError("it has neither a bbox nor a segmentation")
        return row
    except ValueError as error:
        return {"id": row["id"], "problem": f"{where}: {error}"}


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    while some := list(islice(rows, _ROWS)):
        yield make_batch(some)


def check_one_kind(contents: Sequence[Any]) -> None:
    """Refuses what cannot be told apart: several instances files beside results.

    Raises:
      PromptFilesError
    """
    if sum(not is_results(content) for content in contents) > 1 and any(map(is_results, contents)):
        raise PromptFilesError(
            "there are results and several instances files. Give the results with the one instances file that names "
            "their images, or without any."
        )
