from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskbeam.transforms.masks.crops import generate_crop_boxes
from maskbeam.transforms.masks.prompts import build_layer_point_grids
from maskbeam.transforms.records import CropBox

OVERLAP_RATIO = 512 / 1500


def layer_boxes(size_hw: tuple[int, int], layer: int, overlap_ratio: float) -> list[tuple[int, int, int, int]]:
    boxes = generate_crop_boxes(size_hw, layer, overlap_ratio)
    return [box.xyxy for box in boxes if box.layer == layer]


def test_size_and_xywh() -> None:
    box = CropBox((3, 5, 10, 25), layer=1)
    assert box.size_hw == (20, 7)
    assert box.xywh == (3.0, 5.0, 7.0, 20.0)


@pytest.mark.parametrize(
    ("size_hw", "layer", "overlap_ratio", "expected"),
    [
        ((60, 80), 0, 0.5, [(0, 0, 80, 60)]),
        # Overlap int(0.25 * 60) = 15: crops of ceil((15 + 80) / 2) = 48 by ceil((15 + 60) / 2) = 38, the last one cut.
        ((60, 80), 1, 0.25, [(0, 0, 48, 38), (0, 23, 48, 60), (33, 0, 80, 38), (33, 23, 80, 60)]),
        # The overlap is a fraction of the short side in both directions: int(0.5 * 10) = 5.
        ((100, 10), 1, 0.5, [(0, 0, 8, 53), (0, 48, 8, 100), (3, 0, 10, 53), (3, 48, 10, 100)]),
        # Everything overlaps: each crop is the whole image.
        ((20, 20), 1, 1.0, [(0, 0, 20, 20)] * 4),
    ],
)
def test_boxes_of_a_layer(
    size_hw: tuple[int, int], layer: int, overlap_ratio: float, expected: list[tuple[int, int, int, int]]
) -> None:
    assert layer_boxes(size_hw, layer, overlap_ratio) == expected


@pytest.mark.parametrize(("n_layers", "passes"), [(0, 1), (1, 5), (2, 21), (3, 85)])
def test_number_of_crops(n_layers: int, passes: int) -> None:
    assert len(generate_crop_boxes((480, 640), n_layers, OVERLAP_RATIO)) == passes


def test_crop_and_point_of_a_published_annotation() -> None:
    """SA-1B, image sa_560, 1500 x 2250: a mask with crop_box [998, 0, 755, 567] and point (1233.9375, 177.1875)."""
    boxes = [box for box in generate_crop_boxes((1500, 2250), 2, OVERLAP_RATIO) if box.layer == 2]
    [crop] = [box for box in boxes if box.xywh == (998, 0, 755, 567)]
    points = build_layer_point_grids(32, 2, 2)[2] * crop.size_hw[::-1] + crop.xyxy[:2]
    assert [1233.9375, 177.1875] in points.tolist()


@pytest.mark.parametrize(
    ("size_hw", "expected"),
    [
        ((1, 1), [(0, 0, 1, 1)]),
        ((1, 3), [(0, 0, 2, 1), (2, 0, 3, 1)]),
        ((2, 1), [(0, 0, 1, 1), (0, 1, 1, 2)]),
        ((2, 2), [(0, 0, 1, 1), (0, 1, 1, 2), (1, 0, 2, 1), (1, 1, 2, 2)]),
    ],
)
def test_tiny_images_have_no_empty_crops(size_hw: tuple[int, int], expected: list[tuple[int, int, int, int]]) -> None:
    assert layer_boxes(size_hw, 1, OVERLAP_RATIO) == expected


@settings(deadline=None)
@given(
    size_hw=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    layer=st.integers(0, 3),
    overlap_ratio=st.floats(0, 1),
)
def test_each_layer_covers_the_image(size_hw: tuple[int, int], layer: int, overlap_ratio: float) -> None:
    covered = np.zeros(size_hw, bool)
    for x0, y0, x1, y1 in layer_boxes(size_hw, layer, overlap_ratio):
        assert 0 <= x0 < x1 <= size_hw[1]
        assert 0 <= y0 < y1 <= size_hw[0]
        covered[y0:y1, x0:x1] = True
    assert covered.all()
