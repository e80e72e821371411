"""The prompt store: prompts of millions of images, found by the image's name without being in anybody's memory.

Built once, within bounded memory: rows are appended to partitions by the top bits of their image's hash, and each
partition is sorted alone. Opened by mapping it: workers of one machine share its pages.

    keys.bin     (N,) uint64, hashes of the N images' names, ascending
    first.bin    (N + 1,) int64, the rows of image n are first[n] to first[n + 1]
    names.arrow  the names in the same order: a hash is not taken for the name
    rows.arrow   rows.SCHEMA without what no row has, in the order in which they came, image by image
    meta.json    figures and classes; written last
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maskbeam.transforms.prompt_files.categories import Categories
from maskbeam.transforms.prompt_files.config import PromptFilesError
from maskbeam.transforms.prompt_files.rows import SCHEMA

META_FILE = "meta.json"
STORE_FILES = ("keys.bin", "first.bin", "names.arrow", "rows.arrow", META_FILE)

_PARTITION_BITS = 6

# Rows named in reports.
MAX_SHOWN = 10

# Boxes that are looked at before they are taken for pixels.
_BOXES_LOOKED_AT = 100

_PART_SCHEMA = SCHEMA.set(SCHEMA.get_field_index("category"), pa.field("category", pa.int32())).append(
    pa.field("hash", pa.uint64())
)
_ROW_FIELDS = [field for field in SCHEMA if field.name not in ("image", "category")]


@dataclass(frozen=True)
class StoreMeta:
    """What a store holds.

    Attributes:
      rows, images: how many.
      lost: rows that name no image, and can be given to none.
      lost_shown: what is wrong with the first few of them.
      crowds: annotations of crowd regions, which are not among the rows.
      categories: id -> name.
      path_stems: names are paths without an extension.
      key: what of an image they are, a config.PromptsKey.
    """

    rows: int
    images: int
    lost: int
    lost_shown: tuple[str, ...]
    crowds: int
    categories: dict[int, str]
    path_stems: bool
    key: str

    @classmethod
    def read(cls, data: bytes) -> StoreMeta:
        """Inverse of `write`."""
        values = json.loads(data)
        categories = {int(category_id): name for category_id, name in values.pop("categories").items()}
        return cls(**{**values, "lost_shown": tuple(values["lost_shown"]), "categories": categories})

    def write(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self), indent=2).encode() + b"\n"


def hash_name(name: str) -> int:
    """64 bits of a name, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class StoreBuilder:
    """Takes rows in, batch by batch, and writes a store."""

    def __init__(self, directory: Path, categories: Categories) -> None:
        """
        Args:
          directory: empty; of this machine. Needs about twice the room of the store.
        """
        self._directory = directory
        self._categories = categories
        self._parts = _Partitions(directory)
        self._used: set[str] = set()
        self._rows = 0
        self._boxes_fit_float32 = True
        self._looked_at = 0
        self._look_relative = True
        self._lost = 0
        self._lost_shown: list[str] = []

    def __enter__(self) -> StoreBuilder:
        return self

    def __exit__(self, *error: object) -> None:
        self._parts.close()

    def add(self, batch: pa.RecordBatch) -> None:
        """Takes rows in.

        Args:
          batch: of rows.SCHEMA, `image` as it is to be found.

        Raises:
          PromptFilesError: classes contradict each other.
        """
        images = batch.column("image")
        if images.null_count:
            self._lose(batch.filter(images.is_null()))
            batch = batch.filter(images.is_valid())
            images = batch.column("image")
        if not len(batch):
            return
        self._rows += len(batch)
        self._used.update(field.name for field in _ROW_FIELDS if batch.column(field.name).null_count < len(batch))
        self._look_at_boxes(batch)
        codes = self._categories.add(batch.column("category"), batch.column("category_id"))
        if codes.null_count < len(codes):
            self._used.add("category_id")
        encoded = images.dictionary_encode()
        hashes = np.array([hash_name(name) for name in encoded.dictionary.to_pylist()], np.uint64)
        hashes = hashes[encoded.indices.to_numpy()]
        columns = [codes if field.name == "category" else batch.column(field.name) for field in SCHEMA]
        self._parts.append(pa.RecordBatch.from_arrays([*columns, pa.array(hashes)], schema=_PART_SCHEMA), hashes)

    def _lose(self, rows: pa.RecordBatch) -> None:
        self._lost += len(rows)
        room = MAX_SHOWN - len(self._lost_shown)
        self._lost_shown += [text or "a row has no image" for text in rows.column("problem").to_pylist()[:room]]

    def _look_at_boxes(self, batch: pa.RecordBatch) -> None:
        boxes = batch.column("bbox").drop_null().flatten().to_numpy()
        if self._boxes_fit_float32:
            with np.errstate(over="ignore"):
                self._boxes_fit_float32 = bool((boxes.astype(np.float32) == boxes).all())
        if batch.column("relative").null_count < len(batch):
            self._look_relative = False
        some = boxes[: 4 * (_BOXES_LOOKED_AT - self._looked_at)]
        self._looked_at += len(some) // 4
        self._look_relative = self._look_relative and bool(((some >= 0) & (some <= 1)).all())

    def finish(self, named: dict[int, str], crowds: int = 0, path_stems: bool = False, key: str = "auto") -> StoreMeta:
        """Writes the store.

        Args:
          named: id -> name of classes, as a file lists them beside its rows.
          crowds, path_stems, key: see StoreMeta.

        Raises:
          PromptFilesError: there is no row, boxes look like fractions of the image, classes contradict each other.
        """
        if not self._rows:
            raise PromptFilesError(
                f"there is no prompt in --prompts ({crowds} crowd regions and {self._lost} rows without an image are "
                f"none){': ' + self._lost_shown[0] if self._lost_shown else ''}."
            )
        if self._looked_at and self._look_relative:
            raise PromptFilesError(
                f"the first {self._looked_at} boxes of --prompts look relative: all their numbers are from 0 to 1, but "
                "pixels are expected. If they are fractions of the image's sides, say --prompts_bbox rel_xyxy, "
                "rel_xywh or rel_cxcywh, with the boxes in a column bbox."
            )
        ids, categories = self._categories.finish(named)
        if (ids < 0).any():
            self._used.add("problem")
        images = self._write(ids)
        meta = StoreMeta(self._rows, images, self._lost, tuple(self._lost_shown), crowds, categories, path_stems, key)
        (self._directory / META_FILE).write_bytes(meta.write())
        return meta

    def _write(self, category_ids: np.ndarray) -> int:
        schema = pa.schema([field for field in _ROW_FIELDS if field.name in self._used])
        if "bbox" in self._used and self._boxes_fit_float32:
            schema = schema.set(schema.get_field_index("bbox"), pa.field("bbox", pa.list_(pa.float32(), 4)))
        rows = images = 0
        with contextlib.ExitStack() as stack:
            keys, first = (stack.enter_context(open(self._directory / name, "wb")) for name in STORE_FILES[:2])
            names = stack.enter_context(_new_file(self._directory / "names.arrow", pa.schema([("name", pa.string())])))
            store = stack.enter_context(_new_file(self._directory / "rows.arrow", schema))
            for part in self._parts.read():
                part, starts = _sort(part)
                _write_array(keys, part["hash"].to_numpy()[starts])
                _write_array(first, (starts + rows).astype(np.int64))
                names.write_table(pa.table({"name": part["image"].take(pa.array(starts))}).combine_chunks())
                store.write_table(_select(part, schema, category_ids))
                rows, images = rows + len(part), images + len(starts)
            _write_array(first, np.array([rows], np.int64))
        return images


class _Partitions:
    """Rows on the disk by the top bits of their hash, in the order in which they came."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[int, pa.OSFile] = {}
        self._writers: dict[int, Any] = {}

    def append(self, batch: pa.RecordBatch, hashes: np.ndarray) -> None:
        part = (hashes >> np.uint64(64 - _PARTITION_BITS)).astype(np.int64)
        order = np.argsort(part, kind="stable")
        batch, part = batch.take(pa.array(order)), part[order]
        cuts = [0, *(np.flatnonzero(part[1:] != part[:-1]) + 1).tolist(), len(part)]
        for begin, end in pairwise(cuts):
            self._writer(int(part[begin])).write_batch(batch.slice(begin, end - begin))

    def _writer(self, part: int) -> Any:
        if part not in self._writers:
            self._files[part] = pa.OSFile(str(self._path(part)), "wb")
            options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)  # so nulls take no room
            self._writers[part] = pa.ipc.new_stream(self._files[part], _PART_SCHEMA, options=options)
        return self._writers[part]

    def _path(self, part: int) -> Path:
        return self._directory / f"part{part}.arrows"

    def read(self) -> Iterator[pa.Table]:
        """The partitions in the order of their hashes; each is deleted when it has been read."""
        for part in sorted(self._writers):
            self._writers[part].close()
            self._files[part].close()
            with pa.OSFile(str(self._path(part))) as file, pa.ipc.open_stream(file) as reader:
                rows = reader.read_all().combine_chunks()
            self._path(part).unlink()
            yield rows

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _sort(part: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """The rows image by image, and where each image begins; an image's rows stay in their order."""
    hashes = part["hash"].to_numpy()
    order = np.argsort(hashes, kind="stable")
    part, hashes = part.take(pa.array(order)).combine_chunks(), hashes[order]
    new_name = pc.not_equal(part["image"][1:], part["image"][:-1]).to_numpy()
    new_hash = hashes[1:] != hashes[:-1]
    if (new_name & ~new_hash).any():  # two names of one hash: hardly ever
        names = np.array(part["image"].to_pylist(), object)
        ranks = np.unique(names, return_inverse=True)[1]
        part = part.take(pa.array(np.lexsort((ranks, hashes)))).combine_chunks()
        new_name = pc.not_equal(part["image"][1:], part["image"][:-1]).to_numpy()
    return part, np.flatnonzero(np.concatenate([[True], new_name | new_hash]))


def _select(part: pa.Table, schema: pa.Schema, category_ids: np.ndarray) -> pa.Table:
    """The columns of a store, with all classes as ids; a class that there is not becomes a problem of its row."""
    if part["category"].null_count < len(part):
        codes = part["category"].fill_null(0).to_numpy()
        found = pa.array(category_ids[codes], mask=np.asarray(part["category"].is_null()))
        unknown = pc.fill_null(pc.equal(found, -1), False)
        if pc.any(unknown).as_py():
            told = pa.scalar("its class is not among --categories")
            problems = pc.if_else(pc.and_(unknown, part["problem"].is_null()), told, part["problem"])
            part = part.set_column(part.schema.get_field_index("problem"), "problem", problems)
        merged = pc.coalesce(part["category_id"], found)
        part = part.set_column(part.schema.get_field_index("category_id"), "category_id", merged)
    columns = [part[field.name].cast(field.type) for field in schema]  # another type: boxes that float32 holds
    return pa.Table.from_arrays(columns, schema=schema).combine_chunks()


@contextlib.contextmanager
def _new_file(path: Path, schema: pa.Schema) -> Iterator[Any]:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        yield writer


def _write_array(file: BinaryIO, values: np.ndarray) -> None:
    file.write(np.ascontiguousarray(values).tobytes())


class PromptStore:
    """An open store."""

    def __init__(self, directory: str) -> None:
        """
        Args:
          directory: of this machine.
        """
        self.meta = StoreMeta.read(Path(directory, META_FILE).read_bytes())
        self._keys = np.memmap(os.path.join(directory, "keys.bin"), np.uint64, "r")
        self._first = np.memmap(os.path.join(directory, "first.bin"), np.int64, "r")
        self._names = _map(directory, "names.arrow")["name"]
        self._rows = _map(directory, "rows.arrow")

    def find(self, name: str) -> pa.Table | None:
        """The rows of an image in their order, those of rows.SCHEMA that the store has; None if it has none."""
        index = self._index(name)
        return None if index is None else self._rows.slice(*self._span(index))

    def _span(self, index: int) -> tuple[int, int]:
        begin, end = self._first[index : index + 2].tolist()
        return begin, end - begin

    def _index(self, name: str) -> int | None:
        key = np.uint64(hash_name(name))
        index = int(np.searchsorted(self._keys, key))
        while index < len(self._keys) and self._keys[index] == key:
            if self._names[index].as_py() == name:
                return index
            index += 1
        return None

    def compare(self, used: Iterable[str]) -> StoreUse:
        """What of the store was used.

        Args:
          used: the name by which each image was found, once for each image.
        """
        times = np.zeros(len(self._keys), np.int8)
        for name in used:
            index = self._index(name)
            if index is not None:
                times[index] = min(times[index] + 1, 2)
        unused, shared = np.flatnonzero(times == 0), np.flatnonzero(times == 2)
        rows = int(np.diff(self._first)[unused].sum())
        return StoreUse(rows, self._shown(unused), self._shown(shared))

    def _shown(self, indices: np.ndarray) -> tuple[str, ...]:
        return tuple(self._names[index].as_py() for index in indices[:MAX_SHOWN].tolist())

    def some_names(self) -> Sequence[str]:
        """A few of the images' names."""
        return self._names[:MAX_SHOWN].to_pylist()


@dataclass(frozen=True)
class StoreUse:
    """What of a store was used.

    Attributes:
      unused: rows of images that were never asked for.
      unused_shown: names of a few of those.
      shared_shown: names of a few images that were asked for more than once: two images, the same prompts.
    """

    unused: int
    unused_shown: tuple[str, ...]
    shared_shown: tuple[str, ...]


def _map(directory: str, name: str) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(os.path.join(directory, name))).read_all()
