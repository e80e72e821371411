"""Committing chunks: two files or none, nothing left over, and an end when too much fails."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import apache_beam as beam
import pyarrow.parquet as pq
import pytest
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems
from apache_beam.testing import test_pipeline
from apache_beam.testing.util import assert_that, equal_to

from maskbeam.transforms.files.storage import list_directory, list_tree, read_json
from maskbeam.transforms.labels.clear import delete_chunks, delete_temporary
from maskbeam.transforms.labels.commit import commit_chunk
from maskbeam.transforms.labels.layout import ChunkKey, OutputConfig, chunk_name, committed_chunks, parse_chunk_name
from maskbeam.transforms.labels.resume import read_report
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.labels.schema import RUN_KEY
from maskbeam.transforms.records import (
    CropBox,
    Dropped,
    EncodedImage,
    Failure,
    LabeledChunk,
    LabeledImage,
    Mask,
    Prompt,
    Shard,
    SourceFile,
    StoredCandidate,
    Totals,
)
from maskbeam.transforms.summarize import read_totals, write_summary
from maskbeam.transforms.write_parquet import TooManyFailures, WriteParquet

RUN = Run(root="/", versions={"python": "3"})
SHARD = Shard("a%2Fs.tar", "/a/s.tar", "tar", (SourceFile("/a/s.tar", 1000),))
# The 2x2 mask with its right column set: column-major runs [2, 2], "22" compressed.
MASK = Mask((2, 2), "22", (1.0, 0.0, 1.0, 2.0), 2, 0.5, 0.75, Prompt(((1.5, 0.5),)), (0.0, 0.0, 2.0, 2.0))


def labeled(row: int) -> LabeledImage:
    source = EncodedImage(f"a/s.tar#{row}", row, None, None, b"")
    return LabeledImage(source, 10, "ff", (2, 2), 1, (MASK,), num_candidates=3, dropped=Dropped(stability=2))


def empty(row: int) -> LabeledImage:
    return replace(labeled(row), masks=(), dropped=Dropped(stability=3))


def failed(row: int) -> LabeledImage:
    return LabeledImage(labeled(row).source, 10, "ff", None, 1, failure=Failure("decode", "no"))


def chunk_of(*images: LabeledImage, index: int = 0) -> LabeledChunk:
    return LabeledChunk.of(SHARD, index, images, final=False, digest="d1")


def files(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}


def both(name: str) -> set[str]:
    return {f"annotations/{name}", f"images/{name}"}


@pytest.mark.parametrize("images", [[], [failed(0)], [empty(0)], [labeled(0), empty(1), failed(2)]])
def test_a_commit_is_two_files_one_row_a_mask_and_one_an_image(tmp_path: Path, images: list[LabeledImage]) -> None:
    commit_chunk(chunk_of(*images), str(tmp_path), RUN)
    name = "a%2Fs.tar-00000.parquet"
    assert files(tmp_path) == both(name)
    masks, rows = (pq.read_table(tmp_path / kind / name) for kind in ("annotations", "images"))
    assert rows["status"].to_pylist() == [image.status for image in images]
    assert masks["image_id"].to_pylist() == [image.source.image_id for image in images for _ in image.masks]


def test_candidates_are_a_third_file_and_the_images_file_stays_the_commit_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unstable = StoredCandidate(CropBox((0, 0, 2, 2), 0), (1.5, 0.5), 0.5, 0.25, (1, 0, 1, 1), None, None)
    candidate = replace(unstable, stability_score=0.75, counts=MASK.counts, area=MASK.area)
    image = replace(labeled(0), candidates=((candidate, unstable), (candidate,)))
    chunk = replace(chunk_of(image, failed(1)), keep_candidates=True)
    published: list[str] = []
    rename, link = FileSystems.rename, os.link

    def note_rename(sources: list[str], destinations: list[str]) -> None:
        published.extend(Path(path).parent.name for path in destinations)
        rename(sources, destinations)

    def note_link(source: str, destination: str) -> None:
        published.append(Path(destination).parent.name)
        link(source, destination)

    monkeypatch.setattr(FileSystems, "rename", note_rename)
    monkeypatch.setattr(os, "link", note_link)
    commit_chunk(chunk, str(tmp_path), RUN)
    assert sorted(published) == ["annotations", "candidates", "images"] and published[-1] == "images"
    rows = pq.read_table(tmp_path / "candidates" / "a%2Fs.tar-00000.parquet").to_pylist()
    assert [(row["crop_index"], row["area"]) for row in rows] == [(0, 2), (0, None), (1, 2)]
    assert rows[0]["segmentation"] == {"size": [2, 2], "counts": "22"} and rows[1]["segmentation"] is None
    assert rows[0]["box_xyxy"] == [1, 0, 1, 1] and rows[0]["point_coords"] == [[1.5, 0.5]]


def test_no_candidates_are_a_file_too(tmp_path: Path) -> None:
    commit_chunk(replace(chunk_of(failed(0)), keep_candidates=True), str(tmp_path), RUN)
    assert pq.read_table(tmp_path / "candidates" / "a%2Fs.tar-00000.parquet").num_rows == 0
    assert committed_chunks(str(tmp_path), keep_candidates=True) == {SHARD.name: [0]}
    (tmp_path / "candidates" / "a%2Fs.tar-00000.parquet").unlink()
    assert committed_chunks(str(tmp_path), keep_candidates=True) == {}
    assert committed_chunks(str(tmp_path)) == {SHARD.name: [0]}


def test_files_are_zstd_and_tell_which_run_made_them(tmp_path: Path) -> None:
    commit_chunk(chunk_of(labeled(0)), str(tmp_path), RUN)
    for path in tmp_path.rglob("*.parquet"):
        metadata = pq.read_metadata(path)
        columns = range(metadata.num_columns)
        assert {metadata.row_group(0).column(column).compression for column in columns} == {"ZSTD"}
        assert Run.from_json(json.loads(metadata.metadata[RUN_KEY])) == RUN


def test_the_report_comes_back_from_the_images_file(tmp_path: Path) -> None:
    report = commit_chunk(chunk_of(labeled(0), failed(1), index=3), str(tmp_path), RUN)
    assert (report.shard, report.index, report.final, report.digest) == (SHARD.name, 3, False, "d1")
    assert report.source == "1 file, 1000 bytes"
    assert (report.totals.images, report.totals.masks, report.totals.failed) == (2, 1, 1)
    stored = read_report(str(tmp_path), SHARD.name, 3)
    written = replace(report.totals.seconds, write=0.0)  # it is known only after the file is closed
    assert stored == replace(report, totals=replace(report.totals, seconds=written))
    assert report.totals.seconds.write > 0


@pytest.mark.parametrize("generation", [0, 1, 23])
@pytest.mark.parametrize("index", [0, 7, 99999, 100000])
@pytest.mark.parametrize("shard", ["s.tar", "@root", "x-00001.parquet", "x-00001.2", "a%2Fb~0123"])
def test_names_of_chunks_go_both_ways(shard: str, index: int, generation: int) -> None:
    assert parse_chunk_name(chunk_name(shard, index, generation)) == ChunkKey(shard, index, generation)


@pytest.mark.parametrize("name", ["a.parquet", "a-1.parquet", "a-00001.0.parquet", "-00001.parquet"])
def test_other_names_are_no_chunks(name: str) -> None:
    assert parse_chunk_name(name) is None


@pytest.mark.parametrize("name", ["plain", "a [x]*? b", "[abc]", "100%"])
def test_any_local_directory_will_do(tmp_path: Path, name: str) -> None:
    output, neighbour = tmp_path / name, tmp_path / "a [x]ll b"
    for directory in (output, neighbour):
        commit_chunk(chunk_of(labeled(0)), str(directory), RUN)
    commit_chunk(chunk_of(labeled(1), index=2), str(output), RUN)
    assert committed_chunks(str(output)) == {SHARD.name: [0, 2]}
    write_summary(Totals(), str(output), RUN)
    assert sorted(path.name for path in output.iterdir()) == ["annotations", "images", "summary.json"]
    delete_chunks(str(output))
    assert committed_chunks(str(output)) == {}
    assert committed_chunks(str(neighbour)) == {SHARD.name: [0]}


def test_other_file_systems_take_a_name_for_a_pattern() -> None:
    with pytest.raises(ValueError, match=r"output is gs://bucket/out\*, but only local"):
        OutputConfig("gs://bucket/out*")


def test_a_directory_that_is_not_there_has_no_files_and_nothing_is_deleted(tmp_path: Path) -> None:
    assert list_tree(str(tmp_path / "none")) == list_directory(str(tmp_path / "none")) == []
    delete_temporary(str(tmp_path / "none"))
    delete_chunks(str(tmp_path / "none"))


@pytest.mark.parametrize("break_at", ["annotations", "images"])
def test_half_a_commit_is_none_and_the_next_one_repairs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_at: str
) -> None:
    rename = FileSystems.rename

    def breaks(sources: list[str], destinations: list[str]) -> None:
        if f"/{break_at}/" in destinations[0]:
            raise BeamIOError("the disk is gone")
        rename(sources, destinations)

    def breaks_too(source: str, destination: str) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(FileSystems, "rename", breaks)
    monkeypatch.setattr(os, "link", breaks_too)
    monkeypatch.setattr("maskbeam.transforms.labels.commit.RETRY_SECONDS", (0,))
    with pytest.raises(OSError, match=r"cannot write the chunk a%2Fs\.tar-00000\..*2 times.*the disk is gone"):
        commit_chunk(chunk_of(labeled(0)), str(tmp_path), RUN)
    assert committed_chunks(str(tmp_path)) == {}
    monkeypatch.undo()
    commit_chunk(chunk_of(labeled(0)), str(tmp_path), RUN)
    assert committed_chunks(str(tmp_path)) == {SHARD.name: [0]}
    write_summary(Totals(), str(tmp_path), RUN)
    assert files(tmp_path) == both("a%2Fs.tar-00000.parquet") | {"summary.json"}


def test_a_chunk_done_twice_keeps_the_files_of_the_first_attempt(tmp_path: Path) -> None:
    commit_chunk(chunk_of(labeled(0)), str(tmp_path), RUN)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*.parquet")}
    commit_chunk(chunk_of(labeled(0)), str(tmp_path), RUN)
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*.parquet")} == before
    assert [pq.read_table(path).num_rows for path in tmp_path.rglob("*.parquet")] == [1, 1]


def test_the_summary_has_the_totals_and_the_versions(tmp_path: Path) -> None:
    totals = chunk_of(labeled(0), failed(1)).totals()
    write_summary(totals, str(tmp_path), RUN)
    assert read_json(str(tmp_path / "summary.json"))["versions"] == {"python": "3"}
    assert read_totals(str(tmp_path)) == totals


def write(output: Path, chunks: list[LabeledChunk], max_failed_fraction: float) -> None:
    config = OutputConfig(str(output), max_failed_fraction=max_failed_fraction)
    with test_pipeline.TestPipeline(runner="FnApiRunner") as pipeline:
        reports = pipeline | beam.Create(chunks) | WriteParquet(config, RUN) | beam.Map(lambda report: report.index)
        assert_that(reports, equal_to([chunk.index for chunk in chunks]))


def chunks_with(num_chunks: int, good: int, bad: int) -> list[LabeledChunk]:
    images = [empty(row) for row in range(good)] + [failed(row) for row in range(good, good + bad)]
    return [chunk_of(*images, index=index) for index in range(num_chunks)]


@pytest.mark.parametrize(
    ("num_chunks", "good", "bad", "fraction"),
    [
        (3, 0, 33, 0.5),  # 99 images are too few to judge
        (4, 25, 25, 0.5),  # as many as allowed
        (2, 1, 99, 1.0),
    ],
)
def test_some_failures_are_only_rows(tmp_path: Path, num_chunks: int, good: int, bad: int, fraction: float) -> None:
    write(tmp_path, chunks_with(num_chunks, good, bad), fraction)
    assert committed_chunks(str(tmp_path)) == {SHARD.name: list(range(num_chunks))}


@pytest.mark.parametrize(
    ("num_chunks", "good", "bad", "fraction", "committed"),
    [
        (6, 0, 25, 0.5, 3),  # the 100th image is in the fourth chunk
        (3, 24, 26, 0.5, 1),
        (2, 99, 1, 0.0, 0),
    ],
)
def test_too_many_failures_end_the_run(
    tmp_path: Path, num_chunks: int, good: int, bad: int, fraction: float, committed: int
) -> None:
    with pytest.raises(TooManyFailures, match=rf"max_failed_fraction {fraction} allows; the first: a/s\.tar#{good}"):
        write(tmp_path, chunks_with(num_chunks, good, bad), fraction)
    assert len(committed_chunks(str(tmp_path)).get(SHARD.name, [])) == committed
