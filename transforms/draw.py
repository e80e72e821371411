"""Pictures of labels: masks drawn over a photo, and many such pictures on one sheet."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from maskbeam.transforms.masks import rle
from maskbeam.transforms.records import Mask

_OPACITY = 0.45
_GOLDEN_RATIO = 0.618034  # consecutive multiples of it spread evenly around the colour circle


def mask_color(index: int) -> np.ndarray:
    """The colour of an image's mask `index`: (3,) uint8, the same wherever it is drawn, neighbours far apart."""
    hue = (index * _GOLDEN_RATIO) % 1.0
    return (255 * np.array(colorsys.hsv_to_rgb(hue, 0.75, 1.0))).astype(np.uint8)


def draw_masks(pixels: np.ndarray, masks: Sequence[Mask]) -> np.ndarray:
    """Draws masks over a photo, large ones first so that small ones stay visible, each with an outline.

    Where masks overlap, the smallest one's colour lies over the photo, as in the pictures of SAM's own notebooks.

    Args:
      pixels: (H, W, 3) uint8, the photo at any scale; where it is not the masks', their nearest pixels are taken.
      masks: of this image; mask_color(i) is the colour of masks[i].

    Returns:
      (H, W, 3) uint8.
    """
    canvas = pixels.astype(np.float32)
    for index in sorted(range(len(masks)), key=lambda i: -masks[i].area):
        mask = _scale_mask(rle.counts_to_mask(masks[index].counts, masks[index].size_hw), pixels.shape[:2])
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            continue
        window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        mask, drawn, color = mask[window], canvas[window], mask_color(index).astype(np.float32)
        # Of the photo, not of what is drawn: under several masks it would fade away.
        drawn[mask] = (1 - _OPACITY) * pixels[window][mask] + _OPACITY * color
        drawn[_outline(mask)] = color
    return canvas.astype(np.uint8)


def _scale_mask(mask: np.ndarray, size_hw: tuple[int, ...]) -> np.ndarray:
    """The mask at another size, (h, w) bool: of each pixel's centre the pixel of the mask it lies in."""
    if mask.shape == size_hw:
        return mask
    rows, columns = (((np.arange(n) + 0.5) * full / n).astype(int) for n, full in zip(size_hw, mask.shape, strict=True))
    return mask[:, columns][rows]  # in two steps: decoded masks are column by column in memory


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask with a 4-neighbour outside it, (H, W) bool."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def contact_sheet(pictures: Sequence[np.ndarray], columns: int, height: int) -> np.ndarray:
    """Puts pictures beside each other in rows, each scaled to the given height.

    Args:
      pictures: (H, W, 3) uint8 each, any sizes.
      height: of a row, in pixels.

    Returns:
      (H, W, 3) uint8, white where there is no picture.
    """
    scaled = [
        Image.fromarray(picture).resize(
            (max(round(picture.shape[1] * height / picture.shape[0]), 1), height), Image.Resampling.LANCZOS
        )
        for picture in pictures
    ]
    rows = [scaled[first : first + columns] for first in range(0, len(scaled), columns)]
    width = max(sum(picture.width for picture in row) for row in rows)
    sheet = Image.new("RGB", (width, height * len(rows)), "white")
    for y, row in enumerate(rows):
        x = 0
        for picture in row:
            sheet.paste(picture, (x, y * height))
            x += picture.width
    return np.asarray(sheet)
