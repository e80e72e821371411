"""maskbeam view: real output of label (with the fake model), made into a report, opened and driven in Chromium.

The masks of the images, the photos and the numbers are compared with what pycocotools, Pillow and pandas say of the
labels themselves.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from axe_playwright_python import base as axe_base
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from pycocotools import mask as coco_mask

from maskbeam.pipeline import cli
from maskbeam.transforms.draw import draw_masks, mask_color
from maskbeam.transforms.files.streams import open_file
from maskbeam.transforms.labels.schema import row_to_mask
from maskbeam.transforms.records import SourceFile
from tests.conftest import EVENT_SECONDS, label, photo_bytes, read_labels
from tests.transforms.readers.test_shard import MAKERS, tar_bytes

CHROMIUM = "/usr/bin/chromium"
CHROMIUM_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
]

# An id that would run a script if it ever became HTML.
HOSTILE = '"><img src=x onerror=alert(1)>.png'
EMPTY, BROKEN, MISSING, CHANGED = "empty.png", "broken.png", "missing.png", "changed.png"
LABELED = ["1.png", "2.png", "3.png"]
ALL = [HOSTILE, *LABELED, BROKEN, CHANGED, EMPTY, MISSING]  # sorted, as the run has them


def black_png(size_wh: tuple[int, int]) -> bytes:
    """Black pixels get a predicted IoU of 0.7 from the fake model, less than the 0.75 of the small grid."""
    buffer = io.BytesIO()
    Image.new("RGB", size_wh).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with photos/ and labels/ of them; since then one photo went missing and one changed."""
    root = tmp_path_factory.mktemp("labeled")
    photos = root / "photos"
    photos.mkdir()
    for number, name in enumerate(ALL):
        (photos / name).write_bytes(photo_bytes(number))
    (photos / EMPTY).write_bytes(black_png((64, 48)))
    (photos / BROKEN).write_bytes(photo_bytes(0)[:100])
    assert label("--input", photos, "--output", root / "labels", "--chunk_size", "3", "--pred_iou_thresh", "0.82") == 0
    (photos / MISSING).unlink()
    (photos / CHANGED).write_bytes(photo_bytes(99))
    return root


def view(*flags: str | Path) -> int:
    return cli.main(["view", *map(str, flags)])


@pytest.fixture(scope="module")
def report(labeled: Path) -> Path:
    assert view("--labels", labeled / "labels", "--output", labeled / "report") == 0
    return labeled / "report"


def read_script(path: Path) -> Any:
    """The value a data script assigns."""
    return json.loads(path.read_text("ascii").partition(" = ")[2].removesuffix(";\n"))


def rows_of(labels: Path, image_id: str) -> list[dict[str, Any]]:
    return [row for row in read_labels(labels).annotations if row["image_id"] == image_id]


# What is written.


def test_the_report_has_all_images_and_their_masks(labeled: Path, report: Path) -> None:
    index = read_script(report / "data/index.js")
    assert [image["id"] for image in index["images"]] == ALL
    assert {image["id"] for image in index["images"] if image["problem"]} == {MISSING, CHANGED}
    for number, image in enumerate(index["images"]):
        rows = rows_of(labeled / "labels", image["id"])
        masks = read_script(report / f"data/images/0/{number}.js")["masks"]
        assert image["masks"] == len(rows) == len(masks["counts"])
        for row, counts, area, iou in zip(
            rows, masks["counts"], masks.get("area", []), masks.get("predicted_iou", []), strict=True
        ):
            assert (row["segmentation"]["counts"], row["area"]) == (counts, area)
            assert row["predicted_iou"] == pytest.approx(iou, abs=1e-6)
        assert (report / f"thumbnails/0/{number}.jpg").exists() == (image["id"] != BROKEN)
        assert (report / f"photos/0/{number}.jpg").exists() == (image["id"] not in (BROKEN, MISSING, CHANGED))


def test_why_there_is_no_photo_is_told(labeled: Path, report: Path) -> None:
    problems = {
        image_id: read_script(report / f"data/images/0/{ALL.index(image_id)}.js")["problem"] for image_id in ALL
    }
    assert "not found" in problems[MISSING] and "sha256" in problems[CHANGED]
    assert all(problems[image_id] is None for image_id in [*LABELED, EMPTY, BROKEN])


def test_thumbnails_have_the_masks(labeled: Path, report: Path) -> None:
    """Small photos keep their size, so a thumbnail is draw_masks of the photo, but for JPEG."""
    number = ALL.index(LABELED[0])
    masks = [row_to_mask(row) for row in rows_of(labeled / "labels", LABELED[0])]
    pixels = np.asarray(Image.open(labeled / "photos" / LABELED[0]))
    expected = draw_masks(pixels, masks).astype(int)
    actual = np.asarray(Image.open(report / f"thumbnails/0/{number}.jpg")).astype(int)
    assert np.abs(actual - expected).mean() < np.abs(actual - pixels).mean() / 4


def test_no_data_can_end_a_script(report: Path) -> None:
    for path in (report / "data").rglob("*.js"):
        assert path.read_bytes().isascii() and b"<" not in path.read_bytes()


def test_files_are_named_by_numbers(report: Path) -> None:
    made = [path for name in ("data", "photos", "thumbnails") for path in (report / name).rglob("*")]
    assert made and all(re.fullmatch(r"[\d]+(\.jpg|\.js)?|index.js|images", path.name) for path in made)


def test_statistics_are_those_of_the_labels(labeled: Path, report: Path) -> None:
    images = pandas.read_parquet(labeled / "labels/images")
    masks = pandas.read_parquet(labeled / "labels/annotations")
    statistics = read_script(report / "data/index.js")["statistics"]
    assert statistics["statuses"] == images.status.value_counts().to_dict()
    assert statistics["candidates"] == images.num_candidates.sum() and statistics["masks"] == len(masks)
    assert statistics["dropped"] == {
        name.removeprefix("dropped_"): images[name].sum() for name in images if name.startswith("dropped_")
    }
    counts = images.num_masks[images.status != "failed"]
    assert statistics["masks_per_image"]["count"] == len(counts)
    assert statistics["masks_per_image"]["mean"] == pytest.approx(counts.mean())
    assert statistics["masks_per_image"]["median"] == counts.median()
    assert statistics["predicted_iou"]["mean"] == pytest.approx(masks.predicted_iou.mean())
    assert statistics["stability_score"]["low"] == pytest.approx(masks.stability_score.min())
    assert statistics["area_share"]["high"] == pytest.approx(np.log10(masks.area.max() / (64 * 48)))
    covered = []
    for image_id in images.image_id[images.status != "failed"]:
        union = np.zeros((48, 64), bool)
        for segmentation in masks.segmentation[masks.image_id == image_id]:
            union |= coco_mask.decode(segmentation).astype(bool)
        covered.append(union.mean())
    assert statistics["coverage"]["mean"] == pytest.approx(np.mean(covered))


# Which images.


def shown_ids(report: Path) -> list[str]:
    return [image["id"] for image in read_script(report / "data/index.js")["images"]]


def test_a_sample_depends_on_the_seed_and_grows(labeled: Path, tmp_path: Path) -> None:
    samples = []
    for number, flags in enumerate((["2"], ["2"], ["4"], ["100"], ["2", "--seed", "3"])):
        view("--labels", labeled / "labels", "--output", tmp_path / str(number), "--sample", *flags)
        samples.append(shown_ids(tmp_path / str(number)))
    assert samples[0] == samples[1] and [len(sample) for sample in samples] == [2, 2, 4, 8, 2]
    assert set(samples[0]) < set(samples[2]) and samples[4] != samples[0]
    sampled, whole = (read_script(tmp_path / name / "data/index.js") for name in ("0", "3"))
    assert sampled["statistics"] == whole["statistics"] and sampled["failures"] == whole["failures"]


def test_named_images(labeled: Path, tmp_path: Path) -> None:
    view("--labels", labeled / "labels", "--output", tmp_path / "report", "--image_id", "3.png", HOSTILE)
    assert shown_ids(tmp_path / "report") == [HOSTILE, "3.png"]


@pytest.mark.parametrize("shard_format", list(MAKERS))
@pytest.mark.parametrize("moved", [False, True])
def test_photos_come_out_of_shards(tmp_path: Path, shard_format: str, moved: bool) -> None:
    pixels = [Image.open(io.BytesIO(photo_bytes(number))) for number in range(5)]
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("a", "b"):
        (shards / f"{name}.{shard_format}").write_bytes(MAKERS[shard_format]([photo_bytes(n) for n in range(5)]))
    label("--input", shards, "--output", tmp_path / "labels", "--chunk_size", "2")
    flags: list[str | Path] = []
    if moved:
        flags = ["--images", shards.rename(tmp_path / "elsewhere")]
    view("--labels", tmp_path / "labels", "--output", tmp_path / "report", "--sample", "6", *flags)
    ids = shown_ids(tmp_path / "report")
    assert len(ids) == 6 and {image_id[0] for image_id in ids} == {"a", "b"}
    for number, image_id in enumerate(ids):
        photo = np.asarray(Image.open(tmp_path / f"report/photos/0/{number}.jpg")).astype(int)
        expected = np.asarray(pixels[int(image_id.partition("#")[2])]).astype(int)
        others = [np.abs(photo - np.asarray(other)).mean() for other in pixels]
        assert np.abs(photo - expected).mean() == min(others) < 12


def test_photos_moved_elsewhere(labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = shutil.copytree(labeled / "photos", tmp_path / "elsewhere")
    (elsewhere / MISSING).write_bytes(photo_bytes(ALL.index(MISSING)))
    assert view("--labels", labeled / "labels", "--images", elsewhere, "--output", tmp_path / "report") == 0
    problems = [image["id"] for image in read_script(tmp_path / "report/data/index.js")["images"] if image["problem"]]
    assert problems == [CHANGED]
    assert "1 of its photos were not found or are not those that were labeled" in capsys.readouterr().out


@pytest.fixture
def tar_labels(tmp_path: Path) -> Path:
    """Labels of a tar with two photos of one base name among three."""
    photos = ((name, photo_bytes(n)) for n, name in enumerate(["x/x.png", "x/y.png", "y/x.png"]))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/a.tar").write_bytes(tar_bytes(*photos))
    assert label("--input", tmp_path / "tars", "--output", tmp_path / "labels") == 0
    return tmp_path / "labels"


def shown_photos(report: Path) -> list[int | None]:
    """Which of photo_bytes(0..9) each image of a report is, None where there is no photo."""
    known = [np.asarray(Image.open(io.BytesIO(photo_bytes(n)))).astype(int) for n in range(10)]
    shown: list[int | None] = []
    for number, image in enumerate(read_script(report / "data/index.js")["images"]):
        path = report / f"photos/0/{number}.jpg"
        assert path.exists() != image["problem"]
        photo = np.asarray(Image.open(path)).astype(int) if path.exists() else None
        shown.append(None if photo is None else int(np.argmin([np.abs(photo - one).mean() for one in known])))
    return shown


@pytest.mark.parametrize(
    "files",
    [
        {"x/x.png": 0, "x/y.png": 1, "y/x.png": 2},  # unpacked as it was
        {"deep/x/x.png": 0, "deep/x/y.png": 1, "deep/y/x.png": 2},  # one folder deeper
        {"1/x.png": 2, "2/x.png": 0, "y.png": 1},  # other folders: two of one name
        {"x/x.png": 2, "x/y.png": 1, "y/x.png": 0},  # two have changed places
        {"one.png": 0, "two.png": 1, "three.jpg": 2, "y.png": 5, "other.png": 6},  # other names, one of them taken
    ],
)
def test_photos_of_a_tar_are_found_in_a_folder(tar_labels: Path, tmp_path: Path, files: dict[str, int]) -> None:
    for name, number in files.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(photo_bytes(number))
    assert view("--labels", tar_labels, "--images", tmp_path / "photos", "--output", tmp_path / "report") == 0
    assert shown_photos(tmp_path / "report") == [0, 1, 2]


def test_a_photo_with_the_name_and_other_bytes_is_told(tar_labels: Path, tmp_path: Path) -> None:
    (tmp_path / "photos/x").mkdir(parents=True)
    for name, number in {"x/x.png": 0, "x/y.png": 5}.items():
        (tmp_path / "photos" / name).write_bytes(photo_bytes(number))
    assert view("--labels", tar_labels, "--images", tmp_path / "photos", "--output", tmp_path / "report") == 0
    assert shown_photos(tmp_path / "report") == [0, None, None]
    problems = [read_script(tmp_path / f"report/data/images/0/{number}.js")["problem"] for number in (1, 2)]
    assert "its sha256 differs" in problems[0]
    assert "it is not among --images" in problems[1]  # that x/x.png has its base name says nothing


@pytest.mark.parametrize(("renamed", "most"), [(False, 1), (True, 2)])
def test_photos_are_read_no_more_often_than_they_need_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: bool, most: int
) -> None:
    """By their names each is read once; where they have others, once more to find out whose they are."""
    photos = [(f"x/{n}.png", photo_bytes(n)) for n in range(12)]
    (tmp_path / "a.tar").write_bytes(tar_bytes(*photos))
    label("--input", tmp_path / "a.tar", "--output", tmp_path / "labels")
    (tmp_path / "photos").mkdir()
    for number, (name, data) in enumerate(photos):
        (tmp_path / "photos" / (f"{11 - number}.webp" if renamed else Path(name).name)).write_bytes(data)
    opened: Counter[str] = Counter()

    def open_counted(file: SourceFile) -> io.BufferedReader:
        opened[file.path] += 1
        return open_file(file)

    monkeypatch.setattr("maskbeam.transforms.readers.shard.open_file", open_counted)
    view("--labels", tmp_path / "labels", "--images", tmp_path / "photos", "--output", tmp_path / "report")
    assert not any(image["problem"] for image in read_script(tmp_path / "report/data/index.js")["images"])
    assert len(opened) == 12 and max(opened.values()) <= most


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_photos_are_turned_as_they_were_labeled(tmp_path: Path, exif: str) -> None:
    image = Image.open(io.BytesIO(photo_bytes(1)))
    (tmp_path / "photos").mkdir()
    orientation = Image.Exif()
    orientation[0x0112] = 6
    image.save(tmp_path / "photos/turned.jpg", exif=orientation)
    label("--input", tmp_path / "photos", "--output", tmp_path / "labels", "--exif", exif)
    view("--labels", tmp_path / "labels", "--output", tmp_path / "report")
    assert not read_script(tmp_path / "report/data/index.js")["images"][0]["problem"]
    expected = (48, 64) if exif == "apply" else (64, 48)
    assert Image.open(tmp_path / "report/photos/0/0.jpg").size == expected


def test_large_photos_become_smaller(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/large.png").write_bytes(photo_bytes(1, (1000, 500)))
    label("--input", tmp_path / "photos", "--output", tmp_path / "labels")
    view("--labels", tmp_path / "labels", "--output", tmp_path / "report", "--photo_side", "700")
    assert Image.open(tmp_path / "report/photos/0/0.jpg").size == (700, 350)
    assert Image.open(tmp_path / "report/thumbnails/0/0.jpg").size == (400, 200)


# Plain pictures.


def test_png_pictures(labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert view("--labels", labeled / "labels", "--output", tmp_path / "png", "--png") == 0
    pictures = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "png").iterdir()}
    assert set(pictures) == {f"{quote(image_id, safe='')}.png" for image_id in ALL if image_id != BROKEN}
    for image_id in (LABELED[0], MISSING):
        pixels = np.full((48, 64, 3), 72, np.uint8)
        if image_id != MISSING:
            pixels = np.asarray(Image.open(labeled / "photos" / image_id))
        masks = [row_to_mask(row) for row in rows_of(labeled / "labels", image_id)]
        np.testing.assert_array_equal(pictures[f"{image_id}.png"], draw_masks(pixels, masks))
    told = capsys.readouterr()
    assert told.out == f"7 pictures: {tmp_path}/png\n"
    assert f"no picture of {BROKEN}: decode" in told.err and f"{MISSING}: The photo was not found" in told.err


# Mistakes.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_id", "4.png"], "no image in the labels has the id '4.png'"),
        (["--sample", "0"], "sample is 0"),
        (["--images", "no/such/photos"], "matches no file"),
        (["--output", "gs://bucket/report"], "expected a local directory"),
        (["--output", "{root}/photos"], "holds something that is no report"),
        (["--images", "{root}/photos", "--output", "{root}/photos/report"], "lies inside the input"),
        (["--labels", "{root}/photos"], "holds no labels"),
        (["--smaple", "3"], "did you mean --sample?"),
    ],
)
def test_mistakes_are_told(
    labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    given = [flag.format(root=labeled) for flag in flags]
    assert view("--labels", labeled / "labels", "--output", tmp_path / "report", *given) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in (labeled / "photos").iterdir()) == sorted(set(ALL) - {MISSING})


def test_an_earlier_report_is_replaced_and_nothing_else(labeled: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    view("--labels", labeled / "labels", "--output", report)
    mine = [report / name for name in ("notes.txt", "photos/mine.jpg", "photos/0/crop.png", "data/old/notes.txt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    view("--labels", labeled / "labels", "--output", report, "--image_id", "1.png")
    assert shown_ids(report) == ["1.png"] and [path.read_text() for path in mine] == ["mine"] * 4
    assert sorted(path.name for path in (report / "photos/0").iterdir()) == ["0.jpg", "crop.png"]


def test_damaged_labels_are_told_and_the_report_can_be_made_again(
    labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = shutil.copytree(labeled / "labels", tmp_path / "labels")
    damaged = sorted((labels / "annotations").iterdir())[1]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    assert view("--labels", labels, "--output", tmp_path / "report") == 1
    assert f"{damaged} cannot be read" in capsys.readouterr().err
    assert "not finished" in (tmp_path / "report/index.html").read_text()
    damaged.write_bytes(whole)
    assert view("--labels", labels, "--output", tmp_path / "report") == 0
    assert shown_ids(tmp_path / "report") == ALL


def test_damaged_masks_are_told(labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """pycocotools would write beyond its memory."""
    labels = shutil.copytree(labeled / "labels", tmp_path / "labels")
    path = sorted((labels / "annotations").iterdir())[0]
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1]["segmentation"]["counts"] = "o" * 40
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    assert view("--labels", labels, "--output", tmp_path / "report") == 1
    assert f"mask 1 of {HOSTILE!r}: its counts are no RLE of its image: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (["1.png"], None),
        (["deep/1.png"], None),
        (["1.png", "deep/1.png"], None),  # the first has the image_id
        (["deep/1.png", "steep/1.png"], "/deep/1.png and 1 others have its name, and it has no sha256"),
        (["2.png"], "it is not among --images"),
    ],
)
def test_imported_labels_are_shown(tmp_path: Path, files: list[str], problem: str | None) -> None:
    """COCO annotations have neither scores nor prompts nor sha256, and their photos lie elsewhere."""
    for file in files:
        (tmp_path / "photos" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / file).write_bytes(photo_bytes(1))
    square = {"id": 1, "image_id": 7, "category_id": 1, "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}
    content = {
        "images": [{"id": 7, "file_name": "1.png", "width": 64, "height": 48}],
        "annotations": [square],
        "categories": [{"id": 1, "name": "object"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    flags = [
        "--format",
        "coco",
        "--annotations",
        str(tmp_path / "instances.json"),
        "--output",
        str(tmp_path / "labels"),
    ]
    assert cli.main(["import", *flags]) == 0
    view("--labels", tmp_path / "labels", "--images", tmp_path / "photos", "--output", tmp_path / "report")
    index = read_script(tmp_path / "report/data/index.js")
    shown = [(image["id"], image["masks"], image["problem"]) for image in index["images"]]
    assert shown == [("1.png", 1, problem is not None)]
    told = read_script(tmp_path / "report/data/images/0/0.js")["problem"]
    assert told is None if problem is None else problem in told
    assert index["statistics"]["predicted_iou"] is None
    assert index["statistics"]["area_share"]["high"] == pytest.approx(np.log10(400 / (64 * 48)))


# In the browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not os.path.exists(CHROMIUM):
        if os.environ.get("MASKBEAM_REQUIRE_CHROMIUM") == "1":
            pytest.fail(f"there is no {CHROMIUM}, and MASKBEAM_REQUIRE_CHROMIUM=1 asks for it")
        pytest.skip(f"there is no {CHROMIUM} to drive the report in (Debian's package chromium)")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS, timeout=EVENT_SECONDS * 1000)
        yield browser
        browser.close()


# Adds a listener that follows the report's own, so that window.shown is the address whose page is drawn.
NOTE_WHAT_IS_SHOWN = """
{
  const note = () => { window.shown = location.hash; };
  addEventListener("load", () => { note(); addEventListener("hashchange", note); });
}
"""


def wait_for_address(page: Page, part: str = "") -> None:
    """Until an address that has this part is shown."""
    page.wait_for_function("(part) => location.hash.includes(part) && window.shown === location.hash", arg=part)


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Page]]:
    """Opens the report at an address; afterwards there must have been no error, no dialog and no network."""
    contexts: list[Any] = []
    faults: list[str] = []

    def note_dialog(dialog: Any) -> None:
        faults.append(dialog.message)
        dialog.dismiss()

    def opened(report: Path, address: str = "", scheme: str = "light") -> Page:
        context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 860})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(EVENT_SECONDS * 1000)
        page.add_init_script(NOTE_WHAT_IS_SHOWN)
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", note_dialog)
        page.on("request", lambda request: None if request.url.startswith("file://") else faults.append(request.url))
        page.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
        page.goto(f"{report.as_uri()}/index.html{address}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def tile_ids(page: Page) -> list[str]:
    return page.locator(".tiles .name").all_inner_texts()


def drawn(page: Page) -> np.ndarray:
    """The canvas of the masks, (h, w, 4) uint8 RGBA."""
    page.wait_for_function("() => document.querySelectorAll('#list li').length > 0")
    url = page.evaluate("document.getElementById('masks').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def union_of(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.any([coco_mask.decode(row["segmentation"]) for row in rows], axis=0)


def sample_centres(picture: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """The canvas's pixels in the middle of each of the image's pixels."""
    rows, columns = (
        ((np.arange(n) + 0.5) * side / n).astype(int) for n, side in zip(size_hw, picture.shape, strict=False)
    )
    return picture[np.ix_(rows, columns)]


@pytest.mark.browser
def test_every_page_names_the_labels_and_their_model(report: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(report)
    assert page.locator("#labels").inner_text() == f"{report.parent / 'labels'}, model sam_tiny"


@pytest.mark.browser
def test_rle_is_decoded_as_pycocotools_does(report: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(report)
    random = np.random.default_rng(0)
    cases = [np.zeros((7, 5), np.uint8), np.ones((7, 5), np.uint8), np.ones((900, 1100), np.uint8)]
    cases += [
        (random.random(tuple(random.integers(1, 90, 2))) < share).astype(np.uint8) for share in (0.02, 0.5, 0.98) * 10
    ]
    for mask in cases:
        encoded = coco_mask.encode(np.asfortranarray(mask))
        height, width = mask.shape
        decoded = page.evaluate(
            "([text, size]) => { const m = maskbeam.rasterize(maskbeam.decodeCounts(text), size, size);"
            "return m && [m.x, m.y, m.width, m.height, Array.from(m.bits, (bit) => bit ? 1 : 0).join('')]; }",
            [encoded["counts"].decode(), {"width": width, "height": height}],
        )
        actual = np.zeros_like(mask)
        if decoded:
            x, y, w, h, bits = decoded
            actual[y : y + h, x : x + w] = np.frombuffer(bits.encode(), np.uint8).reshape(h, w) - ord("0")
        np.testing.assert_array_equal(actual, mask)


@pytest.mark.browser
def test_colours_are_those_of_the_thumbnails(report: Path, open_page: Callable[..., Page]) -> None:
    colors = open_page(report).evaluate("Array.from({length: 200}, (_, index) => maskbeam.maskColor(index))")
    assert colors == [mask_color(index).tolist() for index in range(200)]


@pytest.mark.browser
def test_masks_are_drawn(labeled: Path, report: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(report, "#/image/1.png")
    rows = rows_of(labeled / "labels", "1.png")
    canvas = drawn(page)
    np.testing.assert_array_equal(sample_centres(canvas, (48, 64))[..., 3] > 0, union_of(rows))
    assert page.evaluate("document.getElementById('photo').naturalWidth") == 64
    # A pixel in one mask only has its colour, at the opacity unless it is on the outline.
    decoded = [coco_mask.decode(row["segmentation"]) for row in rows]
    alone = np.sum(decoded, axis=0) == 1
    centres = sample_centres(canvas, (48, 64))
    for index, mask in enumerate(decoded):
        pixels = centres[alone & (mask > 0)]
        assert (np.abs(pixels[:, :3].astype(int) - mask_color(index)) <= 3).all()
        assert set(pixels[:, 3].tolist()) <= {115, 255}  # 0.45 x 255
    # Where masks overlap, the photo shows as much.
    assert np.sum(decoded, axis=0).max() > 1
    assert set(centres[..., 3].ravel().tolist()) <= {0, 115, 255}


@pytest.mark.browser
def test_opacity_and_outlines(report: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(report, "#/image/1.png")
    drawn(page)
    page.locator("#opacity").fill("0")
    assert set(np.unique(drawn(page)[..., 3])) == {0, 255}  # outlines only
    page.locator("#outlines").uncheck()
    assert not drawn(page).any()
    page.locator("#opacity").fill("1")
    page.keyboard.press("m")
    assert not drawn(page).any()
    page.keyboard.press("m")
    assert set(np.unique(drawn(page)[..., 3])) == {0, 255}


@pytest.mark.browser
@pytest.mark.parametrize("name", ["predicted_iou", "stability_score", "min_area", "max_area"])
def test_sliders_hide_and_show_masks_at_once(
    labeled: Path, report: Path, open_page: Callable[..., Page], name: str
) -> None:
    page = open_page(report, "#/image/2.png")
    rows = rows_of(labeled / "labels", "2.png")
    everything = drawn(page)
    field = "area" if "area" in name else name
    values = sorted({row[field] for row in rows})
    assert len(values) > 1
    low, high = (float(page.get_attribute(f"#{name}", limit) or "nan") for limit in ("min", "max"))
    middle = (values[0] + values[-1]) / 2
    wanted = np.log10(middle / (64 * 48)) if field == "area" else middle
    step = float(page.get_attribute(f"#{name}", "step") or "nan")
    value = low + round((wanted - low) / step) * step
    assert low < value < high
    page.locator(f"#{name}").fill(f"{value:.6f}")
    limit = 10**value * 64 * 48 if field == "area" else value
    kept = [row for row in rows if (row[field] <= limit if name == "max_area" else row[field] >= limit)]
    assert 0 < len(kept) < len(rows)
    np.testing.assert_array_equal(sample_centres(drawn(page), (48, 64))[..., 3] > 0, union_of(kept))
    assert page.locator("#list li:visible").count() == len(kept)
    assert page.inner_text("#num-shown") == f"{len(kept)} of {len(rows)} masks shown"
    page.click("#reset")
    np.testing.assert_array_equal(drawn(page), everything)


@pytest.mark.browser
def test_unknown_scores_are_hidden_only_if_asked(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    """Imported results have a predicted IoU, their score, and no stability; annotations have neither."""
    image = {"id": 7, "file_name": "1.png", "width": 64, "height": 48}
    category = {"id": 1, "name": "object"}
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]
    mask = {"image_id": 7, "category_id": 1, "segmentation": square, "id": 1}
    (tmp_path / "1.json").write_text(json.dumps({"images": [image], "annotations": [mask], "categories": [category]}))
    source = ["--annotations", str(tmp_path / "1.json"), "--output", str(tmp_path / "labels")]
    assert cli.main(["import", "--format", "coco", *source]) == 0
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.png").write_bytes(photo_bytes(1))
    view("--labels", tmp_path / "labels", "--images", tmp_path / "photos", "--output", tmp_path / "report")
    page = open_page(tmp_path / "report", "#/image/1.png")
    drawn(page)
    page.focus("#list")
    assert page.inner_text("#chosen").count("unknown") == 2
    for name in ("predicted_iou", "stability_score"):
        page.locator(f"#{name}").fill("0.9")
        assert page.inner_text("#num-shown") == "1 of 1 mask shown"
        assert drawn(page)[..., 3].any()
        page.check("#hide-unknown")
        assert page.inner_text("#num-shown") == "0 of 1 mask shown"
        assert not drawn(page)[..., 3].any()
        page.click("#reset")
        assert page.inner_text("#num-shown") == "1 of 1 mask shown"


@pytest.mark.browser
def test_a_mask_under_the_pointer_tells_its_scores(labeled: Path, report: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(report, "#/image/1.png")
    drawn(page)
    rows = rows_of(labeled / "labels", "1.png")
    decoded = [coco_mask.decode(row["segmentation"]) for row in rows]
    inside = np.argwhere(np.sum(decoded, axis=0) >= 2)
    y, x = inside[len(inside) // 2]
    under = sorted((index for index, mask in enumerate(decoded) if mask[y, x]), key=lambda index: rows[index]["area"])
    box = page.locator("#stage").bounding_box()
    assert box is not None
    at = (box["x"] + (x + 0.5) * box["width"] / 64, box["y"] + (y + 0.5) * box["height"] / 48)
    page.mouse.move(*at)
    told = page.inner_text("#chosen")
    row = rows[under[0]]
    for fact in (
        f"Mask {under[0]}",
        f"{row['predicted_iou']:.3f}",
        f"{row['stability_score']:.3f}",
        f"{row['area']:,}",
    ):
        assert fact in told
    assert page.get_attribute("#chosen", "aria-live") == "polite"
    # Clicking goes down through the masks that lie there, and around.
    for index in [*under, under[0]]:
        page.mouse.click(*at)
        assert page.get_attribute("#list", "aria-activedescendant") == f"mask-{index}"
        assert f"Mask {index}" in page.inner_text("#chosen")


@pytest.mark.browser
def test_everything_by_keyboard(report: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(report)

    def hash_is(address: str) -> None:
        page.wait_for_function("(address) => location.hash === address && window.shown === address", arg=address)

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "gallery-title"
    for _ in range(5):  # name, show, sort, the first and the second tile
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    hash_is("#/image/1.png")
    page.keyboard.press("ArrowRight")
    hash_is("#/image/2.png")
    page.keyboard.press("ArrowLeft")
    hash_is("#/image/1.png")
    drawn(page)
    page.focus("#list")
    assert "Mask 0" in page.inner_text("#chosen")
    page.keyboard.press("ArrowDown")
    assert "Mask 1" in page.inner_text("#chosen")
    assert page.get_attribute("#mask-1", "aria-selected") == "true"
    page.keyboard.press("End")
    assert page.get_attribute("#mask-1", "aria-selected") == "false"
    page.keyboard.press("Escape")  # lets go of the mask, then leaves
    assert page.locator("[aria-selected=true]").count() == 0
    page.keyboard.press("Escape")
    hash_is("#/")
    assert page.evaluate("document.activeElement.id") == "tile-1"
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#keys").is_visible()


@pytest.mark.browser
def test_arrows_move_sliders_not_images(report: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(report, "#/image/1.png")
    drawn(page)
    page.focus("#opacity")
    page.keyboard.press("ArrowRight")
    assert page.input_value("#opacity") == "0.5" and page.evaluate("location.hash") == "#/image/1.png"


@pytest.mark.browser
def test_gallery_sorts_filters_and_finds(labeled: Path, report: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(report)
    assert tile_ids(page) == ALL
    num_masks = {row["image_id"]: row["num_masks"] for row in read_labels(labeled / "labels").images}
    page.select_option("#sort", "most")
    wait_for_address(page, "most")
    counts = [num_masks[image_id] for image_id in tile_ids(page)[:-1]]
    assert counts == sorted(counts, reverse=True) and tile_ids(page)[-1] == BROKEN
    page.select_option("#sort", "fewest")
    wait_for_address(page, "fewest")
    assert tile_ids(page)[0] == EMPTY and tile_ids(page)[-1] == BROKEN
    for show, expected in (("empty", [EMPTY]), ("failed", [BROKEN]), ("problem", {MISSING, CHANGED})):
        page.select_option("#show", show)
        wait_for_address(page, show)
        assert set(tile_ids(page)) == set(expected)
    page.go_back()
    wait_for_address(page, "failed")
    assert tile_ids(page) == [BROKEN] and page.input_value("#show") == "failed"
    page.select_option("#show", "all")
    page.fill("#search", "MISS")
    wait_for_address(page, "MISS")
    assert tile_ids(page) == [MISSING] and page.inner_text("#gallery-count") == "1 of 8 images"
    page.fill("#search", "no such name")
    page.wait_for_selector("#no-tiles:visible")


@pytest.mark.browser
def test_next_follows_the_order_of_the_gallery(labeled: Path, report: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(report, "#/?sort=most&show=labeled")
    ids = tile_ids(page)
    page.click(".tiles a >> nth=0")
    for image_id in ids[1:]:
        page.keyboard.press("ArrowRight")
        page.wait_for_function("(id) => document.getElementById('image-title').textContent === id", arg=image_id)
    page.keyboard.press("ArrowRight")  # there is no further one
    assert page.inner_text("#image-title") == ids[-1] and page.get_attribute("#next", "href") is None


@pytest.mark.browser
def test_links_to_images_and_back(report: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(report, "#/image/2.png")
    assert page.inner_text("#image-title") == "2.png" and page.title() == "2.png - maskbeam"
    page.click("#next")
    wait_for_address(page, "#/image/3.png")
    page.go_back()
    page.wait_for_function("() => document.title === '2.png - maskbeam'")
    page.evaluate("location.hash = '#/image/no-such-image'")
    page.wait_for_selector(".tiles li")


@pytest.mark.browser
@pytest.mark.parametrize("image_id", [MISSING, CHANGED])
def test_masks_without_their_photo(labeled: Path, report: Path, open_page: Callable[..., Page], image_id: str) -> None:
    page = open_page(report, f"#/image/{image_id}")
    rows = rows_of(labeled / "labels", image_id)
    np.testing.assert_array_equal(sample_centres(drawn(page), (48, 64))[..., 3] > 0, union_of(rows))
    assert not page.locator("#photo").is_visible()
    assert "The photo" in page.inner_text("#notice")


@pytest.mark.browser
def test_failed_images_have_their_reasons(labeled: Path, report: Path, open_page: Callable[..., Page]) -> None:
    row = next(row for row in read_labels(labeled / "labels").images if row["image_id"] == BROKEN)
    page = open_page(report, "#/failed")
    cells = page.locator("#failed-rows td").all_inner_texts()
    assert cells == [BROKEN, "decode", row["error"]]
    page.click("#failed-rows a")
    page.wait_for_selector("#notice:visible")
    assert row["error"] in page.inner_text("#notice") and not page.locator("#stage").is_visible()


@pytest.mark.browser
def test_statistics_say_what_they_show(labeled: Path, report: Path, open_page: Callable[..., Page]) -> None:
    page = open_page(report, "#/statistics")
    images = pandas.read_parquet(labeled / "labels/images")
    totals = dict(
        zip(page.locator("#totals dt").all_inner_texts(), page.locator("#totals dd").all_inner_texts(), strict=True)
    )
    assert totals["images"] == "8" and totals["failed"] == "1" and totals["without masks"] == "1"
    assert totals["candidates"] == f"{images.num_candidates.sum():,}"
    charts = page.locator("#charts figure")
    assert charts.count() == 6
    for number in range(6):
        figure = charts.nth(number)
        assert len(figure.locator("svg").get_attribute("aria-label") or "") > 30
        assert figure.locator("figcaption").inner_text()
        figure.locator("summary").click()
    # Bars are as high as their counts: compare with the table beside them.
    figure = charts.nth(2)
    counts = [int(text.replace(",", "")) for text in figure.locator("td:nth-child(2)").all_inner_texts()]
    assert sum(counts) == images.num_masks.sum()
    heights = [float(bar.get_attribute("height") or 0) for bar in figure.locator("rect").all()]
    filled = np.array([count for count in counts if count])
    np.testing.assert_allclose(np.array(heights) / heights[0], filled / filled[0], rtol=1e-6)


@pytest.mark.browser
def test_other_peoples_names_are_text(report: Path, open_page: Callable[..., Page]) -> None:
    """Everything that faults is caught by open_page; here it is shown as it is."""
    page = open_page(report)
    assert tile_ids(page)[0] == HOSTILE
    page.click(".tiles a >> nth=0")
    page.wait_for_selector("#view-image:visible")
    assert page.inner_text("#image-title") == HOSTILE
    assert page.locator("img[src=x]").count() == 0
    page.reload()
    assert page.inner_text("#image-title") == HOSTILE


@pytest.mark.browser
def test_hostile_errors_are_text(labeled: Path, tmp_path: Path, open_page: Callable[..., Page]) -> None:
    labels = shutil.copytree(labeled / "labels", tmp_path / "labels")
    reason = "</script><script>alert(2)</script>\u2028<img src=x onerror=alert(3)>"
    for path in (labels / "images").iterdir():
        table = pq.read_table(path)
        rows = [{**row, "error": reason if row["error"] else None} for row in table.to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    view("--labels", labels, "--output", tmp_path / "report")
    page = open_page(tmp_path / "report", "#/failed")
    assert page.locator("#failed-rows td").nth(2).text_content() == reason
    page.click("#failed-rows a")
    page.wait_for_selector("#notice:visible")
    assert page.locator("#notice").text_content() == f"Failed to decode: {reason}"


@pytest.mark.browser
def test_rank_and_parent_are_shown(labeled: Path, tmp_path: Path, open_page: Callable[..., Page]) -> None:
    labels = shutil.copytree(labeled / "labels", tmp_path / "labels")
    for path in (labels / "annotations").iterdir():
        table = pq.read_table(path)
        ranks = table["mask_index"].combine_chunks()
        parents = pa.array([None if index == 0 else 0 for index in table["mask_index"].to_pylist()], pa.int32())
        for name, values in (("rank", ranks), ("parent_id", parents)):
            table = table.set_column(table.column_names.index(name), table.schema.field(name), values)
        pq.write_table(table, path)
    view("--labels", labels, "--output", tmp_path / "report", "--image_id", "1.png")
    page = open_page(tmp_path / "report", "#/image/1.png")
    drawn(page)
    page.focus("#list")
    assert page.locator("#chosen dd").all_inner_texts()[3:] == ["0", "none"]
    page.keyboard.press("ArrowDown")
    assert page.locator("#chosen dd").all_inner_texts()[3:] == ["1", "0"]


@pytest.mark.browser
def test_many_images_come_in_pages(tmp_path: Path, report: Path, open_page: Callable[..., Page]) -> None:
    """The index alone, with 10,000 lines: the pictures of the first page only are looked for."""
    many = shutil.copytree(report, tmp_path / "many")
    index = read_script(many / "data/index.js")
    line = next(image for image in index["images"] if image["id"] == EMPTY)
    index["images"] = [{**line, "id": f"{number}.png", "width": None} for number in range(10_000)]
    (many / "data/index.js").write_text(f"window.maskbeamIndex = {json.dumps(index)};")
    page = open_page(many)
    assert len(tile_ids(page)) == 60 and "Page 1 of 167" in page.inner_text("#pages")
    page.keyboard.press("ArrowRight")
    wait_for_address(page, "#/?page=2")
    assert tile_ids(page)[0] == "60.png"
    page.click("text=Last")
    wait_for_address(page, "#/?page=167")
    assert tile_ids(page)[-1] == "9999.png"
    page.fill("#search", "777")
    wait_for_address(page, "777")
    assert tile_ids(page)[0] == "777.png"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(report: Path, open_page: Callable[..., Page], scheme: str) -> None:
    axe = Path(axe_base.__file__).with_name("axe.min.js").read_text()
    page = open_page(report, scheme=scheme)
    page.evaluate(axe)
    for address in ("#/", "#/?q=none-at-all", "#/image/1.png", f"#/image/{MISSING}", "#/statistics", "#/failed"):
        page.evaluate("(address) => { location.hash = address; }", address)
        wait_for_address(page)
        if address.startswith("#/image"):
            drawn(page)
        if address == "#/image/1.png":
            page.focus("#list")
        if address == "#/statistics":
            page.locator("summary").first.click()
        violations = page.evaluate("axe.run({preload: false}).then((result) => result.violations)")
        assert [(found["id"], [node["target"] for node in found["nodes"]]) for found in violations] == []
    page.keyboard.press("?")
    assert page.evaluate("axe.run({preload: false}).then((result) => result.violations.map((found) => found.id))") == []


@pytest.mark.browser
def test_the_theme_follows_the_system_until_it_is_chosen(report: Path, open_page: Callable[..., Page]) -> None:
    def lightness(page: Page) -> float:
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return float(np.mean([int(part) for part in re.findall(r"\d+", color)[:3]]))

    dark, light = open_page(report, scheme="dark"), open_page(report, scheme="light")
    assert lightness(dark) < 50 and lightness(light) > 200
    dark.click("#theme")
    assert lightness(dark) > 200
    dark.reload()
    assert lightness(dark) > 200 and dark.inner_text("#theme") == "Dark"
