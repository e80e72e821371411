"""run.json: what identifies a run, so that a later start continues it or is told why it cannot."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import uuid
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from maskbeam.pipeline.exits import UsageError
from maskbeam.pipeline.graph import Job
from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.files.beam_files import FileSystems
from maskbeam.transforms.files.paths import absolute
from maskbeam.transforms.files.storage import delete_file, delete_files, escape_glob, list_tree
from maskbeam.transforms.formats.coco import OBJECT_CATEGORY
from maskbeam.transforms.labels.clear import delete_chunks, delete_temporary
from maskbeam.transforms.labels.layout import (
    ANNOTATIONS_DIR,
    CANDIDATES_DIR,
    IMAGES_DIR,
    RUN_FILE,
    SUMMARY_FILE,
    TEMPORARY_DIR,
    committed_chunks,
    manifest_path,
)
from maskbeam.transforms.labels.run_file import Run, read_run, write_run
from maskbeam.transforms.models.check_preset import check_preset
from maskbeam.transforms.presets.embedded import PresetError
from maskbeam.transforms.presets.remote import local_preset
from maskbeam.transforms.prompt_files.categories import to_records
from maskbeam.transforms.prompt_files.publish import PROMPTS_DIR, FoundPrompts, delete_stores
from maskbeam.transforms.prompt_files.source import read_names
from maskbeam.transforms.prompt_files.store import StoreMeta
from maskbeam.transforms.records import DamagedFile, Shard

_TABLE_DIRS = (ANNOTATIONS_DIR, CANDIDATES_DIR, IMAGES_DIR)
_OUR_DIRS = (*_TABLE_DIRS, TEMPORARY_DIR, PROMPTS_DIR)

_VERSIONED = ("maskbeam", "apache-beam", "keras", "keras-hub", "tensorflow", "jax", "numpy", "pycocotools", "pyarrow")


def default_backend() -> str:
    """The Keras backend: KERAS_BACKEND, or tensorflow. keras.json is not asked, so that workers agree."""
    return os.environ.get("KERAS_BACKEND", "tensorflow")


def describe_run(job: Job, root: str, found: FoundPrompts | None = None, meta: StoreMeta | None = None) -> Run:
    """The run of a job: settings that affect rows, the model's fingerprint, backend, dtype, root; versions.

    Args:
      found, meta: the files of --prompts and their store; None = there are none.
    """
    run = Run(
        root=root,
        input_format=job.input.input_format,
        chunk_size=job.input.chunk_size,
        limit=job.input.limit,
        names=asdict(job.read),
        exif=job.images.exif,
        max_pixels=job.images.max_pixels,
        model=job.model.model,
        model_fingerprint=model_fingerprint(job.model.model),
        dtype=job.model.dtype,
        backend=default_backend(),
        amg=asdict(job.amg),
        versions=versions(),
    )
    return run if job.prompts.prompts is None else _with_prompts(run, job, found, meta)


def _with_prompts(run: Run, job: Job, found: FoundPrompts | None, meta: StoreMeta | None) -> Run:
    """What a run with prompts has beside the others."""
    config = job.prompts
    settings = asdict(config)
    del settings["prompts"], settings["categories"]  # the digest has what is in them
    records: list[dict[str, Any]] | None = None  # of records only the ids are known
    if meta is not None:
        records = to_records(meta.categories) or [OBJECT_CATEGORY]
    elif config.categories is not None:
        records = to_records(dict(enumerate(read_names(config.categories))))
    prompts = {
        **settings,
        "prompts_format": "record" if found is None else found.source.format,
        "prompts_digest": None if found is None else found.digest,
    }
    return replace(run, prompts=prompts, prompt_files=list(config.prompts or ()), class_records=records)


def versions() -> dict[str, str]:
    """Of Python, this program, and the libraries that rows may depend on."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # an extra that is not installed
            continue
    return found


def model_fingerprint(preset: str) -> str:
    """sha256 of a model's architecture and weights, wherever they lie.

    Raises:
      UsageError: there is no such model, or it cannot be used.
    """
    digest = hashlib.sha256()
    try:
        for path in check_preset(local_preset(preset)):
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    except PresetError as error:
        raise UsageError(str(error)) from error
    except Exception as error:  # whatever the file system in question raises
        raise UsageError(f"cannot read model {preset}: {describe_error(error)}. Check name and access.") from error
    return digest.hexdigest()


def claim_output(output: str, run: Run, overwrite: bool) -> Run:
    """Writes run.json, or checks that the run in output is this one.

    A run has an id: starts that go on with it find the id in run.json, a new run gets a new one. It is written before
    anything is deleted, and from then on no start of an earlier run commits anything
    (maskbeam.transforms.labels.commit.check_run).

    Returns:
      run, with its id.

    Raises:
      UsageError: output holds another run, or something that is no run of ours, or cannot be written.
    """
    try:
        path = FileSystems.join(output, RUN_FILE)
        claimed = replace(run, id=uuid.uuid4().hex)
        if FileSystems.exists(path):
            before = _read_earlier(output)
            if not overwrite and not before.clearing:
                if committed_chunks(output):
                    _check_same_run(before, run, output)
                if not before.changes(run):
                    return replace(run, id=before.id)
            write_run(output, replace(claimed, clearing=True))
            _delete_labels(output)
        else:
            _check_empty(output)
        write_run(output, claimed)
        return claimed
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a file system that Beam does not know
        raise UsageError(
            f"cannot write to --output {output}: {describe_error(error)}. Choose a directory that can be written."
        ) from error


def _read_earlier(output: str) -> Run:
    try:
        return read_run(output)
    except (ValueError, DamagedFile) as error:
        raise UsageError(str(error)) from error


def _delete_labels(output: str) -> None:
    """Deletes what a run of ours leaves in its output, and nothing else."""
    delete_chunks(output)
    delete_temporary(output)
    delete_stores(output)
    delete_file(FileSystems.join(output, SUMMARY_FILE))
    (manifests,) = FileSystems.match([manifest_path(escape_glob(output), "*")])
    delete_files([file.path for file in manifests.metadata_list])


def refuse_input_in_output(shards: Iterable[Shard], output: str) -> None:
    """Refuses input that lies where labels go: --overwrite would delete it, and a later start would read labels.

    Raises:
      UsageError
    """
    ours = tuple(f"{absolute(output)}/{directory}/" for directory in _OUR_DIRS)
    for shard in shards:
        if (shard.path + "/").startswith(ours):
            raise UsageError(
                f"the input {shard.path} lies in a folder of --output {output} where labels are written. Choose "
                "another --output."
            )


def _check_same_run(before: Run, now: Run, output: str) -> None:
    if changes := before.changes(now):
        raise UsageError(
            f"{output} holds labels made with other settings: {'; '.join(changes)}. Use the same settings to go on, "
            "another --output, or --overwrite to delete those labels."
        )


def _check_empty(output: str) -> None:
    """A directory with other things in it is not touched: its images/ may be somebody's photos."""
    for directory in _OUR_DIRS:
        path = FileSystems.join(output, directory)
        if list_tree(path):  # an object store knows no directories that could exist
            raise UsageError(
                f"--output {output} already has a folder {directory}/ that no run of maskbeam made (there is no "
                f"{RUN_FILE}). Choose another directory."
            )
