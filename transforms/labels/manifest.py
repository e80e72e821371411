"""The manifest of a run: which chunks its output has, and which files each of them holds.

A start writes it before it labels anything, and workers go by it, so that starts which saw different files never cut
the same photo into two chunks. It is never changed but replaced: run.json names the manifest that holds, and a start
that follows another one commits nothing more (maskbeam.transforms.labels.commit.check_run).

A chunk of loose files is an entry of its own. It keeps its index for good; where photos of it are gone or changed, it
gets a higher generation without them, and they come into new chunks. A file of many images is one entry.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.files.paths import relative_path
from maskbeam.transforms.files.storage import read_json, replace_file
from maskbeam.transforms.files.systems import path_exists
from maskbeam.transforms.labels.layout import ChunkKey, manifest_path
from maskbeam.transforms.records import Shard, SourceFile

# What run.json and every footer say of the layout of the output; 1 had no manifest, and does not say so.
FORMAT = 2


@dataclass(frozen=True)
class Manifest:
    """The chunks of a run.

    Attributes:
      id: names the manifest in run.json.
      generation: of the chunks that this manifest is the first to name; each manifest has a higher one than that which
        it replaces.
      root: directory that image ids are relative to.
      input: the patterns that were matched, relative to root.
      shards: what the input has.
      gone: files of many images that the input had once; their rows stay.
    """

    id: str
    generation: int
    root: str
    input: tuple[str, ...]
    shards: tuple[Shard, ...]
    gone: tuple[Shard, ...] = ()

    def holds(self, key: ChunkKey) -> bool:
        """Whether a committed chunk counts.

        One of loose files does until a higher generation of it is there: but for photos that are gone its rows are
        right, and other rows would be missing meanwhile.
        """
        if entry := self._loose.get((key.shard, key.index)):
            return key.generation <= entry.generation
        if container := self._containers.get(key.shard):
            return container.generation <= key.generation <= container.generation_of(key.index)
        return False

    def awaits(self, key: ChunkKey) -> bool:
        """Whether a start that goes by this manifest may be writing the files of a chunk."""
        if entry := self._loose.get((key.shard, key.index)):
            return key.generation == entry.generation
        container = self._containers.get(key.shard)
        return container is not None and key.generation == container.generation_of(key.index)

    def knows(self, key: ChunkKey) -> bool:
        """Whether a chunk's name is one that this run gives, in whatever generation."""
        return (key.shard, key.index) in self._loose or key.shard in self._containers

    def counting(self, committed: Iterable[ChunkKey]) -> list[ChunkKey]:
        """Those of the committed chunks that count, the highest generation of each, sorted."""
        return newest(key for key in committed if self.holds(key))

    @cached_property
    def _loose(self) -> dict[tuple[str, int], Shard]:
        return {(shard.name, shard.first_chunk): shard for shard in self.shards if shard.format == "image"}

    @cached_property
    def _containers(self) -> dict[str, Shard]:
        return {shard.name: shard for shard in (*self.shards, *self.gone) if shard.format != "image"}


def newest(committed: Iterable[ChunkKey]) -> list[ChunkKey]:
    """Of each chunk the highest generation, sorted."""
    found = {(key.shard, key.index): key for key in sorted(committed)}
    return sorted(found.values())


def write_manifest(output: str, manifest: Manifest) -> None:
    """Writes a manifest that does not hold yet, or that of a run with what was learned of its files.

    Raises:
      OSError: it cannot be written.
    """
    path = manifest_path(output, manifest.id)
    try:
        with replace_file(path) as file:
            file.write(json.dumps(manifest_to_json(manifest)).encode())
    except Exception as error:
        raise OSError(f"cannot write {path}: {describe_error(error)}") from error


def read_manifest(output: str, manifest_id: str | None) -> Manifest | None:
    """The manifest that run.json names; None if it names none, or there is none, or a damaged one."""
    if manifest_id is None:
        return None
    path = manifest_path(output, manifest_id)
    if not path_exists(path):
        return None
    try:
        content = read_json(path)
        root = content["root"]
        return Manifest(
            content["id"],
            content["generation"],
            root,
            tuple(content["input"]),
            tuple(_from_json(shard, root) for shard in content["shards"]),
            tuple(_from_json(shard, root) for shard in content["gone"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """For JSON; paths are relative to the root."""
    return {
        "format": FORMAT,
        "id": manifest.id,
        "generation": manifest.generation,
        "root": manifest.root,
        "input": manifest.input,
        "shards": [_to_json(shard, manifest.root) for shard in manifest.shards],
        "gone": [_to_json(shard, manifest.root) for shard in manifest.gone],
    }


def _to_json(shard: Shard, root: str) -> dict[str, Any]:
    return {
        "name": shard.name,
        "path": "" if shard.path == root else relative_path(shard.path, root),
        "format": shard.format,
        "first_chunk": shard.first_chunk,
        "max_images": shard.max_images,
        "generation": shard.generation,
        "redone": shard.redone,
        "digest": shard.digest,
        "files": [[relative_path(file.path, root), file.num_bytes, file.last_updated] for file in shard.files],
    }


def _from_json(entry: dict[str, Any], root: str) -> Shard:
    return Shard(
        entry["name"],
        _join(root, entry["path"]) if entry["path"] else root,
        entry["format"],
        tuple(SourceFile(_join(root, path), num_bytes, updated) for path, num_bytes, updated in entry["files"]),
        first_chunk=entry["first_chunk"],
        max_images=entry["max_images"],
        generation=entry["generation"],
        redone=tuple((index, generation) for index, generation in entry["redone"]),
        digest=entry["digest"],
    )


def _join(root: str, path: str) -> str:
    return f"{root.rstrip('/')}/{path}"
