from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from maskbeam.transforms.formats.file_names import file_names
from maskbeam.transforms.formats.label_picture import Overlap, label_picture
from maskbeam.transforms.formats.polygons import PolygonLoss
from maskbeam.transforms.formats.yolo import YoloLoss, yolo_text

texts = st.text(st.sampled_from("a./\\%~\0\n\x7fé .jpg"), max_size=12)


def mask_row(bits: np.ndarray, mask_index: int, **others: Any) -> dict[str, Any]:
    """A row of the annotations table, as far as formats look at it."""
    rle = coco_mask.encode(np.asfortranarray(bits, np.uint8))
    segmentation = {"size": list(bits.shape), "counts": rle["counts"].decode()}
    row = {"image_id": "a.png", "mask_index": mask_index, "segmentation": segmentation, "area": int(bits.sum())}
    return {**row, "category_id": 1, "iscrowd": 0, **others}


def square(top: int, left: int, side: int) -> np.ndarray:
    bits = np.zeros((6, 8), bool)
    bits[top : top + side, left : left + side] = True
    return bits


@settings(deadline=None)
@given(texts, texts)
@example("../../x.jpg", "..")
@example("a/" * 50000, "/" * 100000)
@example("x" * 100000 + ".jpg", "\U0001f600" * 100)
def test_file_names_stay_inside_and_fit(file_name: str, image_id: str) -> None:
    for name in file_names(file_name, image_id, ".txt"):
        path = PurePosixPath(name)
        assert not path.is_absolute() and ".." not in path.parts and name.endswith(".txt")
        assert str(path) == name  # nothing that a file system would leave out, as "//" and "/./"
        assert all(0 < len(part.encode()) <= 255 for part in path.parts) and len(name.encode()) < 1100
        assert name.isprintable()


@settings(deadline=None)
@given(texts, texts)
@example("", "%")
@example(".", "%2E")
@example("a//b", "a/%/b")
@example("a/" * 50000, "a/" * 50000 + "b")
def test_different_ids_have_different_names(one: str, other: str) -> None:
    names = [file_names("same", image_id, ".txt")[1:] for image_id in (one, other)]
    assert one == other or not set(names[0]) & set(names[1])


@pytest.mark.parametrize("name", ["a", "cats/a b", "~a", "50% of ü", "_a.b"])
def test_names_of_images_are_those_of_their_labels(name: str) -> None:
    assert unquote(file_names(f"{name}.jpg", "x", ".txt")[0].replace("% ", "%25 ")) == f"{name}.txt"


def test_of_overlapping_masks_the_smallest_is_shown() -> None:
    large, small, same = square(0, 0, 4), square(1, 1, 2), square(1, 1, 2)
    overlap = Overlap()
    masks = [mask_row(small, 0), mask_row(large, 1), mask_row(same, 2), mask_row(square(5, 7, 0), 3)]
    picture = label_picture(masks, (6, 8), overlap)
    assert picture.dtype == np.uint16
    np.testing.assert_array_equal(picture, np.where(small, 1, np.where(large, 2, 0)))
    # Of the large one's 16 pixels the small one hides 4, and of the other small one all 4; an empty one has none.
    assert overlap == Overlap(pixels=4 + 16 + 4, hidden_pixels=4 + 4, hidden_masks=1)


def test_too_many_masks_for_a_picture_are_an_error() -> None:
    label_picture([mask_row(square(0, 0, 1), 65534)], (6, 8), Overlap())
    with pytest.raises(ValueError, match=r"a\.png has 1 masks"):
        label_picture([mask_row(square(0, 0, 1), 65535)], (6, 8), Overlap())


def test_yolo_has_a_line_for_each_object() -> None:
    loss = YoloLoss(PolygonLoss())
    masks = [
        mask_row(square(0, 4, 3), 0, category_id=7),
        mask_row(square(0, 0, 0), 1),
        mask_row(square(0, 0, 1), 2, iscrowd=1),
        mask_row(square(5, 7, 1), 3),
    ]
    assert yolo_text(masks, {1: 0, 7: 1}, loss) == (
        "1 0.500000 0.000000 0.875000 0.000000 0.875000 0.500000 0.500000 0.500000\n"
        "0 0.875000 0.833333 1.000000 0.833333 1.000000 1.000000 0.875000 1.000000\n"
    )
    assert (loss.crowds, loss.empty) == (1, 1)
    assert loss.polygons == PolygonLoss(polygons=2, sum_iou=2.0)
