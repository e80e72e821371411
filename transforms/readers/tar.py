"""Tar archives: WebDatasets, or any tar of images."""

from __future__ import annotations

import contextlib
import io
import itertools
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import IO

import pyarrow as pa

from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.files.streams import decompress, read_up_to
from maskbeam.transforms.images import has_image_extension
from maskbeam.transforms.prompt_files.in_record import JSON_SUFFIX, RecordPrompts
from maskbeam.transforms.readers.samples import MAX_IMAGE_BYTES, ReadConfig, Sample
from maskbeam.transforms.records import NO_ANNOTATIONS, Annotations, escape_name

# What precedes a tar member's data: names, and whatever else its tools note. Python reads all of it into memory, and
# versions before 3.11.10 and 3.12.6 take quadratic time for it (CVE-2024-6232).
MAX_TAR_HEADER_BYTES = 2**17

MAX_TAR_GLOBAL_HEADERS = 100

# Of a member with holes that take no place in the archive. Photos have none.
MAX_SPARSE_BYTES = 2**26

# A whole archive is read with three of these.
_MAX_READS_PAST_END = 10

_MEMBERS_NAMED = 20

# Images of a tar's sample that are held until a photo shows that they are its annotations: at most so many, or bytes.
HELD_IMAGES = 16

HELD_BYTES = 32 * 2**20


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


def read_tar(source: io.BufferedReader, config: ReadConfig, prompts: RecordPrompts | None = None) -> Iterator[Sample]:
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
        photos = _PhotosOfSample("", prompts)
        try:
            for key, members in itertools.groupby(_tar_members(tar), lambda member: webdataset_key(member.name)):
                photos = _PhotosOfSample(key, prompts)
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

    def __init__(self, key: str, prompts: RecordPrompts | None) -> None:
        self._key = key
        self._read_prompts = prompts
        self._prompts: pa.RecordBatch | None = None
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
        if self._read_prompts is not None and member.isreg() and member.name == f"{self._key}.{JSON_SUFFIX}":
            self._prompts = self._read_prompts.of_json(read().data)
            return []
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
        if self._prompts is not None:
            rows = [replace(row, prompts=self._prompts) for row in rows]
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
