"""Prompts that lie in the image's own record: TFRecord's object-detection features, WebDataset's JSON, `objects`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from maskbeam.transforms.files.strict_json import parse_json
from maskbeam.transforms.prompt_files.config import PromptFilesError
from maskbeam.transforms.prompt_files.rows import make_batch, parse_records

# Of a WebDataset's sample, beside <key>.jpg.
JSON_SUFFIX = "json"

# The column of Hugging Face's detection datasets.
OBJECTS_COLUMN = "objects"

MAX_JSON_BYTES = 2**24

_SIDES = ("xmin", "ymin", "xmax", "ymax")
_OBJECT = "image/object"


@dataclass(frozen=True)
class RecordPrompts:
    """How prompts in records are read.

    Attributes:
      bbox_format: a config.BboxFormat of what is called bbox; None = not known, then there must be none.
    """

    bbox_format: str | None = None

    def of_example(self, values_of: Callable[[str], Sequence[Any]]) -> pa.RecordBatch:
        """Rows of a tf.train.Example with the features of TensorFlow's object detection API.

        Boxes are fractions of the image's sides, a class is a label from 1, a name, or both.

        Args:
          values_of: the values of a feature; empty if there is none of the name.
        """
        sides = [values_of(f"{_OBJECT}/bbox/{side}") for side in _SIDES]
        labels, names = values_of(f"{_OBJECT}/class/label"), values_of(f"{_OBJECT}/class/text")
        counts = {len(values) for values in (*sides, *(some for some in (labels, names) if len(some)))}
        if len(counts) > 1:
            lengths = ", ".join(f"{name} {len(values)}" for name, values in zip(_SIDES, sides, strict=True))
            return _broken(f"{lengths}, labels {len(labels)}, names {len(names)} values; expected one for each box")
        records = [
            {
                "bbox": [float(side[index]) for side in sides],
                "category_id": labels[index] if len(labels) else None,
                "category": _decoded(names[index]) if len(names) else None,
            }
            for index in range(len(sides[0]))
        ]
        return parse_records(records, "rel_xyxy", "object", image="")

    def of_json(self, data: bytes) -> pa.RecordBatch:
        """Rows of a WebDataset's JSON: a list of objects with the names of a table, alone or as "objects"."""
        if len(data) > MAX_JSON_BYTES:
            return _broken(f"the sample's JSON has more than {MAX_JSON_BYTES} bytes")
        try:
            content = parse_json(data)
        except ValueError as error:
            return _broken(f"the sample's JSON cannot be read: {error}")
        found = content.get(OBJECTS_COLUMN, []) if isinstance(content, dict) else content
        return self.of_objects(found)

    def of_objects(self, value: Any) -> pa.RecordBatch:
        """Rows of a list of objects, or, as Hugging Face's datasets have it, of an object of lists."""
        if value is None:
            return make_batch([])
        if isinstance(value, Mapping):
            value = _to_list(value)
        if not isinstance(value, list):
            return _broken(f"{OBJECTS_COLUMN} is {value!r:.60}; expected a list")
        try:
            return parse_records(value, self.bbox_format, "object", image="")
        except PromptFilesError as error:
            return _broken(str(error))


def _to_list(columns: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """An object of lists as a list of objects; None where the lists differ in length."""
    lists = {name: values for name, values in columns.items() if isinstance(values, list)}
    if len({len(values) for values in lists.values()}) > 1:
        return None
    count = len(next(iter(lists.values()), []))
    return [{name: values[index] for name, values in lists.items()} for index in range(count)]


def _decoded(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _broken(problem: str) -> pa.RecordBatch:
    return make_batch([{"image": "", "problem": problem}])
