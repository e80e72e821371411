"""Commits a chunk to a directory of labels.

A chunk is two files, or three with its candidates. They are built in memory, written under _tmp, then renamed, images
last: the images file is the commit mark, and a reader never sees half a chunk. What is committed for this run stays:
a second attempt finds it and throws its own files away.

No more is asked of a file system than that a file appears as a whole. Local ones rename at once; object stores copy,
then delete, and each copy appears as a whole. Nor may it matter who else is at work, since a runner may do a chunk
twice at the same time by itself: temporary files have names of their own, a commit that lost them to another start's
cleaning is done again, and a start commits nothing into a directory that another one has taken for another run. Until
the images file is there, attempts may replace each other's annotations and candidates: those files hold nothing that
differs between attempts, such as the time it took.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.files.beam_files import CompressionTypes, FileSystems
from maskbeam.transforms.files.outage import StoreUnavailable
from maskbeam.transforms.files.parquet_file import open_parquet
from maskbeam.transforms.files.storage import delete_file, delete_files, escape_glob
from maskbeam.transforms.files.streams import RETRY_SECONDS
from maskbeam.transforms.files.systems import is_local, open_path
from maskbeam.transforms.labels.layout import (
    ANNOTATIONS_DIR,
    CANDIDATES_DIR,
    IMAGES_DIR,
    RUN_FILE,
    TEMPORARY_DIR,
    ChunkKey,
)
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.labels.schema import chunk_to_candidates, chunk_to_tables, report_from_metadata, with_report
from maskbeam.transforms.records import ChunkReport, LabeledChunk, Seconds


class RunReplaced(RuntimeError):
    """The output directory belongs to another run by now."""


Tables = tuple[pa.Table, pa.Table]


def commit_chunk(
    chunk: LabeledChunk, output: str, run: Run, extend: Callable[[Tables], Tables] = lambda tables: tables
) -> ChunkReport:
    """Writes a chunk's files and makes them visible, images last: the one writer of labels.

    Args:
      output: directory of the labels.
      run: goes into the files' metadata.
      extend: adds columns of its own to the annotations and images tables.

    Returns:
      the report of the committed chunk, which an earlier attempt may have committed.

    Raises:
      OSError: the last try failed, whatever the file system itself raised.
      RunReplaced: the directory belongs to another run by now.
    """
    start = time.perf_counter()
    key = ChunkKey(chunk.shard, chunk.index, chunk.generation)
    report = ChunkReport(
        key.shard,
        key.index,
        chunk.final,
        chunk.digest,
        chunk.source,
        totals=chunk.totals(),
        run_id=run.id,
        generation=key.generation,
    )
    annotations, images = extend(chunk_to_tables(chunk, report, run))
    tables = {ANNOTATIONS_DIR: annotations, IMAGES_DIR: images}
    if chunk.keep_candidates:
        tables[CANDIDATES_DIR] = chunk_to_candidates(chunk, report, run)
    report = commit_tables(tables, key.file_name, output, run)
    seconds = report.totals.seconds + Seconds(write=time.perf_counter() - start)
    return replace(report, totals=replace(report.totals, seconds=seconds))


def commit_tables(tables: dict[str, pa.Table], name: str, output: str, run: Run) -> ChunkReport:
    """Writes the tables of a chunk and makes them visible, images last; what fails is tried three times.

    Args:
      tables: by their directories, IMAGES_DIR among them.
      name: of the files, from chunk_name.
      output: directory of the labels.

    Returns:
      the report of the committed chunk, which an earlier attempt may have committed.

    Raises:
      RunReplaced: see check_run.
      StoreUnavailable: the output's store has not answered for too long.
      OSError: it cannot be written.
    """
    files = {directory: encode_table(table) for directory, table in tables.items() if directory != IMAGES_DIR}
    sizes = {directory: len(data) for directory, data in files.items()}
    images = tables[IMAGES_DIR]
    report = replace(report_from_metadata(images.schema.metadata), siblings=sizes)
    files[IMAGES_DIR] = encode_table(with_report(images, report))  # the last to be published
    for seconds in RETRY_SECONDS:
        try:
            return _commit_files(files, name, output, run, report)
        except (RunReplaced, StoreUnavailable):
            raise
        except Exception:
            time.sleep(seconds)
    try:
        return _commit_files(files, name, output, run, report)
    except (RunReplaced, StoreUnavailable):
        raise
    except Exception as error:
        raise OSError(
            f"cannot write the chunk {name} to {output}, tried {len(RETRY_SECONDS) + 1} times: {describe_error(error)}"
        ) from error


def _commit_files(files: dict[str, bytes], name: str, output: str, run: Run, report: ChunkReport) -> ChunkReport:
    """One try."""
    attempt = uuid.uuid4().hex
    temporaries = {
        directory: FileSystems.join(output, TEMPORARY_DIR, f"{attempt}-{directory}-{name}") for directory in files
    }
    published = False
    try:
        for directory, temporary in temporaries.items():
            _write_file(temporary, files[directory])
            _make_dirs(FileSystems.join(output, directory))
        check_run(output, run)
        mark = FileSystems.join(output, IMAGES_DIR, name)
        if FileSystems.exists(mark):
            if committed := _committed_before(mark, report):
                return committed
            delete_files([mark])  # of an earlier run, or damaged: it is no mark while the other files change
        for directory, temporary in temporaries.items():
            if directory != IMAGES_DIR:
                FileSystems.rename([temporary], [FileSystems.join(output, directory, name)])
        published = _publish_mark(temporaries[IMAGES_DIR], mark)
        if published:
            return report
        if committed := _committed_before(mark, report):
            return committed
        raise OSError(f"{mark} was written by another run at the same moment")
    finally:
        if not published:
            for temporary in temporaries.values():
                with contextlib.suppress(Exception):  # it may never have been there
                    delete_file(temporary)


def _committed_before(mark: str, report: ChunkReport) -> ChunkReport | None:
    """The report in an images file, if the chunk is committed for this run already, with all its files."""
    found = read_report_file(mark)
    if found is None or (found.run_id, found.digest) != (report.run_id, report.digest):
        return None
    directory, name = FileSystems.split(mark)
    output, _ = FileSystems.split(directory)
    for sibling, num_bytes in (found.siblings or {}).items():
        path = FileSystems.join(output, sibling, name)
        (match,) = FileSystems.match([escape_glob(path)])
        if [file.size_in_bytes for file in match.metadata_list] != [num_bytes]:
            return None
    return found


def _publish_mark(temporary: str, mark: str) -> bool:
    """Gives an images file its name, unless there is one of this name: False.

    Local disks do both in one step. Others are asked first: an attempt that commits in between is replaced by an equal.
    """
    if is_local(mark):
        try:
            os.link(temporary, mark)
        except FileExistsError:
            return False
        except OSError:  # a disk without hard links
            pass
        else:
            delete_file(temporary)
            return True
    if FileSystems.exists(mark):
        return False
    FileSystems.rename([temporary], [mark])
    return True


def read_report_file(path: str) -> ChunkReport | None:
    """The report in an images file, None if the file is damaged or gone; only its footer is read."""
    try:
        with open_path(path) as file:
            return report_from_metadata(open_parquet(file).schema_arrow.metadata)
    except (ValueError, KeyError, TypeError):  # pyarrow's errors of broken files are ValueErrors, too
        return None
    except Exception:  # each file system has an error of its own for this
        if FileSystems.exists(path):
            raise
        return None


def check_run(output: str, run: Run) -> None:
    """Checks that the output directory still belongs to this run.

    It is asked right before a chunk becomes visible. A chunk that passes just before the directory is taken is late by
    a few requests; the new run does it again, since it goes by the id in the report.

    Args:
      output: directory of the labels.
      run: without an id, nothing is checked.

    Raises:
      RunReplaced: it belongs to another one, or was deleted.
    """
    if run.id is None:
        return
    path = FileSystems.join(output, RUN_FILE)
    try:
        with open_path(path) as file:
            found = json.loads(file.read())
    except Exception as error:
        if FileSystems.exists(path):
            raise
        raise RunReplaced(
            f"{path} is gone: somebody deleted or moved the output while labels were written to it."
        ) from error
    if found.get("id") != run.id:
        raise RunReplaced(
            f"{output} belongs to another run since: a later start has replaced {RUN_FILE}, with --overwrite or before "
            "anything was labeled. This start commits nothing more. Choose another --output for one of the two."
        )
    if found.get("manifest") != run.manifest:
        raise RunReplaced(
            f"another start goes on with {output}: it saw other input files than this one, or was to retry failed "
            "images. This start commits nothing more. What it has committed stays."
        )


def encode_table(table: pa.Table) -> bytes:
    """A table as a Parquet file, with checksums of its pages."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd", write_page_checksum=True) as writer:
        if table.num_rows:  # Hugging Face datasets fails on an empty row group, but not on none
            writer.write_table(table)
    return buffer.getvalue()


def _write_file(path: str, data: bytes) -> None:
    with FileSystems.create(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        file.write(data)


def _make_dirs(path: str) -> None:
    with contextlib.suppress(OSError):  # Beam's file systems raise if it exists; a real fault shows at the rename
        FileSystems.mkdirs(path)
