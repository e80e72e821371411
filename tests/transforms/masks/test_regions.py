from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from maskbeam.transforms.masks.regions import remove_small_regions
from maskbeam.transforms.masks.rle import Runs, bits_to_runs, counts_to_mask, runs_to_counts

Region = set[tuple[int, int]]


def clean(mask: np.ndarray, min_area: int) -> tuple[np.ndarray, bool]:
    runs, changed = remove_small_regions(bits_to_runs(mask.T, (0, 0), mask.shape), min_area)
    return counts_to_mask(runs_to_counts(runs), mask.shape), changed


def slow_regions(mask: np.ndarray) -> Iterator[Region]:
    """8-connected regions, flooded from their first 2x2 block of pixels: the order in which OpenCV numbers them."""
    pixels = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    while pixels:
        edge = [min(pixels, key=lambda yx: (yx[0] // 2, yx[1] // 2))]
        region: Region = set()
        while edge:
            y, x = pixel = edge.pop()
            if pixel in pixels:
                pixels.remove(pixel)
                region.add(pixel)
                edge += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        yield region


def slow_clean(mask: np.ndarray, min_area: int) -> tuple[np.ndarray, bool]:
    """remove_small_regions of segment_anything/utils/amg.py, commit dca509f: of holes, then of islands."""
    cleaned = mask.copy()
    for hole in slow_regions(~mask):
        if len(hole) < min_area:
            for pixel in hole:
                cleaned[pixel] = True
    islands = list(slow_regions(cleaned))
    keep = [island for island in islands if len(island) >= min_area] or [max(islands, key=len, default=set())]
    for island in islands:
        if island not in keep:
            for pixel in island:
                cleaned[pixel] = False
    # All islands small and only one of them: nothing is lost, but the reference calls the mask edited.
    edited = not np.array_equal(cleaned, mask) or any(len(island) < min_area for island in islands)
    return cleaned, edited


FULL, EMPTY = np.ones((4, 5), bool), np.zeros((4, 5), bool)
masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=8))


@settings(max_examples=300, deadline=None)
@given(mask=masks, min_area=st.integers(1, 12))
@example(mask=FULL, min_area=20)
@example(mask=FULL, min_area=21)
@example(mask=EMPTY, min_area=20)
@example(mask=EMPTY, min_area=21)
def test_agrees_with_a_slow_flood_fill(mask: np.ndarray, min_area: int) -> None:
    actual, actual_changed = clean(mask, min_area)
    expected, expected_changed = slow_clean(mask, min_area)
    np.testing.assert_array_equal(actual, expected)
    assert actual_changed == expected_changed


def picture(text: str) -> np.ndarray:
    return np.array([[pixel == "#" for pixel in row] for row in text.split()])


@pytest.mark.parametrize(
    ("before", "min_area", "after"),
    [
        pytest.param("### #.# ###", 2, "### ### ###", id="hole"),
        pytest.param("### #.# ###", 1, None, id="hole-as-large-as-the-limit"),
        pytest.param("####. #.### #..## #####", 4, "##### ##### ##### #####", id="bay-at-the-edge-is-a-hole"),
        pytest.param("###### #.#### ##..## ######", 4, "###### ###### ###### ######", id="hole-joined-diagonally"),
        pytest.param("###### #.#### ##..## ######", 3, None, id="hole-joined-diagonally-large-enough"),
        pytest.param("##...# ##....", 2, "##.... ##....", id="island"),
        pytest.param("##...# ##....", 1, None, id="island-as-large-as-the-limit"),
        pytest.param("##...# ##...#", 3, "##.... ##....", id="islands-at-top-and-foot-of-columns"),
        pytest.param("##.... ##.... ..#...", 5, None, id="island-joined-diagonally"),
        # The foot of one column and the head of the next follow each other in RLE, but do not touch.
        pytest.param(
            ".#### ..... ..... ..... ..... #....", 2, ".#### ..... ..... ..... ..... .....", id="foot-and-head"
        ),
        pytest.param("#..#. ...#.", 9, "##### #####", id="small-background-fills-everything"),
        pytest.param("#..... ...##. ......", 6, "...... ...##. ......", id="all-small-the-largest-stays"),
        pytest.param("##.... ...##. ......", 6, "##.... ...... ......", id="all-small-the-first-of-equals-stays"),
        # OpenCV numbers regions by blocks of 2x2 pixels: the lower left one lies in the first block.
        pytest.param("....# #....", 2, "..... #....", id="all-small-the-first-block-wins"),
    ],
)
def test_pictures(before: str, min_area: int, after: str | None) -> None:
    actual, changed = clean(picture(before), min_area)
    np.testing.assert_array_equal(actual, picture(after or before))
    assert changed == (after is not None)


def test_hole_filled_first_can_save_an_island() -> None:
    """A ring of 8 pixels is too small, with its hole filled it is not."""
    ring = np.pad(picture("### #.# ###"), 3)
    assert clean(ring, 9)[0].sum() == 9


def test_single_small_island_counts_as_edited() -> None:
    """The reference prefers masks that were not edited, and this is one it calls edited."""
    mask = np.pad(np.ones((1, 2), bool), 5)
    actual, changed = clean(mask, 3)
    np.testing.assert_array_equal(actual, mask)
    assert changed


def test_a_panorama_one_pixel_high_costs_what_its_outline_does() -> None:
    """Ten million columns: a hole of 9 pixels, an island of 2 and one of 1."""
    starts, ends = np.array([0, 1009, 7_000_000, 8_000_000]), np.array([1000, 6_000_000, 7_000_002, 8_000_001])
    tracemalloc.start()
    try:
        runs, changed = remove_small_regions(Runs((1, 10_000_000), starts, ends), 10)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (runs.size_hw, runs.starts.tolist(), runs.ends.tolist(), changed) == ((1, 10**7), [0], [6_000_000], True)
    assert peak < 2**20
