"""ReadChunks: the chunks of the shards that no earlier start has committed, and the reports of those that one has."""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from maskbeam.transforms.files.beam_files import FileSystems
from maskbeam.transforms.files.parquet_file import open_parquet
from maskbeam.transforms.files.systems import open_path
from maskbeam.transforms.labels.commit import read_report_file
from maskbeam.transforms.labels.layout import IMAGES_DIR, ChunkKey, TableFiles, chunk_name
from maskbeam.transforms.labels.schema import report_from_metadata
from maskbeam.transforms.records import ChunkReport, Shard

# Files of committed chunks that are read at the same time: on object stores it is waiting that takes the time.
_THREADS = 16


class InputChanged(RuntimeError):
    """The input is not what it was when it was labeled, in a way that needs a word from the user."""


@dataclass(frozen=True)
class CommittedChunk:
    """A committed chunk whose files are whole.

    Attributes:
      key: which one.
      report: of it.
      failed: ids of its failed images.
    """

    key: ChunkKey
    report: ChunkReport
    failed: frozenset[str]


def read_committed(
    output: str, tables: TableFiles, run_id: str | None, keep_candidates: bool = False
) -> dict[ChunkKey, CommittedChunk]:
    """Checks the chunks that are committed for a run; those that are damaged, or of another run, are left out.

    Each images file is read as a whole and its checksums are compared; of the files beside it, the sizes.

    Args:
      tables: what list_tables gave.
      run_id: of the run.
      keep_candidates: whether the candidates file is one of a chunk's.
    """

    def read(key: ChunkKey) -> CommittedChunk | None:
        found = _read_checked(output, key)
        if found is None:
            return None
        report, images = found
        status = zip(images["image_id"].to_pylist(), images["status"].to_pylist(), strict=True)
        failed = frozenset(image_id for image_id, status in status if status == "failed")
        counted = (images.num_rows, len(failed)) == (report.totals.images, report.totals.failed)
        sizes = {directory: tables.num_bytes[directory].get(key) for directory in report.siblings or {}}
        whole = sizes == (report.siblings or {})
        return CommittedChunk(key, report, failed) if counted and whole and report.run_id == run_id else None

    with ThreadPoolExecutor(_THREADS) as threads:
        chunks = threads.map(read, tables.committed(keep_candidates))
        return {chunk.key: chunk for chunk in chunks if chunk is not None}


def read_image_rows(output: str, key: ChunkKey) -> list[dict[str, Any]]:
    """What tells whether the images of a committed chunk are those of its source, in their order."""
    found = _read_checked(output, key)
    if found is None:
        raise OSError(f"{FileSystems.join(output, IMAGES_DIR, key.file_name)} was damaged a moment ago. Start again.")
    return found[1].to_pylist()


def _read_checked(output: str, key: ChunkKey) -> tuple[ChunkReport, pa.Table] | None:
    """The report and some columns of an images file; None if it is damaged, gone, or has another chunk's name."""
    path = FileSystems.join(output, IMAGES_DIR, key.file_name)
    try:
        with open_path(path) as file:
            data = file.read()
    except Exception:  # each file system has an error of its own for this
        if FileSystems.exists(path):
            raise
        return None
    try:
        table = open_parquet(io.BytesIO(data)).read(use_threads=False)
        report = report_from_metadata(table.schema.metadata)
        images = table.select(["image_id", "row", "sha256", "key", "file_name", "status"])
    except (ValueError, KeyError, TypeError, OSError, pa.ArrowException):  # what pyarrow raises for broken files
        return None
    return (report, images) if ChunkKey(report.shard, report.index, report.generation) == key else None


def read_report(output: str, shard: str, index: int, generation: int = 0) -> ChunkReport | None:
    """The report in a committed chunk's images file, None if the file is damaged; only its footer is read.

    None, too, if the file is gone: another start is at work in the directory, and has just taken it away.
    """
    return read_report_file(FileSystems.join(output, IMAGES_DIR, chunk_name(shard, index, generation)))


def finished_reports(
    shard: Shard, committed: Iterable[ChunkKey], output: str, run_id: str | None = None
) -> list[ChunkReport]:
    """The reports of the shard's chunks that need not be done again.

    Args:
      committed: of the shard.
      output: directory of the labels.
      run_id: of the run; a start of an earlier one may have committed a last chunk after the directory was taken.
    """
    wanted = [key for key in committed if key.generation == shard.generation_of(key.index)]
    if shard.format == "image":  # such a Shard is one chunk of its directory
        wanted = [key for key in wanted if key.index == shard.first_chunk]
    found = [read_report(output, key.shard, key.index, key.generation) for key in wanted]
    return [report for report in found if report and (report.run_id, report.digest) == (run_id, shard.digest)]


def is_finished(reports: Iterable[ChunkReport], first_chunk: int = 0) -> bool:
    """Whether these are the reports of all chunks of a shard."""
    finished = {report.index: report.final for report in reports}
    final = next((index for index, final in finished.items() if final), None)
    return final is not None and finished.keys() >= set(range(first_chunk, final + 1))
