"""The prompts of a run: their store is part of what claims the output, and what became of them is told at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.compute as pc

from maskbeam.pipeline.exits import UsageError
from maskbeam.pipeline.graph import Job
from maskbeam.pipeline.launch.identity import claim_output, describe_run
from maskbeam.pipeline.results import escape_controls, format_some
from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.files.beam_files import FileSystems
from maskbeam.transforms.files.storage import read_json, write_json
from maskbeam.transforms.labels.layout import SUMMARY_FILE
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.labels.tables import list_chunks, read_images
from maskbeam.transforms.prompt_files.config import IN_RECORD, PromptFilesError
from maskbeam.transforms.prompt_files.finder import describe_mismatch
from maskbeam.transforms.prompt_files.publish import identify_prompts, open_store, store_of, store_path
from maskbeam.transforms.prompt_files.store import StoreMeta
from maskbeam.transforms.records import Totals


def claim(job: Job, root: str) -> tuple[Run, StoreMeta | None]:
    """The run of an output that is the job's from now on, and the figures of its prompt store.

    Raises:
      UsageError: the output is another run's, or the prompts cannot be used.
    """
    config, output = job.prompts, job.output
    try:
        if config.prompts is None or config.prompts == (IN_RECORD,):
            return claim_output(output.output, describe_run(job, root), output.overwrite), None
        found = identify_prompts(config)
        with store_of(found, config, output.output) as (meta, publish):
            run = claim_output(output.output, describe_run(job, root, found, meta), output.overwrite)
            publish()
        return run, meta
    except PromptFilesError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"the prompts cannot be read, or not be stored: {describe_error(error)}.") from error


def report_prompts(job: Job, run: Run, totals: Totals, meta: StoreMeta | None) -> str | None:
    """Prints what became of the prompts, and notes in summary.json which were not used.

    Args:
      meta: of the store; None = the prompts are in the records.

    Returns:
      why the prompts do not fit the images, None if they do.
    """
    output = job.output.output
    for line in _lines(totals, meta):
        print(escape_controls(line))
    if meta is None:
        return None if totals.prompts else describe_mismatch(totals.images, [], None)
    assert run.prompts is not None  # whose store meta is of
    store = open_store(store_path(output, run.prompts["prompts_digest"]))
    use = store.compare(_keys(output))
    path = FileSystems.join(output, SUMMARY_FILE)
    unused = {"prompts_unused": use.unused, "prompts_unused_images": list(use.unused_shown), "prompts_lost": meta.lost}
    write_json(path, {**read_json(path), **unused})
    if use.unused and totals.prompts:
        names = format_some(use.unused_shown)
        print(escape_controls(f"{use.unused} prompts are for images that are not there: {names}"))
    if not totals.prompts and use.unused == meta.rows:
        return describe_mismatch(totals.images, list(_some_ids(output)), store)
    if use.shared_shown:
        return (
            f"two images share the prompts of {use.shared_shown[0]!r}, and others may: choose with --prompts_key what "
            "of an image its prompts name."
        )
    return None


def _lines(totals: Totals, meta: StoreMeta | None) -> Iterator[str]:
    clipped = f", {totals.clipped_prompts} boxes clipped to their image" if totals.clipped_prompts else ""
    yield f"{totals.prompts} prompts, {totals.dropped.prompt} of them dropped{clipped}"
    yield from (f"  dropped {text}" for text in totals.dropped_prompts)
    if meta is not None and meta.crowds:
        yield f"{meta.crowds} crowd regions are no objects and were not prompted"
    if meta is not None and meta.lost:
        yield f"{meta.lost} rows of prompts name no image, the first: {meta.lost_shown[0]}"


def _keys(output: str) -> Iterator[str]:
    for images in read_images(output, list_chunks(output), ["prompts_key"]):
        yield from pc.drop_null(images["prompts_key"]).to_pylist()


def _some_ids(output: str) -> Iterator[str]:
    for images in read_images(output, list_chunks(output)[:1], ["image_id"]):
        yield from images["image_id"].to_pylist()[:1]
