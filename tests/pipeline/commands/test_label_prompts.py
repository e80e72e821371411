"""maskbeam label --prompts: the program with a fake model, from files of prompts to rows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maskbeam.pipeline.exits import UsageError
from maskbeam.pipeline.launch.local import run_label
from maskbeam.pipeline.options import parse_label
from maskbeam.transforms import generate_masks
from maskbeam.transforms.prompt_files import finder
from tests.conftest import Labels, photo_bytes, read_labels
from tests.fakes import FakeSam, load_fake


def label(photos: Path, output: Path, *flags: str | Path, load: Callable[..., Any] = load_fake) -> int:
    job, options = parse_label(["--input", str(photos), "--output", str(output), *map(str, flags)])
    return run_label(job, options, load)


def summary(output: Path) -> dict[str, Any]:
    return json.loads((output / "summary.json").read_text())


def run_json(output: Path) -> dict[str, Any]:
    return json.loads((output / "run.json").read_text())


CSV = """image,xmin,ymin,xmax,ymax,category,score,id
1.png,10,10,30,30,dog,0.9,b
0.png,5,5,25,25,cat,0.8,a
1.png,20,20,60,44,cat,0.2,c
"""


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    path = tmp_path / "boxes.csv"
    path.write_text(CSV)
    return path


def rows_by_image(labels: Labels) -> dict[str, list[dict[str, Any]]]:
    return {
        image["image_id"]: [row for row in labels.annotations if row["image_id"] == image["image_id"]]
        for image in labels.images
    }


def test_one_prompt_is_one_row_with_its_class_and_id(photos: Path, output: Path, boxes: Path) -> None:
    assert label(photos, output, "--prompts", boxes) == 0
    rows = rows_by_image(read_labels(output))
    assert {name: [row["prompt_id"] for row in own] for name, own in rows.items()} == {
        **{"0.png": ["a"], "1.png": ["b", "c"]},
        **{f"{number}.png": [] for number in range(2, 6)},
    }
    assert [row["prompt_box"] for row in rows["1.png"]] == [[10, 10, 20, 20], [20, 20, 40, 24]]
    assert [row["category_id"] for row in rows["1.png"]] == [2, 1]
    assert [row["prompt_score"] for row in rows["1.png"]] == pytest.approx([0.9, 0.2])
    assert [row["prompt_index"] for row in rows["1.png"]] == [0, 1]
    run = run_json(output)
    assert run["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert run["prompt_files"] == [str(boxes)]


def test_images_without_prompts_are_empty_and_never_embedded(
    photos: Path, output: Path, boxes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    decode = generate_masks.decode_image

    def counted(data: bytes, config: Any) -> Any:
        decoded.append(data)
        return decode(data, config)

    monkeypatch.setattr(generate_masks, "decode_image", counted)
    assert label(photos, output, "--prompts", boxes) == 0
    images = {row["image_id"]: row for row in read_labels(output).images}
    assert sorted(decoded) == sorted(photo_bytes(number) for number in (0, 1))
    empty = images["5.png"]
    assert (empty["status"], empty["width"], empty["height"], empty["num_prompts"]) == ("empty", 64, 48, 0)
    assert (images["0.png"]["num_prompts"], images["0.png"]["prompts_key"]) == (1, "0.png")


def test_every_prompt_is_accounted_for(photos: Path, output: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text(
        "image,xmin,ymin,xmax,ymax,id\n0.png,5,5,25,25,good\n0.png,9,9,9,20,flat\n0.png,5,5,nan,25,no number\n"
        "0.png,-5,5,25,25,clipped\n1.png,100,5,120,25,outside\n7.png,5,5,9,9,unused\n,5,5,9,9,lost\n"
    )
    assert label(photos, output, "--prompts", path) == 0
    images = {row["image_id"]: row for row in read_labels(output).images}
    for image in images.values():
        assert image["num_prompts"] == image["num_masks"] + image["dropped_prompt"]
    assert (images["0.png"]["num_prompts"], images["0.png"]["num_masks"], images["0.png"]["dropped_prompt"]) == (
        4,
        2,
        2,
    )
    assert (images["1.png"]["status"], images["1.png"]["dropped_prompt"]) == ("empty", 1)
    kept = [(row["prompt_id"], row["prompt_index"]) for row in read_labels(output).annotations]
    assert kept == [("good", 0), ("clipped", 3)]
    found = summary(output)
    assert (found["prompts"], found["clipped_prompts"], found["prompts_unused"], found["prompts_lost"]) == (5, 1, 1, 1)
    assert found["prompts_unused_images"] == ["7.png"]
    assert [text.split(": ")[:2] for text in found["dropped_prompts"]] == [
        ["0.png", "flat"],
        ["0.png", "no number"],
        ["1.png", "outside"],
    ]
    assert "boxes.csv, row 3: xmax is nan" in found["dropped_prompts"][1]
    printed = capsys.readouterr().out
    assert "5 prompts, 3 of them dropped, 1 boxes clipped to their image" in printed
    assert "dropped 0.png: flat: its box from (9, 9) to (9, 20) has no area" in printed
    assert "1 prompts are for images that are not there: 7.png" in printed
    assert "1 rows of prompts name no image, the first: boxes.csv, row 7: image is missing" in printed


def test_a_coco_file_keeps_its_ids_and_classes_and_counts_crowds(
    photos: Path, output: Path, tmp_path: Path, capsys: Any
) -> None:
    content = {
        "images": [{"id": 77, "file_name": "3.png", "width": 64, "height": 48}],
        "annotations": [
            {"id": 501, "image_id": 77, "category_id": 90, "bbox": [1.25, 2, 30, 40]},
            {"id": 502, "image_id": 77, "category_id": 3, "bbox": [0, 0, 20, 20], "iscrowd": 1},
            {"id": 500, "image_id": 77, "category_id": 3, "bbox": [20, 20, 30, 20]},
        ],
        "categories": [{"id": 3, "name": "car"}, {"id": 90, "name": "brush"}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    assert label(photos, output, "--prompts", path) == 0
    rows = read_labels(output).annotations
    assert [(row["prompt_id"], row["category_id"]) for row in rows] == [("501", 90), ("500", 3)]
    assert rows[0]["prompt_box"] == [1.25, 2, 30, 40]
    assert run_json(output)["categories"] == content["categories"]
    assert "1 crowd regions are no objects and were not prompted" in capsys.readouterr().out


def test_labels_can_be_refined(photos: Path, output: Path, boxes: Path, tmp_path: Path) -> None:
    assert label(photos, output, "--prompts", boxes) == 0
    again = tmp_path / "again"
    assert label(photos, again, "--prompts", output, "--refine_steps", "1") == 0
    rows = read_labels(again).annotations
    assert [(row["image_id"], row["prompt_id"], row["category_id"], row["mask_prompt"]) for row in rows] == [
        ("0.png", "0", 1, True),
        ("1.png", "0", 2, True),
        ("1.png", "1", 1, True),
    ]
    assert run_json(again)["categories"] == run_json(output)["categories"]


def test_yolo_files_beside_the_images(tmp_path: Path, output: Path) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "images" / "train" / "a.png").write_bytes(photo_bytes(0))
    (tmp_path / "labels" / "train" / "a.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    flags = ("--prompts", tmp_path / "labels", "--prompts_format", "yolo", "--categories", names)
    assert label(tmp_path / "images", output, *flags) == 0
    (row,) = read_labels(output).annotations
    assert (row["prompt_box"], row["category_id"]) == ([16, 12, 32, 24], 1)
    assert run_json(output)["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]


def test_prompts_in_the_records(tmp_path: Path, output: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("1.jpg", photo_bytes(1)),
            ("1.json", json.dumps([{"bbox": [5, 5, 20, 20], "category": "dog"}]).encode()),
            ("2.jpg", photo_bytes(2)),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    flags = ("--prompts", "in_record", "--prompts_bbox", "xywh", "--categories", names)
    assert label(tmp_path / "a.tar", output, *flags) == 0
    (row,) = read_labels(output).annotations
    assert (row["image_id"], row["prompt_box"], row["category_id"]) == ("a.tar#0", [5, 5, 20, 20], 1)
    assert [(image["status"], image["num_prompts"]) for image in read_labels(output).images] == [
        ("labeled", 1),
        ("empty", 0),
    ]


def test_all_four_masks(photos: Path, output: Path, boxes: Path) -> None:
    assert label(photos, output, "--prompts", boxes, "--mask", "all", "--min_prompt_score", "0.5") == 0
    rows = read_labels(output).annotations
    assert [(row["prompt_id"], row["mask_token"]) for row in rows] == [
        (prompt, token) for prompt in ("a", "b") for token in range(4)
    ]


def write_turned(path: Path) -> None:
    """A photo stored 64 x 48 that EXIF turns to 48 x 64."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(photo_bytes(0)))
    image.save(path, "JPEG", exif=exif)


def test_boxes_on_the_stored_pixels_of_a_turned_photo_name_the_flag(tmp_path: Path, output: Path) -> None:
    (tmp_path / "photos").mkdir()
    write_turned(tmp_path / "photos" / "0.jpg")
    (tmp_path / "photos" / "1.png").write_bytes(photo_bytes(1))
    path = tmp_path / "boxes.csv"
    path.write_text("image,x,y,w,h,width,height\n0.jpg,5,5,20,20,64,48\n1.png,5,5,20,20,64,48\n")
    assert label(tmp_path / "photos", output, "--prompts", path) == 0
    failed, fine = read_labels(output).images
    assert (failed["status"], failed["error_stage"], fine["status"]) == ("failed", "prompt", "labeled")
    assert "Use --exif ignore" in failed["error"]
    stored = tmp_path / "stored"
    assert label(tmp_path / "photos", stored, "--prompts", path, "--exif", "ignore") == 0
    assert [image["status"] for image in read_labels(stored).images] == ["labeled", "labeled"]


def test_boxes_for_another_size_can_be_scaled(photos: Path, output: Path, tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text("image,x,y,w,h,width,height\n0.png,10,10,40,40,128,96\n")
    assert label(photos, output, "--prompts", path, "--scale_prompts") == 0
    assert [row["prompt_box"] for row in read_labels(output).annotations] == [[5, 5, 20, 20]]


@pytest.mark.parametrize(
    "flags", [("--points_per_side", "8"), ("--crop_n_layers", "1"), ("--box_nms_thresh", "0.5"), ("--profile", "sa1b")]
)
def test_flags_of_the_grid_are_refused_by_name(photos: Path, output: Path, boxes: Path, flags: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=f"{flags[0]} is for a grid"):
        label(photos, output, "--prompts", boxes, *flags)


def test_prompts_that_cannot_be_used_are_a_usage_error_and_leave_no_output(
    photos: Path, output: Path, tmp_path: Path
) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text("image,xmin,ymin,xmax,ymax\n0.png,0.1,0.1,0.5,0.5\n")
    with pytest.raises(UsageError, match="look relative"):
        label(photos, output, "--prompts", path)
    assert not output.exists()


def test_other_prompts_are_another_run(photos: Path, output: Path, boxes: Path) -> None:
    assert label(photos, output, "--prompts", boxes) == 0
    before = read_labels(output)
    assert label(photos, output, "--prompts", boxes) == 0
    boxes.write_text(CSV.replace("5,5,25,25", "6,5,25,25"))
    with pytest.raises(UsageError, match="prompts_digest was"):
        label(photos, output, "--prompts", boxes)
    with pytest.raises(UsageError, match="refine_steps was 0, now 1"):
        boxes.write_text(CSV)
        label(photos, output, "--prompts", boxes, "--refine_steps", "1")
    assert read_labels(output) == before
    boxes.write_text(CSV.replace("5,5,25,25", "6,5,25,25"))
    assert label(photos, output, "--prompts", boxes, "--overwrite") == 0
    assert read_labels(output).annotations[0]["prompt_box"] == [6, 5, 19, 20]
    assert len(list((output / "_prompts").rglob("meta.json"))) == 1


class SickSam(FakeSam):
    """Fails on the second photo until it is well."""

    well = False

    def embed(self, frame: Any, resized_hw: tuple[int, int]) -> Any:
        if frame[0, 0, 0] == 1 and not self.well:
            raise RuntimeError("sick")
        return super().embed(frame, resized_hw)


def test_failed_images_are_tried_again(photos: Path, output: Path, boxes: Path, tmp_path: Path) -> None:
    assert label(photos, output, "--prompts", boxes, load=lambda config: SickSam()) == 0
    failed = read_labels(output).images[1]
    assert (failed["status"], failed["error_stage"], failed["num_prompts"]) == ("failed", "model", 2)
    assert label(photos, output, "--prompts", boxes, "--retry_failed") == 0
    assert label(photos, tmp_path / "once", "--prompts", boxes) == 0
    assert read_labels(output) == read_labels(tmp_path / "once")


class Killed(FakeSam):
    """Dies on the second photo, as a process that is killed."""

    def embed(self, frame: Any, resized_hw: tuple[int, int]) -> Any:
        if frame[0, 0, 0] == 1:
            raise KeyboardInterrupt
        return super().embed(frame, resized_hw)


def test_a_run_that_was_killed_goes_on(photos: Path, output: Path, boxes: Path, tmp_path: Path) -> None:
    assert label(photos, output, "--prompts", boxes, "--chunk_size", "1", load=lambda config: Killed()) != 0
    assert len(read_labels(output).images) < 6
    assert label(photos, output, "--prompts", boxes, "--chunk_size", "1") == 0
    assert label(photos, tmp_path / "once", "--prompts", boxes, "--chunk_size", "1") == 0
    assert read_labels(output) == read_labels(tmp_path / "once")


def test_prompts_of_no_image_end_the_run_with_a_name_of_each_side(
    photos: Path, output: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text("image,x,y,w,h\nval/0.png,5,5,20,20\n")
    assert label(photos, output, "--prompts", path) == 1
    told = capsys.readouterr().err
    assert "none of 6 images, such as '0.png', has a prompt" in told and "'val/0.png'" in told
    assert "--prompts_key" in told
    monkeypatch.setattr(finder, "_IMAGES_LOOKED_AT", 2)
    assert label(photos, tmp_path / "many", "--prompts", path, "--chunk_size", "2") == 1
    assert "none of 2 images, such as '0.png', has a prompt" in capsys.readouterr().err
    assert label(photos, tmp_path / "stem", "--prompts", path, "--prompts_key", "stem") == 0


def test_two_images_of_one_name_are_told(tmp_path: Path, output: Path, capsys: Any) -> None:
    for directory in ("a", "b"):
        (tmp_path / "photos" / directory).mkdir(parents=True)
        (tmp_path / "photos" / directory / "1.png").write_bytes(photo_bytes(1))
    path = tmp_path / "boxes.csv"
    path.write_text("image,x,y,w,h\n1,5,5,20,20\n")
    assert label(tmp_path / "photos", output, "--prompts", path, "--prompts_key", "stem") == 1
    assert "two images share the prompts of '1'" in capsys.readouterr().err
