"""The prompt store of a run: built by its launcher beside the labels, opened by its workers."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from maskbeam.transforms.files.beam_files import FileSystems
from maskbeam.transforms.files.local_copy import copy_once
from maskbeam.transforms.files.storage import delete_files, list_tree, replace_file
from maskbeam.transforms.files.systems import is_local, open_path
from maskbeam.transforms.prompt_files.categories import Categories
from maskbeam.transforms.prompt_files.config import PromptConfig
from maskbeam.transforms.prompt_files.keys import with_stems
from maskbeam.transforms.prompt_files.source import PromptSource, digest_of, find_prompts, read_names, read_prompts
from maskbeam.transforms.prompt_files.store import META_FILE, STORE_FILES, PromptStore, StoreBuilder, StoreMeta

PROMPTS_DIR = "_prompts"

_PATH_STEMS = ("yolo", "voc")


@dataclass(frozen=True)
class FoundPrompts:
    """The files of --prompts, and what identifies them."""

    source: PromptSource
    digest: str


def identify_prompts(config: PromptConfig) -> FoundPrompts:
    """Finds the files and reads them once, for their digest.

    Raises:
      PromptFilesError: there are none, or none of a known format.
      OSError: one cannot be read.
    """
    source = find_prompts(config)
    return FoundPrompts(source, digest_of(source, config))


@contextlib.contextmanager
def store_of(found: FoundPrompts, config: PromptConfig, output: str) -> Iterator[tuple[StoreMeta, Callable[[], None]]]:
    """The store's figures, and what publishes it as `<output>/_prompts/<digest>/`, once the output is the run's.

    A store that an earlier start has published is not built again.

    Raises:
      PromptFilesError: a file cannot be used.
      OSError: it cannot be read or written.
    """
    target = store_path(output, found.digest)
    meta_path = FileSystems.join(target, META_FILE)
    with tempfile.TemporaryDirectory(prefix="maskbeam-prompts-") as temporary:
        directory = Path(temporary)
        if FileSystems.exists(meta_path):
            with open_path(meta_path) as file:
                meta = StoreMeta.read(file.read())
        else:
            meta = build_store(found.source, config, directory)

        def publish() -> None:
            if FileSystems.exists(meta_path):
                return
            if not (directory / META_FILE).exists():  # the run that had it was overwritten
                build_store(found.source, config, directory)
            _upload(directory, target)

        yield meta, publish


def _upload(directory: Path, target: str) -> None:
    if is_local(target):
        Path(target).mkdir(parents=True, exist_ok=True)
    for name in STORE_FILES:  # meta.json is the last
        with open(directory / name, "rb") as local, replace_file(FileSystems.join(target, name)) as remote:
            shutil.copyfileobj(local, remote, 2**24)


def delete_stores(output: str) -> None:
    """Deletes the prompt stores in an output directory, and nothing else."""
    files = list_tree(FileSystems.join(output, PROMPTS_DIR))
    delete_files([path for path in files if path.rpartition("/")[2] in STORE_FILES])


def store_path(output: str, digest: str) -> str:
    """Where the store of a run is."""
    return FileSystems.join(output, PROMPTS_DIR, digest)


def build_store(source: PromptSource, config: PromptConfig, directory: Path) -> StoreMeta:
    """Builds the store of some files in an empty directory of this machine.

    Raises:
      PromptFilesError: a file cannot be used.
    """
    names = None if config.categories is None else read_names(config.categories)
    path_stems = source.format in _PATH_STEMS
    with StoreBuilder(directory, Categories(names)) as builder:
        for batch in read_prompts(source, config):
            builder.add(with_stems(batch) if config.prompts_key == "stem" else batch)
        return builder.finish(source.categories, source.crowds, path_stems, config.prompts_key)


def open_store(path: str) -> PromptStore:
    """Opens a store, on another file system after copying it to this machine's cache once.

    Args:
      path: from store_path; its last part is the digest.
    """
    if is_local(path):
        return PromptStore(path)
    files = {name: FileSystems.join(path, name) for name in STORE_FILES}
    return PromptStore(str(copy_once("prompts", path.rpartition("/")[2], files)))
