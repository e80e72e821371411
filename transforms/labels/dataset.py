"""Labels read back for Python: each image with its masks and, if they are wanted, its pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maskbeam.transforms.images import ImageConfig
from maskbeam.transforms.labels.run_file import read_run
from maskbeam.transforms.labels.schema import row_to_mask
from maskbeam.transforms.labels.tables import read_chunks
from maskbeam.transforms.masks.rle import counts_to_mask
from maskbeam.transforms.photos import PhotoMissing, Photos, open_photo
from maskbeam.transforms.records import Mask


@dataclass(frozen=True)
class ImageLabels:
    """One image of a directory of labels.

    Attributes:
      image_id: unique in the labels: the path relative to the input's root, in shards `<shard>#<row>`.
      status: "labeled", "empty" (no mask passed the filters) or "failed".
      error: why it failed; None if it did not.
      size_hw: (H, W) in pixels; None if the image could not be decoded.
      masks: in the order of the annotations table; decode_mask gives their pixels.
      row: the image's row of the images table, by column.
    """

    image_id: str
    status: str
    error: str | None
    size_hw: tuple[int, int] | None
    masks: tuple[Mask, ...]
    row: dict[str, Any]
    _photos: Photos = field(repr=False, compare=False)
    _config: ImageConfig = field(repr=False, compare=False)

    def pixels(self) -> np.ndarray:
        """Reads the photo, as it was labeled: (H, W, 3) uint8 RGB.

        Photos inside shards are fast only in the order of the labels.

        Raises:
          PhotoMissing: the image failed, its photo is not there, or it is not the one that was labeled.
        """
        if self.size_hw is None:
            raise PhotoMissing(f"{self.image_id} failed when it was labeled: {self.error}")
        return open_photo(self._photos.read(self.row), self.row["sha256"], self.size_hw, self._config)


def open_labels(labels: str, images: str | Sequence[str] | None = None) -> Iterator[ImageLabels]:
    """Every image of a directory of labels, one chunk at a time in memory.

    Args:
      labels: directory that `maskbeam label`, `refine` or `import` wrote; a path or a URI.
      images: where the photos are now: files, directories and globs, as for `maskbeam view --images`. None = where
        they were when they were labeled.

    Raises:
      ValueError: the directory holds no labels, or none of the images is there.
      DamagedFile: a file of the labels is damaged.
    """
    run = read_run(labels)
    photos = Photos(run.root or "/", [images] if isinstance(images, str) else images, run.input_format, run.read_config)
    return (
        ImageLabels(
            row["image_id"],
            row["status"],
            row["error"],
            None if row["width"] is None else (row["height"], row["width"]),
            tuple(row_to_mask(mask) for mask in masks),
            row,
            photos,
            run.image_config,
        )
        for chunk in read_chunks(labels)
        for row, masks in chunk.rows()
    )


def decode_mask(mask: Mask) -> np.ndarray:
    """The pixels of a mask, (H, W) bool."""
    return counts_to_mask(mask.counts, mask.size_hw)
