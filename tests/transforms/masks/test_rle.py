from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco_mask

from maskbeam.transforms.masks import rle
from maskbeam.transforms.masks.rle import Runs, bits_to_runs, join_runs, runs_to_counts

ZEROS, ONES = np.zeros((5, 7), bool), np.ones((5, 7), bool)
masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9))


def mask_to_runs(mask: np.ndarray) -> Runs:
    return bits_to_runs(mask.T, (0, 0), mask.shape)


def coco_counts(mask: np.ndarray) -> str:
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


@settings(deadline=None)
@given(masks)
@example(ZEROS)
@example(ONES)
def test_counts_are_those_of_pycocotools(mask: np.ndarray) -> None:
    assert runs_to_counts(mask_to_runs(mask)) == coco_counts(mask)


@settings(deadline=None)
@given(masks)
@example(ZEROS)
@example(ONES)
def test_mask_survives_the_round_trip(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(rle.counts_to_mask(runs_to_counts(mask_to_runs(mask)), mask.shape), mask)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[0, 1], [0, 1]], [2, 2]),
        ([[1, 0], [1, 0]], [0, 2, 2]),  # zeros first, even if there are none
        ([[0, 0], [0, 0]], [4]),
        ([[1, 1], [1, 1]], [0, 4]),
        ([[0, 1, 1], [1, 1, 0]], [1, 4, 1]),  # runs go on from the foot of a column to the head of the next
        ([[0, 0, 1, 1, 1, 0, 1]], [2, 3, 1, 1]),
    ],
)
def test_counts_of_masks_by_hand(mask: list[list[int]], expected: list[int]) -> None:
    height, width = len(mask), len(mask[0])
    compressed = coco_mask.frPyObjects({"size": [height, width], "counts": expected}, height, width)["counts"]
    assert runs_to_counts(mask_to_runs(np.array(mask, bool))) == compressed.decode()


@settings(deadline=None)
@given(masks)
def test_runs_are_ascending_and_apart(mask: np.ndarray) -> None:
    runs = mask_to_runs(mask)
    bounds = np.stack([runs.starts, runs.ends], axis=1).ravel()
    assert (np.diff(bounds) > 0).all()
    assert runs.area == mask.sum()


@settings(deadline=None)
@given(masks, st.tuples(*[st.integers(0, 4)] * 4))
@example(ONES, (0, 0, 0, 0))
@example(ONES, (0, 2, 0, 3))
def test_window_of_a_mask(window: np.ndarray, margins: tuple[int, int, int, int]) -> None:
    top, bottom, left, right = margins
    mask = np.pad(window, ((top, bottom), (left, right)))
    assert runs_to_counts(bits_to_runs(window.T, (left, top), mask.shape)) == coco_counts(mask)


@settings(deadline=None)
@given(masks, st.sets(st.integers(1, 8)))
@example(ONES, {2, 3})
@example(ZEROS, {2})
def test_strips_joined_are_the_whole(mask: np.ndarray, cuts: set[int]) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < mask.shape[1]), mask.shape[1]]
    strips = [bits_to_runs(mask[:, x0:x1].T, (x0, 0), mask.shape) for x0, x1 in pairwise(edges)]
    actual, expected = join_runs(strips, mask.shape), mask_to_runs(mask)
    np.testing.assert_array_equal(actual.starts, expected.starts)
    np.testing.assert_array_equal(actual.ends, expected.ends)


def test_no_parts_join_to_an_empty_mask() -> None:
    assert runs_to_counts(join_runs([], (5, 7))) == coco_counts(ZEROS)


@settings(deadline=None)
@given(masks)
@example(ZEROS)
@example(ONES)
def test_area_and_bbox(mask: np.ndarray) -> None:
    ys, xs = np.nonzero(mask)
    bbox = (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1) if len(xs) else (0, 0, 0, 0)
    assert rle.area_and_bbox_xywh(coco_counts(mask), mask.shape) == (mask.sum(), bbox)


def test_bbox_is_in_the_convention_of_coco() -> None:
    """The reference calls the sides of this box 5 and 2."""
    mask = np.zeros((10, 12), bool)
    mask[2:5, 3:9] = True
    assert rle.area_and_bbox_xywh(coco_counts(mask), mask.shape) == (18, (3.0, 2.0, 6.0, 3.0))


def test_large_image() -> None:
    size_hw = (10_000, 20_000)
    counts = runs_to_counts(Runs(size_hw, np.array([10_000]), np.array([199_990_000])))
    assert rle.area_and_bbox_xywh(counts, size_hw) == (199_980_000, (1, 0, 19_998, 10_000))


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], []),
        ([[[1, 1], [0, 0]]], [1.0]),
        ([[[0, 0], [1, 1]], [[1, 0], [0, 0]], [[1, 1], [1, 0]], [[0, 0], [0, 0]]], [0, 1 / 2, 2 / 3, 0]),
    ],
    ids=["none", "itself", "some"],
)
def test_iou(others: list[list[list[int]]], expected: list[float]) -> None:
    one = coco_counts(np.array([[1, 1], [0, 0]]))
    rest = [coco_counts(np.array(other)) for other in others]
    np.testing.assert_allclose(rle.iou(one, rest, (2, 2)), expected, rtol=1e-15)


def test_iou_of_empty_masks_is_zero() -> None:
    assert rle.iou(coco_counts(ZEROS), [coco_counts(ZEROS)], ZEROS.shape).tolist() == [0]


@settings(deadline=None)
@given(masks)
@example(ZEROS)
@example(ONES)
@example(np.indices((60, 60)).sum(axis=0) % 7 == 0)  # many runs, most of one length
def test_lengths_are_the_runs_of_the_columns(mask: np.ndarray) -> None:
    column_major = np.r_[False, mask.T.ravel()]  # the first run is of zeros, though it may be empty
    changes = np.flatnonzero(np.diff(column_major))
    expected = np.diff(np.r_[0, changes, mask.size])
    np.testing.assert_array_equal(rle.counts_to_lengths(coco_counts(mask)), expected)
    assert rle.lengths_to_counts(expected.tolist(), mask.shape) == coco_counts(mask)
    rle.check_counts(coco_counts(mask), mask.shape)


characters = st.characters(min_codepoint=46, max_codepoint=113)
# What masks of 2 x 2 pixels have, and what comes of changing it.
strings = st.one_of(
    st.text(characters, max_size=12), st.sampled_from(["22", "4", "04", "112", "0121", "13", "5N", "o1"])
)


@settings(deadline=None)
@given(st.lists(strings, max_size=8), st.sampled_from([1, 5, 2**15]))
@example(["22", "2", "04", "", "4", "o", "`" * 7 + "0", "é"], 2**15)
def test_many_counts_are_checked_as_each_is(strings: list[str], block: int) -> None:
    expected = []
    for counts in strings:
        try:
            rle.check_counts(counts, (2, 2))
            expected.append(int(rle.counts_to_lengths(counts)[1::2].sum()))
        except ValueError:
            expected.append(-1)
    encoded = [counts.encode() for counts in strings]
    offsets = np.cumsum([0, *map(len, encoded)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rle, "_BLOCK_CHARACTERS", block)
        areas = rle.counts_to_areas(np.frombuffer(b"".join(encoded), np.uint8), offsets, np.full(len(strings), 4))
    assert areas.tolist() == expected


@settings(deadline=None)
@given(st.lists(masks, min_size=1, max_size=5))
def test_many_masks_have_their_areas(several: list[np.ndarray]) -> None:
    encoded = [coco_counts(mask).encode() for mask in several]
    offsets, sizes = np.cumsum([0, *map(len, encoded)]), np.array([mask.size for mask in several])
    areas = rle.counts_to_areas(np.frombuffer(b"".join(encoded), np.uint8), offsets, sizes)
    assert areas.tolist() == [mask.sum() for mask in several]


def test_long_runs_have_their_lengths() -> None:
    lengths = [0, 1, 2**31, 5, 3, 2**29, 70000]
    counts = coco_mask.frPyObjects({"size": [sum(lengths), 1], "counts": lengths}, sum(lengths), 1)["counts"].decode()
    assert rle.counts_to_lengths(counts).tolist() == lengths


@pytest.mark.parametrize("counts", ["", "2", "3", "222", "12J3", "4o", "o", " ", "ü", "P", "\u20ac", "`" * 20 + "0"])
def test_what_is_no_rle_of_the_size_is_an_error(counts: str) -> None:
    with pytest.raises(ValueError, match=r"RLE|runs"):
        rle.check_counts(counts, (2, 2))


@pytest.mark.parametrize("lengths", [[], [3], [5], [6, -2], [2, 2, 1]])
def test_lengths_of_another_size_are_an_error(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="expected 2 x 2 = 4 pixels"):
        rle.lengths_to_counts(lengths, (2, 2))


def test_polygons_are_filled_together() -> None:
    counts = rle.polygons_to_counts([[0, 0, 2, 0, 2, 1, 0, 1], [1, 0, 3, 0, 3, 2, 1, 2]], (2, 3))
    np.testing.assert_array_equal(rle.counts_to_mask(counts, (2, 3)), np.array([[1, 1, 1], [0, 1, 1]], bool))


@pytest.mark.parametrize("polygons", [[], [[]], [[0, 0, 1, 1]], [[0, 0, 1, 1, 2, 2, 3]]])
def test_polygons_without_three_corners_are_an_error(polygons: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="three or more pairs"):
        rle.polygons_to_counts(polygons, (4, 4))


@settings(deadline=None)
@given(masks)
@example(ZEROS)
@example(ONES)
@example(np.repeat([False, True, False], 40000).reshape(300, 400))  # run lengths of several characters
def test_runs_survive_the_way_through_counts(mask: np.ndarray) -> None:
    runs = mask_to_runs(mask)
    actual = rle.counts_to_runs(coco_counts(mask), mask.shape)
    np.testing.assert_array_equal(actual.starts, runs.starts)
    np.testing.assert_array_equal(actual.ends, runs.ends)


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(1, 3))
def test_differences_of_run_lengths_have_either_sign(lengths: list[int], times: int) -> None:
    """Runs of length 0 are legal in counts of other tools; ours merges them away."""
    counts = [*lengths * times, 1]
    size_hw = (sum(counts), 1)
    text = coco_mask.frPyObjects({"size": list(size_hw), "counts": counts}, *size_hw)["counts"].decode()
    runs = rle.counts_to_runs(text, size_hw)
    expected = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    actual = np.zeros(size_hw[0], bool)
    for start, end in zip(runs.starts, runs.ends, strict=True):
        actual[start:end] = True
    np.testing.assert_array_equal(actual, expected)


def test_share_within_is_of_the_first() -> None:
    small, large = coco_counts(np.eye(4, dtype=bool)), coco_counts(np.tri(4, dtype=bool))
    assert rle.share_within(small, [large, small], (4, 4)).tolist() == [1.0, 1.0]
    assert rle.share_within(large, [small], (4, 4)).tolist() == [0.4]  # 4 of 10 pixels
    assert rle.share_within(large, [], (4, 4)).tolist() == []


@settings(deadline=None)
@given(arrays(bool, st.tuples(st.integers(0, 4), st.integers(1, 7), st.integers(1, 7))))
def test_union_area(masks: np.ndarray) -> None:
    counts = [coco_counts(mask) for mask in masks]
    assert rle.union_area(counts, masks.shape[1:]) == masks.any(axis=0).sum()
