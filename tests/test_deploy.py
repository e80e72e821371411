"""deploy/: the image has the launcher's versions, the template is one that Google accepts, the page's commands work."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from apache_beam import version as beam_version
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, WorkerOptions
from apache_beam.testing.load_tests import dataflow_cost_consts as prices
from google.cloud import dataflow
from google.protobuf import json_format
from packaging.requirements import Requirement

from deploy.launcher import to_command
from maskbeam.pipeline.graph import Job
from maskbeam.pipeline.launch import dataflow as job_defaults
from maskbeam.pipeline.launch.dataflow import default_image, is_dataflow, makes_template, prepare_dataflow
from maskbeam.pipeline.options import label_parser, parse_label

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PAGE = (DEPLOY / "README.md").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
METADATA = json.loads((DEPLOY / "metadata.json").read_text())
PYPROJECT = (ROOT / "pyproject.toml").read_text()
VERSION = re.findall(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)[0]
VARIABLES = {"PROJECT": "my-project", "REGION": "us-central1", "BUCKET": "my-bucket"}
VARIABLES["IMAGE"] = default_image(VARIABLES["PROJECT"], VARIABLES["REGION"])


def dependencies() -> list[Requirement]:
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)
    return [Requirement(found) for found in re.findall(r'^ *"([^"]+)"', listed, re.MULTILINE)]


def pins() -> dict[str, Requirement]:
    lines = (DEPLOY / "requirements.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in found}


def pinned(name: str) -> str:
    (specifier,) = pins()[name].specifier
    assert specifier.operator == "=="
    return specifier.version


def test_the_image_pins_what_the_package_needs_and_nothing_else() -> None:
    assert pins().keys() == {requirement.name for requirement in dependencies()}


@pytest.mark.parametrize("requirement", dependencies(), ids=[requirement.name for requirement in dependencies()])
def test_pins_are_versions_the_package_allows(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pinned(requirement.name))


def test_beam_keras_and_tensorflow_are_the_launchers() -> None:
    """Beam pickles on one side what it loads on the other; the model's numbers are those that the tests checked."""
    for name in ("apache-beam", "keras-hub", "tensorflow"):
        ours, theirs = (version.split(".")[:2] for version in (importlib.metadata.version(name), pinned(name)))
        assert ours == theirs
    assert pins()["apache-beam"].extras == {"gcp"}
    assert pins()["tensorflow"].extras == {"and-cuda"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_dockerfile_is_well_formed() -> None:
    known = {"ARG", "FROM", "COPY", "RUN", "ENV", "ENTRYPOINT"}
    assert {name for name, _ in instructions()} <= known
    stages = {arguments.split()[-1] for name, arguments in instructions() if name == "FROM" and " AS " in arguments}
    for name, arguments in instructions():
        words = arguments.split()
        if name == "COPY" and words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
        elif name == "COPY":
            assert all((ROOT / source).exists() for source in words[:-1])


def test_the_dockerfile_takes_beams_boot_of_the_pinned_version() -> None:
    arguments = dict(argument.split("=", 1) for name, argument in instructions() if name == "ARG" and "=" in argument)
    assert arguments["BEAM_VERSION"] == pinned("apache-beam") == beam_version.__version__
    froms = [argument for name, argument in instructions() if name == "FROM"]
    assert froms[0] == "apache/beam_python${PYTHON_VERSION}_sdk:${BEAM_VERSION} AS beam"
    assert froms[-1] == "python:${PYTHON_VERSION}-slim-bookworm"
    assert ("COPY", "--from=beam /opt/apache/beam /opt/apache/beam") in instructions()
    assert instructions()[-1] == ("ENTRYPOINT", '["/opt/apache/beam/boot"]')


def test_the_dockerfile_bakes_models_in_where_the_launcher_expects_them() -> None:
    (bake,) = (arguments for name, arguments in instructions() if name == "RUN" and "save_to_preset" in arguments)
    assert f"save_to_preset('{job_defaults.IMAGE_MODELS}' + " in bake


def test_cloud_build_builds_this_dockerfile() -> None:
    build = yaml.safe_load((DEPLOY / "cloudbuild.yaml").read_text())
    (step,) = build["steps"]
    declared = re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE)
    given = [argument.split("=")[1] for argument in step["args"] if argument.startswith("--build-arg=")]
    assert set(given) <= set(declared)
    assert (ROOT / "deploy/Dockerfile").exists() and "--file=deploy/Dockerfile" in step["args"]
    used = set(re.findall(r"\$\{(_\w+)\}", (DEPLOY / "cloudbuild.yaml").read_text()))
    assert used - {"_IMAGE"} == build["substitutions"].keys()


def test_the_template_is_what_google_documents() -> None:
    """The schema is that of the Dataflow API's own client; unknown names and wrong types are errors in it."""
    template = dataflow.TemplateMetadata()._pb
    json_format.ParseDict(METADATA, template)
    assert template.name and template.description and not template.streaming
    for parameter in template.parameters:
        assert parameter.name and parameter.label and parameter.help_text
        assert all(re.compile(regex) for regex in parameter.regexes)
    names = [parameter.name for parameter in template.parameters]
    assert len(set(names)) == len(names)


def test_a_misspelt_template_would_be_noticed() -> None:
    with pytest.raises(json_format.ParseError):
        json_format.ParseDict({**METADATA, "parametres": []}, dataflow.TemplateMetadata()._pb)


VALUES = {
    "input": "gs://b/photos/*.jpg",
    "output": "gs://b/labels",
    "model": "/models/sam_base_sa1b",
    "gpu": "t4",
    "profile": "sa1b",
    "points_per_side": "16",
    "dtype": "bfloat16",
    "limit": "200",
    "retry_failed": "true",
    "sdk_container_image": "europe-docker.pkg.dev/p/r/worker:1",
}

# What Dataflow's template launcher adds, and a flag that this Beam does not know.
LAUNCHER = [
    "--runner=DataflowRunner",
    "--project=my-project",
    "--region=us-central1",
    "--job_name=maskbeam-1",
    "--temp_location=gs://b/tmp",
    "--staging_location=gs://b/staging",
    "--template_location=gs://b/staging/template_launches/1/job_object",
    "--labels={\"goog-dataflow-provided-template-type\": \"flex\"}",
    "--max_num_workers=4",
    "--a_flag_of_next_year=1",
]  # fmt: skip


def launched(**values: str) -> tuple[Job, PipelineOptions]:
    """What the template's launcher makes of its parameters."""
    command, *flags = to_command([*(f"--{name}={value}" for name, value in values.items()), *LAUNCHER])
    assert command == "label"
    return parse_label(flags)


def test_every_parameter_of_the_template_arrives() -> None:
    assert VALUES.keys() == {parameter["name"] for parameter in METADATA["parameters"]}
    for parameter in METADATA["parameters"]:
        for regex in parameter.get("regexes", []):
            assert re.search(regex, VALUES[parameter["name"]])
    job, options = launched(**VALUES)
    assert job.input.input == ("gs://b/photos/*.jpg",) and job.input.limit == 200
    assert job.output.output == "gs://b/labels" and job.output.retry_failed
    assert (job.model.model, job.model.dtype) == ("/models/sam_base_sa1b", "bfloat16")
    assert job.amg.points_per_side == 16 and job.amg.crop_n_layers == 2  # of the profile
    assert job.dataflow.gpu == "t4"
    assert is_dataflow(options) and makes_template(options)
    assert options.view_as(WorkerOptions).sdk_container_image == VALUES["sdk_container_image"]
    assert options.view_as(WorkerOptions).max_num_workers == 4
    assert options.view_as(GoogleCloudOptions).job_name == "maskbeam-1"
    prepare_dataflow(options, job.dataflow, [*job.input.input, job.output.output])


def test_a_switch_that_is_off_is_left_out() -> None:
    job, _ = launched(**{**VALUES, "retry_failed": "false"})
    assert not job.output.retry_failed


def test_required_parameters_are_the_required_flags_and_the_model() -> None:
    """The command's default model is a toy: a template must be told."""
    required = {parameter["name"] for parameter in METADATA["parameters"] if not parameter.get("isOptional")}
    assert required == {
        *(action.dest for action in label_parser()._actions if action.required),
        "model",
    }


def commands(page: str) -> list[list[str]]:
    """The `maskbeam label` commands of a page, continued lines joined, variables filled in."""
    joined = re.sub(r" \\\n +", " ", page)
    found = re.findall(r"^\S*maskbeam label (.*)$", joined, re.MULTILINE)
    return [shlex.split(re.sub(r"\$(\w+)", lambda name: VARIABLES[name[1]], command)) for command in found]


@pytest.mark.parametrize("command", commands(PAGE), ids=lambda command: command[1])
def test_the_commands_of_the_page_are_understood(command: list[str]) -> None:
    job, options = parse_label(command)
    if is_dataflow(options):
        prepare_dataflow(options, job.dataflow, [*job.input.input, job.output.output])


def test_the_page_has_commands_for_all_runners() -> None:
    assert [command[1] for command in commands(PAGE)] == [
        "DataflowRunner",
        "PortableRunner",
        "FlinkRunner",
        "PortableRunner",
    ]


def test_the_page_names_the_image_that_jobs_look_for(monkeypatch: pytest.MonkeyPatch) -> None:
    (image,) = re.findall(r"IMAGE=(\S+)$", PAGE, re.MULTILINE)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: VERSION)
    monkeypatch.setattr(sys, "version_info", type("Version", (), {"major": 3, "minor": 11}))
    assert default_image("$PROJECT", "$REGION") == image


def options_of(gpu: str) -> dict[str, Any]:
    job, options = parse_label([*commands(PAGE)[0], "--gpu", gpu])
    prepare_dataflow(options, job.dataflow, [])
    return options.get_all_options()


GPU_PRICES = {
    "t4": prices.T4_PER_GPU_PER_HOUR,
    "l4": prices.L4_PER_GPU_PER_HOUR,
    "a100": prices.A100_40GB_PER_GPU_PER_HOUR,
    "a100_80gb": prices.A100_80GB_PER_GPU_PER_HOUR,
    "none": 0.0,
}


@pytest.mark.parametrize("gpu", GPU_PRICES)
def test_the_costs_of_the_page_follow_from_the_prices(gpu: str) -> None:
    found = re.search(rf"^\| `{gpu}` \| `(\S+)` \| (\d+), (\d+) \|.*\| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert found
    options = options_of(gpu)
    assert options["machine_type"] == found[1]
    cost = (
        int(found[2]) * prices.VCPU_PER_HR_BATCH
        + int(found[3]) * prices.MEM_PER_GB_HR_BATCH
        + options["disk_size_gb"] * prices.PD_PER_GB_HR
        + GPU_PRICES[gpu]
    )
    assert float(found[4]) == pytest.approx(cost, abs=0.005)


def test_the_example_of_the_page_is_right() -> None:
    found = re.search(r"gave 1 image/s, a million images would take (\d+) worker hours and cost (\d+) USD", PAGE)
    assert found
    assert int(found[1]) == round(1_000_000 / 3600)
    assert int(found[2]) == round(1_000_000 / 3600 * 1.24)


@pytest.mark.parametrize(("flag", "told"), re.findall(r"^\| `--(\w+)` \| (\d+) \|", PAGE, re.MULTILINE))
def test_the_page_tells_the_numbers_that_are_filled_in(flag: str, told: str) -> None:
    assert options_of("l4")[flag] == int(told)
