"""Reading a truth: pycocotools' own masks of polygons and RLE, and every way in which a file can be wrong."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from maskbeam.transforms.evaluation.truth import parse_instances

POLYGONS = [[1.0, 1.0, 8.0, 1.0, 4.5, 6.5], [6, 4, 11, 4, 11, 9, 6, 9]]
COMPRESSED = {"size": [10, 12], "counts": coco_mask.frPyObjects(POLYGONS, 10, 12)[1]["counts"].decode()}
TRUTH: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "height": 10, "width": 12},
        {"id": 3, "file_name": "b/c.jpg", "height": 5, "width": 4},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "segmentation": POLYGONS, "bbox": [1, 1, 10, 8], "area": 37.5, "iscrowd": 0},
        {"id": 2, "image_id": 7, "segmentation": COMPRESSED, "bbox": [6, 4, 5, 5], "area": 25},
        {
            "id": 5,
            "image_id": 7,
            "segmentation": {"size": [10, 12], "counts": [3, 4, 113]},
            "bbox": [0, 3, 1, 4],
            "area": 4,
            "iscrowd": 0,
        },
        {"id": 6, "image_id": 7, "segmentation": {"counts": "?"}, "iscrowd": 1},
    ],
}


def test_masks_are_pycocotools_own() -> None:
    image = parse_instances(TRUTH)["a.jpg"]
    coco = COCO()
    coco.dataset = copy.deepcopy(TRUTH)
    coco.createIndex()
    objects = image.objects()
    assert [one.annotation_id for one in objects] == [1, 2, 5]
    for one, annotation in zip(objects, coco.loadAnns([1, 2, 5]), strict=True):
        actual = coco_mask.decode({"size": list(image.size_hw), "counts": one.counts})
        assert (actual == coco.annToMask(annotation)).all() and actual.any()
    assert [one.area for one in objects] == [37.5, 25, 4]
    assert [one.bbox_xywh for one in objects] == [(1, 1, 10, 8), (6, 4, 5, 5), (0, 3, 1, 4)]


def test_images_and_crowd_regions() -> None:
    truth = parse_instances(TRUTH)
    assert list(truth) == ["a.jpg", "b/c.jpg"]
    assert [(image.image_id, image.size_hw, image.num_crowds) for image in truth.values()] == [
        (7, (10, 12), 1),
        (3, (5, 4), 0),
    ]
    assert truth["b/c.jpg"].objects() == []


def changed(where: str, index: int, **values: Any) -> dict[str, Any]:
    truth = copy.deepcopy(TRUTH)
    truth[where][index].update(values)
    return truth


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([], 'no list "images"'),
        ({"images": []}, 'no list "annotations"'),
        (changed("images", 1, id=7), "two image records have the id 7"),
        (changed("images", 1, id=None), "has no id that is a number or a string"),
        (changed("images", 1, file_name="a.jpg"), "two images with the file_name a.jpg: ids 7, 3"),
        (changed("images", 0, height=None), "id 7 has width 12 and height None"),
        (changed("images", 0, width=True), "id 7 has width True"),
        (changed("images", 0, width=2**31), "id 7 has width 2147483648"),
        (changed("images", 0, width=2**30), "id 7 has 1073741824 x 10 pixels"),
        (changed("images", 0, file_name=None), "id 7 has file_name None"),
        (changed("annotations", 1, id=1), "two annotation records have the id 1"),
        (changed("annotations", 1, image_id=8), "id 2 has image_id 8, but there is no such image"),
        (changed("annotations", 1, iscrowd=2), "id 2 has iscrowd 2"),
        ({"images": [3], "annotations": []}, "image record 3 has no id"),
    ],
)
def test_a_file_that_is_no_truth_is_an_error(content: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_instances(content)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"segmentation": None}, "neither a list of polygons nor an RLE"),
        ({"segmentation": [["1", "2"]]}, "not lists of numbers"),
        ({"segmentation": ["123456"]}, "not lists of numbers"),
        ({"segmentation": [[1, 1, 4, 4, True, 4]]}, "not lists of numbers"),
        ({"segmentation": [[1, 1, 4, 4, math.nan, 4]]}, "not lists of numbers"),
        ({"segmentation": [[1, 1, 4, 4, 10**400, 4]]}, "not lists of numbers"),
        ({"segmentation": [[1, 1, 4, 4, 1, 21]]}, "far outside the image of 12 x 10"),
        ({"segmentation": []}, "at least one"),
        ({"segmentation": [[1, 1, 4, 4]]}, r"polygons of \[4\] numbers"),  # pycocotools takes it for a box
        ({"segmentation": {"size": [12, 10], "counts": "0"}}, r"size \[12, 10\], the image .* \[10, 12\]"),
        ({"segmentation": {"size": [10, 12], "counts": [3, 4]}}, "the runs have 7 pixels"),
        ({"segmentation": {"size": [10, 12], "counts": "22"}}, "the runs have 4 pixels"),
        (
            {"segmentation": {"size": [10, 12], "counts": [10**30]}},
            "the runs have 10{30} pixels",
        ),
        ({"segmentation": {"size": [10, 12]}}, "neither a list of polygons nor an RLE"),
        ({"segmentation": {"size": [10, 12], "counts": [True, 119]}}, "neither a string nor a list of whole numbers"),
        ({"bbox": [1, 2, 3]}, "bbox is .*; expected 4 numbers"),
        ({"bbox": None}, "bbox is None; expected 4 numbers"),
        ({"area": "large"}, "area is 'large'; expected a number"),
        ({"area": 10**400}, "area is 1000+; expected a number"),
        ({"area": -1}, "area is -1; expected a number that is not negative"),
        ({"bbox": [1, 1, -3, 3]}, "bbox is .*, neither side negative"),
        ({"bbox": [1, 1, math.inf, 3]}, "bbox is .*; expected 4 numbers"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_named(values: dict[str, Any], told: str) -> None:
    image = parse_instances(changed("annotations", 1, **values))["a.jpg"]
    with pytest.raises(ValueError, match=rf"annotation 2 of a\.jpg: .*{told}"):
        image.objects()
