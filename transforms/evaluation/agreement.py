"""How far the masks of one setting agree with those of another: which are the same object, which are lost or new.

"Expected" are the masks to be kept (those of float32), "actual" the ones that are judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maskbeam.transforms.masks import rle
from maskbeam.transforms.records import Mask, Sums

# Two masks are the same object from this mask IoU on. COCO's evaluation calls 0.5 a match and 0.95 its strictest; at
# 0.9 a person has to look twice to tell the outlines apart.
MATCH_IOU = 0.9


@dataclass(frozen=True)
class Agreement(Sums):
    """How far the actual masks are the expected ones, of one image; the sum is that of several images.

    Attributes:
      expected: number of expected masks.
      actual: number of actual masks.
      matched_ious: mask IoU of each pair of masks that are the same object, each at least MATCH_IOU.
      best_ious: of every expected mask, matched or not, its highest mask IoU with any actual mask; 0 if there is none.
      predicted_iou_differences: of each such pair, the absolute difference of their predicted IoU.
    """

    expected: int = 0
    actual: int = 0
    matched_ious: tuple[float, ...] = ()
    best_ious: tuple[float, ...] = ()
    predicted_iou_differences: tuple[float, ...] = ()

    @property
    def matched(self) -> int:
        """Pairs of masks that are the same object."""
        return len(self.matched_ious)

    @property
    def lost(self) -> int:
        """Expected masks without a match."""
        return self.expected - self.matched

    @property
    def new(self) -> int:
        """Actual masks without a match."""
        return self.actual - self.matched

    @property
    def mean_matched_iou(self) -> float | None:
        """Mean mask IoU of the pairs; None without one."""
        return _mean(self.matched_ious)

    @property
    def mean_best_iou(self) -> float | None:
        """Mean over all expected masks, the lost ones with what comes closest to them; None if none is expected."""
        return _mean(self.best_ious)

    @property
    def mean_predicted_iou_difference(self) -> float | None:
        """Mean of the absolute differences of the pairs; None without one."""
        return _mean(self.predicted_iou_differences)


def _mean(values: tuple[float, ...]) -> float | None:
    return float(np.mean(values)) if values else None


def compare_masks(expected: Sequence[Mask], actual: Sequence[Mask]) -> Agreement:
    """Compares two lists of masks of one image.

    Raises:
      ValueError: the masks are of images of several sizes.
    """
    ious = mask_ious(expected, actual)
    pairs = match_masks(ious)
    return Agreement(
        expected=len(expected),
        actual=len(actual),
        matched_ious=tuple(float(ious[i, j]) for i, j in pairs),
        best_ious=tuple(ious.max(axis=1, initial=0.0).tolist()),
        predicted_iou_differences=tuple(abs(expected[i].predicted_iou - actual[j].predicted_iou) for i, j in pairs),
    )


def mask_ious(expected: Sequence[Mask], actual: Sequence[Mask]) -> np.ndarray:
    """Mask IoU of each expected with each actual mask, (len(expected), len(actual)) float64; 1 for two empty masks.

    Raises:
      ValueError: the masks are of images of several sizes.
    """
    sizes_hw = {mask.size_hw for mask in [*expected, *actual]}
    if len(sizes_hw) > 1:
        raise ValueError(
            f"the masks are of images of {len(sizes_hw)} sizes (H, W), {sorted(sizes_hw)}; expected one. Compare the "
            "masks of one image, decoded the same way."
        )
    size_hw = sizes_hw.pop() if sizes_hw else (0, 0)
    ious = rle.ious([mask.counts for mask in expected], [mask.counts for mask in actual], size_hw)
    empty = [np.array([mask.area == 0 for mask in masks], bool) for masks in (expected, actual)]
    ious[np.ix_(*empty)] = 1.0
    return ious


def match_masks(ious: np.ndarray) -> list[tuple[int, int]]:
    """Finds which masks are the same object: each has at most one match.

    Greedy: the pair of the highest IoU is matched first, then the highest of what is left, down to MATCH_IOU.
    Exchanging the two lists gives the same pairs.

    Args:
      ious: (N, M) IoU of N expected with M actual masks.

    Returns:
      (expected, actual) indices, in ascending order.

    >>> match_masks(np.array([[0.95, 0.97], [0.2, 0.99], [0.89, 0.0]]))
    [(0, 0), (1, 1)]
    """
    i, j = np.nonzero(ious >= MATCH_IOU)
    # Ties in an order that does not depend on which list comes first; only pairs (a, b) and (b, a) stay tied, and of
    # those neither takes a mask from the other.
    order = np.lexsort((np.maximum(i, j), np.minimum(i, j), -ious[i, j]))
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for one, other in zip(i[order].tolist(), j[order].tolist(), strict=True):
        if one not in pairs and other not in taken:
            pairs[one] = other
            taken.add(other)
    return sorted(pairs.items())
