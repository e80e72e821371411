"""What `import maskbeam` gives, and what it costs: run as a stranger would, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import maskbeam
from maskbeam.transforms.photos import PhotoMissing
from tests.conftest import label, read_labels, write_photos

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[1]
HEAVY = ("apache_beam", "keras", "tensorflow", "jax", "pyarrow", "numpy")


def run_script(script: str, cwd: Path = ROOT) -> Any:
    """Runs Python source with maskbeam importable; returns what it printed last, as JSON."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loaded(script: str) -> set[str]:
    """Those of the heavy packages that a script has loaded at its end."""
    return set(
        run_script(f"{script}\nimport json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))")
    )


def test_importing_maskbeam_loads_nothing_heavy_and_takes_less_than_a_tenth_of_a_second_of_cpu() -> None:
    assert loaded("import maskbeam") == set()
    script = "import time; start = time.process_time(); import maskbeam; print(time.process_time() - start)"
    assert run_script(script) < 0.1


def test_labeling_an_array_needs_no_beam() -> None:
    script = (
        "import numpy, maskbeam\nmasks = maskbeam.label_image(maskbeam.load_sam(), numpy.zeros((48, 64, 3), 'uint8'))"
    )
    script = f"{script}\nassert masks.num_candidates == 3 * 32 * 32"
    assert "keras" in (found := loaded(script)) and "apache_beam" not in found


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    photos = write_photos(tmp_path / "photos", 3)
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert label("--input", photos, "--output", tmp_path / "labels") == 0
    return tmp_path / "labels"


def test_reading_local_labels_and_their_photos_needs_neither_beam_nor_keras(labels: Path) -> None:
    for images in (None, str(labels.parent / "photos"), str(labels.parent / "photos" / "[0-2].png")):
        script = (
            "import maskbeam\n"
            f"for image in maskbeam.open_labels({str(labels)!r}, {images!r}):\n"
            "    masks = [maskbeam.decode_mask(mask) for mask in image.masks]\n"
            "    image.size_hw and image.pixels()\n"
        )
        assert loaded(script) == {"numpy", "pyarrow"}


def test_open_labels_gives_every_image_with_its_masks_and_pixels(labels: Path) -> None:
    rows = read_labels(labels)
    images = list(maskbeam.open_labels(str(labels)))
    assert [image.image_id for image in images] == ["0.png", "1.png", "2.png", "broken.png"]
    for image in images[:3]:
        photo = np.asarray(Image.open(labels.parent / "photos" / image.image_id).convert("RGB"))
        assert np.array_equal(image.pixels(), photo) and image.size_hw == (48, 64) and image.error is None
        expected = [row for row in rows.annotations if row["image_id"] == image.image_id]
        assert [mask.counts for mask in image.masks] == [row["segmentation"]["counts"] for row in expected]
        assert [int(maskbeam.decode_mask(mask).sum()) for mask in image.masks] == [row["area"] for row in expected]
    broken = images[3]
    assert (broken.status, broken.size_hw, broken.masks) == ("failed", None, ()) and broken.error
    with pytest.raises(PhotoMissing, match=r"^broken\.png failed when it was labeled: "):
        broken.pixels()
    assert sum(len(image.masks) for image in images) == len(rows.annotations) > 0


def test_photos_that_moved_are_found_where_images_says(labels: Path) -> None:
    moved = labels.parent / "moved"
    (labels.parent / "photos").rename(moved)
    (image, *_) = maskbeam.open_labels(str(labels))
    with pytest.raises(PhotoMissing, match="not found"):
        image.pixels()
    (image, *_) = maskbeam.open_labels(str(labels), images=str(moved))
    assert image.pixels()[0, 0].tolist() == [0, 0, 0]


def test_labels_that_are_not_there_are_refused_when_they_are_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no labels: there is no run\.json"):
        maskbeam.open_labels(str(tmp_path))


def test_every_public_name_exists_and_an_unknown_one_is_an_attribute_error() -> None:
    assert {name for name in maskbeam.__all__ if getattr(maskbeam, name) is not None} == set(maskbeam.__all__)
    assert set(maskbeam.__all__) <= set(dir(maskbeam)) and set(maskbeam._MODULES) == set(maskbeam.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'label_images'"):
        _ = maskbeam.label_images


def test_a_script_beside_its_own_transforms_and_pipeline_works(tmp_path: Path) -> None:
    for name in ("transforms", "pipeline"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('this is not the one')")
    (tmp_path / "script.py").write_text("import maskbeam.pipeline.cli\nprint(maskbeam.AmgConfig().points_per_side)")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.stdout == b"32\n", done.stderr


@pytest.mark.parametrize("module", ["maskbeam", "pipeline"])
def test_the_program_runs_as_a_module_in_a_checkout(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: maskbeam COMMAND"), done.stderr


def test_the_package_says_that_it_has_types() -> None:
    assert (ROOT / "maskbeam/py.typed").exists()
