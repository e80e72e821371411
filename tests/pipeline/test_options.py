"""Flags <-> dataclasses: every field has its flag, every flag its field; what is wrong is told by name."""

from __future__ import annotations

import importlib.util
import json
import re
import typing
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest
from apache_beam.options.pipeline_options import DirectOptions, GoogleCloudOptions, PipelineOptions, StandardOptions

from maskbeam.pipeline.exits import UsageError
from maskbeam.pipeline.graph import Job
from maskbeam.pipeline.launch.dataflow import DataflowConfig
from maskbeam.pipeline.options import label_parser, parse_label, runs_locally
from maskbeam.pipeline.progress import ProgressConfig
from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.labels.layout import OutputConfig
from maskbeam.transforms.load_model import ModelConfig
from maskbeam.transforms.masks.amg import PROFILES, AmgConfig
from maskbeam.transforms.match_shards import InputConfig
from maskbeam.transforms.readers.samples import ReadConfig

REQUIRED = ["--input", "in", "--output", "out"]
CONFIGS: dict[str, Any] = typing.get_type_hints(Job)
FIELDS = [(name, field) for name, config in CONFIGS.items() for field in fields(config)]

_PROMPTS = ["--prompts", "a.csv"]  # without them the flags of prompts are an error

# For every field a value that is not its default, as it is typed and as it should arrive.
VALUES: dict[str, tuple[list[str], Any]] = {
    "input": (["a", "b c"], ("a", "b c")),
    "input_format": (["tar"], "tar"),
    "chunk_size": (["7"], 7),
    "limit": (["5"], 5),
    "tfrecord_image": (["img"], ("img",)),
    "tfrecord_key": (["a", "b"], ("a", "b")),
    "tfrecord_file_name": (["a"], ("a",)),
    "parquet_image": (["img"], ("img",)),
    "parquet_key": (["a", "b"], ("a", "b")),
    "parquet_file_name": (["a"], ("a",)),
    "prompts": (["a.csv", "b.csv"], ("a.csv", "b.csv")),
    "prompts_format": (["coco", *_PROMPTS], "coco"),
    "prompts_bbox": (["xywh", *_PROMPTS], "xywh"),
    "prompts_key": (["stem", *_PROMPTS], "stem"),
    "categories": (["names.txt", *_PROMPTS], "names.txt"),
    "min_prompt_score": (["0.5", *_PROMPTS], 0.5),
    "mask": (["all", *_PROMPTS], "all"),
    "refine_steps": (["2", *_PROMPTS], 2),
    "box_margin": (["0.25", *_PROMPTS], 0.25),
    "scale_prompts": (_PROMPTS, True),
    "exif": (["ignore"], "ignore"),
    "max_pixels": (["1000"], 1000),
    "model": (["sam_base_sa1b"], "sam_base_sa1b"),
    "dtype": (["bfloat16"], "bfloat16"),
    "points_per_side": (["8"], 8),
    "points_per_batch": (["16"], 16),
    "pred_iou_thresh": (["0.5"], 0.5),
    "stability_score_thresh": (["1"], 1.0),
    "stability_score_offset": (["0.5"], 0.5),
    "box_nms_thresh": (["0.5"], 0.5),
    "crop_n_layers": (["1"], 1),
    "crop_nms_thresh": (["0.5"], 0.5),
    "crop_overlap_ratio": (["0.25"], 0.25),
    "crop_n_points_downscale_factor": (["2"], 2),
    "point_grids": (["{grids}"], (((0.5, 0.25), (1.0, 0.0)),)),
    "min_mask_region_area": (["3"], 3),
    "mask_threshold": (["-1.5"], -1.5),
    "keep_candidates": ([], True),
    "candidate_pred_iou_thresh": (["0.5", "--keep_candidates"], 0.5),
    "candidate_stability_score_thresh": (["0.5", "--keep_candidates"], 0.5),
    "nms_by": (["mask"], "mask"),
    "min_mask_area": (["3"], 3),
    "max_mask_area": (["300"], 300),
    "min_mask_area_fraction": (["0.1"], 0.1),
    "max_mask_area_fraction": (["0.9"], 0.9),
    "max_masks": (["2"], 2),
    "output": (["elsewhere"], "elsewhere"),
    "overwrite": ([], True),
    "retry_failed": ([], True),
    "accept_changed": ([], True),
    "max_failed_fraction": (["0.25"], 0.25),
    "gpu": (["t4"], "t4"),
    "quiet": ([], True),
}


def parse(*flags: str) -> Job:
    return parse_label([*REQUIRED, *flags])[0]


def beam_options(*flags: str) -> PipelineOptions:
    return parse_label([*REQUIRED, *flags])[1]


def test_without_flags_all_is_as_the_dataclasses_say() -> None:
    assert parse() == Job(
        ModelConfig(),
        InputConfig(("in",)),
        OutputConfig("out"),
        ProgressConfig(),
        AmgConfig(),
        ImageConfig(),
        DataflowConfig(),
        ReadConfig(),
    )


@pytest.mark.parametrize(("config", "field"), FIELDS, ids=[field.name for _, field in FIELDS])
def test_every_field_has_a_flag_of_its_type(tmp_path: Path, config: str, field: Field[Any]) -> None:
    grids = tmp_path / "grids.json"
    grids.write_text(json.dumps([[[0.5, 0.25], [1, 0]]]))
    typed, expected = VALUES[field.name]
    value = getattr(
        getattr(parse(f"--{field.name}", *(text.format(grids=grids) for text in typed)), config), field.name
    )
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("field", [field for _, field in FIELDS], ids=[field.name for _, field in FIELDS])
def test_every_flag_tells_what_it_does_and_its_default(field: Field[Any]) -> None:
    (action,) = (action for action in label_parser()._actions if action.option_strings == [f"--{field.name}"])
    told, _, default = (action.help or "").partition(" (default: ")
    assert len(told) > 10
    assert action.required == (field.default is MISSING)
    if any(field.default is nothing for nothing in (MISSING, None, False)):
        assert not default
    else:
        values = field.default if isinstance(field.default, tuple) else [field.default]
        assert default == " ".join(map(str, values)) + ")"


def help_of_label(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_label(["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_prints_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    printed = help_of_label(capsys)
    assert [field.name for _, field in FIELDS if f"--{field.name} " not in printed] == []


def test_help_begins_with_what_must_be_given_and_the_model_and_ends_with_names_of_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = help_of_label(capsys)
    assert printed.startswith("usage: maskbeam label --input INPUT --output OUTPUT [flags]\n")
    flags = re.findall(r"^  --(\w+)", printed, re.MULTILINE)
    assert flags[:4] == ["input", "output", "model", "dtype"]
    assert {"parquet_key", "tfrecord_image"} <= set(flags[-6:])
    assert "--model" in "".join(printed.splitlines(keepends=True)[:16])
    assert sorted(flags) == sorted([*(field.name for _, field in FIELDS), "profile"])  # each once


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], AmgConfig()),
        (["--profile", "default"], AmgConfig()),
        (["--profile", "sa1b"], AmgConfig(**PROFILES["sa1b"])),
        (["--profile", "sa1b", "--crop_n_layers", "1"], AmgConfig(**{**PROFILES["sa1b"], "crop_n_layers": 1})),
        (["--min_mask_area", "0", "--profile", "sa1b"], AmgConfig(**{**PROFILES["sa1b"], "min_mask_area": 0})),
    ],
)
def test_a_profile_is_where_flags_start_from(flags: list[str], expected: AmgConfig) -> None:
    assert parse(*flags).amg == expected


# What goes to Beam.


@pytest.mark.parametrize("flags", [[], ["--runner", "DirectRunner"], ["--runner=FnApiRunner"]])
def test_the_local_runner_is_the_one_in_the_package(flags: list[str]) -> None:
    options = beam_options(*flags)
    assert runs_locally(options)
    assert options.view_as(StandardOptions).runner.endswith("fn_api_runner.FnApiRunner")


def test_other_runners_are_left_as_they_are() -> None:
    options = beam_options("--runner", "DataflowRunner", "--project=p", "--dataflow_service_options=a=b")
    assert not runs_locally(options)
    assert options.view_as(StandardOptions).runner == "DataflowRunner"
    assert options.view_as(GoogleCloudOptions).project == "p"
    assert options.view_as(GoogleCloudOptions).dataflow_service_options == ["a=b"]


def test_beam_flags_pass() -> None:
    options = beam_options("--direct_num_workers", "3", "--direct_running_mode=multi_threading")
    assert options.view_as(DirectOptions).direct_num_workers == 3
    assert options.view_as(DirectOptions).direct_running_mode == "multi_threading"


def test_after_two_dashes_anything_passes() -> None:
    job, options = parse_label([*REQUIRED, "--limit", "3", "--", "--only_the_server_knows=1", "--direct_num_workers=2"])
    assert job.input.limit == 3
    assert options.view_as(DirectOptions).direct_num_workers == 2
    assert "--only_the_server_knows=1" in options._flags


# What is wrong.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # A flag nobody knows, and the one that was meant.
        (["--points_per_sde", "8"], "unknown argument --points_per_sde: did you mean --points_per_side?"),
        (["--direct_num_worker=2"], "unknown argument --direct_num_worker=2: did you mean --direct_num_workers?"),
        (["--qqqqqqqqqq"], "unknown argument --qqqqqqqqqq: maskbeam label --help lists all flags"),
        (["--points-per-side=8"], "unknown argument --points-per-side=8: did you mean --points_per_side?"),
        (["--quite"], "unknown argument --quite: did you mean --quiet?"),
        (["--verbose"], "unknown argument --verbose: maskbeam label --help lists all flags"),
        (["--overwritten"], "unknown argument --overwritten: maskbeam label --help lists all flags"),
        (["--over"], "unknown argument --over: maskbeam label --help lists all flags"),
        (["--fast"], "unknown argument --fast: maskbeam label --help lists all flags"),
        # No abbreviations: Beam's flags could be mistaken for ours.
        (["--chunk", "8"], "unknown argument --chunk: did you mean --chunk_size?"),
        (["more.tar"], "unknown argument more.tar"),
        # A value of the wrong type.
        (["--chunk_size", "many"], "--chunk_size: invalid int value: 'many'"),
        (["--pred_iou_thresh", "high"], "--pred_iou_thresh: invalid float value: 'high'"),
        (["--direct_num_workers", "many"], "--direct_num_workers: invalid int value: 'many'"),
        (["--profile", "fast"], "--profile: invalid choice: 'fast'"),
        (["--limit"], "--limit: expected one argument"),
        (["--output", "gs://bucket/[a]"], "output is gs://bucket/[a]"),
        (["--output", ""], "--output is empty"),
        (["--parquet_key", "id", ""], "--parquet_key is empty"),
        # A value out of range.
        (["--chunk_size", "0"], "chunk_size is 0"),
        (["--limit", "0"], "limit is 0"),
        (["--input_format", "zip"], "input_format is 'zip'"),
        (["--parquet_image", ""], "parquet_image is"),
        (["--exif", "maybe"], "exif is 'maybe'"),
        (["--max_pixels", "0"], "max_pixels is 0"),
        (["--dtype", "int8"], "dtype must be"),
        (["--points_per_side", "0"], "points_per_side must be"),
        (["--points_per_batch", "0"], "points_per_batch must be"),
        (["--box_nms_thresh", "1.5"], "box_nms_thresh must be"),
        (["--crop_overlap_ratio", "nan"], "crop_overlap_ratio must be"),
        (["--crop_n_layers", "-1"], "crop_n_layers must be"),
        (["--nms_by", "luck"], "nms_by must be"),
        (["--max_masks", "0"], "max_masks must be"),
        (["--max_failed_fraction", "2"], "max_failed_fraction must be"),
        (["--crop_n_layers", "6", "--crop_n_points_downscale_factor", "2"], "crop layer 6 has no points"),
    ],
)
def test_a_mistake_is_a_usage_error_that_names_it(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(*flags)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "must be a JSON file"),
        ("[[[0.5", [], "must be a JSON file"),
        ("[0.5, 0.5]", [], "must be a JSON file"),
        ("[[[0.5, 0.5, 0.5]]]", [], "must be a JSON file"),
        ("[[[0.5, 1.5]]]", [], "point_grids[0] must hold"),
        ("[[]]", [], "point_grids[0] must hold"),
        ("[[[0.5, 0.5]]]", ["--crop_n_layers", "1"], "one grid a layer: 2"),
        ("[[[0.5, 0.5]]]", ["--points_per_side", "8"], "exactly one of points_per_side and point_grids"),
    ],
)
def test_point_grids_are_checked(tmp_path: Path, content: str | None, flags: list[str], message: str) -> None:
    path = tmp_path / "grids.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError) as raised:
        parse("--point_grids", str(path), *flags)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "missing", "message"),
    [
        (
            ["--input", "s3://bucket/a", "--output", "x"],
            "boto3",
            r"^--input is s3://bucket/a, .*'apache-beam\[aws\]==",
        ),
        (
            ["--input", "x", "--output", "gs://bucket/b"],
            "google.cloud.storage",
            r"^--output .*'apache-beam\[gcp\]==",
        ),
        (["--input", "x", "--output", "gs://bucket/b"], "google.cloud", r"^--output .*'apache-beam\[gcp\]=="),
    ],
)
def test_a_store_whose_client_is_not_installed_is_a_usage_error(
    flags: list[str], missing: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec

    def find_all_but_one(name: str) -> Any:
        if name.startswith(f"{missing}."):
            raise ModuleNotFoundError(name)
        return None if name == missing else find_spec(name)

    monkeypatch.setattr("importlib.util.find_spec", find_all_but_one)
    with pytest.raises(UsageError, match=message):
        parse_label(flags)
