"""`maskbeam label --runner DataflowRunner` up to the network: what is submitted, and which mistakes are caught before.

The buckets are a dictionary, the service answers from here, and whatever else asks for the network fails at once.
"""

from __future__ import annotations

import base64
import bz2
import io
import logging
import os
import pickletools
import re
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from apache_beam import version as beam_version
from apache_beam.internal import pickler
from apache_beam.io.filesystem import FileMetadata, FileSystem
from apache_beam.io.filesystems import FileSystems
from apache_beam.io.gcp import gcsio
from apache_beam.portability import common_urns, python_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.dataflow.dataflow_runner import DataflowPipelineResult
from apache_beam.runners.dataflow.internal import apiclient
from apache_beam.runners.portability.fn_api_runner import translations
from google.cloud import dataflow
from google.protobuf import json_format, struct_pb2

from maskbeam.pipeline.cli import main
from maskbeam.pipeline.interruption import describe_interruption
from maskbeam.pipeline.launch.dataflow import default_image, prepare_dataflow
from maskbeam.pipeline.options import parse_label
from maskbeam.transforms import generate_masks as segment
from maskbeam.transforms.files.storage import write_json
from maskbeam.transforms.labels.layout import SUMMARY_FILE
from maskbeam.transforms.presets.embedded import resolve_preset
from maskbeam.transforms.records import Totals
from tests.conftest import photo_bytes

ROOT = Path(__file__).parents[3]
BUCKET = "gs://bucket"
WHERE = ["--runner", "DataflowRunner", "--project", "my-project", "--region", "us-central1"]
CLOUD = [*WHERE, "--temp_location", f"{BUCKET}/tmp"]
PATHS = ["--input", f"{BUCKET}/photos", "--output", f"{BUCKET}/labels"]
MODEL = ["--model", f"{BUCKET}/models/tiny"]
COMMAND = ["label", *CLOUD, *PATHS, *MODEL]


class MemoryBuckets(FileSystem):
    """An object store in a dictionary: uri -> content."""

    def __init__(self) -> None:
        super().__init__(None)
        self.objects: dict[str, bytes] = {}

    @classmethod
    def scheme(cls) -> str:
        return "memory-buckets"  # get_filesystem is patched: two file systems of one scheme are an error in Beam

    def join(self, basepath: str, *paths: str) -> str:
        return "/".join([basepath.rstrip("/"), *paths])

    def split(self, path: str) -> tuple[str, str]:
        head, _, tail = path.rpartition("/")
        return head, tail

    def has_dirs(self) -> bool:
        return False

    def mkdirs(self, path: str) -> None:
        pass

    def _list(self, dir_or_prefix: str) -> Iterator[FileMetadata]:
        for path, content in self.objects.items():
            if path.startswith(dir_or_prefix):
                yield FileMetadata(path, len(content), 0)

    def create(self, path: str, *unused: Any, **also_unused: Any) -> io.BytesIO:
        store = self.objects

        class Written(io.BytesIO):
            def close(self) -> None:
                store[path] = self.getvalue()
                super().close()

        return Written()

    def open(self, path: str, *unused: Any, **also_unused: Any) -> io.BytesIO:
        return io.BytesIO(self.objects[path])

    def exists(self, path: str) -> bool:
        return path in self.objects

    def copy(self, sources: list[str], destinations: list[str]) -> None:
        for source, destination in zip(sources, destinations, strict=True):
            self.objects[destination] = self.objects[source]

    def rename(self, sources: list[str], destinations: list[str]) -> None:
        self.copy(sources, destinations)
        self.delete(sources)

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            del self.objects[path]

    def size(self, path: str) -> int:
        return len(self.objects[path])

    def last_updated(self, path: str) -> float:
        return 0.0

    def checksum(self, path: str) -> str:
        raise NotImplementedError

    def metadata(self, path: str) -> FileMetadata:
        return FileMetadata(path, self.size(path), 0)


class Service:
    """What was submitted, and how the job ends."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.state = dataflow.JobState.JOB_STATE_DONE
        self.images = 5
        self.summary: str | None = None  # where the job's workers write one

    def create_job(self, request: Any) -> Any:
        self.requests.append(request)
        if self.summary is not None:
            write_json(self.summary, {**Totals(images=5, labeled=5).to_dict(), "versions": {}})
        return dataflow.Job(id="job-1", name=request.job.name, current_state=self.state)

    def get_job_metrics(self, request: Any) -> Any:
        name = dataflow.MetricStructuredName(
            origin="user", name="images", context={"namespace": "maskbeam", "step": "s1"}
        )
        value = struct_pb2.Value(number_value=self.images)
        return dataflow.JobMetrics(
            metrics=[
                dataflow.MetricUpdate(name=name, scalar=value),
                dataflow.MetricUpdate(
                    name=dataflow.MetricStructuredName(name, context={**name.context, "tentative": "true"}),
                    scalar=value,
                ),
            ]
        )

    @property
    def job(self) -> dict[str, Any]:
        (request,) = self.requests
        assert (request.project_id, request.location) == ("my-project", "us-central1")
        return json_format.MessageToDict(request.job._pb)

    @property
    def pool(self) -> dict[str, Any]:
        (pool,) = self.job["environment"]["workerPools"]
        return pool


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch) -> MemoryBuckets:
    """Five photos and a preset."""
    buckets = MemoryBuckets()
    for number in range(5):
        buckets.objects[f"{BUCKET}/photos/{number}.png"] = photo_bytes(number)
    for file in Path(resolve_preset("sam_tiny")).iterdir():
        buckets.objects[f"{BUCKET}/models/tiny/{file.name}"] = file.read_bytes()
    real = FileSystems.get_filesystem
    monkeypatch.setattr(
        FileSystems,
        "get_filesystem",
        staticmethod(lambda path: buckets if path.startswith("gs://") else real(path)),
    )
    return buckets


@pytest.fixture
def service(buckets: MemoryBuckets, monkeypatch: pytest.MonkeyPatch) -> Service:
    """The Dataflow service, and nothing else of the network."""

    def no_network(*where: Any, **unused: Any) -> Any:
        raise AssertionError(f"the network was asked for: {where}")

    def stage_file(self: Any, directory: str, name: str, stream: Any, *unused: Any, **also_unused: Any) -> None:
        buckets.objects[f"{directory}/{name}"] = stream.read()

    service = Service()
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, no_network)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setattr(apiclient, "get_service_credentials", lambda options: None)
    monkeypatch.setattr(apiclient, "create_storage_client", lambda *unused: None)
    monkeypatch.setattr(gcsio.GcsIO, "__init__", lambda self: None)
    monkeypatch.setattr(gcsio.GcsIO, "is_soft_delete_enabled", lambda self, path: False)
    monkeypatch.setattr(apiclient.DataflowApplicationClient, "stage_file", stage_file)
    monkeypatch.setattr(dataflow.JobsV1Beta3Client, "create_job", lambda self, request: service.create_job(request))
    monkeypatch.setattr(
        dataflow.MetricsV1Beta3Client, "get_job_metrics", lambda self, request: service.get_job_metrics(request)
    )
    return service


@pytest.fixture
def labeled(service: Service) -> None:
    """The job's workers leave a summary."""
    service.summary = f"{BUCKET}/labels/{SUMMARY_FILE}"


def staged_pipeline(service: Service, buckets: MemoryBuckets) -> Any:
    """The graph that the workers get."""
    url = service.job["environment"]["sdkPipelineOptions"]["options"]["pipelineUrl"]
    return beam_runner_api_pb2.Pipeline.FromString(buckets.objects[url])


def pickled_fns(graph: Any) -> dict[str, bytes]:
    """The pickled DoFns: step -> what pickler.loads takes."""
    fns = {
        step.unique_name: beam_runner_api_pb2.ParDoPayload.FromString(step.spec.payload).do_fn
        for step in graph.components.transforms.values()
        if step.spec.urn == common_urns.primitives.PAR_DO.urn
    }
    return {name: fn.payload for name, fn in fns.items() if fn.urn == python_urns.PICKLED_DOFN_INFO}


def accelerator(asked: str) -> list[str]:
    """The flag that Beam users know."""
    return ["--dataflow_service_options", f"worker_accelerator={asked}"]


def words_of(pickled: bytes) -> set[str]:
    """All strings in a pickle: modules, names, and values."""
    stream = bz2.decompress(base64.b64decode(pickled))
    return {argument for _, argument, _ in pickletools.genops(stream) if isinstance(argument, str)}


@pytest.mark.usefixtures("labeled")
def test_the_command_submits_a_job_for_gpu_workers(
    service: Service, buckets: MemoryBuckets, capsys: pytest.CaptureFixture[str]
) -> None:
    """One submission, looked at from all sides: it takes seconds."""
    assert main(COMMAND) == 0

    image = default_image("my-project", "us-central1")
    pool, environment = service.pool, service.job["environment"]
    assert pool["machineType"] == "g2-standard-8"
    assert pool["diskSizeGb"] == 100
    assert pool["numThreadsPerWorker"] == 2
    assert pool["workerHarnessContainerImage"] == image
    assert [container["containerImage"] for container in pool["sdkHarnessContainerImages"]] == [image]
    assert environment["serviceOptions"] == ["worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver"]
    assert {"use_runner_v2", "no_use_multiple_sdk_containers"} <= set(environment["experiments"])
    assert "use_multiple_sdk_containers" not in environment["experiments"]
    assert service.job["type"] == "JOB_TYPE_BATCH"
    assert environment["tempStoragePrefix"].startswith("storage.googleapis.com/bucket/tmp")

    graph = staged_pipeline(service, buckets)
    check_environments(graph, image)
    check_stages(graph)
    check_pickles(graph)
    assert not [path for path in buckets.objects if "main_session" in path]

    captured = capsys.readouterr()
    assert "5 images: 5 labeled" in captured.out and "5 images in " in captured.out
    assert "https://console.cloud.google.com/dataflow/jobs/us-central1/job-1?project=my-project" in captured.err
    assert "gcloud dataflow jobs cancel job-1 --region us-central1 --project my-project" in captured.err
    assert "DONE" in captured.err


def check_environments(graph: Any, image: str) -> None:
    """One environment for all steps, without hints that would cut the pipeline, and nothing to install on workers."""
    (used,) = {step.environment_id for step in graph.components.transforms.values() if step.environment_id}
    environment = graph.components.environments[used]
    assert environment.urn == common_urns.environments.DOCKER.urn
    assert beam_runner_api_pb2.DockerPayload.FromString(environment.payload).container_image == image
    assert not environment.resource_hints
    staged = [
        beam_runner_api_pb2.ArtifactStagingToRolePayload.FromString(dependency.role_payload).staged_name
        for dependency in environment.dependencies
    ]
    assert staged == ["submission_environment_dependencies.txt"]  # a note of what the launcher has installed


def check_stages(graph: Any) -> None:
    """As the service fuses them: ReadChunks, GenerateMasks and WriteParquet are one stage, with no shuffle between."""
    _, stages = translations.create_and_optimize_stages(
        graph, translations.standard_optimize_phases(), frozenset([common_urns.primitives.GROUP_BY_KEY.urn])
    )
    together = [
        stage for stage in stages if any(step.unique_name.startswith("GenerateMasks") for step in stage.transforms)
    ]
    assert len(together) == 1
    names = {step.unique_name.partition("/")[0] for step in together[0].transforms}
    assert {"ReadChunks", "GenerateMasks", "WriteParquet"} <= names


def check_pickles(graph: Any) -> None:
    """Workers import what they run: nothing comes from __main__, from the tests, or from this machine's paths."""
    fns = pickled_fns(graph)
    assert any(name.startswith("GenerateMasks") for name in fns)
    words = set().union(*(words_of(pickled) for pickled in fns.values()))
    assert not [word for word in words if "__main__" in word or word == "tests" or word.startswith("tests.")]
    # Beam pickles lambdas of its own as code, with the file for stack traces.
    ours = {word for word in words if "/apache_beam/" not in word}
    assert not [word for word in ours if str(ROOT) in word or f"{Path.home()}/" in word or sys.prefix in word]
    assert f"{BUCKET}/models/tiny" in words and f"{BUCKET}/labels" in words
    (generate,) = (pickled for name, pickled in fns.items() if name.startswith("GenerateMasks"))
    assert "tensorflow" in words_of(generate)


@pytest.mark.usefixtures("labeled")
def test_workers_assert_the_backend_the_job_was_made_for(
    service: Service, buckets: MemoryBuckets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert main(COMMAND) == 0
    fns = pickled_fns(staged_pipeline(service, buckets))
    (pickled,) = (pickled for name, pickled in fns.items() if name.startswith("GenerateMasks"))
    fn, *_ = pickler.loads(pickled)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")  # say, by the image
    with pytest.raises(RuntimeError, match="made for KERAS_BACKEND=jax, but a worker runs tensorflow"):
        fn.setup()


@pytest.mark.usefixtures("labeled")
def test_flags_that_are_given_win(service: Service) -> None:
    flags = ["--machine_type", "n1-highmem-4", "--disk_size_gb", "60", "--number_of_worker_harness_threads", "1"]
    image = ["--sdk_container_image", "gcr.io/mine/worker:1", "--max_num_workers", "3"]
    gpu = "type:nvidia-tesla-v100;count:1;install-nvidia-driver:5xx;use_nvidia_mps"
    assert main([*COMMAND, *flags, *image, *accelerator(gpu), "--gpu", "l4"]) == 0
    pool, environment = service.pool, service.job["environment"]
    assert pool["machineType"] == "n1-highmem-4"
    assert pool["diskSizeGb"] == 60
    assert pool["numThreadsPerWorker"] == 1
    assert pool["workerHarnessContainerImage"] == "gcr.io/mine/worker:1"
    assert pool["autoscalingSettings"]["maxNumWorkers"] == 3
    assert environment["serviceOptions"] == [f"worker_accelerator={gpu}"]
    assert "no_use_multiple_sdk_containers" not in environment["experiments"]  # MPS is for several processes


@pytest.mark.usefixtures("labeled")
def test_a_template_is_written_and_nothing_else(
    service: Service, buckets: MemoryBuckets, capsys: pytest.CaptureFixture[str]
) -> None:
    template = f"{BUCKET}/tmp/job_object"
    assert main([*COMMAND, "--template_location", template]) == 0
    assert not service.requests
    assert b"g2-standard-8" in buckets.objects[template]
    assert capsys.readouterr().out == f"template written: {template}\n"


def test_a_failed_job_is_exit_code_1(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    service.state = dataflow.JobState.JOB_STATE_FAILED
    assert main(COMMAND) == 1
    told = capsys.readouterr().err
    assert "maskbeam: Dataflow pipeline failed. State: FAILED" in told and "Traceback" not in told
    assert "run the same command to go on" in told


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []

    def interrupted(self: Any) -> None:
        said.append(describe_interruption(signal.SIGINT))  # what a signal says at this moment
        raise KeyboardInterrupt

    monkeypatch.setattr(DataflowPipelineResult, "wait_until_finish", interrupted)
    assert main(COMMAND) == 130
    told = said[0].partition("The job goes on without this command: ")[2]
    assert "\n" not in told and "gcloud dataflow jobs cancel job-1 --region us-central1 --project my-project" in told


def test_a_cancelled_job_is_exit_code_1(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    service.state = dataflow.JobState.JOB_STATE_CANCELLED
    assert main(COMMAND) == 1
    assert "ended in state CANCELLED" in capsys.readouterr().err


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no project": (["--runner", "DataflowRunner", "--region", "r", "--temp_location", BUCKET], "needs --project"),
    "no region": (["--runner", "DataflowRunner", "--project", "p", "--temp_location", BUCKET], "needs --region"),
    "no temp_location": (WHERE, "needs --temp_location gs://"),
    "local temp_location": ([*WHERE, "--temp_location", "/tmp"], "--temp_location is /tmp"),
    "local staging_location": ([*CLOUD, "--staging_location", "stage"], "--staging_location is stage"),
    "local input": ([*CLOUD, "--input", "photos"], "photos is a local path"),
    "local output": ([*CLOUD, "--output", "labels"], "labels is a local path"),
    "unknown gpu": ([*CLOUD, "--gpu", "h200"], "gpu must be one of t4, l4, a100, a100_80gb or none, got h200"),
    "l4 on n1": ([*CLOUD, "--gpu", "l4", "--machine_type", "n1-standard-8"], "needs a machine type g2-..."),
    "t4 on g2": ([*CLOUD, "--gpu", "t4", "--machine_type", "g2-standard-8"], "needs a machine type n1-..."),
    "a100 on g2": ([*CLOUD, "--gpu", "a100", "--machine_type", "g2-standard-8"], "a2-highgpu-... or a2-megagpu-..."),
    "a100 of the other size": (
        [*CLOUD, "--gpu", "a100", "--machine_type", "a2-ultragpu-1g"],
        "a a2-ultragpu-1g cannot hold a nvidia-tesla-a100",
    ),
    "v100 with many vCPUs": (
        [
            *CLOUD,
            "--machine_type",
            "n1-standard-16",
            *accelerator("type:nvidia-tesla-v100;count:1;install-nvidia-driver"),
        ],
        "at most 12 vCPUs",
    ),
    "h100 on a2": (
        [
            *CLOUD,
            "--machine_type",
            "a2-highgpu-1g",
            *accelerator("type:nvidia-h100-80gb;count:1;install-nvidia-driver"),
        ],
        "needs a machine type a3-highgpu-...",
    ),
    "h100 without a machine": (
        [*CLOUD, *accelerator("type:nvidia-h100-80gb;count:8;install-nvidia-driver")],
        "--machine_type is missing",
    ),
    "wrong count": (
        [*CLOUD, "--machine_type", "g2-standard-24", *accelerator("type:nvidia-l4;count:1;install-nvidia-driver")],
        "comes with 2 nvidia-l4",
    ),
    "no driver": ([*CLOUD, *accelerator("type:nvidia-l4;count:1")], ";install-nvidia-driver"),
    "no count": ([*CLOUD, *accelerator("type:nvidia-l4;install-nvidia-driver")], "expected type:TYPE;count:COUNT"),
    "machine without gpus": ([*CLOUD, "--machine_type", "n2-standard-8"], "--gpu none"),
    "gpu machine for cpus": ([*CLOUD, "--gpu", "none", "--machine_type", "g2-standard-8"], "comes with GPUs"),
    "model by name": (
        [*CLOUD, "--model", "sam_base_sa1b"],
        ".save_to_preset('sam_base_sa1b')\" && gcloud storage cp -r sam_base_sa1b gs://bucket/models/\n"
        "and give --model gs://bucket/models/sam_base_sa1b",
    ),
    "model from a hub": ([*CLOUD, "--model", "kaggle://keras/sam/keras/sam_base_sa1b"], "is a name"),
    "model on this machine": (
        [*CLOUD, "--model", resolve_preset("sam_tiny")],
        "and give --model gs://bucket/models/sam_tiny",
    ),
    "model that is not there": (
        [*CLOUD, "--model", f"{BUCKET}/models/none"],
        "there is no model at gs://bucket/models/none",
    ),
    "model only in the image": ([*CLOUD, "--model", "/models/none"], "is for the flex template"),
    "gpu of a local run": (["--gpu", "l4"], "--gpu is for --runner DataflowRunner"),
    "project number": (
        ["--runner", "DataflowRunner", "--project", "123", "--region", "r", "--temp_location", f"{BUCKET}/tmp"],
        "Invalid Project ID (123)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught_before_anything_is_submitted(
    mistake: str, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, told = MISTAKES[mistake]
    assert main(["label", *PATHS, *flags]) == 2
    assert told in capsys.readouterr().err
    assert not service.requests


def test_a_mistake_leaves_the_output_alone(service: Service, buckets: MemoryBuckets) -> None:
    assert main([*COMMAND, "--gpu", "l4", "--machine_type", "n1-standard-8"]) == 2
    assert not [path for path in buckets.objects if path.startswith(f"{BUCKET}/labels")]


def test_the_missing_extra_is_told_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_spec(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    assert main(COMMAND) == 2
    assert f"pip install 'apache-beam[gcp]=={beam_version.__version__}'" in capsys.readouterr().err


CHOICES = [
    ([], "g2-standard-8", "nvidia-l4", 1),
    (["--gpu", "t4"], "n1-standard-8", "nvidia-tesla-t4", 1),
    (["--gpu", "l4"], "g2-standard-8", "nvidia-l4", 1),
    (["--gpu", "a100"], "a2-highgpu-1g", "nvidia-tesla-a100", 1),
    (["--gpu", "a100_80gb"], "a2-ultragpu-1g", "nvidia-a100-80gb", 1),
    (["--machine_type", "g2-standard-48"], "g2-standard-48", "nvidia-l4", 4),
    (["--machine_type", "n1-highmem-8"], "n1-highmem-8", "nvidia-tesla-t4", 1),
    (["--machine_type", "custom-8-32768"], "custom-8-32768", "nvidia-tesla-t4", 1),
    (["--machine_type", "a2-ultragpu-2g"], "a2-ultragpu-2g", "nvidia-a100-80gb", 2),
    (["--machine_type", "a3-highgpu-8g"], "a3-highgpu-8g", "nvidia-h100-80gb", 8),
    (["--gpu", "a100", "--machine_type", "a2-highgpu-4g"], "a2-highgpu-4g", "nvidia-tesla-a100", 4),
]


def prepared(*flags: str) -> Any:
    """All options of a job after preparation."""
    job, options = parse_label([*CLOUD, *PATHS, *flags])
    prepare_dataflow(options, job.dataflow, [*job.input.input, job.output.output])
    return options.get_all_options()


@pytest.mark.parametrize(("flags", "machine", "kind", "count"), CHOICES, ids=[" ".join(case[0]) for case in CHOICES])
def test_machine_and_accelerator_fit_each_other(flags: list[str], machine: str, kind: str, count: int) -> None:
    options = prepared(*flags)
    assert options["machine_type"] == machine
    assert options["dataflow_service_options"] == [
        f"worker_accelerator=type:{kind};count:{count};install-nvidia-driver"
    ]


def test_gpus_that_would_stay_idle_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prepared("--machine_type", "g2-standard-24")
    assert "each worker has 2 GPUs, but a process of the SDK uses one" in caplog.text


def test_without_a_gpu_there_is_no_accelerator() -> None:
    options = prepared("--gpu", "none")
    assert options["machine_type"] == "n2-standard-8"
    assert not options["dataflow_service_options"]


def test_other_service_options_stay() -> None:
    options = prepared("--dataflow_service_options", "enable_google_cloud_profiler")
    assert options["dataflow_service_options"][0] == "enable_google_cloud_profiler"
    assert options["dataflow_service_options"][1].startswith("worker_accelerator=type:nvidia-l4")


def test_a_newer_accelerator_is_left_to_dataflow() -> None:
    flags = accelerator("type:nvidia-h200-141gb;count:8;install-nvidia-driver")
    options = prepared("--machine_type", "a3-ultragpu-8g", *flags)
    assert options["dataflow_service_options"] == flags[1:]


def test_the_default_image_names_project_region_and_versions() -> None:
    image = default_image("example.com:my-project", "europe-west4")
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    assert re.fullmatch(
        rf"europe-west4-docker\.pkg\.dev/example\.com/my-project/maskbeam/worker:(\d+\.\d+\.\d+|dev)-{python}", image
    )


@pytest.mark.parametrize(
    "runner", ["DataflowRunner", "dataflow", "apache_beam.runners.dataflow.dataflow_runner.DataflowRunner"]
)
def test_the_runner_has_several_names(runner: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label", *PATHS, "--runner", runner]) == 2
    assert "Dataflow also needs --project" in capsys.readouterr().err


def test_the_device_is_not_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"})
    segment.use_backend("tensorflow")
    assert os.environ == {
        "KERAS_BACKEND": "tensorflow",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",  # what is set stays
    }
