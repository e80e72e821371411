"""Files of prompts in every format: what becomes of them, and what is said of those that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maskbeam.transforms.prompt_files.config import PromptConfig, PromptFilesError
from maskbeam.transforms.prompt_files.source import PromptSource, digest_of, find_prompts, read_prompts
from tests.conftest import label, write_photos


def read(*paths: Path, **settings: Any) -> tuple[list[dict[str, Any]], PromptSource]:
    """All rows, without what they do not have, and where they come from."""
    config = PromptConfig(tuple(map(str, paths)), **settings)
    source = find_prompts(config)
    rows = [row for batch in read_prompts(source, config) for row in batch.to_pylist()]
    return [{name: value for name, value in row.items() if value is not None} for row in rows], source


RECORDS = [
    {
        "image": "a.jpg",
        "xmin": 1.0,
        "ymin": 2.0,
        "xmax": 30.5,
        "ymax": 40.0,
        "category": "cat",
        "score": 0.5,
        "id": "x",
    },
    {"image": "b.jpg", "xmin": 0.0, "ymin": 0.0, "xmax": 5.0, "ymax": 6.0, "category": "dog", "score": 1.0, "id": "y"},
]
ROWS = [
    {"image": "a.jpg", "bbox": [1.0, 2.0, 30.5, 40.0], "category": "cat", "score": 0.5, "id": "x"},
    {"image": "b.jpg", "bbox": [0.0, 0.0, 5.0, 6.0], "category": "dog", "score": 1.0, "id": "y"},
]


def write_table(path: Path, records: list[dict[str, Any]]) -> Path:
    """Records in the format of the name."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".csv":
        lines = [",".join(records[0]), *(",".join(str(value) for value in record.values()) for record in records)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("name", ["boxes.parquet", "boxes.csv", "boxes.jsonl", "boxes.ndjson"])
def test_a_table_gives_the_same_rows_in_every_format(tmp_path: Path, name: str) -> None:
    rows, source = read(write_table(tmp_path / name, RECORDS))
    assert (rows, source.format) == (ROWS, "table")


def test_a_directory_of_tables_is_read_in_the_order_of_the_names(tmp_path: Path) -> None:
    write_table(tmp_path / "2.csv", RECORDS[1:])
    write_table(tmp_path / "1.parquet", RECORDS[:1])
    assert read(tmp_path)[0] == ROWS


def test_csv_has_lists_in_quotes(tmp_path: Path) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text('\ufeffimage,points,point_labels\na.jpg,"[[1, 2], [3, 4]]","[1, 0]"\n')
    assert read(path)[0] == [{"image": "a.jpg", "points": [1.0, 2.0, 3.0, 4.0], "point_labels": [1, 0]}]


def test_parquet_has_points_and_masks_as_lists_and_structs(tmp_path: Path) -> None:
    record = {"image": "a.jpg", "points": [[1.0, 2.0]], "segmentation": {"size": [2, 2], "counts": b"04"}}
    row = {"image": "a.jpg", "points": [1.0, 2.0], "point_labels": [1]}
    (found,), _ = read(write_table(tmp_path / "a.parquet", [record]))
    assert json.loads(found.pop("segmentation")) == {"size": [2, 2], "counts": "04"}
    assert found == row


def test_a_bad_row_names_file_row_and_column(tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text("image,x,y,w,h\na.jpg,1,2,3,4\na.jpg,1,2,,4\na.jpg,1,2,3\nb.jpg,1,2,3,4,5\n")
    problems = [row.get("problem") for row in read(path)[0]]
    assert problems == [
        None,
        "boxes.csv, row 2: w is missing; expected a finite number",
        "boxes.csv, line 4: it has 4 values; expected 5",
        "boxes.csv, line 5: it has 6 values; expected 5",
    ]


def test_a_line_that_is_no_json_is_a_row_without_an_image(tmp_path: Path) -> None:
    path = tmp_path / "boxes.jsonl"
    path.write_text('{"image": "a", "x": 1, "y": 1, "w": 1, "h": 1}\n\n{"image": \n[]\n')
    first, *bad = read(path)[0]
    assert first == {"image": "a", "bbox": [1.0, 1.0, 2.0, 2.0]}
    assert [row["problem"].partition(": ")[0] for row in bad] == ["boxes.jsonl, line 3", "boxes.jsonl, line 4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "file,x,y,w,h\n", "a.csv: it has no column image, .* Columns: file, x, y, w, h. Rename it"),
        ("a.csv", "image,left,top\n", "a.csv: it has no box .* Columns: image, left, top"),
        ("a.csv", "image,bbox,x,y,w,h\n", "a.csv: it has boxes twice: bbox and x, y, w, h"),
        ("a.csv", 'image,bbox\na,"[1, 2, 3, 4]"\n', "a.csv: .*--prompts_bbox xyxy"),
        ("a.csv", "", "a.csv: it has no column image"),
        ("a.parquet", "image,x\n", "a.parquet: "),
        ("a.json", "{", "a.json: it is not JSON"),
        ("a.json", "{}", "a.json: there is no list of image records"),
        ("a.json", '{"images": [], "annotations": [{"id": 1, "image_id": 7}]}', "a.json: .* no such image"),
        ("a.json", "[1]", "a.json: it is no list of results"),
        ("a.xlsx", "", "'a.xlsx' is neither .parquet.* Say --prompts_format yolo, voc or labels"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_cure(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptFilesError, match=message):
        read(tmp_path / name)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PromptFilesError, match=r"matches no file.*--prompts in_record"):
        read(tmp_path / "boxes.csv")


INSTANCES = {
    "images": [
        {"id": 7, "file_name": "train/a.jpg", "width": 64, "height": 48},
        {"id": 8, "file_name": "b.jpg", "width": 32, "height": 32},
    ],
    "annotations": [
        {"id": 101, "image_id": 8, "category_id": 3, "bbox": [1, 2, 3.5, 4], "segmentation": [[1, 2, 4, 2, 4, 6]]},
        {"id": 102, "image_id": 7, "category_id": 90, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"id": 103, "image_id": 7, "category_id": 90, "segmentation": [[1, 2, 4, 2, 4, 6]]},
        {"id": 104, "image_id": 7, "category_id": 90, "bbox": [0, 0, 9]},
    ],
    "categories": [{"id": 3, "name": "car"}, {"id": 90, "name": "brush"}],
}


def test_coco_keeps_its_ids_and_leaves_crowds_out(tmp_path: Path) -> None:
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    rows, source = read(tmp_path / "instances.json")
    assert rows == [
        {
            **{"image": "train/a.jpg", "id": "103", "category_id": 90, "width": 64, "height": 48},
            "segmentation": "[[1, 2, 4, 2, 4, 6]]",
        },
        {
            **{"image": "train/a.jpg", "id": "104", "width": 64, "height": 48},
            "problem": "instances.json, annotation 104: its bbox is [0, 0, 9]; expected 4 numbers",
        },
        {
            **{"image": "b.jpg", "id": "101", "category_id": 3, "width": 32, "height": 32},
            "bbox": [1.0, 2.0, 4.5, 6.0],
        },
    ]
    assert source.categories == {3: "car", 90: "brush"}
    assert (source.crowds, source.images) == (1, ["train/a.jpg", "b.jpg"])


RESULTS = [{"image_id": 8, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.75}]


def test_results_beside_their_instances_are_the_prompts(tmp_path: Path) -> None:
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    rows, source = read(tmp_path / "results.json", tmp_path / "instances.json")
    assert rows == [
        {
            **{"image": "b.jpg", "id": "1", "category_id": 3, "score": 0.75, "width": 32, "height": 32},
            "bbox": [1.0, 2.0, 4.0, 6.0],
        }
    ]
    assert source.categories == {3: "car", 90: "brush"}


def test_results_alone_call_images_by_their_ids(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps([*RESULTS, {"image_id": None}]))
    rows, _ = read(tmp_path / "results.json")
    assert [row.get("image") for row in rows] == ["8", None]


def test_yolo_has_boxes_confidences_and_outlines(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text(
        "3 0.5 0.5 0.25 0.5\n\n0 0.5 0.5 1 1 0.75\n1 0 0 1 0 1 1\n2 0.5\nx 1 1 1 1\n"
    )
    (tmp_path / "classes.txt").write_text("cat\n")
    rows, source = read(tmp_path, prompts_format="yolo")
    common = {"image": "train/a", "relative": True}
    assert rows == [
        {**common, "id": "0", "category_id": 3, "bbox": [0.375, 0.25, 0.625, 0.75]},
        {**common, "id": "2", "category_id": 0, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.75},
        {**common, "id": "3", "category_id": 1, "segmentation": "[[0.0, 0.0, 1.0, 0.0, 1.0, 1.0]]"},
        {
            **common,
            "id": "4",
            "problem": "train/a.txt, line 5: it has 2 values; expected 5 or 6 for a box, or 7, 9, 11, ..."
            " for an outline",
        },
        {
            **common,
            "id": "5",
            "problem": "train/a.txt, line 6: it is 'x 1 1 1 1'; expected a class, a whole number, and numbers",
        },
    ]
    assert source.images == ["train/a"]


VOC = """<annotation><size><width>64</width><height>48</height><depth>3</depth></size>
<object><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>
<object><name>cat</name><bndbox><xmin>1</xmin></bndbox></object></annotation>"""


def test_voc_counts_from_1_and_includes_the_last_pixel(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(VOC)
    (tmp_path / "b.xml").write_text("<annotation>")
    (tmp_path / "c.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>')
    first, second, *broken = read(tmp_path, prompts_format="voc")[0]
    assert first == {
        **{"image": "a", "id": "0", "category": "cat", "width": 64, "height": 48},
        "bbox": [0.0, 1.0, 30.0, 40.0],
    }
    assert second["problem"] == "a.xml, object 2: its bndbox/ymin is None; expected a number"
    assert [row["problem"].partition(":")[0] for row in broken] == [
        "b.xml, it is no XML",
        "c.xml, it has a document type of its own, which VOC's files do not need. Take it out",
    ]


def test_labels_give_their_masks_and_boxes(tmp_path: Path) -> None:
    photos, labels = write_photos(tmp_path / "photos", 2), tmp_path / "labels"
    assert label("--input", photos, "--output", labels) == 0
    rows, source = read(labels)
    masks = pq.read_table(labels / "annotations").to_pylist()
    assert len(rows) == len(masks) > 2
    for row, mask in zip(rows, masks, strict=True):
        x, y, width, height = mask["bbox"]
        assert (row["image"], row["id"]) == (mask["image_id"], str(mask["mask_index"]))
        assert row["bbox"] == [x, y, x + width, y + height]
        assert json.loads(row["segmentation"]) == mask["segmentation"]
        assert (row["category_id"], row["score"], row["width"], row["height"]) == (1, mask["predicted_iou"], 64, 48)
    assert (source.format, source.categories) == ("labels", {1: "object"})


def test_the_digest_is_of_the_bytes_and_of_what_they_mean(tmp_path: Path) -> None:
    path = write_table(tmp_path / "boxes.csv", RECORDS)

    def digest(**settings: Any) -> str:
        config = PromptConfig((str(path),), **settings)
        return digest_of(find_prompts(config), config)

    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    before, with_names = digest(), digest(categories=str(names))
    names.write_text("dog\ncat\n")
    digests = [before, with_names, digest(categories=str(names)), digest(prompts_key="stem")]
    assert digest() == before
    assert digest(mask="all", refine_steps=1, min_prompt_score=0.5) == before  # they do not change the store
    write_table(path, RECORDS[:1])
    assert len({*digests, digest()}) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [("cat\n\ndog\n", "has no name in line 2"), ("cat\ncat\n", "has 'cat' in lines 1 and 2"), ("", "is empty")],
)
def test_names_of_classes_that_cannot_be_meant(tmp_path: Path, content: str, message: str) -> None:
    names = tmp_path / "names.txt"
    names.write_text(content)
    config = PromptConfig((str(write_table(tmp_path / "boxes.csv", RECORDS)),), categories=str(names))
    with pytest.raises(PromptFilesError, match=message):
        digest_of(find_prompts(config), config)
