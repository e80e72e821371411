"""Masks within masks: by hand on nested squares, and against plain arrays."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from maskbeam.transforms.masks.containment import (
    ContainmentConfig,
    Rule,
    apply_containment,
    find_contained,
    with_parents,
)
from maskbeam.transforms.records import Dropped, Mask, Prompt

Box = tuple[int, int, int, int]


def mask_of(pixels: np.ndarray, predicted_iou: float = 0.5) -> Mask:
    """A record of an (H, W) bool mask, made with pycocotools."""
    rle = coco_mask.encode(np.asfortranarray(pixels, np.uint8))
    x, y, w, h = coco_mask.toBbox(rle).tolist()
    height, width = pixels.shape
    area, counts = int(coco_mask.area(rle)), rle["counts"].decode()
    whole = (0.0, 0.0, float(width), float(height))
    return Mask((height, width), counts, (x, y, w, h), area, predicted_iou, 0.9, Prompt(((0.5, 0.5),)), whole)


def square(box: Box) -> Mask:
    """x0, y0, x1, y1 of a 20 x 20 image, ends exclusive."""
    x0, y0, x1, y1 = box
    pixels = np.zeros((20, 20), bool)
    pixels[y0:y1, x0:x1] = True
    return mask_of(pixels)


# 16 x 16, in it 8 x 8, in that 4 x 4; and one of 10 x 2 of which half lies in the first.
A, B, C, D = (0, 0, 16, 16), (2, 2, 10, 10), (4, 4, 8, 8), (11, 0, 20, 2)


@pytest.mark.parametrize(
    ("boxes", "rule", "kept"),
    [
        ([], "whole", []),
        ([A, B, C, D], "all", [A, B, C, D]),
        ([A, B, C, D], "whole", [A, D]),
        ([D, C, B, A], "whole", [D, A]),  # the order stays
        ([A, B, C, D], "parts", [C, D]),
        ([C, A, B], "parts", [C]),
        # Twins: the earlier counts as the larger.
        ([A, A], "whole", [A]),
        ([A, A], "parts", [A]),
    ],
)
def test_rules(boxes: list[Box], rule: Rule, kept: list[Box]) -> None:
    masks, dropped = apply_containment([square(box) for box in boxes], ContainmentConfig(rule))
    assert masks == [square(box) for box in kept]
    assert dropped == Dropped(containment=len(boxes) - len(kept))


def test_of_twins_the_earlier_is_the_whole_and_the_later_the_part() -> None:
    first, second = mask_of(np.eye(5, dtype=bool), 0.9), mask_of(np.eye(5, dtype=bool), 0.8)
    assert apply_containment([first, second], ContainmentConfig("whole"))[0] == [first]
    assert apply_containment([first, second], ContainmentConfig("parts"))[0] == [second]
    assert [mask.parent_id for mask in with_parents([first, second], 0.9)] == [None, 0]


def test_a_mask_goes_only_for_one_that_stays() -> None:
    """The second lies within the first and the third within the second, but the third not within the first."""
    boxes = [(0, 0, 12, 10), (3, 0, 13, 10), (9, 0, 13, 8)]  # 90 of 100, 32 of 32, 24 of 32 pixels
    masks = [square(box) for box in boxes]
    assert find_contained(masks, 0.9).tolist() == [[False] * 3, [True, False, False], [False, True, False]]
    assert apply_containment(masks, ContainmentConfig("whole"))[0] == [masks[0], masks[2]]
    assert apply_containment(masks, ContainmentConfig("parts"))[0] == [masks[0], masks[2]]


@pytest.mark.parametrize(
    ("threshold", "parents"),
    [
        (1.0, [None, 0, 1, None]),
        (0.5, [None, 0, 1, 0]),  # 10 of D's 18 pixels
        (0.6, [None, 0, 1, None]),
    ],
)
def test_the_parent_is_the_smallest_mask_around(threshold: float, parents: list[int | None]) -> None:
    found = with_parents([square(box) for box in (A, B, C, D)], threshold)
    assert [mask.parent_id for mask in found] == parents


def test_an_empty_mask_is_within_nothing_and_around_nothing() -> None:
    masks = [mask_of(np.zeros((20, 20), bool)), square(A), mask_of(np.zeros((20, 20), bool))]
    assert not find_contained(masks, 0.9).any()


@settings(deadline=None, max_examples=60)
@given(
    pixels=st.lists(arrays(bool, (5, 6)), max_size=6),
    threshold=st.sampled_from([0.25, 0.5, 0.75, 0.9, 1.0]),
)
def test_containment_is_that_of_the_pixels(pixels: list[np.ndarray], threshold: float) -> None:
    expected = np.zeros((len(pixels), len(pixels)), bool)
    for i, small in enumerate(pixels):
        for j, large in enumerate(pixels):
            ranks_higher = (large.sum(), -j) > (small.sum(), -i)
            if small.any() and ranks_higher:
                expected[i, j] = (small & large).sum() / small.sum() >= threshold
    masks = [mask_of(one) for one in pixels]
    np.testing.assert_array_equal(find_contained(masks, threshold), expected)
    rules: list[tuple[Rule, int]] = [("whole", 1), ("parts", 0)]
    for rule, axis in rules:
        kept, _ = apply_containment(masks, ContainmentConfig(rule, threshold))
        assert not find_contained(kept, threshold).any()  # nothing is left to drop
        gone = [i for i, mask in enumerate(masks) if not any(mask is one for one in kept)]
        stays = [i for i in range(len(masks)) if i not in gone]
        rivals = expected if axis else expected.T
        assert all(rivals[i, stays].any() for i in gone)  # and each went for one that stayed


@pytest.mark.parametrize(
    ("values", "named"),
    [(("some", 0.9), "all, whole, parts"), (("all", 0.0), "containment_thresh"), (("all", 1.1), "containment_thresh")],
)
def test_bad_values_are_named(values: tuple[Any, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ContainmentConfig(*values)


@pytest.mark.parametrize("order", list(itertools.permutations([A, B, C])))
def test_a_parent_is_the_smallest_wherever_it_stands(order: tuple[Box, ...]) -> None:
    parents = [mask.parent_id for mask in with_parents([square(box) for box in order], 0.9)]
    wanted = {A: None, B: order.index(A), C: order.index(B)}
    assert parents == [wanted[box] for box in order]


@pytest.mark.filterwarnings("error")
def test_an_empty_mask_lies_nowhere() -> None:
    masks = [square(A), mask_of(np.zeros((20, 20), bool))]
    assert not find_contained(masks, 0.9).any()
