"""Rows: every field described, records to rows and back, bbox and area as pycocotools has them."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import pyarrow as pa
import pytest
from pycocotools import mask as coco_mask

from maskbeam.transforms.generate_masks import label_chunk
from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.labels.schema import (
    ANNOTATIONS,
    CANDIDATES,
    IMAGES,
    RUN_KEY,
    annotation_rows,
    chunk_to_tables,
    image_row,
    report_from_metadata,
    row_to_image,
    row_to_mask,
)
from maskbeam.transforms.masks.amg import AmgConfig
from maskbeam.transforms.masks.automatic import AutomaticLabeler
from maskbeam.transforms.model_health import ModelHealth
from maskbeam.transforms.records import (
    Chunk,
    ChunkReport,
    Dropped,
    EncodedImage,
    Failure,
    LabeledChunk,
    LabeledImage,
    Mask,
    Prompt,
    Seconds,
    Shard,
    Totals,
)
from tests.conftest import photo_bytes
from tests.fakes import FakeSam

SHARD = Shard("s.tar", "/d/s.tar", "tar", ())
SOURCE = EncodedImage("s.tar#7", 7, "key", "a.jpg", b"")
# Fractions that float32 holds exactly.
MASK = Mask((2, 3), "22", (1.0, 0.0, 2.0, 2.0), 4, 0.5, 0.75, Prompt(((1.5, 0.5),)), (0.0, 0.0, 3.0, 2.0))
LABELED = LabeledImage(
    SOURCE,
    100,
    "ab",
    (2, 3),
    6,
    (MASK,),
    10,
    Dropped(0, 1, 2, 3, 0, 0, 0, 1, 2),
    None,
    Seconds(0.5, 1.0, 2.0, 0.25, 0.25),
)
FAILED = LabeledImage(SOURCE, 0, "", None, 1, failure=Failure("read", "gone"))
CHUNK = LabeledChunk.of(SHARD, 3, (LABELED,), True, "d")
REPORT = ChunkReport("s.tar", 3, True, "d", "1 file, 9 bytes", CHUNK.totals())


@pytest.fixture(scope="module")
def labeled() -> LabeledChunk:
    """Three photos labeled by FakeSam, with crops and cleaning on."""
    images = tuple(EncodedImage(f"s.tar#{row}", row, None, None, photo_bytes(row, (50 + row, 40))) for row in range(3))
    config = AmgConfig(
        points_per_side=4, pred_iou_thresh=0.75, stability_score_thresh=0.8, crop_n_layers=1, min_mask_region_area=20
    )
    with ThreadPoolExecutor(2) as threads:
        chunk = Chunk(SHARD, 0, images, True, "d")
        return label_chunk(AutomaticLabeler(FakeSam(), config), chunk, ImageConfig(), threads, ModelHealth())


@pytest.mark.parametrize("schema", [ANNOTATIONS, IMAGES, CANDIDATES], ids=["annotations", "images", "candidates"])
def test_every_field_has_a_description(schema: pa.Schema) -> None:
    assert [field.name for field in schema if not (field.metadata or {}).get(b"description")] == []


def test_every_reason_to_drop_a_mask_has_a_column() -> None:
    assert {f"dropped_{field.name}" for field in fields(Dropped)} <= set(IMAGES.names)


BOX = Prompt((), index=4, box_xywh=(0.5, 0.0, 2.0, 1.5))
POINTS = Prompt(((0.5, 1.0), (2.0, 0.25)), index=0, id="a", point_labels=(1, 0), mask=True, score=0.5)


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        replace(MASK, parent_id=3),
        replace(MASK, counts="6", area=0, bbox_xywh=(0.0, 0.0, 0.0, 0.0)),
        replace(MASK, prompt=BOX, category_id=18, mask_token=0),
        replace(MASK, prompt=POINTS, iscrowd=1, mask_token=3),
    ],
)
def test_a_mask_survives_the_way_to_a_row_and_back(mask: Mask) -> None:
    table = pa.Table.from_pylist(annotation_rows(replace(LABELED, masks=(mask,))), schema=ANNOTATIONS)
    (row,) = table.to_pylist()
    assert row_to_mask(row) == mask
    assert (row["image_id"], row["mask_index"]) == ("s.tar#7", 0)


def test_the_columns_of_a_prompt_are_null_for_a_point_of_the_grid() -> None:
    grid, box, points = annotation_rows(
        replace(LABELED, masks=(MASK, *(replace(MASK, prompt=prompt, mask_token=1) for prompt in (BOX, POINTS))))
    )
    names = ("prompt_index", "prompt_id", "prompt_box", "point_coords", "point_labels", "mask_prompt", "prompt_score")
    assert [grid[name] for name in names] == [None, None, None, [[1.5, 0.5]], None, None, None]
    assert [box[name] for name in names] == [4, None, [0.5, 0.0, 2.0, 1.5], [], [], False, None]
    assert [points[name] for name in names] == [0, "a", None, [[0.5, 1.0], [2.0, 0.25]], [1, 0], True, 0.5]
    assert [row["mask_token"] for row in (grid, box, points)] == [None, 1, 1]
    assert (grid["category_id"], grid["iscrowd"]) == (1, 0)


def test_a_stability_that_is_none_stays_nan() -> None:
    (row,) = annotation_rows(replace(LABELED, masks=(replace(MASK, stability_score=math.nan),)))
    assert math.isnan(row_to_mask(row).stability_score)


def test_masks_of_an_image_are_numbered_in_their_order(labeled: LabeledChunk) -> None:
    for image in labeled.images:
        rows = annotation_rows(image)
        assert [row["mask_index"] for row in rows] == list(range(len(image.masks)))
        assert tuple(map(row_to_mask, rows)) == image.masks


def test_bbox_and_area_are_pycocotools_own_of_the_rle(labeled: LabeledChunk) -> None:
    annotations, _ = chunk_to_tables(labeled, REPORT, Run())
    rows = annotations.to_pylist()
    assert len(rows) > 20
    for row in rows:
        assert row["bbox"] == coco_mask.toBbox(row["segmentation"]).tolist()
        assert row["area"] == coco_mask.area(row["segmentation"]) == coco_mask.decode(row["segmentation"]).sum() > 0


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (
            LABELED,
            {"width": 3, "height": 2, "sha256": "ab", "status": "labeled", "error_stage": None, "error": None}
            | {"num_masks": 1, "num_candidates": 10, "dropped_stability": 2, "exif_orientation": 6, "seconds": 4.0},
        ),
        (replace(LABELED, masks=()), {"status": "empty", "num_masks": 0, "num_candidates": 10}),
        (
            FAILED,
            {"width": None, "height": None, "sha256": None, "status": "failed", "error_stage": "read", "error": "gone"}
            | {"num_masks": 0, "num_candidates": 0, "dropped_stability": 0, "exif_orientation": 1, "seconds": 0.0},
        ),
    ],
    ids=["labeled", "empty", "failed"],
)
def test_the_row_of_an_image_tells_what_became_of_it(image: LabeledImage, expected: dict[str, Any]) -> None:
    row = image_row(image, "/d/s.tar")
    (stored,) = pa.Table.from_pylist([row], schema=IMAGES).to_pylist()
    assert stored == row and set(row) == set(IMAGES.names)
    from_record = {"image_id": "s.tar#7", "row": 7, "key": "key", "file_name": "a.jpg", "shard": "/d/s.tar"}
    assert {name: row[name] for name in {**expected, **from_record}} == {**expected, **from_record}


@pytest.mark.parametrize(
    "image",
    [LABELED, FAILED, replace(LABELED, num_prompts=3, prompts_key="a", dropped=Dropped(prompt=2))],
    ids=["labeled", "failed", "prompted"],
)
def test_an_image_survives_the_way_to_a_row_and_back(image: LabeledImage) -> None:
    (row,) = pa.Table.from_pylist([image_row(image, "/d/s.tar")], schema=IMAGES).to_pylist()
    assert row_to_image(row) == replace(image, num_bytes=0, masks=(), seconds=Seconds())


@pytest.mark.parametrize("totals", [Totals(), REPORT.totals, replace(REPORT.totals, failures=("a: read: b",))])
def test_report_and_run_travel_in_the_metadata_of_both_tables(totals: Totals) -> None:
    report = replace(REPORT, totals=totals)
    annotations, images = chunk_to_tables(CHUNK, report, Run(root="/d"))
    for table, expected in ((images, report), (annotations, replace(report, totals=Totals()))):
        assert report_from_metadata(table.schema.metadata) == expected
        assert Run.from_json(json.loads(table.schema.metadata[RUN_KEY])) == Run(root="/d")


@pytest.mark.parametrize("metadata", [None, {}, {b"pandas": b"{}"}])
def test_a_file_of_somebody_else_has_no_report(metadata: dict[bytes, bytes] | None) -> None:
    with pytest.raises(ValueError, match="not written by maskbeam"):
        report_from_metadata(metadata)
