from __future__ import annotations

import numpy as np
import pytest

from maskbeam.transforms.masks.prompts import build_layer_point_grids, build_point_grid


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
