"""Shards -> images, still encoded: one small reader a format, and the cutting into Chunks.

A broken file never raises: it gives the images that can be had, and a failed one that says where it breaks off.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import tarfile
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import IO, Any, TypeVar

import google_crc32c
import pyarrow as pa

from transforms.backend import native_stderr_silenced
from transforms.images import has_image_extension
from transforms.outage import StoreUnavailable, is_out
from transforms.parquet_file import checked_row_groups, open_parquet
from transforms.records import (
    NO_ANNOTATIONS,
    Annotations,
    Chunk,
    EncodedImage,
    Failure,
    Shard,
    SourceFile,
    escape_name,
    printable,
)
from transforms.source import (
    allowed_inflation,
    decompress,
    describe_bomb,
    describe_error,
    open_file,
    read_up_to,
)

# A chunk also closes at this many bytes of encoded images, since it is held in memory.
CHUNK_BYTES = 256 * 2**20
# No image is that large: a length beyond it is a broken file, or somebody else's format.
MAX_IMAGE_BYTES = 2**30

# What precedes a tar member's data: names, and whatever else its tools note. Python reads all of it into memory, and
# versions before 3.11.10 and 3.12.6 take quadratic time for it (CVE-2024-6232).
MAX_TAR_HEADER_BYTES = 2**17
MAX_TAR_GLOBAL_HEADERS = 100
# Of a member with holes that take no place in the archive. Photos have none.
MAX_SPARSE_BYTES = 2**26
# A whole archive is read with three of these.
_MAX_READS_PAST_END = 10

# Characters of a record's key and file name: those of a whole chunk are in memory.
MAX_NAME = 2**20

# Characters of a failure's reason: members and columns are named in it, and there may be thousands.
MAX_REASON = 1000
_MEMBERS_NAMED = 20

# Images of a tar's sample that are held until a photo shows that they are its annotations: at most so many, or bytes.
HELD_IMAGES = 16
HELD_BYTES = 32 * 2**20

T = TypeVar("T")


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


def read_images(shard: Shard, config: ReadConfig, root: str) -> Iterator[EncodedImage]:
    """The images of a shard in the order of its rows. Raises nothing, whatever the files hold.

    Args:
      shard: what to read; no more than its max_images are given, and no more is read than they need.
      config: names of features and columns.
      root: directory that image ids are relative to.
    """
    samples: Iterable[Sample]
    image_ids: Iterable[str]
    if shard.format == "image":
        samples = map(read_loose, shard.files)
        image_ids = (relative_path(file.path, root) for file in shard.files)
    else:
        samples = read_container(shard.files[0], READERS[shard.format], config)
        image_ids = (f"{relative_path(shard.path, root)}#{row}" for row in itertools.count())
    rows: Iterable[int | None] = itertools.repeat(None) if shard.format == "image" else itertools.count()
    for found, image_id, row in zip(itertools.islice(samples, shard.max_images), image_ids, rows, strict=False):
        sample = _without_long_names(found)
        reason = sample.reason or (None if sample.data else "the image has no bytes")
        failure = Failure("read", printable(reason)[:MAX_REASON]) if reason else None
        yield EncodedImage(
            escape_name(image_id), row, sample.key, sample.file_name, sample.data, failure, sample.annotations
        )


def _without_long_names(sample: Sample) -> Sample:
    longest = max(len(sample.key or ""), len(sample.file_name or ""))
    if longest <= MAX_NAME:
        return sample
    return Sample(reason=f"the key or file name has {longest} characters; at most {MAX_NAME} are read")


def read_chunks(
    shard: Shard, config: ReadConfig, root: str, chunk_size: int, finished: Container[int]
) -> Iterator[Chunk]:
    """The chunks of a shard that are not finished. At most one of them and one image more are in memory.

    Args:
      chunk_size: images in a chunk; it also closes at CHUNK_BYTES.
      finished: indices of the chunks to leave out. They are cut again all the same, so the others stay what they
        were; finished loose files are not even opened.
    """
    if shard.format == "image":
        if shard.first_chunk not in finished:
            images = tuple(read_images(shard, config, root))
            yield Chunk(shard, shard.first_chunk, images, final=True, digest=shard.digest)
        return
    index = shard.first_chunk
    for images, final in cut_chunks(read_images(shard, config, root), lambda image: len(image.data), chunk_size):
        if index not in finished:
            yield Chunk(shard, index, images, final, shard.digest)
        del images  # or it would stay in memory beside the next one
        index += 1


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


def relative_path(path: str, root: str) -> str:
    """A path below root without the root.

    >>> relative_path("gs://b/train/a.tar", "gs://b"), relative_path("/a.tar", "/")
    ('train/a.tar', 'a.tar')
    """
    return path.removeprefix(root if root.endswith("/") else root + "/")


def read_loose(file: SourceFile) -> Sample:
    """One image file."""
    name = escape_name(file.path.rpartition("/")[2])
    too_large = Sample(file_name=name, reason=f"the file is larger than {MAX_IMAGE_BYTES} bytes")
    if file.num_bytes > MAX_IMAGE_BYTES:
        return too_large
    try:
        with open_file(file) as source:
            data = read_up_to(source, MAX_IMAGE_BYTES + 1)
    except StoreUnavailable:  # no fault of the image
        raise
    except OSError as error:
        return Sample(file_name=name, reason=str(error))
    return Sample(data, file_name=name) if len(data) <= MAX_IMAGE_BYTES else too_large


Reader = Callable[[io.BufferedReader, ReadConfig], Iterator[Sample]]


def read_container(file: SourceFile, reader: Reader, config: ReadConfig) -> Iterator[Sample]:
    """The samples of one file of many images and, where it breaks off, one that says why."""
    head = b""
    none_yet = True
    try:
        with open_file(file) as source:
            head = source.peek(16)[:16]
            if not head:
                raise ValueError("the file is empty (0 bytes)")
            for sample in reader(source, config):
                none_yet = False
                yield sample
    except ImportError:  # a fault of the installation, not of the file
        raise
    except Exception as error:  # parsers raise all sorts of things on broken bytes; none may end the job
        is_out(file.path)  # then it is no fault of the shard
        begins = f"; the file begins with {head!r}" if head and none_yet else ""
        yield Sample(reason=f"the shard breaks off here: {describe_error(error)}{begins}")


def read_tfrecord(source: io.BufferedReader, config: ReadConfig) -> Iterator[Sample]:
    """The tf.train.Examples of a TFRecord file."""
    for offset, record, intact in tfrecord_records(source):
        if intact:
            yield parse_example(record, config)
        else:
            yield Sample(reason=f"the record at byte {offset} is damaged: its checksum is wrong")


def tfrecord_records(source: io.BufferedReader) -> Iterator[tuple[int, bytes, bool]]:
    """The records of a TFRecord file, compressed or not: byte offset, bytes, and whether their checksum is right.

    A record is: length, uint64 little endian | masked CRC32C of the length | bytes | masked CRC32C of the bytes
    (tensorflow/core/lib/io/record_writer.h).

    Raises:
      ValueError: a length is damaged, or the stream is cut.
    """
    header = source.peek(12)[:12]
    # Some lengths look like the magic of a compression, but no compressed file has their checksum.
    plain = _masked_crc32c(header[:8]) == header[8:]
    stream = source if plain else decompress(source)
    offset = 0
    while header := _read_at(stream, 12, offset):
        length = int.from_bytes(header[:8], "little")
        if len(header) < 12:
            raise ValueError(f"the file is cut within the header at byte {offset}")
        if header[8:] != _masked_crc32c(header[:8]):
            raise ValueError(f"at byte {offset} there is no TFRecord header: the checksum of the length is wrong")
        if length > MAX_IMAGE_BYTES:
            raise ValueError(f"the record at byte {offset} has {length} bytes; at most {MAX_IMAGE_BYTES} are read")
        record, checksum = _read_at(stream, length, offset), _read_at(stream, 4, offset)
        if len(checksum) < 4:
            raise ValueError(f"the file is cut within the record at byte {offset}")
        yield offset, record, checksum == _masked_crc32c(record)
        offset += 16 + length


def _read_at(stream: IO[bytes], num_bytes: int, offset: int) -> bytes:
    try:
        return read_up_to(stream, num_bytes)
    except Exception as error:
        raise ValueError(f"the record at byte {offset} cannot be read: {describe_error(error)}") from error


def _masked_crc32c(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


@functools.cache
def _tensorflow() -> Any:
    """TensorFlow, imported without its talk. It is heavy: only those who read TFRecords pay for it."""
    with native_stderr_silenced():
        import tensorflow

    return tensorflow


def parse_example(record: bytes, config: ReadConfig) -> Sample:
    """The image of a serialized tf.train.Example."""
    example = _tensorflow().train.Example  # outside the try: a missing package is no fault of the record
    try:
        features = example.FromString(record).features.feature
    except Exception:  # protobuf's DecodeError
        return Sample(reason=f"the record is no tf.train.Example; it begins with {record[:16]!r}")

    def first(names: tuple[str, ...]) -> str | None:
        for name in names:
            # `in` first: asking the map for a name it lacks would add it.
            kind = features[name].WhichOneof("kind") if name in features else None
            values = getattr(features[name], kind).value if kind else ()
            if values and (text := _text(values[0])):
                return text
        return None

    key, file_name = first(config.tfrecord_key), first(config.tfrecord_file_name)
    for name in config.tfrecord_image:
        if name in features and features[name].bytes_list.value:
            return Sample(features[name].bytes_list.value[0], key, file_name)
    found = ", ".join(f"{name} ({features[name].WhichOneof('kind')})" for name in sorted(features)) or "none"
    return Sample(
        key=key,
        file_name=file_name,
        reason=f"no image feature. Features: {found}. Name the one with the encoded image with --tfrecord_image",
    )


class _TarStream:
    """What tarfile reads from, with a limit on what it reads for one header, and no way past the end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._header_bytes_left: int | None = None
        self._reads_past_end = 0

    def read(self, num_bytes: int) -> bytes:
        data = self._stream.read(num_bytes)
        if not data:
            self._reads_past_end += 1
            # tarfile would go on, block by block, through all the bytes that a header claims.
            if self._reads_past_end > _MAX_READS_PAST_END:
                raise tarfile.ReadError("unexpected end of data")
        if self._header_bytes_left is not None:
            self._header_bytes_left -= len(data)
            if self._header_bytes_left < 0:
                raise ValueError(f"a member's header has more than {MAX_TAR_HEADER_BYTES} bytes")
        return data

    @contextlib.contextmanager
    def reading_header(self) -> Iterator[None]:
        """Within this, reading is limited. Headers consist of headers; the limit is for all of a member's."""
        outermost = self._header_bytes_left is None
        if outermost:
            self._header_bytes_left = MAX_TAR_HEADER_BYTES
        try:
            yield
        finally:
            if outermost:
                self._header_bytes_left = None


class _StrictTarInfo(tarfile.TarInfo):
    """Reports a cut, damaged or endless header; the first two tarfile would take for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _StrictTarInfo:
        stream: _TarStream = tar.fileobj.fileobj  # type: ignore[attr-defined]
        try:
            with stream.reading_header():
                return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the zeros that end an archive
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def read_tar(source: io.BufferedReader, config: ReadConfig) -> Iterator[Sample]:
    """The samples of a WebDataset, or of any tar of images.

    Consecutive members with the same path up to the first dot of the base name are one sample, that path is its key.
    Which of its images are rows, _PhotosOfSample decides. Links are never followed.
    """
    stream = source if source.peek(262)[257:262] == b"ustar" else decompress(source)
    # Small blocks: of a compressed stream that breaks off, the block in which it does is lost.
    with tarfile.open(  # type: ignore[call-overload]
        fileobj=_TarStream(stream),  # it needs no more than read
        mode="r|",
        bufsize=512,
        tarinfo=_StrictTarInfo,
        errors="surrogateescape",
    ) as tar:
        last_name: str | None = None
        photos = _PhotosOfSample("")
        try:
            for key, members in itertools.groupby(_tar_members(tar), lambda member: webdataset_key(member.name)):
                photos = _PhotosOfSample(key)
                for member in members:
                    last_name = member.name
                    yield from photos.add(member, partial(_read_member, tar, member, key))
                yield from photos.close()
            _check_end(tar)
        except Exception as error:
            yield from photos.rest()
            where = f"after member {last_name!r}, " if last_name is not None else ""
            raise ValueError(f"{where}at byte {tar.fileobj.tell()} of the archive: {describe_error(error)}") from error


class _PhotosOfSample:
    """Which images of a sample are rows, as its members come.

    A photo has the sample's key for its whole name, as 17.jpg has in sample 17: each is a row, even if there are two of
    one name, or 17.jpg and 17.png. Beside a photo, images with more in their names, 17.seg.png, are annotations: they
    are counted and named with the photo. Without one, as of 2024.01.01.jpg and 2024.01.02.jpg, each is a row.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._names: list[str] = []  # of the first members, for people
        self._photo: Sample | None = None  # not given yet: more annotations of it may come
        self._held: list[tuple[str, Sample]] = []  # may turn out to be annotations
        self._held_bytes = 0
        self._annotations = NO_ANNOTATIONS
        self._all_rows = False
        self._any = False

    def add(self, member: tarfile.TarInfo, read: Callable[[], Sample]) -> list[Sample]:
        """The images that are known to be rows now that this member has come."""
        if len(self._names) < _MEMBERS_NAMED:
            self._names.append(member.name)
        if not member.isreg() or not has_image_extension(member.name):
            return []
        self._any = True
        if self._all_rows:
            return [read()]
        suffix = member.name[len(self._key) + 1 :]
        if "." not in suffix:
            photo = read()
            ready = self.rest() if self._photo else []
            for held, _ in self._held:
                self._annotations += Annotations(1, (escape_name(held),))
            self._held, self._photo = [], photo
            return ready
        if self._photo:
            self._annotations += Annotations(1, (escape_name(suffix),))
            return []
        self._held.append((suffix, read()))
        self._held_bytes += len(self._held[-1][1].data)
        self._all_rows = len(self._held) > HELD_IMAGES or self._held_bytes > HELD_BYTES
        return self.rest() if self._all_rows else []

    def close(self) -> list[Sample]:
        """The remaining rows of a sample that is complete; there is at least one in all."""
        if not self._any:
            reason = f"the sample has no image file. Members: {', '.join(map(repr, self._names))}"
            return [Sample(key=escape_name(self._key), reason=reason)]
        return self.rest()

    def rest(self) -> list[Sample]:
        """The rows that have not been given yet."""
        rows = [sample for _, sample in self._held]
        if self._photo:
            rows = [replace(self._photo, annotations=self._annotations)]
        self._held, self._photo, self._annotations = [], None, NO_ANNOTATIONS
        return rows


def _tar_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
        if len(tar.pax_headers) > MAX_TAR_GLOBAL_HEADERS:  # and these
            raise ValueError(f"the archive has more than {MAX_TAR_GLOBAL_HEADERS} global headers")
        # macOS puts a file "._name" with metadata before each file.
        if not member.isdir() and not member.name.rpartition("/")[2].startswith("._"):
            yield member


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, key: str) -> Sample:
    if member.size > MAX_IMAGE_BYTES:
        reason = f"member {member.name!r} has {member.size} bytes; at most {MAX_IMAGE_BYTES} are read"
        return Sample(key=escape_name(key), file_name=escape_name(member.name), reason=reason)
    if member.sparse is not None and member.size > MAX_SPARSE_BYTES:
        reason = f"member {member.name!r} is a sparse file of {member.size} bytes; at most {MAX_SPARSE_BYTES} are read"
        return Sample(key=escape_name(key), file_name=escape_name(member.name), reason=reason)
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    # Piece by piece: of a sparse file, tarfile would copy all it has so far at each hole.
    return Sample(read_up_to(file, member.size), escape_name(key), escape_name(member.name))


def _check_end(tar: tarfile.TarFile) -> None:
    # Reading to the end also checks the checksum of a compressed archive.
    while block := tar.fileobj.read(2**16):
        if block.strip(b"\0"):
            raise ValueError("more data follows the archive's end; tar files cannot be joined end to end")


def webdataset_key(name: str) -> str:
    """The path of a member up to the first dot of its base name.

    >>> webdataset_key("shard.1/00017.seg.png")
    'shard.1/00017'
    """
    directory, slash, base = name.rpartition("/")
    return directory + slash + base.partition(".")[0]


def read_parquet(source: io.BufferedReader, config: ReadConfig) -> Iterator[Sample]:
    """The rows of a Parquet file with a column of encoded images."""
    num_bytes = source.seek(0, io.SEEK_END)
    table = open_parquet(source)
    schema = table.schema_arrow
    image = next((name for name in config.parquet_image if name in schema.names and _holds_bytes(schema, name)), None)
    if image is None:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(f"no image column. Columns: {found}. Name the binary one with --parquet_image")
    flat = {field.name for field in schema if not pa.types.is_nested(field.type)}
    key = next((name for name in config.parquet_key if name in flat), None)
    file_name = next((name for name in config.parquet_file_name if name in flat), None)
    columns = _columns_to_read(schema, image, key, file_name)
    num_rows = table.metadata.num_rows
    # Not of its columns: asking a damaged file for those ends the process (pyarrow 25).
    inflated = sum(table.metadata.row_group(index).total_byte_size for index in range(table.num_row_groups))
    if inflated > allowed_inflation(num_bytes):
        raise ValueError(describe_bomb(inflated, num_bytes))
    row = given_bytes = 0
    try:
        # A row at a time: a few images can be as large as the memory.
        batches = (
            batch
            for group in checked_row_groups(source, columns)
            for batch in table.iter_batches(batch_size=1, row_groups=[group], columns=columns, use_threads=False)
        )
        for batch in batches:
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError as error:  # Parquet's writers need not check strings
                yield Sample(reason=f"a text of row {row} is no UTF-8: {error}")
                row += 1
                continue
            for values in rows:
                sample = _parse_row(values, image, key, file_name)
                given_bytes += len(sample.data)
                if given_bytes > allowed_inflation(num_bytes):  # one value of a dictionary can be that of many rows
                    raise ValueError(describe_bomb(given_bytes, num_bytes))
                yield sample
                row += 1
    except Exception as error:
        raise ValueError(f"at row {row} of {num_rows}: {describe_error(error)}") from error
    if row != num_rows:  # nothing in a Parquet file covers its counts
        raise ValueError(f"there are {row} rows, but the file's footer says {num_rows}")


def _holds_bytes(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _columns_to_read(schema: pa.Schema, image: str, key: str | None, file_name: str | None) -> list[str]:
    """Paths of the columns that a Sample is made of: of the image's struct only bytes and path, if that is flat."""
    kind, columns = schema.field(image).type, [image]
    if pa.types.is_struct(kind):
        columns = [f"{image}.bytes"]
        if kind.get_field_index("path") >= 0 and not pa.types.is_nested(kind.field("path").type):
            columns.append(f"{image}.path")
    return list(dict.fromkeys([*columns, *(name for name in (key, file_name) if name is not None)]))


# How a dataset of paths gets their bytes.
EMBED = 'dataset = dataset.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)'


def _parse_row(values: dict[str, Any], image: str, key: str | None, file_name: str | None) -> Sample:
    data, path = values[image], None
    if isinstance(data, dict):  # as Hugging Face datasets store images
        data, path = data["bytes"], data.get("path")
    name = _text(values[file_name] if file_name else path)
    reason = None
    if data is not None and len(data) > MAX_IMAGE_BYTES:
        data, reason = b"", f"{image} has {len(data)} bytes; at most {MAX_IMAGE_BYTES} are read"
    if data is None:
        reason = f"{image} is null"
        if path is not None:
            reason = (
                f"{image} has no bytes, only the path {path!r}: give the image files themselves as --input, or embed "
                f"them with Hugging Face's datasets before to_parquet: {EMBED}"
            )
    return Sample(data or b"", _text(values[key]) if key else None, name, reason)


READERS: dict[str, Reader] = {"tfrecord": read_tfrecord, "tar": read_tar, "parquet": read_parquet}


def _text(value: Any) -> str | None:
    """A key or file name as a record has it."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace") or None
    return None if value is None else printable(str(value)) or None
