"""maskbeam certify: a fake model whose lower precision changes known masks of known photos, and the real one once."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import beta

from maskbeam.pipeline import cli
from maskbeam.pipeline.commands.certify import draw_images, parse_certify, run_certify
from maskbeam.pipeline.exits import UsageError
from maskbeam.transforms.files.streams import open_file
from maskbeam.transforms.load_model import LoadSam, ModelConfig
from maskbeam.transforms.match_shards import InputConfig, match_shards
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.records import SourceFile
from tests.conftest import photo_bytes, write_photos
from tests.fakes import FakeSam, FakeScored, load_fake
from tests.transforms.models.test_golden import GOLDEN, read_case
from tests.transforms.readers.test_shard import images_parquet, images_tar, tfrecord_bytes

# Nothing is filtered or suppressed: each photo has the 3 masks of each of the 16 prompts. A predicted IoU of 0 drops.
ALL_MASKS = ["--points_per_side", "4", "--pred_iou_thresh", "0.1", "--stability_score_thresh", "0"]
ALL_MASKS += ["--box_nms_thresh", "1"]
NUM_MASKS = 48

ROOT = Path(__file__).parents[3]


class LowPrecisionSam(FakeSam):
    """Photo 1 loses the masks of its first prompt, 2 has all predicted IoU higher, 3 has those masks elsewhere."""

    def score(self, context: np.ndarray, points_xy: np.ndarray, points_per_batch: int) -> FakeScored:
        scored = super().score(context, points_xy, points_per_batch)
        photo, points, iou = context[0, 0], scored.points_xy.copy(), scored.iou.copy()
        if photo == 1:
            iou[0] = 0
        if photo == 2:
            iou += 0.125
        if photo == 3:
            points[0] += 6
        return FakeScored(points, iou)


def load_pair(config: ModelConfig) -> Any:
    return FakeSam() if config.dtype == "float32" else LowPrecisionSam()


def certify(*flags: str | Path, load: LoadSam = load_pair) -> int:
    return run_certify(parse_certify([*ALL_MASKS, *map(str, flags)]), load)


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """Where the JSON goes."""
    return tmp_path / "results" / "certificate.json"


@pytest.fixture
def four_photos(tmp_path: Path) -> Path:
    """The photos that LowPrecisionSam knows, and one that is none."""
    directory = write_photos(tmp_path / "photos", 4)
    (directory / "broken.png").write_bytes(photo_bytes(4)[:100])
    return directory


# What is found.


def test_all_that_the_lower_precision_changes_is_in_the_json(four_photos: Path, result: Path) -> None:
    certify("--input", four_photos, "--json", result)
    content = json.loads(result.read_text())
    rows = {row["image_id"]: row for row in content["images"]}
    counted = ("float32_masks", "low_precision_masks", "matched", "lost", "new", "changed")
    assert {image_id: tuple(row.get(name) for name in counted) for image_id, row in rows.items()} == {
        "0.png": (48, 48, 48, 0, 0, False),
        "1.png": (48, 45, 45, 3, 0, True),
        "2.png": (48, 48, 48, 0, 0, False),
        "3.png": (48, 48, 45, 3, 3, False),
        "broken.png": (None, None, None, None, None, None),
    }
    for row in (rows[f"{number}.png"] for number in range(4)):
        assert row["mean_matched_iou"] == 1
        assert len(row["best_ious"]) == NUM_MASKS
        assert sum(iou < 0.9 for iou in row["best_ious"]) == row["lost"]
        assert row["mean_best_iou"] == pytest.approx(np.mean(row["best_ious"]))
    assert rows["2.png"]["mean_predicted_iou_difference"] == pytest.approx(0.125)
    assert rows["broken.png"]["error_stage"] == "decode" and "cannot decode this PNG" in rows["broken.png"]["error"]

    best_ious = [iou for row in content["images"] for iou in row.get("best_ious", [])]
    assert content["summary"] == {
        "images": 5,
        "compared": 4,
        "failed": 1,
        "changed": 1,
        "changed_fraction": 0.25,
        "changed_upper_bound": pytest.approx(beta.ppf(0.95, 2, 3)),
        "confidence": 0.95,
        "images_needed": None,
        "with_lost_or_new_masks": 2,
        "float32_masks": 192,
        "low_precision_masks": 189,
        "matched": 186,
        "lost": 6,
        "new": 3,
        "mean_matched_iou": 1,
        "mean_best_iou": pytest.approx(np.mean(best_ious)),
        "mean_predicted_iou_difference": pytest.approx(0.125 * 48 / 186),
    }


def test_the_json_tells_what_the_result_depends_on(four_photos: Path, result: Path) -> None:
    certify("--input", four_photos, "--json", result, "--seed", "7", "--dtype", "float16")
    content = json.loads(result.read_text())
    assert content["job"]["model"] == {"model": "sam_tiny", "dtype": "float16"}
    assert content["job"]["certificate"]["seed"] == 7
    assert content["job"]["amg"]["points_per_side"] == 4
    assert content["root"] == str(four_photos) and len(content["model_fingerprint"]) == 64


def test_the_table_lists_what_failed_and_what_changed(
    four_photos: Path, result: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certify("--input", four_photos, "--json", result)
    best_iou = json.loads(result.read_text())["summary"]["mean_best_iou"]
    model, failed, changed, *table, verdict = capsys.readouterr().out.splitlines()
    assert model == "model: sam_tiny"
    assert failed.startswith("failed broken.png: decode: cannot decode this PNG")
    assert changed == "changed 1.png: 48 masks in float32, 45 in bfloat16 (3 lost, 0 new)"
    assert [" ".join(line.split()) for line in table] == [
        "images in the sample 5",
        "compared 4",
        "failed: not read or decoded 1",
        "images that change their mask count 1 25.0%",
        f"of all images at most, 95% confidence {beta.ppf(0.95, 2, 3):.1%}",
        "images with a lost or new mask 2 50.0%",
        "masks in float32 192",
        "matched in bfloat16 at IoU >= 0.9 186 96.9%",
        "lost 6 3.1%",
        "masks in bfloat16 189",
        "new 3 1.6%",
        "mean IoU of the matched masks 1.0000",
        f"mean best IoU of all float32 masks {best_iou:.4f}",
        f"mean |difference| of predicted IoU, matched {0.125 * 48 / 186:.4f}",
    ]
    assert verdict == (
        "bfloat16 is NOT certified: 1 of 4 images (0.25) change their mask count, more than --max_changed 0.05 allows"
    )


# Exit codes.


ALL_OF_4_AT_MOST_75 = "of all images at most 0.7514 do, with 95% confidence"  # scipy.stats.beta.ppf(0.95, 2, 3)


@pytest.mark.parametrize(
    ("flags", "load", "code", "verdict"),
    [
        (
            ["--max_changed", "0.76"],
            load_pair,
            0,
            f"is certified: 1 of 4 images (0.25) change their mask count; {ALL_OF_4_AT_MOST_75}",
        ),
        (
            ["--max_changed", "0.75"],
            load_pair,
            1,
            "is NOT certified: not enough images: 5 needed if no more than 1 change",
        ),
        (
            ["--max_changed", "0.25"],
            load_pair,
            1,
            "is NOT certified: not enough images: 18 needed if no more than 1 change",
        ),
        (["--max_changed", "0.24"], load_pair, 1, "is NOT certified: 1 of 4 images (0.25)"),
        ([], load_fake, 1, "is NOT certified: not enough images: 59 needed if no more than 0 change"),
        (["--max_changed", "0.53"], load_fake, 0, "is certified: 0 of 4 images (0)"),  # 1 - 0.05 ** (1 / 4) = 0.527
        (["--max_changed", "1"], load_pair, 0, "is certified: 1 of 4 images (0.25)"),
        # Nothing was compared: that is no certificate.
        (["--pred_iou_thresh", "1"], load_fake, 1, "is NOT certified: no image has a mask"),
        (["--max_pixels", "1"], load_fake, 1, "is NOT certified: no image could be decoded"),
    ],
)
def test_the_exit_code_is_the_verdict(
    four_photos: Path, capsys: pytest.CaptureFixture[str], flags: list[str], load: LoadSam, code: int, verdict: str
) -> None:
    assert certify("--input", four_photos, *flags, load=load) == code
    assert verdict in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("count", "changed", "code"),
    [(58, False, 1), (59, False, 0), (92, True, 1), (93, True, 0)],  # 0.95 ** 59 < 0.05 < 0.95 ** 58
)
def test_the_default_needs_59_images_without_a_change_or_93_with_one(
    tmp_path: Path, result: Path, count: int, changed: bool, code: int
) -> None:
    photo_1 = photo_bytes(1)
    for number in range(count):
        (tmp_path / f"{number:03}.png").write_bytes(photo_1 if changed and number == 0 else photo_bytes(0))
    assert certify("--input", tmp_path / "*.png", "--json", result, "--points_per_side", "1") == code
    content = json.loads(result.read_text())
    assert content["certified"] == (code == 0)
    assert content["summary"]["compared"] == count and content["summary"]["changed"] == changed
    assert content["summary"]["images_needed"] == (None if code == 0 else 93 if changed else 59)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "float32"], "dtype must be another one than float32"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got int8"),
        (["--images", "0"], "images is 0"),
        (["--max_changed", "5"], "max_changed must be"),
        (["--max_changed", "nan"], "max_changed must be"),
        (["--max_changed", "0"], "no sample shows that no image at all changes"),
        (["--json", ""], "--json is empty"),
        (["--json", "{photos}"], "cannot write --json"),
        (["--model", "no_such_model"], "there is no model no_such_model"),
        (["--points_per_sde", "8"], "unknown argument --points_per_sde: did you mean --points_per_side?"),
        (["--runner", "DirectRunner"], "unknown argument --runner: maskbeam certify --help lists all flags."),
        (["--chunk_size", "8"], "unknown argument --chunk_size"),  # it would do nothing
        (["--input", "no/such/photos"], "matches no file"),
    ],
)
def test_a_mistake_is_told_before_anything_is_labeled(
    photos: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    given = (flag.format(photos=photos) for flag in flags)
    assert cli.main(["certify", "--input", str(photos), *given]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_a_usage_error(photos: Path) -> None:
    def load(config: ModelConfig) -> Any:
        raise ValueError("cannot load model sam_tiny: it is no SAM")

    with pytest.raises(UsageError, match="it is no SAM"):
        certify("--input", photos, load=load)


def test_a_model_that_fails_ends_the_comparison(photos: Path, result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class BrokenSam(FakeSam):
        def embed(self, frame: np.ndarray, resized_hw: tuple[int, int]) -> np.ndarray:
            raise RuntimeError("out of memory")

    assert certify("--input", photos, "--json", result, load=lambda config: BrokenSam()) == 1
    assert "the model failed on 0.png, so nothing is certified. RuntimeError: out of memory" in capsys.readouterr().err
    assert "certified" not in json.loads(result.read_text())


# The sample.


def drawn_ids(*inputs: Path, count: int, seed: int = 0) -> list[str]:
    matched = match_shards(InputConfig(tuple(map(str, inputs))))
    return [image.image_id for image in draw_images(matched, ReadConfig(), count, seed)]


def test_a_sample_is_the_same_for_a_seed_and_grows_with_the_count(tmp_path: Path) -> None:
    directory = write_photos(tmp_path / "photos", 12)
    samples = [drawn_ids(directory, count=count) for count in (1, 4, 12, 100)]
    assert [len(sample) for sample in samples] == [1, 4, 12, 12]
    for smaller, larger in pairwise(samples):
        assert set(smaller) <= set(larger) and larger == sorted(larger)
    assert drawn_ids(directory, count=4) == samples[1] != drawn_ids(directory, count=4, seed=1)


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.tfrecord", tfrecord_bytes), ("a.tar", images_tar), ("a.parquet", images_parquet)],
)
def test_any_image_of_any_input_may_be_drawn(tmp_path: Path, name: str, pack: Callable[[list[bytes]], bytes]) -> None:
    """4 of 10 images, drawn with 200 seeds: each about 80 times, with a standard deviation of 7."""
    write_photos(tmp_path / "photos", 5)
    (tmp_path / name).write_bytes(pack([photo_bytes(number) for number in range(5)]))
    drawn = Counter(image_id for seed in range(200) for image_id in drawn_ids(tmp_path, count=4, seed=seed))
    assert set(drawn) == {f"photos/{number}.png" for number in range(5)} | {f"{name}#{row}" for row in range(5)}
    assert all(50 < times < 110 for times in drawn.values())


def test_only_drawn_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_photos(tmp_path / "photos", 12)
    opened: list[str] = []

    def open_counted(file: SourceFile) -> io.BufferedReader:
        opened.append(Path(file.path).name)
        return open_file(file)

    monkeypatch.setattr("maskbeam.transforms.readers.shard.open_file", open_counted)
    assert drawn_ids(directory, count=3) == sorted(opened)


def test_what_cannot_be_read_is_counted(tmp_path: Path, result: Path) -> None:
    packed = images_tar([photo_bytes(0), photo_bytes(2)])
    (tmp_path / "cut.tar").write_bytes(packed[: len(packed) // 3])
    certify("--input", tmp_path / "cut.tar", "--json", result)
    content = json.loads(result.read_text())
    assert content["summary"]["failed"] >= 1
    assert {row["error_stage"] for row in content["images"] if row["error"]} == {"read"}


# The real model.


@pytest.mark.processes
def test_the_real_model_in_bfloat16(tmp_path: Path, result: Path) -> None:
    case = read_case("blobs_97x151.clean")
    for name in (case["photo"], "blobs_160x120.png"):
        shutil.copy(GOLDEN / name, tmp_path)
    settings = [text for name, value in case["settings"].items() for text in (f"--{name}", str(value))]
    flags = ["--input", str(tmp_path / "*.png"), "--model", str(GOLDEN / "sam_128"), *settings]
    command = [sys.executable, "-m", "pipeline", "certify", *flags, "--json", str(result), "--max_changed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # TensorFlow has nothing to say of two models in one process.
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(result.read_text())
    assert content["summary"]["compared"] == 2
    rows = {row["image_id"]: row for row in content["images"]}
    assert rows[case["photo"]]["float32_masks"] == len(case["masks"])  # the reference's
    # It is another precision, but the same model.
    assert 0 < content["summary"]["mean_predicted_iou_difference"] < 0.01
    assert 0.5 < content["summary"]["mean_best_iou"] < 1
