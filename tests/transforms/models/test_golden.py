"""The reference's masks: the golden fixture (tests/golden/README.md) against our generator and our post-processing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskbeam.transforms.labels.refine import refine_chunk
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.labels.schema import chunk_to_candidates, chunk_to_tables
from maskbeam.transforms.masks.amg import AmgConfig, Sam, label_image
from maskbeam.transforms.masks.containment import ContainmentConfig
from maskbeam.transforms.masks.rle import counts_to_mask
from maskbeam.transforms.models.sam.model import load_sam
from maskbeam.transforms.records import ChunkReport, EncodedImage, LabeledChunk, LabeledImage, Mask, Shard
from tests.fakes import StoredSam

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
STORED_LOGITS = sorted(path.stem for path in GOLDEN.glob("*.npz"))


def read_case(name: str) -> dict[str, Any]:
    case: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return case


def read_pixels(case: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(GOLDEN / case["photo"]).convert("RGB"))


def as_record(mask: Mask) -> dict[str, Any]:
    """A mask as the reference's generator gives it; its boxes are those of inclusive pixel indices."""
    x, y, w, h = mask.bbox_xywh
    return {
        "segmentation": {"size": list(mask.size_hw), "counts": mask.counts},
        "area": mask.area,
        "bbox": [x, y, w - 1, h - 1] if mask.area else [0, 0, 0, 0],
        "predicted_iou": mask.predicted_iou,
        "point_coords": [list(xy) for xy in mask.prompt.points_xy],
        "stability_score": mask.stability_score,
        "crop_box": list(mask.crop_box_xywh),
    }


@pytest.fixture(scope="module")
def sam() -> Sam:
    return load_sam(str(GOLDEN / "sam_128"))


@pytest.mark.parametrize("name", STORED_LOGITS)
def test_same_logits_give_identical_records(name: str) -> None:
    case = read_case(name)
    with np.load(GOLDEN / f"{name}.npz") as stored:
        fake: Any = StoredSam(dict(stored), frame_size=128)
    actual = label_image(fake, read_pixels(case), AmgConfig(**case["settings"]))
    expected = [{**record, "bbox": [float(v) for v in record["bbox"]]} for record in case["masks"]]
    assert [as_record(mask) for mask in actual.masks] == expected


@pytest.mark.parametrize("name", CASES)
def test_end_to_end_gives_the_same_masks_in_the_same_order(name: str, sam: Sam) -> None:
    case = read_case(name)
    actual = label_image(sam, read_pixels(case), AmgConfig(**case["settings"])).masks
    assert [mask.prompt.points_xy for mask in actual] == [
        tuple(map(tuple, record["point_coords"])) for record in case["masks"]
    ]
    assert [mask.crop_box_xywh for mask in actual] == [tuple(record["crop_box"]) for record in case["masks"]]
    expected_iou = [record["predicted_iou"] for record in case["masks"]]
    np.testing.assert_allclose([mask.predicted_iou for mask in actual], expected_iou, atol=1e-5)
    # A pixel at one of the two thresholds may change sides.
    for mask, record in zip(actual, case["masks"], strict=True):
        tolerance = 1.01 / max(mask.area, 1)
        assert mask.stability_score == pytest.approx(record["stability_score"], abs=tolerance, nan_ok=True)


def test_end_to_end_masks_are_identical_but_for_rounding(sam: Sam) -> None:
    identical = differing_pixels = total = 0
    for name in CASES:
        case = read_case(name)
        actual = label_image(sam, read_pixels(case), AmgConfig(**case["settings"])).masks
        for mask, record in zip(actual, case["masks"], strict=True):
            expected = record["segmentation"]["counts"]
            total += 1
            identical += mask.counts == expected
            differs = counts_to_mask(mask.counts, mask.size_hw) ^ counts_to_mask(expected, mask.size_hw)
            differing_pixels += int(differs.sum())
    assert identical >= 0.97 * total  # the contract
    assert differing_pixels <= total - identical  # every difference measured so far is one pixel


@pytest.mark.parametrize("name", CASES)
def test_each_filter_drops_what_the_reference_drops(name: str, sam: Sam) -> None:
    case = read_case(name)
    actual = label_image(sam, read_pixels(case), AmgConfig(**case["settings"]))
    assert {name: count for name, count in vars(actual.dropped).items() if count} == case["dropped"]
    assert actual.num_candidates == case["num_candidates"] == len(actual.masks) + actual.dropped.total()


# What each golden case is refined to, beside its own settings.
CHANGES: list[dict[str, Any]] = [
    {},
    {"nms_by": "mask", "box_nms_thresh": 0.5},
    {"min_mask_region_area": 40, "min_mask_area": 30, "max_masks": 20},
]


@pytest.mark.parametrize("name", CASES)
def test_refined_candidates_are_what_label_gives(name: str, sam: Sam) -> None:
    """Labeled once at half the thresholds, refined to the case's own and to others."""
    case = read_case(name)
    config, pixels = AmgConfig(**case["settings"]), read_pixels(case)
    bars = {f"candidate_{name}": getattr(config, name) / 2 for name in ("pred_iou_thresh", "stability_score_thresh")}
    kept = label_image(sam, pixels, replace(config, keep_candidates=True, **bars))
    image = LabeledImage(
        EncodedImage("a.png", 0, None, None, b""),
        0,
        "",
        (pixels.shape[0], pixels.shape[1]),
        1,
        kept.masks,
        kept.num_candidates,
        kept.dropped,
        candidates=kept.candidates,
    )
    chunk = LabeledChunk.of(Shard("a", "/a", "image", ()), 0, (image,), True, "", keep_candidates=True)
    report = ChunkReport("a", 0, True, "", "", chunk.totals())
    images, candidates = chunk_to_tables(chunk, report, Run())[1], chunk_to_candidates(chunk, report, Run())
    assert len(candidates) > len(kept.masks)
    for changes in CHANGES:
        wanted = replace(config, **changes)
        (refined,) = refine_chunk(images, candidates, wanted, ContainmentConfig())
        directly = label_image(sam, pixels, wanted) if changes else kept
        # As text, since some stabilities are NaN.
        assert repr([replace(mask, parent_id=None) for mask in refined.masks]) == repr(list(directly.masks))
        assert (refined.num_candidates, refined.dropped) == (directly.num_candidates, directly.dropped)


@pytest.mark.parametrize("name", CASES)
def test_keeping_candidates_changes_no_mask(name: str, sam: Sam) -> None:
    case = read_case(name)
    config, pixels = AmgConfig(**case["settings"]), read_pixels(case)
    kept = label_image(sam, pixels, replace(config, keep_candidates=True))
    directly = label_image(sam, pixels, config)
    assert repr(kept.masks) == repr(directly.masks)
    assert (kept.num_candidates, kept.dropped) == (directly.num_candidates, directly.dropped)
