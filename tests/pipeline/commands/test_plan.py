"""maskbeam plan: its arithmetic by hand, its counts against what `label` makes of the same input."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import subprocess
import sys
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskbeam.pipeline import cli
from maskbeam.pipeline.commands import plan
from maskbeam.pipeline.commands.plan import parse_plan, sample_shard
from maskbeam.pipeline.exits import UsageError
from maskbeam.transforms.estimate import (
    BYTES_PER_CHUNK,
    BYTES_PER_IMAGE,
    BYTES_PER_MASK,
    PlanConfig,
    Sample,
    ShardEstimate,
    count_images,
    count_work,
    make_plan,
    schedule,
    work_per_image,
)
from maskbeam.transforms.files.streams import open_file
from maskbeam.transforms.masks.amg import AmgConfig
from maskbeam.transforms.records import SourceFile, WorkerTime
from tests.conftest import label, photo_bytes, write_photos
from tests.transforms.readers.test_shard import images_parquet, images_tar, make_shard, tar_bytes, tfrecord_bytes

# 36 seconds an image: 100 images take a worker an hour.
CONFIG = PlanConfig(images_per_second=1 / 36, workers=2, price_per_hour=3, masks_per_image=10, startup_minutes=6)
FLAGS = ["--images_per_second", "2", "--workers", "1", "--price_per_hour", "1.5"]


def shards_of(*images: float, num_bytes: int = 1000) -> list[ShardEstimate]:
    return [ShardEstimate(f"{index}.tar", count, num_bytes) for index, count in enumerate(images)]


def plan_of(*images: float, workers: int = 2, chunk_size: int = 32) -> Any:
    config = PlanConfig(images_per_second=1, workers=workers, price_per_hour=1)
    return make_plan(shards_of(*images), config, AmgConfig(), chunk_size, chunk_bytes=10**6)


# Counting.


def test_images_are_counted_by_the_bytes_of_the_sample() -> None:
    # 20 images take 2,400 bytes, 120 each: 100 images in each shard of 12,000 bytes. The two samples are 200 bytes off
    # either way, so the ratio's standard error is sqrt(2 / 1 * (200^2 + 200^2)) / 2400 = 1/6 of it.
    count = count_images([12000] * 3, {0: Sample(10, 1000, False), 2: Sample(10, 1400, False)})
    assert count.per_shard == pytest.approx((100, 100, 100))
    assert count.margin == pytest.approx(2 * 300 / 6)


def test_of_one_shard_the_images_tell_the_margin() -> None:
    # sqrt(2 / 1 * (20^2 + 20^2)) / 240 = 1/6, of 20 images.
    count = count_images([2400], {0: Sample(2, 240, False, image_bytes=(100, 140))})
    assert count.per_shard == pytest.approx((20,))
    assert count.margin == pytest.approx(2 * 20 / 6)


def test_only_what_is_not_counted_has_a_margin() -> None:
    samples = {0: Sample(10, 1000, True), 1: Sample(10, 1400, False)}
    count = count_images([1000, 12000], samples)
    assert count.per_shard == pytest.approx((10, 100))
    assert count.margin == pytest.approx(2 * 100 / 6)
    counted = count_images([1000], {0: Sample(10, 1000, True)})
    assert counted.exact and not count.exact and counted.margin == 0


def test_one_image_says_nothing_of_the_others() -> None:
    assert count_images([200], {0: Sample(1, 100, False, image_bytes=(100,))}).margin is None


def test_broken_shards_say_nothing_of_the_others() -> None:
    broken = Sample(1, 10**6, True, error="cut")
    assert count_images([10**6, 500, 1000], {0: broken, 1: Sample(5, 500, True)}).per_shard == (1, 5, 10)
    assert count_images([10**6, 500], {0: broken}).per_shard == (1, 1)


def test_empty_shards_have_no_images() -> None:
    assert count_images([1024, 2000], {0: Sample(0, 1024, True), 1: Sample(4, 2000, True)}).per_shard == (0, 4)


@pytest.mark.parametrize(
    ("config", "crops", "prompts", "work"),
    [
        ({}, 1, 1024, 1),
        ({"points_per_side": 64}, 1, 4096, 4),
        ({"points_per_side": 16}, 1, 256, 1),  # the image encoder runs all the same
        ({"crop_n_layers": 1}, 5, 5 * 1024, 5),
        ({"crop_n_layers": 1, "crop_n_points_downscale_factor": 2}, 5, 1024 + 4 * 256, 5),
        ({"crop_n_layers": 2, "points_per_side": 64}, 21, 21 * 4096, 84),
        ({"points_per_side": None, "point_grids": (((0.5, 0.5), (0.1, 0.1)),)}, 1, 2, 1),
    ],
)
def test_work_grows_with_crops_and_prompts(config: dict[str, Any], crops: int, prompts: int, work: float) -> None:
    assert count_work(AmgConfig(**config)) == (crops, prompts)
    assert work_per_image(AmgConfig(**config)) == work


# Scheduling.


def test_longest_first() -> None:
    # Graham's example: the best is 3+3 | 2+2+2.
    assert schedule([2, 2, 2, 3, 3], 2) == [5, 7]
    assert schedule([5], 3) == [0, 0, 5]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_no_worker_waits_longer_than_graham_says(durations: list[int], workers: int) -> None:
    loads = schedule(durations, workers)
    assert len(loads) == workers and sum(loads) == sum(durations)
    assert loads[-1] * workers <= sum(durations) + workers * max(durations)
    best = min(
        max(sum(d for d, w in zip(durations, choice, strict=True) if w == worker) for worker in range(workers))
        for choice in itertools.product(range(workers), repeat=len(durations))
    )
    assert best <= loads[-1] <= (Fraction(4, 3) - Fraction(1, 3 * workers)) * best


# The plan.


def test_the_plan_by_hand() -> None:
    made = make_plan(shards_of(100, 60, 50), CONFIG, AmgConfig(), chunk_size=32, chunk_bytes=10**6)
    assert (made.shards, made.images) == (3, 210)
    assert made.chunks == 4 + 2 + 2 and made.output_files == 16
    assert made.output_bytes == 210 * (BYTES_PER_IMAGE + 10 * BYTES_PER_MASK) + 8 * BYTES_PER_CHUNK
    # One worker has 100 images, the other 60 + 50: 1 and 1.1 hours.
    hours, cost = made.hours, made.cost
    assert hours is not None and cost is not None
    assert (hours.startup, hours.mean, hours.slowest, hours.total) == pytest.approx((0.1, 1.05, 1.1, 1.2))
    # Two workers of 3 an hour.
    assert (cost.total, cost.startup, cost.waiting) == pytest.approx((7.2, 0.6, 0.3))
    assert made.warnings == ()


def test_crops_take_longer() -> None:
    made = make_plan(shards_of(100, 100), CONFIG, AmgConfig(crop_n_layers=1), 32, 10**6)
    assert made.hours is not None and made.hours.slowest == pytest.approx(5)


def test_a_chunk_also_closes_at_its_bytes() -> None:
    assert make_plan(shards_of(64, num_bytes=900), CONFIG, AmgConfig(), 32, chunk_bytes=100).chunks == 9


def test_every_shard_makes_a_chunk() -> None:
    assert plan_of(0, 0.2, 1).chunks == 3


# Warnings.


def test_more_workers_than_shards() -> None:
    (warning,) = plan_of(100, 100, workers=5).warnings
    assert warning.startswith("5 workers for 2 shards") and "so 3 will have nothing to do" in warning


def test_a_huge_shard() -> None:
    # 1,000 images for one of two workers; the mean is (1000 + 10 * 50) / 2 = 750.
    (warning,) = plan_of(*[50] * 10, 1000).warnings
    assert warning.startswith("the slowest worker takes 1.3 times the mean")
    assert "10.tar alone has 1,000 of 1,500 images" in warning
    assert "to 75 images or fewer" in warning


def test_even_shards_are_fine() -> None:
    assert plan_of(*[100] * 10).warnings == ()


def test_tiny_shards() -> None:
    (warning,) = plan_of(*[4] * 200).warnings
    assert warning.startswith("chunks have 4.0 images in the mean and could have 32")
    assert "200 of them make 400 output files" in warning
    assert plan_of(*[16] * 200).warnings == ()
    assert plan_of(*[4] * 99).warnings == ()  # too few to matter


def test_large_images_make_no_tiny_chunks() -> None:
    # 1,000 bytes and 10 images a shard, one shard a chunk: 10 is what 1,000 bytes hold.
    made = make_plan(shards_of(*[10] * 200), CONFIG, AmgConfig(), 32, chunk_bytes=1000)
    assert (made.chunks, made.warnings) == (200, ())


def test_too_many_output_files() -> None:
    # 800,001 images are 25,001 chunks, 800,000 are 25,000.
    (warning,) = plan_of(800_001, 800_000).warnings
    assert warning.startswith("100,002 output files") and "50,001 footers" in warning
    assert "--chunk_size 64 makes about 50,001." in warning
    assert plan_of(*[800_000] * 2).warnings == ()


# The command.


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Six photos, three shards of 5, 4 and 3, and one that is broken."""
    root = write_photos(tmp_path / "input", 6)
    images = [photo_bytes(number) for number in range(5)]
    (root / "a.tar").write_bytes(images_tar(images))
    (root / "b.tfrecord.gz").write_bytes(gzip.compress(tfrecord_bytes(images[:4])))
    (root / "c.parquet").write_bytes(images_parquet(images[:3]))
    (root / "d.tar").write_bytes(images_tar(images)[: len(images_tar(images)) // 4])
    (root / "notes.txt").write_bytes(b"no")
    return root


def run(*flags: str | Path) -> int:
    return cli.main(["plan", *FLAGS, *map(str, flags)])


def test_the_counts_are_those_of_label(mixed: Path, output: Path, tmp_path: Path) -> None:
    """Where everything is small, all of it is in the sample."""
    assert label("--input", mixed, "--output", output, "--chunk_size", "2") == 0
    assert run("--input", mixed, "--chunk_size", "2", "--json", tmp_path / "plan.json") == 0
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert planned["images"] == json.loads((output / "summary.json").read_text())["images"]
    assert planned["chunks"] == len(list((output / "images").iterdir()))
    assert planned["output_files"] == sum(len(list((output / name).iterdir())) for name in ("images", "annotations"))
    assert [(count["format"], count["exact"]) for count in planned["input"]] == [
        ("image", True),
        ("parquet", True),
        ("tar", True),
        ("tfrecord", True),
    ]
    assert planned["job"]["plan"]["workers"] == 1 and planned["ignored_files"] == 1


def test_what_is_printed(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--input", mixed) == 0
    out = capsys.readouterr().out
    printed = [" ".join(line.split()) for line in out.splitlines()]
    assert "image files 6 " + plan._bytes(sum(len(photo_bytes(n)) for n in range(6))) + ", 6 images" in printed
    assert any(line.startswith("tfrecord files 1 ") and "4 images, counted in all" in line for line in printed)
    assert any(line.startswith("warning: files ignored") and "1 (notes.txt)" in line for line in printed)
    assert any(line.startswith("warning: 1 of the 2 tar files that were opened break off: d.tar") for line in printed)


def test_of_many_shards_a_few_are_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 shards of 20 members of 1,024 bytes with their headers: 512 more for the header that follows the fourth."""
    for number in range(12):
        members = [(f"{index}.jpg", b"x" * 512) for index in range(20)]
        (tmp_path / f"{number:02}.tar").write_bytes(tar_bytes(*members))
    write_photos(tmp_path / "loose", 3)
    opened = []

    def open_and_count(file: SourceFile) -> io.BufferedReader:
        opened.append(Path(file.path).name)
        return open_file(file)

    monkeypatch.setattr(plan, "_SHARDS_SAMPLED", {"tar": 3})
    monkeypatch.setattr(plan, "_IMAGES_SAMPLED", 4)
    monkeypatch.setattr(plan, "open_file", open_and_count)
    assert run("--input", tmp_path, "--json", tmp_path / "plan.json") == 0
    assert sorted(opened) == ["00.tar", "04.tar", "08.tar"]
    tar = next(count for count in json.loads((tmp_path / "plan.json").read_text())["input"] if count["format"] == "tar")
    size = (tmp_path / "00.tar").stat().st_size
    assert (tar["images"], tar["sampled"], tar["exact"]) == (round(12 * size / (1024 + 512 / 4)), 3, False)
    assert "~" in capsys.readouterr().out


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_sample_ends_after_its_images(compress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_IMAGES_SAMPLED", 4)
    images = [np.random.default_rng(number).bytes(200_000) for number in range(10)]
    sample = sample_shard(make_shard(tmp_path, "tfrecord", compress(tfrecord_bytes(images))))
    assert (sample.images, sample.whole, len(sample.image_bytes)) == (4, False, 4)
    assert sample.num_bytes == sum(sample.image_bytes)
    # Random bytes do not get smaller. gzip reads ahead, by 128 kB at most.
    assert 800_000 <= sample.num_bytes < 801_000 + (2**17 if compress is gzip.compress else 0)


def test_a_sample_ends_at_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A member takes 1,536 bytes, and 512 of the one that follows have been read.
    monkeypatch.setattr(plan, "_BYTES_SAMPLED", 2049)
    sample = sample_shard(make_shard(tmp_path, "tar", images_tar([b"x" * 1000] * 9)))
    assert (sample.images, sample.num_bytes, sample.whole) == (2, 2 * 1536 + 512, False)


@pytest.mark.parametrize("shard_format", ["tar", "tfrecord", "parquet"])
@pytest.mark.parametrize("data", [b"", b"no shard at all" * 100])
def test_broken_shards_are_a_row(shard_format: str, data: bytes, tmp_path: Path) -> None:
    sample = sample_shard(make_shard(tmp_path, shard_format, data))
    assert (sample.images, sample.whole) == (1, True) and sample.error


@pytest.mark.processes
def test_neither_keras_nor_tensorflow_is_loaded(mixed: Path) -> None:
    flags = ["plan", *FLAGS, "--input", str(mixed)]
    program = f"import sys; from pipeline import cli; assert cli.main({flags!r}) == 0; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert "maskbeam.pipeline.commands.plan" in loaded and not {"keras", "tensorflow"} & set(loaded)


def test_images_are_counted_without_any_rate(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--input", str(mixed), "--json", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    # Of the broken shard an image is whole, and a row says where it breaks off: 6 + 5 + 4 + 3 + 2.
    assert re.search(r"^images +20 +in 5 shards", printed, re.MULTILINE), printed
    assert "hours and cost: give --rate_from" in printed and "workers, if" not in printed
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert (planned["images"], planned["hours"], planned["cost"]) == (20, None, None)


def test_one_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(tmp_path, 1)
    assert cli.main(["plan", "--input", str(tmp_path), "--images_per_second", "1"]) == 0
    printed = capsys.readouterr().out
    assert "in 1 shard, each" in printed and "of 1 worker, if" in printed and "cost: give --price_per_hour" in printed


def leave_summary(labels: Path, workers: dict[str, Any], **amg: Any) -> Path:
    labels.mkdir()
    (labels / "summary.json").write_text(json.dumps({"workers": workers}))
    (labels / "run.json").write_text(json.dumps({"amg": asdict(AmgConfig(**amg))}))
    return labels


def test_a_rate_is_read_from_labels(tmp_path: Path, photos: Path) -> None:
    """Two workers took 50 s for 20 images on five crops: 0.4 images/s each, five times that on one crop."""
    workers = WorkerTime(load_model=20.0, compile=40.0, label=50.0, images=20, started=2).to_dict()
    labels = leave_summary(tmp_path / "labels", workers, crop_n_layers=1)
    assert plan.read_rate(str(labels)) == pytest.approx((2.0, 0.5))
    flags = ["--input", str(photos), "--rate_from", str(labels), "--json", str(tmp_path / "plan.json")]
    assert cli.main(["plan", *flags]) == 0
    hours = json.loads((tmp_path / "plan.json").read_text())["hours"]
    # Six photos at 2 images/s are 3 s; 30 s of start-up come once.
    assert hours["total"] == pytest.approx(33 / 3600) and hours["startup"] == pytest.approx(30 / 3600)


def test_the_rate_of_a_real_run_is_read(photos: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert label("--input", photos, "--output", output) == 0
    assert cli.main(["plan", "--input", str(photos), "--rate_from", str(output)]) == 0
    assert "labeling, mean worker" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (None, "cannot read a rate from --rate_from .*: KeyError: 'workers'. Give the directory of a finished run"),
        ({"images": 0, "label": 0.1}, "labeled too few images for a rate"),
    ],
)
def test_labels_without_a_rate_are_told(workers: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    labels = leave_summary(tmp_path / "labels", workers or {})
    if workers is None:
        (labels / "summary.json").write_text("{}")
    with pytest.raises(UsageError, match=message):
        plan.read_rate(str(labels))
    with pytest.raises(UsageError, match="cannot read a rate"):
        plan.read_rate(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", ".", "--rate_from", "labels"], "give either --images_per_second or --rate_from"),
        (["--input", "nowhere"], "matches no file"),
        (["--input", ".", "--workers", "0"], "workers is 0; expected at least 1"),
        (["--input", ".", "--images_per_second", "0"], "images_per_second is 0.0; expected more than 0"),
        (["--input", ".", "--price_per_hour", "-1"], "price_per_hour is -1.0; expected 0 or more"),
        (["--input", ".", "--json", ""], "json is empty"),
        (["--input", ".", "--pred_iou_thresh", "0.5"], "unknown argument --pred_iou_thresh"),
    ],
)
def test_usage_errors(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(write_photos(tmp_path / "photos", 1))
    assert cli.main(["plan", *FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_json_file_that_cannot_be_written(photos: Path) -> None:
    job = parse_plan([*FLAGS, "--input", str(photos), "--json", str(photos / "0.png" / "plan.json")])
    with pytest.raises(UsageError, match="cannot write --json"):
        plan.run_plan(job)
