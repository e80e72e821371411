"""Prompts in the image's own record, read through the readers of shards."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maskbeam.transforms.prompt_files.in_record import RecordPrompts
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.readers.shard import read_images
from maskbeam.transforms.records import Shard, SourceFile
from tests.conftest import photo_bytes


def prompts_of(path: Path, file_format: str, bbox_format: str | None = None) -> list[list[dict[str, Any]] | None]:
    """Of each image the rows of its prompts, without what they do not have."""
    shard = Shard("s", str(path), file_format, (SourceFile(str(path), path.stat().st_size),))
    found = []
    for image in read_images(shard, ReadConfig(), str(path.parent), RecordPrompts(bbox_format)):
        assert not image.failure
        rows = None if image.prompts is None else image.prompts.to_pylist()
        found.append(
            None if rows is None else [{k: v for k, v in row.items() if v is not None and k != "image"} for row in rows]
        )
    return found


def write_tfrecord(path: Path, **features: Any) -> Path:
    tensorflow = pytest.importorskip("tensorflow")
    train = tensorflow.train
    kinds = {
        float: lambda values: train.Feature(float_list=train.FloatList(value=values)),
        int: lambda values: train.Feature(int64_list=train.Int64List(value=values)),
        bytes: lambda values: train.Feature(bytes_list=train.BytesList(value=values)),
    }
    named = {f"image/object/{name.replace('_', '/')}": values for name, values in features.items()}
    feature = {name: kinds[type(values[0])](values) for name, values in named.items()}
    feature["image/encoded"] = kinds[bytes]([photo_bytes(0)])
    with tensorflow.io.TFRecordWriter(str(path)) as writer:
        writer.write(train.Example(features=train.Features(feature=feature)).SerializeToString())
    return path


BOXES = {"bbox_xmin": [0.25, 0.0], "bbox_ymin": [0.5, 0.0], "bbox_xmax": [0.75, 1.0], "bbox_ymax": [1.0, 1.0]}


def test_features_of_object_detection(tmp_path: Path) -> None:
    path = write_tfrecord(tmp_path / "a.tfrecord", **BOXES, class_label=[3, 1], class_text=[b"cat", b"dog"])
    assert prompts_of(path, "tfrecord") == [
        [
            {"bbox": [0.25, 0.5, 0.75, 1.0], "category": "cat", "category_id": 3, "relative": True},
            {"bbox": [0.0, 0.0, 1.0, 1.0], "category": "dog", "category_id": 1, "relative": True},
        ]
    ]


def test_features_of_different_lengths_are_one_bad_prompt(tmp_path: Path) -> None:
    path = write_tfrecord(tmp_path / "a.tfrecord", **BOXES, class_label=[3])
    ((row,),) = prompts_of(path, "tfrecord")  # type: ignore[misc]
    assert row == {"problem": "xmin 2, ymin 2, xmax 2, ymax 2, labels 1, names 0 values; expected one for each box"}


def test_an_example_without_boxes_has_no_prompts(tmp_path: Path) -> None:
    assert prompts_of(write_tfrecord(tmp_path / "a.tfrecord", class_label=[3]), "tfrecord")[0] != []
    assert prompts_of(write_tfrecord(tmp_path / "b.tfrecord"), "tfrecord") == [[]]


OBJECT = {"bbox": [1, 2, 3, 4], "category": "cat", "score": 0.5, "id": 7}
ROW = {"bbox": [1.0, 2.0, 4.0, 6.0], "category": "cat", "score": 0.5, "id": "7"}


def write_tar(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("content", [[OBJECT], {"objects": [OBJECT], "caption": "a cat"}])
@pytest.mark.parametrize("json_first", [True, False])
def test_json_beside_the_photo_of_a_webdataset(tmp_path: Path, content: Any, json_first: bool) -> None:
    members = {"1.json": json.dumps(content).encode(), "1.jpg": photo_bytes(1), "1.seg.png": photo_bytes(9)}
    if not json_first:
        members = dict(reversed(members.items()))
    path = write_tar(tmp_path / "a.tar", **{"0.jpg": photo_bytes(0)}, **members)
    assert prompts_of(path, "tar", "xywh") == [None, [ROW]]


def test_json_that_cannot_be_read_is_one_bad_prompt(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", **{"1.jpg": photo_bytes(1), "1.json": b"{"})
    ((row,),) = prompts_of(path, "tar", "xywh")  # type: ignore[misc]
    assert row["problem"].startswith("the sample's JSON cannot be read: it is not JSON")


@pytest.mark.parametrize("objects", [[OBJECT], {name: [value] for name, value in OBJECT.items()}])
def test_objects_of_hugging_face(tmp_path: Path, objects: Any) -> None:
    rows = [{"image": photo_bytes(0), "objects": objects}, {"image": photo_bytes(1), "objects": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert prompts_of(tmp_path / "a.parquet", "parquet", "xywh") == [[ROW], []]


def test_a_bbox_in_a_record_is_never_guessed(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"image": photo_bytes(0), "objects": [OBJECT]}]), tmp_path / "a.parquet")
    ((row,),) = prompts_of(tmp_path / "a.parquet", "parquet")  # type: ignore[misc]
    assert "say --prompts_bbox xyxy, xywh" in row["problem"]


def test_prompts_are_not_read_where_nobody_asks(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", **{"1.jpg": photo_bytes(1), "1.json": b"[]"})
    shard = Shard("s", str(path), "tar", (SourceFile(str(path), path.stat().st_size),))
    assert [image.prompts for image in read_images(shard, ReadConfig(), str(tmp_path))] == [None]
