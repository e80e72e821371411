"""Photos of labeled images, found again: loose files one by one, shards read from end to end.

Where they were labeled, and in shards, photos are found by image_id. Loose files that lie elsewhere are found by
image_id, else by the name that the image had, else by their bytes: then all of them are read, but only once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np

from maskbeam.transforms.files.paths import absolute, list_files, relative_path
from maskbeam.transforms.images import ImageConfig, ImageError, decode_image
from maskbeam.transforms.labels.layout import shard_name
from maskbeam.transforms.match_shards import InputConfig, match_shards
from maskbeam.transforms.readers.formats import format_of
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.readers.shard import read_images
from maskbeam.transforms.records import EncodedImage, Failure, Shard, SourceFile, escape_name, unescape_name


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
          patterns: files, directories and globs to look in, as for `label --input`. What lies in root has the id of
            its path there, and everything that of its path in the directory that all patterns have in common. None =
            where the photos were when they were labeled.
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
        self._row: int | None = -1  # the last one read of it
        # Of the loose files that were read so far: path -> sha256, and back.
        self._sha256: dict[str, str] = {}
        self._by_sha256: dict[str, Shard] = {}
        if patterns is not None:
            matched = match_shards(InputConfig(tuple(patterns), input_format))
            self._found = {
                escape_name(relative_path(file.path, base)): self._one_file(
                    file, "image" if format_of(file.path) == "image" else shard.format
                )
                for base in (matched.root, root)  # the second wins
                for shard in matched.shards
                for file in shard.files
                if base == matched.root or file.path.startswith(root.rstrip("/") + "/")
            }

    def read(self, image: dict[str, Any]) -> EncodedImage:
        """The image's bytes, or the failure that says why there are none.

        Args:
          image: its row of the images table. With a sha256, only the file that has it is taken, if there is one;
            without one (imported labels), a file of that name, if there is no other.
        """
        if self._found is None:
            shard = self._where_it_was(image)
            reason = f"it is not below {self._root} any more"
            return _missing(image, reason) if shard is None else self._read_from(shard, image)
        named = self._named(image)
        nearest = None  # has the name, but other bytes
        for shard in chain(named, self._elsewhere(image, named)):
            found = self._read_from(shard, image)
            if image["sha256"] in (None, hashlib.sha256(found.data).hexdigest()):
                return found
            if shard in named:
                nearest = nearest or found
        return nearest or _missing(image, self._why_not(image))

    def _named(self, image: dict[str, Any]) -> list[Shard]:
        """The files that have the image's id or name as their path, the likeliest first."""
        found = self._found or {}
        # As in `label`, ids of images in a shard end with # and their row.
        names = (image["image_id"], image["image_id"].removesuffix(f"#{image['row']}"), image["file_name"])
        return list(dict.fromkeys(found[name] for name in names if name in found))

    def _elsewhere(self, image: dict[str, Any], named: list[Shard]) -> Iterator[Shard]:
        """Other loose files that may be the image: those of its base name, then the one that has its bytes."""
        sha256 = image["sha256"]
        same_name = self._by_name.get(_base_name(image), [])
        if sha256 is None:
            yield from same_name if len(same_name) == 1 else []
            return
        for shard in same_name:
            if shard not in named and self._sha256.get(shard.path, sha256) == sha256:
                yield shard
        while sha256 not in self._by_sha256 and (unread := next(self._unread, None)):
            if unread.path not in self._sha256:
                self._read_from(unread, image)
        if sha256 in self._by_sha256:
            yield self._by_sha256[sha256]

    def _why_not(self, image: dict[str, Any]) -> str:
        same_name = self._by_name.get(_base_name(image), [])
        if image["sha256"] is None and len(same_name) > 1:
            return f"{same_name[0].files[0].path} and {len(same_name) - 1} others have its name, and it has no sha256"
        return "it is not among --images"

    @cached_property
    def _loose(self) -> list[Shard]:
        shards = {shard.path: shard for shard in (self._found or {}).values() if shard.format == "image"}
        return [shards[path] for path in sorted(shards)]

    @cached_property
    def _by_name(self) -> dict[str, list[Shard]]:
        """Loose files by their base names."""
        by_name: dict[str, list[Shard]] = {}
        for shard in self._loose:
            by_name.setdefault(escape_name(shard.path.rpartition("/")[2]), []).append(shard)
        return by_name

    @cached_property
    def _unread(self) -> Iterator[Shard]:
        """Loose files that may be read for their sha256 alone."""
        return iter(self._loose)

    def _read_from(self, shard: Shard, image: dict[str, Any]) -> EncodedImage:
        """The image as it is in a file."""
        if shard.format == "image":
            found = next(read_images(shard, self._read, self._root))
            digest = hashlib.sha256(found.data).hexdigest()
            self._sha256[shard.path] = digest
            self._by_sha256.setdefault(digest, shard)
            return found
        row = image["row"]
        if self._current is None or self._current[0] != shard or row <= self._row:
            self._current = (shard, read_images(shard, self._read, self._root))
        for found in self._current[1]:
            self._row = found.row
            if found.row == row:
                return found
        return _missing(image, f"{shard.path} has no row {row}")

    def _where_it_was(self, image: dict[str, Any]) -> Shard | None:
        """The file that was labeled, if it is still there."""
        image_id = image["image_id"]
        loose = not image_id.endswith(f"#{image['row']}") or self._input_format == "image"
        path = f"{self._root.rstrip('/')}/{unescape_name(image_id)}" if loose else unescape_name(image["shard"])
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


def _base_name(image: dict[str, Any]) -> str:
    return (image["file_name"] or image["image_id"]).rpartition("/")[2]


def _missing(image: dict[str, Any], reason: str) -> EncodedImage:
    return EncodedImage(image["image_id"], image["row"], None, None, b"", Failure("read", reason))


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
