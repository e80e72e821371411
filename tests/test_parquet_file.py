"""Parquet is read without Arrow's threads, which may outlive the interpreter and then end the process with code 134."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import label

ROOT = Path(__file__).parents[1]

# Counts the threads of a process before and after it read all tables of some labels and an input shard.
_COUNT_THREADS = """
import os, sys
from transforms.labels import list_chunks, read_candidates, read_chunk, read_image_ids
from transforms.read import ReadConfig, read_images
from transforms.records import Shard, SourceFile
from transforms.resume import read_report

def threads():
    return set(os.listdir("/proc/self/task"))

labels, shard = sys.argv[1:]
before = threads()
for chunk in list_chunks(labels):
    read_chunk(labels, chunk), read_report(labels, chunk.shard, chunk.index)
    read_candidates(labels, chunk, ["image_id"])
list(read_image_ids(labels, list_chunks(labels)))
list(read_images(Shard("s", shard, "parquet", (SourceFile(shard, os.path.getsize(shard)),)), ReadConfig(), "/"))
sys.exit(len(threads() - before))
"""


@pytest.fixture
def labels(photos: Path, output: Path) -> Path:
    """Six photos in chunks of two, with candidates."""
    assert label("--input", photos, "--output", output, "--chunk_size", "2", "--keep_candidates") == 0
    return output


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_reading_parquet_starts_no_thread(labels: Path) -> None:
    shard = next((labels / "images").iterdir())  # any Parquet file: that it holds no images is a row
    found = subprocess.run(
        [sys.executable, "-c", _COUNT_THREADS, str(labels), str(shard)], cwd=ROOT, capture_output=True, text=True
    )
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.processes
def test_commands_that_read_labels_end_with_their_own_exit_code(labels: Path, tmp_path: Path) -> None:
    """Four at once, as often as a test can afford; before, one export in eight ended with code 134."""
    commands = [
        ["export", "--format", "coco", "--labels", labels, "--output", tmp_path / "{}.json"],
        ["evaluate", "--labels", labels, "--against", labels],
        ["refine", "--labels", labels, "--output", tmp_path / "refined-{}"],
        ["view", "--labels", labels, "--output", tmp_path / "report-{}"],
    ]

    def run(number: int) -> tuple[int, str]:
        arguments = [str(argument).format(number) for argument in commands[number % 4]]
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        return done.returncode, done.stderr

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(run, range(16))) == [(0, "")] * 16
