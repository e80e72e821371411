"""What a start finds in its output against what it finds in its input, and the manifest that it goes by.

Loose files are compared one by one. What is new or changed comes into new chunks; what is gone or changed leaves its
chunk, whose other rows are copied. A file of many images is as it was, or all of it is labeled again.

Size and time of a file are a hint. Where they are those of the manifest, the file is not opened; where they differ, its
bytes are compared with the sha256 of its rows, and only other bytes are a change.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any
from urllib.parse import unquote

from maskbeam.transforms.chunks import cut_chunks
from maskbeam.transforms.files.paths import relative_path
from maskbeam.transforms.labels.layout import ChunkKey, OutputConfig
from maskbeam.transforms.labels.manifest import Manifest
from maskbeam.transforms.labels.resume import CommittedChunk, InputChanged, is_finished, read_image_rows
from maskbeam.transforms.match_shards import Matched
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.readers.shard import read_images, read_loose
from maskbeam.transforms.records import EncodedImage, Shard, SourceFile, escape_name, unescape_name

# Files whose bytes are compared at the same time.
_THREADS = 16

_KEEP = "Restore it, label into another --output, or accept the change with --accept_changed"


@dataclass(frozen=True)
class Before:
    """What earlier starts left.

    Attributes:
      root: of the run, as run.json has it.
      manifest: the one that holds; None before version 2, and if it is damaged.
      present: all chunks that have an images file, damaged ones too.
      committed: those that are whole.
    """

    root: str
    manifest: Manifest | None
    present: frozenset[ChunkKey]
    committed: dict[ChunkKey, CommittedChunk]

    @cached_property
    def by_place(self) -> dict[tuple[str, int], list[CommittedChunk]]:
        """The whole chunks of a shard and index, the highest generation first."""
        found: dict[tuple[str, int], list[CommittedChunk]] = defaultdict(list)
        for key in sorted(self.committed, reverse=True):
            found[key.shard, key.index].append(self.committed[key])
        return found

    @cached_property
    def by_shard(self) -> dict[str, list[CommittedChunk]]:
        """The whole chunks of a shard."""
        found: dict[str, list[CommittedChunk]] = defaultdict(list)
        for key in sorted(self.committed):
            found[key.shard].append(self.committed[key])
        return found


@dataclass(frozen=True)
class Reconciled:
    """What came of it.

    Attributes:
      manifest: the one to go by; that of before, if nothing changed but what is known of the files.
      removed: photos whose rows go, since they are not in the input any more.
      changed: photos and shards whose bytes are others.
    """

    manifest: Manifest
    removed: tuple[str, ...]
    changed: tuple[str, ...]


def reconcile(
    before: Before,
    matched: Matched,
    patterns: tuple[str, ...],
    config: OutputConfig,
    chunk_size: int,
    read: ReadConfig,
    limit: int | None = None,
) -> Reconciled:
    """Compares the input with what is labeled.

    Args:
      before: what earlier starts left.
      matched: the input as it is now.
      patterns: that were matched, relative to the root.
      config: the output, and what to do about failed images and changed shards.
      chunk_size: images in a chunk.
      read: names inside shards.
      limit: label only the first so many images.

    Raises:
      InputChanged: it needs a word from the user: a changed shard, or rows that would go although the command is not
        that of before. The message names the file and what to do.
      OSError: a file cannot be read.
    """
    return _Reconciliation(before, matched, patterns, config, chunk_size, read, limit).result()


class _Reconciliation:
    """One comparison; collects what is new."""

    def __init__(
        self,
        before: Before,
        matched: Matched,
        patterns: tuple[str, ...],
        config: OutputConfig,
        chunk_size: int,
        read: ReadConfig,
        limit: int | None,
    ) -> None:
        self.before = before
        self.matched = matched
        self.patterns = patterns
        self.config = config
        self.chunk_size = chunk_size
        self.read = read
        self.limit = limit
        self.id = uuid.uuid4().hex
        generations = [key.generation for key in before.present]
        if before.manifest is not None:
            generations.append(before.manifest.generation)
        self.generation = max(generations, default=-1) + 1
        self.removed: list[str] = []
        self.changed: list[str] = []

    def result(self) -> Reconciled:
        manifest = self.before.manifest
        shards = [*self._containers(), *self._loose()]
        shards.sort(key=lambda shard: (shard.path, shard.format, shard.first_chunk))
        gone = self._gone()
        self._check_command()
        old = {_identity(shard) for shard in manifest.shards} if manifest else set()
        if manifest and old == {_identity(shard) for shard in shards} and _names(gone) == _names(manifest.gone):
            same = replace(manifest, root=self.matched.root, input=self.patterns, shards=tuple(shards), gone=gone)
            return Reconciled(same, (), ())
        new = Manifest(self.id, self.generation, self.matched.root, self.patterns, tuple(shards), gone)
        return Reconciled(new, tuple(self.removed), tuple(self.changed))

    def _new(self, shard: Shard) -> Shard:
        """A chunk, or a file of many images, that has to be made."""
        return replace(shard, generation=self.generation, redone=(), digest=self.id)

    # Loose files.

    def _loose(self) -> Iterator[Shard]:
        now: dict[str, list[Shard]] = defaultdict(list)
        for shard in self.matched.shards:
            if shard.format == "image":
                now[shard.name].append(shard)
        entries = self._loose_entries()
        for name in sorted(now.keys() | entries.keys()):
            yield from self._directory(now.get(name, []), entries.get(name, []))

    def _loose_entries(self) -> dict[str, list[Shard]]:
        """The chunks of loose files that there were, by the names of their directories."""
        entries: dict[str, list[Shard]] = defaultdict(list)
        if self.before.manifest is not None:
            for shard in self.before.manifest.shards:
                if shard.format == "image":
                    entries[shard.name].append(_moved(shard, self.before.manifest.root, self.matched.root))
            return entries
        paths = {
            escape_name(relative_path(file.path, self.matched.root)): file.path
            for shard in self.matched.shards
            for file in shard.files
        }
        for (name, index), (chunk, *_) in self.before.by_place.items():
            if self._is_packed(name):
                continue
            files = tuple(
                SourceFile(paths.get(row["image_id"], f"{self.matched.root}/{unescape_name(row['image_id'])}"), -1)
                for row in read_image_rows(self.config.output, chunk.key)
            )
            entries[name].append(
                Shard(name, "", "image", files, index, generation=chunk.key.generation, digest=chunk.report.digest)
            )
        return entries

    def _is_packed(self, name: str) -> bool:
        """Without a manifest: whether a shard that has rows is a file of many images."""
        if name in self._formats:
            return self._formats[name] != "image"
        for chunk in self.before.by_shard[name]:
            for row in read_image_rows(self.config.output, chunk.key):
                return row["image_id"].endswith(f"#{row['row']}")
        return True

    @cached_property
    def _formats(self) -> dict[str, str]:
        return {shard.name: shard.format for shard in self.matched.shards}

    def _directory(self, shards: list[Shard], entries: list[Shard]) -> Iterator[Shard]:
        """The chunks of one directory: those that stay, the rest of those that lost files, and new ones."""
        files = {file.path: file for shard in shards for file in shard.files}
        path = shards[0].path if shards else ""
        taken: set[str] = set()
        for entry in entries:
            kept = self._kept(entry, files)
            taken |= {file.path for file in kept}
            # A damaged file is not replaced: another start may be mending it.
            damaged = ChunkKey(entry.name, entry.first_chunk, entry.generation) in self._damaged
            if kept and len(kept) == len(entry.files) and not damaged:
                yield replace(entry, path=path, files=kept)
            elif kept:
                yield self._new(replace(entry, path=path, files=kept))
        places = [entry.first_chunk for entry in entries]
        places += [chunk.key.index for chunk in self.before.by_shard.get(shards[0].name if shards else "", [])]
        new = [file for path, file in files.items() if path not in taken]
        for index, (group, _) in enumerate(
            cut_chunks(new, lambda file: file.num_bytes, self.chunk_size), max(places, default=-1) + 1
        ):
            if group:
                yield self._new(Shard(shards[0].name, path, "image", group, first_chunk=index))

    def _kept(self, entry: Shard, now: dict[str, SourceFile]) -> tuple[SourceFile, ...]:
        """Those of a chunk's files whose rows, or whose place in a chunk that is not done yet, are right."""
        source = self.source_of(entry)
        there = [(file, now[file.path]) for file in entry.files if file.path in now]
        if source is None:  # to be labeled; of a file that nobody has read yet, the hint stays
            return tuple(file for file, _ in there)
        self.removed += [self._name(file) for file in entry.files if file.path not in now]
        retry = source.failed if self.config.retry_failed else frozenset()
        there = [(file, found) for file, found in there if escape_name(self._name(file)) not in retry]
        suspects = [found for file, found in there if _hint(file) != _hint(found)]
        changed: set[str] = set()
        if suspects:
            sha256 = {row["image_id"]: row["sha256"] for row in read_image_rows(self.config.output, source.key)}
            with ThreadPoolExecutor(_THREADS) as threads:
                for file, found in zip(suspects, threads.map(_sha256, suspects), strict=True):
                    if found is None or found != sha256[escape_name(self._name(file))]:
                        changed.add(file.path)
                        self.changed.append(self._name(file))
        return tuple(found for _, found in there if found.path not in changed)

    def source_of(self, entry: Shard) -> CommittedChunk | None:
        """The committed chunk that has an entry's rows: the entry's own, or an earlier one that it is copied from."""
        return source_of(entry, self.before, self.config.output, self.matched.root)

    @cached_property
    def _damaged(self) -> frozenset[ChunkKey]:
        return self.before.present - self.before.committed.keys()

    def _name(self, file: SourceFile) -> str:
        return relative_path(file.path, self.matched.root)

    # Files of many images.

    def _containers(self) -> Iterator[Shard]:
        entries = self._container_entries()
        self._check_limit(entries)
        for shard in self.matched.shards:
            if shard.format != "image":
                entry = entries.get(shard.name)
                yield self._new(shard) if entry is None else self._container(shard, entry)

    def _container_entries(self) -> dict[str, Shard]:
        manifest = self.before.manifest
        if manifest is not None:
            return {
                shard.name: _moved(shard, manifest.root, self.matched.root)
                for shard in (*manifest.shards, *manifest.gone)
                if shard.format != "image"
            }
        return {
            name: Shard(
                name,
                f"{self.matched.root}/{unquote(name)}",
                "",
                (),
                generation=chunks[0].key.generation,
                digest=chunks[0].report.digest,
            )
            for name, chunks in self.before.by_shard.items()
            if self._is_packed(name)
        }

    def _container(self, shard: Shard, entry: Shard) -> Shard:
        """A file of many images that there was: as it was, some of its chunks done again, or all of it."""
        chunks = [
            chunk
            for chunk in self.before.by_shard.get(shard.name, [])
            if (chunk.key.generation, chunk.report.digest) == (entry.generation_of(chunk.key.index), entry.digest)
        ]
        files = entry.files
        if [*map(_hint, entry.files)] != [*map(_hint, shard.files)]:
            if change := self._difference(shard, chunks):
                self.changed.append(shard.path)
                if not self.config.accept_changed:
                    raise InputChanged(
                        f"{shard.path} changed since it was labeled: {change}. Its labels would be of two versions. "
                        f"{_KEEP}, which labels it again."
                    )
                return self._new(shard)
            # Until all of it is labeled, somebody may be labeling bytes of before.
            files = shard.files if is_finished([chunk.report for chunk in chunks]) else files
        again = {
            key.index
            for key in self._damaged
            if key.shard == shard.name and key.generation == entry.generation_of(key.index)
        }
        if self.config.retry_failed:
            again |= {chunk.key.index for chunk in chunks if chunk.failed}
        redone = {**dict(entry.redone), **dict.fromkeys(again, self.generation)}
        return replace(
            shard,
            files=files,
            generation=entry.generation,
            redone=tuple(sorted(redone.items())),
            digest=entry.digest,
        )

    def _difference(self, shard: Shard, chunks: list[CommittedChunk]) -> str:
        """In what a file differs from the rows of its committed chunks, "" if in nothing."""
        if not chunks:
            return ""
        rows = {row["row"]: row for chunk in chunks for row in read_image_rows(self.config.output, chunk.key)}
        wanted = max(rows, default=-1) + 1
        images = read_images(replace(shard, max_images=None), self.read, self.matched.root)
        count = 0
        for image in islice(images, wanted):
            count += 1
            row = rows.get(image.row)
            if row is not None and not _is_image_of(image, row):
                return f"its image {image.row} is another one"
        if count < wanted:
            return f"it has {count} images, and had {wanted} or more"
        if is_finished([chunk.report for chunk in chunks]) and shard.max_images is None and next(images, None):
            return f"it has more than the {wanted} images of before"
        return ""

    def _gone(self) -> tuple[Shard, ...]:
        """Files of many images that the input has no more, and that have rows."""
        names = {shard.name for shard in self.matched.shards}
        return tuple(
            sorted(
                (
                    entry
                    for name, entry in self._container_entries().items()
                    if name not in names and self.before.by_shard.get(name)
                ),
                key=lambda shard: shard.name,
            )
        )

    # What needs a word.

    def _check_limit(self, entries: dict[str, Shard]) -> None:
        """With a limit, another file before the last one changes which images are the first.

        Raises:
          InputChanged
        """
        if self.limit is None or not self.before.committed:
            return
        now = {shard.name: shard for shard in self.matched.shards if shard.format != "image"}
        changes = {
            **{shard.path: "is new" for name, shard in now.items() if name not in entries},
            **{entry.path: "is not among them any more" for name, entry in entries.items() if name not in now},
            **{
                now[name].path: "gives other ones"
                for name in now.keys() & entries.keys()
                if self._cut_elsewhere(now[name], entries[name])
            },
        }
        if changes:
            first = min(changes)  # what follows is a consequence
            raise InputChanged(
                f"the first {self.limit} images (--limit) are not those that were labeled: {first} {changes[first]}. "
                "Restore the input, label into another --output, or start over with --overwrite."
            )

    def _cut_elsewhere(self, now: Shard, entry: Shard) -> bool:
        return self.before.manifest is not None and now.max_images != entry.max_images

    def _check_command(self) -> None:
        """Rows go only if it is the input that changed, not the command.

        Raises:
          InputChanged
        """
        manifest = self.before.manifest
        same = self.before.root == self.matched.root and (manifest is None or manifest.input == self.patterns)
        lost = [*self.removed, *self.changed]
        if same or not lost or self.config.accept_changed:
            return
        before = self.before.root if manifest is None else f"{', '.join(manifest.input) or '.'} in {manifest.root}"
        raise InputChanged(
            f"the input was {before}, now it is {', '.join(self.patterns) or '.'} in {self.matched.root}, and "
            f"{len(lost)} labeled images are not there or are others, such as {sorted(lost)[0]}: their rows would go. "
            "Use the same --input, another --output, or accept it with --accept_changed."
        )


def source_of(entry: Shard, before: Before, output: str, root: str) -> CommittedChunk | None:
    """The committed chunk that has the rows of a chunk of loose files: itself, or an earlier one to copy them from."""
    for chunk in before.by_place.get((entry.name, entry.first_chunk), []):
        if chunk.key.generation == entry.generation and chunk.report.digest == entry.digest:
            return chunk
        if chunk.key.generation < entry.generation:
            found = {row["image_id"] for row in read_image_rows(output, chunk.key)}
            if found >= {escape_name(relative_path(file.path, root)) for file in entry.files}:
                return chunk
    return None


def _identity(shard: Shard) -> tuple[Any, ...]:
    """What makes two entries the same; what is known of their files apart."""
    return (shard.name, shard.first_chunk, shard.generation, shard.redone, shard.digest, shard.max_images)


def _names(shards: tuple[Shard, ...]) -> list[str]:
    return [shard.name for shard in shards]


def _moved(shard: Shard, before: str, now: str) -> Shard:
    """An entry whose files lie below another root."""
    if before == now:
        return shard
    path = now if shard.path == before else f"{now.rstrip('/')}/{relative_path(shard.path, before)}"
    files = tuple(replace(file, path=f"{now.rstrip('/')}/{relative_path(file.path, before)}") for file in shard.files)
    return replace(shard, path=path, files=files)


def _hint(file: SourceFile) -> tuple[int, float]:
    return file.num_bytes, file.last_updated


def _sha256(file: SourceFile) -> str | None:
    sample = read_loose(file)
    return None if sample.reason or not sample.data else hashlib.sha256(sample.data).hexdigest()


def _is_image_of(image: EncodedImage, row: dict[str, Any]) -> bool:
    sha256 = hashlib.sha256(image.data).hexdigest() if image.data else None
    return (sha256, image.key, image.file_name) == (row["sha256"], row["key"], row["file_name"])
