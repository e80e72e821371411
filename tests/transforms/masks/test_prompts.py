from __future__ import annotations

import re
from dataclasses import replace
from math import inf, nan
from typing import Any

import numpy as np
import pytest

from maskbeam.transforms.masks.prompts import (
    batch_prompts,
    build_layer_point_grids,
    build_point_grid,
    check_prompts,
    mask_to_logits,
)
from maskbeam.transforms.masks.rle import bits_to_runs, runs_to_counts
from maskbeam.transforms.records import Prompt, Prompts


@pytest.mark.parametrize("points_per_side", [1, 2, 3, 32])
def test_points_are_the_centres_of_equal_cells_row_by_row(points_per_side: int) -> None:
    centres = [(2 * i + 1) / (2 * points_per_side) for i in range(points_per_side)]
    expected = [(x, y) for y in centres for x in centres]
    np.testing.assert_allclose(build_point_grid(points_per_side), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("points_per_side", "n_layers", "downscale_factor", "expected_sides"),
    [
        (32, 0, 100, [32]),
        (32, 2, 1, [32, 32, 32]),
        (32, 2, 2, [32, 16, 8]),
        (10, 1, 3, [10, 3]),  # 3.33 is cut, not rounded
        (11, 1, 4, [11, 2]),  # 2.75 too
        (8, 3, 2, [8, 4, 2, 1]),
    ],
)
def test_points_of_each_crop_layer(
    points_per_side: int, n_layers: int, downscale_factor: int, expected_sides: list[int]
) -> None:
    actual = build_layer_point_grids(points_per_side, n_layers, downscale_factor)
    assert [len(grid) for grid in actual] == [side**2 for side in expected_sides]
    for grid, side in zip(actual, expected_sides, strict=True):
        np.testing.assert_array_equal(grid, build_point_grid(side))


def test_layer_without_points_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"crop layer 4 has no points: points_per_side=8 .*factor=2 to the power 4"):
        build_layer_point_grids(8, 4, 2)


def to_prompts(*given: dict[str, Any]) -> Prompts:
    """Prompts of one image from dicts with the keys box, points, labels, mask, score and category."""
    points = [prompt.get("points", []) for prompt in given]
    labels = [prompt.get("labels", [1] * len(prompt.get("points", []))) for prompt in given]
    return Prompts(
        boxes_xyxy=np.array([prompt.get("box", [nan] * 4) for prompt in given], np.float64).reshape(-1, 4),
        points_xy=np.array([xy for some in points for xy in some], np.float64).reshape(-1, 2),
        point_labels=np.array([label for some in labels for label in some], np.int8),
        first_point=np.cumsum([0, *(len(some) for some in points)]),
        masks=tuple(prompt.get("mask") for prompt in given),
        category_ids=np.array([prompt.get("category", 1) for prompt in given], np.int32),
        scores=np.array([prompt.get("score", nan) for prompt in given], np.float32),
        ids=tuple(f"p{index}" for index in range(len(given))),
    )


SIZE_HW = (30, 40)
GOOD_BOX: dict[str, Any] = {"box": [4, 5, 20, 25]}


def square(x0: int, y0: int, x1: int, y1: int, size_hw: tuple[int, int] = SIZE_HW) -> str:
    """RLE of a filled rectangle."""
    bits = np.zeros(size_hw, bool)
    bits[y0:y1, x0:x1] = True
    return runs_to_counts(bits_to_runs(bits.T, (0, 0), size_hw))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"box": [4, nan, 20, 25]}, r"its box from \(4, nan\) to \(20, 25\) is not finite"),
        ({"box": [4, 5, inf, 25]}, r"to \(inf, 25\) is not finite"),
        ({"box": [20, 5, 4, 25]}, r"its box from \(20, 5\) to \(4, 25\) has no area: the second corner must be right"),
        ({"box": [4, 25, 20, 25]}, r"has no area"),
        ({"box": [40, 5, 50, 25]}, r"lies outside the image of 40 x 30 pixels"),
        ({"box": [4, -9, 20, 0]}, r"lies outside the image of 40 x 30 pixels"),
        ({"points": [[3, 3], [nan, 3]]}, r"its point \(nan, 3\) lies outside"),
        ({"points": [[3, 3], [40, 3]]}, r"its point \(40, 3\) lies outside the image of 40 x 30 pixels"),
        ({"points": [[3, -1]], **GOOD_BOX}, r"its point \(3, -1\) lies outside"),
        ({"points": [[3, 3], [4, 4]], "labels": [1, 2]}, r"has the label 2: expected 1 \(on the object\) or 0"),
        ({"points": [[3, 3]], "labels": [-1]}, r"has the label -1"),
        ({"points": [[3, 3]] * 65}, r"it has 65 points, more than the 64 allowed"),
        ({"mask": square(0, 0, 0, 0)}, r"its mask is empty"),
        ({"mask": square(1, 1, 5, 5, (40, 40))}, r"its mask is not one of the image: the runs have 1600 pixels"),
        ({"mask": "rubbish!"}, r"its mask is not one of the image"),
        ({}, r"it has no box, no point and no mask"),
    ],
)
def test_a_bad_prompt_is_dropped_with_a_reason_and_the_others_go_on(bad: dict[str, Any], reason: str) -> None:
    checked = check_prompts(to_prompts(GOOD_BOX, bad, GOOD_BOX), SIZE_HW)
    assert checked.kept.tolist() == [0, 2]
    (dropped,) = checked.dropped
    assert (dropped.index, dropped.id) == (1, "p1")
    assert re.search(reason, dropped.reason)


@pytest.mark.parametrize(
    "good",
    [
        {"box": [0, 0, 40, 30]},
        {"box": [4.2, 5, 4.3, 5.1]},
        {"points": [[0, 0], [39.9, 29.9]]},
        {"points": [[3, 3]], "labels": [0]},
        {"points": [[3, 3]] * 64, **GOOD_BOX},
        {"mask": square(0, 0, 1, 1)},
    ],
)
def test_a_good_prompt_is_kept(good: dict[str, Any]) -> None:
    checked = check_prompts(to_prompts(good), SIZE_HW)
    assert checked.kept.tolist() == [0] and not checked.dropped and not checked.clipped


def test_a_box_that_reaches_beyond_the_image_is_clipped_and_counted() -> None:
    given = to_prompts(
        {"box": [-5, 4, 20, 33.5]}, GOOD_BOX, {"box": [1, 1, 41, 2]}, {"points": [[3, 3]]}, {"box": [-9, 0, -1, 9]}
    )
    checked = check_prompts(given, SIZE_HW)
    expected = [[0, 4, 20, 30], GOOD_BOX["box"], [1, 1, 40, 2], [nan] * 4]
    np.testing.assert_array_equal(checked.prompts.boxes_xyxy[:4], expected)
    assert checked.clipped == 2
    assert checked.record(0).box_xywh == (0, 4, 20, 26)
    assert checked.record(3).box_xywh is None


def test_a_margin_grows_a_box_but_not_out_of_the_image() -> None:
    """A tenth of 16 x 20 pixels, and of 10 x 10 that touch two edges; the margin itself is not counted as clipped."""
    checked = check_prompts(to_prompts(GOOD_BOX, {"box": [30, 20, 40, 30]}), SIZE_HW, box_margin=0.1)
    np.testing.assert_allclose(checked.prompts.boxes_xyxy, [[2.4, 3.0, 21.6, 27.0], [29.0, 19.0, 40.0, 30.0]])
    assert checked.clipped == 0


def test_a_mask_without_a_box_gets_the_one_around_its_pixels() -> None:
    prompts = to_prompts({"mask": square(3, 4, 10, 20)}, {"mask": square(3, 4, 10, 20), **GOOD_BOX})
    np.testing.assert_array_equal(check_prompts(prompts, SIZE_HW).prompts.boxes_xyxy, [[3, 4, 10, 20], GOOD_BOX["box"]])
    alone = check_prompts(prompts, SIZE_HW, box_of_mask=False)
    np.testing.assert_array_equal(alone.prompts.boxes_xyxy, [[nan] * 4, GOOD_BOX["box"]])


def test_only_one_foreground_point_alone_is_a_click() -> None:
    point = {"points": [[3, 3]]}
    prompts = to_prompts(
        point,
        {**point, "labels": [0]},
        {"points": [[3, 3], [4, 4]]},
        {**point, **GOOD_BOX},
        {**point, "mask": square(1, 1, 9, 9)},
    )
    checked = check_prompts(prompts, SIZE_HW, box_of_mask=False)
    assert [checked.is_click(index) for index in range(5)] == [True, False, False, False, False]


def test_a_prompt_becomes_the_record_of_its_masks() -> None:
    given = to_prompts(
        {"points": [[3, 4], [5, 6]], "labels": [1, 0], "score": 0.5, "mask": square(1, 1, 9, 9)}, GOOD_BOX
    )
    checked = check_prompts(given, SIZE_HW, box_of_mask=False)
    assert checked.record(0) == Prompt(((3, 4), (5, 6)), 0, "p0", (1, 0), None, True, 0.5)
    assert checked.record(1) == Prompt((), 1, "p1", (), (4, 5, 16, 20), False, None)


@pytest.mark.parametrize(
    "change",
    [
        {"boxes_xyxy": np.zeros((3, 4))},
        {"point_labels": np.zeros(0, np.int8)},
        {"first_point": np.array([0, 2])},
        {"first_point": np.array([0, 3, 1])},
        {"masks": (None,)},
        {"scores": np.zeros(1)},
    ],
)
def test_arrays_that_do_not_fit_each_other_are_an_error(change: dict[str, Any]) -> None:
    prompts = to_prompts({"points": [[3, 3]]}, GOOD_BOX)
    with pytest.raises(ValueError, match="2 prompts"):
        check_prompts(replace(prompts, **change), SIZE_HW)


def test_tokens_of_each_kind_in_the_frame() -> None:
    """80 x 60 pixels in a frame of 40: half as large. Points come first, then the padding point or the corners."""
    given = to_prompts(
        {"box": [8, 10, 40, 50]},
        {"points": [[6, 4]]},
        {"points": [[6, 4], [2, 8]], "labels": [1, 0], "box": [8, 10, 40, 50]},
    )
    checked = check_prompts(given, (60, 80))
    two, four = batch_prompts(checked, (60, 80), 40, (2, 8))
    assert (two.indices.tolist(), two.size, two.counts) == ([0, 1], 2, ())
    assert two.labels.tolist() == [[2, 3], [1, -1]]
    np.testing.assert_array_equal(two.coords_xy, [[[4, 5], [20, 25]], [[3, 2], [0, 0]]])
    assert four.labels.tolist() == [[1, 0, 2, 3]]
    np.testing.assert_array_equal(four.coords_xy, [[[3, 2], [1, 4], [4, 5], [20, 25]]])


def test_coordinates_scale_by_each_axis_own_factor() -> None:
    """97 x 151 pixels become 82 x 128: 82 / 97 is not 128 / 151."""
    (batch,) = batch_prompts(check_prompts(to_prompts({"box": [0, 0, 97, 151]}), (151, 97)), (151, 97), 128, (2,))
    np.testing.assert_array_equal(batch.coords_xy[0], [[0, 0], [82, 128]])


@pytest.mark.parametrize(
    ("num_points", "tokens", "bucket"),
    [(1, 2, 2), (2, 3, 4), (3, 4, 4), (7, 8, 8), (15, 16, 16), (16, 17, 32), (64, 65, 66)],
)
def test_prompts_are_filled_up_to_a_bucket(num_points: int, tokens: int, bucket: int) -> None:
    (batch,) = batch_prompts(check_prompts(to_prompts({"points": [[3, 3]] * num_points}), SIZE_HW), SIZE_HW, 64, (2,))
    assert batch.labels.tolist() == [[1] * num_points + [-1] + [-2] * (bucket - tokens)]


def test_prompts_with_and_without_masks_go_apart_and_a_mask_alone_has_no_token() -> None:
    mask = square(3, 4, 10, 20)
    given = to_prompts({"mask": mask}, GOOD_BOX, {"mask": mask, **GOOD_BOX})
    without, masked = batch_prompts(check_prompts(given, SIZE_HW, box_of_mask=False), SIZE_HW, 64, (8,))
    assert (without.indices.tolist(), without.counts) == ([1], ())
    assert (masked.indices.tolist(), masked.counts) == ([0, 2], (mask, mask))
    assert masked.labels.tolist() == [[-2, -2], [2, 3]]


@pytest.mark.parametrize(
    ("count", "sizes", "expected"),
    [
        (0, (2, 8), []),
        (1, (2, 8), [2]),
        (2, (2, 8), [2]),
        (3, (2, 8), [8]),
        (20, (2, 8), [8, 8, 8]),
        (17, (2, 8), [8, 8, 2]),
        (5, (2,), [2, 2, 2]),
    ],
)
def test_batches_are_as_few_as_can_be(count: int, sizes: tuple[int, ...], expected: list[int]) -> None:
    batches = batch_prompts(check_prompts(to_prompts(*[GOOD_BOX] * count), SIZE_HW), SIZE_HW, 64, sizes)
    assert [batch.size for batch in batches] == expected
    assert [index for batch in batches for index in batch.indices.tolist()] == list(range(count))


def test_a_coarse_mask_becomes_logits_in_the_frame() -> None:
    """40 x 30 pixels become 16 x 12 low-res ones, 20 x 15 of them 8 x 6. The padding is outside."""
    logits = mask_to_logits(square(0, 0, 20, 15), SIZE_HW, 16)
    expected = np.full((16, 16), -np.log(999), np.float32)
    expected[:6, :8] = np.log(999)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    assert logits.dtype == np.float32
