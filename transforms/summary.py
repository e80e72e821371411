"""Summarize: the totals of a run, with the chunks of earlier starts, as summary.json."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterable, Iterator
from typing import IO, Any

import apache_beam as beam
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from transforms.records import ChunkReport, Totals
from transforms.source import describe_error
from transforms.write import check_run, delete_file, delete_temporary

SUMMARY_FILE = "summary.json"


def sum_totals(totals: Iterable[Totals]) -> Totals:
    """Adds up totals."""
    return sum(totals, Totals())


def write_json(path: str, content: dict[str, Any]) -> None:
    """Writes a JSON file on any Beam file system, replacing it as a whole."""
    try:
        with replace_file(path) as file:
            file.write(json.dumps(content, indent=2, sort_keys=True).encode() + b"\n")
    except Exception as error:
        raise OSError(f"cannot write {path}: {describe_error(error)}") from error


@contextlib.contextmanager
def replace_file(path: str) -> Iterator[IO[bytes]]:
    """A file to write, on any Beam file system, that gets its name when all is written, and else is deleted."""
    temporary = f"{path}.{uuid.uuid4().hex}"
    try:
        with FileSystems.create(temporary, compression_type=CompressionTypes.UNCOMPRESSED) as file:
            yield file
        FileSystems.rename([temporary], [path])
    except BaseException:
        with contextlib.suppress(Exception):  # it may never have been there
            delete_file(temporary)
        raise


def read_json(path: str) -> dict[str, Any]:
    """Reads a JSON file from any Beam file system."""
    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        return json.loads(file.read())


def write_summary(totals: Totals, output: str, run: dict[str, Any]) -> Totals:
    """Ends a run that went well: summary.json is there and nothing temporary of any start is left.

    Raises:
      RunReplaced: the directory belongs to another run by now.
    """
    check_run(output, run)
    write_json(FileSystems.join(output, SUMMARY_FILE), {**totals.to_dict(), "versions": run["versions"]})
    delete_temporary(output)
    return totals


class Summarize(beam.PTransform):
    """(PCollection[ChunkReport] of this start, of earlier ones) -> PCollection[Totals], one element."""

    def __init__(self, output: str, run: dict[str, Any]) -> None:
        super().__init__()
        self.output = output
        self.run = run

    def expand(self, reports: tuple[beam.PCollection, beam.PCollection]) -> beam.PCollection:
        return (
            reports
            | beam.Flatten()
            | beam.Map(_totals_of).with_output_types(Totals)
            | beam.CombineGlobally(sum_totals)
            | beam.Map(write_summary, output=self.output, run=self.run)
        )


def _totals_of(report: ChunkReport) -> Totals:
    return report.totals
