"""Records of a user's as rows of prompts: every column by example, and every way in which one can be wrong."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskbeam.transforms.prompt_files.config import PromptConfig, PromptFilesError
from maskbeam.transforms.prompt_files.rows import parse_columns, parse_records, to_xyxy


def parse(record: Any, bbox_format: str | None = None) -> dict[str, Any]:
    """The one row of a record, without what it does not have."""
    (row,) = parse_records([record], bbox_format, "row").to_pylist()
    return {name: value for name, value in row.items() if value is not None}


@pytest.mark.parametrize(
    ("columns", "bbox_format"),
    [
        ({"xmin": 10, "ymin": 20, "xmax": 40, "ymax": 80}, None),
        ({"x": 10.0, "y": 20.0, "w": 30.0, "h": 60.0}, None),
        ({"bbox": [10, 20, 40, 80]}, "xyxy"),
        ({"bbox": [10, 20, 30, 60]}, "xywh"),
        ({"bbox": [25, 50, 30, 60]}, "cxcywh"),
        ({"bbox": "[25, 50, 30, 60]"}, "cxcywh"),  # as CSV has it
        ({"xmin": "10", "ymin": "20", "xmax": " 40", "ymax": "8e1"}, None),
    ],
)
def test_a_box_in_every_format(columns: dict[str, Any], bbox_format: str | None) -> None:
    assert parse({"image": "a.jpg", **columns}, bbox_format) == {"image": "a.jpg", "bbox": [10.0, 20.0, 40.0, 80.0]}


def test_a_box_that_is_relative_says_so() -> None:
    row = parse({"image": "a.jpg", "bbox": [0.5, 0.5, 0.5, 1.0]}, "rel_cxcywh")
    assert row == {"image": "a.jpg", "bbox": [0.25, 0.0, 0.75, 1.0], "relative": True}


def test_the_far_corner_is_the_sum_in_double_precision() -> None:
    box = np.array([[473.07, 395.93, 38.65, 28.67]])
    assert to_xyxy(box, "xywh").tolist() == [[473.07, 395.93, 473.07 + 38.65, 395.93 + 28.67]]


def test_all_columns() -> None:
    record = {
        "image": "a.jpg",
        "points": [[1, 2], [3.5, 4]],
        "point_labels": [1, 0],
        "segmentation": {"size": [4, 4], "counts": "07"},
        "category": "cat",
        "category_id": 7,
        "score": 0.5,
        "id": 42,
        "width": 640,
        "height": 480.0,
        "whatever": object(),
    }
    row = parse(record)
    assert json.loads(row.pop("segmentation")) == {"size": [4, 4], "counts": "07"}
    assert row == {
        "image": "a.jpg",
        "points": [1.0, 2.0, 3.5, 4.0],
        "point_labels": [1, 0],
        "category": "cat",
        "category_id": 7,
        "score": 0.5,
        "id": "42",
        "width": 640,
        "height": 480,
    }


def test_points_without_labels_are_on_the_object() -> None:
    assert parse({"image": "a", "points": [[1, 2], [3, 4]]})["point_labels"] == [1, 1]


def test_a_category_that_is_a_number_is_an_id() -> None:
    assert parse({"image": "a", "points": [[1, 2]], "category": 3})["category_id"] == 3


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"xmin": float("nan"), "ymin": 0, "xmax": 1, "ymax": 1}, "xmin is nan; expected a finite number"),
        ({"xmin": 0, "ymin": 0, "xmax": float("inf"), "ymax": 1}, "xmax is inf; expected a finite number"),
        ({"xmin": 0, "ymin": 0, "xmax": 1}, "ymax is missing; expected a finite number"),
        ({"x": 0, "y": 0, "w": "wide", "h": 1}, "w is 'wide'; expected a number"),
        ({"bbox": [1, 2, 3]}, "bbox is [1, 2, 3]; expected 4 numbers"),
        ({"bbox": "1 2 3 4"}, "bbox is '1 2 3 4'; expected a JSON list"),
        ({"bbox": 5}, "bbox is 5; expected a list"),
        ({}, "there is no box, no point and no mask"),
        ({"points": [[1, 2, 3]]}, "points is [[1, 2, 3]]; expected a list of [x, y]"),
        ({"points": [[1, 2]], "point_labels": [1, 0]}, "point_labels is [1, 0]; expected 1, one for each point"),
        ({"points": [[1, 2]], "point_labels": [2]}, "point_labels is [2]; expected 1 (on the object) or 0"),
        ({"point_labels": [1], "bbox": [0, 0, 1, 1]}, "point_labels is [1], but there are no points"),
        ({"segmentation": "RLE"}, "segmentation is 'RLE'; expected a JSON list"),
        ({"segmentation": "7"}, "segmentation is 7; expected an RLE with size and counts"),
        ({"bbox": [0, 0, 1, 1], "category_id": 1.5}, "category_id is 1.5; expected a whole number"),
        ({"bbox": [0, 0, 1, 1], "category": ["cat"]}, "category_id is ['cat']; expected a finite number"),
        ({"bbox": [0, 0, 1, 1], "score": "high"}, "score is 'high'; expected a number"),
        ({"bbox": [0, 0, 1, 1], "width": 0}, "width is 0; expected a whole number from 1"),
        ({"bbox": [0, 0, 1, 1], "id": 1.5}, "id is 1.5; expected text or a whole number"),
    ],
)
def test_a_bad_row_stays_a_row_with_its_reason(columns: dict[str, Any], problem: str) -> None:
    row = parse({"image": "a.jpg", **columns}, "xyxy")
    assert row.pop("problem").startswith(f"row 1: {problem}")
    assert row == {"image": "a.jpg"}


def test_a_row_without_an_image_is_of_none() -> None:
    assert parse({"bbox": [0, 0, 1, 1]}, "xyxy") == {
        "problem": "row 1: image is missing; expected the name of an image"
    }
    assert parse(7)["problem"] == "row 1: it is 7; expected an object with names and values"


def test_a_bare_bbox_is_never_guessed() -> None:
    with pytest.raises(PromptFilesError, match="--prompts_bbox xyxy, xywh"):
        parse({"image": "a.jpg", "bbox": [0, 0, 1, 1]})


names = st.text(st.characters(codec="utf-8", categories=("L", "N")), max_size=3) | st.none()
numbers = st.floats(-1e6, 1e6) | st.integers(-5, 5) | st.floats() | st.none()
whole = st.integers(-3, 2**31) | st.none()


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "image": names,
                **{name: numbers for name in ("xmin", "ymin", "xmax", "ymax")},
                "category": names,
                "category_id": whole,
                "score": numbers,
                "id": whole,
                "width": whole,
            }
        ),
        min_size=1,
        max_size=4,
    ),
    st.sets(st.sampled_from(["category", "category_id", "score", "id", "width"])),
    st.booleans(),
)
def test_columns_become_the_same_rows_as_records(
    records: list[dict[str, Any]], without: set[str], as_text: bool
) -> None:
    records = [{name: value for name, value in record.items() if name not in without} for record in records]
    columns = {}
    for name in records[0]:
        values = [record[name] for record in records]
        if name in ("xmin", "ymin", "xmax", "ymax", "score"):
            values = [None if value is None else float(value) for value in values]
        if as_text:
            values = [None if value is None else str(value) for value in values]
        columns[name] = values
    table = pa.RecordBatch.from_pydict(columns)
    assert same(parse_columns(table, None, "row", 1), parse_records(table.to_pylist(), None, "row"))


def test_a_width_of_nothing_is_refused_in_columns_too() -> None:
    table = pa.RecordBatch.from_pydict({"image": ["a"], "x": [0], "y": [0], "w": [1], "h": [1], "width": [0]})
    (row,) = parse_columns(table, None, "row", 1).to_pylist()
    assert row["problem"] == "row 1: width is 0; expected a whole number from 1"


@given(st.lists(st.lists(st.floats(0, 100), min_size=3, max_size=4), min_size=1, max_size=3))
def test_lists_become_the_same_rows_as_records(boxes: list[list[float]]) -> None:
    table = pa.RecordBatch.from_pydict({"image": ["a"] * len(boxes), "bbox": boxes})
    assert same(parse_columns(table, "xywh", "row", 1), parse_records(table.to_pylist(), "xywh", "row"))


def same(left: pa.RecordBatch, right: pa.RecordBatch) -> bool:
    return repr(left.to_pylist()) == repr(right.to_pylist())


def test_clean_columns_need_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("maskbeam.transforms.prompt_files.rows.parse_records")
    table = pa.RecordBatch.from_pydict(
        {"image": ["a", "b"], "bbox": [[1.0, 2, 3, 4]] * 2, "category": ["x", None], "score": [0.5, None], "id": [7, 8]}
    )
    assert parse_columns(table, "xyxy", "row", 1).column("id").to_pylist() == ["7", "8"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refine_steps": 1}, "refine_steps is for prompts, and there are none. Give --prompts"),
        ({"prompts": ("a.csv",), "prompts_bbox": "yxyx"}, "prompts_bbox is 'yxyx'; expected one of xyxy, xywh"),
        ({"prompts": ("a.csv", "in_record")}, "expected files or in_record, not both"),
        ({"prompts": ("in_record",), "prompts_format": "coco"}, "Leave prompts_format out"),
        ({"prompts": ("a.csv",), "prompts_format": "record"}, "Use --prompts in_record"),
        ({"prompts": ("a.csv",), "box_margin": -0.1}, "expected a fraction"),
        ({"prompts": ("a.csv",), "refine_steps": -1}, "expected 0 or more"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        PromptConfig(**settings)
