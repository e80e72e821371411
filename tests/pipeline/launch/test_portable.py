"""The pipeline on a portable runner: launcher, job service and worker are three processes.

They run maskbeam as a wheel installed it, each in a directory of its own: nothing is imported from the sources, and
what the worker needs must be in the wheel or in the submitted pipeline.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from maskbeam.pipeline.cli import main
from tests.conftest import EVENT_SECONDS, read_labels, wait_until, write_photos

pytestmark = [pytest.mark.processes, pytest.mark.engines]

ROOT = Path(__file__).parents[3]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "maskbeam", "pipeline", "transforms")

# The embedded model's predicted IoU is low (its model card).
SMALL = ["--points_per_side", "2", "--pred_iou_thresh", "0.1", "--stability_score_thresh", "0.5"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with maskbeam as pip installs it, from a copy of the sources: building leaves files beside them."""
    sources = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, symlinks=True)  # maskbeam/ has two links
        else:
            shutil.copy(ROOT / name, sources / name)
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(sources)], check=True)
    return target


def environment(installed: Path, **variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(installed), "TF_CPP_MIN_LOG_LEVEL": "2", **variables}


@dataclass(frozen=True)
class JobService:
    """Where jobs are submitted, and what the service and its workers print."""

    port: int
    log: Path

    @property
    def flags(self) -> list[str]:
        worker = f"{sys.executable} -m apache_beam.runners.worker.sdk_worker_main"
        return [
            *("--runner", "PortableRunner", "--job_endpoint", f"localhost:{self.port}"),
            *("--environment_type", "beam:env:harness_subprocess_python:v1", "--environment_config", worker),
        ]


def start_service(directory: Path, installed: Path, **variables: str) -> Iterator[JobService]:
    """A job service that starts a worker process for each job."""
    port_file, log = directory / "port", directory / "log"
    command = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main"]
    with open(log, "wb") as output:
        service = subprocess.Popen(
            [*command, "--port_file", str(port_file), "--staging_dir", str(directory / "staging")],
            cwd=directory,
            env=environment(installed, **variables),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(port_file.exists, service)
        yield JobService(int(port_file.read_text()), log)
    finally:
        service.terminate()
        service.wait()


def label(installed: Path, directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """`maskbeam label` of the installed package."""
    return subprocess.run(
        [sys.executable, "-m", "maskbeam", "label", *SMALL, *flags],
        cwd=directory,
        env=environment(installed),
        capture_output=True,
        text=True,
        timeout=EVENT_SECONDS,
    )


def test_the_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    """Else the other tests would show nothing."""
    program = (
        "import maskbeam.pipeline as p, maskbeam.transforms.presets.embedded as e;"
        "print(p.__file__, e.__file__, e.embedded_presets())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(installed), capture_output=True, text=True
    ).stdout
    assert printed.split(maxsplit=2) == [
        str(installed / "maskbeam" / "pipeline" / "__init__.py"),
        str(installed / "maskbeam" / "transforms" / "presets" / "embedded.py"),
        "['sam_tiny']\n",
    ]


def test_a_job_runs_in_other_processes(installed: Path, tmp_path: Path) -> None:
    """With relative paths, which mean nothing in the worker's directory."""
    launcher, service_directory = tmp_path / "launcher", tmp_path / "service"
    service_directory.mkdir()
    write_photos(launcher / "photos", 3)
    for service in start_service(service_directory, installed):
        run = label(installed, launcher, "--input", "photos", "--output", "labels", "--chunk_size", "2", *service.flags)
        assert run.returncode == 0, run.stderr + service.log.read_text()

    assert "3 images: " in run.stdout and "3 images in " in run.stdout
    assert "submitted: job " in run.stderr and f"at localhost:{service.port}" in run.stderr
    assert "Job state changed" not in run.stderr and "\nDONE: job " in run.stderr  # Beam's own lines stay away

    labels = read_labels(launcher / "labels")
    assert [image["image_id"] for image in labels.images] == ["0.png", "1.png", "2.png"]
    assert all(image["status"] in ("labeled", "empty") for image in labels.images)
    assert all(image["num_candidates"] == 3 * 2 * 2 for image in labels.images)
    assert labels.annotations
    assert sorted(path.name for path in service_directory.iterdir()) == ["log", "staging"]


def test_a_worker_of_another_backend_fails_the_job(installed: Path, tmp_path: Path) -> None:
    launcher, service_directory = tmp_path / "launcher", tmp_path / "service"
    service_directory.mkdir()
    write_photos(launcher / "photos", 1)
    for service in start_service(service_directory, installed, KERAS_BACKEND="jax"):
        run = label(installed, launcher, "--input", "photos", "--output", "labels", *service.flags)
    assert run.returncode == 1
    assert (
        "\nmaskbeam: RuntimeError: this job was made for KERAS_BACKEND=tensorflow, but a worker runs jax" in run.stderr
    )
    assert "wait_until_finish" not in run.stderr  # where the launcher heard of it helps nobody
    assert not (launcher / "labels" / "images").exists()


@pytest.mark.parametrize("path", ["--input", "--output"])
def test_containers_cannot_reach_local_paths(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"--input": "s3://bucket/photos", "--output": "s3://bucket/labels", path: "here"}
    arguments = [word for flag in flags.items() for word in flag]
    assert main(["label", *arguments, "--runner", "PortableRunner", "--job_endpoint", "localhost:1"]) == 2
    assert "here is a local path, which workers in Docker containers cannot reach" in capsys.readouterr().err


def test_a_model_by_name_is_refused(photos: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--runner", "PortableRunner", "--job_endpoint", "localhost:1", "--environment_type", "LOOPBACK"]
    assert main(["label", "--input", str(photos), "--output", str(output), "--model", "sam_base_sa1b", *flags]) == 2
    told = capsys.readouterr().err
    assert "each worker would download for itself" in told and "save_to_preset('sam_base_sa1b')" in told
    assert not output.exists()
