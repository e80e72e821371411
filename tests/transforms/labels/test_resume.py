"""Starting again: only what is missing is done, and the rows are those of one start."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskbeam.transforms.labels import resume
from maskbeam.transforms.labels.layout import ChunkKey, committed_chunks, list_tables
from maskbeam.transforms.labels.resume import finished_reports, read_committed, read_report
from maskbeam.transforms.match_shards import InputConfig, match_shards
from maskbeam.transforms.read_chunks import read_unfinished
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.records import ChunkReport, Shard, SourceFile, Totals
from tests.conftest import label, photo_bytes, read_labels, write_photos
from tests.transforms.readers.test_shard import images_tar


def write_tar(path: Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(images_tar([photo_bytes(number) for number in range(count)]))


def make_input(directory: Path) -> Path:
    """A tar of five images and a directory of three."""
    write_tar(directory / "a.tar", 5)
    write_photos(directory / "loose", 3)
    return directory


# What make_input becomes at --chunk_size 2.
CHUNKS = {"a.tar": [0, 1, 2], "loose": [0, 1]}
FILES = [f"{shard}-{index:05d}.parquet" for shard, indices in CHUNKS.items() for index in indices]


def start(data: Path, output: Path, *flags: str) -> int:
    return label("--input", data, "--output", output, "--chunk_size", "2", *flags)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An input, and the output of a run over it that nobody disturbed."""
    directory = tmp_path_factory.mktemp("finished")
    data, output = make_input(directory / "data"), directory / "labels"
    assert start(data, output) == 0
    return data, output


def test_each_chunk_is_committed_under_its_shards_name(finished_run: tuple[Path, Path]) -> None:
    assert committed_chunks(str(finished_run[1])) == CHUNKS


def test_only_the_last_chunk_of_a_shard_is_final(finished_run: tuple[Path, Path]) -> None:
    reports = [read_report(str(finished_run[1]), "a.tar", index) for index in (0, 1, 2)]
    assert [report and report.final for report in reports] == [False, False, True]


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(lost=st.dictionaries(st.sampled_from(FILES), st.sampled_from(["images", "annotations", "images annotations"])))
def test_whatever_is_lost_the_next_start_restores_the_same_rows(
    finished_run: tuple[Path, Path], lost: dict[str, str]
) -> None:
    data, output = finished_run
    with tempfile.TemporaryDirectory() as directory:
        damaged = Path(directory) / "labels"
        shutil.copytree(output, damaged)
        for name, kinds in lost.items():
            for kind in kinds.split():
                (damaged / kind / name).unlink()
        assert start(data, damaged) == 0
        assert read_labels(damaged) == read_labels(output)
        assert committed_chunks(str(damaged)) == CHUNKS


# Deciding what is done already. The reports are of a shard with two chunks.


@pytest.fixture
def write_reports(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that these reports lie in the output."""

    def write(*reports: ChunkReport) -> None:
        found = {(report.shard, report.index, report.generation): report for report in reports}
        monkeypatch.setattr(
            resume, "read_report", lambda output, shard, index, generation: found.get((shard, index, generation))
        )

    return write


TAR = Shard("a.tar", "/d/a.tar", "tar", (SourceFile("/d/a.tar", 10),), digest="d")


def report_of(shard: Shard, index: int = 0, final: bool = True, generation: int = 0) -> ChunkReport:
    return ChunkReport(shard.name, index, final, shard.digest, shard.source, Totals(images=2), generation=generation)


def finished(shard: Shard, *keys: tuple[int, int]) -> list[tuple[int, int]]:
    committed = [ChunkKey(shard.name, *key) for key in keys]
    return [(report.index, report.generation) for report in finished_reports(shard, committed, "/out")]


def test_committed_chunks_of_the_shards_own_digest_are_finished(write_reports: Callable[..., None]) -> None:
    write_reports(report_of(TAR, 0, final=False), report_of(TAR, 1))
    assert finished(TAR) == []
    assert finished(TAR, (1, 0)) == [(1, 0)]
    assert finished(TAR, (0, 0), (1, 0)) == [(0, 0), (1, 0)]
    assert finished(replace(TAR, digest="e"), (0, 0), (1, 0)) == []


def test_a_chunk_of_a_lower_generation_is_not_finished(write_reports: Callable[..., None]) -> None:
    write_reports(report_of(TAR, 0, final=False), report_of(TAR, 1), report_of(TAR, 1, generation=2))
    redone = replace(TAR, redone=((1, 2),))
    assert finished(redone, (0, 0), (1, 0)) == [(0, 0)]
    assert finished(redone, (0, 0), (1, 0), (1, 2)) == [(0, 0), (1, 2)]


def test_of_loose_files_each_shard_is_one_chunk(write_reports: Callable[..., None]) -> None:
    first, second = (Shard("l", "/d/l", "image", (), first_chunk=index, digest="d") for index in (0, 1))
    write_reports(report_of(first, 0), report_of(second, 1))
    assert finished(first, (0, 0), (1, 0)) == [(0, 0)]
    assert finished(second, (0, 0), (1, 0)) == [(1, 0)]
    assert finished(second, (0, 0)) == []


@pytest.mark.parametrize(
    ("done", "todo"), [([], [0, 1, 2]), ([0], [1, 2]), ([2], [0, 1]), ([0, 1], [2]), ([1, 2], [0])]
)
def test_the_chunks_that_are_left_are_read_and_no_others(tmp_path: Path, done: list[int], todo: list[int]) -> None:
    write_tar(tmp_path / "a.tar", 5)
    (shard,) = match_shards(InputConfig((str(tmp_path / "a.tar"),))).shards
    reports = [replace(report_of(shard, index), final=index == 2) for index in done]
    chunks = list(read_unfinished(shard, ReadConfig(), 2, str(tmp_path), reports))
    assert [(chunk.index, len(chunk.images), chunk.final) for chunk in chunks] == [
        (index, [2, 2, 1][index], index == 2) for index in todo
    ]


def test_a_finished_shard_is_not_opened() -> None:
    # There is no such file: reading it would give a failed image.
    reports = [report_of(TAR, 0, final=False), report_of(TAR, 1, final=True)]
    assert list(read_unfinished(TAR, ReadConfig(), 2, "/d", reports)) == []


def test_files_of_others_and_damaged_ones_are_not_committed_chunks(tmp_path: Path) -> None:
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
        for name in ("merged.parquet", "a.tar-00000.parquet"):
            (tmp_path / folder / name).touch()
    assert committed_chunks(str(tmp_path)) == {"a.tar": [0]}
    assert finished_reports(TAR, [ChunkKey("a.tar", 0)], str(tmp_path)) == []
    assert read_committed(str(tmp_path), list_tables(str(tmp_path)), None) == {}
