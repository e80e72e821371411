"""A row a prompt: what every format becomes, and how a record of a user's becomes one.

Rows are as they were written down: in pixels or in fractions of the image's sides, and checked only as far as a row
alone can be. What cannot be used stays a row, with the reason in `problem`, so that it is counted and named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.files.strict_json import parse_json
from maskbeam.transforms.prompt_files.config import PromptFilesError

# image: what the prompts call it; null = the row names none.
# bbox: x0, y0, x1, y1, edges as in COCO's x, y, x + w, y + h. points: x, y, x, y, ... segmentation: COCO's JSON.
# category is a name, category_id an id; width and height are of the image that the numbers are for.
# relative: the numbers are fractions of the image's sides.
SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("bbox", pa.list_(pa.float64(), 4)),
        ("points", pa.list_(pa.float64())),
        ("point_labels", pa.list_(pa.int8())),
        ("segmentation", pa.large_string()),
        ("category", pa.string()),
        ("category_id", pa.int32()),
        ("score", pa.float32()),
        ("id", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("relative", pa.bool_()),
        ("problem", pa.string()),
    ]
)

_XYXY = ("xmin", "ymin", "xmax", "ymax")
_XYWH = ("x", "y", "w", "h")

# Names of columns that mean something; others are not looked at.
COLUMNS = (
    *("image", "bbox", *_XYXY, *_XYWH, "points", "point_labels", "segmentation"),
    *("category_id", "category", "score", "id", "width", "height"),
)

# What stands for a missing number in text.
_NO_NUMBER = ("", "nan", "NaN")

_INT32_MAX = 2**31 - 1

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def make_batch(rows: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    """Rows of SCHEMA, whose missing fields are null."""
    return pa.RecordBatch.from_pylist(list(rows), SCHEMA)


def parse_records(
    records: Iterable[Any], bbox_format: str | None, where: str, first: int = 1, image: str | None = None
) -> pa.RecordBatch:
    """Records of a user's, one a prompt, as rows.

    Args:
      records: dicts by the names in COLUMNS, whatever is in them; a ValueError is of what could not be read.
      bbox_format: of `bbox`, a BboxFormat; None = not known.
      where: what the records are called, before their number: "row" or "line".
      first: number of the first.
      image: that all of them are of; None = they say it.

    Raises:
      PromptFilesError: there is a `bbox`, and bbox_format is None.
    """
    rows = []
    for number, record in enumerate(records, first):
        place = f"{where} {number}"
        row: dict[str, Any] = {"image": image}
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, Mapping):
                raise ValueError(f"it is {_shown(record)}; expected an object with names and values")
            if image is None:
                row["image"] = _text("image", record.get("image"))
            row["id"] = _text("id", record.get("id"))
            if row["image"] is None:
                raise ValueError("image is missing; expected the name of an image")
            row.update(_parse_prompt(record, bbox_format))
        except PromptFilesError:
            raise
        except ValueError as error:
            row["problem"] = f"{place}: {error}"
        rows.append(row)
    return make_batch(rows)


def _parse_prompt(record: Mapping[str, Any], bbox_format: str | None) -> dict[str, Any]:
    """The fields of a row beside image and id.

    Raises:
      ValueError: a column has something else than it should; names it.
      PromptFilesError: as parse_records.
    """
    box = _parse_box(record, bbox_format)
    points, labels = _parse_points(record)
    segmentation = _parse_segmentation(record.get("segmentation"))
    if box is None and points is None and segmentation is None:
        raise ValueError("there is no box, no point and no mask")
    category, category_id = record.get("category"), record.get("category_id")
    if category_id is None and not isinstance(category, str):
        category, category_id = None, category  # Hugging Face's class labels are numbers
    return {
        "bbox": box,
        "points": points,
        "point_labels": labels,
        "segmentation": segmentation,
        "category": _text("category", category),
        "category_id": _whole("category_id", category_id, -_INT32_MAX),
        "score": _score(record.get("score")),
        "width": _whole("width", record.get("width"), 1),
        "height": _whole("height", record.get("height"), 1),
        "relative": True if bbox_format is not None and bbox_format.startswith("rel_") else None,
    }


def _parse_box(record: Mapping[str, Any], bbox_format: str | None) -> list[float] | None:
    given = _from_json("bbox", record.get("bbox"))
    if given is not None:
        check_bbox_format(bbox_format)
        assert bbox_format is not None  # or the check had raised
        if not isinstance(given, Sequence) or len(given) != 4:
            raise ValueError(f"bbox is {_shown(given)}; expected 4 numbers")
        numbers = [_number("bbox", value) for value in given]
        return to_xyxy(np.array([numbers]), bbox_format)[0].tolist()
    for names, its_format in ((_XYXY, "xyxy"), (_XYWH, "xywh")):
        values = [record.get(name) for name in names]
        if any(value is not None for value in values):
            numbers = [_number(name, value) for name, value in zip(names, values, strict=True)]
            return to_xyxy(np.array([numbers]), its_format)[0].tolist()
    return None


def check_bbox_format(bbox_format: str | None) -> None:
    """Nothing shows whether four numbers are corners or a corner and a size.

    Raises:
      PromptFilesError: it is not known.
    """
    if bbox_format is None:
        raise PromptFilesError(
            "bbox may be two corners or a corner and a size, and is never guessed: say --prompts_bbox xyxy, xywh, "
            "cxcywh, rel_xyxy, rel_xywh or rel_cxcywh."
        )


def to_xyxy(boxes: np.ndarray, bbox_format: str) -> np.ndarray:
    """Boxes of any format as corners, in the same unit.

    Args:
      boxes: (N, 4) float64.
      bbox_format: a BboxFormat; rel_ changes nothing here.

    Returns:
      (N, 4) float64 x0, y0, x1, y1.

    >>> to_xyxy(np.array([[10.0, 20, 4, 6]]), "xywh").tolist(), to_xyxy(np.array([[10.0, 20, 4, 6]]), "cxcywh").tolist()
    ([[10.0, 20.0, 14.0, 26.0]], [[8.0, 17.0, 12.0, 23.0]])
    """
    kind = bbox_format.removeprefix("rel_")
    if kind == "xyxy":
        return boxes
    xy, wh = boxes[:, :2], boxes[:, 2:]
    corner = xy - wh / 2 if kind == "cxcywh" else xy
    return np.concatenate([corner, xy + wh / 2 if kind == "cxcywh" else xy + wh], axis=1)


def _parse_points(record: Mapping[str, Any]) -> tuple[list[float] | None, list[int] | None]:
    """The points one number after the other, and their labels."""
    points, labels = _from_json("points", record.get("points")), _from_json("point_labels", record.get("point_labels"))
    if points is None or not len(points):
        if labels is not None and len(labels):
            raise ValueError(f"point_labels is {_shown(labels)}, but there are no points")
        return None, None
    if not all(isinstance(point, Sequence) and len(point) == 2 for point in points):
        raise ValueError(f"points is {_shown(points)}; expected a list of [x, y]")
    flat = [_number("points", value) for point in points for value in point]
    if labels is None:
        return flat, [1] * len(points)
    if not isinstance(labels, Sequence) or len(labels) != len(points):
        raise ValueError(f"point_labels is {_shown(labels)}; expected {len(points)}, one for each point")
    if not all(type(value) is int and value in (0, 1) for value in labels):
        raise ValueError(f"point_labels is {_shown(labels)}; expected 1 (on the object) or 0 (beside it)")
    return flat, list(labels)


def _parse_segmentation(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = _from_json("segmentation", value)
    if isinstance(value, Mapping) and {"size", "counts"} <= value.keys():
        counts = value["counts"]
        if isinstance(counts, bytes):
            counts = counts.decode("ascii", "replace")
        return json.dumps({"size": value["size"], "counts": counts})
    if isinstance(value, list):
        return json.dumps(value)
    raise ValueError(f"segmentation is {_shown(value)}; expected an RLE with size and counts, or a list of polygons")


def _from_json(name: str, value: Any) -> Any:
    """A list, which CSV has as text."""
    if not isinstance(value, str):
        if value is not None and not isinstance(value, Sequence):
            raise ValueError(f"{name} is {_shown(value)}; expected a list")
        return value
    if not value.strip():
        return None
    try:
        found = parse_json(value.encode("utf-8", "replace"))
    except ValueError as error:
        raise ValueError(f"{name} is {_shown(value)}; expected a JSON list: {error}") from error
    if not isinstance(found, list) and name != "segmentation":
        raise ValueError(f"{name} is {_shown(value)}; expected a JSON list")
    return found


def _number(name: str, value: Any) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{name} is {_shown(value)}; expected a number") from None
    if type(value) not in (int, float) or not abs(value) <= np.finfo(np.float64).max:
        raise ValueError(f"{name} is {'missing' if value is None else _shown(value)}; expected a finite number")
    return float(value)


def _whole(name: str, value: Any, least: int) -> int | None:
    """A whole number of 32 bits; what is missing in a column of pandas is NaN, and its numbers are floats."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or value in _NO_NUMBER:
        return None
    number = _number(name, value)
    if not number.is_integer() or not least <= number <= _INT32_MAX:
        raise ValueError(f"{name} is {_shown(value)}; expected a whole number from {least}")
    return int(number)


def _score(value: Any) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)) or value in _NO_NUMBER:
        return None
    number = _number("score", value)
    if abs(number) > _FLOAT32_MAX:
        raise ValueError(f"score is {_shown(value)}; expected a float of 32 bits")
    return number


def _text(name: str, value: Any) -> str | None:
    """Text or a whole number as text."""
    if value is None or value == "":
        return None
    if type(value) is int:
        return str(value)
    if isinstance(value, str) and value.isprintable():
        return value
    raise ValueError(f"{name} is {_shown(value)}; expected text or a whole number")


def _shown(value: Any) -> str:
    return f"{value!r:.60}"


def parse_columns(table: pa.RecordBatch, bbox_format: str | None, where: str, first: int) -> pa.RecordBatch:
    """Columns of a user's table as rows: what parse_records makes of their rows, fast where nothing is unusual."""
    try:
        rows = _parse_plain_columns(table, bbox_format)
        if rows is not None:
            return rows
        records = table.to_pylist()
    except PromptFilesError:
        raise
    except UnicodeDecodeError as error:  # Parquet's writers need not check strings
        raise PromptFilesError(f"a text near {where} {first} is no UTF-8: {describe_error(error)}") from error
    return parse_records(records, bbox_format, where, first)


def _parse_plain_columns(table: pa.RecordBatch, bbox_format: str | None) -> pa.RecordBatch | None:
    """Without a loop over rows; None where anything needs a closer look."""
    columns = {name: table.column(name) for name in table.schema.names if name in COLUMNS}
    if any(columns[name].null_count < len(table) for name in ("points", "segmentation") if name in columns):
        return None
    columns = {name: column for name, column in columns.items() if column.null_count < len(column)}
    boxes, boxes_format = _plain_boxes(columns, bbox_format)
    image = columns.get("image")
    if boxes is None or not np.isfinite(boxes).all() or image is None or not pa.types.is_string(image.type):
        return None
    if image.null_count or not pc.all(pc.and_(pc.utf8_is_printable(image), pc.not_equal(image, ""))).as_py():
        return None
    found: dict[str, pa.Array] = {"image": image, "bbox": to_boxes(to_xyxy(boxes, boxes_format))}
    if "category" in columns and "category_id" not in columns and pa.types.is_integer(columns["category"].type):
        columns["category_id"] = columns.pop("category")
    for name, kind in (("category_id", pa.int32()), ("width", pa.int32()), ("height", pa.int32())):
        if name in columns:
            found[name] = _cast(columns[name], kind)
    for name in ("category", "id"):
        if name in columns and (found_text := _plain_text(columns[name])) is not None:
            found[name] = found_text
        elif name in columns:
            return None
    if "score" in columns:
        found["score"] = _cast(columns["score"], pa.float32())
    if any(column is None for column in found.values()) or not _are_plausible(found):
        return None
    if bbox_format is not None and bbox_format.startswith("rel_"):
        found["relative"] = pa.array(np.ones(len(table), bool))
    return pa.RecordBatch.from_arrays(
        [found.get(field.name, pa.nulls(len(table), field.type)) for field in SCHEMA], schema=SCHEMA
    )


def _are_plausible(columns: Mapping[str, pa.Array]) -> bool:
    """Whether the numbers are those that a row may have."""
    for name in ("width", "height"):
        least = pc.min(columns[name]).as_py() if name in columns else None
        if least is not None and least < 1:
            return False
    return "score" not in columns or bool(np.isfinite(columns["score"].drop_null().to_numpy()).all())


def to_boxes(boxes: np.ndarray) -> pa.Array:
    """(N, 4) float64 as Arrow has it."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(boxes).ravel()), 4)


def _plain_boxes(columns: Mapping[str, pa.Array], bbox_format: str | None) -> tuple[np.ndarray | None, str]:
    """Boxes of a table each of whose rows has one, (N, 4) float64, and their format; None where one has none."""
    if "bbox" in columns:
        check_bbox_format(bbox_format)
        lists = columns["bbox"]
        kind = lists.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not is_list or lists.null_count or not _is_number(kind.value_type):
            return None, ""
        if not pc.all(pc.equal(pc.list_value_length(lists), 4)).as_py():
            return None, ""
        values = _cast(lists.flatten(), pa.float64())
        if values is None or values.null_count:
            return None, ""
        return values.to_numpy().reshape(-1, 4), bbox_format or ""
    for names, its_format in ((_XYXY, "xyxy"), (_XYWH, "xywh")):
        if any(name in columns for name in names):
            sides = [_cast(columns[name], pa.float64()) for name in names if name in columns]
            whole = [side.to_numpy() for side in sides if side is not None and not side.null_count]
            return (np.stack(whole, axis=1) if len(whole) == 4 else None), its_format
    return None, ""


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array | None:
    """Numbers, or text that CSV has for them; None where one is something else."""
    if not (_is_number(column.type) or pa.types.is_string(column.type)):
        return None
    try:
        if pa.types.is_floating(kind):
            return column.cast(pa.float64(), safe=False).cast(kind, safe=False)
        return column.cast(kind)
    except pa.ArrowInvalid:
        return None


def _plain_text(column: pa.Array) -> pa.Array | None:
    if pa.types.is_integer(column.type):
        return column.cast(pa.string())
    if not pa.types.is_string(column.type):
        return None
    plain = pc.fill_null(pc.and_(pc.utf8_is_printable(column), pc.not_equal(column, "")), True)
    return column if pc.all(plain).as_py() else None
