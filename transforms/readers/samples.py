"""What readers give, and what they ask for: names of features and columns, and a sample of a shard."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

from maskbeam.transforms.records import NO_ANNOTATIONS, Annotations, printable

# No image is that large: a length beyond it is a broken file, or somebody else's format.
MAX_IMAGE_BYTES = 2**30


@dataclass(frozen=True)
class ReadConfig:
    """What the parts of a record are called; of each list the first name that a record has is used.

    Attributes:
      tfrecord_image: features with the encoded image.
      tfrecord_key: features with the record's own key.
      tfrecord_file_name: features with the image's file name.
      parquet_image: columns with the encoded image: binary, or a struct with a binary field `bytes`.
      parquet_key: columns with the row's own key.
      parquet_file_name: columns with the image's file name; without one, the field `path` of the image's struct.
    """

    tfrecord_image: tuple[str, ...] = (
        "image/encoded",
        "image",
        "image_raw",
        "image_bytes",
        "encoded",
        "img",
        "jpg",
        "jpeg",
        "png",
        "webp",
        "bytes",
    )
    tfrecord_key: tuple[str, ...] = ("image/source_id", "image/key/sha256", "image/id", "image_id", "id", "key")
    tfrecord_file_name: tuple[str, ...] = ("image/filename", "image/file_name", "file_name", "filename", "path")
    parquet_image: tuple[str, ...] = (
        *("image", "image_bytes", "img_bytes", "bytes", "img", "jpg", "jpeg", "png", "webp", "content", "data"),
    )
    parquet_key: tuple[str, ...] = ("key", "__key__", "image_id", "id", "sha256")
    parquet_file_name: tuple[str, ...] = ("file_name", "filename", "image_path", "path")

    def __post_init__(self) -> None:
        for field in fields(self):
            names = getattr(self, field.name)
            if isinstance(names, str) or not all(names) or (not names and field.name.endswith("_image")):
                raise ValueError(f"{field.name} is {names!r}; expected a list of names, none empty.")


@dataclass(frozen=True)
class Sample:
    """What a reader finds in a shard: an image's bytes, or the reason why there are none."""

    data: bytes = b""
    key: str | None = None
    file_name: str | None = None
    reason: str | None = None
    annotations: Annotations = NO_ANNOTATIONS
    prompts: pa.RecordBatch | None = None


def as_text(value: Any) -> str | None:
    """A key or file name as a record has it."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace") or None
    return None if value is None else printable(str(value)) or None
