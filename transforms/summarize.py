"""Summarize: the totals of a run, with the chunks of earlier starts, as summary.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import apache_beam as beam

from maskbeam.transforms.files.beam_files import FileSystems
from maskbeam.transforms.files.storage import read_json, write_json
from maskbeam.transforms.labels.clear import delete_temporary
from maskbeam.transforms.labels.commit import check_run
from maskbeam.transforms.labels.layout import SUMMARY_FILE
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.records import ChunkReport, Totals


def sum_totals(totals: Iterable[Totals]) -> Totals:
    """Adds up totals."""
    return sum(totals, Totals())


def write_summary(totals: Totals, output: str, run: Run) -> Totals:
    """Ends a run that went well: summary.json is there and nothing temporary of any start is left.

    Raises:
      RunReplaced: the directory belongs to another run by now.
    """
    check_run(output, run)
    about = {"model": run.model, "versions": run.versions}
    write_json(FileSystems.join(output, SUMMARY_FILE), {**totals.to_dict(), **about})
    delete_temporary(output)
    return totals


def read_totals(output: str) -> Totals:
    """The totals of a run that ended well, of its summary.json."""
    content = read_json(FileSystems.join(output, SUMMARY_FILE))
    return Totals.from_dict({field.name: content[field.name] for field in fields(Totals) if field.name in content})


@dataclass(eq=False, repr=False)
class Summarize(beam.PTransform):
    """(PCollection[ChunkReport] of this start, of earlier ones) -> PCollection[Totals], one element."""

    output: str
    run: Run

    def __post_init__(self) -> None:
        super().__init__()

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
