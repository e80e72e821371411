"""What of the prompts a worker needs: those of an image, before it is decoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa

from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.prompt_files.config import IN_RECORD, PromptConfig
from maskbeam.transforms.prompt_files.in_record import RecordPrompts
from maskbeam.transforms.prompt_files.keys import names_of
from maskbeam.transforms.prompt_files.publish import open_store
from maskbeam.transforms.prompt_files.resolve import Resolved, above_score, resolve
from maskbeam.transforms.prompt_files.store import PromptStore
from maskbeam.transforms.records import EncodedImage

# Images that a process looks at before it gives up on prompts that none of them has.
_IMAGES_LOOKED_AT = 1000


class NoPromptsFound(RuntimeError):
    """No image has any prompt: they call each other by different names."""


@dataclass(frozen=True)
class RunPrompts:
    """The prompts of a run, as they travel to its workers.

    Attributes:
      store: path of the prompt store; None = they are in the images' records.
      categories: id -> name of prompts in records that have names; a store has its own.
    """

    config: PromptConfig
    images: ImageConfig
    store: str | None
    categories: Mapping[int, str]

    def in_record(self) -> RecordPrompts | None:
        """How prompts in records are read; None = they are not there."""
        return RecordPrompts(self.config.prompts_bbox) if self.config.prompts == (IN_RECORD,) else None


@dataclass(frozen=True, eq=False)
class Found:
    """The rows of an image.

    Attributes:
      key: the name that they were found by; None = they lie in its record.
      rows: at least one.
    """

    key: str | None
    rows: pa.Table


class PromptFinder:
    """Finds prompts. Opened once a process, and used by several threads at once."""

    def __init__(self, run: RunPrompts) -> None:
        self._run = run
        self._store: PromptStore | None = None if run.store is None else open_store(run.store)
        self._categories = run.categories if self._store is None else self._store.meta.categories
        self._images = 0
        self._any = False

    def find(self, image: EncodedImage) -> Found | None:
        """The rows of an image with at least min_prompt_score; None if there is none."""
        key, rows = self._rows(image)
        if rows is not None:
            rows = above_score(rows, self._run.config.min_prompt_score)
        return Found(key, rows) if rows is not None and len(rows) else None

    def _rows(self, image: EncodedImage) -> tuple[str | None, pa.Table | None]:
        if self._store is None:
            return None, None if image.prompts is None else pa.Table.from_batches([image.prompts])
        for name in names_of(image, self._store.meta.key, self._store.meta.path_stems):
            if (rows := self._store.find(name)) is not None:
                return name, rows
        return None, None

    def resolve(self, found: Found, size_hw: tuple[int, int], exif_orientation: int) -> Resolved:
        """The prompts of an image whose size is known.

        Raises:
          PromptError: they are for an image of another size.
        """
        config, images = self._run.config, self._run.images
        return resolve(found.rows, self._categories, size_hw, exif_orientation, config, images)

    def check(self, image_ids: Iterable[str], any_found: bool) -> None:
        """Notes whether images had prompts.

        Raises:
          NoPromptsFound: none of the first thousand of this process had.
        """
        ids = list(image_ids)
        self._images += len(ids)
        self._any = self._any or any_found
        if not self._any and self._images >= _IMAGES_LOOKED_AT:
            raise NoPromptsFound(describe_mismatch(self._images, ids[:1], self._store))


def describe_mismatch(images: int, image_ids: list[str], store: PromptStore | None) -> str:
    """The sentence about prompts none of which is of any image, with a name of each side."""
    if store is None:
        return (
            f"none of {images} images has prompts in its record. Expected image/object/bbox/* in TFRecords, <key>.json "
            "beside <key>.jpg in tar files, a column objects in Parquet."
        )
    shown = f", such as {image_ids[0]!r}" if image_ids else ""
    return (
        f"none of {images} images{shown}, has a prompt: the prompts are for images such as {store.some_names()[0]!r}. "
        "They must be the same letter by letter; --prompts_key says what of an image they name."
    )
