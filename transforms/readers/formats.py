"""Which format a shard has, by its name."""

from __future__ import annotations

from maskbeam.transforms.images import has_image_extension

TAR_EXTENSIONS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def format_of(path: str) -> str | None:
    """The format a file's name tells, None if it tells none.

    >>> format_of("d/train.tfrecord-00000-of-00010"), format_of("a.tar.gz"), format_of("a.parquet"), format_of("a.txt")
    ('tfrecord', 'tar', 'parquet', None)
    """
    base = path.rpartition("/")[2].lower()
    if ".tfrecord" in base:
        return "tfrecord"
    if base.endswith(TAR_EXTENSIONS):
        return "tar"
    if base.endswith(".parquet"):
        return "parquet"
    return "image" if has_image_extension(base) else None
