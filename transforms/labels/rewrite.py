"""Tidying up an output: chunks without the rows of photos that are gone, and the end of chunks that do not count.

A rewritten chunk is a new one of a higher generation: its images file makes it the chunk in one step, and the files of
the lower generation go afterwards. Whoever is killed in between leaves files that do not count, and the next start
deletes them.
"""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import replace

import pyarrow as pa

from maskbeam.transforms.files.beam_files import FileSystems
from maskbeam.transforms.files.parquet_file import open_parquet
from maskbeam.transforms.files.paths import relative_path
from maskbeam.transforms.files.storage import delete_files
from maskbeam.transforms.files.systems import open_path
from maskbeam.transforms.labels.commit import check_run, commit_tables, read_report_file
from maskbeam.transforms.labels.layout import ANNOTATIONS_DIR, IMAGES_DIR, ChunkKey, TableFiles, chunk_name
from maskbeam.transforms.labels.manifest import Manifest
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.labels.schema import row_to_dropped, with_report
from maskbeam.transforms.records import MAX_FAILURES_SHOWN, ChunkReport, Dropped, Shard, Totals, escape_name


def rewrite_chunk(output: str, source: ChunkKey, report: ChunkReport, entry: Shard, root: str, run: Run) -> ChunkReport:
    """Commits a chunk of loose files with those rows of an earlier generation whose files it still has.

    Args:
      source: the chunk to copy from.
      report: of it.
      entry: the new chunk.
      root: directory that image ids are relative to.

    Raises:
      RunReplaced: another start goes on with the output.
      OSError: it cannot be read or written.
    """
    kept = {escape_name(relative_path(file.path, root)) for file in entry.files}
    tables = {}
    for directory in (IMAGES_DIR, *(report.siblings or {ANNOTATIONS_DIR: 0})):
        table = _read_table(FileSystems.join(output, directory, source.file_name))
        tables[directory] = table.filter(pa.array([name in kept for name in table["image_id"].to_pylist()], pa.bool_()))
    new = replace(
        report,
        digest=entry.digest,
        source=entry.source,
        totals=_totals(tables[IMAGES_DIR], report.totals, entry),
        run_id=run.id,
        generation=entry.generation,
        siblings=None,
    )
    for directory, table in tables.items():
        told = new if directory == IMAGES_DIR else replace(new, totals=Totals())
        tables[directory] = with_report(table, told)
    name = chunk_name(entry.name, entry.first_chunk, entry.generation)
    return commit_tables(tables, name, output, run)


def _totals(images: pa.Table, before: Totals, entry: Shard) -> Totals:
    """Sums over the rows that are left. The seconds stay those of the labeling, of which no share is known."""
    rows = images.to_pylist()
    status = [row["status"] for row in rows]
    return Totals(
        images=len(rows),
        encoded_bytes=entry.num_bytes,
        labeled=status.count("labeled"),
        empty=status.count("empty"),
        failed=status.count("failed"),
        masks=sum(row["num_masks"] for row in rows),
        candidates=sum(row["num_candidates"] for row in rows),
        dropped=sum(map(row_to_dropped, rows), Dropped()),
        seconds=before.seconds,
        chunks=1,
        failures=tuple(
            f"{row['image_id']}: {row['error_stage']}: {row['error']}" for row in rows if row["status"] == "failed"
        )[:MAX_FAILURES_SHOWN],
    )


def _read_table(path: str) -> pa.Table:
    with open_path(path) as file:
        data = file.read()
    try:
        return open_parquet(io.BytesIO(data)).read(use_threads=False)
    except (ValueError, pa.ArrowException) as error:
        raise OSError(
            f"{path} is damaged: {str(error).partition(chr(10))[0]}. Delete it, and run the same command to go on."
        ) from error


def delete_leftovers(
    output: str, manifest: Manifest, tables: TableFiles, committed: Collection[ChunkKey], run: Run
) -> None:
    """Deletes the chunks that do not count: replaced ones, and those of files that are gone.

    What a start that goes by the manifest may be writing at this moment is not among them. A file of a name that the
    manifest does not know goes only if this program wrote it.

    Args:
      tables: the files in output.
      committed: the chunks among them that are whole.

    Raises:
      RunReplaced: another start goes on with the output.
    """
    counting = set(manifest.counting(committed))
    paths = []
    for directory, found in tables.num_bytes.items():  # images first: a chunk is one as long as it has its images file
        for key in found:
            path = FileSystems.join(output, directory, key.file_name)
            if key not in counting and not manifest.awaits(key) and (manifest.knows(key) or _is_ours(path)):
                paths.append(path)
    if paths:
        check_run(output, run)
        delete_files(paths)


def _is_ours(path: str) -> bool:
    return read_report_file(path) is not None
