"""Crop boxes of an image, layer by layer.

Ported from facebookresearch/segment-anything, segment_anything/utils/amg.py, commit dca509f.
"""

from __future__ import annotations

import math
from itertools import product

from maskbeam.transforms.records import CropBox


def generate_crop_boxes(size_hw: tuple[int, int], n_layers: int, overlap_ratio: float) -> list[CropBox]:
    """The full image, then each layer's boxes, x outer and y inner.

    Args:
      size_hw: (H, W) of the image in pixels.
      n_layers: layers beside the full image. Each costs 4**layer more passes through the image encoder.
      overlap_ratio: overlap of neighbours as a fraction of the image's short side, halved with each layer.

    >>> [crop.xyxy for crop in generate_crop_boxes((60, 80), 1, 0.0)]
    [(0, 0, 80, 60), (0, 0, 40, 30), (0, 30, 40, 60), (40, 0, 80, 30), (40, 30, 80, 60)]
    """
    height, width = size_hw
    boxes = [CropBox((0, 0, width, height), 0)]
    for layer in range(1, n_layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(size_hw) * (2 / per_side))
        crop_w = math.ceil((overlap * (per_side - 1) + width) / per_side)
        crop_h = math.ceil((overlap * (per_side - 1) + height) / per_side)
        for i, j in product(range(per_side), repeat=2):
            x0, y0 = int((crop_w - overlap) * i), int((crop_h - overlap) * j)
            x1, y1 = min(x0 + crop_w, width), min(y0 + crop_h, height)
            if x0 < x1 and y0 < y1:  # an image of a few pixels has empty crops, on which the reference fails
                boxes.append(CropBox((x0, y0, x1, y1), layer))
    return boxes
