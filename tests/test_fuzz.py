"""Damaged images and shards: no crash, no hang, no row lost in silence. `make soak` runs many more of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import fuzz
from benchmarks.fuzz import IMAGES, KINDS, Case, Kind, judge, make_case, run_case, watch_cases
from maskbeam.transforms.records import EncodedImage, Failure
from tests.conftest import EVENT_SECONDS

CASES = 12 * len(KINDS)


@pytest.mark.processes
def test_no_damaged_file_crashes_hangs_or_loses_a_row_in_silence() -> None:
    report = watch_cases(0, CASES)
    assert report.offences == [] and report.cases == CASES
    assert report.results["failed"] > CASES / 10 and report.results["as it was"] + report.results["changed"] > 50


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("tfrecord")])  # imports TensorFlow
def test_the_good_files_are_good(kind: str, tmp_path: Path) -> None:
    case = Case(0, kind, (), fuzz.good_file(kind), rewritten=False)
    assert run_case(case, tmp_path).result == "as it was"


def test_a_case_is_the_same_each_time_and_most_differ_from_the_good_file() -> None:
    cases = [make_case(number) for number in range(200)]
    assert cases == [make_case(number) for number in range(200)]
    assert sum(case.data != fuzz.good_file(case.kind) for case in cases) > 180
    assert len(Counter(name for case in cases for name in case.mutations)) > 12


def rows(*images: bytes | None) -> list[EncodedImage]:
    """A row each; None is a failed one."""
    return [
        EncodedImage(f"s#{row}", row, None, None, data or b"", None if data else Failure("read", "broken"))
        for row, data in enumerate(images)
    ]


@pytest.mark.parametrize(
    ("found", "offence"),
    [
        (rows(*IMAGES), None),
        (rows(*IMAGES[:2], None), None),
        (rows(None), None),
        (rows(*IMAGES[:2]), "2 of 5 images and no reason for the others"),
        (rows(), "0 of 5 images"),
        (rows(*IMAGES[:4], b"other"), "an image is not what it was"),
        (rows(*IMAGES)[1:], "not numbered from 0"),
        ([EncodedImage("s#0", 0, None, None, b"")], "neither bytes nor a reason"),
    ],
)
def test_what_counts_as_an_offence(found: list[EncodedImage], offence: str | None) -> None:
    _, said = judge(found, Kind("tfrecord", bytes, checked=True), rewritten=False)
    assert (said is None) if offence is None else (said is not None and offence in said)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("code", "patience", "ended"),
    [("import os; os.abort()", EVENT_SECONDS, "exit code -6"), ("import signal; signal.pause()", 0.5, "took longer")],
)
def test_crashes_and_hangs_are_offences_and_the_next_cases_go_on(
    monkeypatch: pytest.MonkeyPatch, code: str, patience: float, ended: str
) -> None:
    real = fuzz.subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        return real([command[0], "-c", code], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(fuzz.subprocess, "Popen", popen)
    monkeypatch.setattr(fuzz, "SECONDS_TO_START", patience)
    report = watch_cases(7, 2)
    assert [outcome.number for outcome in report.offences] == [7, 8]
    assert all(ended in (outcome.offence or "") for outcome in report.offences)
