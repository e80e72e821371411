"""Starting again: only what is missing is done, a changed input is noticed, and the rows are those of one start."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import label, photo_bytes, read_labels, write_photos
from tests.test_read import images_tar
from transforms import resume
from transforms.match import InputConfig, match_shards
from transforms.read import ReadConfig
from transforms.records import ChunkReport, Shard, SourceFile, Totals
from transforms.resume import (
    InputChanged,
    check_directories,
    committed_chunks,
    count_orphans,
    finished_reports,
    read_report,
    read_unfinished,
)
from transforms.write import OutputConfig


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
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An input, and the output of a run over it that nobody disturbed."""
    directory = tmp_path_factory.mktemp("finished")
    data, output = make_input(directory / "data"), directory / "labels"
    assert start(data, output) == 0
    return data, output


def test_each_chunk_is_committed_under_its_shards_name(finished: tuple[Path, Path]) -> None:
    assert committed_chunks(str(finished[1])) == CHUNKS


def test_only_the_last_chunk_of_a_shard_is_final(finished: tuple[Path, Path]) -> None:
    reports = [read_report(str(finished[1]), "a.tar", index) for index in (0, 1, 2)]
    assert [report and report.final for report in reports] == [False, False, True]


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(lost=st.dictionaries(st.sampled_from(FILES), st.sampled_from(["images", "annotations", "images annotations"])))
def test_whatever_is_lost_the_next_start_restores_the_same_rows(
    finished: tuple[Path, Path], lost: dict[str, str]
) -> None:
    data, output = finished
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
        found = {(report.shard, report.index): report for report in reports}
        monkeypatch.setattr(resume, "read_report", lambda output, shard, index: found[shard, index])

    return write


def tar_shard(num_bytes: int = 10, path: str = "/d/a.tar") -> Shard:
    return Shard("a.tar", path, "tar", (SourceFile(path, num_bytes),))


def loose_shard(*files: tuple[str, int], first_chunk: int = 0) -> Shard:
    sources = tuple(SourceFile(f"/d/l/{name}", size) for name, size in files)
    return Shard("l", "/d/l", "image", sources, first_chunk=first_chunk, first_row=2 * first_chunk)


def report_of(shard: Shard, index: int = 0, final: bool = True, failed: int = 0) -> ChunkReport:
    digest = resume.chunk_digest(shard, "/d")
    return ChunkReport(shard.name, index, final, digest, shard.source, Totals(images=2, failed=failed))


def finished_indices(shard: Shard, committed: list[int], retry_failed: bool = False) -> list[int]:
    config = OutputConfig("/out", retry_failed=retry_failed)
    return [report.index for report in finished_reports(shard, "/d", committed, config)]


def test_committed_chunks_of_an_unchanged_shard_are_finished(write_reports: Callable[..., None]) -> None:
    shard = tar_shard()
    write_reports(report_of(shard, 0, final=False), report_of(shard, 1))
    assert finished_indices(shard, []) == []
    assert finished_indices(shard, [1]) == [1]
    assert finished_indices(shard, [0, 1]) == [0, 1]


def test_of_loose_files_each_shard_is_one_chunk(write_reports: Callable[..., None]) -> None:
    first, second = loose_shard(("a.png", 1), ("b.png", 2)), loose_shard(("c.png", 3), first_chunk=1)
    write_reports(report_of(first, 0), report_of(second, 1))
    assert finished_indices(first, [0, 1]) == [0]
    assert finished_indices(second, [0, 1]) == [1]
    assert finished_indices(second, [0]) == []


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        (tar_shard(10), tar_shard(11), "/d/a.tar changed.*chunk 0.*was 1 file, 10 bytes, now it is 1 file, 11 bytes"),
        (
            loose_shard(("a.png", 1), ("b.png", 2)),
            loose_shard(("a.png", 1)),
            "/d/l changed.*was 2 files, 3 bytes, now it is 1 file, 1 bytes",
        ),
        (
            loose_shard(("a.png", 1), ("b.png", 2)),
            loose_shard(("a.png", 1), ("c.png", 2)),
            r"its files \(2 files, 3 bytes\) have other names or other sizes",
        ),
        (loose_shard(("a.png", 1), ("b.png", 2)), loose_shard(("a.png", 2), ("b.png", 1)), "other names or other size"),
    ],
    ids=["grown", "file gone", "renamed", "sizes swapped"],
)
def test_a_changed_input_is_an_error_that_names_the_change(
    write_reports: Callable[..., None], before: Shard, now: Shard, change: str
) -> None:
    write_reports(report_of(before))
    with pytest.raises(InputChanged, match=change):
        finished_indices(now, [0])


def test_retry_failed_takes_chunks_with_failures_for_unfinished(write_reports: Callable[..., None]) -> None:
    shard = tar_shard()
    write_reports(report_of(shard, 0, final=False, failed=1), report_of(shard, 1))
    assert finished_indices(shard, [0, 1]) == [0, 1]
    assert finished_indices(shard, [0, 1], retry_failed=True) == [1]


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
    gone = tar_shard()  # there is no such file: reading it would give a failed image
    reports = [report_of(gone, 0, final=False), report_of(gone, 1, final=True)]
    assert list(read_unfinished(gone, ReadConfig(), 2, "/d", reports)) == []


# The same through the program.


def test_retry_failed_redoes_the_chunks_with_failures_and_no_others(tmp_path: Path, output: Path) -> None:
    data = write_photos(tmp_path / "data", 4)
    data.joinpath("3.png").write_bytes(b"x" * len(photo_bytes(3)))
    assert start(data, output) == 0
    first_file, _ = sorted((output / "images").iterdir())
    untouched = first_file.stat().st_mtime_ns
    # The same size: the disk was mended, not the input changed.
    data.joinpath("3.png").write_bytes(photo_bytes(3))
    assert start(data, output) == 0
    assert [row["status"] for row in read_labels(output).images].count("failed") == 1
    assert start(data, output, "--retry_failed") == 0
    assert [row["status"] for row in read_labels(output).images] == ["labeled"] * 4
    assert first_file.stat().st_mtime_ns == untouched


def test_chunks_of_removed_inputs_are_counted() -> None:
    directory = [Shard("dir", "/in/dir", "image", (), first_chunk=index) for index in range(2)]
    tar = Shard("a.tar", "/in/a.tar", "tar", ())
    committed = {"dir": [0, 1, 2], "a.tar": [0, 1], "b.tar": [0]}
    assert count_orphans(committed, [*directory, tar]) == 2  # the directory's third chunk and b.tar
    assert count_orphans({}, [tar]) == 0


def test_a_directory_that_lost_its_last_files_is_an_error_that_says_so() -> None:
    directory = [Shard("dir", "/in/dir", "image", (), first_chunk=index) for index in range(2)]
    check_directories({"dir": [0, 1]}, directory)
    with pytest.raises(InputChanged, match=r"/in/dir has fewer files .* it had 3 chunks, now 2"):
        check_directories({"dir": [0, 1, 2]}, directory)


def test_files_of_others_and_damaged_ones_are_not_committed_chunks(tmp_path: Path) -> None:
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
        for name in ("merged.parquet", "a.tar-00000.parquet"):
            (tmp_path / folder / name).touch()
    assert committed_chunks(str(tmp_path)) == {"a.tar": [0]}
    assert finished_reports(Shard("a.tar", "/a.tar", "tar", ()), "/", [0], OutputConfig(str(tmp_path))) == []
