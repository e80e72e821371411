"""What prompts and images call each other: letter by letter, and never guessed."""

from __future__ import annotations

import pyarrow as pa

from maskbeam.transforms.images import has_image_extension
from maskbeam.transforms.prompt_files.rows import SCHEMA
from maskbeam.transforms.records import EncodedImage


def without_extension(name: str) -> str:
    """A path without the extension of an image.

    >>> without_extension("a.b/2024.01.jpg"), without_extension("2024.01")
    ('a.b/2024.01', '2024.01')
    """
    return name.rpartition(".")[0] if has_image_extension(name) else name


def stem(name: str) -> str:
    """The base name without the extension of an image.

    >>> stem("train/0001.jpg"), stem("0001")
    ('0001', '0001')
    """
    return without_extension(name.rpartition("/")[2])


def names_of(image: EncodedImage, key: str, path_stems: bool) -> list[str]:
    """The names by which an image's prompts may be found, in the order in which they are tried.

    Args:
      key: a config.PromptsKey.
      path_stems: the prompts' names are paths without an extension.
    """
    names = {"image_id": image.image_id, "file_name": image.file_name, "key": image.key}
    if key == "stem":
        return [stem(image.file_name or image.key or image.image_id)]
    chosen = [name for kind, name in names.items() if key in ("auto", kind) and name is not None]
    return list(dict.fromkeys(without_extension(name) if path_stems else name for name in chosen))


def with_stems(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Rows whose images are called by their stems."""
    encoded = batch.column("image").dictionary_encode()
    stems = pa.array([stem(name) for name in encoded.dictionary.to_pylist()], pa.string())
    index = SCHEMA.get_field_index("image")
    return batch.set_column(index, SCHEMA.field(index), stems.take(encoded.indices))
