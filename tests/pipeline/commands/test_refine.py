"""Label once, decide later: refine gives what `label` gives with the same settings, and refuses what it cannot know."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from maskbeam.pipeline import cli
from maskbeam.pipeline.commands import refine as refine_command
from maskbeam.pipeline.exits import UsageError
from maskbeam.transforms.labels.layout import committed_chunks
from maskbeam.transforms.labels.refine import COLUMNS, refine_chunk
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.labels.schema import (
    CANDIDATES,
    annotation_rows,
    chunk_to_candidates,
    chunk_to_tables,
    image_row,
)
from maskbeam.transforms.load_model import ModelConfig
from maskbeam.transforms.masks.amg import AmgConfig, label_image
from maskbeam.transforms.masks.containment import ContainmentConfig
from maskbeam.transforms.records import ChunkReport, Dropped, EncodedImage, LabeledChunk, LabeledImage, Shard
from tests.conftest import Labels, label, photo_bytes, read_labels, write_photos
from tests.fakes import FakeSam, FakeScored

ROOT = Path(__file__).parents[3]


class SpeckledSam(FakeSam):
    """FakeSam's discs with holes and islands, so that there are small regions to clean."""

    def low_res_logits(self, scored: FakeScored, prompts: np.ndarray) -> np.ndarray:
        logits = super().low_res_logits(scored, prompts)
        for prompt, one in zip(prompts, logits, strict=True):
            seed = scored.points_xy[prompt].tobytes()
            one += np.random.default_rng(list(seed)).choice([0, 0, 0, 0, 12, -12], one.shape).astype(np.float32)
        return logits


def load_speckled(config: ModelConfig) -> SpeckledSam:
    return SpeckledSam()


# Nothing below is kept; what is asked for is above.
BAR: dict[str, Any] = {"candidate_pred_iou_thresh": 0.75, "candidate_stability_score_thresh": 0.85}
GRID: dict[str, Any] = {"points_per_side": 5}
SHARD = Shard("s.tar", "/d/s.tar", "tar", ())


@lru_cache(maxsize=8)
def picture(number: int) -> np.ndarray:
    grey = np.random.default_rng(number).integers(0, 256, (48, 64, 1), np.uint8)
    return np.repeat(grey, 3, axis=2)


def label_picture(number: int, config: AmgConfig) -> LabeledImage:
    pixels = picture(number)
    result = label_image(SpeckledSam(), pixels, config)
    return LabeledImage(
        EncodedImage(f"s.tar#{number}", number, None, None, b""),
        0,
        "ff",
        (pixels.shape[0], pixels.shape[1]),
        1,
        result.masks,
        result.num_candidates,
        result.dropped,
        candidates=result.candidates,
    )


@lru_cache(maxsize=2)
def stored(crop_n_layers: int) -> tuple[AmgConfig, pa.Table, pa.Table]:
    """The images and the candidates tables of two pictures, and the settings that they were labeled with."""
    config = AmgConfig(**GRID, **BAR, crop_n_layers=crop_n_layers, keep_candidates=True)
    chunk = LabeledChunk.of(
        SHARD, 0, tuple(label_picture(number, config) for number in (1, 2)), True, "d", keep_candidates=True
    )
    report = ChunkReport(SHARD.name, 0, True, "d", "", chunk.totals())
    _, images = chunk_to_tables(chunk, report, Run())
    return config, images, chunk_to_candidates(chunk, report, Run())


def rows_of(image: LabeledImage) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All that is written of an image but its seconds and the parents, for which `label` does not look."""
    masks = [{**row, "parent_id": None} for row in annotation_rows(image)]
    return masks, {**image_row(image, SHARD.path), "seconds": 0}


selections = st.fixed_dictionaries(
    {},
    optional={
        "pred_iou_thresh": st.floats(0.75, 1.0),
        "stability_score_thresh": st.floats(0.85, 1.0),
        "box_nms_thresh": st.floats(0, 1),
        "crop_nms_thresh": st.floats(0, 1),
        "nms_by": st.sampled_from(["box", "mask"]),
        "min_mask_region_area": st.sampled_from([0, 20, 60]),
        "min_mask_area": st.integers(0, 400),
        "max_mask_area": st.integers(400, 3000),
        "min_mask_area_fraction": st.floats(0, 0.2),
        "max_mask_area_fraction": st.floats(0.2, 1),
        "max_masks": st.integers(1, 20),
    },
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(crop_n_layers=st.sampled_from([0, 1]), selection=selections)
def test_refine_gives_what_label_gives_with_the_same_settings(crop_n_layers: int, selection: dict[str, Any]) -> None:
    config, images, candidates = stored(crop_n_layers)
    loose = {"pred_iou_thresh": 0.76, "stability_score_thresh": 0.86}
    wanted = replace(config.without_candidates(), **{**loose, **selection})
    refined = refine_chunk(images, candidates, wanted, ContainmentConfig())
    directly = [label_picture(number, wanted) for number in (1, 2)]
    assert [rows_of(image) for image in refined] == [rows_of(image) for image in directly]


@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_each_filter_has_something_to_drop_here(crop_n_layers: int) -> None:
    """So that the test above cannot pass by having nothing to compare."""
    config, images, candidates = stored(crop_n_layers)
    wanted = replace(
        config.without_candidates(),
        pred_iou_thresh=0.76,
        stability_score_thresh=0.88,
        min_mask_region_area=60,
        min_mask_area=200,
        max_masks=2,
    )
    dropped = Dropped()
    for changes in ({}, {"nms_by": "mask", "box_nms_thresh": 0.3, "crop_nms_thresh": 0.3}, {"box_nms_thresh": 0.5}):
        for image in refine_chunk(images, candidates, replace(wanted, **changes), ContainmentConfig("whole", 0.7)):
            assert image.num_candidates == len(image.masks) + image.dropped.total()
            dropped += image.dropped
    by_the_other_case = {"small_region"} if crop_n_layers else {"crop_edge", "crop_nms"}
    assert {name for name, count in vars(dropped).items() if not count} == {"prompt", *by_the_other_case}
    assert candidates["segmentation"].null_count  # some below the bar of stability


@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_keeping_candidates_changes_no_mask(crop_n_layers: int) -> None:
    for settings_ in ({}, {"nms_by": "mask"}, {"pred_iou_thresh": 0.8, "stability_score_thresh": 0.88}):
        config = AmgConfig(**{**GRID, "crop_n_layers": crop_n_layers, **settings_})
        kept = label_picture(1, replace(config, keep_candidates=True))
        assert rows_of(kept) == rows_of(label_picture(1, config))
        assert kept.candidates


def test_a_candidate_is_stored_with_all_that_is_known_of_it() -> None:
    _, _, candidates = stored(1)
    rows = candidates.to_pylist()
    assert candidates.schema.equals(CANDIDATES) and len(rows) > 100
    order = [(row["image_id"], row["crop_index"]) for row in rows]
    assert order == sorted(order)  # images, then crops, as the generator saw them
    for row in rows:
        assert row["predicted_iou"] > 0.75
        assert row["crop_layer"] == min(row["crop_index"], 1)
        assert (row["segmentation"] is None) == (row["area"] is None) == (not row["stability_score"] >= 0.85)
        if row["segmentation"] is None or not row["area"]:
            continue
        assert row["area"] == coco_mask.area(row["segmentation"])
        x, y, w, h = coco_mask.toBbox(row["segmentation"])
        left, top = row["crop_box"][:2]
        assert row["box_xyxy"] == [x - left, y - top, x - left + w - 1, y - top + h - 1]


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"candidate_pred_iou_thresh": 0.5}, "candidate_pred_iou_thresh says which candidates keep_candidates stores"),
        ({"keep_candidates": True, "candidate_pred_iou_thresh": 0.9}, "candidate_pred_iou_thresh is 0.9, above"),
        (
            {"keep_candidates": True, "stability_score_thresh": 0, "candidate_stability_score_thresh": 0.1},
            "candidate_stability_score_thresh is 0.1, above stability_score_thresh 0",
        ),
    ],
)
def test_a_bad_bar_is_named(settings_: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        AmgConfig(**settings_)


def test_the_bar_is_below_the_thresholds_unless_given() -> None:
    bar = AmgConfig(keep_candidates=True, pred_iou_thresh=0.5, stability_score_thresh=0).bar
    assert (bar.pred_iou_thresh, bar.stability_score_thresh) == (0.4, 0)
    given_ = AmgConfig(keep_candidates=True, candidate_pred_iou_thresh=0.1, candidate_stability_score_thresh=-1)
    assert (given_.bar.pred_iou_thresh, given_.bar.stability_score_thresh) == (0.1, -1)
    assert AmgConfig().bar == AmgConfig()


# The program.

KEEP = ["--keep_candidates", "--candidate_pred_iou_thresh", "0.72", "--candidate_stability_score_thresh", "0.8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photos, one of them broken."""
    photos = write_photos(tmp_path_factory.mktemp("data") / "photos", 4)
    (photos / "broken.jpg").write_bytes(photo_bytes(9, format_name="JPEG")[:600])
    return photos


@pytest.fixture(scope="module")
def kept(data: Path) -> Path:
    """Labels with candidates, in chunks of two images, with crops."""
    output = data.parent / "kept"
    assert label_crops(data, output, *KEEP) == 0
    return output


def label_crops(data: Path, output: Path, *flags: str) -> int:
    return label(
        "--input", data, "--output", output, "--chunk_size", "2", "--crop_n_layers", "1", *flags, load=load_speckled
    )


def refine(labels: Path, output: Path, *flags: str) -> int:
    return cli.main(["refine", "--labels", str(labels), "--output", str(output), *flags])


def without_parents(labels: Labels) -> Labels:
    return Labels(labels.images, [{**row, "parent_id": None} for row in labels.annotations])


def test_the_settings_of_the_labels_give_their_rows(kept: Path, tmp_path: Path) -> None:
    assert refine(kept, tmp_path / "same") == 0
    before, after = read_labels(kept), read_labels(tmp_path / "same")
    assert without_parents(after) == before and len(before.annotations) > 20
    assert committed_chunks(str(tmp_path / "same")) == committed_chunks(str(kept))
    assert {row["status"] for row in after.images} >= {"labeled", "failed"}
    for kind in ("annotations", "images"):
        for file in (kept / kind).iterdir():
            assert pq.read_schema(tmp_path / "same" / kind / file.name).equals(pq.read_schema(file))


@pytest.mark.parametrize(
    "flags",
    [
        "--pred_iou_thresh 0.9 --stability_score_thresh 0.82 --max_masks 3",
        "--pred_iou_thresh 0.73 --stability_score_thresh 0.8 --nms_by mask --min_mask_region_area 60",
        "--min_mask_area 300 --max_mask_area_fraction 0.5 --box_nms_thresh 0.2 --crop_nms_thresh 0.9",
    ],
)
def test_other_settings_give_the_rows_of_label_with_them(data: Path, kept: Path, tmp_path: Path, flags: str) -> None:
    assert refine(kept, tmp_path / "refined", *flags.split()) == 0
    assert label_crops(data, tmp_path / "directly", *flags.split()) == 0
    after = read_labels(tmp_path / "refined")
    assert without_parents(after) == read_labels(tmp_path / "directly") and after.annotations
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("refined", "directly")]
    for summary in summaries:
        del summary["seconds"], summary["workers"]  # refine runs no model
    assert summaries[0] == summaries[1]


def test_refine_tells_where_it_came_from(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--pred_iou_thresh", "0.9", "--containment", "parts", "--containment_thresh", "0.8"]
    assert refine(kept, tmp_path / "refined", *flags) == 0
    before, after = (json.loads((path / "run.json").read_text()) for path in (kept, tmp_path / "refined"))
    assert after["amg"] == {
        **before["amg"],
        "pred_iou_thresh": 0.9,
        "keep_candidates": False,
        "candidate_pred_iou_thresh": None,
        "candidate_stability_score_thresh": None,
    }
    assert after["model_fingerprint"] == before["model_fingerprint"] and after["root"] == before["root"]
    assert after["refined_from"] == {
        "labels": str(kept),
        "label_settings": before["amg"],
        "containment": "parts",
        "containment_thresh": 0.8,
    }
    masks = len(read_labels(tmp_path / "refined").annotations)
    printed = capsys.readouterr().out
    assert f"{masks} masks, {len(read_labels(kept).annotations)} before" in printed and "5 images" in printed


@pytest.mark.parametrize("rule", ["whole", "parts"])
def test_containment_drops_masks_and_says_so(kept: Path, tmp_path: Path, rule: str) -> None:
    everything = tmp_path / "all"
    assert refine(kept, everything, "--containment_thresh", "0.8") == 0
    assert refine(kept, tmp_path / rule, "--containment", rule, "--containment_thresh", "0.8") == 0
    before, after = read_labels(everything), read_labels(tmp_path / rule)
    parents = [row for row in before.annotations if row["parent_id"] is not None]
    by_id = {(row["image_id"], row["mask_index"]): row for row in before.annotations}
    assert parents
    for row in parents:
        parent = by_id[row["image_id"], row["parent_id"]]["segmentation"]
        assert coco_mask.iou([row["segmentation"]], [parent], [1])[0, 0] >= 0.8
    assert all(row["parent_id"] is None for row in after.annotations)
    dropped = sum(row["dropped_containment"] for row in after.images)
    assert dropped == len(before.annotations) - len(after.annotations) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pred_iou_thresh 0.7", "--pred_iou_thresh 0.7 is below 0.72, the bar"),
        ("--pred_iou_thresh 0", "--pred_iou_thresh 0.0 is below 0.72"),
        ("--stability_score_thresh 0.4", "label again with --candidate_stability_score_thresh 0.4"),
        ("--points_per_side 8", "made with 4. Another value needs the model"),
        ("--crop_n_layers 0", "made with 1. Another value needs the model"),
        ("--mask_threshold 1", "Another value needs the logits, which are not stored"),
        ("--stability_score_offset 0.5", "Another value needs the logits"),
        ("--nms_by boxes", 'nms_by must be "box" or "mask"'),
        ("--containment some", "containment must be one of all, whole, parts"),
        ("--keep_candidates", "unknown argument --keep_candidates"),
        ("--pred_iou_tresh 0.9", "did you mean --pred_iou_thresh?"),
    ],
)
def test_what_cannot_be_decided_is_an_error_with_a_reason(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    assert refine(kept, tmp_path / "out", *flags.split()) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_that_stay_may_be_given(kept: Path, tmp_path: Path) -> None:
    assert refine(kept, tmp_path / "out", "--points_per_side", "4", "--crop_n_layers", "1", "--max_masks", "2") == 0


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_the_labels_themselves_are_never_written_to(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overwrite: list[str]
) -> None:
    (tmp_path / "link").symlink_to(kept)
    before = sorted(path.stat().st_mtime_ns for path in kept.rglob("*"))
    for output in (kept, kept / "annotations", kept / "refined", tmp_path / "link"):
        assert refine(kept, output, *overwrite) == 2
        assert "lies in the labels" in capsys.readouterr().err
    assert sorted(path.stat().st_mtime_ns for path in kept.rglob("*")) == before


def test_labels_whose_images_all_failed_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.png").write_bytes(b"")
    label("--input", tmp_path / "broken.png", "--output", tmp_path / "kept", "--keep_candidates")
    capsys.readouterr()
    assert refine(tmp_path / "kept", tmp_path / "refined") == 1
    told = f"maskbeam: there was nothing to refine: all 1 images of {tmp_path}/kept failed.\n"
    assert capsys.readouterr().err == told


def test_labels_without_candidates_are_refused(
    data: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label("--input", data, "--output", tmp_path / "plain") == 0
    assert refine(tmp_path / "plain", tmp_path / "out") == 2
    assert "has no candidates. Label it with --keep_candidates" in capsys.readouterr().err
    assert refine(kept, tmp_path / "refined") == 0
    assert refine(tmp_path / "refined", tmp_path / "out") == 2
    assert f"was refined from {kept}: refine that again" in capsys.readouterr().err
    assert refine(tmp_path / "none", tmp_path / "out") == 2
    assert "holds no labels" in capsys.readouterr().err
    image = {"id": 1, "file_name": "a.png", "width": 8, "height": 6}
    (tmp_path / "truth.json").write_text(json.dumps({"images": [image], "annotations": [], "categories": []}))
    assert cli.main(["import", "--annotations", f"{tmp_path}/truth.json", "--output", f"{tmp_path}/imported"]) == 0
    assert refine(tmp_path / "imported", tmp_path / "out") == 2
    assert "was imported and has no candidates" in capsys.readouterr().err


# Going on.


def files(output: Path) -> dict[str, int]:
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in output.rglob("*.parquet")}


def test_an_interrupted_refine_goes_on(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refine(kept, tmp_path / "whole") == 0
    refined = refine_command._refine_and_commit
    done: list[ChunkReport] = []

    def interrupted(*args: Any) -> ChunkReport:
        if done:
            raise KeyboardInterrupt
        done.append(refined(*args))
        return done[-1]

    with monkeypatch.context() as patched:
        patched.setattr(refine_command, "_refine_and_commit", interrupted)
        assert refine(kept, tmp_path / "out") == 130
    first = files(tmp_path / "out")
    assert len(first) == 2
    assert refine(kept, tmp_path / "out") == 0
    assert read_labels(tmp_path / "out") == read_labels(tmp_path / "whole")
    assert {name: files(tmp_path / "out")[name] for name in first} == first  # not done again
    assert not (tmp_path / "out" / "_tmp").exists()
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("out", "whole")]
    assert summaries[0]["masks"] == summaries[1]["masks"] and summaries[0]["images"] == 5
    assert refine(kept, tmp_path / "out", "--pred_iou_thresh", "0.9") == 2
    assert "pred_iou_thresh was 0.75, now 0.9" in capsys.readouterr().err
    assert refine(kept, tmp_path / "out", "--pred_iou_thresh", "0.9", "--overwrite") == 0


def test_a_chunk_that_was_labeled_again_is_refined_again(data: Path, kept: Path, tmp_path: Path) -> None:
    labels, output = tmp_path / "labels", tmp_path / "out"
    shutil.copytree(kept, labels)
    assert refine(labels, output) == 0
    before = files(output)
    name = min(path.name for path in (labels / "images").iterdir())
    (labels / "candidates" / name).unlink()
    assert label_crops(data, labels, *KEEP) == 0  # a chunk without its candidates is not finished
    assert (labels / "candidates" / name.replace(".parquet", ".1.parquet")).exists()
    assert refine(labels, output) == 0
    after = files(output)
    assert {file for file in after if after[file] != before[file]} == {f"annotations/{name}", f"images/{name}"}


def test_lost_candidates_are_named(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = tmp_path / "labels"
    shutil.copytree(kept, labels)
    lost = max((labels / "candidates").iterdir())
    lost.unlink()
    (labels / "summary.json").unlink()
    assert refine(labels, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert f"{lost} cannot be read" in error and "run the command that made it again" in error
    lost.write_bytes((kept / "candidates" / lost.name).read_bytes()[:-9])
    assert refine(labels, tmp_path / "out") == 1
    assert f"{lost} cannot be read" in capsys.readouterr().err
    shutil.copy(kept / "candidates" / lost.name, lost)
    assert refine(labels, tmp_path / "out") == 0
    assert "is not finished" in capsys.readouterr().out


def test_chunks_that_the_labels_have_no_more_are_refused(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels"
    shutil.copytree(kept, labels)
    assert refine(labels, tmp_path / "out") == 0
    gone = max((labels / "images").iterdir())
    gone.unlink()
    (labels / "summary.json").unlink()
    assert refine(labels, tmp_path / "out") == 2
    assert f"has {gone.name}, which {labels} has no more" in capsys.readouterr().err


def test_other_bars_are_another_run(data: Path, kept: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"candidate_pred_iou_thresh was 0\.72, now None"):
        label_crops(data, kept, "--keep_candidates")
    with pytest.raises(UsageError, match="keep_candidates was True, now False"):
        label_crops(data, kept)
    shutil.copytree(kept, tmp_path / "labels")
    assert label("--input", data, "--output", tmp_path / "labels", "--overwrite") == 0
    assert not list((tmp_path / "labels" / "candidates").iterdir())


@pytest.mark.processes
def test_no_model_is_loaded(kept: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from maskbeam.pipeline.cli import main; "
        "code = main(sys.argv[1:]); "
        "assert not {'keras', 'keras_hub', 'tensorflow', 'jax', 'torch'} & set(sys.modules); sys.exit(code)"
    )
    arguments = ["refine", "--labels", str(kept), "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_refine_reads_no_more_than_it_needs() -> None:
    """The other columns say again what these and the settings say."""
    assert set(CANDIDATES.names) - {column.partition(".")[0] for column in COLUMNS} == {
        "crop_layer",
        "crop_box",
        "area",
    }


def test_settings_survive_json() -> None:
    config = AmgConfig(points_per_side=None, point_grids=(((0.5, 0.25),),), keep_candidates=True)
    assert AmgConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
