"""Masks -> polygons along the edges of their pixels, and how much of the masks they keep.

A part of a mask (4-connected pixels) is one polygon, exactly its outline, so that nothing is lost but the holes:
formats with polygons have no way to say them. The corners of a rectilinear outline, sorted along each row, are pairwise
the ends of its horizontal sides, and sorted along each column those of its vertical sides; taking both in turn goes
around.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maskbeam.transforms.masks import rle


@dataclass(frozen=True)
class Outlines:
    """The outlines of a mask.

    Attributes:
      parts: (N, 2) int64 corners (x, y) in pixels of each part's outer outline, at least 4, in the order of their
        topmost corners; the first is not repeated at the end.
      holes: number of holes, which the parts do not have.
    """

    parts: tuple[np.ndarray, ...]
    holes: int


def mask_to_outlines(mask: np.ndarray) -> Outlines:
    """Outlines of a (H, W) bool mask.

    >>> mask_to_outlines(np.array([[0, 0, 0], [0, 1, 1], [0, 1, 0]], bool)).parts[0].tolist()
    [[1, 1], [3, 1], [3, 2], [2, 2], [2, 3], [1, 3]]
    """
    above_left, above_right, below_left, below_right = _neighbours(mask)
    odd = above_left ^ above_right ^ below_left ^ below_right
    # Where two pixels touch at a corner only, two outlines meet: the corner counts twice.
    falling = above_left & below_right & ~above_right & ~below_left
    rising = above_right & below_left & ~above_left & ~below_right
    y, x = np.nonzero(odd | falling | rising)
    twice = (falling | rising)[y, x]
    y, x = np.repeat(y, 1 + twice), np.repeat(x, 1 + twice)
    # The first of the two is the end of the side to the left, the second of the one to the right. Each outline stays
    # with its own pixel: the first goes on upwards if the two pixels lie like a backslash, downwards if like a slash.
    first = np.r_[True, (np.diff(x) != 0) | (np.diff(y) != 0)][: len(x)]
    downwards = np.where(rising[y, x], first, ~first)
    along = _partners(np.arange(len(x)))
    across = _partners(np.lexsort((downwards, y, x)))
    # At its topmost, leftmost corner an outline has the mask below right, and a hole has not.
    opens = below_right[y, x].tolist()
    rings = _follow(along.tolist(), across.tolist())
    parts = tuple(np.stack([x[ring], y[ring]], 1) for ring in rings if opens[ring[0]])
    return Outlines(parts, len(rings) - len(parts))


def counts_to_outlines(counts: str, size_hw: tuple[int, int]) -> Outlines:
    """Outlines of an RLE; only its bounding box is looked at."""
    _, bbox_xywh = rle.area_and_bbox_xywh(counts, size_hw)
    x, y, w, h = (int(side) for side in bbox_xywh)
    outlines = mask_to_outlines(rle.counts_to_mask(counts, size_hw)[y : y + h, x : x + w])
    return Outlines(tuple(part + [x, y] for part in outlines.parts), outlines.holes)


def _neighbours(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The four pixels around each of the (H + 1, W + 1) corners."""
    padded = np.pad(mask, 1)
    return padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]


def _partners(order: np.ndarray) -> np.ndarray:
    """For each corner the other end of its side, if consecutive pairs in order are the ends of the sides."""
    partners = np.empty_like(order)
    partners[order[0::2]], partners[order[1::2]] = order[1::2], order[0::2]
    return partners


def _follow(along: list[int], across: list[int]) -> list[list[int]]:
    """The rings of corners that one gets to by going along a row and across rows in turn."""
    rings = []
    seen = [False] * len(along)
    for start in range(len(along)):
        ring = []
        corner = start
        while not seen[corner]:
            other = along[corner]
            seen[corner] = seen[other] = True
            ring += [corner, other]
            corner = across[other]
        if ring:
            rings.append(ring)
    return rings


def join_parts(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    """One polygon of several, for formats that have only one: each part is tied to those before it by a line there and
    back between their nearest corners, which encloses nothing.

    Args:
      parts: (N, 2) corners (x, y), at least one part.

    Returns:
      (N, 2) corners; the parts' own and two more for each line.

    >>> square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    >>> join_parts((square, square + [4, 0])).tolist()
    [[0, 0], [1, 0], [4, 0], [5, 0], [5, 1], [4, 1], [4, 0], [1, 0], [1, 1], [0, 1]]
    """
    joined = parts[0]
    for part in parts[1:]:
        i, j = _nearest(joined, part)
        joined = np.concatenate([joined[: i + 1], part[j:], part[: j + 1], joined[i:]])
    return joined


def _nearest(one: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """Indices of the two points that are nearest to each other, with memory for one point's distances at a time."""
    nearest = [((other - point) ** 2).sum(axis=1) for point in one]
    i = int(np.argmin([distances.min() for distances in nearest]))
    return i, int(nearest[i].argmin())


@dataclass
class PolygonLoss:
    """What polygons lose of the masks that were written as such.

    Attributes:
      polygons: masks written as polygons.
      worst: of these the lowest IoU, and where.
      holes, with_holes: holes that polygons fill, and masks that have any.
      several: masks of several parts.
    """

    polygons: int = 0
    sum_iou: float = 0.0
    worst: tuple[float, str] = (1.0, "")
    holes: int = 0
    with_holes: int = 0
    several: int = 0

    def count(self, outlines: Outlines, iou: float, name: str) -> None:
        """Adds a mask.

        Args:
          iou: of the polygons, as pycocotools fills them, with the mask.
          name: of the mask, for people.
        """
        self.polygons += 1
        self.sum_iou += iou
        self.worst = min(self.worst, (iou, name))
        self.holes += outlines.holes
        self.with_holes += outlines.holes > 0
        self.several += len(outlines.parts) > 1

    def __str__(self) -> str:
        if not self.polygons:
            return "no mask became a polygon"
        where = f" ({self.worst[1]})" if self.worst[1] else ""
        return (
            f"{self.polygons} masks as polygons: mean IoU with the mask {self.sum_iou / self.polygons:.4f}, worst "
            f"{self.worst[0]:.4f}{where}; {self.holes} holes of {self.with_holes} masks are filled, {self.several} "
            "masks have several parts"
        )


def polygons_iou(polygons: list[list[float]], counts: str, size_hw: tuple[int, int]) -> float:
    """IoU of polygons [x, y, x, y, ...], as pycocotools fills them, with a mask."""
    return float(rle.iou(rle.polygons_to_counts(polygons, size_hw), [counts], size_hw)[0])
