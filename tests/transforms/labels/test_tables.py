"""Reading a directory of labels back. What a run that was killed leaves behind is made by taking files away."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maskbeam.transforms.labels.layout import ChunkKey
from maskbeam.transforms.labels.manifest import newest
from maskbeam.transforms.labels.run_file import read_run
from maskbeam.transforms.labels.tables import list_chunks, read_chunks
from maskbeam.transforms.records import DamagedFile
from tests.conftest import label, read_labels


@pytest.fixture
def labels(photos: Path, output: Path) -> Path:
    """Six photos and an empty file, in chunks of two."""
    (photos / "broken.png").write_bytes(b"")
    assert label("--input", photos, "--output", output, "--chunk_size", "2") == 0
    return output


def test_all_rows_come_in_the_order_of_the_chunks(labels: Path) -> None:
    chunks = list(read_chunks(str(labels)))
    assert [(chunk.shard, chunk.index) for chunk in chunks] == [("@root", index) for index in range(4)]
    pairs = [pair for chunk in chunks for pair in chunk.rows()]
    expected = read_labels(labels)
    assert [image["image_id"] for image, _ in pairs] == [*(f"{number}.png" for number in range(6)), "broken.png"]
    assert [mask for _, masks in pairs for mask in masks] == expected.annotations
    assert [len(masks) for _, masks in pairs] == [row["num_masks"] for row in expected.images]
    assert pairs[-1][0]["status"] == "failed" and pairs[-1][1] == []


def test_chunks_are_ordered_by_number_and_the_highest_generation_counts() -> None:
    keys = [ChunkKey("b", 100000), ChunkKey("b", 99999), ChunkKey("a", 1, 10), ChunkKey("a", 1, 9), ChunkKey("a", 1)]
    assert newest(keys) == [ChunkKey("a", 1, 10), ChunkKey("b", 99999), ChunkKey("b", 100000)]


@pytest.mark.parametrize("directory", ["annotations", "images"])
def test_chunks_that_the_summary_counts_and_that_are_gone_are_an_error(labels: Path, directory: str) -> None:
    (labels / directory / "@root-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"1 of the 4 chunks .*summary\.json counts are missing.*Run the command"):
        list_chunks(str(labels))


@pytest.mark.parametrize("directory", ["annotations", "images"])
def test_of_a_run_that_is_not_finished_whole_chunks_are_read_and_a_warning_says_so(
    labels: Path, directory: str, caplog: pytest.LogCaptureFixture
) -> None:
    (labels / "summary.json").unlink()
    (labels / directory / "@root-00001.parquet").unlink()
    (labels / "images" / "notes.parquet").touch()
    assert [chunk.index for chunk in read_chunks(str(labels))] == [0, 2, 3]
    assert f"{labels} is not finished" in caplog.text


def test_the_run_is_read(labels: Path) -> None:
    assert read_run(str(labels)).chunk_size == 2


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "there is no run.json"), ("[]", "not written by"), ("{}", "not written by")],
)
def test_a_directory_that_is_not_ours_is_an_error(tmp_path: Path, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    for read in (read_run, list_chunks):
        with pytest.raises(ValueError, match=told):
            read(str(tmp_path))


def test_labels_without_a_finished_chunk_are_an_error(labels: Path) -> None:
    for file in (labels / "images").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="no finished chunk"):
        list_chunks(str(labels))


def test_a_damaged_file_is_named(labels: Path) -> None:
    path = labels / "annotations" / "@root-00002.parquet"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DamagedFile, match=r"@root-00002\.parquet cannot be read"):
        list(read_chunks(str(labels)))


def test_tables_of_somebody_else_are_named(labels: Path) -> None:
    pq.write_table(pa.table({"image_id": ["0.png"]}), labels / "images" / "@root-00002.parquet")
    with pytest.raises(DamagedFile, match=r"@root-00002\.parquet cannot be read: it has no column key"):
        list(read_chunks(str(labels)))


def test_files_that_do_not_belong_together_are_an_error(labels: Path) -> None:
    (labels / "images" / "@root-00001.parquet").write_bytes((labels / "images" / "@root-00000.parquet").read_bytes())
    with pytest.raises(DamagedFile, match=r"annotations/@root-00001\.parquet .* mask 0 of '2\.png': its image is not"):
        list(read_chunks(str(labels)))
