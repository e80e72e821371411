from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from maskbeam.transforms.draw import contact_sheet, draw_masks, mask_color
from maskbeam.transforms.masks.rle import bits_to_runs, runs_to_counts
from maskbeam.transforms.records import Mask, Prompt

OPACITY = 0.45


def to_mask(bits: np.ndarray) -> Mask:
    counts = runs_to_counts(bits_to_runs(bits.T, (0, 0), bits.shape))
    return Mask(bits.shape, counts, (0, 0, 0, 0), int(bits.sum()), 1.0, 1.0, Prompt(((0, 0),)), (0, 0, 0, 0))


def square(first: int, last: int, side: int = 9) -> np.ndarray:
    bits = np.zeros((side, side), bool)
    bits[first : last + 1, first : last + 1] = True
    return bits


def grey(level: int, height: int = 9, width: int = 9) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def blend(level: int, index: int) -> np.ndarray:
    return ((1 - OPACITY) * level + OPACITY * mask_color(index)).astype(np.uint8)


def test_first_colour_is_red() -> None:
    """Hue 0, saturation 0.75, value 1: 255 x (1, 0.25, 0.25)."""
    assert mask_color(0).tolist() == [255, 63, 63]


def test_colours_are_bright_and_differ() -> None:
    colors = [tuple(mask_color(index).tolist()) for index in range(100)]
    assert len(set(colors)) == 100
    assert all((max(color), min(color)) == (255, 63) for color in colors)
    assert all(np.abs(np.subtract(one, following)).max() > 100 for one, following in pairwise(colors))


def test_at_another_scale_each_pixel_is_that_of_the_mask_under_its_centre() -> None:
    """Of 9 columns, 3 have their centres at 1.5, 4.5 and 7.5; of 3 columns, 9 have 3 each."""
    columns = np.zeros((9, 9), bool)
    columns[:, 4] = True
    picture = draw_masks(grey(50, 3, 3), [to_mask(columns)])
    assert (picture[:, 1] == mask_color(0)).all() and (picture[:, [0, 2]] == 50).all()

    enlarged = draw_masks(grey(50), [to_mask(columns[:3, 3:6])])
    inside = np.zeros((9, 9), bool)
    inside[:, 3:6] = True
    np.testing.assert_array_equal((enlarged != 50).any(axis=2), inside)


def test_colour_is_that_of_the_index_whatever_else_is_drawn() -> None:
    one, other = square(0, 2), square(5, 8)
    alone, together = (draw_masks(grey(50), list(map(to_mask, masks))) for masks in ([one], [one, other]))
    np.testing.assert_array_equal(alone[one], together[one])


@pytest.mark.parametrize(("first", "last"), [(2, 6), (0, 8), (0, 3), (4, 5), (4, 4)])
def test_inside_blended_outline_solid_outside_untouched(first: int, last: int) -> None:
    mask, inside = square(first, last), np.zeros((9, 9), bool)
    inside[first + 1 : last, first + 1 : last] = True
    expected = grey(50)
    expected[mask] = mask_color(0)
    expected[inside] = blend(50, 0)
    np.testing.assert_array_equal(draw_masks(grey(50), [to_mask(mask)]), expected)


def test_hole_has_an_outline() -> None:
    mask = square(1, 7)
    mask[4, 4] = False
    picture = draw_masks(grey(50), [to_mask(mask)])
    assert (picture[4, 4] == 50).all()
    for neighbour in ((3, 4), (5, 4), (4, 3), (4, 5)):
        np.testing.assert_array_equal(picture[neighbour], mask_color(0))
    np.testing.assert_array_equal(picture[3, 3], blend(50, 0))  # diagonal neighbours are inside


@pytest.mark.parametrize("small_index", [0, 1])
def test_small_masks_are_drawn_over_large_ones(small_index: int) -> None:
    masks = [square(0, 8)]
    masks.insert(small_index, square(4, 4))
    np.testing.assert_array_equal(draw_masks(grey(50), list(map(to_mask, masks)))[4, 4], mask_color(small_index))


def test_under_several_masks_the_photo_shows_as_under_one() -> None:
    """Nested masks: the inside of the smallest is a blend of the photo and of that mask's colour alone."""
    masks = [square(0, 8), square(1, 7), square(2, 6)]
    np.testing.assert_array_equal(draw_masks(grey(50), list(map(to_mask, masks)))[4, 4], blend(50, 2))


def test_photo_is_not_changed() -> None:
    photo = grey(50)
    picture = draw_masks(photo, [to_mask(square(2, 6))])
    assert picture.dtype == np.uint8
    assert (photo == 50).all()


@pytest.mark.parametrize("masks", [[], [np.zeros((9, 9), bool)]], ids=["no-masks", "empty-mask"])
def test_nothing_to_draw(masks: list[np.ndarray]) -> None:
    np.testing.assert_array_equal(draw_masks(grey(50), list(map(to_mask, masks))), grey(50))


@pytest.mark.parametrize(
    ("sizes_hw", "columns", "expected_hw"),
    [
        ([(10, 20)], 1, (10, 20)),
        ([(10, 20)], 4, (10, 20)),
        ([(20, 20), (5, 10)], 2, (10, 30)),  # scaled to 10x10 and 10x20
        ([(10, 20), (10, 10), (20, 10)], 2, (20, 30)),  # the second row is 5 wide
        ([(10, 5), (10, 5), (10, 30)], 2, (20, 30)),  # the second row is the widest
        ([(1000, 1)], 1, (10, 1)),  # never narrower than a pixel
    ],
)
def test_sheet_size(sizes_hw: list[tuple[int, int]], columns: int, expected_hw: tuple[int, int]) -> None:
    sheet = contact_sheet([grey(50, *size_hw) for size_hw in sizes_hw], columns, height=10)
    assert sheet.shape == (*expected_hw, 3)
    assert sheet.dtype == np.uint8


def test_sheet_has_pictures_in_rows_and_is_white_elsewhere() -> None:
    sheet = contact_sheet([grey(10, 8, 8), grey(20, 8, 4), grey(30, 8, 6)], columns=2, height=8)
    expected = np.full((16, 12, 3), 255)
    expected[:8, :8], expected[:8, 8:], expected[8:, :6] = 10, 20, 30
    np.testing.assert_array_equal(sheet, expected)
