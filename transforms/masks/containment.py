"""CONTAIN: masks within masks of one image: which to keep, and whose part each is.

SAM answers a point with a whole, a part and a subpart, so that one object is often labeled at several levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from maskbeam.transforms.masks import rle
from maskbeam.transforms.records import Dropped, Mask

Rule = Literal["all", "whole", "parts"]


@dataclass(frozen=True)
class ContainmentConfig:
    """What to do with masks that lie within others.

    Attributes:
      containment: all keeps them; whole drops masks that lie within a kept one; parts drops masks within which a kept
        one lies.
      containment_thresh: a mask lies within a larger one if at least this fraction of its pixels does.
    """

    containment: Rule = "all"
    containment_thresh: float = 0.9

    def __post_init__(self) -> None:
        if self.containment not in get_args(Rule):
            raise ValueError(f"containment must be one of {', '.join(get_args(Rule))}, got {self.containment}")
        if not 0 < self.containment_thresh <= 1:
            raise ValueError(f"containment_thresh must be a fraction above 0, at most 1, got {self.containment_thresh}")


def find_contained(masks: Sequence[Mask], threshold: float) -> np.ndarray:
    """Which masks lie within which larger ones. Of two masks of the same area the earlier counts as the larger.

    Args:
      masks: (N,) of one image.
      threshold: fraction of the smaller mask's pixels that must lie within the larger one.

    Returns:
      (N, N) bool: [i, j] is True if mask i lies within mask j. Nothing lies within itself, an empty mask nowhere.
    """
    contained = np.zeros((len(masks), len(masks)), bool)
    areas = np.array([mask.area for mask in masks])
    corners = np.array([mask.bbox_xywh for mask in masks]).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    for i, mask in enumerate(masks):
        larger = (areas > mask.area) | ((areas == mask.area) & (np.arange(len(masks)) < i))
        if not mask.area or not larger.any():
            continue
        # No more pixels are common than fit into both boxes, which spares most pairs the look at their pixels.
        sides = np.minimum(corners[i, 2:], corners[:, 2:]) - np.maximum(corners[i, :2], corners[:, :2])
        at_most = np.maximum(sides, 0).prod(axis=1) / mask.area
        others = np.flatnonzero(larger & (at_most >= threshold)).tolist()
        shares = rle.share_within(mask.counts, [masks[j].counts for j in others], mask.size_hw)
        contained[i, others] = shares >= threshold
    return contained


def apply_containment(masks: list[Mask], config: ContainmentConfig) -> tuple[list[Mask], Dropped]:
    """Drops masks by the rule; the order stays.

    Whole objects are preferred from the largest mask down, parts from the smallest up, so that a mask only goes for
    one that stays.
    """
    if config.containment == "all":
        return masks, Dropped()
    contained = find_contained(masks, config.containment_thresh)
    rivals = contained if config.containment == "whole" else contained.T
    from_largest = sorted(range(len(masks)), key=lambda i: (-masks[i].area, i))
    keep = np.zeros(len(masks), bool)
    for i in from_largest if config.containment == "whole" else reversed(from_largest):
        keep[i] = not (rivals[i] & keep).any()
    kept = [masks[i] for i in np.flatnonzero(keep)]
    return kept, Dropped(containment=len(masks) - len(kept))


def with_parents(masks: Sequence[Mask], threshold: float) -> list[Mask]:
    """The masks with their parent_id: the position of the smallest mask that each lies within."""
    contained = find_contained(masks, threshold)
    areas = np.array([mask.area for mask in masks], np.float64)
    parents: list[Mask] = []
    for mask, within in zip(masks, contained, strict=True):
        # Among equal ones the later: it counts as the smaller.
        candidates = np.flatnonzero(within)[::-1]
        parent = int(candidates[np.argmin(areas[candidates])]) if candidates.size else None
        parents.append(replace(mask, parent_id=parent))
    return parents
