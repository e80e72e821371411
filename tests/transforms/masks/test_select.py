"""Selection on candidates made by hand. That it gives the reference's masks is tested in test_amg and test_golden."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from maskbeam.transforms.masks.select import (
    Candidates,
    Encoded,
    SelectionConfig,
    keep_best,
    merge_crops,
    select_in_crop,
)
from maskbeam.transforms.records import CropBox, Dropped
from tests.transforms.masks.test_containment import mask_of, square

SIZE_HW = (100, 100)
WHOLE = CropBox((0, 0, 100, 100), 0)
LEFT = CropBox((0, 0, 60, 100), 1)  # its right edge, at 60, is an inner one

# Predicted IoU, stability, box: a duplicate of the first, one that ends at pixel 50, and two that are not good enough.
ROWS = [
    (0.90, 0.96, (0, 0, 20, 20)),
    (0.95, 0.96, (0, 0, 20, 21)),
    (0.89, 0.95, (30, 0, 50, 20)),
    (0.88, 0.99, (60, 60, 70, 70)),
    (0.99, 0.94, (80, 80, 90, 90)),
]


def candidates_in(crop: CropBox, encoded: list[int]) -> Candidates:
    """ROWS; whatever is encoded is noted."""

    def encode(i: int) -> Encoded:
        encoded.append(i)
        return Encoded(square((0, 0, i + 1, i + 1)), np.array(ROWS[i][2]), crop)

    predicted_iou, stability_score, boxes_xyxy = zip(*ROWS, strict=True)
    return Candidates(
        crop,
        np.array(predicted_iou, np.float32),
        np.array(stability_score, np.float32),
        np.array(boxes_xyxy),
        encode,
    )


@pytest.mark.parametrize(
    ("crop", "settings", "kept", "dropped"),
    [
        (WHOLE, {}, [1, 2], Dropped(predicted_iou=1, stability=1, box_nms=1)),
        (WHOLE, {"box_nms_thresh": 1.0}, [1, 0, 2], Dropped(predicted_iou=1, stability=1)),
        (WHOLE, {"stability_score_thresh": 0}, [4, 1, 2], Dropped(predicted_iou=1, box_nms=1)),
        (WHOLE, {"pred_iou_thresh": 0}, [1, 2, 3], Dropped(stability=1, box_nms=1)),
        (LEFT, {}, [1], Dropped(predicted_iou=1, stability=1, crop_edge=1, box_nms=1)),
    ],
)
def test_only_survivors_are_encoded_best_first(
    crop: CropBox, settings: dict[str, Any], kept: list[int], dropped: Dropped
) -> None:
    encoded: list[int] = []
    masks, actual = select_in_crop(candidates_in(crop, encoded), SIZE_HW, SelectionConfig(**settings))
    assert encoded == kept and [mask.mask.area for mask in masks] == [(i + 1) ** 2 for i in kept]
    assert actual == dropped


def test_nms_by_masks_encodes_all_that_are_good() -> None:
    encoded: list[int] = []
    masks, dropped = select_in_crop(candidates_in(WHOLE, encoded), SIZE_HW, SelectionConfig(nms_by="mask"))
    assert encoded == [0, 1, 2]
    assert [mask.mask.area for mask in masks] == [4, 1, 9] and dropped == Dropped(predicted_iou=1, stability=1)


def test_an_image_without_masks() -> None:
    assert merge_crops([[], []], SIZE_HW, SelectionConfig(min_mask_region_area=10)) == ([], Dropped())


@pytest.mark.parametrize(("max_masks", "kept"), [(None, [0, 1, 2]), (3, [0, 1, 2]), (2, [0, 2]), (1, [2])])
def test_the_best_masks_stay_in_their_order(max_masks: int | None, kept: list[int]) -> None:
    masks = [replace(square((0, 0, 5, 5)), predicted_iou=iou) for iou in (0.8, 0.7, 0.9)]
    assert keep_best(masks, max_masks) == ([masks[i] for i in kept], Dropped(max_masks=3 - len(kept)))


def one_mask(pixels: np.ndarray) -> list[list[Encoded]]:
    mask = mask_of(pixels)
    x, y, w, h = mask.bbox_xywh
    size_hw = mask.size_hw
    crop = CropBox((0, 0, size_hw[1], size_hw[0]), 0)
    return [[Encoded(mask, np.array([x, y, x + w - 1, y + h - 1]), crop)]]


@pytest.mark.parametrize(("fraction", "kept"), [(0.5, 1), (0.51, 0)])
def test_fractions_are_of_all_pixels_of_an_image_that_is_no_square(fraction: float, kept: int) -> None:
    pixels = np.zeros((10, 40), bool)
    pixels[:5] = True  # 200 of 400: more than 10 * 10, less than half of 40 * 40
    config = SelectionConfig(min_mask_area_fraction=fraction)
    assert len(merge_crops(one_mask(pixels), (10, 40), config)[0]) == kept
    config = SelectionConfig(max_mask_area_fraction=fraction)
    assert len(merge_crops(one_mask(pixels), (10, 40), config)[0]) == 1 - kept


def test_cleaning_leaves_the_largest_island_and_its_box() -> None:
    """So no mask is emptied, however small it is, and there is always a box."""
    pixels = np.zeros((20, 20), bool)
    pixels[4, 4] = pixels[10, 8:11] = True
    ((cleaned,), _) = merge_crops(one_mask(pixels), (20, 20), SelectionConfig(min_mask_region_area=300))
    assert (cleaned.area, cleaned.bbox_xywh) == (3, (8, 10, 3, 1))
