"""Distributions over all labels, added up chunk by chunk: nothing here grows with the number of images."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from maskbeam.transforms.masks import rle
from maskbeam.transforms.records import Dropped

# Bins of scores; of the part of an image that is under masks; of the areas, ten to the power of this.
SCORE_STEP = 0.01
COVERAGE_STEP = 0.05
AREA_STEP = 0.25

# Whole numbers get a bin each, or steps of 2, 5, 10, ... so that there are at most so many.
MAX_BINS = 40


@dataclass
class Histogram:
    """Counts of values in bins of one width, and what a sentence about them needs.

    Attributes:
      step: width of a bin; bin b holds values in [b * step, (b + 1) * step).
      counts: of the bins that are not empty.
      low, high: the least and the greatest value; inf and -inf where there is none.
      total: sum of the values.
      not_numbers: how many values were NaN; they are in no bin.
    """

    step: float
    counts: Counter[int] = field(default_factory=Counter)
    low: float = math.inf
    high: float = -math.inf
    total: float = 0.0
    not_numbers: int = 0

    def add(self, values: np.ndarray | Sequence[float]) -> None:
        """Counts values, (N,) numbers."""
        numbers = np.asarray(values, np.float64)
        finite = numbers[np.isfinite(numbers)]
        self.not_numbers += len(numbers) - len(finite)
        if not len(finite):
            return
        # float32 0.95 is a little less than 0.95: it belongs to the bin that begins there.
        bins, counts = np.unique(np.floor(finite / self.step + 1e-4).astype(int), return_counts=True)
        self.counts.update(dict(zip(bins.tolist(), counts.tolist(), strict=True)))
        self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
        self.total += float(finite.sum())

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any] | None:
        """For JSON: the bins from the first to the last that is not empty; None if there is no value.

        `median` is as exact as the bins are: of each value only the start of its bin is known.
        """
        if not self.counts:
            return None
        factor = _bin_factor(max(self.counts) - min(self.counts) + 1) if self.step == 1 else 1
        counts: Counter[int] = Counter()
        for number, count in self.counts.items():
            counts[number // factor] += count
        first, last = min(counts), max(counts)
        step = self.step * factor
        return {
            "start": first * step,
            "step": step,
            "counts": [counts[number] for number in range(first, last + 1)],
            "count": self.count,
            "low": self.low,
            "high": self.high,
            "mean": self.total / self.count,
            "median": (self._bin_of((self.count - 1) // 2) + self._bin_of(self.count // 2)) / 2 * self.step,
            "not_numbers": self.not_numbers,
        }

    def _bin_of(self, position: int) -> int:
        """The bin of the value at a position among all values in ascending order."""
        numbers = sorted(self.counts)
        above = itertools.accumulate(self.counts[number] for number in numbers)
        return next(number for number, end in zip(numbers, above, strict=True) if position < end)


def _bin_factor(bins: int) -> int:
    """How many bins to join so that at most MAX_BINS are left: 1, 2, 5, 10, 20, 50, ..."""
    factor = 1
    while math.ceil(bins / factor) > MAX_BINS:
        factor = factor * 5 // 2 if str(factor).startswith("2") else factor * 2
    return factor


@dataclass
class Statistics:
    """What all images of a run come to.

    Attributes:
      statuses: images by status.
      masks, candidates: masks kept, and masks the model proposed.
      dropped: candidates by the filter that removed them.
      masks_per_image: of the images that did not fail.
      area_share: log10 of a mask's area as a part of its image.
      predicted_iou, stability_score: of the masks.
      coverage: the part of an image that is under at least one mask, of the images that did not fail.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    masks: int = 0
    candidates: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    masks_per_image: Histogram = field(default_factory=lambda: Histogram(1))
    area_share: Histogram = field(default_factory=lambda: Histogram(AREA_STEP))
    predicted_iou: Histogram = field(default_factory=lambda: Histogram(SCORE_STEP))
    stability_score: Histogram = field(default_factory=lambda: Histogram(SCORE_STEP))
    coverage: Histogram = field(default_factory=lambda: Histogram(COVERAGE_STEP))

    def add_image(self, image: Mapping[str, Any], masks: Sequence[Mapping[str, Any]]) -> None:
        """Adds an image.

        Args:
          image: its row of the images table.
          masks: its rows of the annotations table.
        """
        self.statuses[image["status"]] += 1
        self.candidates += image["num_candidates"]
        for name in (f.name for f in fields(Dropped)):
            self.dropped[name] += image.get(f"dropped_{name}") or 0  # labels of earlier versions lack later filters
        if image["status"] == "failed":
            return
        self.masks += len(masks)
        self.masks_per_image.add([len(masks)])
        self.predicted_iou.add([mask["predicted_iou"] for mask in masks])
        self.stability_score.add([mask["stability_score"] for mask in masks])
        pixels = image["height"] * image["width"]
        areas = np.array([mask["area"] for mask in masks if mask["area"] > 0], np.float64)
        self.area_share.add(np.log10(areas / pixels))
        counts = [mask["segmentation"]["counts"] for mask in masks]
        self.coverage.add([rle.union_area(counts, (image["height"], image["width"])) / pixels])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "statuses": dict(self.statuses),
            "masks": self.masks,
            "candidates": self.candidates,
            "dropped": dict(self.dropped),
            **{name: value.to_dict() for name, value in vars(self).items() if isinstance(value, Histogram)},
        }
