"""Average recall: COCOeval's on the same input, matches worked out by hand, intervals of known distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskbeam.transforms.evaluation.recall import (
    Figure,
    ImageRecall,
    bootstrap_means,
    image_recall,
    match_proposals,
    summarize_recall,
)
from maskbeam.transforms.evaluation.truth import parse_instances
from maskbeam.transforms.masks import rle
from tests.cocoeval import assert_equal_to_cocoeval

SIZE_HW = (120, 160)


def random_mask(rng: np.random.Generator) -> dict[str, Any]:
    """RLE of a rectangle of any size, or of the lower triangle of one."""
    bits = np.zeros(SIZE_HW, np.uint8, order="F")
    x, y = rng.integers(0, 150), rng.integers(0, 110)
    w, h = (2 ** rng.uniform(1, 7.3, 2)).astype(int)
    bits[y : y + h, x : x + w] = 1
    if rng.random() < 0.3:
        bits &= np.tri(*SIZE_HW, k=int(x - y)).astype(np.uint8)
    if not bits.any():
        bits[y, x] = 1
    encoded = coco_mask.encode(bits)
    return {"size": list(SIZE_HW), "counts": encoded["counts"].decode()}


def moved(segmentation: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """The mask up to a pixel away: what a model finds of it."""
    bits = coco_mask.decode(segmentation)
    shifted = np.roll(bits, rng.integers(-1, 2, 2), axis=(0, 1))
    return {"size": list(SIZE_HW), "counts": coco_mask.encode(np.asfortranarray(shifted))["counts"].decode()}


def as_annotation(number: int, image_id: int, segmentation: dict[str, Any], iscrowd: int) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 1,
        "segmentation": segmentation,
        "bbox": coco_mask.toBbox(segmentation).tolist(),
        "area": float(coco_mask.area(segmentation)),
        "iscrowd": iscrowd,
    }


def random_case(seed: int, max_proposals: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A truth of six images, and results: moved objects, the same twice, crowds, others, most scores several times.

    The first image has no object, the second no result, the third only crowd regions.
    """
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    results = []
    for image_id in range(1, 7):
        masks = [random_mask(rng) for _ in range(0 if image_id == 1 else rng.integers(1, 9))]
        masks += masks[:1]  # two objects of the same pixels
        for mask in masks:
            iscrowd = int(image_id == 3 or rng.random() < 0.2)
            annotations.append(as_annotation(len(annotations) + 1, image_id, mask, iscrowd))
        if image_id == 2:
            continue
        for _ in range(rng.integers(1, max_proposals)):
            likely = masks and rng.random() < 0.5
            mask = moved(masks[rng.integers(len(masks))], rng) if likely else random_mask(rng)
            results.append({"image_id": image_id, "segmentation": mask, "score": round(rng.random(), 1)})
    images = [{"id": i, "file_name": f"{i}.png", "height": SIZE_HW[0], "width": SIZE_HW[1]} for i in range(1, 7)]
    return {"images": images, "annotations": annotations}, results


def recall_of(truth: dict[str, Any], results: list[dict[str, Any]]) -> list[ImageRecall]:
    """Ours, for results as pycocotools takes them; equal scores in the order of the list."""
    images = []
    for image in parse_instances(truth).values():
        ranked = sorted((r for r in results if r["image_id"] == image.image_id), key=lambda r: -r["score"])
        masks, objects = [result["segmentation"] for result in ranked], image.objects()
        boxes_xywh = coco_mask.toBbox(masks) if masks else np.zeros((0, 4))
        images.append(
            image_recall(
                rle.ious([mask["counts"] for mask in masks], [one.counts for one in objects], SIZE_HW),
                rle.box_ious(boxes_xywh, np.array([one.bbox_xywh for one in objects]).reshape(-1, 4)),
                np.array([one.area for one in objects]),
            )
        )
    return images


@pytest.mark.parametrize("max_proposals", [12, 150])
@pytest.mark.parametrize("seed", range(6))
def test_the_figures_are_cocoevals(seed: int, max_proposals: int) -> None:
    truth, results = random_case(seed, max_proposals)
    recall = summarize_recall(recall_of(truth, results), seed=0)
    assert 0.1 < (recall.mask_ar["all"][10].value or 0) < 0.95
    assert_equal_to_cocoeval(recall, truth, results)


def test_objects_at_the_border_of_two_sizes_are_of_both() -> None:
    truth, results = random_case(0, 20)
    for annotation, area in zip(truth["annotations"], (32**2, 96**2, 0, 32**2 + 0.5), strict=False):
        annotation.update(area=area, iscrowd=0)
    recall = summarize_recall(recall_of(truth, results), seed=0)
    assert recall.objects["small"] + recall.objects["medium"] + recall.objects["large"] == recall.objects["all"] + 2
    assert_equal_to_cocoeval(recall, truth, results)


@pytest.mark.parametrize("num_results", [0, 1])
def test_nothing_is_found_where_there_is_no_mask(num_results: int) -> None:
    """The first image has no object, but it may have a mask."""
    truth, results = random_case(1, 20)
    results = results[:num_results]
    assert all(result["image_id"] == 1 for result in results)
    recall = summarize_recall(recall_of(truth, results), seed=0)
    assert recall.mask_ar["all"][1000] == Figure(0, 0, 0) == recall.mean_best_iou["all"]
    assert_equal_to_cocoeval(recall, truth, results)


@pytest.mark.parametrize(
    ("ious", "threshold", "expected"),
    [
        ([[0.6], [0.9]], 0.5, [0]),  # the first-ranked finds it, not the better one
        ([[0.6], [0.9]], 0.7, [1]),
        ([[0.5]], 0.5, [0]),  # the threshold itself is enough
        ([[0.6, 0.8], [0.0, 0.9]], 0.5, [np.inf, 0]),  # it takes the better object, which the second wanted
        ([[0.6, 0.8], [0.7, 0.9]], 0.5, [1, 0]),
        ([[0.7, 0.7]], 0.5, [np.inf, 0]),  # of two equal ones COCOeval takes the last
        ([[0.4, 0.3]], 0.5, [np.inf, np.inf]),
        (np.zeros((0, 2)), 0.5, [np.inf, np.inf]),
        (np.zeros((2, 0)), 0.5, []),
    ],
)
def test_who_finds_what(ious: Any, threshold: float, expected: list[float]) -> None:
    assert match_proposals(np.array(ious), np.array([threshold])).tolist() == [expected]


def test_an_image_worked_out_by_hand() -> None:
    """A small object (area 100) at IoU 0.8 with the first mask, a large one at 0.62 with the twelfth, box 0.96."""
    mask_ious = np.zeros((12, 2))
    mask_ious[0, 0], mask_ious[11, 1] = 0.8, 0.62
    box_ious = np.zeros((12, 2))
    box_ious[11, 1] = 0.96
    image = image_recall(mask_ious, box_ious, np.array([100.0, 10000.0]))
    assert image.objects.tolist() == [2, 1, 0, 1]
    found = {"first ten": image.masks[0, 0], "first hundred": image.masks[0, 1]}
    assert found["first ten"].tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]  # .50 to .80
    assert found["first hundred"].tolist() == [2, 2, 2, 1, 1, 1, 1, 0, 0, 0]
    assert image.best_ious.tolist() == [0.8 + 0.62, 0.8, 0, 0.62]
    recall = summarize_recall([image], seed=0)
    assert recall.mask_ar["all"][10].value == pytest.approx(0.35)
    assert recall.mask_ar["all"][100].value == pytest.approx(0.5)
    assert recall.box_ar["all"][1000].value == pytest.approx(0.5)
    assert recall.mask_ar["medium"][1000] == Figure(None, None, None)
    assert recall.mean_best_iou["all"].value == pytest.approx(0.71)


# Intervals.


def test_the_interval_is_that_of_a_binomial() -> None:
    """400 images with one object each, a quarter found: the standard error is sqrt(.25 * .75 / 400) = 0.0217."""
    found = (np.arange(400) % 4 == 0).astype(float)
    figure = bootstrap_means(found, np.ones(400), seed=1).item()
    assert figure.value == 0.25
    assert figure.low == pytest.approx(0.25 - 1.96 * 0.0217, abs=0.005)
    assert figure.high == pytest.approx(0.25 + 1.96 * 0.0217, abs=0.005)


def test_objects_of_one_image_are_drawn_together() -> None:
    """40 images of ten objects, all found or none: as uncertain as 40 objects, not as 400."""
    found = np.where(np.arange(40) % 2, 10.0, 0.0)
    figure = bootstrap_means(found, np.full(40, 10.0), seed=1).item()
    assert figure.value == 0.5
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 40), abs=0.04)


def test_images_without_objects_change_no_value() -> None:
    found, objects = np.array([1.0, 0, 2, 0]), np.array([2.0, 1, 2, 0])
    assert bootstrap_means(found, objects, seed=0).item().value == pytest.approx(3 / 5)
    assert bootstrap_means(np.zeros(2), np.zeros(2), seed=0).item() == Figure(None, None, None)


def test_a_seed_gives_the_same_interval_however_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    found, objects = np.random.default_rng(0).integers(0, 5, (50, 7)) + 0.0, np.full((50, 1), 5.0)
    expected = bootstrap_means(found, objects, seed=3).tolist()
    assert bootstrap_means(found, objects, seed=4).tolist() != expected
    monkeypatch.setattr("maskbeam.transforms.evaluation.recall._RESAMPLED_AT_ONCE", 700)
    for actual, one in zip(bootstrap_means(found, objects, seed=3), expected, strict=True):
        assert (actual.value, actual.low, actual.high) == pytest.approx((one.value, one.low, one.high))
