"""maskbeam refine: masks chosen anew from the candidates that `maskbeam label --keep_candidates` stored.

No model is loaded. The output is a directory of labels like that of `label`, committed chunk by chunk, so that an
interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from maskbeam.pipeline.exits import EXIT_DONE, EXIT_FAILED, UsageError
from maskbeam.pipeline.launch.identity import claim_output, versions
from maskbeam.pipeline.options import parse_changes
from maskbeam.pipeline.progress import progress_bar
from maskbeam.pipeline.results import describe_model
from maskbeam.transforms.files.beam_files import FileSystems
from maskbeam.transforms.files.paths import absolute
from maskbeam.transforms.files.systems import is_local
from maskbeam.transforms.labels.commit import RunReplaced, commit_chunk
from maskbeam.transforms.labels.layout import (
    IMAGES_DIR,
    SUMMARY_FILE,
    ChunkKey,
    OutputConfig,
    chunk_name,
    committed_chunks,
)
from maskbeam.transforms.labels.refine import COLUMNS, refine_chunk
from maskbeam.transforms.labels.resume import read_report
from maskbeam.transforms.labels.run_file import FORMAT, Run, read_run
from maskbeam.transforms.labels.tables import list_chunks, read_candidates, read_chunk
from maskbeam.transforms.masks.amg import CANDIDATE_SETTINGS, AmgConfig
from maskbeam.transforms.masks.containment import ContainmentConfig
from maskbeam.transforms.masks.select import SelectionConfig
from maskbeam.transforms.records import ChunkReport, DamagedFile, LabeledChunk, Totals
from maskbeam.transforms.summarize import write_summary

_DESCRIPTION = (
    "Chooses the masks anew from the candidates that `maskbeam label --keep_candidates` stored, without the model. "
    "What is not given stays as the labels were made with; --max_masks 1000000 takes that limit away."
)

# Flags by the titles over them: what can be decided later, and what cannot.
_SETTINGS: dict[str, type] = {
    "choice of masks (default: as the labels were made with)": SelectionConfig,
    "prompts and logits (the candidates were made with them: another value is an error)": AmgConfig,
}
_LOGIT_SETTINGS = ("mask_threshold", "stability_score_offset")


@dataclass(frozen=True)
class RefineConfig:
    """Which labels become which.

    Attributes:
      labels: directory of labels, as `label --keep_candidates` writes it, on any Beam file system.
      output: directory of the new labels, on any Beam file system; not in that of the old ones.
      overwrite: delete the labels that an earlier run left in output and start anew.
    """

    labels: str
    output: str
    overwrite: bool = False

    def __post_init__(self) -> None:
        OutputConfig(self.output)  # raises what is wrong with it
        labels, output = absolute(self.labels), absolute(self.output)
        if is_local(labels) and is_local(output):
            labels, output = os.path.realpath(labels), os.path.realpath(output)
        if (output + "/").startswith(labels + "/"):
            raise ValueError(f"output {self.output} lies in the labels {self.labels}. Choose a directory beside them.")


@dataclass(frozen=True)
class RefineJob:
    """Everything `maskbeam refine` was asked to do, but for the settings that change."""

    refine: RefineConfig
    containment: ContainmentConfig


def main(argv: list[str]) -> int:
    """Parses the flags and refines."""
    return run_refine(*parse_refine(argv))


def parse_refine(argv: list[str]) -> tuple[RefineJob, dict[str, Any]]:
    """Command line -> what to do, and the settings that change."""
    without = ("points_per_batch", *CANDIDATE_SETTINGS)
    return parse_changes("refine", RefineJob, _SETTINGS, argv, _DESCRIPTION, without)


def run_refine(job: RefineJob, changes: dict[str, Any]) -> int:
    """Refines chunk by chunk and prints a summary.

    Returns:
      the exit code.

    Raises:
      UsageError: before anything is written, if the job cannot be done as asked.
      DamagedFile: the labels are damaged.
    """
    labels, output = job.refine.labels, job.refine.output
    try:
        run = read_run(labels)
        config = change_settings(run, changes, labels)
        sources = [_read_source(labels, chunk) for chunk in list_chunks(labels)]
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    refined = replace(
        run,
        manifest=None,  # that of the labels' own input
        format=FORMAT,
        amg=asdict(config),
        versions=versions(),
        refined_from={"labels": absolute(labels), "label_settings": run.amg, **asdict(job.containment)},
    )
    refined = claim_output(output, refined, job.refine.overwrite)
    _refuse_strays(sources, labels, output)
    try:
        totals = _refine_all(sources, config, job, refined)
        write_summary(totals, output, refined)
    except (OSError, ValueError, RunReplaced) as error:
        print(f"maskbeam: {error}", file=sys.stderr)
        print(f"What is committed in {output} stays; run the same command to go on.", file=sys.stderr)
        return EXIT_FAILED
    print(_summary(totals, sum(source.totals.masks for source in sources), output, describe_model(run)))
    if not FileSystems.exists(FileSystems.join(labels, SUMMARY_FILE)):
        print(f"{labels} is not finished: this is what it has so far. Run again when there is more.")
    if totals.failed == totals.images:
        print(f"maskbeam: there was nothing to refine: all {totals.images} images of {labels} failed.", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


def _refine_all(sources: list[ChunkReport], config: AmgConfig, job: RefineJob, run: Run) -> Totals:
    """Refines the chunks that no earlier start has committed; the totals are of all."""
    output = job.refine.output
    done = committed_chunks(output)
    totals = Totals()
    with progress_bar(total=sum(source.totals.images for source in sources), unit="image") as progress:
        for source in sources:
            committed = source.index in done.get(source.shard, [])
            report = read_report(output, source.shard, source.index) if committed else None
            if report is None or (report.digest, report.run_id) != (_digest(source), run.id):
                report = _refine_and_commit(source, config, job, run)
            totals += report.totals
            progress.update(source.totals.images)
    return totals


def _refine_and_commit(source: ChunkReport, config: AmgConfig, job: RefineJob, run: Run) -> ChunkReport:
    """One chunk of the new labels."""
    labels = job.refine.labels
    key = ChunkKey(source.shard, source.index, source.generation)
    images = read_chunk(labels, key).images
    assert run.refined_from is not None
    made_with = AmgConfig.from_dict(run.refined_from["label_settings"])
    candidates = read_candidates(labels, key, images, COLUMNS, made_with)
    chunk = LabeledChunk(
        source.shard,
        images["shard"][0].as_py() if len(images) else "",
        source.source,
        source.index,
        tuple(refine_chunk(images, candidates, config, job.containment)),
        source.final,
        _digest(source),
        encoded_bytes=source.totals.encoded_bytes,
    )
    return commit_chunk(chunk, job.refine.output, run)


def _digest(source: ChunkReport) -> str:
    """Identifies what a chunk is refined from; labeled again it has another one, if only for the seconds it took."""
    return hashlib.sha256(json.dumps(asdict(source), sort_keys=True).encode()).hexdigest()


def _read_source(labels: str, chunk: ChunkKey) -> ChunkReport:
    """The report of a chunk of the labels."""
    report = read_report(labels, chunk.shard, chunk.index, chunk.generation)
    if report is None:
        raise DamagedFile(
            f"{FileSystems.join(labels, IMAGES_DIR, chunk.file_name)} is damaged: its footer has no report. "
            "Delete it, and run the command that made it again."
        )
    return report


def _refuse_strays(sources: list[ChunkReport], labels: str, output: str) -> None:
    """Refuses chunks of an earlier start that the labels have no more: their rows would stay."""
    known = {(source.shard, source.index) for source in sources}
    for shard, indices in committed_chunks(output).items():
        for index in indices:
            if (shard, index) not in known:
                raise UsageError(
                    f"{output} has {chunk_name(shard, index)}, which {labels} has no more. Use --overwrite to start "
                    "anew, or another --output."
                )


def _summary(totals: Totals, masks_before: int, output: str, model: str) -> str:
    dropped = ", ".join(f"{name} {count}" for name, count in vars(totals.dropped).items() if count)
    directory = output.rstrip("/")
    return (
        f"{totals.images} images: {totals.labeled} labeled, {totals.empty} empty, {totals.failed} failed\n"
        f"{totals.masks} masks, {masks_before} before, of {totals.candidates} candidates"
        + (f" (dropped: {dropped})" if dropped else "")
        + f"\nmodel: {model}\nlabels: {directory}/annotations/*.parquet, {directory}/images/*.parquet"
    )


def change_settings(run: Run, changes: dict[str, Any], labels: str) -> AmgConfig:
    """The settings of the new labels: those of the old ones with the changes.

    Args:
      run: of the labels.
      changes: fields of AmgConfig.
      labels: for messages.

    Raises:
      ValueError: there are no candidates, or a change cannot be decided from them.
    """
    if run.imported is not None:
        raise ValueError(
            f"{labels} was imported and has no candidates: there is nothing to choose from. Label the images with "
            "`maskbeam label --keep_candidates`."
        )
    try:
        before = AmgConfig.from_dict(run.amg)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{labels} was made by another version of maskbeam: {error}. Label it again.") from error
    if run.refined_from is not None:
        raise ValueError(f"{labels} was refined from {run.refined_from['labels']}: refine that again.")
    if not before.keep_candidates:
        raise ValueError(f"{labels} has no candidates. Label it with --keep_candidates, into a new directory.")
    decidable = {field.name for field in fields(SelectionConfig)}
    for name, value in changes.items():
        if name not in decidable and value != getattr(before, name):
            needed = "the logits, which are not stored" if name in _LOGIT_SETTINGS else "the model"
            raise ValueError(
                f"--{name} cannot be changed to {value} now: the candidates in {labels} were made with "
                f"{getattr(before, name)}. Another value needs {needed}. Run `maskbeam label` again."
            )
    after = replace(before.without_candidates(), **changes)
    for name in ("pred_iou_thresh", "stability_score_thresh"):
        threshold, bar = getattr(after, name), getattr(before.bar, name)
        if max(threshold, 0) < bar:
            raise ValueError(
                f"--{name} {threshold} is below {bar:g}, the bar that the candidates in {labels} passed: others were "
                f"not stored. Raise it, or label again with --candidate_{name} {threshold}."
            )
    return after
