"""Photos of labeled images, found again by image_id: loose files one by one, shards read from end to end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from transforms.images import ImageConfig, ImageError, decode_image
from transforms.match import InputConfig, absolute, format_of, list_files, match_shards, shard_name
from transforms.read import ReadConfig, read_images, relative_path
from transforms.records import EncodedImage, Failure, Shard, SourceFile, printable


class PhotoMissing(ValueError):
    """There is no photo to show for an image; the message says why, for people."""


class Photos:
    """The photos of a run. Ask for those of a shard in the order of their rows: then it is read once."""

    def __init__(
        self,
        root: str,
        patterns: Sequence[str] | None,
        input_format: Literal["image", "tfrecord", "tar", "parquet"] | None = None,
        read: ReadConfig | None = None,
    ) -> None:
        """
        Args:
          root: directory that the run's image ids are relative to.
          patterns: files, directories and globs to look in, as for `label --input`. What lies in root is found by its
            path there, and everything by its path in the directory that all patterns have in common. None = where the
            photos were when they were labeled.
          input_format: of all files, one of FORMATS; None = by each file's name.
          read: names of features and columns in shards.

        Raises:
          ValueError: a pattern matches nothing usable.
        """
        self._root = root
        self._input_format = input_format
        self._read = read or ReadConfig()
        self._found: dict[str, Shard] | None = None
        self._current: tuple[Shard, Iterator[EncodedImage]] | None = None  # the shard that is being read
        self._row = -1  # the last one read of it
        if patterns is not None:
            matched = match_shards(InputConfig(tuple(patterns), input_format))
            self._found = {
                printable(relative_path(file.path, base)): self._one_file(file, shard.format)
                for base in (matched.root, root)  # the second wins
                for shard in matched.shards
                for file in shard.files
                if base == matched.root or file.path.startswith(root.rstrip("/") + "/")
            }

    def read(self, image_id: str, shard_path: str, row: int) -> EncodedImage:
        """The image's bytes, or the failure that says why there are none.

        Args:
          image_id, shard_path, row: as in the images table.
        """
        shard = self._find(image_id, shard_path, row)
        if shard is None:
            told = f"it is not below {self._root} any more" if self._found is None else "it is not among --images"
            return _missing(image_id, row, told)
        if shard.format == "image":
            return next(read_images(shard, self._read, self._root))
        if self._current is None or self._current[0] != shard or row <= self._row:
            self._current = (shard, read_images(shard, self._read, self._root))
        for image in self._current[1]:
            self._row = image.row
            if image.row == row:
                return image
        return _missing(image_id, row, f"{shard.path} has no row {row}")

    def _find(self, image_id: str, shard_path: str, row: int) -> Shard | None:
        """The file the image is in; as in `label`, ids of images in a shard end with # and their row."""
        packed_in = image_id.removesuffix(f"#{row}")
        if self._found is not None:
            return self._found.get(image_id) or self._found.get(packed_in)
        loose = packed_in == image_id or self._input_format == "image"
        path = f"{self._root.rstrip('/')}/{image_id}" if loose else shard_path
        if absolute(path) != path:  # an id with .. in it would lead out of the root
            return None
        try:
            files = [file for file in list_files(path)[1] if file.path == path]
        except (ValueError, OSError):  # a directory that cannot be listed, another file system that fails
            return None
        file_format = "image" if loose else self._input_format or format_of(path)
        return self._one_file(files[0], file_format) if files and file_format else None

    def _one_file(self, file: SourceFile, file_format: str) -> Shard:
        return Shard(shard_name(relative_path(file.path, self._root)), file.path, file_format, (file,))


def _missing(image_id: str, row: int, reason: str) -> EncodedImage:
    return EncodedImage(image_id, row, None, None, b"", Failure("read", reason))


def open_photo(image: EncodedImage, sha256: str | None, size_hw: tuple[int, int], config: ImageConfig) -> np.ndarray:
    """The pixels that were labeled, (H, W, 3) uint8.

    Args:
      sha256: of the bytes that were labeled, hex; None = not known, and not compared.
      size_hw: (H, W) that the masks have.

    Raises:
      PhotoMissing: the photo was not found, is another one, or cannot be decoded.
    """
    if image.failure:
        raise PhotoMissing(f"The photo was not found: {image.failure.reason}.")
    if sha256 is not None and hashlib.sha256(image.data).hexdigest() != sha256:
        raise PhotoMissing("The photo found is not the one that was labeled: its sha256 differs.")
    try:
        pixels = decode_image(image.data, config).pixels
    except ImageError as error:
        raise PhotoMissing(f"The photo was found, but {error}") from error
    if pixels.shape[:2] != size_hw:
        height, width = size_hw
        raise PhotoMissing(
            f"The photo found is {pixels.shape[1]} x {pixels.shape[0]} pixels, but the masks are {width} x {height}."
        )
    return pixels
