"""The algorithm on FakeSam: discs of radius 8, 14 and 24 pixels of the 64-pixel frame around each prompt.

Where an image is all white, the predicted IoU of the three discs is 1, 0.94 and 0.88.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskbeam.transforms.masks import amg, rle
from maskbeam.transforms.masks.amg import AmgConfig, ModelOutputError, call_now, label_image, layer_point_grids
from maskbeam.transforms.masks.crops import generate_crop_boxes
from maskbeam.transforms.masks.prompts import build_point_grid
from maskbeam.transforms.records import Dropped, ImageMasks, Mask
from tests.fakes import FakeSam, FakeScored

RADII, WHITE_IOUS = (8, 14, 24), (1.0, 0.94, 0.88)
CENTRE = ((0.5, 0.5),)
NO_FILTERS: dict[str, Any] = {"pred_iou_thresh": 0, "stability_score_thresh": 0}


def white(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 255, np.uint8)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Grey levels, so that the predicted IoU differs from point to point."""
    grey = np.random.default_rng(seed).integers(0, 256, (height, width, 1), np.uint8)
    return np.repeat(grey, 3, axis=2)


def label(pixels: np.ndarray, sam: FakeSam | None = None, **settings: Any) -> ImageMasks:
    return label_image(sam or FakeSam(), pixels, AmgConfig(**{**NO_FILTERS, **settings}))


def label_points(pixels: np.ndarray, *grids: tuple[tuple[float, float], ...], **settings: Any) -> ImageMasks:
    """One grid a crop layer."""
    return label(pixels, points_per_side=None, point_grids=grids, crop_n_layers=len(grids) - 1, **settings)


def result(image: ImageMasks) -> tuple[tuple[Mask, ...], int, Dropped]:
    """All but the time it took."""
    return image.masks, image.num_candidates, image.dropped


def decode(mask: Mask) -> np.ndarray:
    return rle.counts_to_mask(mask.counts, mask.size_hw)


class DrawnSam(FakeSam):
    """Answers every prompt with three given masks, (16, 16) bool. An image of 16 x 16 pixels gets just these."""

    def __init__(self, *masks: np.ndarray) -> None:
        self.masks = masks

    def low_res_logits(self, scored: FakeScored, prompts: np.ndarray) -> np.ndarray:
        logits = np.where(np.stack(self.masks), 10, -10).astype(np.float32)
        return np.repeat(logits[None], len(prompts), axis=0)


def drawn(*boxes_xyxy: tuple[int, int, int, int]) -> np.ndarray:
    """Boxes of set pixels, x1 and y1 exclusive."""
    mask = np.zeros((16, 16), bool)
    for x0, y0, x1, y1 in boxes_xyxy:
        mask[y0:y1, x0:x1] = True
    return mask


def label_drawn(*masks: np.ndarray, **settings: Any) -> ImageMasks:
    return label_points(white(16, 16), CENTRE, sam=DrawnSam(*masks), **settings)


# AmgConfig


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"points_per_side": 0}, "points_per_side must be between 1 and 1024, got 0"),
        ({"points_per_side": 2000}, "points_per_side"),
        ({"points_per_side": None}, "points_per_side and point_grids"),
        ({"point_grids": (CENTRE,)}, "points_per_side and point_grids"),
        ({"points_per_batch": 0}, "points_per_batch"),
        ({"stability_score_offset": -0.5}, "stability_score_offset must be at least 0, got -0.5"),
        ({"box_nms_thresh": 1.5}, "box_nms_thresh must be between 0 and 1, got 1.5"),
        ({"box_nms_thresh": nan}, "box_nms_thresh"),
        ({"crop_n_layers": -1}, "crop_n_layers"),
        ({"crop_n_layers": 7}, "crop_n_layers"),
        ({"crop_nms_thresh": -0.1}, "crop_nms_thresh"),
        ({"crop_overlap_ratio": 1.1}, "crop_overlap_ratio"),
        ({"crop_n_points_downscale_factor": 0}, "crop_n_points_downscale_factor"),
        ({"crop_n_layers": 2, "crop_n_points_downscale_factor": 6}, "crop layer 2 has no points"),
        ({"min_mask_region_area": -1}, "min_mask_region_area"),
        ({"nms_by": "boxes"}, 'nms_by must be "box" or "mask", got "boxes"'),
        ({"min_mask_area": -1}, "min_mask_area"),
        ({"max_mask_area": -1}, "max_mask_area"),
        ({"min_mask_area_fraction": 1.1}, "min_mask_area_fraction"),
        ({"max_mask_area_fraction": -0.1}, "max_mask_area_fraction"),
        ({"max_masks": 0}, "max_masks"),
        ({"points_per_side": None, "point_grids": (CENTRE, CENTRE)}, "point_grids must have one grid a layer: 1"),
        ({"points_per_side": None, "point_grids": (CENTRE,), "crop_n_layers": 1}, "point_grids must have .*: 2"),
        ({"points_per_side": None, "point_grids": (CENTRE, ()), "crop_n_layers": 1}, r"point_grids\[1\] must hold"),
        ({"points_per_side": None, "point_grids": (((0.5, 1.5),),)}, r"point_grids\[0\] must hold"),
        ({"points_per_side": None, "point_grids": (((-0.1, 0.5),),)}, r"point_grids\[0\] must hold"),
        ({"points_per_side": None, "point_grids": (((nan, 0.5),),)}, r"point_grids\[0\] must hold"),
        (
            {"points_per_side": None, "point_grids": (((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),)},
            r"point_grids\[0\] must hold",
        ),
    ],
)
def test_bad_setting_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        AmgConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pred_iou_thresh": 0, "stability_score_thresh": -1, "mask_threshold": -3.5},
        {"box_nms_thresh": 0, "crop_nms_thresh": 1, "crop_overlap_ratio": 0},
        {"points_per_side": 1, "points_per_batch": 1, "max_masks": 1, "max_mask_area": 0},
        {"points_per_side": None, "point_grids": (((0.0, 1.0),),)},
    ],
)
def test_good_settings(settings: dict[str, Any]) -> None:
    AmgConfig(**settings)


def test_default_profile_has_the_defaults_of_the_reference() -> None:
    assert AmgConfig.for_profile("default") == AmgConfig()
    assert AmgConfig() == AmgConfig(
        points_per_side=32,
        points_per_batch=64,
        pred_iou_thresh=0.88,
        stability_score_thresh=0.95,
        stability_score_offset=1.0,
        box_nms_thresh=0.7,
        crop_n_layers=0,
        crop_nms_thresh=0.7,
        crop_overlap_ratio=512 / 1500,
        crop_n_points_downscale_factor=1,
        point_grids=None,
        min_mask_region_area=0,
    )


def test_sa1b_profile_has_the_prompts_of_the_paper() -> None:
    """Segment Anything, appendix B: 32x32 points on the image, 16x16 on 4 crops and 8x8 on 16."""
    config = AmgConfig.for_profile("sa1b")
    assert [len(grid) for grid in layer_point_grids(config)] == [32**2, 16**2, 8**2]
    assert config.max_mask_area_fraction == 0.95
    assert config.min_mask_region_area == config.min_mask_area == 100


def test_profile_gives_way_to_what_is_set() -> None:
    config = AmgConfig.for_profile("sa1b", crop_n_layers=1, points_per_side=20)
    assert (config.crop_n_layers, config.points_per_side, config.min_mask_region_area) == (1, 20, 100)


def test_unknown_profile() -> None:
    with pytest.raises(ValueError, match="profile must be one of default, sa1b, got sa2b"):
        AmgConfig.for_profile("sa2b")


# Prompts


def test_one_grid_a_layer() -> None:
    grids = layer_point_grids(AmgConfig(points_per_side=6, crop_n_layers=1, crop_n_points_downscale_factor=2))
    np.testing.assert_array_equal(grids[0], build_point_grid(6))
    np.testing.assert_array_equal(grids[1], build_point_grid(3))


def test_own_grids_are_used_as_they_are() -> None:
    image = label_points(white(400, 800), ((0.25, 0.5), (1.0, 0.0)), CENTRE, crop_overlap_ratio=0)
    assert image.num_candidates == 3 * (2 + 4)  # 2 on the image, 1 on each of 4 crops
    on_image = {mask.prompt.points_xy[0] for mask in image.masks if mask.crop_box_xywh == (0, 0, 800, 400)}
    on_last_crop = {mask.prompt.points_xy[0] for mask in image.masks if mask.crop_box_xywh == (400, 200, 400, 200)}
    assert on_image == {(200, 200), (800, 0)}
    assert on_last_crop == {(600, 300)}


# Masks


@pytest.mark.parametrize("size_hw", [(64, 64), (128, 96), (40, 80), (300, 200)])
@pytest.mark.parametrize("point", [(0.5, 0.5), (0.3, 0.7), (0.9, 0.2)])
def test_masks_are_the_discs_around_the_point(size_hw: tuple[int, int], point: tuple[float, float]) -> None:
    height, width = size_hw
    y, x = (np.arange(side) + 0.5 for side in size_hw)
    distance = np.hypot(y[:, None] - point[1] * height, x - point[0] * width)
    masks = label_points(white(*size_hw), (point,), box_nms_thresh=1).masks
    assert len(masks) == len(RADII)
    for mask, radius in zip(masks, RADII, strict=True):
        expected, actual = distance < radius * max(size_hw) / 64, decode(mask)
        assert (expected & actual).sum() / (expected | actual).sum() > 0.88  # low-res pixels are 4 wide


def test_record_of_a_mask() -> None:
    crop_xywh = (96.0, 0.0, 96.0, 128.0)
    image = label_points(white(256, 192), ((0.1, 0.1),), CENTRE, crop_overlap_ratio=0)
    [mask] = [mask for mask in image.masks if mask.crop_box_xywh == crop_xywh and mask.predicted_iou == 1]
    ys, xs = np.nonzero(decode(mask))
    assert mask.size_hw == (256, 192)
    assert mask.prompt.points_xy[0] == (144, 64)
    assert mask.area == len(xs)
    assert mask.bbox_xywh == (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)
    assert 0 < mask.stability_score < 1
    assert all(type(value) is float for value in (mask.predicted_iou, mask.stability_score, *mask.prompt.points_xy[0]))


def test_best_predicted_iou_first() -> None:
    masks = label(noise(60, 80), points_per_side=5, box_nms_thresh=1).masks
    ious = [mask.predicted_iou for mask in masks]
    assert len(set(ious)) > 10
    assert ious == sorted(ious, reverse=True)


def test_equal_predicted_iou_in_the_order_of_the_points() -> None:
    image = label(white(60, 80), points_per_side=3, box_nms_thresh=1)
    points = (build_point_grid(3) * (80, 60)).tolist()
    assert [list(mask.prompt.points_xy[0]) for mask in image.masks] == points * 3
    assert [mask.predicted_iou for mask in image.masks] == [
        float(np.float32(iou)) for iou in WHITE_IOUS for _ in points
    ]


def test_smaller_crops_first() -> None:
    image = label(noise(200, 200), points_per_side=2, crop_n_layers=2)
    areas = [width * height for *_, width, height in (mask.crop_box_xywh for mask in image.masks)]
    assert len(set(areas)) > 2
    assert areas == sorted(areas)


@pytest.mark.parametrize("size_hw", [(3, 2), (1, 40), (40, 1)])
def test_image_smaller_than_the_grid(size_hw: tuple[int, int]) -> None:
    image = label(noise(*size_hw), points_per_side=8)
    assert image.num_candidates == 3 * 64
    assert image.masks
    assert all(decode(mask).shape == size_hw for mask in image.masks)


@pytest.mark.parametrize(("crop_n_layers", "crops"), [(0, 1), (1, 2), (2, 3)])
def test_image_of_one_pixel(crop_n_layers: int, crops: int) -> None:
    """Every layer has one crop that is not empty: the pixel. The box of one pixel has no area, so nothing overlaps."""
    image = label(white(1, 1), points_per_side=1, crop_n_layers=crop_n_layers)
    assert image.num_candidates == len(image.masks) == 3 * crops
    assert {(mask.counts, mask.area, mask.bbox_xywh) for mask in image.masks} == {("01", 1, (0, 0, 1, 1))}


@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_image_without_masks(crop_n_layers: int) -> None:
    """With crops the reference fails here."""
    image = label(np.zeros((50, 60, 3), np.uint8), points_per_side=2, crop_n_layers=crop_n_layers, pred_iou_thresh=0.88)
    candidates = 3 * 4 * (1 + 4 * crop_n_layers)
    assert result(image) == ((), candidates, Dropped(predicted_iou=candidates))


# Filters


@pytest.mark.parametrize(
    ("pred_iou_thresh", "kept"),
    [(-1, 3), (0, 3), (0.87, 3), (0.88, 2), (0.9, 2), (0.94, 1), (0.99, 1), (1, 0)],  # equal is not enough
)
def test_predicted_iou(pred_iou_thresh: float, kept: int) -> None:
    image = label(white(64, 64), points_per_side=4, pred_iou_thresh=pred_iou_thresh, box_nms_thresh=1)
    assert len(image.masks) == 16 * kept
    assert image.dropped == Dropped(predicted_iou=16 * (3 - kept))


@pytest.mark.parametrize(
    ("stability_score_thresh", "offset", "kept"),
    [
        # Logits fall by 2 a pixel, so that an offset of 1 moves the discs' edges by half a pixel each way: the scores
        # are about ((r - 0.5) / (r + 0.5)) ** 2 = 0.78, 0.87, 0.92.
        (0.7, 1, 3),
        (0.83, 1, 2),
        (0.9, 1, 1),
        (0.95, 1, 0),
        (1, 0, 3),  # equal is enough
        (0.01, 1000, 0),  # nothing is 1000 above the threshold
        (0, 1000, 3),  # switched off
        (-1, 1000, 3),
    ],
)
def test_stability(stability_score_thresh: float, offset: float, kept: int) -> None:
    image = label_points(
        white(64, 64), CENTRE, stability_score_thresh=stability_score_thresh, stability_score_offset=offset
    )
    assert [mask.predicted_iou for mask in image.masks] == [np.float32(iou) for iou in WHITE_IOUS[3 - kept :]]
    assert image.dropped == Dropped(stability=3 - kept)


def test_empty_masks_are_kept_without_the_stability_filter() -> None:
    """Their score is 0 / 0, and their boxes have no area, so that they are no duplicates of each other."""
    image = label_drawn(drawn(), drawn(), drawn())
    assert [(mask.area, mask.bbox_xywh) for mask in image.masks] == [(0, (0, 0, 0, 0))] * 3
    assert all(np.isnan(mask.stability_score) for mask in image.masks)


def test_empty_masks_are_dropped_by_the_stability_filter() -> None:
    image = label_drawn(drawn(), drawn(), drawn(), stability_score_thresh=0.01)
    assert result(image) == ((), 3, Dropped(stability=3))


def test_crop_edge() -> None:
    """In a crop of 128 pixels the largest disc, of radius 48, comes within 16 of the edges; two of them are inner."""
    image = label_points(white(256, 256), CENTRE, CENTRE, crop_overlap_ratio=0)
    assert image.dropped == Dropped(crop_edge=4)
    assert len(image.masks) == 3 + 4 * 2


@pytest.mark.parametrize("nms_by", ["box", "mask"])
@pytest.mark.parametrize(
    ("box_nms_thresh", "kept"),
    [
        (1, 6),  # never above 1
        (0.7, 3),  # the same point twice: only the twins overlap so much, the discs by about (8 / 14)**2, (14 / 24)**2
        (0.2, 2),  # the middle disc overlaps both others, the smallest and the largest by (8 / 24)**2
        (0, 1),
    ],
)
def test_duplicates_within_a_crop(box_nms_thresh: float, kept: int, nms_by: str) -> None:
    image = label_points(white(256, 256), CENTRE * 2, box_nms_thresh=box_nms_thresh, nms_by=nms_by)
    assert len(image.masks) == kept
    assert image.dropped == Dropped(box_nms=6 - kept)


@pytest.mark.parametrize("nms_by", ["box", "mask"])
@pytest.mark.parametrize(("crop_nms_thresh", "crop_nms"), [(0.65, 1), (0.85, 0)])
def test_duplicates_between_crops(crop_nms_thresh: float, crop_nms: int, nms_by: str) -> None:
    """At (64, 64) the image has a disc of radius 8 * 4, its first crop one of 14 * 2: IoU about (28 / 32)**2 = 0.77."""
    image = label_points(
        white(256, 256), ((0.25, 0.25),), CENTRE, crop_overlap_ratio=0, crop_nms_thresh=crop_nms_thresh, nms_by=nms_by
    )
    assert image.dropped == Dropped(crop_edge=4, crop_nms=crop_nms)
    smallest_on_image = [mask for mask in image.masks if mask.crop_box_xywh[2] == 256 and mask.predicted_iou == 1]
    assert len(smallest_on_image) == 1 - crop_nms  # the crop's own stays, though its predicted IoU is lower


@pytest.mark.parametrize(("nms_by", "box_nms"), [("box", 1), ("mask", 0)])
def test_thin_mask_in_the_box_of_another_survives_only_mask_nms(nms_by: str, box_nms: int) -> None:
    square, diagonal, far = (
        drawn((2, 2, 10, 10)),
        drawn(*[(i, i, i + 1, i + 1) for i in range(2, 10)]),
        drawn((12, 12, 16, 16)),
    )
    image = label_drawn(square, diagonal, far, nms_by=nms_by)
    assert image.dropped == Dropped(box_nms=box_nms)
    assert [mask.area for mask in image.masks] == ([64, 16] if box_nms else [64, 8, 16])


# Small regions


BLOCK, ISLAND = (2, 2, 10, 10), (14, 14, 15, 15)


@pytest.mark.parametrize(("min_mask_region_area", "expected_area"), [(0, 65), (1, 65), (2, 64), (64, 64)])
def test_islands_below_the_limit_are_removed(min_mask_region_area: int, expected_area: int) -> None:
    masks = label_drawn(drawn(BLOCK, ISLAND), drawn(), drawn(), min_mask_region_area=min_mask_region_area).masks
    assert max(mask.area for mask in masks) == expected_area


def test_edited_masks_come_last_and_keep_their_scores() -> None:
    holed, plain = drawn((0, 12, 8, 16)) & ~drawn((3, 13, 4, 14)), drawn(BLOCK)
    [before, *_] = label_drawn(holed, plain, drawn()).masks
    untouched, empty, filled = label_drawn(holed, plain, drawn(), min_mask_region_area=2).masks
    assert (untouched.area, empty.area) == (64, 0)
    np.testing.assert_array_equal(decode(filled), drawn((0, 12, 8, 16)))
    assert filled == replace(before, counts=filled.counts, area=32)


def test_box_is_taken_anew_without_the_islands() -> None:
    [mask] = [
        mask for mask in label_drawn(drawn(BLOCK, ISLAND), drawn(), drawn(), min_mask_region_area=2).masks if mask.area
    ]
    assert mask.bbox_xywh == (2, 2, 8, 8)


@pytest.mark.parametrize(
    ("box_nms_thresh", "crop_nms_thresh", "small_region"),
    [(0.5, 0.5, 1), (0.5, 0.7, 0), (0.7, 0.5, 0), (0.55, 0.5, 1)],  # the higher of the two counts
)
def test_edited_masks_that_became_duplicates_go(
    box_nms_thresh: float, crop_nms_thresh: float, small_region: int
) -> None:
    """Boxes of 7 x 4 and 7 x 7 in the reference's measure: IoU 0.57. With the island it was 49 / 144."""
    islanded, plain = drawn((2, 2, 10, 7), ISLAND), drawn(BLOCK)
    image = label_drawn(
        islanded,
        plain,
        drawn(),
        min_mask_region_area=2,
        box_nms_thresh=box_nms_thresh,
        crop_nms_thresh=crop_nms_thresh,
    )
    assert image.dropped == Dropped(small_region=small_region)
    assert [mask.area for mask in image.masks if mask.area] == [64, 40][: 2 - small_region]


def test_edited_masks_one_pixel_wide_are_no_duplicates() -> None:
    """In the reference's measure their boxes have no area."""
    line = (5, 2, 6, 9)
    image = label_drawn(drawn(line, ISLAND), drawn(line, (10, 0, 11, 1)), drawn(), min_mask_region_area=2)
    assert image.dropped == Dropped()
    assert [mask.area for mask in image.masks] == [0, 7, 7]


# Beyond the reference


@pytest.mark.parametrize(
    ("limit", "unit", "keep"),
    [
        ("min_mask_area", 1, np.greater_equal),
        ("max_mask_area", 1, np.less_equal),
        ("min_mask_area_fraction", 64 * 64, np.greater_equal),
        ("max_mask_area_fraction", 64 * 64, np.less),
    ],
)
def test_area_limits(limit: str, unit: int, keep: np.ufunc) -> None:
    """The limit is the area of one of the masks, so that equality is tested too."""
    settings: dict[str, Any] = {"points_per_side": 4, "box_nms_thresh": 1}
    areas = np.array([mask.area for mask in label(white(64, 64), **settings).masks])
    area = np.sort(areas)[len(areas) // 2]
    expected = areas[keep(areas, area)]
    assert 0 < len(expected) < len(areas)

    image = label(white(64, 64), **settings, **{limit: area / unit})
    assert [mask.area for mask in image.masks] == expected.tolist()
    assert image.dropped == Dropped(area=len(areas) - len(expected))


@pytest.mark.parametrize("max_masks", [1, 5, 1000])
def test_max_masks_keeps_the_best_in_order(max_masks: int) -> None:
    """With crops masks are not in the order of their predicted IoU."""
    settings: dict[str, Any] = {"points_per_side": 3, "crop_n_layers": 1, "box_nms_thresh": 1}
    everything = label(noise(90, 120), **settings).masks
    ious = [mask.predicted_iou for mask in everything]
    assert ious != sorted(ious, reverse=True)
    best = sorted(range(len(ious)), key=lambda i: -ious[i])[:max_masks]

    image = label(noise(90, 120), **settings, max_masks=max_masks)
    assert image.masks == tuple(everything[i] for i in sorted(best))
    assert image.dropped.max_masks == max(len(everything) - max_masks, 0)


# What must not matter, and what must add up

any_settings = st.fixed_dictionaries(
    {
        "points_per_side": st.integers(1, 4),
        "points_per_batch": st.integers(1, 20),
        "pred_iou_thresh": st.sampled_from([0, 0.75, 0.85]),
        "stability_score_thresh": st.sampled_from([0, 0.8, 0.9]),
        "stability_score_offset": st.sampled_from([0.5, 1]),
        "mask_threshold": st.sampled_from([-3.0, 0.0, 4.0]),
        "box_nms_thresh": st.sampled_from([0, 0.4, 0.7]),
        "crop_nms_thresh": st.sampled_from([0.1, 0.7]),
        "crop_n_layers": st.integers(0, 2),
        "min_mask_region_area": st.sampled_from([0, 20, 300]),
        "nms_by": st.sampled_from(["box", "mask"]),
        "min_mask_area": st.sampled_from([0, 50]),
        "max_mask_area_fraction": st.sampled_from([1.0, 0.3]),
        "max_masks": st.sampled_from([None, 4]),
    }
)
any_image = st.builds(noise, st.integers(1, 100), st.integers(1, 100), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(pixels=any_image, amg_settings=any_settings)
def test_every_candidate_is_a_mask_or_was_dropped(pixels: np.ndarray, amg_settings: dict[str, Any]) -> None:
    config = AmgConfig(**amg_settings)
    crops = generate_crop_boxes(pixels.shape[:2], config.crop_n_layers, config.crop_overlap_ratio)
    image = label_image(FakeSam(), pixels, config)
    assert image.num_candidates == 3 * amg_settings["points_per_side"] ** 2 * len(crops)
    assert image.num_candidates == len(image.masks) + image.dropped.total()


@settings(max_examples=30, deadline=None)
@given(pixels=any_image, amg_settings=any_settings, points_per_batch=st.integers(1, 20))
def test_points_per_batch_does_not_matter(
    pixels: np.ndarray, amg_settings: dict[str, Any], points_per_batch: int
) -> None:
    one, other = (
        label_image(FakeSam(), pixels, AmgConfig(**{**amg_settings, "points_per_batch": number}))
        for number in (amg_settings["points_per_batch"], points_per_batch)
    )
    assert repr(result(one)) == repr(result(other))  # NaN is not equal to itself


def test_threads_do_not_matter() -> None:
    config = AmgConfig(points_per_side=8, points_per_batch=3, crop_n_layers=1, **NO_FILTERS)
    pixels = noise(90, 120)
    with ThreadPoolExecutor(4) as executor:
        threaded = label_image(FakeSam(), pixels, config, executor.submit)
    assert result(threaded) == result(label_image(FakeSam(), pixels, config))


def test_model_gets_at_most_points_per_batch_points_and_returns_only_what_passed() -> None:
    class CountingSam(FakeSam):
        def __init__(self) -> None:
            self.points: list[int] = []
            self.logits: list[list[int]] = []

        def score(self, context: np.ndarray, points_xy: np.ndarray, points_per_batch: int) -> FakeScored:
            self.points.append(len(points_xy))
            return super().score(context, points_xy, points_per_batch)

        def low_res_logits(self, scored: FakeScored, prompts: np.ndarray) -> np.ndarray:
            self.logits.append(prompts.tolist())
            return super().low_res_logits(scored, prompts)

    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32] = 255  # the left two of the four points in each row
    sam = CountingSam()
    label(pixels, sam=sam, points_per_side=4, points_per_batch=6, pred_iou_thresh=0.88)
    assert sam.points == [6, 6, 4]
    assert sam.logits == [[0, 1, 4, 5], [2, 3], [0, 1]]


@pytest.mark.parametrize("threads", [False, True])
def test_error_in_a_measurement_is_raised(threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise ArithmeticError("broken")

    monkeypatch.setattr(amg, "measure_mask", broken)
    config = AmgConfig(points_per_side=2, **NO_FILTERS)
    with ThreadPoolExecutor(1) as executor, pytest.raises(ArithmeticError, match="broken"):
        label_image(FakeSam(), white(8, 8), config, executor.submit if threads else call_now)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_answers_that_are_no_numbers_are_errors_and_not_dropped_masks(bad: float) -> None:
    class Sick(FakeSam):
        def score(self, context: np.ndarray, points_xy: np.ndarray, points_per_batch: int) -> FakeScored:
            scored = super().score(context, points_xy, points_per_batch)
            return FakeScored(scored.points_xy, np.full_like(scored.iou, bad))

    with pytest.raises(ModelOutputError, match="predicted IoU is not finite"):
        label_image(Sick(), np.zeros((48, 64, 3), np.uint8), AmgConfig(points_per_side=2))


def test_logits_that_are_no_numbers_are_errors() -> None:
    class Sick(FakeSam):
        def low_res_logits(self, scored: FakeScored, prompts: np.ndarray) -> np.ndarray:
            return np.full_like(super().low_res_logits(scored, prompts), np.nan)

    with pytest.raises(ModelOutputError, match="mask logits are not finite"):
        label_image(Sick(), np.zeros((48, 64, 3), np.uint8), AmgConfig(points_per_side=2, pred_iou_thresh=0.0))


@pytest.mark.parametrize(
    "bad",
    [
        {"pred_iou_thresh": 88},
        {"stability_score_thresh": 95},
        {"pred_iou_thresh": float("nan")},
        {"mask_threshold": float("nan")},
        {"min_mask_area": 100, "max_mask_area": 10},
    ],
)
def test_settings_that_would_keep_nothing_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        AmgConfig(**bad)  # type: ignore[arg-type]
