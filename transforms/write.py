"""WriteParquet: commits a chunk.

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
import re
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics

from transforms.outage import StoreUnavailable
from transforms.parquet_file import open_parquet
from transforms.records import ChunkReport, LabeledChunk, Seconds, Totals
from transforms.schema import RUN_KEY, chunk_to_candidates, chunk_to_tables, report_from_metadata, with_report
from transforms.source import RETRY_SECONDS, describe_error

RUN_FILE = "run.json"
ANNOTATIONS_DIR = "annotations"
CANDIDATES_DIR = "candidates"
IMAGES_DIR = "images"
TEMPORARY_DIR = "_tmp"

# What starts leave in TEMPORARY_DIR until they are done: tables to commit, and their notes (pipeline/starts.py).
_TEMPORARY_NAME = re.compile(
    rf"[0-9a-f]{{32}}-({ANNOTATIONS_DIR}|{CANDIDATES_DIR}|{IMAGES_DIR})-.+|[0-9a-f]{{32}}\.start\.json(\.[0-9a-f]{{32}})?",
    re.DOTALL,
)

# Footers that are read at the same time: on object stores it is waiting that takes the time.
_FOOTER_THREADS = 16

# Of the counters and distributions.
METRICS_NAMESPACE = "maskbeam"

# A run is judged by its failures only after this many images (of one process).
_MIN_IMAGES_TO_JUDGE = 100


@dataclass(frozen=True)
class OutputConfig:
    """Where the labels go.

    Attributes:
      output: directory of the labels, on any Beam file system.
      overwrite: delete the labels that an earlier run left in output and start anew.
      retry_failed: label the images again that failed in an earlier start, of shards their chunks.
      accept_changed: label changed shards again, and let rows go whose photos a changed input no longer has.
      max_failed_fraction: end the run when more than this fraction of the images failed (judged after 100 images of a
        process): a mistake in the input should not become ten million failed rows.
    """

    output: str
    overwrite: bool = False
    retry_failed: bool = False
    accept_changed: bool = False
    max_failed_fraction: float = 0.5

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty; expected a directory.")
        if FileSystems.get_scheme(self.output) is not None and escape_glob(self.output) != self.output:
            raise ValueError(
                f"output is {self.output}, but only local directories may have *, ? or [ in their names: other file "
                "systems would take it for a pattern when files are deleted. Choose another directory."
            )
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"max_failed_fraction must be between 0 and 1, got {self.max_failed_fraction}")


@dataclass(frozen=True, order=True)
class ChunkKey:
    """Which chunk: its shard's name, its index there, and its generation: a higher one replaces the lower ones."""

    shard: str
    index: int
    generation: int = 0

    @property
    def file_name(self) -> str:
        """The name of its files, in all directories."""
        return chunk_name(self.shard, self.index, self.generation)


class TooManyFailures(RuntimeError):
    """More images failed than max_failed_fraction allows."""


class RunReplaced(RuntimeError):
    """The output directory belongs to another run by now."""


def chunk_name(shard: str, index: int, generation: int = 0) -> str:
    """Name of a chunk's files, in all directories.

    >>> chunk_name("train.tar", 7), chunk_name("train.tar", 7, 2)
    ('train.tar-00007.parquet', 'train.tar-00007.2.parquet')
    """
    return f"{shard}-{index:05d}{f'.{generation}' if generation else ''}.parquet"


def parse_chunk_name(name: str) -> ChunkKey | None:
    """Inverse of chunk_name; None for other names."""
    found = re.fullmatch(r"(.+)-(\d{5,})(?:\.([1-9]\d*))?\.parquet", name, re.ASCII | re.DOTALL)
    return ChunkKey(found[1], int(found[2]), int(found[3] or 0)) if found else None


def manifest_path(output: str, manifest: str) -> str:
    """Where a manifest lies, see transforms/manifest.py."""
    return FileSystems.join(output, f"manifest-{manifest}.json")


def commit_chunk(chunk: LabeledChunk, output: str, run: dict[str, Any]) -> ChunkReport:
    """Writes a chunk's files and makes them visible, images last.

    Args:
      output: directory of the labels.
      run: content of run.json; goes into the files' metadata.

    Returns:
      the report of the committed chunk, which an earlier attempt may have committed.

    Raises:
      OSError: the last try failed, whatever the file system itself raised.
      RunReplaced: the directory belongs to another run by now.
    """
    start = time.perf_counter()
    key = ChunkKey(chunk.shard.name, chunk.index, chunk.shard.generation_of(chunk.index))
    report = ChunkReport(
        key.shard,
        key.index,
        chunk.final,
        chunk.digest,
        chunk.shard.source,
        totals=chunk.totals(),
        run_id=run.get("id"),
        generation=key.generation,
    )
    annotations, images = chunk_to_tables(chunk, report, run)
    tables = {ANNOTATIONS_DIR: annotations, IMAGES_DIR: images}
    if chunk.keep_candidates:
        tables[CANDIDATES_DIR] = chunk_to_candidates(chunk, report, run)
    report = commit_tables(tables, key.file_name, output, run)
    seconds = report.totals.seconds + Seconds(write=time.perf_counter() - start)
    return replace(report, totals=replace(report.totals, seconds=seconds))


def commit_tables(tables: dict[str, pa.Table], name: str, output: str, run: dict[str, Any]) -> ChunkReport:
    """Writes the tables of a chunk and makes them visible, images last; what fails is tried three times.

    Args:
      tables: by their directories, IMAGES_DIR among them.
      name: of the files, from chunk_name.
      output: directory of the labels.
      run: content of run.json.

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


def _commit_files(
    files: dict[str, bytes], name: str, output: str, run: dict[str, Any], report: ChunkReport
) -> ChunkReport:
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
    if FileSystems.get_scheme(mark) is None:
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
        with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
            return report_from_metadata(open_parquet(file).schema_arrow.metadata)
    except (ValueError, KeyError, TypeError):  # pyarrow's errors of broken files are ValueErrors, too
        return None
    except Exception:  # each file system has an error of its own for this
        if FileSystems.exists(path):
            raise
        return None


def check_run(output: str, run: dict[str, Any]) -> None:
    """Checks that the output directory still belongs to this run.

    It is asked right before a chunk becomes visible. A chunk that passes just before the directory is taken is late by
    a few requests; the new run does it again, since it goes by the id in the report.

    Args:
      output: directory of the labels.
      run: content of run.json; without an id, nothing is checked.

    Raises:
      RunReplaced: it belongs to another one, or was deleted.
    """
    if "id" not in run:
        return
    path = FileSystems.join(output, RUN_FILE)
    try:
        with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
            found = json.loads(file.read())
    except Exception as error:
        if FileSystems.exists(path):
            raise
        raise RunReplaced(
            f"{path} is gone: somebody deleted or moved the output while labels were written to it."
        ) from error
    if found.get("id") != run["id"]:
        raise RunReplaced(
            f"{output} belongs to another run since: a later start has replaced {RUN_FILE}, with --overwrite or before "
            "anything was labeled. This start commits nothing more. Choose another --output for one of the two."
        )
    if found.get("manifest") != run.get("manifest"):
        raise RunReplaced(
            f"another start goes on with {output}: it saw other input files than this one, or was to retry failed "
            "images. This start commits nothing more. What it has committed stays."
        )


def delete_file(path: str) -> None:
    """Deletes a file, if it is there, on any file system."""
    delete_files([path] if FileSystems.exists(path) else [])


def delete_files(paths: list[str]) -> None:
    """Deletes files of one file system that were there a moment ago."""
    if paths and FileSystems.get_scheme(paths[0]) is not None:
        FileSystems.delete(paths)
        return
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)  # Beam would take the name for a pattern


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


def list_tree(path: str) -> list[str]:
    """The files below a directory, on any file system."""
    pattern = FileSystems.join(escape_glob(path), "**")
    return [file.path for match in FileSystems.match([pattern]) for file in match.metadata_list]


def list_directory(path: str) -> list[str]:
    """The files in a directory, without those in folders of it, on any file system."""
    pattern = FileSystems.join(escape_glob(path), "*")
    return [file.path for match in FileSystems.match([pattern]) for file in match.metadata_list]


def delete_temporary(output: str) -> None:
    """Deletes the temporary files of all starts in an output directory, and their folder if nothing else is in it."""
    directory = FileSystems.join(output, TEMPORARY_DIR)
    delete_files([path for path in list_directory(directory) if _TEMPORARY_NAME.fullmatch(FileSystems.split(path)[1])])
    if FileSystems.get_scheme(directory) is None:
        with contextlib.suppress(OSError):  # others' files are in it, or another start adds to it
            os.rmdir(directory)
    elif FileSystems.exists(directory) and not list_tree(directory):  # where directories are more than a prefix
        FileSystems.delete([directory])


def delete_chunks(output: str) -> None:
    """Deletes the files of all chunks in an output directory, images first: a chunk is one as long as it has those.

    Ours is what lies in a folder of ours, is named as a chunk is, and has our key in its footer. A damaged file has no
    footer: it is ours if a file of the same chunk is.
    """
    files = [
        path
        for directory in (IMAGES_DIR, CANDIDATES_DIR, ANNOTATIONS_DIR)
        for path in list_directory(FileSystems.join(output, directory))
        if parse_chunk_name(FileSystems.split(path)[1])
    ]
    with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
        whose = dict(zip(files, threads.map(_is_ours, files), strict=True))
    our_names = {FileSystems.split(path)[1] for path, ours in whose.items() if ours}
    delete_files(
        [path for path, ours in whose.items() if ours or (ours is None and FileSystems.split(path)[1] in our_names)]
    )


def _is_ours(path: str) -> bool | None:
    """Whether a chunk's file was written by this program; None if it is damaged or not Parquet."""
    try:
        with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
            return RUN_KEY in (pq.read_schema(file).metadata or {})
    except pa.ArrowException:
        return None


def escape_glob(path: str) -> str:
    """Makes a path match itself in Beam's patterns, which have no quoting but character classes."""
    # A backslash before the bracket: Python's re warns of a class that begins with one.
    return re.sub(r"[*?[]", lambda found: r"[\[]" if found[0] == "[" else f"[{found[0]}]", path)


class WriteParquet(beam.PTransform):
    """PCollection[LabeledChunk] -> PCollection[ChunkReport], each after its chunk is committed."""

    def __init__(self, config: OutputConfig, run: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.run = run

    def expand(self, chunks: beam.PCollection) -> beam.PCollection:
        return chunks | beam.ParDo(_WriteParquetFn(self.config, self.run)).with_output_types(ChunkReport)


class _WriteParquetFn(beam.DoFn):
    """Commits chunks, counts, and ends the run when too many images fail.

    Its only state is the totals of the images this process has seen.
    """

    def __init__(self, config: OutputConfig, run: dict[str, Any]) -> None:
        self._config = config
        self._run = run
        self._seen = Totals()

    def process(self, chunk: LabeledChunk) -> Iterator[ChunkReport]:
        self._seen += chunk.totals()
        if (
            self._seen.images >= _MIN_IMAGES_TO_JUDGE
            and self._seen.failed > self._config.max_failed_fraction * self._seen.images
        ):
            raise TooManyFailures(
                f"{self._seen.failed} of {self._seen.images} images failed, more than max_failed_fraction "
                f"{self._config.max_failed_fraction} allows; the first: {'; '.join(self._seen.failures[:3])}. "
                "Mend the input, or raise --max_failed_fraction."
            )
        report = commit_chunk(chunk, self._config.output, self._run)
        _count(report.totals)
        yield report


def _count(totals: Totals) -> None:
    """Beam counters and distributions with the figures of the summary."""
    for name in ("images", "labeled", "empty", "failed", "masks", "candidates"):
        Metrics.counter(METRICS_NAMESPACE, name).inc(getattr(totals, name))
    for name, count in vars(totals.dropped).items():
        Metrics.counter(METRICS_NAMESPACE, f"dropped_{name}").inc(count)
    for name, seconds in vars(totals.seconds).items():
        Metrics.distribution(METRICS_NAMESPACE, f"{name}_msec_per_chunk").update(round(1000 * seconds))
