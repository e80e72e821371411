from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskbeam.transforms.masks.boxes import greedy_nms, keep_off_crop_edge, nms

Box = tuple[int, int, int, int]


def slow_iou(a: Box, b: Box) -> float:
    """As torchvision computes it, in float32."""
    area_a, area_b = (np.float32((box[2] - box[0]) * (box[3] - box[1])) for box in (a, b))
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    intersection = np.float32(width * height)
    union = area_a + area_b - intersection
    return float(intersection / union) if union else float("nan")


def slow_nms(boxes: list[Box], scores: list[float], iou_threshold: float) -> list[int]:
    keep: list[int] = []
    for candidate in sorted(range(len(boxes)), key=lambda i: -scores[i]):  # stable: ties in input order
        if not any(slow_iou(boxes[kept], boxes[candidate]) > iou_threshold for kept in keep):
            keep.append(candidate)
    return keep


def run_nms(boxes: list[Box], scores: list[float], iou_threshold: float) -> list[int]:
    return nms(np.array(boxes, np.int64).reshape(-1, 4), np.array(scores, np.float32), iou_threshold).tolist()


def sorted_box(x0: int, x1: int, y0: int, y1: int) -> Box:
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


coordinate = st.integers(0, 10)  # few values, so that boxes of zero area and equal boxes come up
box = st.builds(sorted_box, coordinate, coordinate, coordinate, coordinate)
scored_box = st.tuples(box, st.sampled_from([0.25, 0.5, 0.75]))


@settings(deadline=None)
@given(scored_boxes=st.lists(scored_box, max_size=15), iou_threshold=st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.7, 1.0]))
def test_nms_agrees_with_a_slow_one(scored_boxes: list[tuple[Box, float]], iou_threshold: float) -> None:
    boxes, scores = [box for box, _ in scored_boxes], [score for _, score in scored_boxes]
    assert run_nms(boxes, scores, iou_threshold) == slow_nms(boxes, scores, iou_threshold)


@pytest.mark.parametrize(
    ("boxes", "scores", "iou_threshold", "expected"),
    [
        ([], [], 0.7, []),
        ([(0, 0, 9, 9)], [0.1], 0.0, [0]),
        # Ties: the first stays.
        ([(0, 0, 9, 9), (0, 0, 9, 9), (0, 0, 9, 9)], [0.5, 0.5, 0.5], 0.7, [0]),
        # IoU 0.5, equal to the threshold: both stay.
        ([(0, 0, 10, 10), (0, 0, 10, 5)], [0.9, 0.8], 0.5, [0, 1]),
        # IoU 0.7 is 0.69999999 in float32, 0.6 is 0.60000002: compared with the threshold in double.
        ([(0, 0, 10, 10), (0, 0, 10, 7)], [0.9, 0.8], 0.7, [0, 1]),
        ([(0, 0, 10, 10), (0, 0, 10, 6)], [0.9, 0.8], 0.6, [0]),
        # A suppressed box suppresses nothing: 1 goes because of 0, so that 2 stays.
        ([(0, 0, 10, 10), (2, 0, 12, 10), (4, 0, 14, 10)], [0.9, 0.8, 0.7], 0.5, [0, 2]),
        # Two equal boxes of zero area, one pixel wide: IoU is 0 / 0.
        ([(3, 0, 3, 9), (3, 0, 3, 9)], [0.9, 0.8], 0.0, [0, 1]),
        # Inclusive pixel indices: neighbours share no area.
        ([(0, 0, 4, 4), (4, 0, 8, 4)], [0.9, 0.8], 0.0, [0, 1]),
    ],
)
def test_nms_cases(boxes: list[Box], scores: list[float], iou_threshold: float, expected: list[int]) -> None:
    assert run_nms(boxes, scores, iou_threshold) == expected


def test_many_ties_stay_in_input_order() -> None:
    """More than an unstable sort leaves in order by chance."""
    boxes = [(10 * i, 0, 10 * i + 5, 5) for i in range(100)]
    assert run_nms(boxes, [i % 2 for i in range(100)], 0.7) == [*range(1, 100, 2), *range(0, 100, 2)]


@pytest.mark.filterwarnings("error")
def test_boxes_of_zero_area_raise_no_warnings() -> None:
    assert run_nms([(3, 0, 3, 9)] * 2, [0.9, 0.8], 0.7) == [0, 1]


def test_greedy_nms_asks_only_about_what_is_left() -> None:
    asked: list[tuple[int, list[int]]] = []

    def overlap(one: int, rest: np.ndarray) -> np.ndarray:
        asked.append((one, rest.tolist()))
        return (rest % 2 == one % 2).astype(float)  # even and odd numbers are duplicates

    assert greedy_nms(np.array([0.1, 0.4, 0.3, 0.2]), overlap, 0.5).tolist() == [1, 2]
    assert [(one, rest) for one, rest in asked if rest] == [(1, [2, 3, 0]), (2, [0])]


IMAGE_HW = (400, 600)
INNER_CROP = (100, 50, 400, 250)  # 300 x 200, no edge near one of the image


@pytest.mark.parametrize(
    ("crop_xyxy", "box_xyxy", "keep"),
    [
        (INNER_CROP, (100, 80, 200, 120), True),
        (INNER_CROP, (21, 21, 279, 179), True),
        (INNER_CROP, (20, 21, 279, 179), False),  # exactly 20 pixels from the left edge
        (INNER_CROP, (21, 20, 279, 179), False),
        (INNER_CROP, (21, 21, 280, 179), False),
        (INNER_CROP, (21, 21, 279, 180), False),
        (INNER_CROP, (0, 0, 0, 0), False),  # an empty mask
        ((0, 0, 600, 400), (0, 0, 599, 399), True),  # the crop is the image
        ((0, 0, 300, 200), (0, 0, 279, 179), True),  # left and top are the image's own edges
        ((0, 0, 300, 200), (0, 0, 280, 179), False),
        ((300, 200, 600, 400), (21, 21, 299, 199), True),  # right and bottom are
        ((300, 200, 600, 400), (20, 21, 299, 199), False),
        # The crop ends 15 pixels before the image: a box is excused within 20 pixels of the image's edge.
        ((300, 50, 585, 250), (100, 80, 280, 120), True),  # ends at 580
        ((300, 50, 585, 250), (100, 80, 279, 120), False),  # ends at 579, 6 from the crop's edge, 21 from the image's
        # It starts 15 pixels after the image does.
        ((15, 50, 300, 250), (5, 80, 100, 120), True),
        ((15, 50, 300, 250), (6, 80, 100, 120), False),
    ],
)
def test_keep_off_crop_edge(crop_xyxy: Box, box_xyxy: Box, keep: bool) -> None:
    assert keep_off_crop_edge(np.array([box_xyxy]), crop_xyxy, IMAGE_HW).tolist() == [keep]


def test_keep_off_crop_edge_decides_box_by_box() -> None:
    boxes = np.array([(100, 80, 200, 120), (0, 80, 200, 120), (100, 80, 200, 121)])
    assert keep_off_crop_edge(boxes, INNER_CROP, IMAGE_HW).tolist() == [True, False, True]


def test_keep_off_crop_edge_without_boxes() -> None:
    assert keep_off_crop_edge(np.zeros((0, 4), np.int64), INNER_CROP, IMAGE_HW).shape == (0,)
