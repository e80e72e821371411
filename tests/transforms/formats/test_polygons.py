from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco_mask
from scipy import ndimage

from maskbeam.transforms.formats.polygons import (
    Outlines,
    PolygonLoss,
    counts_to_outlines,
    join_parts,
    mask_to_outlines,
    polygons_iou,
)
from maskbeam.transforms.masks import rle

masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=10))
RING = np.pad(np.zeros((2, 3), bool), 1, constant_values=True)
CHECKERBOARD = np.indices((5, 6)).sum(axis=0) % 2 == 0
ALL_NEIGHBOURS = np.ones((3, 3))


def filled(mask: np.ndarray) -> np.ndarray:
    """The mask with its holes: background that cannot be left through sides or corners."""
    return ndimage.binary_fill_holes(mask, structure=ALL_NEIGHBOURS)


def numbers(polygon: np.ndarray) -> list[float]:
    return polygon.ravel().astype(float).tolist()


def area(polygon: np.ndarray) -> float:
    """The shoelace formula; positive, since an outline goes around its pixels clockwise as one sees them."""
    x, y = polygon.T.astype(float)
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


@settings(deadline=None)
@given(masks)
@example(RING)
@example(CHECKERBOARD)
@example(~CHECKERBOARD)
@example(np.zeros((3, 4), bool))
@example(np.ones((3, 4), bool))
def test_outlines_are_the_mask_but_for_its_holes(mask: np.ndarray) -> None:
    outlines = mask_to_outlines(mask)
    parts, count = ndimage.label(mask)
    around = ndimage.label(~np.pad(mask, 1), structure=ALL_NEIGHBOURS)[1]
    assert (len(outlines.parts), outlines.holes) == (count, around - 1)
    # Filled by pycocotools, and by another formula: each part with its own holes.
    if count:
        counts = rle.polygons_to_counts([numbers(part) for part in outlines.parts], mask.shape)
        np.testing.assert_array_equal(rle.counts_to_mask(counts, mask.shape), filled(mask))
    expected = [filled(parts == part).sum() for part in range(1, count + 1)]
    # A pocket that only opens through a corner is no hole of its part.
    assert sorted(map(area, outlines.parts)) == sorted(expected)


def test_an_outline_has_only_corners() -> None:
    (part,) = mask_to_outlines(np.ones((7, 9), bool)).parts
    assert part.tolist() == [[0, 0], [9, 0], [9, 7], [0, 7]]


def test_pixels_that_touch_at_a_corner_are_two_parts() -> None:
    outlines = mask_to_outlines(np.eye(2, dtype=bool))
    assert [part.tolist() for part in outlines.parts] == [
        [[0, 0], [1, 0], [1, 1], [0, 1]],
        [[1, 1], [2, 1], [2, 2], [1, 2]],
    ]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8, unique=True))
def test_joined_parts_enclose_what_the_parts_do(places: list[tuple[int, int]]) -> None:
    mask = np.zeros((12, 12), bool)
    for x, y in places:
        mask[3 * y : 3 * y + 2, 3 * x : 3 * x + 2] = True
    parts = mask_to_outlines(mask).parts
    joined = join_parts(parts)
    assert len(joined) == sum(map(len, parts)) + 2 * (len(parts) - 1)
    assert area(joined) == mask.sum()
    # Lines there and back are at the side of pixels or go across them, where a filler may take a few.
    assert (
        polygons_iou([numbers(joined)], rle.polygons_to_counts([numbers(p) for p in parts], (12, 12)), (12, 12)) > 0.9
    )


def test_loss_counts_what_is_lost() -> None:
    loss = PolygonLoss()
    assert str(loss) == "no mask became a polygon"
    square, other = np.zeros((4, 2), int), np.zeros((4, 2), int)
    loss.count(Outlines((square,), 0), 1.0, "a")
    loss.count(Outlines((square, other), 3), 0.5, "b")
    loss.count(Outlines((square,), 1), 0.75, "c")
    assert str(loss) == (
        "3 masks as polygons: mean IoU with the mask 0.7500, worst 0.5000 (b); 4 holes of 2 masks are filled, 1 masks "
        "have several parts"
    )


def test_iou_of_a_filled_ring() -> None:
    (part,) = mask_to_outlines(RING).parts  # 4 x 5 pixels, of which 2 x 3 are the hole
    counts = rle.lengths_to_counts([0, 5, 2, 2, 2, 2, 2, 5], (4, 5))
    np.testing.assert_array_equal(rle.counts_to_mask(counts, (4, 5)), RING)
    assert polygons_iou([numbers(part)], counts, (4, 5)) == pytest.approx(14 / 20)


def test_outlines_of_an_rle_are_where_its_mask_is() -> None:
    mask = np.pad(RING, ((2, 1), (3, 0)))
    counts = coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
    outlines = counts_to_outlines(counts, mask.shape)
    assert [part.tolist() for part in outlines.parts] == [[[3, 2], [8, 2], [8, 6], [3, 6]]] and outlines.holes == 1
    assert counts_to_outlines(rle.lengths_to_counts([6], (2, 3)), (2, 3)) == Outlines((), 0)
