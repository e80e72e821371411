"""Which masks are the same object: worked examples on images of a few pixels, and what holds for all masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from maskbeam.transforms.evaluation.agreement import MATCH_IOU, Agreement, compare_masks, mask_ious, match_masks
from maskbeam.transforms.masks.rle import bits_to_runs, runs_to_counts
from maskbeam.transforms.records import Mask, Prompt

SIZE_HW = (5, 5)


def to_mask(bits: np.ndarray, predicted_iou: float = 0.5) -> Mask:
    """A (H, W) bool array as a record; what agreement does not look at is left at nought."""
    counts = runs_to_counts(bits_to_runs(bits.T, (0, 0), bits.shape))
    nothing = (0.0, 0.0, 0.0, 0.0)
    return Mask(bits.shape, counts, nothing, int(bits.sum()), predicted_iou, 0.0, Prompt(((0.0, 0.0),)), nothing)


def bar(length: int, predicted_iou: float = 0.5, row: int = 0) -> Mask:
    """The first `length` of the 20 pixels of a row."""
    bits = np.zeros((2, 20), bool)
    bits[row, :length] = True
    return to_mask(bits, predicted_iou)


def nearly_all(without: frozenset[int]) -> np.ndarray:
    """All pixels but a few: many of these masks match, many at the same IoU."""
    bits = np.ones(SIZE_HW, bool)
    bits.flat[list(without)] = False
    return bits


bit_arrays = arrays(bool, SIZE_HW) | st.builds(nearly_all, st.frozensets(st.integers(0, 24), max_size=2))
mask_lists = st.lists(st.builds(to_mask, bit_arrays, st.sampled_from([0.5, 0.75, 0.875])), max_size=6)


# By hand.


def test_a_mask_is_matched_lost_or_new() -> None:
    # 19 of 20 pixels: the same object. 10 of 20: lost, and its best IoU is told. The other row: new.
    expected = [bar(20, predicted_iou=0.75), bar(10, row=1)]
    actual = [bar(5, row=1), bar(19, predicted_iou=0.5)]
    agreement = compare_masks(expected, actual)
    assert agreement == Agreement(
        expected=2, actual=2, matched_ious=(0.95,), best_ious=(0.95, 0.5), predicted_iou_differences=(0.25,)
    )
    assert (agreement.matched, agreement.lost, agreement.new) == (1, 1, 1)
    assert (agreement.mean_matched_iou, agreement.mean_best_iou) == (0.95, 0.725)
    assert agreement.mean_predicted_iou_difference == 0.25


@pytest.mark.parametrize(("length", "matched"), [(18, 1), (17, 0)])
def test_a_match_needs_an_iou_of_nine_tenths(length: int, matched: int) -> None:
    assert compare_masks([bar(20)], [bar(length)]).matched == matched


@pytest.mark.parametrize(
    ("ious", "expected"),
    [
        ([[0.95]], [(0, 0)]),
        ([[0.89]], []),
        ([[0.95, 0.97]], [(0, 1)]),  # the better one
        ([[0.95], [0.97]], [(1, 0)]),  # a mask matches once
        ([[0.95, 0.97], [0.2, 0.99]], [(0, 0), (1, 1)]),  # the best pair first, though 0 prefers 1
        ([[1.0, 0.95], [0.95, 0.0]], [(0, 0)]),  # greedy: the perfect pair, not the most pairs
        ([[0.95, 0.95], [0.95, 0.95]], [(0, 0), (1, 1)]),  # ties: the earlier masks
    ],
)
def test_pairs_are_matched_from_the_best_down(ious: list[list[float]], expected: list[tuple[int, int]]) -> None:
    assert match_masks(np.array(ious)) == expected


@pytest.mark.parametrize(
    ("expected", "actual", "lost", "new", "best_ious"),
    [(0, 0, 0, 0, ()), (2, 0, 2, 0, (0.0, 0.0)), (0, 2, 0, 2, ())],
)
def test_without_masks_on_a_side_there_is_no_match(
    expected: int, actual: int, lost: int, new: int, best_ious: tuple[float, ...]
) -> None:
    agreement = compare_masks([bar(20)] * expected, [bar(20)] * actual)
    assert (agreement.matched, agreement.lost, agreement.new, agreement.best_ious) == (0, lost, new, best_ious)
    assert agreement.mean_matched_iou is None and agreement.mean_predicted_iou_difference is None
    assert agreement.mean_best_iou == (0.0 if expected else None)


def test_empty_masks_are_the_same_object() -> None:
    np.testing.assert_array_equal(mask_ious([bar(0), bar(20)], [bar(0), bar(20)]), np.eye(2))


def test_the_sum_is_that_of_all_images() -> None:
    total = compare_masks([bar(20)], [bar(19)]) + compare_masks([bar(20), bar(10)], [bar(20)]) + Agreement()
    assert (total.expected, total.actual, total.matched, total.lost, total.new) == (3, 2, 2, 1, 0)
    assert total.mean_matched_iou == pytest.approx((0.95 + 1) / 2)
    assert total.mean_best_iou == pytest.approx((0.95 + 1 + 0.5) / 3)


def test_masks_of_images_of_several_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 sizes \(H, W\), \[\(2, 20\), \(5, 5\)\]"):
        compare_masks([bar(20)], [to_mask(np.ones(SIZE_HW, bool))])


# For all masks.


@settings(deadline=None)
@given(mask_lists)
def test_the_same_masks_agree_perfectly(masks: list[Mask]) -> None:
    agreement = compare_masks(masks, masks)
    assert (agreement.matched, agreement.lost, agreement.new) == (len(masks), 0, 0)
    assert set(agreement.matched_ious) | set(agreement.best_ious) <= {1.0}


@settings(deadline=None)
@given(mask_lists, st.data())
def test_the_order_of_the_same_masks_does_not_matter(masks: list[Mask], data: st.DataObject) -> None:
    agreement = compare_masks(masks, data.draw(st.permutations(masks)))
    assert agreement.matched_ious == agreement.best_ious == (1.0,) * len(masks)


@settings(deadline=None)
@given(mask_lists, mask_lists)
def test_exchanging_the_lists_exchanges_lost_and_new(one: list[Mask], other: list[Mask]) -> None:
    there, back = compare_masks(one, other), compare_masks(other, one)
    assert (there.matched, there.lost, there.new) == (back.matched, back.new, back.lost)
    assert sorted(there.matched_ious) == sorted(back.matched_ious)
    assert sorted(there.predicted_iou_differences) == sorted(back.predicted_iou_differences)


@settings(deadline=None)
@given(mask_lists, mask_lists)
def test_every_mask_is_counted_once(expected: list[Mask], actual: list[Mask]) -> None:
    ious = mask_ious(expected, actual)
    pairs = match_masks(ious)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    assert all(ious[i, j] >= MATCH_IOU for i, j in pairs)
    left = np.delete(np.delete(ious, [i for i, _ in pairs], 0), [j for _, j in pairs], 1)
    assert left.max(initial=0) < MATCH_IOU  # what is lost has nothing left that it could match
    agreement = compare_masks(expected, actual)
    assert agreement.matched + agreement.lost == len(agreement.best_ious) == len(expected)
    assert agreement.matched + agreement.new == len(actual)


@settings(deadline=None)
@given(mask_lists)
def test_predicted_iou_does_not_decide_what_matches(masks: list[Mask]) -> None:
    shifted = [replace(mask, predicted_iou=mask.predicted_iou + 0.125) for mask in masks]
    assert compare_masks(masks, shifted).matched == len(masks)
