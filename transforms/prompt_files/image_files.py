"""Prompts with a small file for each image: YOLO's text and Pascal VOC's XML. They are in the image's own folders."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any

# A file of one image.
MAX_BYTES = 2**24


def read_yolo(text: str) -> Iterator[dict[str, Any]]:
    """Rows of a YOLO text file, without their image.

    A line is a class and a box, `0 cx cy w h`, perhaps with a confidence, or a class and an outline, `0 x y x y x y`;
    all numbers but the class are fractions of the image's sides. A box has an even count of numbers more only by its
    confidence: five or six values are a box, an odd count from seven is an outline.

    >>> list(read_yolo("3 0.5 0.5 0.25 0.5"))
    [{'id': '0', 'relative': True, 'category_id': 3, 'bbox': [0.375, 0.25, 0.625, 0.75]}]
    """
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            row: dict[str, Any] = {"id": str(number - 1), "relative": True}
            try:
                yield {**row, **_yolo_line(line.split())}
            except ValueError as error:
                yield {**row, "problem": f"line {number}: {error}"}


def _yolo_line(values: list[str]) -> dict[str, Any]:
    try:
        class_index, numbers = int(values[0]), [float(value) for value in values[1:]]
    except ValueError:
        raise ValueError(f"it is {' '.join(values)!r:.60}; expected a class, a whole number, and numbers") from None
    if not 0 <= class_index < 2**31 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"it is {' '.join(values)!r:.60}; expected a class from 0 and finite numbers")
    row: dict[str, Any] = {"category_id": class_index}
    if len(numbers) in (4, 5):
        x, y, width, height = numbers[:4]
        row["bbox"] = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        if len(numbers) == 5:
            row["score"] = numbers[4]
        return row
    if len(numbers) >= 6 and len(numbers) % 2 == 0:
        return {**row, "segmentation": json.dumps([numbers])}
    raise ValueError(f"it has {len(values)} values; expected 5 or 6 for a box, or 7, 9, 11, ... for an outline")


def read_voc(data: bytes) -> Iterator[dict[str, Any]]:
    """Rows of a Pascal VOC annotation file, without their image.

    VOC counts pixels from 1 and includes the last: xmin 1, xmax 1 is the first pixel, from 0 to 1 here.

    Raises:
      ValueError: it is none.
    """
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise ValueError("it has a document type of its own, which VOC's files do not need. Take it out")
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ValueError(f"it is no XML: {error}") from error
    if root.tag != "annotation":
        raise ValueError(f"its XML is <{root.tag}>; expected VOC's <annotation>")
    size: dict[str, Any] = {}
    if root.find("size") is not None:
        width, height = (_tag(root, f"size/{name}") for name in ("width", "height"))
        if width >= 1 and height >= 1:  # some tools write 0 for what they do not know
            size = {"width": int(width), "height": int(height)}
    for number, found in enumerate(root.iter("object")):
        row: dict[str, Any] = {"id": str(number), **size}
        try:
            name = (found.findtext("name") or "").strip()
            if not name:
                raise ValueError("it has no name")
            xmin, ymin, xmax, ymax = (_tag(found, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
            yield {**row, "category": name, "bbox": [xmin - 1, ymin - 1, xmax, ymax]}
        except ValueError as error:
            yield {**row, "problem": f"object {number + 1}: {error}"}


def _tag(element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    try:
        value = float(text or "")
    except ValueError:
        raise ValueError(f"its {path} is {text!r:.60}; expected a number") from None
    if not abs(value) < 2**31:
        raise ValueError(f"its {path} is {text!r:.60}; expected pixels")
    return value
