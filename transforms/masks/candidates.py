"""FILTER and encode: from a candidate's low-res logits to its stability, its box and its RLE, on windows only.

Two passes. The first measures every candidate (stability, box) and keeps nothing but its low-res logits; the second
upsamples again, only the candidates that survived, straight to RLE. A full-size float mask never exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maskbeam.transforms.masks.frame import Upsampling
from maskbeam.transforms.masks.rle import Runs, bits_to_runs, join_runs

# Low-res logits this far below a threshold still count when a window is chosen, so that rounding in the upsampling
# cannot put a pixel above the threshold outside the window.
_WINDOW_SLACK = 1e-3


@dataclass(frozen=True)
class Measured:
    """What the filters and NMS need to know of one candidate.

    Attributes:
      stability_score: float32; NaN where no logit exceeds mask_threshold - stability_score_offset.
      box_xyxy: inclusive pixel indices in the crop; (0, 0, 0, 0) for an empty mask.
    """

    stability_score: np.float32
    box_xyxy: tuple[int, int, int, int]


def measure_mask(
    logits: np.ndarray, upsampling: Upsampling, mask_threshold: float, stability_score_offset: float
) -> Measured:
    """Stability score and box of one candidate at the crop's own resolution.

    The stability score is the IoU of the masks cut at mask_threshold +- offset; one contains the other, so it is a
    ratio of areas (calculate_stability_score in segment_anything/utils/amg.py, commit dca509f).

    Args:
      logits: (n_low, n_low) float32.
    """
    inner = outer = 0
    boxes = []
    window = upsampling.window(logits, mask_threshold - stability_score_offset - _WINDOW_SLACK)
    if window is not None:
        for rows, cols in upsampling.strips(*window):
            upsampled = upsampling.apply(logits, rows, cols)
            inner += int(np.count_nonzero(upsampled > mask_threshold + stability_score_offset))
            outer += int(np.count_nonzero(upsampled > mask_threshold - stability_score_offset))
            mask = upsampled > mask_threshold
            xs, ys = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if xs.size:
                boxes.append((cols.start + xs[0], rows.start + ys[0], cols.start + xs[-1], rows.start + ys[-1]))
    with np.errstate(invalid="ignore"):
        stability_score = np.float32(inner) / np.float32(outer)
    if not boxes:
        return Measured(stability_score, (0, 0, 0, 0))
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return Measured(stability_score, (int(min(x0)), int(min(y0)), int(max(x1)), int(max(y1))))


def mask_to_runs(
    logits: np.ndarray,
    upsampling: Upsampling,
    mask_threshold: float,
    offset_xy: tuple[int, int],
    size_hw: tuple[int, int],
) -> Runs:
    """The mask of one candidate as runs in the whole image.

    Args:
      logits: (n_low, n_low) float32.
      offset_xy: the crop's top left corner in the image.
      size_hw: (H, W) of the image.
    """
    window = upsampling.window(logits, mask_threshold - _WINDOW_SLACK)
    parts = []
    if window is not None:
        for rows, cols in upsampling.strips(*window):
            bits = upsampling.apply(logits, rows, cols) > mask_threshold
            parts.append(bits_to_runs(bits, (offset_xy[0] + cols.start, offset_xy[1] + rows.start), size_hw))
    return join_runs(parts, size_hw)
