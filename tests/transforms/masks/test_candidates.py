from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from maskbeam.transforms.masks import frame
from maskbeam.transforms.masks.candidates import mask_to_runs, measure_mask
from maskbeam.transforms.masks.frame import Upsampling
from maskbeam.transforms.masks.rle import counts_to_mask, runs_to_counts
from tests.transforms.masks.test_frame import FRAME, LOW, sizes_hw, slow_upsample, spikes, spiky_logits

Spikes = list[tuple[int, int, float]]
THRESHOLD, OFFSET = 0.5, 1.0


def full_size(logits: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Upsampled logits in float64. Leaves out what rounding could decide."""
    upsampled = slow_upsample(logits, size_hw, FRAME)
    for cut in (THRESHOLD - OFFSET, THRESHOLD, THRESHOLD + OFFSET):
        assume(np.abs(upsampled - cut).min() > 1e-4)
    return upsampled


def to_mask(logits: np.ndarray, size_hw: tuple[int, int], threshold: float = THRESHOLD) -> np.ndarray:
    runs = mask_to_runs(logits, Upsampling.build(size_hw, LOW, FRAME), threshold, (0, 0), size_hw)
    return counts_to_mask(runs_to_counts(runs), size_hw)


cases = {
    "size_hw": sizes_hw,
    "background": st.floats(-3, 3, width=32),
    "spikes": spikes,
    "strip_values": st.sampled_from([1, 100, frame.STRIP_VALUES]),
}


@settings(max_examples=200, deadline=None)
@given(**cases)
def test_measure_mask_agrees_with_full_size_masks(
    size_hw: tuple[int, int], background: float, spikes: Spikes, strip_values: int
) -> None:
    logits = spiky_logits(background, spikes)
    upsampled = full_size(logits, size_hw)
    inner, outer = (np.float32((upsampled > THRESHOLD + shift).sum()) for shift in (OFFSET, -OFFSET))
    expected_stability = inner / outer if outer else np.float32("nan")
    ys, xs = np.nonzero(upsampled > THRESHOLD)
    expected_box = (xs.min(), ys.min(), xs.max(), ys.max()) if len(xs) else (0, 0, 0, 0)

    with mock.patch.object(frame, "STRIP_VALUES", strip_values):
        actual = measure_mask(logits, Upsampling.build(size_hw, LOW, FRAME), THRESHOLD, OFFSET)

    np.testing.assert_array_equal(actual.stability_score, expected_stability)
    assert actual.box_xyxy == expected_box


@settings(max_examples=200, deadline=None)
@given(**cases)
def test_mask_to_runs_agrees_with_the_full_size_mask(
    size_hw: tuple[int, int], background: float, spikes: Spikes, strip_values: int
) -> None:
    logits = spiky_logits(background, spikes)
    expected = full_size(logits, size_hw) > THRESHOLD
    with mock.patch.object(frame, "STRIP_VALUES", strip_values):
        np.testing.assert_array_equal(to_mask(logits, size_hw), expected)


@pytest.mark.parametrize(
    ("value", "stability", "box_xyxy", "area"),
    [
        (-10.0, float("nan"), (0, 0, 0, 0), 0),  # empty however it is cut
        (-0.5, 0.0, (0, 0, 0, 0), 0),  # full only at the lower cut, -1
        (0.0, 0.0, (0, 0, 0, 0), 0),  # equal to the threshold is not above it
        (0.5, 0.0, (0, 0, 6, 4), 35),  # empty only at the higher cut
        (10.0, 1.0, (0, 0, 6, 4), 35),
    ],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_flat_logits(value: float, stability: float, box_xyxy: tuple[int, int, int, int], area: int) -> None:
    size_hw = (5, 7)
    logits = np.full((LOW, LOW), value, np.float32)
    measured = measure_mask(logits, Upsampling.build(size_hw, LOW, FRAME), 0.0, 1.0)
    assert measured.stability_score.dtype == np.float32
    np.testing.assert_array_equal(measured.stability_score, np.float32(stability))
    assert measured.box_xyxy == box_xyxy
    assert np.count_nonzero(to_mask(logits, size_hw, threshold=0.0)) == area


def test_mask_of_a_crop_lies_where_the_crop_does() -> None:
    crop_hw, size_hw, (x0, y0) = (20, 30), (50, 80), (45, 25)
    logits = spiky_logits(-1, [(4, 9, 8.0), (5, 9, 8.0)])
    expected = np.zeros(size_hw, bool)
    expected[y0 : y0 + 20, x0 : x0 + 30] = to_mask(logits, crop_hw)
    assert expected.any()

    runs = mask_to_runs(logits, Upsampling.build(crop_hw, LOW, FRAME), THRESHOLD, (x0, y0), size_hw)
    np.testing.assert_array_equal(counts_to_mask(runs_to_counts(runs), size_hw), expected)


def test_no_strip_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory depends neither on the image nor on the mask, but for columns longer than a strip."""
    sizes = []
    apply = Upsampling.apply

    def recorded(self: Upsampling, logits: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
        upsampled = apply(self, logits, rows, cols)
        sizes.append(upsampled.size)
        return upsampled

    monkeypatch.setattr(Upsampling, "apply", recorded)
    monkeypatch.setattr(frame, "STRIP_VALUES", 1000)
    logits, size_hw = np.full((LOW, LOW), 10, np.float32), (90, 200)
    measure_mask(logits, Upsampling.build(size_hw, LOW, FRAME), THRESHOLD, OFFSET)
    assert sum(sizes) == 90 * 200
    assert max(sizes) <= 1000
    sizes.clear()
    assert to_mask(logits, size_hw).all()
    assert sum(sizes) == 90 * 200
    assert max(sizes) <= 1000
