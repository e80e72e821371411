"""Deletes what this program wrote into a directory of labels, and nothing else."""

from __future__ import annotations

import contextlib
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from maskbeam.transforms.files.beam_files import FileSystems
from maskbeam.transforms.files.storage import delete_files, list_directory, list_tree
from maskbeam.transforms.files.systems import is_local, open_path
from maskbeam.transforms.labels.layout import (
    ANNOTATIONS_DIR,
    CANDIDATES_DIR,
    IMAGES_DIR,
    TEMPORARY_DIR,
    parse_chunk_name,
)
from maskbeam.transforms.labels.schema import RUN_KEY

# Footers that are read at the same time: on object stores it is waiting that takes the time.
_FOOTER_THREADS = 16

# What starts leave in TEMPORARY_DIR until they are done: tables to commit, and their notes (pipeline/launch/starts.py).
_TEMPORARY_NAME = re.compile(
    rf"[0-9a-f]{{32}}-({ANNOTATIONS_DIR}|{CANDIDATES_DIR}|{IMAGES_DIR})-.+|[0-9a-f]{{32}}\.start\.json(\.[0-9a-f]{{32}})?",
    re.DOTALL,
)


def delete_temporary(output: str) -> None:
    """Deletes the temporary files of all starts in an output directory, and their folder if nothing else is in it."""
    directory = FileSystems.join(output, TEMPORARY_DIR)
    paths = [file.path for file in list_directory(directory)]
    delete_files([path for path in paths if _TEMPORARY_NAME.fullmatch(FileSystems.split(path)[1])])
    if is_local(directory):
        with contextlib.suppress(OSError):  # others' files are in it, or another start adds to it
            os.rmdir(directory)
    elif FileSystems.exists(directory) and not list_tree(directory):  # where directories are more than a prefix
        FileSystems.delete([directory])


def delete_chunks(output: str) -> None:
    """Deletes the files of all chunks in an output directory, images first: a chunk is one as long as it has those.

    Ours is what lies in a folder of ours, is named as a chunk is, and has our key in its footer. A damaged file has no
    footer: it is ours if a file of the same chunk is.
    """
    files = [
        file.path
        for directory in (IMAGES_DIR, CANDIDATES_DIR, ANNOTATIONS_DIR)
        for file in list_directory(FileSystems.join(output, directory))
        if parse_chunk_name(FileSystems.split(file.path)[1])
    ]
    with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
        whose = dict(zip(files, threads.map(_is_ours, files), strict=True))
    our_names = {FileSystems.split(path)[1] for path, ours in whose.items() if ours}
    delete_files(
        [path for path, ours in whose.items() if ours or (ours is None and FileSystems.split(path)[1] in our_names)]
    )


def _is_ours(path: str) -> bool | None:
    """Whether a chunk's file was written by this program; None if it is damaged or not Parquet."""
    try:
        with open_path(path) as file:
            return RUN_KEY in (pq.read_schema(file).metadata or {})
    except pa.ArrowException:
        return None
