"""WriteParquet: commits each chunk, and ends a run that fails too often."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import apache_beam as beam
from apache_beam.metrics import Metrics

from maskbeam.transforms.labels.commit import commit_chunk
from maskbeam.transforms.labels.layout import OutputConfig
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.records import ChunkReport, LabeledChunk, Totals

# Of the counters and distributions.
METRICS_NAMESPACE = "maskbeam"

# A run is judged by its failures only after this many images (of one process).
_MIN_IMAGES_TO_JUDGE = 100


class TooManyFailures(RuntimeError):
    """More images failed than max_failed_fraction allows."""


@dataclass(eq=False, repr=False)
class WriteParquet(beam.PTransform):
    """PCollection[LabeledChunk] -> PCollection[ChunkReport], each after its chunk is committed."""

    config: OutputConfig
    run: Run

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, chunks: beam.PCollection) -> beam.PCollection:
        return chunks | beam.ParDo(_WriteParquetFn(self)).with_output_types(ChunkReport)


class _WriteParquetFn(beam.DoFn):
    """Commits chunks, counts, and ends the run when too many images fail.

    Its only state is the totals of the images this process has seen.
    """

    def __init__(self, settings: WriteParquet) -> None:
        self._config = settings.config
        self._run = settings.run
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
