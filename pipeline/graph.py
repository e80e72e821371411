"""The pipeline. START READING HERE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import apache_beam as beam

from pipeline.dataflow import DataflowConfig
from pipeline.progress import ProgressConfig
from transforms.amg import AmgConfig
from transforms.images import ImageConfig
from transforms.manifest import ReadManifest
from transforms.match import InputConfig
from transforms.read import ReadConfig
from transforms.resume import ReadChunks
from transforms.segment import GenerateMasks, LoadSam, ModelConfig, load_model
from transforms.summary import Summarize
from transforms.write import OutputConfig, WriteParquet


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
    run: dict[str, Any],
    load: LoadSam = load_model,
    progress_dir: str | None = None,
) -> beam.PCollection:
    """Adds the pipeline to root.

    From ReadChunks to WriteParquet the steps stay fused, so a chunk is committed before the next one is read. That is
    why the accelerator is given to the whole pool of workers and never to one step as a resource hint.

    Args:
      run: content of run.json, from pipeline.settle.
      load, progress_dir: see GenerateMasks.
    """
    output = job.output.output
    chunks, finished = (
        root
        | "ReadManifest" >> ReadManifest(output, run)  # Shard; only paths are ever shuffled
        | "ReadChunks"  # Chunk
        >> ReadChunks(job.read, job.input.chunk_size, run["root"], output, run.get("id"), job.amg.keep_candidates)
    )
    reports = (
        chunks
        | "GenerateMasks" >> GenerateMasks(job.model, job.images, job.amg, run["backend"], load, progress_dir)
        | "WriteParquet" >> WriteParquet(job.output, run)  # ChunkReport, after the chunk's files are committed
    )
    return (reports, finished) | "Summarize" >> Summarize(output, run)  # Totals -> summary.json
