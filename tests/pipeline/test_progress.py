"""The progress of a local run, from records that processes are pretended to have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskbeam.pipeline import progress as progress_module
from maskbeam.pipeline.progress import Progress
from maskbeam.transforms.worker_progress import COMPILING, IMAGE, LOADING, PROGRESS_RECORD, READING, READY
from tests.fakes import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def record(directory: Path, process: int, *sizes: int) -> None:
    """As a worker process does after each image."""
    with (directory / str(process)).open("ab") as file:
        for size in sizes:
            file.write(PROGRESS_RECORD.pack(IMAGE, size))


def enter(directory: Path, process: int, *states: int) -> None:
    """As a worker process does when it begins something."""
    with (directory / str(process)).open("ab") as file:
        for state in states:
            file.write(PROGRESS_RECORD.pack(state, 0))


def make_progress(directory: Path, **arguments: Any) -> Progress:
    return Progress(
        directory, **{"total_images": None, "total_bytes": 1000, "done_images": 0, "done_bytes": 0, **arguments}
    )


def test_images_of_all_processes_are_counted_once(tmp_path: Path) -> None:
    progress = make_progress(tmp_path)
    record(tmp_path, 11, 10)
    progress.update()
    assert progress.images == 1
    record(tmp_path, 11, 20)
    record(tmp_path, 12, 30, 40)
    for _ in range(2):
        progress.update()
        assert progress.images == 4


def test_half_a_record_is_counted_when_it_is_whole(tmp_path: Path) -> None:
    progress = make_progress(tmp_path)
    whole = PROGRESS_RECORD.pack(IMAGE, 100)
    for part, images in ((whole[:3], 0), (whole[3:], 1)):
        with (tmp_path / "11").open("ab") as file:
            file.write(part)
        progress.update()
        assert progress.images == images
    assert progress.estimate_total() == 10


@pytest.mark.parametrize(
    ("arguments", "sizes", "total"),
    [
        ({}, [], None),  # nothing is known before the first image
        ({}, [100], 10),
        ({}, [100, 300], 5),  # 200 bytes an image
        ({}, [900, 900], 2),  # never fewer than there are
        ({"done_images": 6, "done_bytes": 600}, [], 10),  # what earlier starts did counts, too
        ({"done_images": 1, "done_bytes": 100}, [300], 5),
        ({"total_images": 7}, [100], 7),
    ],
)
def test_the_total_is_exact_or_estimated_from_the_bytes_so_far(
    tmp_path: Path, arguments: dict[str, int], sizes: list[int], total: int | None
) -> None:
    progress = make_progress(tmp_path, **arguments)
    record(tmp_path, 11, *sizes)
    progress.update()
    assert progress.estimate_total() == total


@pytest.mark.parametrize(
    ("arguments", "num_images", "line"),
    [
        ({}, 0, "0/~? images"),
        ({}, 2, "2/~10 images, 0.10 images/s, 01:20 left"),
        ({"total_images": 4}, 2, "2/4 images, 0.10 images/s, 00:20 left"),
        # The first of the two showed that the model is ready. Of a resume, only what this start did makes its speed.
        ({"total_images": 8, "done_images": 4, "done_bytes": 400}, 2, "6/8 images, 0.10 images/s, 00:20 left"),
        ({"total_images": 8, "done_images": 4, "done_bytes": 400}, 0, "4/8 images"),
    ],
)
def test_a_line_tells_images_speed_and_time_left(
    tmp_path: Path, clock: Clock, arguments: dict[str, int], num_images: int, line: str
) -> None:
    progress = make_progress(tmp_path, **arguments)
    clock.now = 50.0  # of start-up, which has no part in the rate
    enter(tmp_path, 11, LOADING, READING, COMPILING, READY)
    progress.update()
    record(tmp_path, 11, *[100] * num_images)
    progress.update()
    clock.now += 10.0
    assert progress.line() == line


def test_without_a_terminal_a_line_is_printed_now_and_then(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = make_progress(tmp_path, total_images=3)
    for _ in range(100):
        clock.now += 0.25
        progress.update()
    progress.close()
    assert capsys.readouterr().err.splitlines() == [f"0/3 images, starting, {seconds} s" for seconds in (2, 12, 22)]


def test_the_start_up_is_shown_by_what_it_is_spent_on(tmp_path: Path, clock: Clock) -> None:
    progress = make_progress(tmp_path, total_images=3)
    shown = []
    for clock.now, process, state in [
        (2.0, 11, LOADING),
        (2.5, 12, LOADING),  # the foremost worker counts
        (10.0, 11, READING),
        (10.5, 11, COMPILING),
        (12.0, 12, READING),
        (21.0, 11, READY),
        (30.0, 12, READY),
    ]:
        progress.update()
        shown.append(progress.line())
        enter(tmp_path, process, state)
        progress.update()
    assert shown == [
        "0/3 images, starting, 2 s",
        "0/3 images, loading model, 0 s",
        "0/3 images, loading model, 8 s",
        "0/3 images, reading, 0 s",
        "0/3 images, compiling, 2 s",
        "0/3 images, compiling, 10 s",
        "0/3 images",
    ]
    clock.now = 100.0
    assert progress.start_up == {"starting": 2.0, "loading model": 8.0, "reading": 0.5, "compiling": 10.5}


def test_the_pace_counts_from_when_the_first_worker_was_ready(tmp_path: Path, clock: Clock) -> None:
    progress = make_progress(tmp_path)
    assert progress.pace == (0, 0.0)
    clock.now = 20.0
    enter(tmp_path, 11, LOADING, READING, COMPILING, READY)
    enter(tmp_path, 12, LOADING, READING, COMPILING, READY)
    progress.update()
    record(tmp_path, 11, *[100] * 5)
    record(tmp_path, 12, *[100] * 3)
    clock.now = 30.0
    progress.update()
    assert progress.pace == (6, 10.0)


def test_a_worker_without_a_state_is_ready_with_its_first_image(tmp_path: Path, clock: Clock) -> None:
    """One whose images all fail never uses its model."""
    progress = make_progress(tmp_path, total_images=2)
    enter(tmp_path, 11, LOADING, READING)
    record(tmp_path, 11, 100)
    progress.update()
    clock.now = 5.0
    assert progress.line() == "1/2 images, 0.20 images/s, 00:05 left"


def test_on_a_terminal_there_is_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = make_progress(tmp_path, total_images=8, done_images=4, done_bytes=400)
    progress.update()
    assert "starting" in capsys.readouterr().err
    record(tmp_path, 11, 100, 100)
    progress.close()
    assert "6/8" in capsys.readouterr().err
