"""Runs the job on a runner whose workers are other machines or processes, and waits for its end."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace

import apache_beam as beam
from apache_beam.metrics import MetricsFilter
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, PortableOptions, StandardOptions
from apache_beam.runners.runner import PipelineResult, PipelineState

from maskbeam.pipeline.exits import UsageError
from maskbeam.pipeline.graph import Job, build
from maskbeam.pipeline.interruption import when_interrupted
from maskbeam.pipeline.launch.dataflow import IMAGE_MODELS, is_dataflow, makes_template, prepare_dataflow, runner_name
from maskbeam.transforms.files.beam_files import FileSystems
from maskbeam.transforms.files.paths import absolute
from maskbeam.transforms.files.systems import is_local, scheme_of
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.load_model import LoadSam
from maskbeam.transforms.presets.embedded import HUB_SCHEMES, check_model_name, embedded_presets
from maskbeam.transforms.write_parquet import METRICS_NAMESPACE


class JobFailed(RuntimeError):
    """The job did not end well; the runner has told the details while it ran."""


def prepare(job: Job, options: PipelineOptions) -> Job:
    """Checks that workers elsewhere can do the job, and makes it independent of this process's working directory.

    Args:
      options: changed in place, where the runner needs more than was given.

    Returns:
      the job with absolute paths.

    Raises:
      ValueError: the workers could not reach what they need.
    """
    paths = [*job.input.input, job.output.output]
    if is_dataflow(options):
        prepare_dataflow(options, job.dataflow, paths)
    elif job.dataflow.gpu is not None:
        raise ValueError("--gpu is for --runner DataflowRunner; workers of other runners have the GPUs they have.")
    elif _runs_in_containers(options) and (local := [path for path in paths if is_local(path)]):
        raise ValueError(
            f"{local[0]} is a local path, which workers in Docker containers cannot reach. Give a URI, or another "
            "--environment_type (PROCESS, EXTERNAL, LOOPBACK) whose workers share this file system."
        )
    return replace(
        job,
        input=replace(job.input, input=tuple(absolute(pattern) for pattern in job.input.input)),
        model=replace(job.model, model=_reachable_model(job.model.model, options)),
        output=replace(job.output, output=absolute(job.output.output)),
    )


def _runs_in_containers(options: PipelineOptions) -> bool:
    """Whether PortableRunner was left with its default, or told to use it."""
    environment = options.view_as(PortableOptions).environment_type
    return runner_name(options) == "portable" and environment in (None, "DOCKER")


def _reachable_model(model: str, options: PipelineOptions) -> str:
    """The model as workers can load it."""
    if model in embedded_presets():
        return model
    scheme = scheme_of(model)
    exists = scheme not in HUB_SCHEMES and FileSystems.exists(FileSystems.join(model, "config.json"))
    if exists and scheme is None and is_dataflow(options) and not absolute(model).startswith(IMAGE_MODELS):
        models = _models_directory(options)
        raise ValueError(
            f"the model {model} is a local directory, which Dataflow's workers cannot reach (in their image are only "
            f"those under {IMAGE_MODELS}). Put it into a bucket with\n"
            f"  gcloud storage cp -r {model} {models}\nand give --model {models}{_base_name(model)}"
        )
    if exists:
        return absolute(model)
    if scheme not in HUB_SCHEMES and "/" in model:
        hint = ""
        if model.startswith(IMAGE_MODELS):
            hint = " The launcher reads the model, too: one that only the image has is for the flex template."
        raise ValueError(f"there is no model at {model}: expected a KerasHub preset, with a config.json in it.{hint}")
    check_model_name(model)
    name = _base_name(model)
    to_bucket = is_dataflow(options)
    models = _models_directory(options) if to_bucket else ""
    copy = f" && gcloud storage cp -r {name} {models}" if to_bucket else ""
    raise ValueError(
        f"the model {model} is a name, which each worker would download for itself. Save it once with\n"
        f'  python -c "import keras_hub; keras_hub.models.SAMImageSegmenter.from_preset({model!r}, preprocessor=None)'
        f'.save_to_preset({name!r})"{copy}\nand give --model {models}{name}'
    )


def _base_name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


def _models_directory(options: PipelineOptions) -> str:
    """A place for models in the bucket that the job uses anyway."""
    bucket = (options.view_as(GoogleCloudOptions).temp_location or "").removeprefix("gs://").partition("/")[0]
    return f"gs://{bucket or 'BUCKET'}/models/"


def run_elsewhere(job: Job, options: PipelineOptions, run: Run, load: LoadSam) -> int | None:
    """Submits the job and waits until it is done.

    Returns:
      images labeled by it, None if the runner does not tell.

    Raises:
      UsageError: Beam finds fault with its flags.
      JobFailed: or was cancelled.
      Exception: whatever the runner raises while the job is submitted.
    """
    try:
        pipeline = beam.Pipeline(options=options)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    build(pipeline, job, run, load)
    result = pipeline.run()
    if makes_template(options):
        print(f"template written: {options.view_as(GoogleCloudOptions).template_location}")
        return None
    where, stop = _describe_job(result, options)
    print(f"submitted: {where}{stop}", file=sys.stderr, flush=True)
    try:
        with when_interrupted(sentence=_describe_parting(options, where, stop)):
            state = _wait(result, options)
    except Exception as error:  # each runner raises something else
        raise JobFailed(str(error).removesuffix("\nNone")) from error  # Dataflow, where it knows no reason
    if state != PipelineState.DONE:
        raise JobFailed(f"the job ended in state {state}: {where}")
    print(f"{state}: {where}", file=sys.stderr)
    return _count_images(result)


def _wait(result: PipelineResult, options: PipelineOptions) -> str:
    """Waits for the job's end; cancels it if this command ends before and the job cannot go on."""
    try:
        return result.wait_until_finish()
    except KeyboardInterrupt:
        if _needs_this_process(options):
            with contextlib.suppress(Exception):  # it may have ended just now
                result.cancel()
        raise


def _needs_this_process(options: PipelineOptions) -> bool:
    """Whether the job's workers, or the server that has the job, are part of this process or were started by it."""
    if is_dataflow(options):
        return False
    portable = options.view_as(PortableOptions)
    return portable.environment_type == "LOOPBACK" or not portable.job_endpoint


def _describe_parting(options: PipelineOptions, where: str, stop: str) -> str:
    """What becomes of the job if this command is interrupted."""
    if _needs_this_process(options):
        return f"The job ends with this command: {where}. Run the same command to go on."
    return f"The job goes on without this command: {where}{stop}"


def _describe_job(result: PipelineResult, options: PipelineOptions) -> tuple[str, str]:
    """Where to look at the job and, for Dataflow, how to stop it."""
    if not is_dataflow(options):
        endpoint = options.view_as(PortableOptions).job_endpoint
        return f"job {getattr(result, '_job_id', '')} at {endpoint or options.view_as(StandardOptions).runner}", ""
    cloud = options.view_as(GoogleCloudOptions)
    job = result.job_id()
    return (
        f"https://console.cloud.google.com/dataflow/jobs/{cloud.region}/{job}?project={cloud.project}",
        f", stop it with: gcloud dataflow jobs cancel {job} --region {cloud.region} --project {cloud.project}",
    )


def _count_images(result: PipelineResult) -> int | None:
    """The counter of images, over all workers."""
    try:
        found = result.metrics().query(MetricsFilter().with_namespace(METRICS_NAMESPACE).with_name("images"))
    except Exception:  # runners without metrics raise all sorts of things; the labels are there all the same
        return None
    return sum(counter.result for counter in found["counters"]) if found["counters"] else None
