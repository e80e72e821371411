"""COCO run-length encoding, from column-major runs and back. The only place that imports pycocotools.

COCO counts run lengths down the columns, zeros first: the 2x2 mask with its right column set, columns [0 0] [1 1], has
counts [2, 2]. The compressed form packs the counts into a string (cocodataset/cocoapi, common/maskApi.c).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask


@dataclass(frozen=True)
class Runs:
    """The set pixels of a mask as runs of the column-major image.

    Attributes:
      size_hw: (H, W) of the image.
      starts, ends: (R,) int64 positions x * H + y, ends exclusive, ascending, disjoint and not touching.
    """

    size_hw: tuple[int, int]
    starts: np.ndarray
    ends: np.ndarray

    @property
    def area(self) -> int:
        return int((self.ends - self.starts).sum())


def bits_to_runs(bits: np.ndarray, offset_xy: tuple[int, int], size_hw: tuple[int, int]) -> Runs:
    """Runs of a window of a mask.

    Args:
      bits: (columns, rows) bool, transposed.
      offset_xy: the window's top left corner in the image.
      size_hw: (H, W) of the image.

    >>> bits_to_runs(np.array([[False, True], [True, True]]), (1, 0), (2, 3))
    Runs(size_hw=(2, 3), starts=array([3]), ends=array([6]))
    """
    x0, y0 = offset_xy
    columns, rows = bits.shape
    # Each column is closed by a zero on both sides, so that run starts and ends alternate.
    padded = np.zeros((columns, rows + 2), bool)
    padded[:, 1:-1] = bits
    edges = np.flatnonzero(padded[:, 1:].ravel() ^ padded[:, :-1].ravel())
    positions = (edges // (rows + 1) + x0) * size_hw[0] + edges % (rows + 1) + y0
    return join_runs([Runs(size_hw, positions[0::2], positions[1::2])], size_hw)


def join_runs(parts: list[Runs], size_hw: tuple[int, int]) -> Runs:
    """Concatenates runs of consecutive windows and merges those that touch, as across a column's border."""
    if not parts:
        return Runs(size_hw, np.zeros(0, np.int64), np.zeros(0, np.int64))
    starts = np.concatenate([part.starts for part in parts])
    ends = np.concatenate([part.ends for part in parts])
    apart = starts[1:] != ends[:-1]
    return Runs(size_hw, starts[np.r_[True, apart][: len(starts)]], ends[np.r_[apart, True][: len(ends)]])


def runs_to_counts(runs: Runs) -> str:
    """COCO compressed RLE string.

    >>> runs_to_counts(Runs((2, 2), np.array([2]), np.array([4])))
    '22'
    """
    height, width = runs.size_hw
    bounds = np.empty(2 * len(runs.starts) + 2, np.int64)
    bounds[0], bounds[-1] = 0, height * width
    bounds[1:-1:2], bounds[2:-1:2] = runs.starts, runs.ends
    counts = np.diff(bounds)
    if counts[-1] == 0 and len(counts) > 1:
        counts = counts[:-1]
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)["counts"].decode()


def area_and_bbox_xywh(counts: str, size_hw: tuple[int, int]) -> tuple[int, tuple[float, float, float, float]]:
    """pycocotools' own area and box of an RLE. The box is COCO's: its sides are one more than the reference's."""
    rle = {"size": list(size_hw), "counts": counts}
    x, y, w, h = coco_mask.toBbox(rle).tolist()
    return int(coco_mask.area(rle)), (x, y, w, h)


def union_area(masks: list[str], size_hw: tuple[int, int]) -> int:
    """Pixels that are in at least one of the RLEs."""
    if not masks:
        return 0
    return int(coco_mask.area(coco_mask.merge([{"size": list(size_hw), "counts": counts} for counts in masks])))


def iou(one: str, others: list[str], size_hw: tuple[int, int]) -> np.ndarray:
    """Mask IoU of one RLE with each of the others, (N,) float64; 0 for two empty masks."""
    if not others:
        return np.zeros(0)  # pycocotools returns a list here
    size = list(size_hw)
    rest = [{"size": size, "counts": counts} for counts in others]
    return coco_mask.iou(rest, [{"size": size, "counts": one}], [0]).reshape(-1)


def counts_to_mask(counts: str, size_hw: tuple[int, int]) -> np.ndarray:
    """Decodes an RLE to (H, W) bool."""
    return coco_mask.decode({"size": list(size_hw), "counts": counts}).astype(bool)
