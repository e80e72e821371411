"""DEDUPE: boxes of masks, their IoU, and greedy non-maximum suppression.

Boxes here are XYXY of inclusive pixel indices, as in the reference: a mask one pixel wide has a box of zero area.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Pixels within which a box counts as touching an edge (segment_anything/utils/amg.py, commit dca509f).
EDGE_TOLERANCE = 20


def keep_off_crop_edge(
    boxes_xyxy: np.ndarray, crop_xyxy: tuple[int, int, int, int], size_hw: tuple[int, int]
) -> np.ndarray:
    """Which boxes do not touch an inner edge of their crop, where an object is likely cut in two.

    Ported from segment_anything/utils/amg.py (is_box_near_crop_edge), commit dca509f; here True = KEPT.

    Args:
      boxes_xyxy: (N, 4) in pixels of the crop.
      crop_xyxy: the crop in pixels of the image.
      size_hw: (H, W) of the image.

    Returns:
      (N,) bool.
    """
    x0, y0, _, _ = crop_xyxy
    boxes = boxes_xyxy.astype(np.float32) + np.array([x0, y0, x0, y0], np.float32)
    near_crop_edge = np.abs(boxes - np.array(crop_xyxy, np.float32)) <= EDGE_TOLERANCE
    near_image_edge = np.abs(boxes - np.array([0, 0, size_hw[1], size_hw[0]], np.float32)) <= EDGE_TOLERANCE
    return np.logical_not(np.any(near_crop_edge & ~near_image_edge, axis=1))


def nms(boxes_xyxy: np.ndarray, scores: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Greedy NMS with torchvision's rules: float32 boxes, ties in input order, suppressed only if IoU > threshold.

    Two boxes of zero area have IoU NaN, which suppresses nothing.

    Args:
      boxes_xyxy: (N, 4).
      scores: (N,); higher is kept first.
      iou_threshold: [0, 1].

    Returns:
      (K,) int indices of the kept boxes, best first.

    >>> nms(np.array([[0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 29, 29]]), np.array([0.8, 0.9, 0.7]), 0.7).tolist()
    [1, 2]
    """
    boxes = boxes_xyxy.astype(np.float32)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])

    def overlap(one: int, rest: np.ndarray) -> np.ndarray:
        box, others = boxes[one], boxes[rest]
        corners_0 = np.maximum(box[:2], others[:, :2])
        corners_1 = np.minimum(box[2:], others[:, 2:])
        sides = np.maximum(corners_1 - corners_0, np.float32(0))
        intersection = sides[:, 0] * sides[:, 1]
        with np.errstate(invalid="ignore", divide="ignore"):
            return intersection / (areas[one] + areas[rest] - intersection)

    return greedy_nms(scores, overlap, iou_threshold)


def greedy_nms(
    scores: np.ndarray, overlap: Callable[[int, np.ndarray], np.ndarray], iou_threshold: float
) -> np.ndarray:
    """Keep the best, drop what overlaps it, repeat; `overlap(one, rest)` gives the IoU of one with each of the rest.

    One vectorised comparison for each kept element, so the time is O(kept x N), not N**2 in Python.
    """
    order = np.argsort(-scores, kind="stable")
    keep = []
    while order.size:
        one, rest = int(order[0]), order[1:]
        keep.append(one)
        # Compared in double, as torchvision's kernel does: IoU is float32, the threshold is not.
        order = rest[~(overlap(one, rest).astype(np.float64) > iou_threshold)]
    return np.array(keep, np.int64)
