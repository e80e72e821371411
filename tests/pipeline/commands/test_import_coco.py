"""`maskbeam import`, and what `maskbeam export` makes of its labels again."""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from maskbeam.pipeline import cli
from maskbeam.pipeline.commands import import_coco
from maskbeam.transforms.labels.run_file import read_run
from maskbeam.transforms.labels.schema import ANNOTATIONS, IMAGES, report_from_metadata, row_to_mask
from maskbeam.transforms.labels.tables import read_chunks
from tests.conftest import label, photo_bytes, read_labels, write_photos
from tests.transforms.readers.test_shard import images_tar


def rle_of(bits: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(bits, np.uint8))
    return {"size": list(bits.shape), "counts": rle["counts"].decode()}


def lengths_of(bits: np.ndarray) -> dict[str, Any]:
    changes = np.flatnonzero(np.diff(np.r_[False, bits.T.ravel()]))
    return {"size": list(bits.shape), "counts": np.diff(np.r_[0, changes, bits.size]).tolist()}


TRIANGLE = [[1.0, 1.0, 7.0, 1.5, 3.0, 5.0]]
DISC = np.hypot(*(np.indices((6, 8)) - 3)) < 2.5


def instances(**others: Any) -> dict[str, Any]:
    """Two photos of 8 x 6 pixels, the first with an annotation of each form, a crowd among them."""
    common = {"image_id": 9, "category_id": 18, "iscrowd": 0}
    return {
        "info": {"year": 2026},
        "licenses": [{"id": 1, "name": "CC0"}],
        "images": [
            {"id": 9, "file_name": "train/a.jpg", "width": 8, "height": 6, "license": 1},
            {"id": 4, "file_name": "b.jpg", "width": 8, "height": 6, "coco_url": "http://example.com/b.jpg"},
        ],
        "annotations": [
            {**common, "id": 900100000009, "segmentation": lengths_of(DISC), "iscrowd": 1},
            {**common, "id": 5, "segmentation": TRIANGLE, "area": 11.75, "bbox": [1.0, 1.0, 6.0, 4.0]},
            {**common, "id": 2, "segmentation": rle_of(DISC), "category_id": 3, "attributes": {"occluded": True}},
        ],
        "categories": [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 3, "name": "car"}],
        **others,
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(instances()))
    return path


def run_import(source: Path, output: Path, *flags: str) -> int:
    return cli.main(["import", "--format", "coco", "--annotations", str(source), "--output", str(output), *flags])


def export(labels: Path, output: Path, *flags: str) -> dict[str, Any]:
    assert cli.main(["export", "--labels", str(labels), "--format", "coco", "--output", str(output), *flags]) == 0
    return json.loads(output.read_text())


def without_segmentation(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {record["id"]: {key: value for key, value in record.items() if key != "segmentation"} for record in records}


def test_every_form_of_mask_becomes_the_rle_of_pycocotools(source: Path, output: Path) -> None:
    assert run_import(source, output) == 0
    truth = COCO(str(source))
    rows = read_labels(output).annotations
    assert [(row["image_id"], row["mask_index"]) for row in rows] == [("train/a.jpg", index) for index in range(3)]
    assert [row["category_id"] for row in rows] == [18, 18, 3] and [row["iscrowd"] for row in rows] == [1, 0, 0]
    for row, annotation_id in zip(rows, (900100000009, 5, 2), strict=True):
        expected = truth.annToRLE(truth.anns[annotation_id])
        np.testing.assert_array_equal(coco_mask.decode(row["segmentation"]), coco_mask.decode(expected))
        assert row["area"] == coco_mask.area(expected) and row["bbox"] == coco_mask.toBbox(expected).tolist()
        mask = row_to_mask(row)
        assert (
            math.isnan(mask.predicted_iou)
            and math.isnan(mask.stability_score)
            and math.isnan(mask.prompt.points_xy[0][0])
        )
        assert mask.crop_box_xywh == (0, 0, 8, 6)
    assert json.loads(rows[2]["coco"]) == {"id": 2, "attributes": {"occluded": True}}


def test_the_labels_are_like_those_of_label(source: Path, output: Path) -> None:
    assert run_import(source, output) == 0
    (chunk,) = read_chunks(str(output))
    assert chunk.annotations.column_names == [*ANNOTATIONS.names, "coco"]
    assert chunk.images.column_names == [*IMAGES.names, "coco"]
    assert [(image["image_id"], image["status"], len(masks)) for image, masks in chunk.rows()] == [
        ("train/a.jpg", "labeled", 3),
        ("b.jpg", "empty", 0),
    ]
    images = chunk.images.to_pylist()
    assert [(row["key"], row["width"], row["height"], row["num_masks"]) for row in images] == [
        ("9", 8, 6, 3),
        ("4", 8, 6, 0),
    ]
    assert read_run(str(output)).categories == instances()["categories"]
    assert json.loads((output / "summary.json").read_text())["masks"] == 3
    assert not (output / "_tmp").exists()


@pytest.mark.clients
def test_duckdb_reads_the_original_ids(source: Path, output: Path) -> None:
    assert run_import(source, output) == 0
    query = f"SELECT CAST(coco->>'id' AS BIGINT) FROM '{output}/annotations/*.parquet' ORDER BY mask_index"
    assert duckdb.sql(query).fetchall() == [(900100000009,), (5,), (2,)]


def test_what_the_file_says_is_exported_again(source: Path, output: Path, tmp_path: Path) -> None:
    assert run_import(source, output) == 0
    again, before = export(output, tmp_path / "again.json"), instances()
    assert again["images"] == before["images"]
    assert {key: again[key] for key in ("info", "licenses", "categories")} == {
        key: before[key] for key in ("info", "licenses", "categories")
    }
    # What was not said, area and box of the first and the last, is added.
    measured = {"area": int(DISC.sum()), "bbox": coco_mask.toBbox(rle_of(DISC)).tolist()}
    expected = without_segmentation(before["annotations"])
    assert without_segmentation(again["annotations"]) == {
        **expected,
        900100000009: {**measured, **expected[900100000009]},
        2: {**measured, **expected[2]},
    }
    one, other = COCO(str(source)), COCO(str(tmp_path / "again.json"))
    for annotation_id in one.anns:
        np.testing.assert_array_equal(
            one.annToMask(one.anns[annotation_id]), other.annToMask(other.anns[annotation_id])
        )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(st.text(max_size=3), values, max_size=2),
    max_leaves=3,
)
extras = st.dictionaries(st.sampled_from(["license", "attributes", "note", "area_m2", ""]), json_values, max_size=2)
ids = st.integers(0, 2**53) | st.text("ab", min_size=1, max_size=2)


@st.composite
def datasets(draw: st.DrawFn) -> dict[str, Any]:
    """COCO files with RLE, and whatever else comes to mind."""
    categories = draw(st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=1, max_size=3, unique=True))
    names = draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=4, unique=True))
    image_ids = draw(st.lists(ids, min_size=len(names), max_size=len(names), unique=True))
    sides = st.integers(1, 6)
    images = [
        {**draw(extras), "id": image_id, "file_name": name, "width": draw(sides), "height": draw(sides)}
        for image_id, name in zip(image_ids, names, strict=True)
    ]
    annotations = []
    for annotation_id in draw(st.lists(ids, max_size=6, unique=True)):
        image = draw(st.sampled_from(images))
        pixels = draw(st.lists(st.booleans(), min_size=36, max_size=36))[: image["width"] * image["height"]]
        record = {
            **draw(extras),
            "id": annotation_id,
            "image_id": image["id"],
            "category_id": draw(st.sampled_from(categories)),
            "segmentation": rle_of(np.array(pixels).reshape(image["height"], image["width"])),
            "iscrowd": draw(st.integers(0, 1)),
        }
        numbers = st.floats(0, 1e6)
        for key, values in (("score", numbers), ("area", numbers), ("bbox", st.lists(numbers, min_size=4, max_size=4))):
            if draw(st.booleans()):
                record[key] = draw(values)
        annotations.append(record)
    return {
        **draw(st.dictionaries(st.sampled_from(["info", "licenses", "other"]), json_values)),
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category, "name": draw(st.text(max_size=3))} for category in categories],
    }


@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(datasets())
def test_the_round_trip_loses_nothing_of_rle(dataset: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "in.json").write_text(json.dumps(dataset))
        assert run_import(directory / "in.json", directory / "labels") == 0
        again = export(directory / "labels", directory / "out.json")
    assert {key: value for key, value in again.items() if key != "annotations"} == {
        "exported_by": "maskbeam",
        "info": again["info"],
        **{key: value for key, value in dataset.items() if key != "annotations"},
    }
    after = {record["id"]: record for record in again["annotations"]}
    assert len(after) == len(again["annotations"]) == len(dataset["annotations"])
    for record in dataset["annotations"]:
        assert {**after[record["id"]], **record} == after[record["id"]]


def test_labels_survive_the_way_through_coco(tmp_path: Path, output: Path) -> None:
    write_photos(tmp_path / "in" / "deep", 3)
    (tmp_path / "in" / "some.tar").write_bytes(images_tar([photo_bytes(7), photo_bytes(8)]))
    assert label("--input", tmp_path / "in", "--output", output) == 0
    export(output, tmp_path / "coco.json")
    assert run_import(tmp_path / "coco.json", tmp_path / "again") == 0
    before, after = read_labels(output).annotations, read_labels(tmp_path / "again").annotations
    assert [{key: row[key] for key in ANNOTATIONS.names} for row in after] == before and len(before) > 5


def test_results_of_another_tool_are_imported_with_their_scores(source: Path, output: Path, tmp_path: Path) -> None:
    results = [
        {"image_id": 4, "category_id": 3, "segmentation": rle_of(DISC), "score": 0.75},
        {"image_id": 9, "category_id": 3, "segmentation": rle_of(~DISC), "score": 1 / 3},
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert run_import(tmp_path / "results.json", output, "--images_from", str(source)) == 0
    rows = read_labels(output).annotations
    assert [(row["image_id"], row["predicted_iou"]) for row in rows] == [
        ("b.jpg", 0.75),
        ("train/a.jpg", pytest.approx(1 / 3)),
    ]
    again = export(output, tmp_path / "again.json")
    assert {(record["id"], record["image_id"], record["score"]) for record in again["annotations"]} == {
        (1, 4, 0.75),
        (2, 9, 1 / 3),
    }


def changed(kind: str, index: int, **values: Any) -> dict[str, Any]:
    content = instances()
    content[kind][index].update(values)
    return content


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "it is not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        ("", "it is not JSON: it begins with b'', not with"),
        ("a text about photos", "it is not JSON: it begins with b'a text about photos'"),
        ('["a"] b', "it is not JSON: Extra data at line 1, column 7"),
        ('{"a": "\udcff"}', "it is not JSON: byte 7 is no UTF-8"),
        ('{"info": 1e999}', "it has the number 1e999, which is too large"),
        ('{"info": ' + "9" * 5000 + "}", "it has a whole number of thousands of digits"),
        ('{"info": ' + "[" * 100_000 + "]" * 100_000 + "}", "it nests more than 64 levels deep"),
        ('{"info": ' + "[" * 100 + "]" * 100 + "}", "it nests more than 64 levels deep"),
        ('{"a": NaN}', "it has the number NaN"),
        ("3", "not JSON"),
        ({}, "no list of image records"),
        (instances(categories=None), "no list of category records"),
        (instances(annotations={}), "no list of annotation records"),
        (instances(annotations=[3]), "the annotation record 3 has no id"),
        (instances(images=[], annotations=[]), "it has no images"),
        (instances(images=[{"file_name": "a"}]), "has no id"),
        (changed("images", 1, id=9), "two image records have the id 9"),
        (changed("images", 1, file_name="train/a.jpg"), "two images have the file_name 'train/a.jpg'"),
        (changed("images", 1, file_name=""), "has file_name ''"),
        (changed("images", 1, file_name="\ud800"), "has file_name"),
        (changed("images", 1, height=0), "width 8 and height 0"),
        (changed("images", 1, width=None), "width None and height 6"),
        (changed("images", 1, width=-8), "width -8 and height 6"),
        (changed("images", 1, width=8.0), "width 8.0 and height 6"),
        (changed("images", 1, width=2**31), "width 2147483648 and height 6"),
        (changed("images", 1, width=2**31 - 1), "has 2147483647 x 6 pixels"),
        (changed("images", 1, width=100_000, height=100_000), "has 100000 x 100000 pixels"),
        (changed("images", 1, id="\ud800"), "has no id"),
        (
            instances(categories=[{"id": "18"}, {"id": 3}]),
            "id '18' has an id that is no whole number",
        ),
        (instances(categories=[{"id": 18, "name": 3}, {"id": 3}]), "the category with id 18 has name 3; expected text"),
        (instances(categories=[{"id": 2**31}]), "no whole number of 32 bits"),
        (changed("annotations", 1, id=2), "two annotation records have the id 2"),
        (changed("annotations", 1, image_id=5), "image_id 5, but there is no such image"),
        (changed("annotations", 1, image_id=[9]), "there is no such image"),
        (changed("annotations", 1, category_id=1), "category_id 1, but there is no such category"),
        (changed("annotations", 1, iscrowd=2), "iscrowd 2"),
        (changed("annotations", 1, segmentation=None), "id 5 cannot be read: its segmentation is neither"),
        (changed("annotations", 1, segmentation=[]), "expected at least one"),
        (changed("annotations", 1, segmentation=[[1, 1, 3, 3]]), "three or more pairs"),
        (changed("annotations", 1, segmentation=[[1, 1, 3, 3, 1e9, 5]]), "far outside the image of 8 x 6"),
        (changed("annotations", 1, segmentation=[["x"] * 6]), "not lists of numbers"),
        (changed("annotations", 1, segmentation=[3]), "not lists of numbers"),
        (changed("annotations", 2, segmentation=rle_of(DISC.T)), r"size \[8, 6\], the image .* \[6, 8\]"),
        (changed("annotations", 2, segmentation={"size": [6, 8], "counts": "x"}), "no compressed RLE"),
        (changed("annotations", 2, segmentation={"size": [6, 8], "counts": [4, 4]}), "the runs have 8 pixels"),
        (changed("annotations", 2, segmentation={"size": [6, 8], "counts": [48.5]}), "whole numbers"),
        (changed("annotations", 2, segmentation={"size": [6, 8], "counts": [-1, 49]}), "no negative run"),
        (changed("annotations", 2, segmentation={"size": [6, 8], "counts": [10**30]}), "expected 6 x 8 = 48 pixels"),
        (changed("annotations", 2, segmentation={"size": "6x8", "counts": [48]}), "its RLE has size 6x8"),
        (changed("annotations", 2, score="high"), "id 2 cannot be read: its score is 'high'"),
        (changed("annotations", 2, score="0.5"), "its score is '0.5'; expected a float"),
        (changed("annotations", 2, stability_score=None), "its stability_score is None"),
        (changed("annotations", 2, crop_box=[0, 0, 8]), r"its crop_box is \[0, 0, 8\]; expected 4 numbers"),
        (changed("annotations", 2, crop_box=[0, 0, 8, "6"]), "its crop_box"),
        (changed("annotations", 2, point_coords=[[1]]), r"its point_coords is \[1\]; expected 2 numbers"),
        (changed("annotations", 2, point_coords=3), "id 2 cannot be read"),
        (
            {
                **changed("images", 0, width=1, height=30_000_000),
                "annotations": [
                    {"id": 1, "image_id": 9, "category_id": 18, "segmentation": [[0, 0, 1, 0, 1, 3e7, 0, 3e7]]}
                ],
            },
            "a polygon's outline is longer than 4000000 pixels",
        ),
        (changed("annotations", 2, score=1e300), "expected a float of 32 bits"),
        (changed("annotations", 2, score=10**400), "id 2 cannot be read"),
    ],
)
def test_what_cannot_be_imported_is_told_before_anything_is_written(
    tmp_path: Path, output: Path, content: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "a.json").write_text(text, errors="surrogateescape")
    assert run_import(tmp_path / "a.json", output) == 1
    assert not output.exists()
    error = capsys.readouterr().err
    start = rf"maskbeam import: cannot import {tmp_path}/a\.json: "
    assert re.fullmatch(rf"{start}.*{told}.* Mend the file; .*\n", error), error
    assert len(error) < 1000


def test_a_list_of_results_needs_its_images(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text("[]")
    assert run_import(tmp_path / "results.json", tmp_path / "out") == 2
    assert "say with --images_from" in capsys.readouterr().err
    assert run_import(source, tmp_path / "out", "--images_from", str(source)) == 2
    assert "is no list of results" in capsys.readouterr().err


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_coco, "MAX_COCO_BYTES", 1000)
    (tmp_path / "a.json").write_text("[" + " " * 1000)
    assert run_import(tmp_path / "a.json", tmp_path / "out") == 1
    assert "it is larger than 1000 bytes" in capsys.readouterr().err


def test_an_import_can_be_repeated_but_not_be_another(source: Path, output: Path, tmp_path: Path) -> None:
    assert run_import(source, output) == 0 and run_import(source, output) == 0
    (tmp_path / "other.json").write_text(json.dumps(instances(annotations=[])))
    assert run_import(tmp_path / "other.json", output) == 2
    assert len(read_labels(output).annotations) == 3
    assert run_import(tmp_path / "other.json", output, "--overwrite") == 0
    assert read_labels(output).annotations == [] and len(read_labels(output).images) == 2


def test_many_images_are_many_chunks(tmp_path: Path, output: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 1, "height": 1} for n in range(70)]
    (tmp_path / "many.json").write_text(json.dumps(instances(images=images, annotations=[])))
    assert run_import(tmp_path / "many.json", output) == 0
    assert [len(chunk.images) for chunk in read_chunks(str(output))] == [32, 32, 6]
    reports = [report_from_metadata(chunk.images.schema.metadata) for chunk in read_chunks(str(output))]
    assert [(report.index, report.final, report.totals.images) for report in reports] == [
        (0, False, 32),
        (1, False, 32),
        (2, True, 6),
    ]
