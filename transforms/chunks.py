"""Cutting the images of a shard into chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

# A chunk also closes at this many bytes of encoded images, since it is held in memory.
CHUNK_BYTES = 256 * 2**20

T = TypeVar("T")


def cut_chunks(
    items: Iterable[T], num_bytes: Callable[[T], int], chunk_size: int
) -> Iterator[tuple[tuple[T, ...], bool]]:
    """Cuts items into groups of at most chunk_size items and, unless one alone is larger, CHUNK_BYTES.

    Yields:
      (group, final). There is always a final group, if need be an empty one.
    """
    group: list[T] = []
    group_bytes = 0
    for item in items:
        item_bytes = num_bytes(item)
        if group and (len(group) == chunk_size or group_bytes + item_bytes > CHUNK_BYTES):
            yield tuple(group), False
            group, group_bytes = [], 0
        group.append(item)
        group_bytes += item_bytes
    yield tuple(group), True
