"""ReadManifest: the shards that this start has to label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apache_beam as beam

from maskbeam.transforms.labels.commit import RunReplaced
from maskbeam.transforms.labels.layout import manifest_path
from maskbeam.transforms.labels.manifest import read_manifest
from maskbeam.transforms.records import Shard


class ReadManifest(beam.PTransform):
    """The shards of the run's manifest; only paths are shuffled, so that shards spread over the workers."""

    def __init__(self, output: str, run: dict[str, Any]) -> None:
        super().__init__()
        self.output = output
        self.run = {name: run[name] for name in ("id", "manifest") if name in run}

    def expand(self, root: beam.pvalue.PBegin) -> beam.PCollection[Shard]:
        return (
            root
            | "Start" >> beam.Create([self.run], reshuffle=False)
            | "Read" >> beam.FlatMap(_shards, output=self.output).with_output_types(Shard)
            | "Spread" >> beam.Reshuffle()
        )


def _shards(run: dict[str, Any], output: str) -> Iterator[Shard]:
    manifest = read_manifest(output, run)
    if manifest is None:
        raise RunReplaced(
            f"{manifest_path(output, run.get('manifest') or 'none')} is gone: another start has taken {output}, or "
            "somebody deleted it. Run the same command to go on."
        )
    yield from manifest.shards
