"""Dataflow: what a job needs there and nobody should have to know, and the mistakes that can be found before it starts.

Flags that are given win; what is missing is filled in. The accelerator goes to the whole pool of workers
(worker_accelerator), never to one step as a resource hint: a hint would cut the pipeline, and the image bytes would go
through a shuffle. Each worker runs one process of the SDK, since each process loads the model.

Machine and accelerator names: https://cloud.google.com/compute/docs/gpus and
https://cloud.google.com/dataflow/docs/gpu/gpu-support.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
    WorkerOptions,
)

from maskbeam.transforms.files.systems import is_local

# --gpu: accelerator type, and the machine that gets it unless --machine_type says otherwise. Eight vCPUs or so a GPU:
# decoding, measuring and encoding masks is work for the host.
_GPUS = {
    "t4": ("nvidia-tesla-t4", "n1-standard-8"),
    "l4": ("nvidia-l4", "g2-standard-8"),
    "a100": ("nvidia-tesla-a100", "a2-highgpu-1g"),
    "a100_80gb": ("nvidia-a100-80gb", "a2-ultragpu-1g"),
}
_NO_GPU = "none"
_DEFAULT_GPU = "l4"
_CPU_MACHINE = "n2-standard-8"

# Beginnings of the machine types that can hold an accelerator.
_HOLDERS = {
    "nvidia-l4": ("g2-",),
    "nvidia-tesla-a100": ("a2-highgpu-", "a2-megagpu-"),
    "nvidia-a100-80gb": ("a2-ultragpu-",),
    "nvidia-h100-80gb": ("a3-highgpu-", "a3-edgegpu-"),
    "nvidia-h100-mega-80gb": ("a3-megagpu-",),
    "nvidia-tesla-t4": ("n1-", "custom-"),
    "nvidia-tesla-p4": ("n1-", "custom-"),
    "nvidia-tesla-p100": ("n1-", "custom-"),
    "nvidia-tesla-v100": ("n1-", "custom-"),
}
# GPUs are attached to N1 machines; one GPU allows at most so many vCPUs.
_MAX_VCPUS = {"nvidia-tesla-t4": 48, "nvidia-tesla-p4": 24, "nvidia-tesla-p100": 16, "nvidia-tesla-v100": 12}
# The other machines come with their GPUs: vCPUs of a G2 -> L4s. A2 and A3 have the number in their names.
_L4S_OF_G2 = {4: 1, 8: 1, 12: 1, 16: 1, 24: 2, 32: 1, 48: 4, 96: 8}

# The image has CUDA in it; Dataflow's 25 GB for batch jobs with its own shuffle would not hold it.
_DISK_SIZE_GB = 100
# One thread labels, the other one reads the next chunk or commits the last. The device is fed by one at a time.
_HARNESS_THREADS = 2

# Where the worker image has models baked in (deploy/Dockerfile).
IMAGE_MODELS = "/models/"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataflowConfig:
    """The workers of a Dataflow job.

    Attributes:
      gpu: the GPU of each Dataflow worker, with a machine that can hold it: t4, l4, a100, a100_80gb or none. Default:
        the one that --machine_type takes, or l4. Beam's --machine_type and --dataflow_service_options
        worker_accelerator=... win over it.
    """

    gpu: str | None = None

    def __post_init__(self) -> None:
        if self.gpu is not None and self.gpu not in (*_GPUS, _NO_GPU):
            raise ValueError(
                f"gpu must be one of {', '.join(_GPUS)} or {_NO_GPU}, got {self.gpu}. Others are asked for with Beam's "
                "--machine_type and --dataflow_service_options 'worker_accelerator=type:...;count:1;"
                "install-nvidia-driver'."
            )


def runner_name(options: PipelineOptions) -> str:
    """The runner without what Beam lets one leave out or add: "dataflow" for DataflowRunner, with its module or not."""
    runner = options.view_as(StandardOptions).runner or ""
    return runner.rpartition(".")[2].lower().removesuffix("runner")


def is_dataflow(options: PipelineOptions) -> bool:
    """Whether the job goes to Dataflow."""
    return runner_name(options) == "dataflow"


def makes_template(options: PipelineOptions) -> bool:
    """Whether the job is only written down, as the launcher of a flex template does; Dataflow starts it later."""
    return is_dataflow(options) and options.view_as(GoogleCloudOptions).template_location is not None


def prepare_dataflow(options: PipelineOptions, config: DataflowConfig, paths: Iterable[str]) -> None:
    """Checks the flags of a Dataflow job and fills in the missing ones.

    Args:
      options: changed in place.
      paths: input patterns and the output.

    Raises:
      ValueError: the job could not run as asked.
    """
    _check_installed()
    cloud = options.view_as(GoogleCloudOptions)
    _check_cloud(cloud)
    for path in paths:
        if is_local(path):
            raise ValueError(
                f"{path} is a local path, which Dataflow's workers cannot reach. Give a URI such as gs://BUCKET/..., "
                f"after: gcloud storage cp -r {path} gs://BUCKET/"
            )
    _choose_machine(options, config.gpu)
    worker, debug = options.view_as(WorkerOptions), options.view_as(DebugOptions)
    worker.disk_size_gb = worker.disk_size_gb or _DISK_SIZE_GB
    if not worker.worker_harness_container_image:  # the flag's older name
        worker.sdk_container_image = worker.sdk_container_image or default_image(cloud.project, cloud.region)
    debug.number_of_worker_harness_threads = debug.number_of_worker_harness_threads or _HARNESS_THREADS
    debug.add_experiment("use_runner_v2")
    # NVIDIA's MPS is for several processes on one GPU: who asks for it wants them.
    if not (debug.lookup_experiment("use_multiple_sdk_containers") or "use_nvidia_mps" in str(_accelerator(options))):
        debug.add_experiment("no_use_multiple_sdk_containers")
    # What the workers run is imported from the image. Beam's default here would be to pickle __main__, too.
    options.view_as(SetupOptions).save_main_session = False


def default_image(project: str, region: str) -> str:
    """Where deploy/README.md puts the worker image of this version of maskbeam and of Python.

    >>> default_image("my-project", "us-central1").rpartition(":")[0]
    'us-central1-docker.pkg.dev/my-project/maskbeam/worker'
    """
    try:
        version = importlib.metadata.version("maskbeam")
    except importlib.metadata.PackageNotFoundError:  # run from the sources
        version = "dev"
    repository = f"{region}-docker.pkg.dev/{project.replace(':', '/')}/maskbeam"
    return f"{repository}/worker:{version}-py{sys.version_info.major}.{sys.version_info.minor}"


def is_installed(module: str) -> bool:
    """Whether a module is there that comes with one of Beam's extras."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False


def install_command(extra: str) -> str:
    """What installs one of Beam's extras, for this Beam."""
    return f"pip install 'apache-beam[{extra}]=={beam.__version__}'"


def _check_installed() -> None:
    if not is_installed("google.cloud.dataflow"):
        raise ValueError(f"Dataflow needs Beam's gcp extra: {install_command('gcp')}")


def _check_cloud(cloud: GoogleCloudOptions) -> None:
    examples = {"project": "MY-PROJECT", "region": "us-central1", "temp_location": "gs://MY-BUCKET/tmp"}
    missing = [f"--{name} {example}" for name, example in examples.items() if not getattr(cloud, name)]
    if missing:
        raise ValueError(f"Dataflow also needs {' '.join(missing)}")
    for name in ("temp_location", "staging_location"):
        location = getattr(cloud, name)
        if location and not location.startswith("gs://"):
            raise ValueError(f"--{name} is {location}, but Dataflow needs a gs:// URI there.")


def _choose_machine(options: PipelineOptions, gpu: str | None) -> None:
    """Machine type and accelerator, from what is given of both and of --gpu."""
    worker, cloud = options.view_as(WorkerOptions), options.view_as(GoogleCloudOptions)
    machine_type, accelerator = worker.machine_type, _accelerator(options)
    if gpu == _NO_GPU and accelerator is None:
        worker.machine_type = machine_type or _CPU_MACHINE
        if _type_held_by(worker.machine_type):
            raise ValueError(
                f"--gpu is none, but a {worker.machine_type} comes with GPUs. Choose another machine type."
            )
        return
    if accelerator is None:
        kind = _GPUS[gpu][0] if gpu else _default_type(machine_type)
        count = _count_held_by(machine_type or "") or 1
        accelerator = f"type:{kind};count:{count};install-nvidia-driver"
        cloud.dataflow_service_options = [
            *(cloud.dataflow_service_options or []),
            f"worker_accelerator={accelerator}",
        ]
    kind, count = _parse_accelerator(accelerator)
    if machine_type is None:
        machine_type = next((machine for known, machine in _GPUS.values() if known == kind), None)
        if machine_type is None:
            raise ValueError(f"--machine_type is missing: say which machine holds {count} {kind}.")
        worker.machine_type = machine_type
    _check_machine(machine_type, kind, count)


def _accelerator(options: PipelineOptions) -> str | None:
    """What worker_accelerator is set to, as a service option or, its older form, as an experiment."""
    given = [
        *(options.view_as(GoogleCloudOptions).dataflow_service_options or []),
        *(options.view_as(DebugOptions).experiments or []),
    ]
    return next(
        (value for name, _, value in (one.partition("=") for one in given) if name == "worker_accelerator"), None
    )


def _parse_accelerator(accelerator: str) -> tuple[str, int]:
    """Type and count of "type:nvidia-l4;count:1;install-nvidia-driver"."""
    parts = dict(part.partition(":")[::2] for part in accelerator.split(";"))
    if not parts.get("type") or not parts.get("count", "").isdecimal() or parts["count"] == "0":
        raise ValueError(
            f"worker_accelerator={accelerator} is not understood; expected type:TYPE;count:COUNT;install-nvidia-driver "
            "with a type such as nvidia-l4. The shell needs quotes around it."
        )
    if "install-nvidia-driver" not in parts:
        raise ValueError(
            f"worker_accelerator={accelerator} asks for no driver, so the workers would not see their GPUs. Add "
            ";install-nvidia-driver"
        )
    return parts["type"], int(parts["count"])


def _type_held_by(machine_type: str) -> str | None:
    """The accelerator that a machine type comes with."""
    return next(
        (
            kind
            for kind, beginnings in _HOLDERS.items()
            if kind not in _MAX_VCPUS and machine_type.startswith(beginnings)
        ),
        None,
    )


def _count_held_by(machine_type: str) -> int | None:
    """How many GPUs a machine type comes with, None if the name does not tell."""
    if found := re.fullmatch(r"g2-standard-(\d+)", machine_type):
        return _L4S_OF_G2.get(int(found[1]))
    if found := re.fullmatch(r"a[23]-\w+-(\d+)g(-nolssd)?", machine_type):
        return int(found[1])
    return None


def _default_type(machine_type: str | None) -> str:
    """The accelerator for a machine type where no GPU was asked for."""
    if machine_type is None:
        return _GPUS[_DEFAULT_GPU][0]
    if kind := _type_held_by(machine_type):
        return kind
    if machine_type.startswith(_HOLDERS["nvidia-tesla-t4"]):
        return "nvidia-tesla-t4"
    raise ValueError(
        f"a {machine_type} cannot hold a GPU. Leave --machine_type out to get one that can, or say --gpu none to run "
        "on CPUs."
    )


def _check_machine(machine_type: str, kind: str, count: int) -> None:
    beginnings = _HOLDERS.get(kind)
    if beginnings is None:  # newer than this table: Dataflow will know
        return
    if not machine_type.startswith(beginnings):
        expected = " or ".join(f"{beginning}..." for beginning in beginnings)
        raise ValueError(f"a {machine_type} cannot hold a {kind}: that needs a machine type {expected}")
    held = _count_held_by(machine_type)
    if held is not None and held != count:
        raise ValueError(f"a {machine_type} comes with {held} {kind}, so worker_accelerator must say count:{held}.")
    vcpus = re.search(r"-(\d+)(-\d+)?(-ext)?$", machine_type)
    if count == 1 and kind in _MAX_VCPUS and vcpus and int(vcpus[1]) > _MAX_VCPUS[kind]:
        raise ValueError(
            f"a {machine_type} cannot hold one {kind}: that allows at most {_MAX_VCPUS[kind]} vCPUs. Choose a smaller "
            "machine type."
        )
    if count > 1:
        _log.warning("each worker has %d GPUs, but a process of the SDK uses one; the others are paid for idle", count)
