"""ReadChunks: the chunks of the shards that no earlier start has committed, and the reports of those that one has."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterator

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems

from transforms.read import ReadConfig, chunk_digest, read_chunks
from transforms.records import Chunk, ChunkReport, Shard
from transforms.write import (
    ANNOTATIONS_DIR,
    CANDIDATES_DIR,
    IMAGES_DIR,
    OutputConfig,
    chunk_name,
    escape_glob,
    parse_chunk_name,
    read_report_file,
)

FINISHED = "finished"


class InputChanged(RuntimeError):
    """A shard is not what it was when some of its chunks were labeled."""


def committed_chunks(output: str, keep_candidates: bool = False) -> dict[str, list[int]]:
    """The indices of the committed chunks of each shard, ascending: those that have all their files.

    Args:
      output: directory of the labels.
      keep_candidates: whether the candidates file is one of them.
    """
    found: dict[str, list[int]] = {}
    names = _file_names(output, IMAGES_DIR) & _file_names(output, ANNOTATIONS_DIR)
    if keep_candidates:
        names &= _file_names(output, CANDIDATES_DIR)
    for name in sorted(names):
        if parsed := parse_chunk_name(name):  # people put other files there
            found.setdefault(parsed[0], []).append(parsed[1])
    return {shard: sorted(indices) for shard, indices in found.items()}


def _file_names(output: str, directory: str) -> set[str]:
    pattern = FileSystems.join(escape_glob(output), directory, "*.parquet")
    return {FileSystems.split(file.path)[1] for match in FileSystems.match([pattern]) for file in match.metadata_list}


def check_directories(committed: dict[str, list[int]], shards: Collection[Shard]) -> None:
    """A directory that lost files at its end has fewer chunks than were labeled: no Shard is left to notice that.

    Raises:
      InputChanged
    """
    last = {shard.name: shard for shard in shards if shard.format == "image"}  # in the order of their chunks
    for name, shard in last.items():
        if committed.get(name, [-1])[-1] > shard.first_chunk:
            raise InputChanged(
                f"{shard.path} has fewer files than when it was labeled: it had {committed[name][-1] + 1} chunks, now "
                f"{shard.first_chunk + 1}. Restore them, label into another --output, or start anew with --overwrite."
            )


def count_orphans(committed: dict[str, list[int]], shards: Collection[Shard]) -> int:
    """How many committed chunks are of inputs that are no longer there; their rows stay, and no summary counts them."""
    loose = {(shard.name, shard.first_chunk) for shard in shards if shard.format == "image"}
    containers = {shard.name for shard in shards if shard.format != "image"}
    return sum(
        name not in containers and (name, index) not in loose
        for name, indices in committed.items()
        for index in indices
    )


def read_report(output: str, shard: str, index: int) -> ChunkReport | None:
    """The report in a committed chunk's images file, None if the file is damaged; only its footer is read.

    None, too, if the file is gone: another start is at work in the directory, and has just taken it away.
    """
    return read_report_file(FileSystems.join(output, IMAGES_DIR, chunk_name(shard, index)))


def finished_reports(
    shard: Shard, root: str, committed: list[int], config: OutputConfig, run_id: str | None = None
) -> list[ChunkReport]:
    """The reports of the shard's chunks that need not be done again.

    Args:
      committed: indices of the shard's committed chunks, ascending.
      run_id: of the run; a start of an earlier one may have committed a last chunk after the directory was taken.

    Raises:
      InputChanged: the shard changed since.
    """
    if shard.format == "image":  # such a Shard is one chunk of its directory, which may have a hundred thousand
        place = bisect.bisect_left(committed, shard.first_chunk)
        committed = [index for index in committed[place : place + 1] if index == shard.first_chunk]
    found = [read_report(config.output, shard.name, index) for index in committed]
    reports = [report for report in found if report is not None and report.run_id == run_id]
    for report in reports:
        if report.digest != chunk_digest(shard, root):
            change = f"it was {report.source}, now it is {shard.source}"
            if report.source == shard.source:
                change = f"its files ({shard.source}) have other names or other sizes"
            raise InputChanged(
                f"{shard.path} changed since its chunk {report.index} was labeled: {change}. Its labels would be of "
                "two versions. Restore it, or label into another --output, or start anew with --overwrite."
            )
    if config.retry_failed:
        reports = [report for report in reports if not report.totals.failed]
    return reports


def read_unfinished(
    shard: Shard, config: ReadConfig, chunk_size: int, root: str, reports: list[ChunkReport]
) -> Iterator[Chunk]:
    """The chunks of a shard that are not among the finished ones; a finished shard is not opened at all."""
    finished = {report.index for report in reports}
    final = next((report.index for report in reports if report.final), None)
    if final is not None and finished >= set(range(shard.first_chunk, final + 1)):
        return
    yield from read_chunks(shard, config, root, chunk_size, finished)


class ReadChunks(beam.PTransform):
    """PCollection[Shard] -> PCollection[Chunk] to do, PCollection[ChunkReport] of those that are done."""

    def __init__(
        self,
        config: ReadConfig,
        chunk_size: int,
        root: str,
        output: OutputConfig,
        run_id: str | None = None,
        keep_candidates: bool = False,
    ) -> None:
        super().__init__()
        self._arguments = (config, chunk_size, root, output, run_id, keep_candidates)

    def expand(self, shards: beam.PCollection) -> tuple[beam.PCollection, beam.PCollection]:
        outputs = shards | beam.ParDo(_ReadChunksFn(*self._arguments)).with_outputs(FINISHED, main="chunks")
        return outputs["chunks"], outputs[FINISHED]


class _ReadChunksFn(beam.DoFn):
    """Lists the committed chunks once a worker, instead of once a shard."""

    def __init__(
        self,
        config: ReadConfig,
        chunk_size: int,
        root: str,
        output: OutputConfig,
        run_id: str | None,
        keep_candidates: bool,
    ) -> None:
        self._config = config
        self._chunk_size = chunk_size
        self._root = root
        self._output = output
        self._keep_candidates = keep_candidates
        self._run_id = run_id

    def setup(self) -> None:
        self._committed = committed_chunks(self._output.output, self._keep_candidates)

    def process(self, shard: Shard) -> Iterator[Chunk | beam.pvalue.TaggedOutput]:
        committed = self._committed.get(shard.name, [])
        reports = finished_reports(shard, self._root, committed, self._output, self._run_id)
        for report in reports:
            yield beam.pvalue.TaggedOutput(FINISHED, report)
        yield from read_unfinished(shard, self._config, self._chunk_size, self._root, reports)
