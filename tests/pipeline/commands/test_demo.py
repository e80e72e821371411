"""maskbeam demo, with the embedded model, on two of the shipped photos and a coarser grid so that it is soon done."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from maskbeam.pipeline import cli
from maskbeam.pipeline.commands import demo

NAMES = ["cat.jpg", "coffee.jpg"]


@pytest.fixture
def few_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "photos"
    directory.mkdir()
    for name in NAMES:
        shutil.copy(demo.PHOTOS / name, directory)
    monkeypatch.setattr(demo, "PHOTOS", directory)
    monkeypatch.setattr(demo, "_FLAGS", [*demo._FLAGS, "--points_per_side", "12"])
    return directory


def test_the_demo_labels_the_photos_and_draws_the_masks(
    few_photos: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"picture: {output}/masks.png"
    images = pq.read_table(output / "images").to_pylist()
    assert [(row["image_id"], row["status"]) for row in images] == [(name, "labeled") for name in NAMES]
    assert pq.read_table(output / "annotations").num_rows == sum(row["num_masks"] for row in images)

    # The photos beside each other, 400 pixels high, and on each the colours of its masks.
    widths = [round(row["width"] * 400 / row["height"]) for row in images]
    sheet = np.asarray(Image.open(output / "masks.png")).astype(int)
    assert sheet.shape == (400, sum(widths), 3)
    plain = np.hstack(
        [
            np.asarray(Image.open(few_photos / name).convert("RGB").resize((width, 400), Image.Resampling.LANCZOS))
            for name, width in zip(NAMES, widths, strict=True)
        ]
    )
    drawn = np.abs(sheet - plain).max(axis=2) > 10
    for part in np.split(drawn, [widths[0]], axis=1):
        assert 0.01 < part.mean() < 1


def test_somebody_elses_picture_stays(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output.mkdir()
    (output / "masks.png").write_bytes(b"mine")
    assert cli.main(["demo", "--output", str(output)]) == 2
    assert f"{output}/masks.png was not made by a demo" in capsys.readouterr().err
    assert [(path.name, path.read_bytes()) for path in output.iterdir()] == [("masks.png", b"mine")]


def test_every_shipped_photo_has_its_source_named() -> None:
    told = (demo.PHOTOS / "README.md").read_text()
    names = [path.name for path in demo.PHOTOS.glob("*.jpg")]
    assert len(names) >= 3 and [name for name in names if name not in told] == []
