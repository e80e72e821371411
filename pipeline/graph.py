"""The pipeline. START READING HERE."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import apache_beam as beam

from maskbeam.pipeline.launch.dataflow import DataflowConfig
from maskbeam.pipeline.progress import ProgressConfig
from maskbeam.transforms.generate_masks import GenerateMasks
from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.labels.layout import OutputConfig
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.load_model import LoadSam, ModelConfig, load_model
from maskbeam.transforms.masks.amg import AmgConfig
from maskbeam.transforms.masks.automatic import AutomaticLabeler
from maskbeam.transforms.match_shards import InputConfig
from maskbeam.transforms.read_chunks import ReadChunks
from maskbeam.transforms.read_manifest import ReadManifest
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.summarize import Summarize
from maskbeam.transforms.write_parquet import WriteParquet


@dataclass(frozen=True)
class Job:
    """Everything `maskbeam label` was asked to do. The fields are in the order of --help."""

    model: ModelConfig
    input: InputConfig
    output: OutputConfig
    progress: ProgressConfig
    amg: AmgConfig
    images: ImageConfig
    dataflow: DataflowConfig
    read: ReadConfig


def build(
    root: beam.Pipeline,
    job: Job,
    run: Run,
    load: LoadSam = load_model,
    progress_dir: str | None = None,
) -> beam.PCollection:
    """Adds the pipeline to root.

    From ReadChunks to WriteParquet the steps stay fused, so a chunk is committed before the next one is read. That is
    why the accelerator is given to the whole pool of workers and never to one step as a resource hint.

    Args:
      run: from maskbeam.pipeline.launch.settle.
      load, progress_dir: see GenerateMasks.
    """
    output = job.output.output
    chunks, finished = (
        root
        | "ReadManifest" >> ReadManifest(output, run)  # Shard; only paths are ever shuffled
        | "ReadChunks"  # Chunk
        >> ReadChunks(job.read, job.input.chunk_size, run.root, output, run.id, job.amg.keep_candidates)
    )
    reports = (
        chunks
        | "GenerateMasks"
        >> GenerateMasks(
            job.model, job.images, partial(AutomaticLabeler, config=job.amg), run.backend, load, progress_dir
        )
        | "WriteParquet" >> WriteParquet(job.output, run)  # ChunkReport, after the chunk's files are committed
    )
    return (reports, finished) | "Summarize" >> Summarize(output, run)  # Totals -> summary.json
