from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from maskbeam.transforms.evaluation.statistics import MAX_BINS, Histogram, Statistics


def to_dict(histogram: Histogram) -> dict[str, float | list[int]]:
    content = histogram.to_dict()
    assert content is not None
    return content


def test_bins_go_from_the_first_to_the_last_value() -> None:
    histogram = Histogram(0.01)
    histogram.add([0.90, 0.905, 0.93])
    histogram.add([0.95])
    assert to_dict(histogram) == {
        "start": pytest.approx(0.90),
        "step": 0.01,
        "counts": [2, 0, 0, 1, 0, 1],
        "count": 4,
        "low": 0.90,
        "high": 0.95,
        "mean": pytest.approx(3.685 / 4),
        "median": pytest.approx((0.90 + 0.93) / 2),
        "not_numbers": 0,
    }


@pytest.mark.parametrize("value", [0.88, 0.29, 0.57, 0.95, 1.0])
def test_float32_scores_are_in_the_bin_they_begin(value: float) -> None:
    """float32 0.29 is 0.28999999, and 0.29 / 0.01 is 28.999999999999996."""
    for number in (value, float(np.float32(value))):
        histogram = Histogram(0.01)
        histogram.add([number])
        assert to_dict(histogram)["start"] == pytest.approx(value)


def test_what_is_no_number_is_in_no_bin() -> None:
    histogram = Histogram(0.01)
    histogram.add([math.nan, 0.5])
    assert (histogram.count, histogram.not_numbers, to_dict(histogram)["mean"]) == (1, 1, 0.5)


def test_no_values() -> None:
    histogram = Histogram(1)
    histogram.add([])
    assert histogram.to_dict() is None


@pytest.mark.parametrize(
    ("values", "start", "step", "counts"),
    [
        ([3, 3, 5], 3, 1, [2, 0, 1]),
        ([0, 39], 0, 1, [1, *[0] * 38, 1]),
        ([1, 41, 42], 0, 2, [1, *[0] * 19, 1, 1]),
        ([17, 1000], 0, 50, [1, *[0] * 19, 1]),
    ],
)
def test_whole_numbers_are_joined_into_round_steps(values: list[int], start: int, step: int, counts: list[int]) -> None:
    histogram = Histogram(1)
    histogram.add(values)
    content = to_dict(histogram)
    assert (content["start"], content["step"], content["counts"]) == (start, step, counts)


@settings(deadline=None)
@given(st.lists(st.integers(0, 100_000), min_size=1))
def test_histograms_of_whole_numbers_are_exact_and_short(values: list[int]) -> None:
    histogram = Histogram(1)
    for value in values:
        histogram.add([value])
    content = to_dict(histogram)
    counts = content["counts"]
    assert isinstance(counts, list) and sum(counts) == len(values) and len(counts) <= MAX_BINS + 1
    assert (content["low"], content["high"]) == (min(values), max(values))
    assert content["mean"] == pytest.approx(np.mean(values)) and content["median"] == np.median(values)


def test_a_mask_of_one_pixel_has_an_area_and_an_empty_one_has_none() -> None:
    def mask(pixels: np.ndarray) -> dict[str, Any]:
        rle = coco_mask.encode(np.asfortranarray(pixels, np.uint8))
        segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
        return {"area": int(pixels.sum()), "predicted_iou": 0.9, "stability_score": 0.9, "segmentation": segmentation}

    one_pixel = np.zeros((10, 10), bool)
    one_pixel[3, 4] = True
    statistics = Statistics()
    image = {"status": "labeled", "num_candidates": 2, "height": 10, "width": 10}
    statistics.add_image(image, [mask(one_pixel), mask(np.zeros((10, 10), bool))])
    assert (statistics.area_share.count, to_dict(statistics.area_share)["mean"]) == (1, -2)  # a hundredth
