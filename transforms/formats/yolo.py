"""YOLO's text files of polygons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskbeam.transforms.formats.coco import mask_name
from maskbeam.transforms.formats.polygons import PolygonLoss, counts_to_outlines, join_parts, polygons_iou

# Digits after the point of coordinates between 0 and 1: a hundredth of a pixel in the largest images.
_YOLO_DIGITS = 6


@dataclass
class YoloLoss:
    """What YOLO's text loses.

    Attributes:
      polygons: what becoming polygons loses.
      crowds, empty: masks that are left out: crowds, which are no objects to learn, and masks without a pixel.
    """

    polygons: PolygonLoss
    crowds: int = 0
    empty: int = 0


def yolo_text(masks: Sequence[dict[str, Any]], classes: Mapping[int, int], loss: YoloLoss) -> str:
    """YOLO-seg text of an image: a line a mask, its class and its outline x y x y ..., fractions of the image's sides.

    A mask is one polygon: several parts are tied together by lines there and back, holes are filled.

    Args:
      masks: its rows of the annotations table.
      classes: category_id -> class, from 0.
      loss: what is lost is added to it.
    """
    lines = []
    for mask in masks:
        if mask["iscrowd"]:
            loss.crowds += 1
            continue
        if not mask["area"]:
            loss.empty += 1
            continue
        counts, size_hw = mask["segmentation"]["counts"], tuple(mask["segmentation"]["size"])
        outlines = counts_to_outlines(counts, size_hw)
        scale_xy = np.array(size_hw[::-1])
        fractions_xy = np.round(join_parts(outlines.parts) / scale_xy, _YOLO_DIGITS)
        loss.polygons.count(
            outlines, polygons_iou([(fractions_xy * scale_xy).ravel().tolist()], counts, size_hw), mask_name(mask)
        )
        numbers = " ".join(f"{value:.{_YOLO_DIGITS}f}" for value in fractions_xy.ravel().tolist())
        lines.append(f"{classes[mask['category_id']]} {numbers}\n")
    return "".join(lines)
