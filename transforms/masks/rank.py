"""RANK: the order of an image's masks for those who want only the first few: the likeliest objects first.

The masks' own order is that of the reference's generator, which says little: after crops it goes by the crop's size.
Masks are ranked by the product of predicted IoU and stability score. The SAM paper (arXiv:2304.02643, zero-shot object
proposals) takes the mean of the two, which is nearly the same order for a model whose scores are near 1. The product
needs no such model, as it does not depend on the scale of either score. benchmarks/ranking.py compares it with others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rank_masks(predicted_iou: Sequence[float], stability_score: Sequence[float], areas: Sequence[int]) -> np.ndarray:
    """Ranks the masks of one image.

    Both scores are rounded to float32 first, as they are stored, so a row has the same rank before and after.

    Args:
      predicted_iou: (N,); a mask of NaN, an imported one that has no score, comes last.
      stability_score: (N,); NaN of a mask with pixels, an imported one, is not known and counts as 1, so that results
        rank by their score. An empty mask of NaN comes last.
      areas: (N,) pixels.

    Returns:
      (N,) int32, a permutation: 0 is the first. Equal products keep their order.

    >>> rank_masks([0.9, 0.8, 0.8], [0.8, 1.0, 1.0], [5, 5, 5]).tolist()
    [2, 0, 1]
    """
    stability = np.asarray(stability_score, np.float32)
    stability = np.where(np.isnan(stability) & (np.asarray(areas) > 0), np.float32(1), stability)
    product = np.asarray(predicted_iou, np.float32).astype(float) * stability
    order = np.argsort(-np.where(np.isnan(product), -np.inf, product), kind="stable")
    ranks = np.empty(len(order), np.int32)
    ranks[order] = np.arange(len(order))
    return ranks
