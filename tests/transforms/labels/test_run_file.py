"""run.json: what is written is read again, what earlier versions wrote too, and what differs is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from maskbeam.pipeline import cli
from maskbeam.transforms.labels.run_file import FORMAT, Run, read_run, write_run
from maskbeam.transforms.labels.schema import RUN_KEY
from tests.conftest import label, write_photos

LABELED = Run(
    root="/photos",
    model="sam_tiny",
    model_fingerprint="f",
    amg={"points_per_side": 4, "point_grids": None},
    names={"tfrecord_image": ("image/encoded",)},
    chunk_size=32,
    exif="apply",
    max_pixels=1000,
    backend="jax",
    id="1",
)
DOG = {"id": 18, "name": "dog"}


@pytest.mark.parametrize(
    "run",
    [
        LABELED,
        replace(LABELED, clearing=True, manifest="m", limit=3),
        replace(LABELED, refined_from={"labels": "/a", "label_settings": {}}),
        Run(root="/", imported="/a.json", imported_sha256="s", coco={"categories": [DOG], "info": 3}),
        replace(LABELED, prompts={"digest": "d"}, class_records=[DOG], other={"later": [1]}),
    ],
    ids=["labeled", "clearing", "refined", "imported", "prompted"],
)
def test_a_run_survives_the_way_through_its_file(run: Run, tmp_path: Path) -> None:
    write_run(str(tmp_path), run)
    read = read_run(str(tmp_path))
    assert read == replace(run, names=read.names) and not read.changes(run)
    assert read.read_config == run.read_config


def test_a_file_without_a_format_is_of_the_first() -> None:
    before = {"root": None, "model_fingerprint": None, "amg": {}, "names": {"tfrecord_image": ["a"]}}
    run = Run.from_json(before)
    assert (run.format, run.root, run.id, run.manifest) == (1, "", None, None)
    assert run.read_config.tfrecord_image == ("a",)
    assert run.to_json()["format"] == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"chunk_size": 8}, ["chunk_size was 32, now 8"]),
        ({"limit": 2, "backend": "tensorflow"}, ["backend was jax, now tensorflow", "limit was None, now 2"]),
        ({"amg": {"points_per_side": 8, "point_grids": None}}, ["points_per_side was 4, now 8"]),
        ({"names": {"tfrecord_image": ["image/encoded"]}}, []),
        ({"prompts": {"digest": "d"}}, ["digest was None, now d"]),
        ({"root": "/b", "id": "2", "format": 1, "model": "x", "versions": {"a": "1"}, "manifest": "m"}, []),
    ],
)
def test_what_makes_another_run_is_named(change: dict[str, Any], told: list[str]) -> None:
    assert LABELED.changes(replace(LABELED, **change)) == told


@pytest.mark.parametrize(
    ("run", "ids"),
    [
        (LABELED, {1}),
        (Run(coco={"categories": [DOG]}), {18}),
        (replace(LABELED, class_records=[DOG, {"id": 2}]), {18, 2}),
    ],
)
def test_classes_are_those_of_the_prompts_or_of_the_imported_file_or_object(run: Run, ids: set[int]) -> None:
    assert run.category_ids == ids


def test_run_json_and_every_footer_say_their_format(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 2)
    labeled, refined, imported = (str(tmp_path / name) for name in ("labeled", "refined", "imported"))
    coco = str(tmp_path / "coco.json")
    assert label("--input", photos, "--output", labeled, "--keep_candidates") == 0
    for command in (
        ["refine", "--labels", labeled, "--output", refined],
        ["export", "--labels", labeled, "--format", "coco", "--output", coco],
        ["import", "--annotations", coco, "--output", imported],
    ):
        assert cli.main(command) == 0
    for directory, tables in ((labeled, 3), (refined, 2), (imported, 2)):
        assert json.loads((Path(directory) / "run.json").read_text())["format"] == FORMAT
        files = list(Path(directory).glob("*/*.parquet"))
        assert len(files) == tables
        for file in files:
            footer = json.loads(pq.read_schema(file).metadata[RUN_KEY])
            assert (footer["format"], "coco" in footer) == (FORMAT, False)
