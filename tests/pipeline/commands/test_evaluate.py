"""maskbeam evaluate: COCOeval's figures for what `label` wrote, the join by name, and two sets of labels."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskbeam.pipeline import cli
from maskbeam.pipeline.commands import demo
from maskbeam.pipeline.commands.evaluate import RANKINGS, ranked_order
from maskbeam.pipeline.commands.evaluate_against import ImageName, join_images
from maskbeam.transforms.evaluation.recall import AREA_RANGES, MAX_PROPOSALS
from maskbeam.transforms.labels.layout import ChunkKey
from tests.cocoeval import cocoeval_recall
from tests.conftest import Labels, label, photo_bytes, read_labels, write_photos
from tests.transforms.readers.test_shard import tar_bytes

SIZE = [48, 64]  # of the photos


def disc(x: int, y: int, radius: int) -> dict[str, Any]:
    """Uncompressed RLE of a disc on a photo."""
    rows, columns = np.indices(SIZE)
    bits = ((columns - x) ** 2 + (rows - y) ** 2 <= radius**2).T.reshape(-1)
    edges = np.flatnonzero(np.diff(np.r_[0, bits, 0]))
    bounds = np.r_[0, edges, bits.size] if edges[-1] != bits.size else np.r_[0, edges]
    return {"size": SIZE, "counts": np.diff(bounds).tolist()}


def annotation(number: int, image_id: int, segmentation: Any, size: list[int], iscrowd: int = 0) -> dict[str, Any]:
    height, width = size
    rle = coco_mask.frPyObjects(segmentation, height, width)
    rle = coco_mask.merge(rle) if isinstance(rle, list) else rle
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 1,
        "segmentation": segmentation,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": float(coco_mask.area(rle)),
        "iscrowd": iscrowd,
    }


def photos_truth() -> dict[str, Any]:
    """Discs, like FakeSam's masks, polygons and crowd regions on the six photos and the broken one; none on photo 5."""
    rng = np.random.default_rng(0)
    names = [*(f"{number}.png" for number in range(6)), "broken.png"]
    images: list[dict[str, Any]] = [
        {"id": i, "file_name": name, "height": SIZE[0], "width": SIZE[1]} for i, name in enumerate(names, 1)
    ]
    annotations: list[dict[str, Any]] = []
    for image in images:
        if image["file_name"] == "5.png":
            continue
        shapes: list[Any] = [
            disc(int(rng.integers(8, 56)), int(rng.integers(6, 42)), radius) for radius in (8, 8, 14, 24)
        ]
        x, y = rng.integers((0, 0), (30, 20)).tolist()
        shapes.append([[x, y, x + 26, y, x + 26, y + 22, x, y + 22]])
        for number, shape in enumerate(shapes):
            annotations.append(annotation(len(annotations) + 1, image["id"], shape, SIZE, iscrowd=int(number == 1)))
    return {"images": images, "annotations": annotations}


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of six photos and a broken one, in chunks of two."""
    directory = write_photos(tmp_path_factory.mktemp("input") / "photos", 6)
    (directory / "broken.png").write_bytes(photo_bytes(9)[:100])
    output = tmp_path_factory.mktemp("output") / "labels"
    assert label("--input", directory, "--output", output, "--chunk_size", "2", "--pred_iou_thresh", "0.8") == 0
    return output


@pytest.fixture
def write_truth(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(content: Any) -> Path:
        path = tmp_path / "truth.json"
        path.write_text(json.dumps(content))
        return path

    return write


def evaluate(*flags: str | Path) -> int:
    return cli.main(["evaluate", *map(str, flags)])


def as_results(labels: Labels, truth: dict[str, Any], score: Callable[[dict[str, Any]], float]) -> list[dict[str, Any]]:
    """The annotations as pycocotools takes results."""
    ids = {image["file_name"]: image["id"] for image in truth["images"]}
    return [
        {"image_id": ids[row["image_id"]], "segmentation": row["segmentation"], "score": score(row)}
        for row in labels.annotations
    ]


def assert_json_is_cocoevals(summary: dict[str, Any], truth: dict[str, Any], results: list[dict[str, Any]]) -> None:
    for kind, name in (("segm", "mask_ar"), ("bbox", "box_ar")):
        expected = cocoeval_recall(truth, results, kind).mean(axis=0)
        ours = [[summary[name][size][str(count)]["value"] for count in MAX_PROPOSALS] for size in AREA_RANGES]
        np.testing.assert_allclose(np.array(ours, float), expected, rtol=0, atol=1e-12)


# With a truth.


@pytest.mark.parametrize(
    ("rank_by", "score"),
    [
        ("rank", lambda row: row["predicted_iou"] * row["stability_score"]),
        ("predicted_iou", lambda row: row["predicted_iou"]),
    ],
)
def test_the_figures_are_cocoevals(
    labels: Path, tmp_path: Path, write_truth: Callable[[Any], Path], rank_by: str, score: Callable[[Any], float]
) -> None:
    truth, result = photos_truth(), tmp_path / "result.json"
    assert evaluate("--labels", labels, "--truth", write_truth(truth), "--json", result, "--rank_by", rank_by) == 0
    content = json.loads(result.read_text())
    summary = content["summary"]
    found = summary["mask_ar"]["all"]
    assert 0.02 < found["10"]["value"] < found["100"]["value"] < 0.9
    assert_json_is_cocoevals(summary, truth, as_results(read_labels(labels), truth, score))
    assert summary["images"] == 7 and summary["crowd_regions"] == 6
    assert summary["objects"]["all"] == 24 and summary["objects"]["large"] == 0
    assert summary["mask_ar"]["large"]["10"] == {"value": None, "low": None, "high": None}
    assert found["10"]["low"] < found["10"]["value"] < found["10"]["high"]


@pytest.mark.parametrize("rank_by", RANKINGS)
def test_imported_results_are_ranked_by_their_scores(
    labels: Path, tmp_path: Path, write_truth: Callable[[Any], Path], rank_by: str
) -> None:
    """They have no stability."""
    truth = {**photos_truth(), "categories": [{"id": 1}]}
    random = np.random.default_rng(1)
    results = as_results(read_labels(labels), truth, lambda row: float(random.random()))
    results = [{**result, "category_id": 1} for result in results]
    (tmp_path / "results.json").write_text(json.dumps(results))
    path, imported, result = write_truth(truth), tmp_path / "imported", tmp_path / "result.json"
    source = ["--annotations", str(tmp_path / "results.json"), "--images_from", str(path)]
    assert cli.main(["import", "--format", "coco", *source, "--output", str(imported)]) == 0
    assert evaluate("--labels", imported, "--truth", path, "--json", result, "--rank_by", rank_by) == 0
    summary = json.loads(result.read_text())["summary"]
    assert_json_is_cocoevals(summary, truth, results)
    # The order of the file finds something else among the first ten.
    in_order = cocoeval_recall(truth, [{**one, "score": -i} for i, one in enumerate(results)], "segm").mean(axis=0)
    assert summary["mask_ar"]["all"]["10"]["value"] != pytest.approx(in_order[0, 0])


@pytest.mark.parametrize("rank_by", RANKINGS)
def test_imported_annotations_keep_their_order(
    tmp_path: Path, write_truth: Callable[[Any], Path], rank_by: str
) -> None:
    """Nobody knows their scores. A truth finds all of itself."""
    truth = {**photos_truth(), "categories": [{"id": 1}]}
    path, imported, result = write_truth(truth), tmp_path / "imported", tmp_path / "result.json"
    assert cli.main(["import", "--annotations", str(path), "--output", str(imported)]) == 0
    rows = read_labels(imported).annotations
    assert len(rows) == len(truth["annotations"]) and all(row["rank"] == row["mask_index"] for row in rows)
    assert evaluate("--labels", imported, "--truth", path, "--json", result, "--rank_by", rank_by) == 0
    summary = json.loads(result.read_text())["summary"]
    assert summary["mask_ar"]["all"]["10"]["value"] == summary["mean_best_iou"]["all"]["value"] == 1
    assert evaluate("--labels", imported, "--against", imported, "--json", result) == 0
    assert json.loads(result.read_text())["summary"]["unchanged"] == 7


def test_the_mean_best_iou_is_over_all_objects(
    labels: Path, tmp_path: Path, write_truth: Callable[[Any], Path]
) -> None:
    truth, result = photos_truth(), tmp_path / "result.json"
    evaluate("--labels", labels, "--truth", write_truth(truth), "--json", result)
    content = json.loads(result.read_text())
    best: dict[str, list[float]] = {image["file_name"]: [] for image in truth["images"]}
    for image in truth["images"]:
        masks = [
            row["segmentation"] for row in read_labels(labels).annotations if row["image_id"] == image["file_name"]
        ]
        decoded = [coco_mask.decode(mask).astype(bool) for mask in masks]
        for one in truth["annotations"]:
            if one["image_id"] == image["id"] and not one["iscrowd"]:
                rle = coco_mask.frPyObjects(one["segmentation"], *SIZE)
                bits = coco_mask.decode(rle[0] if isinstance(rle, list) else rle).astype(bool)
                ious = [(bits & mask).sum() / (bits | mask).sum() for mask in decoded]
                best[image["file_name"]].append(max(ious, default=0))
    assert best["broken.png"] == [0, 0, 0, 0] and best["5.png"] == []
    mean = np.mean([iou for ious in best.values() for iou in ious])
    assert content["summary"]["mean_best_iou"]["all"]["value"] == pytest.approx(mean)
    assert {row["file_name"]: row["mean_best_iou"] for row in content["images"]} == {
        name: pytest.approx(np.mean(ious)) if ious else None for name, ious in best.items()
    }


def test_a_failed_image_counts_without_masks_and_is_named(
    labels: Path, tmp_path: Path, write_truth: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    evaluate("--labels", labels, "--truth", write_truth(photos_truth()), "--json", result)
    assert capsys.readouterr().out.splitlines()[1].startswith("failed broken.png: decode: cannot decode this PNG")
    content = json.loads(result.read_text())
    assert list(content["failed"]) == ["broken.png"]
    (row,) = [row for row in content["images"] if row["image_id"] == "broken.png"]
    assert (row["masks"], row["objects"], row["mask_ar"]["1000"]) == (0, 4, 0)


def test_the_table_has_what_the_json_has(
    labels: Path, tmp_path: Path, write_truth: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    evaluate("--labels", labels, "--truth", write_truth(photos_truth()), "--json", result, "--seed", "5")
    model, _, counts, settings, blank, *table = capsys.readouterr().out.splitlines()
    assert model == "model: sam_tiny"
    content = json.loads(result.read_text())
    summary = content["summary"]
    assert counts == f"7 images, {summary['masks']} masks, 24 objects; 6 crowd regions ignored"
    assert "order of rank" in settings and "seed 5" in settings and blank == ""
    assert content["evaluation"]["seed"] == 5
    rows = {" ".join(line[:14].split()): line[14:] for line in table}

    def told(figure: dict[str, float | None]) -> str:
        low, value, high = figure["low"], figure["value"], figure["high"]
        return "-" if value is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"

    expected = {"mean best IoU": [told(summary["mean_best_iou"][size]) for size in AREA_RANGES]}
    for kind in ("mask", "box"):
        for count in MAX_PROPOSALS:
            figures = [summary[f"{kind}_ar"][size][str(count)] for size in AREA_RANGES]
            expected[f"{kind} AR@{count}"] = [told(figure) for figure in figures]
    expected["objects"] = [str(summary["objects"][size]) for size in AREA_RANGES]
    expected[""] = list(AREA_RANGES)
    assert {name: line.split() for name, line in rows.items()} == {
        name: " ".join(cells).split() for name, cells in expected.items()
    }


def test_the_plot_shows_the_figures(labels: Path, tmp_path: Path, write_truth: Callable[[Any], Path]) -> None:
    truth = photos_truth()
    pictures = []
    for name in ("some", "none"):
        path = tmp_path / f"{name}.png"
        assert evaluate("--labels", labels, "--truth", write_truth(truth), "--plot", path) == 0
        pictures.append(np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")).astype(int))
        for one in truth["annotations"]:
            one["iscrowd"] = 1  # no object is left
    some, none = pictures
    blue = [(np.abs(picture - [0x00, 0x72, 0xB2]).sum(axis=2) < 30).sum() for picture in (some, none)]
    assert some.shape[0] >= 400 and blue[0] > 4 * blue[1] > 0  # without objects only the legend is left


def test_the_embedded_model_on_photos(tmp_path: Path, write_truth: Callable[[Any], Path]) -> None:
    """Outlines drawn by hand: a head, a coat, grass as a crowd region, a saucer, a cup; and masks that are large."""
    photos = tmp_path / "photos"
    photos.mkdir()
    shapes: dict[str, list[tuple[list[float], int]]] = {
        "photographer.jpg": [
            ([160, 90, 200, 66, 255, 75, 270, 110, 262, 160, 200, 170, 165, 140], 0),
            ([70, 180, 170, 110, 210, 150, 280, 220, 280, 300, 190, 340, 140, 480, 30, 480], 0),
            ([150, 370, 300, 330, 510, 470, 510, 511, 150, 511], 1),
        ],
        "coffee.jpg": [
            ([75, 190, 150, 90, 430, 110, 480, 220, 420, 330, 240, 385, 110, 320], 0),
            ([172, 90, 200, 30, 300, 15, 390, 50, 405, 110, 330, 205, 220, 190], 0),
        ],
    }
    truth: dict[str, Any] = {"images": [], "annotations": []}
    for image_id, (name, drawn) in enumerate(shapes.items(), 1):
        shutil.copy(demo.PHOTOS / name, photos)
        width, height = Image.open(photos / name).size
        truth["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        truth["annotations"] += [
            annotation(10 * image_id + i, image_id, [polygon], [height, width], iscrowd)
            for i, (polygon, iscrowd) in enumerate(drawn)
        ]
    output, result = tmp_path / "labels", tmp_path / "result.json"
    thresholds = ["--pred_iou_thresh", "0.1", "--stability_score_thresh", "0.5", "--points_per_side", "8"]
    assert cli.main(["label", "--input", str(photos), "--output", str(output), "--model", "sam_tiny", *thresholds]) == 0
    assert evaluate("--labels", output, "--truth", write_truth(truth), "--json", result) == 0
    summary = json.loads(result.read_text())["summary"]
    assert summary["mask_ar"]["large"]["1000"]["value"] > 0
    results = as_results(read_labels(output), truth, lambda row: -row["rank"])
    assert len(results) > 100
    assert_json_is_cocoevals(summary, truth, results)


# Which image is which.


def test_the_images_in_common_are_evaluated_on_demand(
    labels: Path, tmp_path: Path, write_truth: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    truth, result = photos_truth(), tmp_path / "result.json"
    truth["images"][0]["file_name"] = "elsewhere.png"
    path = write_truth(truth)
    assert evaluate("--labels", labels, "--truth", path) == 2
    assert "1 images are in the truth but not in the labels: elsewhere.png. --allow_missing" in capsys.readouterr().err
    assert evaluate("--labels", labels, "--truth", path, "--allow_missing", "--json", result) == 0
    assert "left out, since not in the labels: 1 images" in capsys.readouterr().out
    content = json.loads(result.read_text())
    assert (content["only_in_labels"], content["only_in_truth"]) == (["0.png"], ["elsewhere.png"])
    rest = copy.deepcopy(truth)
    del rest["images"][0]
    rest["annotations"] = [one for one in rest["annotations"] if one["image_id"] != 1]
    results = as_results(read_labels(labels), photos_truth(), lambda row: -row["rank"])
    assert_json_is_cocoevals(content["summary"], rest, [one for one in results if one["image_id"] != 1])


def test_images_have_their_path_or_their_name(tmp_path: Path, write_truth: Callable[[Any], Path]) -> None:
    """a/0.png and b/1.png, in the truth by path and by name."""
    write_photos(tmp_path / "photos" / "a", 1)
    write_photos(tmp_path / "photos" / "b", 1, first=1)
    assert label("--input", tmp_path / "photos", "--output", tmp_path / "labels") == 0
    truth = photos_truth()
    truth["images"] = truth["images"][:2]
    truth["images"][0]["file_name"] = "a/0.png"
    truth["annotations"] = truth["annotations"][:10]
    result = tmp_path / "result.json"
    assert evaluate("--labels", tmp_path / "labels", "--truth", write_truth(truth), "--json", result) == 0
    rows = json.loads(result.read_text())["images"]
    assert [(row["image_id"], row["file_name"]) for row in rows] == [("a/0.png", "a/0.png"), ("b/1.png", "1.png")]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["0.png"], "0.png of the truth is two images of the labels: a/0.png and b/0.png"),
        (["a/0.png", "0.png"], "a/0.png of the labels is two images of the truth"),
        (["a/0.png"], "1 images are in the labels but not in the truth: b/0.png"),
    ],
)
def test_what_is_ambiguous_or_missing_is_an_error(
    tmp_path: Path,
    write_truth: Callable[[Any], Path],
    capsys: pytest.CaptureFixture[str],
    names: list[str],
    told: str,
) -> None:
    for directory in ("a", "b"):
        write_photos(tmp_path / "photos" / directory, 1)
    assert label("--input", tmp_path / "photos", "--output", tmp_path / "labels") == 0
    images = [{"id": i, "file_name": name, "height": 48, "width": 64} for i, name in enumerate(names)]
    truth = write_truth({"images": images, "annotations": []})
    assert evaluate("--labels", tmp_path / "labels", "--truth", truth) == 2
    assert told in capsys.readouterr().err


def test_a_truth_of_other_images_fails(
    labels: Path, tmp_path: Path, write_truth: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    truth = {"images": [{"id": 1, "file_name": "x.png", "height": 48, "width": 64}], "annotations": []}
    for flags in ([], ["--allow_missing"]):
        assert evaluate("--labels", labels, "--truth", write_truth(truth), *flags) == 1
        assert (
            "no image in common: the labels have 0.png, 1.png, 2.png, ..., the truth x.png" in capsys.readouterr().err
        )


def break_size(truth: dict[str, Any]) -> None:
    truth["images"][2]["height"] = 64


def break_polygon(truth: dict[str, Any]) -> None:
    truth["annotations"][7]["segmentation"] = [[1, 2, 3, 4]]


def break_ids(truth: dict[str, Any]) -> None:
    truth["annotations"][7]["id"] = 3


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        (break_size, 2, "2.png has the size (48, 64) (H, W) in the labels and (64, 64) in the truth"),
        (break_polygon, 1, "truth.json: annotation 8 of 1.png: polygons of [4] numbers"),
        (break_ids, 1, "two annotation records have the id 3"),
        (dict.clear, 1, 'no list "images"'),
    ],
)
def test_a_truth_that_does_not_fit_is_an_error(
    labels: Path,
    write_truth: Callable[[Any], Path],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Any], None],
    code: int,
    told: str,
) -> None:
    truth = photos_truth()
    change(truth)
    assert evaluate("--labels", labels, "--truth", write_truth(truth)) == code
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "exactly one of --truth and --against"),
        (["--truth", "t.json", "--against", "other"], "exactly one of --truth and --against"),
        (["--truth", ""], "truth is empty"),
        (["--truth", "no/such.json"], "cannot read --truth no/such.json"),
        (["--truth", "t.json", "--rank_by", "area"], "rank_by must be rank or predicted_iou"),
        (["--truth", "t.json", "--seed", "-1"], "seed must be at least 0"),
        (["--truth", "t.json", "--plot", "x.jpg"], "plot is x.jpg"),
        (["--against", "other", "--plot", "x.png"], "--truth beside it"),
        (["--against", "other", "--allow_missing"], "allow_missing is for --truth"),
        (["--against", "other", "--rank_by", "predicted_iou"], "rank_by and seed are for --truth"),
        (["--against", "other", "--seed", "1"], "rank_by and seed are for --truth"),
        (["--against", "no/labels"], "no/labels holds no labels: there is no run.json"),
        (["--against", "no/labels", "--json", "{labels}"], "cannot write --json"),
    ],
)
def test_mistakes_are_told(labels: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str) -> None:
    assert evaluate("--labels", labels, *(flag.format(labels=labels) for flag in flags)) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("rank_by", RANKINGS)
def test_the_order_of_the_rows_does_not_matter(labels: Path, rank_by: str) -> None:
    table = pq.read_table(sorted((labels / "annotations").glob("*.parquet"))[0])
    masks = table.filter(np.array([image_id == "0.png" for image_id in table["image_id"].to_pylist()]))
    order = np.random.default_rng(0).permutation(masks.num_rows)
    ranked = masks["mask_index"].to_numpy()[ranked_order(masks, rank_by)]
    shuffled = masks.take(order)
    assert (shuffled["mask_index"].to_numpy()[ranked_order(shuffled, rank_by)] == ranked).all()
    assert masks.num_rows > 5


# Against other labels.


def compare(labels: Path, against: Path, result: Path) -> dict[str, Any]:
    assert evaluate("--labels", labels, "--against", against, "--json", result) == 0
    content: dict[str, Any] = json.loads(result.read_text())
    return content


def test_labels_match_themselves_in_other_chunks(labels: Path, tmp_path: Path, photos: Path) -> None:
    (photos / "broken.png").write_bytes(b"")
    assert label("--input", photos, "--output", tmp_path / "other", "--pred_iou_thresh", "0.8") == 0
    content = compare(labels, tmp_path / "other", tmp_path / "result.json")
    masks = len(read_labels(labels).annotations)
    assert content["summary"] == {
        "images": 6,
        "unchanged": 6,
        "match_iou": 0.9,
        "masks": masks,
        "masks_against": masks,
        "matched": masks,
        "lost": 0,
        "new": 0,
        "mean_matched_iou": 1,
        "mean_best_iou": 1,
    }
    assert content["failed"] == {"broken.png": "both"}


def test_a_higher_threshold_loses_masks(
    labels: Path, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without NMS a higher threshold gives some of the masks, so what is lost is known; each is one of many discs."""
    (photos / "5.png").unlink()
    write_photos(photos, 1, first=6)
    for name, threshold in (("low", "0.8"), ("high", "0.85")):
        flags = ["--pred_iou_thresh", threshold, "--box_nms_thresh", "1"]
        assert label("--input", photos, "--output", tmp_path / name, *flags) == 0
        if name == "low":
            (photos / "6.png").unlink()
            write_photos(photos, 1, first=7)
    low, high = (read_labels(tmp_path / name) for name in ("low", "high"))
    common = {f"{number}.png" for number in range(5)}

    def count(found: Labels) -> int:
        return sum(row["image_id"] in common for row in found.annotations)

    content = compare(tmp_path / "high", tmp_path / "low", tmp_path / "result.json")
    summary = content["summary"]
    assert (content["only_in_labels"], content["only_in_against"]) == (["7.png"], ["6.png"])
    assert (summary["masks"], summary["masks_against"]) == (count(high), count(low))
    assert (summary["matched"], summary["lost"], summary["new"]) == (count(high), count(low) - count(high), 0)
    assert summary["lost"] > 0 and summary["mean_matched_iou"] == 1 > summary["mean_best_iou"]
    assert sum(row["lost"] for row in content["images"]) == summary["lost"]
    told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"lost {summary['lost']} {summary['lost'] / summary['masks_against']:.1%}" in told
    # The other way round they are new.
    turned = compare(tmp_path / "low", tmp_path / "high", tmp_path / "result.json")["summary"]
    assert (turned["new"], turned["lost"]) == (summary["lost"], 0)


def test_an_image_that_failed_in_one_is_not_compared(labels: Path, tmp_path: Path, photos: Path) -> None:
    (photos / "0.png").write_bytes(b"")
    (photos / "broken.png").write_bytes(photo_bytes(9))
    assert label("--input", photos, "--output", tmp_path / "other") == 0
    content = compare(labels, tmp_path / "other", tmp_path / "result.json")
    assert content["failed"] == {"0.png": "against", "broken.png": "labels"}
    assert [row["image_id"] for row in content["images"]] == [f"{number}.png" for number in range(1, 6)]


def test_another_size_is_an_error(
    labels: Path, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "3.png").write_bytes(photo_bytes(3, (48, 64)))
    assert label("--input", photos, "--output", tmp_path / "other") == 0
    assert evaluate("--labels", labels, "--against", tmp_path / "other") == 2
    assert "3.png has the size (48, 64) (H, W) in" in capsys.readouterr().err


def test_labels_of_a_folder_and_of_a_tar_of_it_are_compared(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tar has the photos by names that say nothing, and one that the folder lacks."""
    (tmp_path / "a.tar").write_bytes(tar_bytes(*((f"{n}.{n}.png", photo_bytes(n)) for n in range(2, 7))))
    assert label("--input", tmp_path / "a.tar", "--output", tmp_path / "other", "--pred_iou_thresh", "0.8") == 0
    content = compare(labels, tmp_path / "other", tmp_path / "result.json")
    assert content["other_ids"] == {f"{n}.png": f"a.tar#{n - 2}" for n in range(2, 6)}
    assert (content["only_in_labels"], content["only_in_against"]) == (["0.png", "1.png", "broken.png"], ["a.tar#4"])
    assert content["summary"]["images"] == content["summary"]["unchanged"] == 4 and content["summary"]["masks"] > 20
    told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "with another image_id: joined by file_name or sha256 4" in told


def test_labels_with_another_root_are_compared(labels: Path, tmp_path: Path) -> None:
    """deep/0.png is not 0.png of the labels, but 1.png is 1.png."""
    write_photos(tmp_path / "photos/deep", 3)
    write_photos(tmp_path / "photos", 1, first=3)
    assert label("--input", tmp_path / "photos", "--output", tmp_path / "other", "--pred_iou_thresh", "0.8") == 0
    content = compare(labels, tmp_path / "other", tmp_path / "result.json")
    assert content["other_ids"] == {f"{n}.png": f"deep/{n}.png" for n in range(3)}
    assert [row["image_id"] for row in content["images"]] == [f"{n}.png" for n in range(4)]
    assert content["summary"]["unchanged"] == 4


def test_labels_without_an_image_in_common_fail(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(tmp_path / "photos", 2, first=7)
    assert label("--input", tmp_path / "photos", "--output", tmp_path / "other") == 0
    capsys.readouterr()
    assert evaluate("--labels", labels, "--against", tmp_path / "other") == 1
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1
    assert (
        "have no image in common: 0.png (0.png), 1.png (1.png), 2.png (2.png), ... and 7.png (7.png), 8.png" in told.err
    )
    assert "by their image_id, else by their file_name, else by their sha256" in told.err


def test_labels_whose_common_images_all_failed_fail(
    labels: Path, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(6):
        (photos / f"{number}.png").write_bytes(b"")
    write_photos(photos, 1, first=7)
    assert label("--input", photos, "--output", tmp_path / "other") == 0
    assert evaluate("--labels", labels, "--against", tmp_path / "other") == 1
    assert "all 6 images that" in capsys.readouterr().err


def name_of(image_id: str, file_name: str | None = None, sha256: str | None = None) -> ImageName:
    return ImageName(image_id, file_name, sha256, ChunkKey("shard", 0))


@pytest.mark.parametrize(
    ("labels", "against", "joined"),
    [
        ([name_of("a")], [name_of("a")], {"a": "a"}),
        ([name_of("a", "n")], [name_of("b", "n")], {"a": "b"}),
        ([name_of("a", "n", "s")], [name_of("b", "m", "s")], {"a": "b"}),
        ([name_of("a", "n", "s")], [name_of("b", "m", "t")], {}),
        ([name_of("a")], [name_of("b")], {}),  # None is no name
        # Two images of one name are neither, unless one is taken or their bytes say more.
        ([name_of("a", "n"), name_of("b", "n")], [name_of("c", "n")], {}),
        ([name_of("a", "n"), name_of("b", "n")], [name_of("a", "n"), name_of("c", "n")], {"a": "a", "b": "c"}),
        ([name_of("a", "n", "s"), name_of("b", "n", "t")], [name_of("c", "n", "t")], {"b": "c"}),
        # Equal names with other bytes are the same image only if nothing else is.
        ([name_of("a", None, "s")], [name_of("a", None, "t")], {"a": "a"}),
        ([name_of("a", None, "s")], [name_of("a", None, "t"), name_of("b", None, "s")], {"a": "b"}),
        ([name_of("a", "n", "s")], [name_of("b", "n", "t")], {"a": "b"}),
        ([name_of("a", "n", "s")], [name_of("b", "n", None)], {"a": "b"}),
        # Two copies of a photo are not told apart by their bytes.
        ([name_of("a", "n", "s"), name_of("b", "m", "s")], [name_of("c", "k", "s")], {}),
    ],
)
def test_images_are_joined_by_what_only_one_has(
    labels: list[ImageName], against: list[ImageName], joined: dict[str, str]
) -> None:
    assert {image_id: name.image_id for image_id, name in join_images(labels, against).items()} == joined
    turned = {image_id: name.image_id for image_id, name in join_images(against, labels).items()}
    assert turned == {other: image_id for image_id, other in joined.items()}
