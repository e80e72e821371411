"""Every command on labels that maskbeam wrote before its files named their format: tests/old_labels/README.md."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskbeam.pipeline import cli
from maskbeam.pipeline.exits import UsageError
from maskbeam.pipeline.launch.local import run_label
from maskbeam.pipeline.options import parse_label
from tests.conftest import Labels, read_labels
from tests.fakes import load_fake

ARCHIVE = Path(__file__).parent / "old_labels" / "b8c9603.tar.xz"
KINDS = ["labels", "refined", "imported"]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the archive's photos and labels."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old"


def go_on(old: Path, *flags: str) -> int:
    """Starts `label` again as it was started; the fake model labels what is new."""
    given = ["--input", str(old / "photos"), "--output", str(old / "labels"), "--points_per_side", "4"]
    job, options = parse_label([*given, "--keep_candidates", *flags])
    return run_label(job, options, load_fake)


def masks(labels: Labels) -> list[tuple[str, bytes]]:
    return [(row["image_id"], row["segmentation"]["counts"]) for row in labels.annotations]


def test_the_archive_knows_no_format(old: Path) -> None:
    assert ARCHIVE.stat().st_size < 100_000
    assert [json.loads((old / kind / "run.json").read_text()).get("format") for kind in KINDS] == [None] * 3
    assert [len(read_labels(old / kind).annotations) for kind in KINDS] == [6, 39, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_view_shows_all_its_images(old: Path, kind: str) -> None:
    photos = ["--images", str(old / "photos")]
    assert cli.main(["view", "--labels", str(old / kind), "--output", str(old / "report"), *photos]) == 0
    page = (old / "report" / "index.html").read_text() + "".join(
        path.read_text() for path in (old / "report").rglob("*.js*")
    )
    assert all(image["image_id"] in page for image in read_labels(old / kind).images)


@pytest.mark.parametrize("kind", KINDS)
def test_export_writes_every_format(old: Path, kind: str) -> None:
    rows = read_labels(old / kind)

    def export(name: str, output: str) -> Path:
        assert cli.main(["export", "--labels", str(old / kind), "--format", name, "--output", str(old / output)]) == 0
        return old / output

    coco = json.loads(export("coco", "coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == [row["file_name"] for row in rows.images]
    wanted = [(row["area"], row["segmentation"]["counts"]) for row in rows.annotations]
    assert sorted((each["area"], each["segmentation"]["counts"]) for each in coco["annotations"]) == sorted(wanted)
    sa1b = [json.loads(path.read_text()) for path in export("sa1b", "sa1b").glob("annotations/*.json")]
    assert sum(len(image["annotations"]) for image in sa1b) == len(rows.annotations)
    assert len(list(export("yolo", "yolo").glob("labels/*.txt"))) == len(rows.images)
    for path in export("png", "png").glob("masks/*.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture).any()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_holds_it_against_a_truth(old: Path, kind: str) -> None:
    """Astronaut.jpg is in no truth. What was imported is the truth itself."""
    files = ["--labels", str(old / kind), "--truth", str(old / "truth.json"), "--json", str(old / "result.json")]
    assert cli.main(["evaluate", *files, "--allow_missing"]) == 0
    (image,) = json.loads((old / "result.json").read_text())["images"]
    rows = [row for row in read_labels(old / kind).annotations if row["image_id"] == "coffee.jpg"]
    assert (image["image_id"], image["masks"], image["objects"]) == ("coffee.jpg", len(rows), 1)
    assert kind != "imported" or image["mean_best_iou"] == 1


def test_evaluate_compares_it_with_other_labels(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--labels", str(old / "labels"), "--against", str(old / "refined")]) == 0
    assert "39" in capsys.readouterr().out


def test_refine_with_the_same_settings_gives_the_same_masks(old: Path) -> None:
    asked = ["--pred_iou_thresh", "0.8", "--stability_score_thresh", "0.9", "--min_mask_area", "20"]
    for flags, kind in ([], "labels"), (asked, "refined"):
        new = old / f"new_{kind}"
        assert cli.main(["refine", "--labels", str(old / "labels"), "--output", str(new), *flags]) == 0
        assert masks(read_labels(new)) == masks(read_labels(old / kind))


def test_what_is_exported_is_imported_again(old: Path) -> None:
    coco = str(old / "coco.json")
    assert cli.main(["export", "--labels", str(old / "imported"), "--format", "coco", "--output", coco]) == 0
    assert cli.main(["import", "--annotations", coco, "--output", str(old / "again")]) == 0
    assert masks(read_labels(old / "again")) == masks(read_labels(old / "imported"))
    crowd = next(row for row in json.loads((old / "truth.json").read_text())["annotations"] if row["iscrowd"])
    wanted = coco_mask.frPyObjects(crowd["segmentation"], *crowd["segmentation"]["size"])["counts"]
    assert wanted.decode() in {counts for _, counts in masks(read_labels(old / "again"))}


def test_label_goes_on_where_it_stopped(old: Path) -> None:
    before = read_labels(old / "labels")
    assert go_on(old) == 0
    assert read_labels(old / "labels") == before


def test_label_does_only_what_is_new(old: Path) -> None:
    before = read_labels(old / "labels")
    shutil.copy(old / "photos" / "coffee.jpg", old / "photos" / "more.jpg")
    assert go_on(old) == 0
    after = read_labels(old / "labels")
    assert [row["image_id"] for row in after.images] == ["astronaut.jpg", "coffee.jpg", "more.jpg"]
    assert [row for row in after.annotations if row["image_id"] != "more.jpg"] == before.annotations


def test_label_with_other_settings_is_refused_in_a_sentence(old: Path) -> None:
    with pytest.raises(UsageError, match=r"other settings: pred_iou_thresh was 0.88, now 0.5\. Use the same"):
        go_on(old, "--pred_iou_thresh", "0.5")


@pytest.mark.parametrize("kind", ["refined", "imported"])
def test_label_never_goes_on_in_what_another_command_made(old: Path, kind: str) -> None:
    (old / "labels").rename(old / "first")
    (old / kind).rename(old / "labels")
    with pytest.raises(UsageError, match=r"made with other settings: .*Use the same settings"):
        go_on(old)
