"""Damaged labels: each command that reads them ends with one sentence that names file and row, and with exit code 1.

All reading goes through transforms/labels/tables.py, which checks all values (transforms/labels/check_tables.py). So
each kind of damage is tried there, and some kinds with each of the commands.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskbeam.pipeline import cli
from maskbeam.transforms.labels.layout import ChunkKey
from maskbeam.transforms.labels.refine import COLUMNS
from maskbeam.transforms.labels.run_file import read_run
from maskbeam.transforms.labels.schema import OPTIONAL, row_to_image
from maskbeam.transforms.labels.tables import list_chunks, read_candidates, read_chunk, read_chunks
from maskbeam.transforms.masks.amg import AmgConfig
from maskbeam.transforms.records import DamagedFile
from tests.conftest import label, photo_bytes, write_photos
from tests.pipeline.commands.test_import_coco import instances, run_import

ROOT = Path(__file__).parents[3]
CHUNK = "@root-00000.parquet"
SIZE_HW = (48, 64)  # of the photos


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of three photos and a broken one, with candidates, in one chunk."""
    directory = tmp_path_factory.mktemp("door")
    photos = write_photos(directory / "photos", 3)
    (photos / "broken.png").write_bytes(photo_bytes(9)[:100])
    assert label("--input", photos, "--output", directory / "labels", "--keep_candidates") == 0
    return directory / "labels"


@pytest.fixture
def labels(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "labels"))


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """Labels with categories 3 and 18, and what their COCO file said beside the columns."""
    (tmp_path / "instances.json").write_text(json.dumps(instances()))
    assert run_import(tmp_path / "instances.json", tmp_path / "imported") == 0
    return tmp_path / "imported"


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], Any], schema: pa.Schema | None = None) -> None:
    """Changes the rows of a table; nulls and values of other types are written if the schema, or none, allows it."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    relaxed = pa.schema([_nullable(field) for field in table.schema], table.schema.metadata)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema or relaxed), path)


def _nullable(field: pa.Field) -> pa.Field:
    kind = field.type
    if pa.types.is_struct(kind):
        kind = pa.struct([_nullable(part) for part in kind.fields])
    elif pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = pa.list_(_nullable(kind.value_field))
    return pa.field(field.name, kind, metadata=field.metadata)


def change_value(column: str, value: Any, row: int = 1) -> Callable[[list[dict[str, Any]]], None]:
    """Sets a value of a row; "segmentation.counts" is a part of one."""

    def change(rows: list[dict[str, Any]]) -> None:
        name, _, part = column.partition(".")
        if part:
            rows[row][name][part] = value
        else:
            rows[row][name] = value

    return change


def one_sentence(error: str, *parts: str) -> bool:
    return error.count("\n") == 1 and len(error) < 1500 and all(part in error for part in parts)


# Each kind of damage, at the door.

_H, _W = SIZE_HW
MASK = "mask 1 of '0.png'"

ANNOTATIONS_DAMAGE: list[tuple[str, Any, str]] = [
    # RLE. 48 x 64 = 3072 pixels is "PP3" in COCO's characters.
    ("segmentation.counts", "PP2", "its counts are no RLE of its image: the runs have 2048 pixels"),
    ("segmentation.counts", "PP31", "the runs have 3073 pixels"),
    ("segmentation.counts", "PP3" + "0" * 10_000 + "1", "the runs have 3073 pixels"),
    ("segmentation.counts", "o" * 40, "is no compressed RLE"),
    ("segmentation.counts", "PP3o", "is no compressed RLE"),
    ("segmentation.counts", "", "is no compressed RLE"),
    ("segmentation.counts", "\0", "is no compressed RLE"),
    ("segmentation.counts", "é", "is no compressed RLE"),
    ("segmentation.counts", "o" * 9 + "1", "it has a length beyond 32 bits"),
    ("segmentation.counts", "1N0PP3", "no negative run"),
    ("segmentation.counts", None, "its counts is None; expected a compressed RLE"),
    ("segmentation.size", [0, 64], "its size is [0, 64]; expected [height, width] of its image"),
    ("segmentation.size", [48, 0], "its size is [48, 0]"),
    ("segmentation.size", [-48, 64], "its size is [-48, 64]"),
    ("segmentation.size", [2**31 - 1, 2**31 - 1], "its size is [2147483647, 2147483647]"),
    ("segmentation.size", [64, 48], "its size is [64, 48]"),
    ("segmentation.size", [48], "its size is [48]; expected 2 numbers"),
    ("segmentation.size", [48, 64, 1], "expected 2 numbers"),
    ("segmentation.size", [], "expected 2 numbers"),
    ("segmentation.size", [48, None], "expected 2 numbers"),
    ("segmentation.size", None, "its size is None"),
    ("segmentation", None, "its segmentation is None; expected a value"),
    # The other columns.
    ("image_id", None, "its image_id is None"),
    ("image_id", "nobody.png", "its image is not in the images table"),
    ("image_id", "broken.png", "the image '0.png': it has"),
    ("mask_index", None, "its mask_index is None"),
    ("mask_index", 7, "its mask_index is 7; expected 0, 1, 2, ... in the order of the rows"),
    ("mask_index", 0, "its mask_index is 0"),
    ("mask_index", -1, "its mask_index is -1"),
    ("bbox", None, "its bbox is None"),
    ("bbox", [0.0, 0.0, 3.0], "expected 4 numbers"),
    ("bbox", [0.0, 0.0, 3.0, float("nan")], "within the image"),
    ("bbox", [0.0, 0.0, float("inf"), 3.0], "within the image"),
    ("bbox", [-1.0, 0.0, 3.0, 3.0], "within the image"),
    ("bbox", [0.0, 0.0, 65.0, 3.0], "within the image"),
    ("area", None, "its area is None"),
    ("area", 1, "its area is 1, but its RLE has"),
    ("area", -1, "its area is -1, but its RLE has"),
    ("area", 2**62, "its area is 4611686018427387904, but"),
    ("predicted_iou", None, "its predicted_iou is None"),
    ("predicted_iou", float("inf"), "its predicted_iou is inf; expected a finite number, or NaN"),
    ("stability_score", float("-inf"), "its stability_score is -inf"),
    ("point_coords", None, "its point_coords is None"),
    ("point_coords", [], "its point_coords is []; expected one point"),
    ("point_coords", [[1.0, 2.0], [3.0, 4.0]], "expected one point"),
    ("point_coords", [[1.0]], "expected 2 numbers"),
    ("point_coords", [None], "expected [x, y]"),
    ("point_coords", [[1.0, float("inf")]], "expected finite numbers"),
    ("crop_box", [0.0, 0.0, 64.0], "expected 4 numbers"),
    ("crop_box", [0.0, 0.0, 64.0, float("nan")], "expected finite numbers"),
    ("category_id", None, "its category_id is None"),
    ("category_id", 2, "its category_id is 2; expected one of 1, the categories in run.json"),
    ("iscrowd", 2, "its iscrowd is 2; expected 0 or 1"),
    ("rank", 99, "its rank is"),
    ("rank", -1, "its rank is"),
    ("parent_id", 1, "its parent_id is 1; expected the mask_index of another mask"),
    ("parent_id", 99, "its parent_id is 99"),
    ("parent_id", -1, "its parent_id is -1"),
]


def read_all(labels: Path) -> None:
    for chunk in list_chunks(str(labels)):
        read_chunk(str(labels), chunk)


@pytest.mark.parametrize(("column", "value", "told"), ANNOTATIONS_DAMAGE)
def test_a_damaged_mask_is_named(labels: Path, column: str, value: Any, told: str) -> None:
    path = labels / "annotations" / CHUNK
    rewrite(path, change_value(column, value))
    with pytest.raises(DamagedFile) as error:
        read_all(labels)
    assert str(error.value).startswith(f"{path} cannot be read: ") and told in str(error.value)
    assert re.search(
        r"(mask -?\w+ of ('0\.png'|None|'nobody\.png'|'broken\.png')|the image '0\.png'): ", str(error.value)
    )
    assert "\n" not in str(error.value) and len(str(error.value)) < 1500


IMAGES_DAMAGE: list[tuple[str, Any, str]] = [
    ("image_id", None, "the image None: its image_id is None"),
    ("image_id", "", "row 1 has no image_id"),
    ("image_id", "0.png", "the image '0.png': it is there twice"),
    ("width", None, "the image '1.png': its width is None; expected pixels"),
    ("width", 0, "its width is 0"),
    ("height", -48, "its height is -48"),
    ("height", 2**31 - 1, "it has 2147483647 x 64 pixels; expected at most 250000000"),
    ("status", None, "its status is None"),
    ("status", "done", "its status is 'done'; expected one of labeled, empty, failed"),
    ("status", "empty", "its status is empty, but its num_masks"),
    ("status", "failed", "its error_stage is None; expected a value, since it failed"),
    ("num_masks", 0, "its status is labeled, but its num_masks 0"),
    ("num_masks", 1000, "but the images table says 1000"),
    ("num_masks", -1, "its num_masks is -1"),
    ("num_candidates", None, "its num_candidates is None"),
    ("num_candidates", -5, "its num_candidates is -5; expected a number that is not negative"),
    ("dropped_box_nms", -5, "its dropped_box_nms is -5"),
    ("exif_orientation", 9, "its exif_orientation is 9; expected 1 to 8"),
    ("seconds", float("nan"), "its seconds is nan"),
    ("seconds", -1.0, "its seconds is -1.0"),
    ("row", -1, "its row is -1"),
]


@pytest.mark.parametrize(("column", "value", "told"), IMAGES_DAMAGE)
def test_a_damaged_image_is_named(labels: Path, column: str, value: Any, told: str) -> None:
    rewrite(labels / "images" / CHUNK, change_value(column, value))
    with pytest.raises(DamagedFile, match=re.escape(told)) as error:
        read_all(labels)
    assert f"{CHUNK} cannot be read: " in str(error.value) and "\n" not in str(error.value)


CANDIDATES_DAMAGE: list[tuple[str, Any, str]] = [
    ("image_id", None, "its image_id is None"),
    ("image_id", "nobody.png", "row 1: its image is not in the images table"),
    ("image_id", "2.png", "it does not follow the others of its image"),
    ("crop_index", 1, "its crop_index is 1; expected one of the image's crops"),
    ("crop_index", -1, "its crop_index is -1"),
    ("predicted_iou", float("nan"), "its predicted_iou is nan"),
    ("stability_score", float("inf"), "its stability_score is inf"),
    ("point_coords", [[1.0, float("nan")]], "expected finite numbers"),
    ("point_coords", [], "expected one point"),
    ("box_xyxy", [0, 0, 64, 3], "its box_xyxy is [0, 0, 64, 3]; expected"),
    ("box_xyxy", [5, 0, 4, 3], "its box_xyxy is [5, 0, 4, 3]"),
    ("box_xyxy", [-1, 0, 4, 3], "its box_xyxy is [-1, 0, 4, 3]"),
    ("box_xyxy", None, "its box_xyxy is None"),
    ("segmentation", None, "it has no segmentation, though it is stable enough"),
    ("segmentation.counts", "PP31", "its counts are no RLE of its image: the runs have 3073 pixels"),
    ("segmentation.counts", "PP4", "the runs have 4096 pixels"),
    ("segmentation.counts", "o", "is no compressed RLE"),
]


@pytest.mark.parametrize(("column", "value", "told"), CANDIDATES_DAMAGE)
def test_a_damaged_candidate_is_named(labels: Path, column: str, value: Any, told: str) -> None:
    path = labels / "candidates" / CHUNK
    stable = next(i for i, row in enumerate(pq.read_table(path).to_pylist()) if i and row["stability_score"] > 0.9)
    rewrite(path, change_value(column, value, 1 if column == "image_id" else stable))
    images = read_chunk(str(labels), ChunkKey("@root", 0)).images
    config = AmgConfig.from_dict(read_run(str(labels)).amg)
    with pytest.raises(DamagedFile, match=re.escape(told)) as error:
        read_candidates(str(labels), ChunkKey("@root", 0), images, COLUMNS, config)
    assert str(error.value).startswith(f"{path} cannot be read: ")


def test_candidates_beyond_those_that_were_counted_are_an_error(labels: Path) -> None:
    rewrite(labels / "images" / CHUNK, change_value("num_candidates", 3, 0))
    images = read_chunk(str(labels), ChunkKey("@root", 0)).images
    config = AmgConfig.from_dict(read_run(str(labels)).amg)
    with pytest.raises(DamagedFile, match=r"candidate 0 of '0\.png': the images table says that there are fewer"):
        read_candidates(str(labels), ChunkKey("@root", 0), images, COLUMNS, config)


@pytest.mark.parametrize("table", ["images", "annotations"])
def test_a_column_of_another_type_is_named(labels: Path, table: str) -> None:
    path = labels / table / CHUNK
    original = path.read_bytes()
    rows = pq.read_table(path)
    for field in rows.schema:
        other = pa.array([[True]] * rows.num_rows)
        pq.write_table(rows.set_column(rows.schema.get_field_index(field.name), field.name, other), path)
        with pytest.raises(DamagedFile, match=f"its column {field.name} is list<.*>; expected "):
            read_all(labels)
        pq.write_table(rows.drop_columns([field.name]), path)
        if field.name in OPTIONAL:
            read_all(labels)
        else:
            with pytest.raises(DamagedFile, match=f"it has no column {field.name}: "):
                read_all(labels)
        path.write_bytes(original)
    read_all(labels)


def test_labels_from_before_there_were_prompts_are_read_as_those_of_a_grid(labels: Path) -> None:
    (now,) = read_chunks(str(labels))
    for table in ("images", "annotations"):
        path = labels / table / CHUNK
        rows = pq.read_table(path)
        pq.write_table(rows.drop_columns([name for name in rows.column_names if name in OPTIONAL]), path)
    (before,) = read_chunks(str(labels))
    assert before.annotations.equals(now.annotations) and before.annotations.schema == now.annotations.schema
    assert before.images.schema == now.images.schema
    for row, expected in zip(before.images.to_pylist(), now.images.to_pylist(), strict=True):
        assert row == {**expected, "dropped_prompt": None}
        assert row_to_image(row) == row_to_image(expected)


# A box and two points that mask 1 answers.
PROMPTED: dict[str, Any] = {
    "prompt_index": 2,
    "prompt_id": "7",
    "point_coords": [[1.0, 2.0], [3.5, 4.0]],
    "point_labels": [1, 0],
    "prompt_box": [1.0, 2.0, 30.0, 0.5],
    "mask_prompt": False,
    "prompt_score": None,
    "mask_token": 0,
}


def prompt_mask(labels: Path, **columns: Any) -> None:
    rewrite(labels / "images" / CHUNK, lambda rows: rows[0].update(num_prompts=3))
    rewrite(labels / "annotations" / CHUNK, lambda rows: rows[1].update({**PROMPTED, **columns}))


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"point_coords": [], "point_labels": []},
        {"prompt_box": None, "prompt_score": 0.5, "prompt_id": None},
        {"mask_prompt": True, "mask_token": 3},
    ],
)
def test_a_mask_of_a_prompt_passes(labels: Path, columns: dict[str, Any]) -> None:
    prompt_mask(labels, **columns)
    (chunk,) = read_chunks(str(labels))
    row = chunk.annotations.to_pylist()[1]
    assert {name: row[name] for name in PROMPTED} == {**PROMPTED, **columns}


@pytest.mark.parametrize(
    ("column", "value", "error"),
    [
        ("prompt_index", 3, "its prompt_index is 3; expected one of the image's prompts"),
        ("prompt_index", -1, "its prompt_index is -1; expected one of the image's prompts"),
        ("prompt_index", None, "its point_coords is [[1.0, 2.0], [3.5, 4.0]]; expected one point"),
        ("point_labels", [1], "its point_labels is [1]; expected one for each point of point_coords"),
        ("point_labels", [1, 2], "its point_labels is [1, 2]; expected 0 and 1"),
        ("point_labels", [1, None], "its point_labels is [1, None]; expected 0 and 1"),
        ("point_labels", None, "its point_labels is None; expected a value, since it has a prompt_index"),
        ("point_coords", [[1.0, 2.0], [float("nan"), 4.0]], "its point_coords is [nan, 4.0]; expected finite numbers"),
        ("prompt_box", [1.0, 2.0, 3.0], "expected 4 numbers"),
        ("prompt_box", [1.0, 2.0, 0.0, 4.0], "expected [x, y, width, height], neither side 0"),
        ("mask_prompt", None, "its mask_prompt is None; expected a value"),
        ("prompt_score", float("nan"), "its prompt_score is nan; expected a finite number"),
        ("mask_token", 4, "its mask_token is 4; expected 0 to 3"),
    ],
)
def test_a_damaged_prompt_is_named(labels: Path, column: str, value: Any, error: str) -> None:
    prompt_mask(labels, **{column: value})
    with pytest.raises(DamagedFile) as raised:
        read_all(labels)
    assert MASK in str(raised.value) and error in str(raised.value)


def test_a_mask_of_the_grid_has_no_columns_of_a_prompt(labels: Path) -> None:
    rewrite(labels / "annotations" / CHUNK, change_value("prompt_id", "7"))
    with pytest.raises(DamagedFile, match=re.escape("its prompt_id is '7'; expected null, since it has no prompt")):
        read_all(labels)


def test_text_that_is_no_utf8_is_an_error(labels: Path) -> None:
    path = labels / "images" / CHUNK
    table = pq.read_table(path)
    broken = pa.array([b"\xff.png"] * table.num_rows, pa.binary()).view(pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("file_name"), "file_name", broken), path)
    with pytest.raises(DamagedFile, match="UTF8"):
        read_all(labels)


def test_tables_that_others_wrote_with_the_same_values_are_read(labels: Path) -> None:
    """Names within lists, large strings and dictionaries are how a program stores values, not what they are."""
    before = [list(chunk.rows()) for chunk in read_chunks(str(labels))]
    path = labels / "annotations" / CHUNK
    table = pq.read_table(path)
    index = table.schema.get_field_index("image_id")
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(table.set_column(index, "image_id", table["image_id"].cast(kind)), path, row_group_size=3)
        assert [list(chunk.rows()) for chunk in read_chunks(str(labels))] == before


IMPORTED_DAMAGE: list[tuple[str, str, Any, str]] = [
    ("annotations", "category_id", 1, "its category_id is 1; expected one of 3, 18, the categories in run.json"),
    ("annotations", "coco", None, "its coco is None"),
    ("annotations", "coco", "{", "its coco: it is not JSON"),
    ("annotations", "coco", "[]", "its coco is '[]'; expected an object with an id"),
    ("annotations", "coco", "{}", "expected an object with an id"),
    ("annotations", "coco", '{"id": 1, "x": ' + "[" * 5000 + "]" * 5000 + "}", "nests more than 64 levels deep"),
    ("annotations", "coco", '{"id": 1, "x": NaN}', "it has the number NaN"),
    ("annotations", "coco", '{"id": 1, "segmentation": []}', "without segmentation and image_id"),
    ("images", "coco", '{"id": 1, "height": "6"}', "without width and height"),
    ("images", "coco", '{"id": 1, "file_name": 3}', "its file_name is '3'; expected text"),
]


@pytest.mark.parametrize(("table", "column", "value", "told"), IMPORTED_DAMAGE)
def test_damaged_imported_labels_are_named(imported: Path, table: str, column: str, value: Any, told: str) -> None:
    (path,) = (imported / table).iterdir()
    rewrite(path, change_value(column, value))
    with pytest.raises(DamagedFile, match=re.escape(told)):
        read_all(imported)


RUN_DAMAGE: list[tuple[Any, str]] = [
    ("{", "it is not JSON"),
    ("[" * 100_000, "nests more than 64 levels deep"),
    ("[" * 100 + "]" * 100, "nests more than 64 levels deep"),
    ('{"a": 1e400}', "the number 1e400"),
    ("\0\0", "it begins with"),
    ({"amg": []}, "its amg is '[]'; expected dict"),
    ({"root": 3}, "its root is '3'; expected str"),
    ({"max_pixels": True}, "its max_pixels is 'True'"),
    ({"max_pixels": 0}, "max_pixels is 0"),
    ({"exif": "turn"}, "exif is 'turn'"),
    ({"names": {"tfrecord_image": 3}}, "not iterable"),
    ({"names": {"other": ["a"]}}, "unexpected keyword"),
    ({"coco": {"categories": 3}}, "no list of category records"),
    ({"coco": {"categories": [{"id": "a"}]}}, "no whole number"),
    ({"versions": []}, "its versions is"),
]


@pytest.mark.parametrize(("content", "told"), RUN_DAMAGE)
def test_a_damaged_run_json_is_named(labels: Path, content: Any, told: str) -> None:
    path = labels / "run.json"
    run = json.loads(path.read_text())
    path.write_text(content if isinstance(content, str) else json.dumps({**run, **content}))
    with pytest.raises(DamagedFile, match=re.escape(told)) as error:
        read_run(str(labels))
    assert str(error.value).startswith(f"{path} is damaged: ") and "\n" not in str(error.value)


# Every command.


def truth_of_photos() -> dict[str, Any]:
    images = [{"id": n, "file_name": f"{n}.png", "width": _W, "height": _H} for n in range(3)] + [
        {"id": 9, "file_name": "broken.png", "width": _W, "height": _H}
    ]
    mask = {"id": 1, "image_id": 0, "segmentation": [[1, 1, 9, 1, 9, 9]], "bbox": [1, 1, 8, 8], "area": 32}
    return {"images": images, "annotations": [mask]}


READERS: dict[str, list[str]] = {
    "view": ["view", "--labels", "{labels}", "--output", "{out}"],
    "view --png": ["view", "--labels", "{labels}", "--output", "{out}", "--png"],
    "coco": ["export", "--labels", "{labels}", "--format", "coco", "--output", "{out}"],
    "polygons": ["export", "--labels", "{labels}", "--format", "coco", "--output", "{out}", "--polygons"],
    "sa1b": ["export", "--labels", "{labels}", "--format", "sa1b", "--output", "{out}"],
    "yolo": ["export", "--labels", "{labels}", "--format", "yolo", "--output", "{out}"],
    "png": ["export", "--labels", "{labels}", "--format", "png", "--output", "{out}"],
    "truth": ["evaluate", "--labels", "{labels}", "--truth", "{truth}"],
    "against": ["evaluate", "--labels", "{labels}", "--against", "{whole}"],
    "against damaged": ["evaluate", "--labels", "{whole}", "--against", "{labels}"],
    "refine": ["refine", "--labels", "{labels}", "--output", "{out}"],
}


def run_reader(reader: str, labels: Path, whole: Path, directory: Path) -> int:
    truth = directory / "truth.json"
    truth.write_text(json.dumps(truth_of_photos()))
    places = {"labels": labels, "whole": whole, "out": directory / "out", "truth": truth}
    return cli.main([argument.format(**places) for argument in READERS[reader]])


@pytest.mark.parametrize("reader", READERS)
def test_whole_labels_are_read(whole: Path, tmp_path: Path, reader: str) -> None:
    """Or the tests below would show nothing."""
    assert run_reader(reader, whole, whole, tmp_path) == 0


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    pq.write_table(pa.table({"image_id": ["0.png"], "x": [1]}), path)


def flip(path: Path) -> None:
    """A bit in the data of the largest column, where compression shows nothing of it but the checksum does."""
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 1
    path.write_bytes(data)


FILE_DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "short counts": ("annotations", lambda path: rewrite(path, change_value("segmentation.counts", "PP2")), MASK),
    "long counts": ("annotations", lambda path: rewrite(path, change_value("segmentation.counts", "PP4")), MASK),
    "many counts": (
        "annotations",
        lambda path: rewrite(path, change_value("segmentation.counts", "PP3" + "00" * 9999 + "01")),
        MASK,
    ),
    "no RLE": ("annotations", lambda path: rewrite(path, change_value("segmentation.counts", "oooo")), MASK),
    "size zero": ("annotations", lambda path: rewrite(path, change_value("segmentation.size", [0, 0])), MASK),
    "size huge": ("annotations", lambda path: rewrite(path, change_value("segmentation.size", [2**31 - 1] * 2)), MASK),
    "null": ("annotations", lambda path: rewrite(path, change_value("area", None)), MASK),
    "mask_index": ("annotations", lambda path: rewrite(path, change_value("mask_index", 2**31 - 1)), "mask 2147483647"),
    "category": ("annotations", lambda path: rewrite(path, change_value("category_id", 7)), MASK),
    "stranger": ("annotations", lambda path: rewrite(path, change_value("image_id", "x")), "mask 1 of 'x'"),
    "missing mask": ("annotations", lambda path: rewrite(path, lambda rows: rows.pop()), "the image '2.png'"),
    "image size": ("images", lambda path: rewrite(path, change_value("height", 0)), "the image '1.png'"),
    "truncated": ("annotations", truncate, "its end is missing"),
    "truncated images": ("images", truncate, "Delete it"),
    "empty": ("annotations", empty, "no Parquet file"),
    "foreign": ("annotations", foreign, "it has no column mask_index"),
    "flipped bit": ("annotations", flip, "cannot be read"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", FILE_DAMAGE)
def test_each_command_ends_with_one_sentence(
    labels: Path, whole: Path, tmp_path: Path, damage: str, reader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table, change, told = FILE_DAMAGE[damage]
    path = labels / table / CHUNK
    change(path)
    assert run_reader(reader, labels, whole, tmp_path) == 1
    error = capsys.readouterr().err
    assert one_sentence(error, "maskbeam", CHUNK, told, "run the command that made it again"), error


@pytest.mark.parametrize("counts", ["PP2", "PP4", "PP31", "o", None])
def test_refine_names_a_damaged_candidate(
    labels: Path, tmp_path: Path, counts: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = labels / "candidates" / CHUNK
    stable = next(i for i, row in enumerate(pq.read_table(path).to_pylist()) if row["stability_score"] > 0.9)
    rewrite(path, change_value("segmentation.counts", counts, stable))
    flags = ["--labels", str(labels), "--output", str(tmp_path / "out"), "--min_mask_region_area", "20"]
    assert cli.main(["refine", *flags]) == 1
    assert one_sentence(capsys.readouterr().err, str(path), f"candidate {stable} of '0.png': ")


# Files that would fill the memory.


def dictionary_bomb(table: pa.Table) -> pa.Table:
    """A text of a megabyte, to which twenty thousand rows point."""
    rows = table.take(pa.array(np.zeros(20_000, np.int64)))
    counts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int32)), pa.array(["0" * 2**20]))
    size = pa.array([list(SIZE_HW)] * 20_000, pa.list_(pa.int32()))
    return rows.set_column(2, "segmentation", pa.StructArray.from_arrays([size, counts], ["size", "counts"]))


def page_bomb(table: pa.Table) -> pa.Table:
    """A text of 300 MB that compresses to nearly nothing."""
    size = pa.array([list(SIZE_HW)], pa.list_(pa.int32()))
    segmentation = pa.StructArray.from_arrays([size, pa.array(["0" * (300 * 2**20)])], ["size", "counts"])
    return table.slice(0, 1).set_column(2, "segmentation", segmentation)


def null_bomb(table: pa.Table) -> pa.Table:
    """Three million rows of nothing, a few bytes a column."""
    return pa.table({field.name: pa.nulls(3_000_000, _nullable(field).type) for field in table.schema})


_PRINT_PEAK = """
import re, sys
from pipeline import cli
code = cli.main(sys.argv[1:])
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
sys.exit(code)
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory in /proc")
@pytest.mark.parametrize("bomb", [dictionary_bomb, page_bomb, null_bomb])
def test_a_bomb_takes_no_memory(labels: Path, tmp_path: Path, bomb: Callable[[pa.Table], pa.Table]) -> None:
    path = labels / "annotations" / CHUNK
    plain = bomb is page_bomb
    pq.write_table(bomb(pq.read_table(path)), path, compression="zstd", use_dictionary=not plain)
    assert path.stat().st_size < 2**20
    flags = ["export", "--labels", str(labels), "--format", "yolo", "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", _PRINT_PEAK, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and one_sentence(done.stderr, str(path), "no table of masks"), done.stderr
    assert int(done.stdout) < 500


# Whatever else.

DROPPED = object()  # the row goes

odd_values = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0, 1, -1, 2**31 - 1, 2**31, -(2**31)]),
    st.floats(),
    st.text(max_size=6),
    st.text(alphabet=[chr(code) for code in range(48, 112)], max_size=12),
    st.lists(st.one_of(st.integers(-100, 2**31 - 1), st.none()), max_size=5),
    st.lists(st.floats(), max_size=5),
    st.lists(st.lists(st.floats(), max_size=3), max_size=2),
    st.just(DROPPED),
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_value_whatever_is_a_traceback(whole: Path, data: st.DataObject) -> None:
    """What the door lets pass is exported as outlines, which ask most of a mask."""
    with tempfile.TemporaryDirectory() as name:
        labels = Path(shutil.copytree(whole, Path(name) / "labels"))
        path = labels / data.draw(st.sampled_from(["annotations", "images"])) / CHUNK
        schema = pq.read_schema(path)
        columns = [*schema.names, *(["segmentation.counts", "segmentation.size"] * ("segmentation" in schema.names))]
        column, row, value = data.draw(st.sampled_from(columns)), data.draw(st.integers(0, 2)), data.draw(odd_values)
        change = change_value(column, value, row) if value is not DROPPED else lambda rows: rows.pop(row)
        try:
            rewrite(path, change)
        except (pa.ArrowException, OverflowError):  # the column cannot hold the value
            return
        with contextlib.redirect_stderr(io.StringIO()) as error:
            flags = ["--labels", str(labels), "--output", str(Path(name) / "out"), "--format", "yolo"]
            code = cli.main(["export", *flags])
        assert code == 0 or (code == 1 and one_sentence(error.getvalue(), CHUNK)), error.getvalue()
