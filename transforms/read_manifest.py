"""ReadManifest: the shards that this start has to label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import apache_beam as beam

from maskbeam.transforms.labels.commit import RunReplaced
from maskbeam.transforms.labels.layout import manifest_path
from maskbeam.transforms.labels.manifest import read_manifest
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.records import Shard


@dataclass(eq=False, repr=False)
class ReadManifest(beam.PTransform):
    """The shards of the run's manifest; only paths are shuffled, so that shards spread over the workers."""

    output: str
    run: Run

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, root: beam.pvalue.PBegin) -> beam.PCollection[Shard]:
        return (
            root
            | "Start" >> beam.Create([self.run.manifest], reshuffle=False)
            | "Read" >> beam.FlatMap(_shards, output=self.output).with_output_types(Shard)
            | "Spread" >> beam.Reshuffle()
        )


def _shards(manifest_id: str | None, output: str) -> Iterator[Shard]:
    manifest = read_manifest(output, manifest_id)
    if manifest is None:
        raise RunReplaced(
            f"{manifest_path(output, manifest_id or 'none')} is gone: another start has taken {output}, or "
            "somebody deleted it. Run the same command to go on."
        )
    yield from manifest.shards
