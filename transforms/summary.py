"""Summarize: the totals of a run, with the chunks of earlier starts, as summary.json."""

from __future__ import annotations

import codecs
import contextlib
import json
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import IO, Any

import apache_beam as beam
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from transforms.records import ChunkReport, Totals
from transforms.source import describe_error, read_up_to
from transforms.strict_json import parse_json
from transforms.write import check_run, delete_file, delete_temporary

SUMMARY_FILE = "summary.json"

# Of run.json, summary.json and the like. What an imported file had beside its annotations is in one, too.
MAX_JSON_BYTES = 2**26
_HEAD_BYTES = 2**10


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


def read_json(path: str) -> Any:
    """Reads a JSON file of ours from any Beam file system.

    Raises:
      ValueError: it is not JSON, or too large; says what is wrong in a few words, to stand after the path.
      OSError: it cannot be read.
    """
    return parse_json(read_json_bytes(path, MAX_JSON_BYTES))


def read_json_bytes(path: str, max_bytes: int) -> bytes:
    """All of a JSON file on any Beam file system. What cannot be one is not read to its end.

    Raises:
      ValueError: it begins like no JSON object or list, or is larger than max_bytes.
      OSError: it cannot be read.
    """
    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        data = read_up_to(file, _HEAD_BYTES)
        if not data.removeprefix(codecs.BOM_UTF8).lstrip().startswith((b"{", b"[")):
            raise ValueError(f"it is not JSON: it begins with {data[:20]!r}, not with {{ or [")
        data += read_up_to(file, max_bytes + 1 - len(data))
    if len(data) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes} bytes, and would take a lot of memory. Split it")
    return data


def write_summary(totals: Totals, output: str, run: dict[str, Any]) -> Totals:
    """Ends a run that went well: summary.json is there and nothing temporary of any start is left.

    Raises:
      RunReplaced: the directory belongs to another run by now.
    """
    check_run(output, run)
    about = {"model": run.get("model"), "versions": run["versions"]}
    write_json(FileSystems.join(output, SUMMARY_FILE), {**totals.to_dict(), **about})
    delete_temporary(output)
    return totals


def read_totals(output: str) -> Totals:
    """The totals of a run that ended well, of its summary.json."""
    content = read_json(FileSystems.join(output, SUMMARY_FILE))
    return Totals.from_dict({field.name: content[field.name] for field in fields(Totals)})


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
