"""Parquet is read without Arrow's threads, which may outlive the interpreter and then end the process with code 134."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskbeam.transforms.files import parquet_file
from maskbeam.transforms.files.parquet_file import checked_row_groups
from maskbeam.transforms.files.parquet_footer import read_footer, read_pages, row_groups
from tests.conftest import label

ROOT = Path(__file__).parents[3]

# Counts the threads of a process before and after it read all tables of some labels and an input shard.
_COUNT_THREADS = """
import os, sys
from maskbeam.transforms.masks.amg import AmgConfig
from maskbeam.transforms.labels.tables import list_chunks, read_candidates, read_chunk, read_image_ids
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.readers.shard import read_images
from maskbeam.transforms.records import Shard, SourceFile
from maskbeam.transforms.labels.refine import COLUMNS
from maskbeam.transforms.labels.resume import read_report

def threads():
    return set(os.listdir("/proc/self/task"))

labels, shard = sys.argv[1:]
settings = AmgConfig(points_per_side=4, pred_iou_thresh=0.75, stability_score_thresh=0.85, keep_candidates=True)
before = threads()
for chunk in list_chunks(labels):
    images = read_chunk(labels, chunk).images
    read_report(labels, chunk.shard, chunk.index)
    read_candidates(labels, chunk, images, COLUMNS, settings)
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
    assert (found.returncode, found.stderr) == (0, ""), found.stderr


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


# Pages.


def file_of(columns: dict[str, Any], **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"compression": "zstd", "use_dictionary": False},
    {"compression": "gzip", "data_page_version": "2.0"},
    {"compression": "none", "row_group_size": 7},
    {"write_page_index": True, "write_page_checksum": True},
    {"data_page_size": 1000, "write_batch_size": 2, "max_rows_per_page": 2},
]
IMAGES = [np.random.default_rng(number).bytes(3000) for number in range(30)]
COLUMNS = {
    "image": [{"bytes": image, "path": "p", "boxes": [1, 2]} for image in IMAGES],
    "none": pa.nulls(30, pa.string()),
    "number": range(30),
    "truth": [True] * 30,
}


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_columns_and_pages_are_found_where_arrow_finds_them(options: dict[str, Any]) -> None:
    file = file_of(COLUMNS, **options)
    metadata = pq.ParquetFile(file).metadata
    groups = list(row_groups(read_footer(file)))
    assert len(groups) == metadata.num_row_groups
    for index, group in enumerate(groups):
        for number, chunk in enumerate(group):
            column = metadata.row_group(index).column(number)
            start = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
            assert (".".join(chunk.path), chunk.start, chunk.num_bytes, chunk.num_values) == (
                column.path_in_schema,
                start,
                column.total_compressed_size,
                column.num_values,
            )
            pages = list(read_pages(file, chunk))
            assert sum(page.header_bytes + page.compressed_bytes for page in pages) == chunk.num_bytes
            assert sum(page.num_values for page in pages) == chunk.num_values
            assert sum(page.header_bytes + page.num_bytes for page in pages) == column.total_uncompressed_size
    list(checked_row_groups(file, {"image.bytes", "image.path", "image.boxes.list.element", "none", "number", "truth"}))


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("compression", ["zstd", "gzip", "brotli", "lz4", "snappy"])
def test_a_page_that_inflates_is_refused_by_its_header(
    compression: str, dictionary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_of({"image": [bytes(10**6)], "other": ["x"]}, compression=compression, use_dictionary=dictionary)
    monkeypatch.setattr(parquet_file, "FREE_PAGE_BYTES", 10**5)
    with pytest.raises(ValueError, match=r"row group 0 inflate from \d+ to 10\d{5} bytes: a decompression bomb"):
        list(checked_row_groups(file, {"image"}))
    list(checked_row_groups(file, {"other"}))
    monkeypatch.setattr(parquet_file, "FREE_PAGE_BYTES", 11 * 10**5)
    list(checked_row_groups(file, {"image"}))


def test_images_that_do_not_compress_may_fill_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_file, "FREE_PAGE_BYTES", 0)
    list(checked_row_groups(file_of({"image": IMAGES}), {"image"}))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_is_a_sentence(changes: list[tuple[float, int]]) -> None:
    data = bytearray(file_of({"image": IMAGES[:3]}).getvalue())
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    with contextlib.suppress(ValueError):
        list(checked_row_groups(io.BytesIO(data), {"image"}))
