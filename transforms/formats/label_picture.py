"""Label pictures: one PNG of instance numbers per photo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskbeam.transforms.masks import rle


@dataclass
class Overlap:
    """What is hidden where masks overlap in pictures that have one label a pixel.

    Attributes:
      pixels, hidden_pixels: of all masks, and those that belong to a mask on top.
      hidden_masks: masks of which nothing is left.
    """

    pixels: int = 0
    hidden_pixels: int = 0
    hidden_masks: int = 0


def label_picture(masks: Sequence[Mapping[str, Any]], size_hw: tuple[int, int], overlap: Overlap) -> np.ndarray:
    """(H, W) uint16: 0 = no mask, k = the mask with mask_index k - 1; where masks overlap, the smallest.

    Of masks of one size the one that comes first stays on top.

    Args:
      masks: the image's rows of the annotations table.
      overlap: what is hidden is added to it.

    Raises:
      ValueError: there are more masks than 16 bits can tell apart.
    """
    if any(mask["mask_index"] >= 2**16 - 1 for mask in masks):
        raise ValueError(
            f"{masks[0]['image_id']} has {len(masks)} masks; a picture of 16 bits can tell {2**16 - 1} apart. Export "
            "another format, or label with --max_masks."
        )
    picture = np.zeros(size_hw, np.uint16)
    for mask in sorted(masks, key=lambda mask: (-mask["area"], -mask["mask_index"])):
        picture[rle.counts_to_mask(mask["segmentation"]["counts"], size_hw)] = mask["mask_index"] + 1
    shown = np.bincount(picture.ravel(), minlength=2**16)
    for mask in masks:
        left = int(shown[mask["mask_index"] + 1])
        overlap.pixels += mask["area"]
        overlap.hidden_pixels += mask["area"] - left
        overlap.hidden_masks += mask["area"] > 0 and left == 0
    return picture
