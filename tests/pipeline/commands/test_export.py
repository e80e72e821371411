"""`maskbeam export` on labels that `maskbeam label` made, read back with the tools of the formats.

That pycocotools fills outlines as they should be is tested in test_polygons, what becomes of hostile names in
test_formats and, with real files, here.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskbeam.pipeline import cli
from maskbeam.pipeline.commands import export as export_module
from tests.conftest import Labels, label, photo_bytes, read_labels, write_photos
from tests.pipeline.commands.test_import_coco import DISC, rle_of, run_import
from tests.transforms.readers.test_shard import tar_bytes


@dataclass(frozen=True)
class Labeled:
    """Labels of loose photos, one of them in a folder, of a photo in a tar, of a black image and of a broken one."""

    directory: Path
    rows: Labels

    def masks(self, image_id: str) -> list[dict[str, Any]]:
        return [row for row in self.rows.annotations if row["image_id"] == image_id]


# image_id -> file_name of the COCO file, in the order of the chunks: "@root", "some.tar", "train".
FILE_NAMES = {
    "0.png": "0.png",
    "1.png": "1.png",
    "black.png": "black.png",
    "some.tar#0": "cats/7.png",
    "train/2.png": "train/2.png",
}


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Labeled:
    directory = tmp_path_factory.mktemp("export")
    photos = write_photos(directory / "in", 2)
    write_photos(photos / "train", 1, first=2)
    Image.new("RGB", (64, 48)).save(photos / "black.png")
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "some.tar").write_bytes(tar_bytes(("cats/7.png", photo_bytes(7))))
    assert label("--input", photos, "--output", directory / "labels", "--chunk_size", "2") == 0
    rows = read_labels(directory / "labels")
    assert {row["image_id"] for row in rows.images} == {*FILE_NAMES, "broken.png"}
    return Labeled(directory / "labels", rows)


def export(labels: Path, form: str, output: Path, *flags: str) -> int:
    return cli.main(["export", "--labels", str(labels), "--format", form, "--output", str(output), *flags])


def imported(directory: Path, masks: list[np.ndarray], names: list[str] | None = None, **others: Any) -> Path:
    """Labels of images with these names, the first of which has these masks."""
    height, width = masks[0].shape if masks else (6, 8)
    content = {
        "images": [
            {"id": n, "file_name": name, "width": width, "height": height} for n, name in enumerate(names or ["a.jpg"])
        ],
        "annotations": [
            {"id": n, "image_id": 0, "category_id": 1, "segmentation": rle_of(mask)} for n, mask in enumerate(masks)
        ],
        "categories": [{"id": 7, "name": 'a "dog"'}, {"id": 1, "name": "car: red"}],
        **others,
    }
    (directory / "truth.json").write_text(json.dumps(content))
    assert run_import(directory / "truth.json", directory / "imported") == 0
    return directory / "imported"


def quiet_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def parse_yolo(text: str) -> list[tuple[int, np.ndarray]]:
    """Class and (N, 2) corners of each line, as fractions."""
    lines = [line.split() for line in text.splitlines()]
    return [(int(numbers[0]), np.array(numbers[1:], float).reshape(-1, 2)) for numbers in lines]


def fill(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    polygon = (corners * [width, height]).ravel().tolist()
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], height, width))).astype(bool)


def files_below(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


# COCO.


def test_coco_has_the_rows_of_the_tables(labeled: Labeled, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(labeled.directory, "coco", tmp_path / "coco.json") == 0
    out = capsys.readouterr().out
    assert f"5 images with {len(labeled.rows.annotations)} masks: {tmp_path}/coco.json" in out
    assert f"1 failed images are not in it; they are rows with status failed in {labeled.directory}/images" in out
    assert "  failed broken.png: decode: " in out

    coco = quiet_coco(tmp_path / "coco.json")
    # The broken one was fourth. Its id stays free for when it is mended.
    assert {image["id"]: image["file_name"] for image in coco.imgs.values()} == dict(
        zip((1, 2, 3, 5, 6), FILE_NAMES.values(), strict=True)
    )
    assert [image["image_id"] for image in coco.imgs.values() if "image_id" in image] == ["some.tar#0"]
    assert [category["name"] for category in coco.cats.values()] == ["object"]
    assert list(coco.anns) == list(range(1, len(labeled.rows.annotations) + 1))
    for image, image_id in zip(coco.imgs.values(), FILE_NAMES, strict=True):
        rows = labeled.masks(image_id)
        assert len(rows) == len(coco.imgToAnns[image["id"]]) and (image["width"], image["height"]) == (64, 48)
        for row, record in zip(rows, coco.imgToAnns[image["id"]], strict=True):
            same = ("segmentation", "area", "bbox", "category_id", "iscrowd", "point_coords", "crop_box")
            assert {key: record[key] for key in same} == {key: row[key] for key in same}
            for key in ("predicted_iou", "stability_score"):
                assert np.float32(record[key]) == np.float32(row[key])
            assert record["score"] == record["predicted_iou"]


def test_coco_finds_all_of_itself(labeled: Labeled, tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    assert export(labeled.directory, "coco", path) == 0
    truth = quiet_coco(path)
    with contextlib.redirect_stdout(io.StringIO()):
        results = truth.loadRes(json.loads(path.read_text())["annotations"])
        evaluation = COCOeval(truth, results, "segm")
        evaluation.params.maxDets = [1, 10, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, :, 0, -1]  # of all areas, with 1000 masks an image
    assert recall.size == 10 and (recall == 1).all()


def test_the_same_labels_are_the_same_file(labeled: Labeled, tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        assert export(labeled.directory, "coco", tmp_path / name) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_polygons_of_masks_without_holes_are_the_masks(
    labeled: Labeled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(labeled.directory, "coco", tmp_path / "rle.json") == 0
    assert export(labeled.directory, "coco", tmp_path / "polygons.json", "--polygons") == 0
    rle, polygons = quiet_coco(tmp_path / "rle.json"), quiet_coco(tmp_path / "polygons.json")
    assert all(isinstance(record["segmentation"], list) for record in polygons.anns.values())
    for annotation_id, record in polygons.anns.items():
        np.testing.assert_array_equal(polygons.annToMask(record), rle.annToMask(rle.anns[annotation_id]))
    out = capsys.readouterr().out
    assert f"{len(rle.anns)} masks as polygons: mean IoU with the mask 1.0000, worst 1.0000; 0 holes of 0 masks" in out


def test_polygons_say_what_they_lose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ring = np.ones((6, 8), bool)
    ring[1:4, 2:6] = False  # 12 of the 48 pixels
    labels = imported(tmp_path, [ring, DISC, np.zeros((6, 8), bool)])
    assert export(labels, "coco", tmp_path / "polygons.json", "--polygons") == 0
    assert "2 masks as polygons: mean IoU with the mask 0.8750, worst 0.7500 (a.jpg, mask_index 0); 1 holes of 1" in (
        capsys.readouterr().out
    )
    coco = quiet_coco(tmp_path / "polygons.json")
    assert coco.annToMask(coco.anns[0]).all() and coco.anns[0]["area"] == 36
    np.testing.assert_array_equal(coco.annToMask(coco.anns[1]), DISC)
    assert not coco.annToMask(coco.anns[2]).any()  # stays RLE


def test_labels_without_masks_are_files_without_annotations(tmp_path: Path) -> None:
    labels = imported(tmp_path, [])
    assert export(labels, "coco", tmp_path / "coco.json", "--polygons") == 0
    coco = quiet_coco(tmp_path / "coco.json")
    assert len(coco.imgs) == 1 and not coco.anns
    for form in ("sa1b", "yolo", "png"):
        assert export(labels, form, tmp_path / form) == 0


@pytest.mark.clients
def test_duckdb_and_hugging_face_datasets_load_the_tables(
    labeled: Labeled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    files = f"{labeled.directory}/annotations/*.parquet"
    areas = duckdb.sql(f"SELECT image_id, avg(area) FROM '{files}' GROUP BY image_id").fetchall()
    masks = datasets.load_dataset("parquet", data_files=files, split="train")
    rows = labeled.rows.annotations
    assert dict(areas) == {
        image_id: pytest.approx(np.mean([row["area"] for row in labeled.masks(image_id)]))
        for image_id in {row["image_id"] for row in rows}
    }
    assert sorted(masks["area"]) == sorted(row["area"] for row in rows)


# Directories.


def test_sa1b_has_the_keys_of_sa1b(labeled: Labeled, tmp_path: Path) -> None:
    assert export(labeled.directory, "sa1b", tmp_path / "out") == 0
    names = {f"annotations/{name.removesuffix('.png')}.json": key for key, name in FILE_NAMES.items()}
    assert files_below(tmp_path / "out") == {*names, "export.json"}
    ids = []
    for file, image_id in names.items():
        content = json.loads((tmp_path / "out" / file).read_text())
        assert content["image"].keys() == {"image_id", "width", "height", "file_name"}
        assert content["image"]["file_name"] == FILE_NAMES[image_id]
        rows = labeled.masks(image_id)
        for row, record in zip(rows, content["annotations"], strict=True):
            same = {"segmentation", "bbox", "area", "crop_box", "point_coords"}
            assert record.keys() == {"id", "predicted_iou", "stability_score", *same}
            assert {key: record[key] for key in same} == {key: row[key] for key in same}
            assert np.float32(record["predicted_iou"]) == np.float32(row["predicted_iou"])
            ids.append(record["id"])
    assert sorted(ids) == list(range(1, len(labeled.rows.annotations) + 1))


def test_sa1b_of_imported_masks_has_null_for_what_nobody_knows(tmp_path: Path) -> None:
    assert export(imported(tmp_path, [DISC]), "sa1b", tmp_path / "out") == 0
    (record,) = json.loads((tmp_path / "out" / "annotations" / "a.json").read_text())["annotations"]
    assert record["predicted_iou"] is None and record["point_coords"] == [[None, None]]


def test_yolo_outlines_are_the_masks(labeled: Labeled, tmp_path: Path) -> None:
    assert export(labeled.directory, "yolo", tmp_path / "out") == 0
    names = {f"labels/{name.removesuffix('.png')}.txt": key for key, name in FILE_NAMES.items()}
    assert files_below(tmp_path / "out") == {*names, "export.json", "data.yaml"}
    for file, image_id in names.items():
        objects = parse_yolo((tmp_path / "out" / file).read_text())
        for row, (class_index, corners) in zip(labeled.masks(image_id), objects, strict=True):
            assert class_index == 0 and corners.min() >= 0 and corners.max() <= 1
            np.testing.assert_array_equal(fill(corners, 48, 64), coco_mask.decode(row["segmentation"]))


def test_yolo_joins_parts_and_counts_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = np.zeros((6, 8), bool)
    parts[:2, :2] = parts[4:, 5:] = True
    labels = imported(tmp_path, [parts, np.zeros((6, 8), bool)])
    assert export(labels, "yolo", tmp_path / "out") == 0
    ((class_index, corners),) = parse_yolo((tmp_path / "out" / "labels" / "a.txt").read_text())
    np.testing.assert_array_equal(fill(corners, 6, 8), parts)
    out = capsys.readouterr().out
    assert "1 masks have several parts" in out and "left out: 0 crowds, 1 masks without a pixel" in out
    assert class_index == 0  # category 1 comes before 7
    assert (tmp_path / "out" / "data.yaml").read_text().splitlines()[1:] == [
        "train: images",
        "val: images",
        "names:",
        '  0: "car: red"',
        r'  1: "a \"dog\""',
    ]


def test_pictures_have_the_index_of_each_pixels_mask(
    labeled: Labeled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(labeled.directory, "png", tmp_path / "out") == 0
    assert files_below(tmp_path / "out") == {*(f"masks/{name}" for name in FILE_NAMES.values()), "export.json"}
    pixels = hidden = 0
    for image_id, name in FILE_NAMES.items():
        picture = np.asarray(Image.open(tmp_path / "out" / "masks" / name))
        assert picture.dtype == np.uint16 and picture.shape == (48, 64)
        rows = labeled.masks(image_id)
        bits = [coco_mask.decode(row["segmentation"]).astype(bool) for row in rows]
        assert (np.any([*bits, np.zeros((48, 64), bool)], axis=0) == (picture > 0)).all()
        for y, x in np.argwhere(picture):
            shown = rows[picture[y, x] - 1]
            there = [row for row, mask in zip(rows, bits, strict=True) if mask[y, x]]
            assert shown in there and shown["area"] == min(row["area"] for row in there)
        pixels += sum(row["area"] for row in rows)
        hidden += sum(row["area"] for row in rows) - np.count_nonzero(picture)
    assert f"{hidden / pixels:.1%} of the masks' pixels are hidden" in capsys.readouterr().out


HOSTILE = [
    "../../evil.jpg",
    "/etc/passwd",
    "a\n\0b.jpg",
    "..",
    "a.jpg",
    "a.png",
    "a.txt/b.jpg",
    "a//b.jpg",
    "a/%/b.jpg",
    "x" * 100_000,
    "d/" * 50_000 + "e.jpg",
    "é" * 125 + ".jpg",
]


@pytest.mark.parametrize(("form", "folder"), [("sa1b", "annotations"), ("yolo", "labels"), ("png", "masks")])
def test_hostile_names_stay_inside_and_keep_their_labels(
    tmp_path: Path, form: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = imported(tmp_path, [DISC], HOSTILE)
    before = files_below(tmp_path)
    output = tmp_path / "deep" / "out"
    assert export(labels, form, output) == 0
    files = {name for name in files_below(output) if name.startswith(f"{folder}/")}
    assert len(files) == len(HOSTILE)
    assert files_below(tmp_path) - before == {f"deep/out/{name}" for name in files_below(output)}
    renamed = json.loads((output / "export.json").read_text())["renamed"]
    assert renamed.keys() <= files
    plain = {"a.jpg", "a.txt/b.jpg"}
    if form == "yolo":  # the labels of a.jpg are a file where those of the other would need a folder
        plain.remove("a.txt/b.jpg")
    assert set(renamed.values()) == set(HOSTILE) - plain
    assert f"{len(renamed)} files have other names than their images" in capsys.readouterr().out


# What is there already.


def test_an_existing_file_is_kept_unless_overwrite_is_given(
    labeled: Labeled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "coco.json"
    assert export(labeled.directory, "coco", path) == 0
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])  # cut
    assert export(labeled.directory, "coco", path) == 2 and path.read_bytes() == whole[:1000]
    assert "exists" in capsys.readouterr().err
    assert export(labeled.directory, "coco", path, "--overwrite") == 0 and path.read_bytes() == whole
    assert export(labeled.directory, "coco", tmp_path) == 2
    assert "is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["mine", "", '{"images": [], "annotations": [], "categories": []}'])
def test_overwrite_leaves_files_alone_that_no_export_wrote(
    labeled: Labeled, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "coco.json"
    path.write_text(content)
    assert export(labeled.directory, "coco", path, "--overwrite") == 2
    assert "was not written by `maskbeam export`" in capsys.readouterr().err and path.read_text() == content
    assert files_below(tmp_path) == {"coco.json"}


def test_overwrite_leaves_the_labels_own_run_json_alone(labeled: Labeled) -> None:
    run = labeled.directory / "run.json"
    before = run.read_bytes()
    assert export(labeled.directory, "coco", run, "--overwrite") == 2
    assert run.read_bytes() == before


def test_a_path_that_ends_in_a_slash_is_no_file(
    labeled: Labeled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"{tmp_path}/new/"
    assert cli.main(["export", "--labels", str(labeled.directory), "--format", "coco", "--output", output]) == 2
    told = capsys.readouterr().err
    assert f"--output {output} is a directory; --format coco writes a file, such as {output}coco.json." in told
    assert list(tmp_path.iterdir()) == []


def tree(directory: Path) -> dict[str, bytes | str | None]:
    """All that lies below a directory: the content of files, where links lead to, None for folders."""
    found: dict[str, bytes | str | None] = {}
    for path in directory.rglob("*"):
        content = os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
        found[path.relative_to(directory).as_posix()] = content
    return found


ENTRY = {"sa1b": "annotations", "yolo": "labels", "png": "masks"}


def add_neighbors(output: Path, entry: str) -> dict[str, bytes | str | None]:
    """Puts other people's files wherever an export might delete something; returns them."""
    neighbors: dict[str, bytes | str | None] = {}
    for name in ("_tmp/mine.txt", "old/export.json", f"{entry}/notes.txt", f"{entry}/train/a/0.txt", f"{entry}/0.bak"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("mine")
        neighbors[name] = b"mine"
    (output / "linked").symlink_to(output.parent)
    return {**neighbors, "linked": str(output.parent), f"{entry}/train/a": None, "_tmp": None, "old": None}


@pytest.mark.parametrize("form", list(ENTRY))
def test_overwrite_deletes_what_an_export_wrote_and_leaves_its_neighbors(
    labeled: Labeled, tmp_path: Path, form: str
) -> None:
    output = tmp_path / "out"
    assert export(labeled.directory, form, output) == 0
    fresh = tree(output)
    neighbors = add_neighbors(output, ENTRY[form])
    assert export(labeled.directory, form, output, "--overwrite") == 0
    assert tree(output) == {**fresh, **neighbors}
    # Another format: what is left of the first are the folders that others use, too.
    other = "png" if form == "yolo" else "yolo"
    assert export(labeled.directory, other, output, "--overwrite") == 0
    assert export(labeled.directory, other, tmp_path / "other") == 0
    folders = {ENTRY[form]: None, f"{ENTRY[form]}/train": None}
    expected = {**tree(tmp_path / "other"), **neighbors, **folders}
    assert tree(output) == expected


@pytest.mark.parametrize("form", list(ENTRY))
def test_a_failed_export_leaves_everything_as_it_was(
    labeled: Labeled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    output = tmp_path / "out"
    assert export(labeled.directory, form, output) == 0
    add_neighbors(output, ENTRY[form])
    before = tree(output)
    create = export_module.Files.create

    def fail(self: Any, folder: str, image: dict[str, Any], extension: str) -> Any:
        if image["file_name"] == "black.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        return create(self, folder, image, extension)

    monkeypatch.setattr(export_module.Files, "create", fail)
    assert export(labeled.directory, form, output, "--overwrite") == 1
    assert tree(output) == before
    monkeypatch.undo()
    assert export(labeled.directory, form, output, "--overwrite") == 0
    assert tree(output) == before


def test_a_file_in_the_way_is_told_before_anything_is_deleted(
    labeled: Labeled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The earlier export had fewer images."""
    output = tmp_path / "out"
    assert export(imported(tmp_path, [], ["0.png"]), "yolo", output) == 0
    (output / "labels/1.txt").write_text("mine")
    before = tree(output)
    assert export(labeled.directory, "yolo", output, "--overwrite") == 1
    assert f"{output}/labels/1.txt is in the way, and no export wrote it" in capsys.readouterr().err
    assert tree(output) == before


@pytest.mark.parametrize("step", range(1, 16))
def test_an_export_killed_at_any_step_is_replaced_by_the_next(
    labeled: Labeled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The steps are those in which files are moved and deleted; a kill runs no clean-up."""
    output = tmp_path / "out"
    assert export(labeled.directory, "yolo", output) == 0
    neighbors = add_neighbors(output, "labels")
    steps = 0

    class Killed(BaseException):
        pass

    def killing(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps >= step:
                raise Killed
            return real(*arguments, **options)

        return call

    for name in ("unlink", "rename", "rmdir"):
        monkeypatch.setattr(Path, name, killing(getattr(Path, name)))
    monkeypatch.setattr(export_module, "write_json", killing(export_module.write_json))
    monkeypatch.setattr(export_module.shutil, "rmtree", killing(lambda *arguments, **options: None))
    with pytest.raises(Killed):
        export(labeled.directory, "png", output, "--overwrite")
    monkeypatch.undo()
    assert export(labeled.directory, "png", output, "--overwrite") == 0
    assert export(labeled.directory, "png", tmp_path / "other") == 0
    left = {name: content for name, content in tree(output).items() if not name.startswith(".maskbeam-export-")}
    assert left == {**tree(tmp_path / "other"), **neighbors, "labels": None, "labels/train": None}


def test_overwrite_replaces_an_export_and_nothing_else(
    labeled: Labeled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert export(labeled.directory, "yolo", output) == 0
    shutil.copytree(labeled.directory.parent / "in", output / "images")
    before = files_below(output)
    (output / "labels" / "0.txt").write_text("changed")
    assert export(labeled.directory, "yolo", output) == 2
    assert "holds an export already" in capsys.readouterr().err
    assert export(labeled.directory, "yolo", output, "--overwrite") == 0
    assert files_below(output) == before and (output / "labels" / "0.txt").read_text() != "changed"
    # Another format takes the place of the first.
    assert export(labeled.directory, "png", output, "--overwrite") == 0
    assert files_below(output) - {f"masks/{name}" for name in FILE_NAMES.values()} == {
        "export.json",
        *(name for name in before if name.startswith("images/")),
    }


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_folders_of_somebody_else_are_kept(
    labeled: Labeled, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels").mkdir()
    assert export(labeled.directory, "yolo", tmp_path, *flags) == 2
    assert "already has labels, which no export made" in capsys.readouterr().err
    (tmp_path / "export.json").write_text("{}")
    assert export(labeled.directory, "yolo", tmp_path, *flags) == 2
    assert "export.json was not written by maskbeam" in capsys.readouterr().err
    assert files_below(tmp_path) == {"export.json"}


@pytest.mark.parametrize("form", ["coco", "sa1b", "yolo", "png"])
def test_what_fails_midway_leaves_nothing(
    labeled: Labeled, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(labeled.directory, tmp_path / "labels")
    last = max((damaged / "annotations").iterdir())
    last.write_bytes(last.read_bytes()[:-9])
    assert export(damaged, form, tmp_path / "out") == 1
    assert f"{last} cannot be read" in capsys.readouterr().err
    assert [name for name in files_below(tmp_path) if not name.startswith("labels/")] == []


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--format", "voc"], "format is voc; expected one of coco, sa1b, yolo, png"),
        (["--format", "yolo", "--polygons"], "polygons is for format coco"),
        (["--format", "png", "--output", "gs://bucket/out"], "is not local"),
        (["--format", "coco", "--labels", "nowhere"], "nowhere holds no labels"),
        (["--format", "coco", "--labels", ""], "is empty"),
        (["--format", "coco", "--output", "oo://bucket/out"], "oo"),
        (["--format", "coco", "--colour", "red"], "unknown argument --colour"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    labeled: Labeled, tmp_path: Path, flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", "--labels", str(labeled.directory), "--output", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("maskbeam export: ") and told in error
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_directory(labeled: Labeled, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").touch()
    assert export(labeled.directory, "png", tmp_path / "out") == 2
    assert "is a file" in capsys.readouterr().err
