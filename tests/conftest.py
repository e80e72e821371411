"""Small runs: photos of a few pixels, labeled by FakeSam, and the rows that come of it."""

from __future__ import annotations

import io
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before anything imports what these are for.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from maskbeam.pipeline.launch.local import run_label
from maskbeam.pipeline.options import parse_label
from maskbeam.transforms.load_model import LoadSam
from tests.fakes import load_fake

# No test depends on the clock: it waits for what must happen, and gives up only when something hangs.
EVENT_SECONDS = 600.0
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# What `make check` leaves out: pyproject.toml says why. Other tests are the everyday ones.
OTHER_MARKERS = ("processes", "browser", "model", "slow", "clients", "engines")

# A small grid, and thresholds that some of FakeSam's masks pass and some do not.
SMALL_GRID = ["--points_per_side", "4", "--pred_iou_thresh", "0.75", "--stability_score_thresh", "0.85"]


def photo_bytes(number: int, size_wh: tuple[int, int] = (64, 48), format_name: str = "PNG", **options: Any) -> bytes:
    """A picture of coloured blotches, another one for each number. At 64 x 48 it goes into FakeSam's frame as it is.

    Its first pixel is (number, number, number).
    """
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    pixels = np.array(Image.fromarray(noise).resize(size_wh, Image.Resampling.BILINEAR))
    pixels[0, 0] = number
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_name, **options)
    return buffer.getvalue()


def write_photos(directory: Path, count: int, first: int = 0) -> Path:
    """photo_bytes(first...) as first.png...; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (directory / f"{number}.png").write_bytes(photo_bytes(number))
    return directory


def label(*flags: str | Path, load: LoadSam = load_fake) -> int:
    """`maskbeam label` with a fake model on a small grid; returns the exit code."""
    job, options = parse_label([*SMALL_GRID, *map(str, flags)])
    return run_label(job, options, load)


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[Any] | None = None) -> None:
    """Waits for something to happen, while the process that is to do it runs.

    Raises:
      AssertionError: the process ended before, or nothing happened for EVENT_SECONDS.
    """
    end = time.monotonic() + EVENT_SECONDS
    while True:
        ended = process is not None and process.poll() is not None  # asked first: it may have been its last act
        if happened():
            return
        assert not ended, process.communicate() if process else None
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@dataclass(frozen=True)
class Labels:
    """All rows of a run, in the order of their ids, without `seconds`."""

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]


def read_labels(output: Path) -> Labels:
    images, annotations = (
        [row for file in sorted((output / name).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
        for name in ("images", "annotations")
    )
    for row in images:
        del row["seconds"]
    return Labels(
        sorted(images, key=lambda row: row["image_id"]),
        sorted(annotations, key=lambda row: (row["image_id"], row["mask_index"])),
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A directory of six photos."""
    return write_photos(tmp_path / "photos", 6)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where labels go."""
    return tmp_path / "labels"
