"""The pipeline. START READING HERE."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import apache_beam as beam

from maskbeam.pipeline.launch.dataflow import DataflowConfig
from maskbeam.pipeline.progress import ProgressConfig
from maskbeam.transforms.generate_masks import GenerateMasks
from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.labeler import MakeLabeler
from maskbeam.transforms.labels.layout import OutputConfig
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.load_model import LoadSam, ModelConfig, load_model
from maskbeam.transforms.masks.amg import AmgConfig
from maskbeam.transforms.masks.automatic import AutomaticLabeler
from maskbeam.transforms.masks.prompted import PromptedConfig, PromptedLabeler
from maskbeam.transforms.match_shards import InputConfig
from maskbeam.transforms.prompt_files.categories import from_records
from maskbeam.transforms.prompt_files.config import PromptConfig
from maskbeam.transforms.prompt_files.finder import RunPrompts
from maskbeam.transforms.prompt_files.publish import store_path
from maskbeam.transforms.read_chunks import ReadChunks
from maskbeam.transforms.read_manifest import ReadManifest
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.summarize import Summarize
from maskbeam.transforms.write_parquet import WriteParquet

# Settings of the grid that prompts have, too.
SHARED_SETTINGS = (
    "pred_iou_thresh",
    "stability_score_thresh",
    "stability_score_offset",
    "mask_threshold",
    "points_per_batch",
)


@dataclass(frozen=True)
class Job:
    """Everything `maskbeam label` was asked to do. The fields are in the order of --help."""

    model: ModelConfig
    input: InputConfig
    output: OutputConfig
    progress: ProgressConfig
    prompts: PromptConfig = field(default_factory=PromptConfig, kw_only=True)
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
    prompts = run_prompts(job, run)
    chunks, finished = (
        root
        | "ReadManifest" >> ReadManifest(output, run)  # Shard; only paths are ever shuffled
        | "ReadChunks"  # Chunk
        >> ReadChunks(
            job.read,
            job.input.chunk_size,
            run.root,
            output,
            run.id,
            job.amg.keep_candidates,
            None if prompts is None else prompts.in_record(),
        )
    )
    reports = (
        chunks
        | "GenerateMasks"
        >> GenerateMasks(job.model, job.images, make_labeler(job), run.backend, load, progress_dir, prompts)
        | "WriteParquet" >> WriteParquet(job.output, run)  # ChunkReport, after the chunk's files are committed
    )
    return (reports, finished) | "Summarize" >> Summarize(output, run)  # Totals -> summary.json


def run_prompts(job: Job, run: Run) -> RunPrompts | None:
    """The prompts of a run as its workers get them; None if it has a grid."""
    if run.prompts is None:
        return None
    digest = run.prompts["prompts_digest"]
    store = None if digest is None else store_path(job.output.output, digest)
    return RunPrompts(job.prompts, job.images, store, from_records(run.categories or []))


def make_labeler(job: Job) -> MakeLabeler:
    """What makes the masks: a grid of points, or the given prompts."""
    if job.prompts.prompts is None:
        return partial(AutomaticLabeler, config=job.amg)
    return partial(PromptedLabeler, config=prompted_config(job))


def prompted_config(job: Job) -> PromptedConfig:
    """The settings of prompted masks, some of which are among the grid's."""
    amg, prompts = job.amg, job.prompts
    return PromptedConfig(
        mask=prompts.mask,
        refine_steps=prompts.refine_steps,
        box_margin=prompts.box_margin,
        **{name: getattr(amg, name) for name in SHARED_SETTINGS},
    )
