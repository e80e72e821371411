from __future__ import annotations

import tracemalloc
from itertools import product
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskbeam.transforms.masks import frame
from maskbeam.transforms.masks.candidates import mask_to_runs, measure_mask
from maskbeam.transforms.masks.frame import Upsampling, resized_hw, to_frame, to_frame_points

LOW, FRAME = 16, 64  # a small model
SIZES_HW = [(1, 1), (1, 500), (500, 1), (2, 3), (40, 25), (64, 64), (48, 64), (63, 65), (300, 70), (70, 300)]
spikes = st.lists(st.tuples(st.integers(0, LOW - 1), st.integers(0, LOW - 1), st.floats(-8, 8, width=32)), max_size=6)
sizes_hw = st.tuples(st.integers(1, 90), st.integers(1, 90))


def slow_upsample(logits: np.ndarray, size_hw: tuple[int, int], frame_size: int) -> np.ndarray:
    """Low-res -> frame, cut off the padding, frame -> image: the reference's two bilinear steps, in float64."""
    height, width = resized_hw(size_hw, frame_size)
    in_frame = slow_bilinear(logits.astype(np.float64), (frame_size, frame_size))
    return slow_bilinear(in_frame[:height, :width], size_hw)


def slow_bilinear(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Half-pixel centres, edges repeated, no antialiasing."""
    for axis, n_out in enumerate(size_hw):
        n_in = image.shape[axis]
        position = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
        below = np.floor(position).astype(int)
        above = np.minimum(below + 1, n_in - 1)
        weight = np.expand_dims(position - below, 1 - axis)
        image = (1 - weight) * image.take(below, axis) + weight * image.take(above, axis)
    return image


def spiky_logits(background: float, spikes: list[tuple[int, int, float]]) -> np.ndarray:
    """Flat but for a few values, so that a window can be smaller than the image, and empty."""
    logits = np.full((LOW, LOW), background, np.float32)
    for y, x, value in spikes:
        logits[y, x] = value
    return logits


def whole(size_hw: tuple[int, int]) -> tuple[slice, slice]:
    return slice(0, size_hw[0]), slice(0, size_hw[1])


@pytest.mark.parametrize(
    ("size_hw", "frame_size", "expected"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((480, 640), 1024, (768, 1024)),
        ((640, 427), 1024, (1024, 683)),  # 683.2
        ((1500, 2250), 1024, (683, 1024)),  # 682.67
        ((3, 2048), 1024, (2, 1024)),  # 1.5 is rounded up
        ((5, 2048), 1024, (3, 1024)),  # so is 2.5
        ((2, 1), 64, (64, 32)),  # small images grow
        ((1, 1), 64, (64, 64)),
        ((1, 5000), 1024, (1, 1024)),  # 0.2: never less than one pixel
        ((5000, 1), 1024, (1024, 1)),
    ],
)
def test_resized_hw(size_hw: tuple[int, int], frame_size: int, expected: tuple[int, int]) -> None:
    assert resized_hw(size_hw, frame_size) == expected


@pytest.mark.parametrize("size_hw", SIZES_HW)
def test_to_frame_pads_right_and_bottom_with_zeros(size_hw: tuple[int, int]) -> None:
    height, width = resized_hw(size_hw, FRAME)
    expected = np.zeros((FRAME, FRAME, 3), np.uint8)
    expected[:height, :width] = (10, 20, 30)
    actual = to_frame(np.full((*size_hw, 3), (10, 20, 30), np.uint8), FRAME)
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual, expected)


def test_to_frame_leaves_an_image_that_fits() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (FRAME, FRAME, 3), np.uint8)
    np.testing.assert_array_equal(to_frame(pixels, FRAME), pixels)


def test_to_frame_antialiases() -> None:
    """The image shrinks to a quarter, so each pixel of the frame is the mean of 8 by a triangle of radius 4.

    The triangle weighs pixels 0.5, 1.5, 2.5 and 3.5 from its middle by 7, 5, 3 and 1 of 32. The white column's centre,
    129.5, lies 3.5, 0.5 and 4.5 from the middles of the frame's pixels 31, 32 and 33: 126, 130 and 134.
    """
    pixels = np.zeros((4 * FRAME, 4 * FRAME, 3), np.uint8)
    pixels[:, 129] = 255
    row = to_frame(pixels, FRAME)[FRAME // 2, 30:34, 0]
    np.testing.assert_array_equal(row, [0, round(255 / 32), round(255 * 7 / 32), 0])


@pytest.mark.parametrize(
    ("size_hw", "point_xy", "expected_xy"),
    [
        ((100, 200), (200, 100), (64, 32)),
        ((100, 200), (50, 50), (16, 16)),
        ((3, 5), (5, 3), (64, 38)),  # 38.4 is rounded to 38, and the points shrink with it
        ((3, 5), (2.5, 1.5), (32, 19)),
        ((1, 500), (250, 0.5), (32, 0.5)),
    ],
)
def test_to_frame_points(
    size_hw: tuple[int, int], point_xy: tuple[float, float], expected_xy: tuple[float, float]
) -> None:
    np.testing.assert_allclose(to_frame_points(np.array([point_xy]), size_hw, FRAME), [expected_xy], rtol=1e-15)


@pytest.mark.parametrize("size_hw", SIZES_HW)
def test_pixels_are_averages_of_at_most_four_low_res_logits_an_axis(size_hw: tuple[int, int]) -> None:
    upsampling = Upsampling.build(size_hw, LOW, FRAME)
    for axis, n_out in zip((upsampling.y, upsampling.x), size_hw, strict=True):
        assert axis.matrix is not None and axis.matrix.shape == (n_out, LOW)
        assert axis.matrix.min() >= 0
        np.testing.assert_allclose(axis.matrix.sum(axis=1), 1, rtol=0, atol=1e-6)
        assert np.count_nonzero(axis.matrix, axis=1).max() <= 4


@pytest.mark.parametrize("size_hw", SIZES_HW)
def test_support_and_reach_enclose_the_weights(size_hw: tuple[int, int]) -> None:
    upsampling = Upsampling.build(size_hw, LOW, FRAME)
    for axis, n_out in zip((upsampling.y, upsampling.x), size_hw, strict=True):
        assert axis.matrix is not None
        for first in range(n_out):
            for last in {first, n_out - 1}:
                outside = np.ones(LOW, bool)
                outside[axis.support(slice(first, last + 1))] = False
                assert not axis.matrix[first : last + 1, outside].any()
        for low in range(LOW):
            outside = np.ones(n_out, bool)
            outside[axis.reach(low, low)] = False
            assert not axis.matrix[outside, low].any()


# Long axes have no matrix. Its limit is lowered here, so that few pixels make one, cut into several pieces.

LONG_HW = [(1, 500), (500, 1), (40, 25), (300, 70), (70, 300), (1, 5000), (5000, 1), (64, 64)]


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "STRIP_VALUES", 20 * LOW)
    monkeypatch.setattr(frame, "_PIECE", 33)
    monkeypatch.setattr(frame, "_RESIZED_AT_ONCE", 30)


@pytest.mark.parametrize("size_hw", LONG_HW)
def test_a_long_axis_gives_what_its_matrix_would(size_hw: tuple[int, int], request: pytest.FixtureRequest) -> None:
    logits = np.random.default_rng(0).uniform(-10, 10, (LOW, LOW)).astype(np.float32)
    dense = Upsampling.build(size_hw, LOW, FRAME)
    request.getfixturevalue("small_limits")
    long = Upsampling.build(size_hw, LOW, FRAME)
    for dense_axis, axis, side in zip((dense.y, dense.x), (long.y, long.x), size_hw, strict=True):
        assert (axis.matrix is None) == (side > 20)
        np.testing.assert_array_equal(axis.begins, dense_axis.begins)
        np.testing.assert_array_equal(axis.ends, dense_axis.ends)
    rows, cols = (slice(side // 3, side) for side in size_hw)
    np.testing.assert_allclose(long.apply(logits, rows, cols), dense.apply(logits, rows, cols), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("size_hw", LONG_HW)
def test_strips_of_a_long_image_are_small_and_in_the_order_of_rle(size_hw: tuple[int, int]) -> None:
    rows, cols = whole(size_hw)
    positions = []
    for strip_rows, strip_cols in Upsampling.build(size_hw, LOW, FRAME).strips(rows, cols):
        x, y = np.mgrid[strip_cols, strip_rows]
        assert x.size <= frame.STRIP_VALUES
        positions += (x * size_hw[0] + y).ravel().tolist()
    assert positions == list(range(size_hw[0] * size_hw[1]))


@pytest.mark.parametrize("size_hw", LONG_HW)
def test_resizing_in_parts_changes_no_more_than_rounding(
    size_hw: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), np.uint8)
    at_once = to_frame(pixels, FRAME)
    request.getfixturevalue("small_limits")
    in_parts = to_frame(pixels, FRAME)
    np.testing.assert_allclose(in_parts.astype(int), at_once.astype(int), rtol=0, atol=1)
    assert np.count_nonzero(in_parts != at_once) <= at_once.size / 1000


@pytest.mark.parametrize("size_hw", [(30_000_000, 1), (1, 30_000_000), (100_000, 300), (300, 100_000)])
def test_a_mask_of_a_long_image_takes_bounded_memory(size_hw: tuple[int, int]) -> None:
    """A mask from a quarter to three quarters of the long side."""
    pixels, long = np.zeros((*size_hw, 3), np.uint8), max(size_hw)
    logits = np.full((256, 256), -8, np.float32)
    middle = (slice(None), slice(64, 192)) if size_hw[1] == long else (slice(64, 192), slice(None))
    logits[middle] = 8
    tracemalloc.start()
    try:
        to_frame(pixels, 1024)
        upsampling = Upsampling.build(size_hw, 256, 1024)
        measured = measure_mask(logits, upsampling, 0, 1)
        runs = mask_to_runs(logits, upsampling, 0, (0, 0), size_hw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400 * 2**20
    # The logits go from -8 to 8 between the middles of two low-res cells, and cross 0 where these meet.
    x0, y0, x1, y1 = measured.box_xyxy
    assert (min(x0, y0), min(x1, y1)) == (0, min(size_hw) - 1)
    np.testing.assert_allclose([max(x0, y0), max(x1, y1)], [long / 4, long * 3 / 4], rtol=0, atol=long / 1024 / 8)
    # And 1 and -1 a sixteenth of a cell from there, at each end of the 128.
    assert measured.stability_score == pytest.approx((128 - 1 / 8) / (128 + 1 / 8), abs=8 / long)
    assert runs.area == (max(x1, y1) - max(x0, y0) + 1) * min(size_hw)


@pytest.mark.parametrize(
    ("size_hw", "low_size", "frame_size"), [(size_hw, LOW, FRAME) for size_hw in SIZES_HW] + [((427, 640), 256, 1024)]
)
def test_apply_on_the_whole_image(size_hw: tuple[int, int], low_size: int, frame_size: int) -> None:
    logits = np.random.default_rng(0).uniform(-10, 10, (low_size, low_size)).astype(np.float32)
    actual = Upsampling.build(size_hw, low_size, frame_size).apply(logits, *whole(size_hw))
    assert actual.dtype == np.float32
    # Positions in the frame are float32, and neighbouring logits differ by up to 20.
    atol = 4 * 20 * frame_size * 2**-23
    np.testing.assert_allclose(actual.T, slow_upsample(logits, size_hw, frame_size), rtol=0, atol=atol)


@settings(deadline=None)
@given(size_hw=sizes_hw, data=st.data())
def test_apply_on_a_window(size_hw: tuple[int, int], data: st.DataObject) -> None:
    rows, cols = (slice(*sorted(data.draw(st.sets(st.integers(0, side), min_size=2, max_size=2)))) for side in size_hw)
    logits = np.random.default_rng(0).uniform(-10, 10, (LOW, LOW)).astype(np.float32)
    actual = Upsampling.build(size_hw, LOW, FRAME).apply(logits, rows, cols)
    expected = slow_upsample(logits, size_hw, FRAME)[rows, cols]
    np.testing.assert_allclose(actual.T, expected, rtol=0, atol=1e-3)


@settings(deadline=None)
@given(size_hw=sizes_hw, background=st.floats(-8, 8, width=32), spikes=spikes, threshold=st.floats(-8, 8))
def test_window_misses_no_pixel_above_the_threshold(
    size_hw: tuple[int, int], background: float, spikes: list[tuple[int, int, float]], threshold: float
) -> None:
    logits = spiky_logits(background, spikes)
    upsampling = Upsampling.build(size_hw, LOW, FRAME)
    outside = np.ones(size_hw, bool)
    window = upsampling.window(logits, threshold - 1e-3)
    if window is not None:
        outside[window] = False
    above = threshold < upsampling.apply(logits, *whole(size_hw)).T
    assert not (above & outside).any()


@pytest.mark.parametrize(
    ("low_yx", "expected"),
    [
        # The image fills the frame and is four times as large as the low-res logits: logit k is centred at 4 k + 1.5
        # and reaches the pixels less than 4 away, and at the edges all beyond.
        ((5, 8), (slice(18, 26), slice(30, 38))),
        ((0, 15), (slice(0, 6), slice(58, 64))),
    ],
)
def test_window_of_one_logit(low_yx: tuple[int, int], expected: tuple[slice, slice]) -> None:
    logits = spiky_logits(-1, [(*low_yx, 1)])
    window = Upsampling.build((FRAME, FRAME), LOW, FRAME).window(logits, 0)
    assert window is not None
    for actual_slice, expected_slice in zip(window, expected, strict=True):
        # Frame -> image is the identity, but its second tap, of weight 0, may widen the window by a pixel.
        assert expected_slice.start - 1 <= actual_slice.start <= expected_slice.start
        assert expected_slice.stop <= actual_slice.stop <= expected_slice.stop + 1


@pytest.mark.parametrize("low_yx", [(12, 3), (15, 15)])
def test_no_window_in_the_padding(low_yx: tuple[int, int]) -> None:
    """A wide image: rows 32 and on of the frame are padding, and so are low-res rows from 9 on."""
    assert Upsampling.build((100, 200), LOW, FRAME).window(spiky_logits(-1, [(*low_yx, 1)]), 0) is None


def test_no_window_below_the_threshold() -> None:
    assert Upsampling.build((100, 200), LOW, FRAME).window(spiky_logits(0.5, []), 0.5) is None


@settings(deadline=None)
@given(
    rows=st.tuples(st.integers(0, 50), st.integers(1, 50)),
    cols=st.tuples(st.integers(0, 50), st.integers(1, 50)),
    strip_values=st.integers(1, 3000),
)
def test_strips_cover_the_window_once_and_are_small(
    rows: tuple[int, int], cols: tuple[int, int], strip_values: int
) -> None:
    window = [slice(first, first + count) for first, count in (rows, cols)]
    with mock.patch.object(frame, "STRIP_VALUES", strip_values):
        strips = list(Upsampling.build((100, 100), LOW, FRAME).strips(*window))
    positions = [(x, y) for ys, xs in strips for x in range(xs.start, xs.stop) for y in range(ys.start, ys.stop)]
    assert positions == list(product(*(range(side.start, side.stop) for side in reversed(window))))
    assert all((ys.stop - ys.start) * (xs.stop - xs.start) <= strip_values for ys, xs in strips)
