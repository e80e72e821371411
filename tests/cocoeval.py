"""pycocotools' own evaluation, for tests that hold ours against it."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskbeam.transforms.evaluation.recall import AREA_RANGES, MAX_PROPOSALS, Figure, Recall


def cocoeval_recall(truth: dict[str, Any], results: list[dict[str, Any]], kind: str) -> np.ndarray:
    """Recall of class-agnostic results: (10 thresholds, 4 sizes, 3 numbers of proposals), NaN where there is no object.

    Args:
      truth: COCO instances.
      results: as for COCO.loadRes, with image_id, segmentation and score.
      kind: "segm" or "bbox".
    """
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = copy.deepcopy({"categories": [{"id": 1}], "info": {}, **truth})
        ground_truth.createIndex()
        found = COCO()  # loadRes does not take an empty list
        found.dataset = {**ground_truth.dataset, "annotations": []}
        found.createIndex()
        if results:
            found = ground_truth.loadRes([{"category_id": 1, **result} for result in results])
        evaluation = COCOeval(ground_truth, found, kind)
        evaluation.params.useCats = 0
        evaluation.params.maxDets = list(MAX_PROPOSALS)
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0]
    return np.where(recall < 0, np.nan, recall)


def assert_equal_to_cocoeval(recall: Recall, truth: dict[str, Any], results: list[dict[str, Any]]) -> None:
    for kind, ours in (("segm", recall.mask_ar), ("bbox", recall.box_ar)):
        expected = cocoeval_recall(truth, results, kind).mean(axis=0)
        actual = [[ours[size][count].value for count in MAX_PROPOSALS] for size in AREA_RANGES]
        np.testing.assert_allclose(np.array(actual, float), expected, rtol=0, atol=1e-12)
    curves = [values(recall.mask_recall[count]) for count in MAX_PROPOSALS]
    np.testing.assert_allclose(curves, cocoeval_recall(truth, results, "segm")[:, 0].T, rtol=0, atol=1e-12)


def values(figures: list[Figure]) -> np.ndarray:
    return np.array([figure.value for figure in figures], float)
