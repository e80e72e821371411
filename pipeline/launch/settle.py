"""What a start of `label` does before it labels: it finds out what is done, and what has to be done again.

The order makes every step safe to be killed at: the manifest is written, run.json names it, then chunks are rewritten,
and what does not count any more is deleted. A start that goes by another manifest commits nothing from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from maskbeam.pipeline.graph import Job
from maskbeam.pipeline.results import format_some
from maskbeam.transforms.files.beam_files import FileSystems
from maskbeam.transforms.files.paths import absolute, relative_path
from maskbeam.transforms.files.storage import delete_file
from maskbeam.transforms.labels.layout import (
    ANNOTATIONS_DIR,
    CANDIDATES_DIR,
    IMAGES_DIR,
    SUMMARY_FILE,
    ChunkKey,
    TableFiles,
    list_tables,
    manifest_path,
)
from maskbeam.transforms.labels.manifest import Manifest, manifest_to_json, read_manifest, write_manifest
from maskbeam.transforms.labels.reconcile import Before, Reconciled, reconcile, source_of
from maskbeam.transforms.labels.resume import read_committed
from maskbeam.transforms.labels.rewrite import delete_leftovers, rewrite_chunk
from maskbeam.transforms.labels.run_file import FORMAT, Run, read_run, write_run
from maskbeam.transforms.match_shards import Matched
from maskbeam.transforms.records import ChunkReport, Totals

# Tries, if another start rewrites a chunk while this one reads it.
_TRIES = 3


@dataclass(frozen=True)
class Settled:
    """What this start goes by.

    Attributes:
      run: with the manifest's id.
      manifest: which chunks there are to be.
      done: totals of those that are committed.
      notes: lines for people about what changed.
    """

    run: Run
    manifest: Manifest
    done: Totals
    notes: tuple[str, ...]


def settle(job: Job, matched: Matched, run: Run) -> Settled:
    """Makes the output agree with the input, but for what has to be labeled.

    Args:
      run: from claim_output.

    Raises:
      InputChanged: see maskbeam.transforms.labels.reconcile.
      RunReplaced: another start goes on with the output.
      OSError: a file cannot be read or written.
    """
    for _ in range(_TRIES - 1):
        try:
            return _settle(job, matched, run)
        except FileNotFoundError:
            continue
    return _settle(job, matched, run)


def _settle(job: Job, matched: Matched, run: Run) -> Settled:
    output = job.output.output
    found = read_run(output)
    tables = list_labels(job)
    committed = read_committed(output, tables, run.id, job.amg.keep_candidates)
    before = Before(
        found.root, read_manifest(output, found.manifest), frozenset(tables.num_bytes[IMAGES_DIR]), committed
    )
    patterns = tuple(relative_path(absolute(pattern), matched.root) for pattern in job.input.input)
    result = reconcile(before, matched, patterns, job.output, job.input.chunk_size, job.read, job.input.limit)
    _publish(output, found, before.manifest, result.manifest)
    run = replace(run, manifest=result.manifest.id)
    reports = dict(_settled_reports(output, before, result.manifest, run))
    delete_leftovers(output, result.manifest, tables, committed.keys() | reports.keys(), run)
    done = sum((report.totals for report in reports.values()), Totals())
    return Settled(run, result.manifest, done, tuple(_notes(output, result, before)))


def list_labels(job: Job) -> TableFiles:
    """The tables in the output of a job."""
    directories = [IMAGES_DIR, ANNOTATIONS_DIR] + [CANDIDATES_DIR] * job.amg.keep_candidates
    return list_tables(job.output.output, directories)


def _publish(output: str, run: Run, before: Manifest | None, now: Manifest) -> None:
    """Makes a manifest the one that holds.

    Args:
      run: as run.json has it now.
    """
    if before is not None and manifest_to_json(before) == manifest_to_json(now):
        return
    write_manifest(output, now)
    replaced = before is None or before.id != now.id
    if replaced:
        delete_file(FileSystems.join(output, SUMMARY_FILE))
    if replaced or run.root != now.root:
        write_run(output, replace(run, root=now.root, format=FORMAT, manifest=now.id))
    if replaced and run.manifest:
        delete_file(manifest_path(output, run.manifest))


def _settled_reports(
    output: str, before: Before, manifest: Manifest, run: Run
) -> Iterator[tuple[ChunkKey, ChunkReport]]:
    """The chunks that are done, those that have to be rewritten among them: that is done here."""
    for shard in manifest.shards:
        if shard.format != "image":
            for chunk in before.by_shard.get(shard.name, []):
                if (chunk.key.generation, chunk.report.digest) == (shard.generation_of(chunk.key.index), shard.digest):
                    yield chunk.key, chunk.report
            continue
        key = ChunkKey(shard.name, shard.first_chunk, shard.generation)
        source = source_of(shard, before, output, manifest.root)
        if source is None:
            continue
        report = source.report
        if source.key != key:
            report = rewrite_chunk(output, source.key, source.report, shard, manifest.root, run)
        yield key, report


def _notes(output: str, result: Reconciled, before: Before) -> Iterator[str]:
    if removed := result.removed:
        yield f"not in the input any more, rows deleted: {len(removed)}, {format_some(removed)}"
    if changed := result.changed:
        yield f"changed, labeled again: {len(changed)}, {format_some(changed)}"
    if gone := sum(len(before.by_shard.get(shard.name, [])) for shard in result.manifest.gone):
        yield f"{gone} chunks in {output} are of inputs that are not there any more; their rows stay"


def finish(job: Job, settled: Settled, totals: Totals) -> str | None:
    """Looks at what a finished run left, and deletes what does not count.

    Args:
      totals: as in summary.json.

    Returns:
      a sentence about chunks that are missing, None if none is.

    Raises:
      RunReplaced: another start goes on with the output.
    """
    tables = list_labels(job)
    committed = tables.committed(job.amg.keep_candidates)
    delete_leftovers(job.output.output, settled.manifest, tables, committed, settled.run)
    gone = {shard.name for shard in settled.manifest.gone}
    present = sum(key.shard not in gone for key in settled.manifest.counting(committed))
    if present >= totals.chunks:
        return None
    return (
        f"{totals.chunks - present} of the {totals.chunks} chunks in {job.output.output} are gone: somebody deleted "
        "them meanwhile. Run the same command again."
    )
