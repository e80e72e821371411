"""Rows of an image become prompts in its pixels; names by which images are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.labeler import PromptError
from maskbeam.transforms.masks import rle
from maskbeam.transforms.prompt_files.config import PromptConfig
from maskbeam.transforms.prompt_files.keys import names_of, with_stems
from maskbeam.transforms.prompt_files.resolve import Resolved, above_score, resolve
from maskbeam.transforms.prompt_files.rows import make_batch
from maskbeam.transforms.records import EncodedImage

SIZE_HW = (48, 64)


def resolved(*rows: dict[str, Any], exif: int = 1, images: ImageConfig = ImageConfig(), **settings: Any) -> Resolved:
    categories = settings.pop("categories", {})
    config = PromptConfig(("a.csv",), **settings)
    return resolve(pa.Table.from_batches([make_batch(rows)]), categories, SIZE_HW, exif, config, images)


def test_prompts_of_every_kind() -> None:
    prompts = resolved(
        {"bbox": [1.5, 2, 30, 40], "category_id": 7, "score": 0.5, "id": "x"},
        {"points": [1, 2, 3, 4], "point_labels": [1, 0]},
        {"points": [5, 6], "point_labels": [1], "bbox": [0, 0, 9, 9]},
    ).prompts
    np.testing.assert_array_equal(prompts.boxes_xyxy, [[1.5, 2, 30, 40], [np.nan] * 4, [0, 0, 9, 9]])
    assert prompts.points_xy.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert (prompts.point_labels.tolist(), prompts.first_point.tolist()) == ([1, 0, 1], [0, 0, 2, 3])
    assert (prompts.category_ids.tolist(), prompts.ids, prompts.masks) == ([7, 1, 1], ("x", "", ""), (None,) * 3)
    np.testing.assert_array_equal(prompts.scores, np.array([0.5, np.nan, np.nan], np.float32))


def test_relative_numbers_are_fractions_of_the_sides() -> None:
    row = {"bbox": [0.25, 0.5, 0.75, 1], "points": [0.5, 0.5], "point_labels": [1], "relative": True}
    row["segmentation"] = "[[0, 0, 0.5, 0, 0.5, 0.5, 0, 0.5]]"
    prompts = resolved(row).prompts
    assert prompts.boxes_xyxy.tolist() == [[16, 24, 48, 48]]
    assert prompts.points_xy.tolist() == [[32, 24]]
    assert prompts.masks == (rle.polygons_to_counts([[0, 0, 32, 0, 32, 24, 0, 24]], SIZE_HW),)


def test_a_mask_of_another_size_is_a_prompt_that_cannot_be_used() -> None:
    found = resolved({"segmentation": '{"size": [4, 4], "counts": "0b0"}'}, {"bbox": [0, 0, 9, 9]})
    assert found.problems == {0: "its RLE has size [4, 4], the image [height, width] [48, 64]"}
    assert len(found.prompts) == 2  # positions stay what they were
    assert np.isnan(found.prompts.boxes_xyxy[0]).all()


def test_what_was_wrong_with_a_row_stays_wrong() -> None:
    found = resolved({"id": "x", "problem": "boxes.csv, row 3: xmax is nan"})
    assert (found.problems, found.prompts.ids) == ({0: "boxes.csv, row 3: xmax is nan"}, ("x",))


def test_prompts_for_another_size_fail_the_image_or_are_scaled() -> None:
    row = {"bbox": [10, 10, 20, 20], "points": [1, 1], "point_labels": [1], "width": 128, "height": 144}
    with pytest.raises(PromptError, match=r"for 128 x 144, the image has 64 x 48.*--scale_prompts"):
        resolved(row)
    prompts = resolved(row, scale_prompts=True).prompts
    np.testing.assert_allclose(prompts.boxes_xyxy, [[5, 10 / 3, 10, 20 / 3]])
    np.testing.assert_allclose(prompts.points_xy, [[0.5, 1 / 3]])


def test_prompts_drawn_on_the_stored_pixels_of_a_turned_photo_name_the_flag() -> None:
    row = {"bbox": [10, 10, 20, 20], "width": 48, "height": 64}
    with pytest.raises(PromptError, match="--exif ignore"):
        resolved(row, exif=6)
    for exif, images in ((1, ImageConfig()), (3, ImageConfig()), (6, ImageConfig(exif="ignore"))):
        with pytest.raises(PromptError, match="--scale_prompts"):
            resolved(row, exif=exif, images=images)


def test_prompts_of_the_right_size_are_not_touched() -> None:
    assert resolved({"bbox": [10, 10, 20, 20], "width": 64, "height": 48}).prompts.boxes_xyxy.tolist() == [
        [10, 10, 20, 20]
    ]


def test_classes_by_name_need_their_ids() -> None:
    found = resolved(
        {"bbox": [0, 0, 9, 9], "category": "cat"},
        {"bbox": [0, 0, 9, 9], "category": "cow"},
        {"bbox": [0, 0, 9, 9]},
        categories={5: "cat"},
    )
    assert found.prompts.category_ids[0] == 5
    assert found.problems == {
        1: "the class 'cow' has no id. Give --categories, a file with a name a line",
        2: "it has no class, while others have",
    }


def test_prompts_with_a_low_score_are_left_out_and_those_without_stay() -> None:
    rows = pa.Table.from_batches([make_batch([{"score": 0.25}, {"score": 0.3}, {}])])
    assert above_score(rows, 0.3)["score"].to_pylist() == [pytest.approx(0.3), None]
    assert above_score(rows, None) is rows


@pytest.mark.parametrize(
    ("key", "path_stems", "names"),
    [
        ("auto", False, ["t.tar#3", "d/a.jpg", "d/a"]),
        ("image_id", False, ["t.tar#3"]),
        ("file_name", False, ["d/a.jpg"]),
        ("key", False, ["d/a"]),
        ("stem", False, ["a"]),
        ("auto", True, ["t.tar#3", "d/a"]),
        ("stem", True, ["a"]),
    ],
)
def test_the_names_of_an_image(key: str, path_stems: bool, names: list[str]) -> None:
    assert names_of(EncodedImage("t.tar#3", 3, "d/a", "d/a.jpg", b""), key, path_stems) == names


def test_rows_are_called_by_their_stems() -> None:
    batch = make_batch([{"image": "x/a.jpg"}, {"image": None}, {"image": "b"}])
    assert with_stems(batch).column("image").to_pylist() == ["a", None, "b"]
