"""Two starts into one directory, as processes: the second says who is there, and both end in the same rows."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import uuid
from dataclasses import asdict
from pathlib import Path

import pytest

from maskbeam.pipeline.launch.starts import Start, announce_start, withdraw_start
from tests.conftest import EVENT_SECONDS, label, read_labels, wait_until, write_photos

# `maskbeam label` with FakeSam. With MEET=first it stops after two committed chunks until a start with MEET=second is
# about to label: by then that one has claimed the directory, left its note and read the others'.
LABEL_AND_MEET = """
import os, sys
from pathlib import Path
from maskbeam.pipeline.cli import _quiet_libraries
from tests.conftest import label, wait_until
from tests.fakes import FakeSam

output = Path(sys.argv[1])
met = output.with_name("met")

class Waits(FakeSam):
    def embed(self, *arguments):
        if len(list((output / "images").glob("*.parquet"))) >= 2:
            wait_until(met.exists)
        return super().embed(*arguments)

def load(config):
    if os.environ["MEET"] == "first":
        return Waits()
    met.touch()
    return FakeSam()

_quiet_libraries()
sys.exit(label("--output", *sys.argv[1:], load=load))
"""


def start(data: Path, output: Path, meet: str, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LABEL_AND_MEET, str(output), "--input", str(data), "--chunk_size", "1"]
    return subprocess.Popen(
        [*command, *flags],
        env={**os.environ, "MEET": meet},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(data: Path, output: Path, *flags: str) -> tuple[list[subprocess.Popen[str]], list[str]]:
    """A start, and a second one with flags while the first is at work; returns both and what they said."""
    first = start(data, output, "first")
    try:
        wait_until(lambda: len(list((output / "images").glob("*.parquet"))) >= 2, first)
        second = start(data, output, "second", *flags)
        told_second, told_first = (process.communicate(timeout=EVENT_SECONDS)[1] for process in (second, first))
    finally:
        first.kill()
    return [first, second], [told_first, told_second]


def leave_note(output: Path, host: str, process: int) -> Path:
    note = output / "_tmp" / f"{uuid.uuid4().hex}.start.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps(asdict(Start(host, process, "then"))))
    return note


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_start_finds_the_note_of_one_that_lives(tmp_path: Path) -> None:
    note, others = announce_start(str(tmp_path))
    assert others == []
    other_note, others = announce_start(str(tmp_path))
    assert [(other.host, other.process) for other in others] == [(socket.gethostname(), os.getpid())]
    withdraw_start(note)
    withdraw_start(note)
    assert [str(path) for path in (tmp_path / "_tmp").iterdir()] == [other_note]


@pytest.mark.processes
def test_the_note_of_a_killed_start_is_deleted_without_a_word(tmp_path: Path) -> None:
    note = leave_note(tmp_path, socket.gethostname(), dead_process())
    assert announce_start(str(tmp_path))[1] == []
    assert not note.exists()


@pytest.mark.processes
def test_of_another_machine_nothing_is_known(photos: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert label("--input", photos, "--output", output) == 0
    leave_note(output, "elsewhere", dead_process())
    assert label("--input", photos, "--output", output) == 0
    told = capsys.readouterr().err
    assert "another start may be at work" in told and " on elsewhere, since then" in told
    assert not (output / "_tmp").exists()


def test_a_broken_note_is_no_error(tmp_path: Path) -> None:
    leave_note(tmp_path, "elsewhere", 1).write_text("{")
    assert announce_start(str(tmp_path))[1] == []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("starts") / "data", 24)


@pytest.mark.processes
def test_two_processes_end_in_the_same_rows(data: Path, output: Path, tmp_path: Path) -> None:
    (first, second), told = start_two(data, output)
    assert (first.returncode, second.returncode) == (0, 0), told
    assert f"(process {first.pid} on {socket.gethostname()}, since " in told[1]
    assert "may be at work" not in told[0]
    assert label("--input", data, "--output", tmp_path / "alone", "--chunk_size", "1") == 0
    assert read_labels(output) == read_labels(tmp_path / "alone")
    assert not (output / "_tmp").exists()


@pytest.mark.processes
def test_a_process_whose_labels_are_overwritten_stops_in_one_line(data: Path, output: Path) -> None:
    (first, second), told = start_two(data, output, "--overwrite", "--max_masks", "1")
    assert (first.returncode, second.returncode) == (1, 0), told
    assert f"{output} belongs to another run since" in told[0] and "Traceback" not in told[0]
    labels = read_labels(output)
    assert len(labels.images) == 24 and all(row["num_masks"] <= 1 for row in labels.images)
    assert not (output / "_tmp").exists()
