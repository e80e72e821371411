"""Average recall of class-agnostic proposals, and how sure it is.

AR@k is COCO's: the share of the truth's objects that the k first-ranked masks of each image find, averaged over mask
IoU thresholds of .50, .55, ..., .95. It is what the SAM paper (arXiv:2304.02643, zero-shot object proposals) reports at
k = 1000 on LVIS. The figures are those of pycocotools' COCOeval with useCats=0 and maxDets [10, 100, 1000]; tests hold
them to it. The bootstrap needs them image by image, and many times faster than COCOeval's loops, so the matching is
done here; the IoU is pycocotools' own.

Crowd regions are ignored by leaving them out: in COCOeval a proposal takes one only if no object is left for it, so
they never change which objects are found. The same holds for objects of another size than the one in question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# COCOeval's parameters: params.iouThrs, params.maxDets and params.areaRng, whose limits both belong to the range.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
MAX_PROPOSALS = (10, 100, 1000)
AREA_RANGES = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}

RESAMPLES = 2000
CONFIDENCE = 0.95
_RESAMPLED_AT_ONCE = 2**22  # draws of an image; 32 MB


@dataclass(frozen=True)
class ImageRecall:
    """What was found in one image.

    Attributes:
      objects: (A,) int, the truth's objects of each of the A = len(AREA_RANGES) ranges.
      masks: (A, K, T) int, how many of them are found among the first MAX_PROPOSALS[k] masks at IOU_THRESHOLDS[t].
      boxes: (A, K, T) int, likewise by the IoU of the boxes.
      best_ious: (A,) float, sum over the objects of the highest mask IoU with any mask, whatever its rank.
    """

    objects: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    best_ious: np.ndarray


@dataclass(frozen=True)
class Figure:
    """A mean over objects with its bootstrap interval; all None where there is no object."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Recall:
    """The figures of a set of images.

    Attributes:
      objects: the truth's objects in each of AREA_RANGES.
      mask_ar, box_ar: AR for each of AREA_RANGES and MAX_PROPOSALS.
      mean_best_iou: for each of AREA_RANGES, mean over the objects of the highest mask IoU with any mask.
      mask_recall: for each of MAX_PROPOSALS, recall of objects of all sizes at each of IOU_THRESHOLDS.
    """

    objects: dict[str, int]
    mask_ar: dict[str, dict[int, Figure]]
    box_ar: dict[str, dict[int, Figure]]
    mean_best_iou: dict[str, Figure]
    mask_recall: dict[int, list[Figure]]


def image_recall(mask_ious: np.ndarray, box_ious: np.ndarray, areas: np.ndarray) -> ImageRecall:
    """Which objects of an image are found.

    Args:
      mask_ious: (N, G) IoU of the proposals, best-ranked first, with the objects.
      box_ious: (N, G) IoU of their boxes, in the same order.
      areas: (G,) of the objects as the truth states them, in pixels; crowd regions are not among them.
    """
    in_range = np.array([(areas >= low) & (areas <= high) for low, high in AREA_RANGES.values()])
    best = mask_ious.max(axis=0, initial=0.0)
    return ImageRecall(
        objects=in_range.sum(axis=1),
        masks=np.stack([_count_found(mask_ious[:, chosen]) for chosen in in_range]),
        boxes=np.stack([_count_found(box_ious[:, chosen]) for chosen in in_range]),
        best_ious=in_range @ best,
    )


def _count_found(ious: np.ndarray) -> np.ndarray:
    """(K, T) int: objects found among the first MAX_PROPOSALS[k] proposals at each threshold."""
    found_by = match_proposals(ious, IOU_THRESHOLDS)
    return np.stack([(found_by < count).sum(axis=1) for count in MAX_PROPOSALS])


def match_proposals(ious: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Which proposal finds each object: COCOeval's greedy matching.

    The proposals choose in the order of their ranks; each takes the object of the highest IoU that is still free, of
    equal ones the last. So what the first k find does not depend on those that follow.

    Args:
      ious: (N, G) of the proposals, best-ranked first, with the objects.
      thresholds: (T,) IoU from which on a proposal may take an object.

    Returns:
      (T, G) float, the position of the proposal, from 0; infinite where none found the object.

    >>> match_proposals(np.array([[0.6, 0.7], [0.1, 0.9], [0.5, 0.0]]), np.array([0.5, 0.65])).tolist()
    [[2.0, 0.0], [inf, 0.0]]
    """
    found_by = np.full((len(thresholds), ious.shape[1]), np.inf)
    for position in np.flatnonzero((ious >= thresholds.min()).any(axis=1)):
        free = np.isinf(found_by) & (ious[position] >= thresholds[:, None])
        # The last of the highest.
        choice = ious.shape[1] - 1 - np.where(free, ious[position], -1.0)[:, ::-1].argmax(axis=1)
        takes = free.any(axis=1)
        found_by[takes, choice[takes]] = position
    return found_by


def summarize_recall(images: Sequence[ImageRecall], seed: int) -> Recall:
    """The figures of all images together, each object counting the same, with intervals.

    Args:
      images: all of the evaluation, at least one; those without objects or without proposals are among them.
      seed: of the bootstrap.
    """
    objects = np.array([image.objects for image in images])
    found = np.array([[image.masks, image.boxes] for image in images], float)
    best_ious = np.array([image.best_ious for image in images])

    average_recall = bootstrap_means(found.mean(axis=-1), objects[:, None, :, None], seed)
    recall = bootstrap_means(found[:, 0, 0], objects[:, :1, None], seed)
    best_iou = bootstrap_means(best_ious, objects, seed)

    def by_range(kind: int) -> dict[str, dict[int, Figure]]:
        return {
            name: {count: average_recall[kind, a, k] for k, count in enumerate(MAX_PROPOSALS)}
            for a, name in enumerate(AREA_RANGES)
        }

    return Recall(
        objects=dict(zip(AREA_RANGES, objects.sum(axis=0).tolist(), strict=True)),
        mask_ar=by_range(0),
        box_ar=by_range(1),
        mean_best_iou=dict(zip(AREA_RANGES, best_iou.tolist(), strict=True)),
        mask_recall={count: recall[k].tolist() for k, count in enumerate(MAX_PROPOSALS)},
    )


def bootstrap_means(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Means over objects and their percentile bootstrap intervals, resampling whole images.

    Images are what is drawn independently; the objects in one are not. Every figure is computed on the same RESAMPLES
    draws of as many images, with replacement. A draw without any object says nothing and is left out.

    Args:
      sums: (I, ...) of an image's objects, at least one image.
      counts: (I, ...) objects, broadcast against sums.
      seed: of the draws.

    Returns:
      (...) of Figure, of the confidence CONFIDENCE.
    """
    num_images, shape = len(sums), sums.shape[1:]
    flat_sums = sums.reshape(num_images, -1)
    flat_counts = np.broadcast_to(counts, sums.shape).reshape(num_images, -1).astype(float)
    values = _divide(flat_sums.sum(axis=0), flat_counts.sum(axis=0))

    random = np.random.default_rng(seed)
    resampled = []
    at_once = max(_RESAMPLED_AT_ONCE // num_images, 1)
    for first in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - first)
        times = random.multinomial(num_images, np.full(num_images, 1 / num_images), size).astype(float)
        resampled.append(_divide(times @ flat_sums, times @ flat_counts))
    draws = np.concatenate(resampled)
    tail = (1 - CONFIDENCE) / 2
    figures = np.full(len(values), Figure(None, None, None), object)
    for i in np.flatnonzero(~np.isnan(values)):
        low, high = np.nanquantile(draws[:, i], [tail, 1 - tail])
        figures[i] = Figure(float(values[i]), float(low), float(high))
    return figures.reshape(shape)


def _divide(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to count."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts > 0, sums / counts, np.nan)
